"""Compiling a function to machine code (numba), and what such a function needs that numba does not offer.

Who imports this pays half a second for numba: import it where something is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

# Sums over lanes may be reassociated (they vectorise only then) and multiply-adds fused; NaN, inf and
# signed zero keep their meaning, which plain "fast" would give up.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}


LINE = 64
"""Bytes of a line of the caches. A vector that lies across two of them is fetched twice, and what has just been stored
there comes back late: on the stack as it happens to be, kernels took up to twice the time."""


def compiled(function: Callable[..., Any]) -> Any:
    """A kernel: machine code that holds no GIL, kept on disk where numba finds a writable folder."""
    options = {**_OPTIONS, "fastmath": {"reassoc", "contract"}}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no writable folder anywhere: compile anew in every process
        return njit(**options)(function)


def inlined(function: Callable[..., Any]) -> Any:
    """A function for use in kernels, whose own arithmetic is not reassociated."""
    return njit(fastmath={"contract"}, **_OPTIONS)(function)


@intrinsic(prefer_literal=True)
def stack(context: Any, like: Any, size: Any) -> Any:
    """Pointer to ``size`` elements of the dtype of the array ``like``, on the stack.

    Not an ordinary array, because of this one the compiler knows that nothing else points there: loops that
    write it become vector instructions without checks for overlap at run time.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = context.get_data_type(signature.return_type.dtype)
        room = cgutils.alloca_once(builder, kind, size=size.literal_value)
        room.align = LINE
        return room

    return types.CPointer(like.dtype)(like, size), codegen
