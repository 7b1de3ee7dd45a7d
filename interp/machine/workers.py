"""Independent pieces of one analysis side by side, a thread each.

A small model's forward is hundreds of tensor operations of a fraction of a millisecond, at which several threads wait
for each other longer than they work. Whole pieces need not wait: each thread computes its own, and the interpreter's
lock is free while tensors are computed.

**No thread loads a library.** The loader's lock is held while a library is loaded, with the interpreter's lock, and
while threadpoolctl (up to 3.6, in this project and in others that use it) looks for the loaded ones, without it: one of
each at the same time wait for each other for ever. So what the pieces need is loaded before the first of them starts,
and the linear algebra is looked for once.
"""

from __future__ import annotations

import ctypes
import importlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch
from threadpoolctl import ThreadpoolController

T = TypeVar("T")
MOST = 4
"""Pieces at once: each holds tensors of its own."""
LOADED_FIRST = ("numba",)
"""What is imported only where it is needed, and by nearly every piece: the compiled scans."""


def at_once(jobs: int, device: str | torch.device = "cpu") -> int:
    """How many of ``jobs`` pieces run side by side: no more than torch has threads, and one where a GPU computes."""
    return max(1, min(torch.get_num_threads(), jobs, MOST)) if torch.device(device).type == "cpu" else 1


def side_by_side(
    jobs: Sequence[Callable[[], T]],
    done: Callable[[], object] = lambda: None,
    device: str | torch.device = "cpu",
    each: int | None = None,
) -> list[T]:
    """What the ``jobs`` return, in their order; ``done`` is called after each, in this thread.

    :func:`at_once` of them run at a time. **No two may use the same model**: hooks and edits are on the model, not on
    the thread (a copy will do). ``each``: threads of one job's tensor operations, an equal share of the cores if not
    given; a compiled scan takes one in any case. Modes of torch (gradients, inference, autocast) are the caller's.
    An error of a job, or Ctrl-C, is raised here after the other jobs have been stopped where they are.
    """
    workers = at_once(len(jobs), device)
    if workers > 1:
        for library in LOADED_FIRST:
            importlib.import_module(library)
    with threads(each or torch.get_num_threads() // workers):
        if workers == 1:
            return [_then(job(), done) for job in jobs]
        return _in_threads(jobs, done, workers)


def _then(found: T, done: Callable[[], object]) -> T:
    done()
    return found


class _Stop(SystemExit):
    """Ends a job from outside; a SystemExit, because a thread ends by it without a word."""


def _in_threads(jobs: Sequence[Callable[[], T]], done: Callable[[], object], workers: int) -> list[T]:
    left = iter(list(enumerate(jobs)))  # the next one is taken in one step of the interpreter
    news: SimpleQueue[tuple[int, T] | BaseException] = SimpleQueue()
    modes = _modes()

    def work() -> None:
        try:
            with modes():
                for index, job in left:
                    news.put((index, job()))
        except BaseException as error:
            news.put(error)

    others = [threading.Thread(target=work, name=f"piece-{i}", daemon=True) for i in range(workers)]
    found: dict[int, T] = {}
    try:
        for other in others:
            other.start()
        while len(found) < len(jobs):
            try:
                heard = news.get(timeout=0.5)  # a signal that another thread was given is seen between two waits
            except Empty:
                continue
            if isinstance(heard, BaseException):
                raise heard
            found[heard[0]] = heard[1]
            done()
    except BaseException:
        # Left alone they would go on computing, and be killed inside torch when the process ends: an abort.
        for other in others:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(other.ident or 0), ctypes.py_object(_Stop))
        raise
    finally:
        for other in others:
            if other.ident is not None:
                other.join()
    return [found[index] for index in range(len(jobs))]


def _modes() -> Callable[[], AbstractContextManager[None]]:
    """A context in which another thread has this one's modes and number of threads, each of which is a thread's own."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    cast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    count = torch.get_num_threads()

    @contextmanager
    def inside() -> Iterator[None]:
        torch.set_num_threads(count)  # a new thread's first products would take every core
        with torch.inference_mode(inference), torch.set_grad_enabled(grad), torch.autocast("cpu", dtype, enabled=cast):
            yield

    return inside


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside the block torch, and the linear algebra of numpy and scipy, work on ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with _linear_algebra().limit(limits=count):
            yield
    finally:
        torch.set_num_threads(before)


@cache
def _linear_algebra() -> ThreadpoolController:
    """The libraries behind the products of numpy and scipy."""
    import scipy.linalg  # noqa: F401  # brings a BLAS of its own, which can be limited once it is loaded

    return ThreadpoolController().select(user_api="blas")
