"""Independent pieces of one analysis side by side, a thread each.

A small model's forward is hundreds of tensor operations of a fraction of a millisecond, at which several threads wait
for each other longer than they work. Whole pieces need not wait: each thread computes its own with its share of the
cores, and the interpreter's lock is free while tensors are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from joblib import Parallel, delayed
from threadpoolctl import threadpool_limits

T = TypeVar("T")
MOST = 4
"""Pieces at once: each holds tensors of its own."""


def at_once(jobs: int, device: str | torch.device = "cpu") -> int:
    """How many of ``jobs`` pieces run side by side: no more than torch has threads, and one where a GPU computes."""
    return max(1, min(torch.get_num_threads(), jobs, MOST)) if torch.device(device).type == "cpu" else 1


def side_by_side(
    jobs: Sequence[Callable[[], T]], done: Callable[[], object] = lambda: None, device: str | torch.device = "cpu"
) -> list[T]:
    """What the ``jobs`` return, in their order; ``done`` is called for each, in that order too.

    :func:`at_once` of them run at a time. **No two may use the same model**: hooks and edits are on the model, not on
    the thread (a copy will do). An error of a job is raised here.
    """
    workers = at_once(len(jobs), device)
    grad = torch.is_grad_enabled()

    def run(job: Callable[[], T]) -> T:
        with torch.set_grad_enabled(grad):  # a thread's own
            return job()

    found = []
    with threads(torch.get_num_threads() // workers):
        for one in Parallel(workers, prefer="threads", return_as="generator")(delayed(run)(job) for job in jobs):
            found.append(one)
            done()
    return found


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside the block torch, and the linear algebra of numpy and scipy, work on ``count`` threads."""
    import scipy.linalg  # noqa: F401  # brings a BLAS of its own, which can be limited once it is loaded

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)
