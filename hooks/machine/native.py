"""Compiling a function to machine code (numba), and what such a function needs that numba does not offer.

Who imports this pays half a second for numba: import it where something is compiled.
"""

from __future__ import annotations

import functools
import hashlib
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from numba import config, njit, types
from numba.core import cgutils
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.extending import intrinsic

# Sums over lanes may be reassociated (they vectorise only then) and multiply-adds fused; NaN, inf and
# signed zero keep their meaning, which plain "fast" would give up.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}


LINE = 64
"""Bytes of a line of the caches. A vector that lies across two of them is fetched twice, and what has just been stored
there comes back late: on the stack as it happens to be, kernels took up to twice the time."""


def usable() -> bool:
    """Whether kernels can run. Where ``NUMBA_DISABLE_JIT`` is set they cannot: the caller takes its definition.

    That is said once, by a warning.
    """
    if config.DISABLE_JIT:
        _say_that_jit_is_off()
    return not config.DISABLE_JIT


@functools.cache
def _say_that_jit_is_off() -> None:
    warnings.warn(
        "NUMBA_DISABLE_JIT is set: recurrences run by their definition in torch, the same numbers many times slower; "
        "unset it to compile them",
        RuntimeWarning,
        stacklevel=3,
    )


def compiled(function: Callable[..., Any]) -> Any:
    """A kernel: machine code that holds no GIL, kept on disk where numba finds a writable folder."""
    kernel = njit(fastmath={"reassoc", "contract"}, **_OPTIONS)(function)
    with suppress(RuntimeError, OSError):  # no writable folder anywhere: compile anew in every process
        kernel._cache = _Cache(function)  # what cache=True does, with numba's own cache
    return kernel


class _Cache(FunctionCache):
    """numba's cache on disk, for which a damaged file is none, and which may fail to save."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        stamp = self._impl.locator.get_source_stamp()
        self._cache_file = _Sealed(self.cache_path, self._impl.filename_base, stamp)

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):  # a full disk, a folder that has gone: what was compiled is in memory
            super().save_overload(sig, data)


class _Sealed(IndexDataCacheFile):
    """Files that end in a digest of what is before it.

    numba reads them back unasked: one that was cut off made every kernel fail for ever, and a flipped bit of machine
    code is a wrong number or a crash.
    """

    @contextmanager
    def _open_for_write(self, filepath: str) -> Iterator[Any]:
        content = io.BytesIO()
        yield content
        with super()._open_for_write(filepath) as file:
            file.write(content.getvalue() + hashlib.sha256(content.getvalue()).digest())

    def _load_index(self) -> Any:
        return super()._load_index() if _is_whole(self._index_path) else {}

    def _load_data(self, name: str) -> Any:
        if not _is_whole(self._data_path(name)):
            raise OSError(f"{name} is damaged")  # as if it had gone: numba compiles, and writes it again
        return super()._load_data(name)


def _is_whole(path: str) -> bool:
    """Whether the file is there and its digest is that of its content, which alone is then unpickled."""
    try:
        content = Path(path).read_bytes()
    except OSError:
        return False
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]


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
