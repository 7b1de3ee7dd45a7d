"""A progress bar on stderr: only where a person is looking, and only for what takes a while.

What an analysis computes meanwhile leaves the interpreter idle for much of the time, so that what draws its figure is
loaded beside it.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress(total: int, name: str) -> Iterator[Callable[[], object]]:
    """A function to call after each of ``total`` pieces of work; draws after one second, on a terminal.

    The libraries of the figures, which take seconds to load, are loaded in a thread of their own.
    """
    threading.Thread(target=importlib.import_module, args=("interp.plot",), daemon=True).start()
    with tqdm(total=total, desc=name, delay=1.0, leave=False, file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        yield bar.update
