"""Commands run side by side on this machine, each in a process of its own.

A command is started again when its process is killed, a bounded number of times; what it says on
stderr is kept in a file, and the last line of it is the reason where it fails. A worker's standard
input is a pipe from here: it ends when this process ends, however it ends, and a training that runs
with ``--attached`` then stops in order.
"""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hooks.errors import BadArgument
from interp.machine.provenance import REPOSITORY
from interp.training import resume

AGAIN = 2
"""How often a job is started again after its process was killed."""
POLL = 0.05
LOCK_WAIT = 60.0
"""Seconds for which a folder may stay locked by a worker of an earlier sweep that is just stopping."""
STOP_WAIT = 60.0
"""Seconds that a worker has to finish its step and save, once it was asked to stop."""


@dataclass(frozen=True)
class Job:
    """Arguments of a Python to run, the folder that it writes, and the file that keeps what it says on stderr.

    The paths are absolute: a worker on another machine starts elsewhere.
    """

    name: str
    arguments: tuple[str, ...]
    folder: Path
    log: Path


@dataclass(frozen=True)
class Outcome:
    """How a job ended: ``reason`` is empty where it succeeded; ``starts`` counts its processes."""

    name: str
    reason: str
    starts: int

    @property
    def ok(self) -> bool:
        return not self.reason


@dataclass
class _Worker:
    job: Job
    process: subprocess.Popen[bytes]
    starts: int


def run(jobs: Sequence[Job], workers: int, tick: Callable[[], Any] = lambda: None) -> dict[str, Outcome]:
    """How each of ``jobs`` ended, at most ``workers`` of them at a time, in the order given.

    ``tick`` is called after each. One that fails does not end the others. On Ctrl-C, or any other
    exception, every worker is asked to stop in order and waited for before it is raised.
    """
    waiting = collections.deque((job, 1) for job in jobs)
    running: list[_Worker] = []
    outcomes: dict[str, Outcome] = {}
    with _stopped_at_the_end(running):
        while waiting or running:
            while waiting and len(running) < workers:
                job, starts = waiting.popleft()
                running.append(_Worker(job, _started(job, starts), starts))
            ended = [worker for worker in running if worker.process.poll() is not None]
            for worker in ended:
                running.remove(worker)
                _close(worker.process)
                number = worker.process.returncode
                if number < 0 and worker.starts <= AGAIN:
                    waiting.appendleft((worker.job, worker.starts + 1))
                else:
                    outcomes[worker.job.name] = Outcome(worker.job.name, _reason(worker), worker.starts)
                    tick()
            if not ended:
                time.sleep(POLL)
    return outcomes


def _started(job: Job, starts: int) -> subprocess.Popen[bytes]:
    """The process of ``job``, in a session of its own: Ctrl-C on the terminal reaches this process only, which passes
    it on once.
    """
    _wait_until_free(job.folder)
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH", ""))))
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "wb" if starts == 1 else "ab") as log:
        return subprocess.Popen(
            [sys.executable, *job.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=log,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )


def _wait_until_free(folder: Path) -> None:
    """Until no training holds ``folder``: one whose sweep was killed finishes its step first."""
    until = time.monotonic() + LOCK_WAIT
    while (folder / "resume").is_dir() and time.monotonic() < until:
        with contextlib.suppress(BadArgument), resume.only_one(folder / "resume"):
            return
        time.sleep(POLL)


@contextlib.contextmanager
def _stopped_at_the_end(running: list[_Worker]) -> Iterator[None]:
    try:
        yield
    finally:
        for worker in running:
            with contextlib.suppress(OSError):
                worker.process.send_signal(signal.SIGINT)
        until = time.monotonic() + STOP_WAIT
        try:
            for worker in running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.process.wait(max(0.0, until - time.monotonic()))
        finally:  # also after a second Ctrl-C
            for worker in running:
                worker.process.kill()
                worker.process.wait()
                _close(worker.process)


def _close(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()


def _reason(worker: _Worker) -> str:
    """Why a worker failed: its last line on stderr, or the signal that killed it; empty for success."""
    number = worker.process.returncode
    if number == 0:
        return ""
    if number < 0:
        killed = signal.Signals(-number).name
        return f"its process was killed {worker.starts} times, last by {killed} (is there enough memory?)"
    lines = [
        line.strip()
        for line in worker.job.log.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    return lines[-1].removeprefix("error: ") if lines else f"it ended with exit code {number} and said nothing"
