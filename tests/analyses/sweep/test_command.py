"""``python -m analyses.sweep``: the bundled grid, kept and failed cells, a killed worker, the table and the figure."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch

import interp.training.train
import models
from analyses import sweep as command
from analyses import train
from analyses.sweep import local as sweep_local
from analyses.sweep import rows as sweep_rows
from analyses.sweep.figure import middle
from analyses.sweep.local import Job, Outcome
from hooks.errors import BadArgument, RunFailed
from interp import cli
from interp.result import Result
from interp.training import cells as sweep
from interp.training import fit, resume
from tests.interp.tiny import same

TEXT = """
name: tiny
base:
  steps: 12
  batch_size: 4
  learning_rates: [1e-3, 3e-3, 1e-2]
  search_steps: 2
  save_every: 3
  eval_every: 6
models:
  mamba: {model_config: {d_model: 8, n_layers: 1, d_state: 2}}
  s4d: {model_config: {d_model: 8, n_layers: 1, d_state: 2}}
tasks:
  two: {task: linreg, task_config: {d: 2, n_pairs: 9}}
"""
WILD = "  wild: {model: mamba, learning_rates: [1e38], weight_decay: 1.0}\ntasks:"


def config(path: Path | str, *argv: str) -> command.Config:
    return cli.parse(command.Config, [str(path), *argv], prog="sweep")


def written(folder: Path, text: str = TEXT) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(text)
    return path


# --- the bundled grid -------------------------------------------------------------------------


@pytest.mark.contract
def test_every_bundled_checkpoint_has_its_recipe_in_the_repository() -> None:
    """All but the deep models of linear regression by one sweep."""
    cells = sweep.read(train.RECIPES / "zoo.yaml").cells
    grid = {cell.name for cell in cells if not cell.beside}
    assert (len(cells), len(grid)) == (38, 28)
    assert not grid & set(train.recipes())  # no name has two recipes
    deep = set(models.names()) - {cell.name for cell in cells}
    assert len(deep) == 6 and all(name.endswith("-linreg") for name in deep)
    assert {cell.name for cell in cells} <= set(models.names())
    for name in models.names():
        assert models.load(name).card["recipe"] == train.named(name).as_dict(), name


@pytest.mark.contract
def test_the_zoo_is_small() -> None:
    assert sum(path.stat().st_size for path in models.ZOO.iterdir()) < 20e6


@pytest.mark.contract
@pytest.mark.parametrize(("name", "only"), [("zoo", ""), ("wide", "linreg20")])
def test_the_grids_compare_alike(name: str, only: str) -> None:
    """Steps and prompts of a task the same for every model, parameters within ten percent, three rates or more."""
    sizes: dict[str, list[int]] = {}
    for cell in sweep.read(train.RECIPES / f"{name}.yaml").cells:
        assert len(cell.recipe.learning_rates) >= 3
        if not cell.beside and cell.seed == 0 and only in (cell.task, ""):
            model = train.parts(cell.recipe)[1]()
            sizes.setdefault(cell.task, []).append(sum(parameter.numel() for parameter in model.parameters()))
    assert sizes and all(len(of) == 4 and max(of) <= 1.1 * min(of) for of in sizes.values()), sizes


@pytest.mark.contract
def test_no_cell_of_two_sweeps_has_one_name() -> None:
    cells = [cell.name for name in train.sweeps() for cell in sweep.read(train.RECIPES / f"{name}.yaml").cells]
    assert len(cells) == 38 + 84 == len(set(cells))


@pytest.mark.contract
def test_a_cell_of_a_bundled_sweep_is_a_recipe() -> None:
    parsed = cli.parse(train.Config, ["--recipe", "mamba-sparse_linreg", "--steps", "7"], prog="train")
    recipe = train.resolve(parsed)
    assert (recipe.task, recipe.steps, recipe.task_config["sparsity"]) == ("sparse_linreg", 7, 2)
    with pytest.raises(BadArgument, match='did you mean "mamba-sparse_linreg"'):
        train.named("mamba-sparse_linrge")


# --- a sweep in this process ------------------------------------------------------------------


def in_this_process(jobs: Sequence[Job], workers: int, tick: Callable[[], Any]) -> dict[str, Outcome]:
    """The engine's contract without the seconds that each process takes to load torch."""
    found = {}
    for job in jobs:
        argv = [argument for argument in job.arguments[2:] if argument != "--attached"]
        job.log.parent.mkdir(exist_ok=True)
        try:
            train.run(cli.parse(train.Config, argv, prog="train"))
            found[job.name] = Outcome(job.name, "", 1)
        except RunFailed as error:
            found[job.name] = Outcome(job.name, str(error), 1)
        tick()
    return found


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the cells that are trained, by an engine in this process."""
    trained: list[str] = []

    def noted(jobs: Sequence[Job], workers: int, tick: Callable[[], Any]) -> dict[str, Outcome]:
        trained.extend(job.name for job in jobs)
        return in_this_process(jobs, workers, tick)

    monkeypatch.setattr(sweep_local, "run", noted)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(interp.training.train, "EVALUATION_PROMPTS", 64)
    return trained


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A sweep of two cells that has finished, as a command."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_local, "run", in_this_process)
        patch.setattr(os, "fsync", lambda descriptor: None)
        argv = [str(written(folder)), "--out", str(folder / "out")]
        assert cli.main(command, argv) == 0  # type: ignore[arg-type]
    (saved,) = (folder / "out" / "sweep").glob("tiny-*")
    return folder, Result.load(saved)


@pytest.mark.end_to_end
def test_the_table_is_what_the_cards_say(finished: tuple[Path, Result]) -> None:
    folder, result = finished
    assert list(result.table.columns) == list(sweep_rows.COLUMNS)
    assert list(dict.fromkeys(result.table["cell"])) == ["mamba-two", "s4d-two"]
    for row in result.table.to_dict("records"):
        card = models.load(folder / "out" / "sweep" / "tiny" / row["cell"]).card
        measured = {name: of for name, of in card["measured"].items() if isinstance(of, dict)}
        key = "mean" if np.isnan(row["k"]) else f"k={row['k']:.0f}"
        assert row["error"] == measured.pop("model")[key]["error"]
        assert row["rival_error"] == min(of[key]["error"] for of in measured.values())
        assert row["rival_error"] == measured[row["rival"]][key]["error"]
        assert (row["steps"], row["parameters"], row["rate"]) == (12, card["parameters"], card["learning_rate"])
    assert set(result.table["k"].dropna()) == {2, 4, 8}
    assert result.config["cells"]["s4d-two"]["model"] == "s4d"
    assert (result.folder / "figure.png").stat().st_size > 10_000  # type: ignore[operator]


@pytest.mark.contract
def test_the_middle_k_is_the_middle_number_whatever_it_was_written_as() -> None:
    """Also of a folder of an earlier version, where k was text and "10" came before "5"; the mean over k is no k."""
    rows = {"task": "linreg", "size": "", "model": "mamba", "error": [0.5, 0.3, 0.1, 0.2]}
    for ks in (["5", "10", "20", "mean"], [5.0, 10.0, 20.0, np.nan]):
        found = middle(pd.DataFrame({**rows, "k": ks}))
        assert found["label"].tolist() == ["linreg, k = 10"] and found["error"].tolist() == [0.3]


@pytest.mark.end_to_end
def test_the_figure_is_drawn_from_the_disk(finished: tuple[Path, Result]) -> None:
    figure = command.plot(finished[1])
    (panel,) = figure.axes
    assert [label.get_text() for label in panel.get_yticklabels()] == ["two, k = 4"]
    assert panel.get_legend_handles_labels()[1] == ["mamba", "s4d", "best classical method"]
    rows = middle(finished[1].table)
    best = rows.loc[rows["error"].idxmin(), "model"]
    assert figure.get_suptitle() == f"lowest error of 2 models on 1 task: {best} on 1 (1 training each)"


@pytest.mark.contract
def test_finished_cells_are_kept_and_half_ones_gone_on_with(finished: tuple[Path, Result], engine: list[str]) -> None:
    folder, result = finished
    runs = folder / "out" / "sweep" / "tiny"
    files = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in runs.rglob("*") if path.is_file()}
    again = command.run(config(folder / "tiny.yaml", "--out", str(folder / "out")))
    assert engine == []
    assert files == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in runs.rglob("*") if path.is_file()}
    pd.testing.assert_frame_equal(again.table.astype(str), result.table.astype(str))
    (runs / "s4d-two" / "model.safetensors").unlink()  # the folder is there, its checkpoint is not
    command.run(config(folder / "tiny.yaml", "--out", str(folder / "out")))
    assert engine == ["s4d-two"]
    weights = safetensors.torch.load(files[runs / "s4d-two" / "model.safetensors"][1])
    assert same(safetensors.torch.load_file(runs / "s4d-two" / "model.safetensors"), weights)


@pytest.mark.contract
def test_another_recipe_in_the_folder_is_refused_before_anything_is_trained(
    finished: tuple[Path, Result], engine: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = finished
    (folder / "other").mkdir(exist_ok=True)
    other = written(folder / "other", TEXT.replace("steps: 12", "steps: 13") + "only: [mamba-two]")
    argv = [str(other), "--out", str(folder / "out")]
    assert cli.main(command, argv) == 2  # type: ignore[arg-type]
    assert "steps: asked 13, found 12" in capsys.readouterr().err
    assert engine == []
    assert cli.main(command, [*argv, "--quick"]) == 0  # type: ignore[arg-type]
    assert engine == ["mamba-two"]
    quick = models.load(folder / "out" / "sweep" / "tiny-quick" / "mamba-two")
    assert quick.card["steps"] == 20


@pytest.mark.contract
@pytest.mark.slow
def test_a_failed_cell_does_not_end_the_sweep_and_is_named_at_the_end(
    tmp_path: Path, engine: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, TEXT.replace("tasks:", WILD) + "skip: [s4d-two]")
    assert cli.main(command, [str(path), "--out", str(tmp_path)]) == 1  # type: ignore[arg-type]
    out, err = capsys.readouterr()
    # The trainings run in this process here, and tell on its stderr what they will take.
    (said,) = [line for line in err.splitlines() if not line.startswith(("training: ", "search: "))]
    assert out == "" and "1 of 2 cells failed (wild-two: the loss is " in said
    (saved,) = (tmp_path / "sweep").glob("tiny-*")
    result = Result.load(saved)
    assert not next(check for check in result.checks if check.name == "cells that failed").ok
    failed = result.table[result.table["failed"] != ""]
    assert list(failed["cell"]) == ["wild-two"] and "learning rate" in failed["failed"].item()
    assert set(result.table["cell"]) == {"mamba-two", "wild-two"}
    assert np.isnan(failed["error"].item())
    command.plot(result)
    with pytest.raises(RunFailed):
        command.run(config(path, "--out", str(tmp_path)))
    assert engine == ["mamba-two", "wild-two", "wild-two"]


@pytest.mark.contract
def test_where_every_cell_fails_each_reason_is_said_and_nothing_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(jobs: Sequence[Job], workers: int, tick: Callable[[], Any]) -> dict[str, Outcome]:
        return {job.name: Outcome(job.name, f"the disk of {job.name} is full", 1) for job in jobs}

    monkeypatch.setattr(sweep_local, "run", lost)
    assert cli.main(command, [str(written(tmp_path)), "--out", str(tmp_path)]) == 1  # type: ignore[arg-type]
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    for name in ("mamba-two", "s4d-two"):
        assert f"{name}: the disk of {name} is full" in err
    assert "2 of 2 cells failed" in err and "mistake in the program" not in err
    (saved,) = (tmp_path / "sweep").glob("tiny-*")
    assert sorted(os.listdir(saved)) == ["arrays.npz", "result.json", "table.csv"]
    assert list(Result.load(saved).table["failed"]) == [
        f"the disk of {name} is full" for name in ("mamba-two", "s4d-two")
    ]


@pytest.mark.contract
@pytest.mark.parametrize(
    ("text", "argv", "said"),
    [
        (TEXT, ["--engine", "rya"], "--engine"),
        (TEXT, ["--workers", "0"], "workers=0"),
        (TEXT, ["--threads", "0"], "threads=0"),
        (TEXT, ["--device", "tpu"], '"tpu"'),
        (TEXT, ["--address", "auto"], "add --engine ray"),
        (TEXT.replace("d: 2", "dd: 2"), [], "cell mamba-two: "),
        (TEXT.replace("mamba: {", "mambo: {"), [], 'did you mean "mamba"'),
        (TEXT.replace("d_model: 8, n_layers: 1, d_state: 2}}\ntasks", "d_mode: 8}}\ntasks"), [], "cell s4d-two: "),
        (TEXT.replace("steps: 12", "stesp: 12"), [], 'did you mean "steps"'),
    ],
)
def test_wrong_arguments_exit_2_in_one_line_and_leave_nothing(
    text: str, argv: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(command, [str(written(tmp_path, text)), *argv, "--out", str(out)]) == 2  # type: ignore[arg-type]
    said_out, err = capsys.readouterr()
    assert (said_out, err.count("\n")) == ("", 1)
    assert said in err
    assert not out.exists()
    assert cli.main(command, ["zooo"]) == 2  # type: ignore[arg-type]
    assert 'did you mean "zoo"' in capsys.readouterr().err


@pytest.mark.contract
def test_without_ray_it_says_how_to_install_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    argv = [str(written(tmp_path)), "--engine", "ray", "--out", str(tmp_path)]
    assert cli.main(command, argv) == 2  # type: ignore[arg-type]
    assert 'pip install "mambascope[cluster]"' in capsys.readouterr().err


# --- checks that can fail ---------------------------------------------------------------------


@pytest.mark.contract
def test_each_check_can_fail() -> None:
    made = sweep.expand(
        {"name": "n", "models": {"a": {"model": "mamba"}, "b": {"model": "mamba"}}, "tasks": {"linreg": None}}
    )
    cards: dict[str, dict[str, Any]] = {
        cell.name: {"parameters": 100 + 5 * i, "learning_rates": [1, 2, 3]} for i, cell in enumerate(made.cells)
    }
    near = {cell.name: 1.0 for cell in made.cells}
    good = sweep_rows.checks(made.cells, cards, {}, near)
    assert all(check.ok for check in good) and len(good) == 4
    tiny = dataclasses.replace(made.cells[0], name="tiny-linreg", beside=True)
    other = {**cards, "tiny-linreg": {"parameters": 1, "learning_rates": [1, 2, 3]}}  # compared with nothing
    assert [check.ok for check in sweep_rows.checks([*made.cells, tiny], other, {}, near)] == [True] * 4
    larger = {**cards, "b-linreg": {**cards["b-linreg"], "parameters": 111}}
    fewer = {**cards, "b-linreg": {**cards["b-linreg"], "learning_rates": [1]}}
    broken = [
        sweep_rows.checks(made.cells, {"a-linreg": cards["a-linreg"]}, {"b-linreg": "why"}, near),
        sweep_rows.checks(made.cells, larger, {}, near),
        sweep_rows.checks(made.cells, fewer, {}, near),
        sweep_rows.checks(made.cells, cards, {}, {**near, "b-linreg": 5.0}),
    ]
    for i, found in enumerate(broken):
        assert [check.ok for check in found] == [j != i for j in range(4)]


@pytest.mark.planted
def test_a_checkpoint_that_is_not_what_its_card_says_is_far_away(finished: tuple[Path, Result]) -> None:
    cell = command.read(config(finished[0] / "tiny.yaml")).cell("mamba-two")
    model = models.load(finished[0] / "out" / "sweep" / "tiny" / "mamba-two")
    assert command._distance(cell, model, "cpu") < 4
    with torch.no_grad():
        model.head.linear.bias.add_(3.0)
    assert command._distance(cell, model, "cpu") > 4


# --- processes --------------------------------------------------------------------------------


@pytest.mark.end_to_end
@pytest.mark.slow
def test_a_killed_worker_is_started_again_and_ends_in_the_same_weights(tmp_path: Path) -> None:
    path = written(tmp_path, TEXT.replace("steps: 12", "steps: 400").replace("tasks:", WILD))
    runs = tmp_path / "sweep" / "tiny"
    kills: list[int] = []

    def kill_one() -> None:
        state = runs / "mamba-two" / "resume" / "state.safetensors"
        while not state.exists():
            time.sleep(0.01)
        for entry in Path("/proc").glob("[0-9]*"):
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.exists() else []
            if str(runs / "mamba-two").encode() in words and b"--attached" in words:
                os.kill(int(entry.name), signal.SIGKILL)
                kills.append(resume.read(state).progress["step"])

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(RunFailed, match=r"1 of 3 cells failed \(wild-two: the loss"):
        command.run(config(path, "--workers", "2", "--out", str(tmp_path)))
    killer.join()
    assert len(kills) == 1 and 0 < kills[0] < 400
    recipe = str(runs / "recipes" / "mamba-two.json")
    train.run(cli.parse(train.Config, ["--recipe", recipe, "--threads", "1", "--out", str(tmp_path / "w")], prog="t"))
    assert models.digest(models.load(runs / "mamba-two")) == models.digest(models.load(tmp_path / "w"))


@pytest.mark.contract
def test_an_attached_training_saves_and_stops_when_its_standard_input_ends(tmp_path: Path) -> None:
    import multiprocessing

    path = written(tmp_path, TEXT.replace("steps: 12", "steps: 100000"))
    recipe = tmp_path / "long.json"
    recipe.write_text(json.dumps(sweep.read(path).cell("mamba-two").recipe.as_dict()))
    reader, writer = os.pipe()

    def body() -> None:
        os.close(writer)
        os.dup2(reader, 0)
        sys.stdin = open(0)  # noqa: SIM115
        original = fit.training_batch

        def noted(run: fit.Run, step: int, steps: int) -> Any:
            if steps == 100000 and step == 10:
                (tmp_path / "on").touch()
            return original(run, step, steps)

        fit.training_batch = noted
        with pytest.raises(RunFailed, match="stopped by SIGTERM"):
            train.run(train.Config(recipe=str(recipe), out=tmp_path / "run", attached=True))

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    os.close(reader)
    until = time.monotonic() + 60
    while not (tmp_path / "on").exists() and process.is_alive() and time.monotonic() < until:
        time.sleep(0.01)
    assert process.is_alive()
    os.close(writer)
    process.join(60)
    assert process.exitcode == 0
    assert resume.read(tmp_path / "run" / "resume" / "state.safetensors").progress["step"] > 10
