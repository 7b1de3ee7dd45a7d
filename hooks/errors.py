"""The one family of errors: each message is one line that says what was asked, what there is, what to try."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

LONGEST = 800
"""Characters of a message: what somebody put in is told in a few words, and this is for what slips through."""


class MambascopeError(Exception):
    """Root of every error that this project raises on purpose. Its message is one line of at most ``LONGEST``."""

    def __init__(self, message: object = "") -> None:
        line = " ".join(str(message).split())
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[-LONGEST // 3 :]}")


class BadArgument(MambascopeError, ValueError):
    """What was asked for does not exist or would give a wrong number; commands exit with 2."""


class RunFailed(MambascopeError, RuntimeError):
    """The request was fine and the run did not succeed; commands exit with 1."""


class UnknownSite(BadArgument):
    """A pattern that matches no site of the model."""


class TooLarge(BadArgument):
    """A request whose tensors would not fit in the memory that it may use."""


class DidNotFire(RunFailed):
    """An edit or a read whose site never fired: nothing was changed and nothing was read."""


class NonFinite(RunFailed):
    """NaN or inf in the inputs, the weights, a site or the output."""


def told(value: object) -> str:
    """``value`` in a few words, for a message of one line: never the numbers of a tensor or the layers of a model.

    A number, None or a short text as it is written; a tensor or an array by its class, shape and dtype; a collection
    by its class and size; anything else by its class alone.
    """
    kind = type(value).__name__
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return short(repr(value))
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if isinstance(shape, tuple) and dtype is not None:
        return f"a {kind} of shape {tuple(shape)} and {str(dtype).removeprefix('torch.')}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, list | tuple | set | frozenset | range | Mapping):
        plain = not isinstance(value, Mapping) and all(isinstance(one, int | float | str) for one in value)
        written = repr(value) if plain and len(value) <= 8 else ""
        return written if 0 < len(written) <= 60 else f"a {kind} of {len(value)}"
    return f"a {kind}"


def short(text: str, most: int = 60) -> str:
    """``text`` on one line of at most ``most`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 2]} …"


def unknown(kind: str, asked: object, have: Iterable[str], hint: str = "") -> str:
    """The one-line message for a name that does not exist, with the nearest names first.

    ``unknown("task", "lingre", ["linreg"])`` is
    ``no task is called "lingre"; did you mean "linreg"? (there is: linreg)``.
    """
    names, asked = list(have), short(asked) if isinstance(asked, str) else told(asked)
    near = difflib.get_close_matches(asked, names, n=3, cutoff=0.6)
    guess = "; did you mean " + " or ".join(f'"{name}"' for name in near) + "?" if near else ";"
    shown = ", ".join(names[:12]) + (f", … {len(names) - 12} more" if len(names) > 12 else "")
    message = f'no {kind} is called "{asked}"{guess} (there is: {shown or "nothing yet"})'
    return f"{message} {hint}".rstrip()
