"""Standard streams that are closed, full, read by nobody, or lack a letter: printing never ends in a traceback."""

from __future__ import annotations

import contextlib
import io
import os
import sys


def open_closed() -> None:
    """Put the null device where the shell closed a stream (``>&-``), so that no file of ours is given its number.

    ``sys.stdin`` stays None then: whoever reads it has to know.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the system gives the lowest number that is free: this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # as long as the process


def take_every_letter() -> None:
    """From now on a Δ on a terminal that has none (cp1252, ascii) is a "?"; stderr is like that from the start."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def say(text: str) -> None:
    """``text`` on stdout; quiet where the reader (``| head``) has gone, an OSError of one line where it cannot be."""
    try:
        print(text, flush=True)
    except OSError as error:
        unprinted(error)


def unprinted(error: OSError) -> None:
    """Print nothing more, after ``error`` of stdout; raises it anew in words, unless only the reader has gone."""
    _mute(1)
    if not isinstance(error, BrokenPipeError):
        raise OSError(error.errno, f"could not print: {error.strerror}") from error


def complain(line: str) -> None:
    """``line`` on stderr, if that can be."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        _mute(2)


def flushed(code: int) -> int:
    """The exit code ``code`` once all that was printed is written; 1, and a line, where it cannot be.

    Python itself would write it after the last line of the program, and print a traceback there.
    """
    try:
        try:
            sys.stdout.flush()
        except OSError as error:
            unprinted(error)
    except OSError as error:
        complain(f"error: {error.strerror}; free some space or print elsewhere")
        return code or 1
    return code


def _mute(number: int) -> None:
    """Send what is still to be written to the stream ``number`` to the null device."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
