"""Every command refuses, before the first prompt is drawn, what would not fit, and says what would."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from analyses.__main__ import questions
from interp import cli, evaluate, tasks
from interp.machine import room
from interp.tasks.base import model_shape

ROOT = Path(__file__).resolve().parents[2]
ASKED = {
    "ablate_delta": ["--prompts", "{}"],
    "ablate_delta --reference": ["--reference", "{}"],
    "probe_layers": ["--prompts", "{}"],
    "probe_layers --queries": ["--queries", "{}"],
    "compare_states": ["--models", "mamba-isotropic_linreg", "s4d-isotropic_linreg", "--prompts", "{}"],
    "attribute_outliers": ["--prompts", "{}"],
    "feature_learning": ["--prompts", "{}"],
    "learning_curves": ["--models", "mamba-isotropic_linreg", "--prompts", "{}"],
    "zoo": ["--models", "mamba-isotropic_linreg", "--prompts", "{}"],
    "train": ["--task", "linreg", "--model", "mamba", "--batch-size", "{}"],
}
GB = 10**9


def command(name: str) -> Any:
    return importlib.import_module(f"analyses.{name.split()[0]}")


@pytest.mark.contract
def test_every_command_that_takes_numbers_of_prompts_is_here() -> None:
    """A sweep's cells are trainings, which count for themselves."""
    assert {name.split()[0] for name in ASKED} == set(questions()) - {"sweep"}


@pytest.mark.contract
@pytest.mark.parametrize("name", ASKED)
def test_a_thousand_million_are_refused_with_the_number_that_fits(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "free_memory", lambda device: 16 * GB)
    flags = ASKED[name]

    def asked(number: int) -> str:
        argv = [flag.format(number) for flag in flags] + ["--out", str(tmp_path)]
        assert cli.main(command(name), argv) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n"), os.listdir(tmp_path)) == ("", 1, [])
        return err

    said = re.search(rf"{flags[-2]} 1000000000 would take about .*, 16 GB are free: about (\d+) fit$", asked(10**9))
    assert said is not None
    fits = int(said[1])
    assert f"about {fits} fit" in asked(fits + 1)

    class Begun(Exception):
        pass

    def begun(*parts: room.Part, **options: Any) -> float:
        room_needs = checked(*parts, **options)
        assert room_needs <= 16 * GB
        raise Begun

    checked = room.check
    monkeypatch.setattr(room, "check", begun)
    argv = [flag.format(fits) for flag in flags] + ["--out", str(tmp_path)]
    with pytest.raises(Begun):
        command(name).run(cli.parse(command(name).Config, argv, prog=name))


@pytest.mark.contract
@pytest.mark.parametrize("name", [name for name in ASKED if " " not in name])
def test_what_is_asked_for_by_default_fits_a_small_laptop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Begun(Exception):
        pass

    def begun(*parts: room.Part, **options: Any) -> float:
        checked(*parts, **options)
        raise Begun

    checked = room.check
    monkeypatch.setattr(room, "check", begun)
    monkeypatch.setattr(room, "free_memory", lambda device: 5 * GB)
    argv = ["--recipe", "mamba-linreg"] if name == "train" else []
    with pytest.raises(Begun):
        command(name).run(cli.parse(command(name).Config, argv, prog=name))


MEASURED = """
import importlib, json, os, resource, sys, warnings
warnings.simplefilter("ignore")
import torch, numba, scipy.linalg, sklearn.linear_model, sklearn.model_selection, models
from interp import cli, evaluate
from interp.machine import provenance, room
from interp.machine.heap import keep_freed_memory

name, argvs = sys.argv[1], json.loads(sys.argv[2])
command = importlib.import_module(f"analyses.{name}")
found, check = [], room.check
for argv in argvs:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        said = []
        room.check = lambda *parts, **options: said.append(check(*parts, **options)) or said[-1]
        keep_freed_memory()
        before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
        try:
            command.run(cli.parse(command.Config, argv, prog=name))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
            os.write(write, json.dumps([said[-1], peak]).encode())
        finally:
            os._exit(0)
    os.close(write)
    found.append(json.loads(os.read(read, 1000)))
    os.waitpid(child, 0)
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.statistics
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak as Linux tells it")
@pytest.mark.parametrize("size", ["small", "larger"])
@pytest.mark.parametrize("name", [name for name in ASKED if " " not in name and name != "zoo"])
def test_what_a_run_takes_is_within_a_factor_of_two(name: str, size: str, tmp_path: Path) -> None:
    """Of what four times the prompts take more, and of the whole: the first would else hide behind the libraries."""
    argv = [argument.format(tmp_path) for argument in CALLS[name]]
    _write(name, size, tmp_path)
    asked = [
        [*argv, FLAG.get(name, "--prompts"), str(count), "--out", str(tmp_path / str(count))] for count in (256, 1024)
    ]
    run = subprocess.run(
        [sys.executable, "-c", MEASURED, name, json.dumps(asked)], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    (said, took), (said_of_more, took_of_more) = json.loads(run.stdout.splitlines()[-1])
    assert 0.5 < said / took < 2 and 0.5 < said_of_more / took_of_more < 2
    assert 0.5 < (said_of_more - said) / (took_of_more - took) < 2


FLAG = {"train": "--batch-size"}
CALLS = {
    "ablate_delta": ["--model", "{}/model.safetensors", "--reference", "64", "--modes", "mean", "--layers", "0"],
    "probe_layers": ["--model", "{}/model.safetensors"],
    "compare_states": [
        "--models", "{}/model.safetensors", "{}/again.safetensors", "--permutations", "20", "--components", "6",
    ],
    "attribute_outliers": ["--model", "{}/model.safetensors", "--models", "{}/model.safetensors"],
    "feature_learning": ["--model", "{}/model.safetensors"],
    "learning_curves": ["--models", "{}/model.safetensors", "--rivals", "ridge"],
    "train": ["--task", "linreg", "--model", "mamba", "--steps", "2", "--learning-rates", "0.001", "--curriculum", "0"],
}  # fmt: skip
TASKS = {"attribute_outliers": ("outliers", ({"d": 20, "n_pairs": 9}, {"d": 30, "n_pairs": 17}))}
TASKS["feature_learning"] = ("single_index", ({"d": 4, "n_pairs": 13}, {"d": 5, "n_pairs": 25}))
LINREG = ("linreg", ({"d": 3, "n_pairs": 9}, {"d": 5, "n_pairs": 21}))
SIZES = ({"d_model": 8, "n_layers": 2, "d_state": 4}, {"d_model": 24, "n_layers": 4, "d_state": 8})


def _write(name: str, size: str, folder: Path) -> None:
    which = size == "larger"
    task_name, options = TASKS.get(name, LINREG)
    task = tasks.build(task_name, **options[which])
    torch.manual_seed(0)
    model = models.build("mamba", **SIZES[which], **model_shape(task)).eval()
    measured = {f"k={k}": row for k, row in evaluate.summary(model, task, n=256).items()}
    card = {"task": task_name, "task_config": task.config, "measured": {"n": 256, "model": measured}}
    for file in ("model", "again"):
        models.save(model, folder / f"{file}.safetensors", card)
