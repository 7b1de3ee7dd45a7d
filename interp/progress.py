"""A progress bar on stderr: only where a person is looking, and only for what takes a while."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress(total: int, name: str) -> Iterator[Callable[[], object]]:
    """A function to call after each of ``total`` pieces of work; draws after one second, on a terminal."""
    with tqdm(total=total, desc=name, delay=1.0, leave=False, file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        yield bar.update
