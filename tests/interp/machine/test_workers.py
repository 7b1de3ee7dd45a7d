"""Pieces side by side: order, copies, what a thread inherits, and what is put back."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from threadpoolctl import ThreadpoolController, threadpool_info

from interp.machine.workers import MOST, _linear_algebra, at_once, side_by_side, threads

pytestmark = pytest.mark.contract

ROOT = Path(__file__).resolve().parents[2]


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


def test_a_thread_has_the_callers_modes_and_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    def seen() -> tuple[bool, bool, bool]:
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")

    told: list[tuple[str, int]] = []
    tell = torch.set_num_threads

    def told_and_set(count: int) -> None:
        told.append((threading.current_thread().name, count))
        tell(count)

    assert side_by_side([seen, seen]) == [(True, False, False)] * 2
    with torch.no_grad():
        assert side_by_side([seen, seen]) == [(False, False, False)] * 2
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert side_by_side([seen, seen]) == [(False, True, True)] * 2
    monkeypatch.setattr(torch, "set_num_threads", told_and_set)
    side_by_side([seen, seen])
    assert {("piece-0", 1), ("piece-1", 1)} <= set(told), "a new thread's first product would take every core"
    assert side_by_side([torch.get_num_threads]) == [2], "alone it has them all"
    assert side_by_side([torch.get_num_threads] * 2, each=2) == [2, 2]
    assert side_by_side([torch.get_num_threads], each=1) == [1]
    assert torch.get_num_threads() == 2


def test_an_error_stops_the_others_where_they_are_and_is_raised() -> None:
    steps: list[int] = []
    third: list[int] = []

    def long() -> None:
        for step in range(10_000):
            steps.append(step)
            time.sleep(0.01)

    def fails() -> None:
        time.sleep(0.1)
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        side_by_side([long, fails, lambda: third.append(1)])
    after = len(steps)
    time.sleep(0.1)
    assert 0 < len(steps) == after < 10_000 and not third
    assert torch.get_num_threads() == 2 and not [t for t in threading.enumerate() if t.name.startswith("piece")]


STOPPED = """
import signal, sys, threading, time, types
from dataclasses import dataclass
from interp import cli

@dataclass(frozen=True)
class Config:
    seed: int = 0

def run(config):
    import torch
    from interp.machine.workers import side_by_side
    torch.set_num_threads(2)
    ready = threading.Barrier(3)
    def piece():
        weight = torch.randn(300, 300)
        ready.wait()
        while True:
            weight = torch.tanh(weight @ weight)
    def fails():
        ready.wait()
        raise ValueError("lost")
    def ask():
        ready.wait()
        if {interrupted}:
            signal.raise_signal(signal.SIGINT)
    threading.Thread(target=ask, daemon=True).start()
    side_by_side([piece, piece if {interrupted} else fails])

module = types.ModuleType("analyses.example")
module.Config, module.run = Config, run
signal.signal(signal.SIGINT, signal.default_int_handler)
raise SystemExit(cli.main(module, []))
"""


@pytest.mark.parametrize(("interrupted", "says"), [(True, "Ctrl-C"), (False, "lost")])
@pytest.mark.slow
def test_a_command_that_fails_in_one_piece_ends_with_its_line_and_no_abort(interrupted: bool, says: str) -> None:
    """Threads that went on inside torch while the process ends would bring it down with a signal."""
    code = STOPPED.format(interrupted=interrupted)
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1 and says in ended.stderr


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


LOADED_IN_A_THREAD = """
import importlib.machinery, sys, threading
from functools import partial
import torch

found = []
class Look(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target)
        compiled = isinstance(getattr(spec, "loader", None), importlib.machinery.ExtensionFileLoader)
        if compiled and threading.current_thread() is not threading.main_thread():
            found.append(name)
        return spec
sys.meta_path.insert(0, Look)

import models
from interp.machine.progress import progress
from interp.machine.workers import side_by_side
torch.set_num_threads(2)
made = [models.build("mamba", d_in=2, d_out=1, d_model=8, n_layers=1) for _ in range(2)]
with torch.no_grad(), progress(2, "two") as tick:
    side_by_side([partial(model, torch.zeros(2, 3, 2)) for model in made], tick)
for other in threading.enumerate():
    # An earlier tqdm calls its own watch "Thread-1", which never ends.
    if other.name.startswith("Thread") and type(other).__name__ != "TMonitor":
        other.join()
assert "numba" in sys.modules  # the compiled scan has run
print(" ".join(found))
"""


@pytest.mark.slow
def test_no_thread_loads_a_compiled_library() -> None:
    """A thread that does, and one that looks for the loaded libraries, wait for each other for ever."""
    run = subprocess.run([sys.executable, "-c", LOADED_IN_A_THREAD], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


def test_the_loaded_libraries_are_looked_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with threads(1):
        pass

    def walk(self: ThreadpoolController) -> None:
        raise AssertionError("the loaded libraries were looked through a second time")

    monkeypatch.setattr(ThreadpoolController, "_load_libraries", walk)
    with threads(1):
        assert {pool["num_threads"] for pool in _linear_algebra().info()} == {1}
