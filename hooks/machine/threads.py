"""The threads that run compiled code.

Such code holds no GIL, so ranges of units go to a small pool of Python threads, as many as
``torch.get_num_threads()``. numba's own parallel loops would bring a threading layer along: "workqueue" aborts the
process when two threads call it at once, "omp" makes torch hang in a forked child. The pool serves the main thread of
the process that imported this module; other threads and forked children run the same code by themselves. The bits are
the same either way.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

_IMPORTING_PROCESS = os.getpid()
_WORTH_A_THREAD = 2**16
"""State updates, about 50 µs."""


def run(kernel: Callable[..., None], units: int, groups: int, work: int, args: tuple[Any, ...]) -> None:
    """Call ``kernel`` on all units, by as many threads as that is worth.

    Each takes the next piece when it has done one, since torch's own idle threads may still spin on a core.
    """
    alone = threading.current_thread() is not threading.main_thread() or os.getpid() != _IMPORTING_PROCESS
    threads = 1 if alone else min(torch.get_num_threads(), units, 1 + work // _WORTH_A_THREAD)
    pieces = 1 if threads == 1 else min(units, 4 * threads)
    queue = iter([(units * k // pieces, units * (k + 1) // pieces) for k in range(pieces)])

    def take() -> None:
        for first, last in queue:
            kernel(first, last, groups, *args)

    others = [_pool(threads - 1).submit(take) for _ in range(threads - 1)]
    take()
    for other in others:
        other.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="scan")
