"""Training in several processes and in mixed precision, as ``accelerate launch`` starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.interp.tiny import metrics, same, weights

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.contract, pytest.mark.slow]


SCRIPT = """
import dataclasses, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.interp import tiny
config = dataclasses.replace(tiny.SEARCH, precision={precision!r})
print(tiny.go(Path({out!r}), config).card["processes"])
"""


def launch(tmp_path: Path, name: str, processes: int, precision: str = "fp32") -> Path:
    script = tmp_path / f"{name}.py"
    out = tmp_path / name
    script.write_text(SCRIPT.format(root=str(ROOT), out=str(out), precision=precision))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu"]
    if processes > 1:
        command += ["--num_processes", str(processes), "--main_process_port", "0"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    done = subprocess.run(
        [*command, str(script)],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert str(processes) in done.stdout
    return out


def test_two_processes_share_a_batch_and_write_once(tmp_path: Path) -> None:
    two, again = launch(tmp_path, "two", 2), launch(tmp_path, "again", 2)
    assert same(weights(two), weights(again))
    assert [row["step"] for row in metrics(two)] == [3, 6, 9, 12]
    one = launch(tmp_path, "one", 1)
    assert not same(weights(one), weights(two))  # other prompts: each process draws its own


def test_mixed_precision_trains(tmp_path: Path) -> None:
    mixed, full = launch(tmp_path, "mixed", 1, "bf16"), launch(tmp_path, "full", 1)
    assert not same(weights(mixed), weights(full))
    assert all(value.dtype != torch.bfloat16 for value in weights(mixed).values())
