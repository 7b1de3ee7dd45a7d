"""The zoo's table, grid and exit code; a card that is not true is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models
from analyses import zoo
from analyses.zoo import members as grid
from interp import cli, evaluate, seeds, tasks
from interp.result import Result
from interp.tasks.base import model_shape

LINREG: dict[str, Any] = {"d": 3, "n_pairs": 13}
SIZES: dict[str, dict[str, Any]] = {"mamba": {"d_state": 4}, "s4d": {"d_state": 4}}


def checkpoint(
    folder: Path, name: str, architecture: str, task: str, options: dict[str, Any], factor: float = 1.0
) -> None:
    """A small untrained model; its card has ``factor`` times the error that it makes."""
    made = tasks.build(task, **options)
    torch.manual_seed(0)
    model = models.build(architecture, d_model=8, n_layers=2, **SIZES[architecture], **model_shape(made)).eval()
    measured = {f"k={k}": row for k, row in evaluate.summary(model, made, n=512).items()}
    for row in measured.values():
        row["error"] *= factor
    card = {"task": task, "task_config": made.config, "steps": 7, "seconds": 2.5}
    models.save(model, folder / f"{name}.safetensors", {**card, "measured": {"n": 512, "model": measured}})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo of four: two tasks, two architectures, one task of integers."""
    own = tmp_path / "zoo"
    own.mkdir()
    checkpoint(own, "mamba-linreg", "mamba", "linreg", LINREG)
    checkpoint(own, "s4d-linreg", "s4d", "linreg", LINREG)
    checkpoint(own, "mamba-skewed", "mamba", "linreg", {**LINREG, "covariance": "skewed"})
    checkpoint(own, "mamba-markov", "mamba", "markov", {"n_pairs": 32})
    monkeypatch.setattr(models, "ZOO", own)
    return own


@pytest.mark.end_to_end
def test_the_table_has_every_file_and_the_exit_code_is_0(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(zoo, ["--quick", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert not said.err
    for name in ("mamba-linreg", "s4d-linreg", "mamba-skewed", "mamba-markov"):
        assert name in said.out
    assert "checks: 12 of 12 hold" in said.out
    (where,) = (tmp_path / "out" / "zoo").iterdir()
    assert {"figure.png", "figure.svg", "result.json", "table.csv", "arrays.npz"} == {p.name for p in where.iterdir()}
    figure = zoo.plot(Result.load(where))
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["mamba", "s4d"]
    rows = [text.get_text() for text in axes.get_yticklabels()]
    assert [row.partition(",")[0] for row in rows] == ["linreg", "markov", "skewed"]
    assert "of 4 models" in figure.get_suptitle()


@pytest.mark.planted
def test_numbers_are_those_of_runs_made_by_hand(folder: Path) -> None:
    result = zoo.run(zoo.Config(models=("mamba-linreg",), prompts=200))
    task, model = tasks.build("linreg", **LINREG), models.load("mamba-linreg")
    batch = task.sample(200, seeds.generator("probe", 0))
    with torch.no_grad():
        error = (model(batch.tokens)[:, 0::2, 0] - batch.y).square().double().numpy() / 3
    row = result.table.iloc[0]
    assert row["at k"] == "3 6 12" and row.steps == 7 and row.parameters == sum(p.numel() for p in model.parameters())
    assert row.value == pytest.approx(error[:, 6].mean(), rel=1e-4)
    assert row["best rival"].startswith("ols: 0 0 0")
    ridge = []
    for x, y in zip(batch.x.double().numpy(), batch.y.double().numpy(), strict=True):
        w = np.linalg.solve(x[:6].T @ x[:6] + np.eye(3), x[:6].T @ y[:6])
        ridge.append((w @ x[6] - y[6]) ** 2 / 3)
    # Least squares is exact there: the ratio is to ridge.
    expected = error[:, 6].mean() / np.mean(ridge)
    assert result.arrays["ratio"][0, 0, 0] == pytest.approx(expected, rel=1e-4)
    low, high = result.arrays["ratio"][1:, 0, 0]
    assert low < expected < high


@pytest.mark.planted
def test_a_card_that_is_not_true_is_named_and_the_exit_code_is_1(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(folder, "s4d-linreg", "s4d", "linreg", LINREG, factor=2.0)
    (folder / "mamba-skewed.safetensors").write_bytes(b"not a checkpoint at all")
    assert cli.main(zoo, ["--quick", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert "does not hold: s4d-linreg: error at k=3" in said.out
    assert said.err.count("\n") == 1 and "s4d-linreg" in said.err and "mamba-skewed" in said.err
    assert "mamba-linreg" not in said.err and "mamba-linreg" in said.out
    # Of the true ones alone nothing is wrong.
    assert cli.main(zoo, ["--quick", "--models", "mamba-linreg", "mamba-markov", "--out", str(tmp_path / "out")]) == 0


@pytest.mark.contract
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--models", "mamba-nothing"], "mamba-nothing"),
        (["--prompts", "2"], "prompts=2"),
        (["--device", "tpu"], "tpu"),
        (["--promts", "2"], "--prompts"),
    ],
)
def test_wrong_arguments_are_one_line(
    folder: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(zoo, argv) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said


@pytest.mark.end_to_end
def test_json_is_the_result(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert cli.main(zoo, ["--models", "mamba-markov", "--quick", "--json", "--out", out]) == 0
    head = json.loads(capsys.readouterr().out)
    assert head["ok"] and head["rows"] == 1 and head["table"][0]["task"] == "markov"


@pytest.mark.planted
def test_oracles_and_guesses_are_no_rivals(folder: Path) -> None:
    member = grid.Bench(16, 0).member("mamba-markov", models.load("mamba-markov"))
    assert set(member.rivals) == {"bayes", "uniform"}
    assert set(grid.Bench(16, 0).member("m", models.load("mamba-linreg")).rivals) == {
        "ols",
        "ridge",
        "averaging",
        "knn",
    }
