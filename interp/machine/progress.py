"""Progress on stderr: a bar on a terminal and in a notebook, a line every ten seconds in a log.

Nothing is shown of what takes less than two seconds (in a log: ten), with ``TQDM_DISABLE=1`` in the environment, in
all but the first of several processes, and where there is no stderr.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

T = TypeVar("T")
DELAY, EVERY = 2.0, 10.0
"""Seconds before a bar is drawn, and between two lines of a log."""


class Shown(Protocol):
    """What tqdm's bars and the lines of a log have in common."""

    def update(self, n: int = 1, /) -> object: ...

    def set_postfix_str(self, s: str, /) -> None: ...

    def close(self) -> None: ...


@contextmanager
def progress(total: int | None, name: str) -> Iterator[Callable[[], object]]:
    """A function to call after each of ``total`` pieces of work."""
    with bar(total, name) as shown:
        yield shown.update


def followed(pieces: Collection[T], name: str) -> Iterator[T]:
    """The ``pieces``, one after another, with the progress shown under that name."""
    with progress(len(pieces), name) as done:
        for piece in pieces:
            yield piece
            done()


@contextmanager
def bar(total: int | None, name: str, *, initial: int = 0) -> Iterator[Shown]:
    """What is shown of ``total`` pieces, of which ``initial`` were done before; of no known number where None."""
    shown = _shown(_place(), total, name, initial)
    try:
        yield shown
    finally:
        shown.close()


def _place() -> str:
    """Who looks at stderr: "terminal", "notebook", "log", or "" for nobody."""
    others = os.environ.get("TQDM_DISABLE", "") not in ("", "0") or os.environ.get("RANK", "0") != "0"
    if others or sys.stderr is None or getattr(sys.stderr, "closed", False):
        return ""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if "IPKernelApp" in getattr(shell, "config", {}):
        return "notebook"
    try:
        return "terminal" if sys.stderr.isatty() else "log"
    except (OSError, ValueError):
        return ""


def _shown(place: str, total: int | None, name: str, initial: int) -> Shown:
    look: dict[str, Any] = {"total": total, "desc": name, "initial": initial, "leave": False, "delay": DELAY}
    if place == "notebook":
        from tqdm.auto import tqdm as widget  # asks for the notebook's widgets when it is loaded

        return widget(**look)  # type: ignore[no-any-return]
    if place == "log":
        return _Line(total, name, initial)
    return tqdm(**look, file=sys.stderr, disable=place != "terminal")


class _Line:
    """One part of the line that a log gets; what is open at the same time stands in one line."""

    opened: list[_Line] = []  # noqa: RUF012  # of the process
    lock = threading.Lock()

    def __init__(self, total: int | None, name: str, initial: int) -> None:
        self.total, self.name, self.initial, self.done = total, name, initial, initial
        self.note, self.began = "", time.monotonic()
        with self.lock:
            self.opened.append(self)
            if len(self.opened) == 1:
                _Line.over = threading.Event()
                threading.Thread(target=_report, args=(_Line.over,), name="progress", daemon=True).start()

    def update(self, n: int = 1) -> None:
        self.done += n

    def set_postfix_str(self, s: str) -> None:
        self.note = s

    def close(self) -> None:
        with self.lock:
            if self in self.opened:
                self.opened.remove(self)
                if not self.opened:
                    self.over.set()

    over: threading.Event

    def __str__(self) -> str:
        seconds, new = time.monotonic() - self.began, self.done - self.initial
        parts = [f"{self.name} {self.done}" + (f" of {self.total}" if self.total is not None else "")]
        parts.append(f"{seconds:.0f} s")
        if self.total is not None and new > 0 and self.done < self.total:
            parts.append(f"about {seconds / new * (self.total - self.done):.0f} s left")
        return ", ".join([*parts, *filter(None, [self.note])])


def _report(over: threading.Event) -> None:
    """A line every ten seconds until all is done; a stream that cannot be written is left alone."""
    while not over.wait(EVERY):
        with _Line.lock:
            text = "; ".join(map(str, _Line.opened))
        try:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()
        except (OSError, ValueError):
            return
