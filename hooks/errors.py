"""The one family of errors: each message is one line that says what was asked, what there is, what to try."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MambascopeError(Exception):
    """Root of every error that this project raises on purpose."""


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


def unknown(kind: str, asked: str, have: Iterable[str], hint: str = "") -> str:
    """The one-line message for a name that does not exist, with the nearest names first.

    ``unknown("task", "lingre", ["linreg"])`` is
    ``no task is called "lingre"; did you mean "linreg"? (there is: linreg)``.
    """
    names = list(have)
    near = difflib.get_close_matches(asked, names, n=3, cutoff=0.6)
    guess = "; did you mean " + " or ".join(f'"{name}"' for name in near) + "?" if near else ";"
    shown = ", ".join(names[:12]) + (f", … {len(names) - 12} more" if len(names) > 12 else "")
    message = f'no {kind} is called "{asked}"{guess} (there is: {shown or "nothing yet"})'
    return f"{message} {hint}".rstrip()
