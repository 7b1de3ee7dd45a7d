"""Pieces side by side: order, copies, what a thread inherits, and what is put back."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from threadpoolctl import threadpool_info

from interp.workers import MOST, at_once, side_by_side, threads


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def later(value: int, seconds: float) -> int:
    time.sleep(seconds)
    return value


def test_results_come_in_the_order_of_the_jobs_and_each_is_reported() -> None:
    done: list[int] = []
    found = side_by_side([partial(later, i, 0.05 * (4 - i)) for i in range(4)], lambda: done.append(len(done)))
    assert found == [0, 1, 2, 3] and done == [0, 1, 2, 3]


def test_two_run_at_once() -> None:
    """Each waits for the other: one after another they would wait for ever."""
    both = threading.Barrier(2, timeout=20)
    assert sorted(side_by_side([both.wait, both.wait])) == [0, 1]


def test_a_thread_has_its_share_of_the_cores_and_the_callers_gradient_mode() -> None:
    def seen() -> tuple[int, bool]:
        return torch.get_num_threads(), torch.is_grad_enabled()

    with torch.no_grad():
        assert side_by_side([seen, seen]) == [(1, False)] * 2
    assert side_by_side([seen, seen]) == [(1, True)] * 2
    assert side_by_side([seen]) == [(2, True)], "alone it has them all"
    assert torch.get_num_threads() == 2


def test_an_error_is_raised_here_and_the_threads_are_put_back() -> None:
    def fails() -> None:
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        side_by_side([partial(later, 0, 0.05), fails])
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("jobs", "device", "expected"), [(5, "cpu", 2), (1, "cpu", 1), (0, "cpu", 1), (5, "cuda", 1)])
def test_how_many_at_once(jobs: int, device: str, expected: int) -> None:
    assert at_once(jobs, device) == expected


def test_no_more_at_once_than_memory_is_thought_to_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert at_once(64) == MOST


def test_nothing_to_do() -> None:
    assert side_by_side([]) == []


def test_threads_limits_torch_and_linear_algebra() -> None:
    def blas() -> set[int]:
        return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}

    before = blas()
    with threads(1):
        assert torch.get_num_threads() == 1 and blas() == {1}
    assert torch.get_num_threads() == 2 and blas() == before
