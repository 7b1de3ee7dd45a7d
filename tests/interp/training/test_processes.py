"""Training in several processes and in mixed precision."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from hooks.errors import BadArgument
from interp.training import fit, resume
from interp.training.recipe import TrainConfig
from tests.interp.tiny import CONFIG, SEARCH, go, kill_at_call, metrics, same, weights

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [pytest.mark.contract, pytest.mark.usefixtures("quick_disk")]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def together(count: int, body: Callable[[], object]) -> list[int | None]:
    """Run ``body`` in ``count`` forked processes that see each other, as a launcher starts them.

    Forked and not launched, because each launched process would load torch again.
    """
    port = free_port()

    def one(rank: int) -> None:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"})
        AcceleratorState._reset_state(reset_partial_state=True)
        body()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # one that is done at once would leave while another is still connecting
            torch.distributed.destroy_process_group()

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=one, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def trained(out: Path, config: TrainConfig = CONFIG, count: int = 2) -> Path:
    assert together(count, lambda: go(out, config)) == [0] * count
    return out


@pytest.mark.slow
def test_two_processes_share_a_batch_and_write_once(tmp_path: Path) -> None:
    two, again = trained(tmp_path / "two", SEARCH), trained(tmp_path / "again", SEARCH)
    assert same(weights(two), weights(again))
    assert [row["step"] for row in metrics(two)] == [3, 6, 9, 12, 15, 18]
    assert go(two, SEARCH).card["processes"] == 2
    one = trained(tmp_path / "one", SEARCH, count=1)
    assert not same(weights(one), weights(two))  # other prompts: each process draws its own


def test_each_process_draws_its_own_share_of_the_prompts(tmp_path: Path) -> None:
    original = fit.training_batch

    def body() -> None:
        def noted(run: fit.Run, step: int, steps: int) -> Any:
            batch = original(run, step, steps)
            file = tmp_path / f"{run.accelerator.process_index}-{step}"
            file.write_text(repr(batch[0].tokens.tolist()))
            return batch

        fit.training_batch = noted
        go(tmp_path / "run")

    assert together(2, body) == [0, 0]
    shares = [(tmp_path / f"{rank}-3").read_text() for rank in range(2)]
    assert shares[0] != shares[1]


@pytest.mark.slow
def test_two_processes_killed_go_on_as_two(tmp_path: Path) -> None:
    def body() -> None:
        kill_at_call(resume, "keep", 2, before=True)
        go(tmp_path / "broken")

    assert together(2, body) != [0, 0]
    state = resume.read(tmp_path / "broken" / "resume" / "state.safetensors")
    assert state.progress["step"] == 4
    assert state.tensors["rng"].shape[0] == 2
    with pytest.raises(BadArgument, match="start as many as before"):
        go(tmp_path / "broken")
    trained(tmp_path / "broken")
    trained(tmp_path / "whole")
    assert same(weights(tmp_path / "broken"), weights(tmp_path / "whole"))


def test_a_batch_that_cannot_be_shared_equally_is_refused(tmp_path: Path) -> None:
    def body() -> None:
        with pytest.raises(BadArgument, match="cannot be shared equally by 2"):
            go(tmp_path, dataclasses.replace(CONFIG, batch_size=7))

    assert together(2, body) == [0, 0]


def test_mixed_precision_changes_the_arithmetic_and_not_the_weights_type(tmp_path: Path) -> None:
    mixed = trained(tmp_path / "mixed", dataclasses.replace(CONFIG, precision="bf16"), count=1)
    full = trained(tmp_path / "full", count=1)
    assert not same(weights(mixed), weights(full))
    assert {value.dtype for value in weights(mixed).values()} == {torch.float32, torch.int64}
    for name, value in weights(full).items():
        if value.is_floating_point():
            torch.testing.assert_close(weights(mixed)[name], value, rtol=0.3, atol=0.05)


SMALL = [
    *("--task", "linreg", "--model", "mamba", "--task-config", "d=2", "n_pairs=5"),
    *("--model-config", "d_model=8", "n_layers=2", "d_state=4", "--batch-size", "8"),
    *("--learning-rates", "0.01", "--steps", "6", "--json", "--out"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "processes", "precision"),
    [
        (["torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"], 2, "fp32"),
        # accelerate starts several processes of its own on GPUs, and on CPUs through MPI only.
        (["accelerate.commands.launch", "--cpu", "--mixed_precision", "bf16"], 1, "bf16"),
    ],
)
def test_the_launchers_start_the_command(tmp_path: Path, launcher: list[str], processes: int, precision: str) -> None:
    command = [sys.executable, "-m", *launcher, "-m", "analyses.train", *SMALL, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    card = json.loads(done.stdout)["card"]  # printed once, whatever the number of processes
    assert card["processes"] == processes
    assert card["recipe"]["precision"] == precision
