"""The same commands as tasks of a Ray cluster; imported when it is asked for, Ray itself when a sweep starts.

Every task runs its command as :mod:`analyses.sweep.local` does, so a cell is trained by the same code in
a process of its own. Ray runs the task of a lost node again elsewhere, and the training goes on from
its own checkpoints where the folder is on a disk that the nodes share.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

from analyses.sweep import local as sweep_local
from analyses.sweep.local import AGAIN, Job, Outcome
from hooks.errors import BadArgument, RunFailed

LOOPBACK = "127.0.0.1"
SILENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""No report to anybody; the second is the answer that Ray asks for in a warning, on tasks without a GPU."""
ONLY_HERE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Read when Ray is imported: without it Ray takes the address 127.0.0.1 for a slip and binds to every interface."""


def run(
    jobs: Sequence[Job],
    workers: int,
    tick: Callable[[], Any] = lambda: None,
    *,
    threads: int = 1,
    address: str | None = None,
) -> dict[str, Outcome]:
    """How each of ``jobs`` ended, each a Ray task that takes ``threads`` CPUs.

    ``address`` is a running cluster's; without it a Ray of ``workers`` × ``threads`` CPUs is started
    on this machine, bound to the loopback device, and ended afterwards. Raises BadArgument where Ray
    is not installed or the cluster cannot be reached, RunFailed where Ray binds elsewhere than asked.
    """
    os.environ.update(SILENT if address is not None else {**SILENT, **ONLY_HERE})
    try:
        import ray
    except ImportError as error:
        raise BadArgument(
            'Ray is not installed, and --engine ray needs it: pip install "mambascope[cluster]"; '
            "--engine local needs nothing"
        ) from error
    logging.getLogger("ray").setLevel(logging.ERROR)
    _answers(address)
    here: dict[str, Any] = {"num_cpus": workers * threads, "include_dashboard": False, "_node_ip_address": LOOPBACK}
    place = {"address": "local", **here} if address is None else {"address": address}
    try:
        ray.init(**place, log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadArgument(f"no Ray cluster at {address or 'this machine'}: {reason}; see `ray status`") from error
    try:
        bound = ray.util.get_node_ip_address()
        if address is None and bound != LOOPBACK:
            raise RunFailed(f"Ray has bound to {bound} and not to {LOOPBACK}; --engine local does without it")
        task = ray.remote(num_cpus=threads, max_retries=AGAIN)(_one)
        waiting = {task.options(name=job.name).remote(job): job for job in jobs}
        return _gathered(ray, waiting, tick)
    finally:
        ray.shutdown()


def _answers(address: str | None) -> None:
    """Nothing, if something listens at a plain host:port, or BadArgument: Ray itself would try for minutes."""
    host, colon, port = (address or "").rpartition(":")
    if not (colon and port.isdigit() and "/" not in host):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise BadArgument(f"no Ray cluster at {address}: {error}; see `ray status`, or leave --address out") from error


def _one(job: Job) -> Outcome:
    """What a task does, on a worker."""
    return sweep_local.run([job], 1)[job.name]


def _gathered(ray: Any, waiting: dict[Any, Job], tick: Callable[[], Any]) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    try:
        while waiting:
            (done, *_), _ = ray.wait(list(waiting), num_returns=1)
            job = waiting.pop(done)
            try:
                outcomes[job.name] = ray.get(done)
            except ray.exceptions.RayError as error:
                reason = " ".join(str(error).split())[:200]
                outcomes[job.name] = Outcome(job.name, f"Ray lost it: {reason}", AGAIN + 1)
            tick()
    except BaseException:
        for one in waiting:
            ray.cancel(one)
        raise
    return outcomes
