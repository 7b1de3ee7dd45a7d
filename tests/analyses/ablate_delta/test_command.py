"""The Δ ablation: its table and figure, its refusals, and every one of its checks seen failing."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hooks
import models
from analyses import ablate_delta
from analyses.ablate_delta import controls as ablation_controls
from analyses.ablate_delta.checks import all_checks
from analyses.ablate_delta.effects import Cell
from hooks.errors import BadArgument
from interp import cli, evaluate, tasks, variance
from interp.result import Result

D, N_PAIRS = 2, 9


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained Mamba with a card that tells the truth about it."""
    torch.manual_seed(0)
    task = tasks.build("linreg", d=D, n_pairs=N_PAIRS)
    model = models.build("mamba", d_model=8, n_layers=2, d_state=4, d_in=D, d_out=1).eval()
    measured = {f"k={k}": row for k, row in evaluate.summary(model, task, [2, 4, 8]).items()}
    path = tmp_path_factory.mktemp("checkpoint") / "small.safetensors"
    models.save(model, path, {"task": "linreg", "task_config": task.config, "measured": {"model": measured, "n": 1280}})
    return path


@pytest.fixture(scope="module")
def config(checkpoint: Path) -> ablate_delta.Config:
    return ablate_delta.Config(model=str(checkpoint), prompts=24, reference=20, scales=(0.5, 2.0))


@pytest.fixture(scope="module")
def result(config: ablate_delta.Config) -> Result:
    return ablate_delta.run(config)


@pytest.mark.end_to_end
def test_table_holds_every_cell_with_interval_and_n(result: Result) -> None:
    table = result.table
    own = table[table.model == result.config["model"]]
    modes = {
        "mean",
        "position-mean",
        "token-mean",
        "resample",
        "freeze:x",
        "freeze:y",
        "scale×0.5",
        "scale×2",
        "all-mean",
    }
    delta = own[own.signal.isin(["delta", "delta,B,C"])]
    assert set(delta["mode"]) == modes
    for mode in modes:
        for role in ("both", "decay", "write"):
            rows = delta[(delta["mode"] == mode) & (delta.role == role)]
            assert set(rows.layer.dropna()) == ({0, 1} if role == "both" or mode == "mean" else set())
            assert rows.layer.isna().any()
            assert set(rows.k.dropna()) == {2, 4, 8} and 4 * rows.k.isna().sum() == len(rows)
    assert {"B", "C", "gate", "control"} <= set(own.signal)
    assert {"untrained", "ols", "ridge", "averaging", "knn", "zero"} <= set(table.model)
    assert (table.low <= table.error + 1e-12).all() and (table.error <= table.high + 1e-12).all()
    assert (table.n == 24).all()
    assert result.ok, [check for check in result.checks if not check.ok]


@pytest.mark.end_to_end
def test_the_figure_is_redrawn_from_disk_without_the_model(result: Result, tmp_path: Path) -> None:
    saved = result.save(tmp_path, analysis="ablate_delta")
    assert saved.folder is not None
    loaded = Result.load(saved.folder)
    figure = ablate_delta.plot(loaded)
    panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in panels] == list("abcd")
    labels, factors = ([text.get_text() for text in panel.get_legend().get_texts()] for panel in panels[:2])
    alone = {"Δ as it is", "mean", "position-mean", "token-mean", "resample", "all-mean (Δ, B, C)", "least squares"}
    assert set(factors) == {"Δ as it is", "Δ ×0.5", "Δ ×2", "least squares"}
    assert alone <= set(labels) and not any("×" in label for label in labels)
    notes = loaded.provenance["notes"]
    assert len(notes) == 2 and all("convolution taps: a share of 0." in n and "n = 24" in n for n in notes), notes
    for kind, (share, low, high) in zip(loaded.arrays["tap_share_kinds"], loaded.arrays["tap_share"], strict=True):
        assert any(label.startswith(f"freeze:{kind} (") and label.endswith("left in taps)") for label in labels)
        assert (low > 0).all() and (low <= share).all() and (share <= high).all() and (high < 1).all()
    assert figure.get_suptitle()
    np.testing.assert_allclose(loaded.arrays["shares"][0].sum(), 1.0)


@pytest.mark.planted
def test_the_change_is_that_of_a_run_made_by_hand(result: Result, config: ablate_delta.Config) -> None:
    """One cell again without the analysis: Δ halved in layer 1 by a plain torch hook."""
    model = models.load(str(config.model))
    task = tasks.build("linreg", d=D, n_pairs=N_PAIRS)
    batch = evaluate.prompts(task, 24, 0, "ablate")
    with torch.no_grad():
        clean = task.loss(task.predict(model, batch), batch)[:, 4].mean() / task.scale
        handle = model.blocks[1].mixer.hook_delta.register_forward_hook(lambda m, i, out: out * 0.5)
        halved = task.loss(task.predict(model, batch), batch)[:, 4].mean() / task.scale
        handle.remove()
    rows = result.table
    row = rows[(rows["mode"] == "scale×0.5") & (rows.signal == "delta") & (rows.role == "both") & (rows.layer == 1)]
    found = row[row.k == 4].iloc[0]
    assert found.error == pytest.approx(float(halved), rel=1e-4)
    assert found.change == pytest.approx(float(halved - clean), rel=1e-2, abs=1e-7)


@pytest.mark.contract
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"task": "lingre"}, "no task is called"),
        ({"model": "mamba-nothing"}, "mamba-nothing"),
        ({"modes": ("mien",)}, 'no mode is called "mien"'),
        ({"layers": (5,)}, "no layer 5"),
        ({"device": "tpu"}, "tpu"),
        ({"task_config": ("d=7",)}, "reads tokens of 2 numbers and this task has 7"),
        ({"task_config": ("d",)}, "takes name=value"),
        ({"channel_share": 0.0}, "channel_share"),
        ({"prompts": 1}, "prompts=1"),
        ({"reference": 1}, "reference=1"),
    ],
)
def test_wrong_arguments_are_one_line(config: ablate_delta.Config, flags: dict[str, object], message: str) -> None:
    with pytest.raises(BadArgument, match=message) as error:
        ablate_delta.run(dataclasses.replace(config, **flags))
    code, line = cli.explain(error.value)
    assert code == 2 and "\n" not in line


def failing(config: ablate_delta.Config, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> set[str]:
    """Names of the checks that fail when parts of a run are tampered with."""
    model, task = ablate_delta._open(str(config.model), config)
    batch = evaluate.prompts(task, 16, 0, "ablate")
    subject = ablate_delta._subject("it", model, task, batch, evaluate.prompts(task, 16, 0, "reference"))
    model.card["measured"]["model"]["k=4"]["error"] += changes.pop("card", 0.0)
    if "corrupt" in changes:
        other = changes.pop("corrupt")
        monkeypatch.setattr(type(task), "corrupt", lambda task, batch, generator: other(batch, generator))
    controls = {"identity": changes.pop("identity", subject.runs.clean)}
    rivals, beside = [], {}
    for name, errors in changes.pop("rivals", {}).items():
        runs = copy.copy(subject.runs)
        runs.clean = torch.zeros(4, 3)
        rivals.append(ablate_delta.Subject(name, model, task, runs))
        beside[name] = errors
    log_delta = subject.runs.reference.record.stack("*.hook_delta").log()
    parts = variance.shares(log_delta, batch.kinds, n_boot=10)
    parts = dataclasses.replace(parts, share=parts.share * changes.pop("share", 1.0))
    assert not changes
    found = all_checks(subject, controls, rivals, beside, parts, 0)
    return {check.name for check in found if not check.ok}


def test_untampered_checks_hold(config: ablate_delta.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    assert failing(config, monkeypatch) == set()


def test_a_card_that_says_another_error_is_seen(config: ablate_delta.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    assert failing(config, monkeypatch, card=50.0) == {"clean error at k=4 against the card, in standard errors"}


def test_the_identity_of_the_twin_is_bit_for_bit() -> None:
    """Unedited, the twin is a convolution; its edits run as a recurrence, and so must what they are held against."""
    task = tasks.build("linreg", d=D, n_pairs=N_PAIRS)
    torch.manual_seed(0)
    twin = models.build("mamba", d_model=8, n_layers=2, d_state=4, d_in=D, d_out=1, selective=False).eval()
    runs = ablate_delta._subject(
        "twin", twin, task, *(evaluate.prompts(task, 16, 0, part) for part in ("ablate", "reference"))
    ).runs
    sites = ablation_controls.identity(twin)
    assert torch.equal(runs.under(sites), runs.unedited(sites))
    bundled, tokens = models.load("lti-mamba-linreg"), torch.randn(64, 41, 5)
    with torch.no_grad(), hooks.expose(bundled):
        unwatched = bundled(tokens)
        with hooks.edit(bundled, {"*.hook_B": torch.clone}):
            assert torch.equal(bundled(tokens), unwatched)


def test_prompts_shorter_than_2d_are_run(config: ablate_delta.Config) -> None:
    short = ablate_delta.run(dataclasses.replace(config, task_config=("n_pairs=4",), modes=("mean",), layers=(0,)))
    assert int(short.arrays["k"][-1]) == 3
    alone = ablate_delta.run(dataclasses.replace(config, task_config=("n_pairs=1",), layers=(0,)))
    own = alone.table[alone.table.signal == "delta"]
    assert {"freeze:x", "resample", "mean"} < set(own["mode"]) and "freeze:y" not in set(own["mode"])
    assert alone.ok and ablate_delta.plot(alone).get_suptitle()


def test_what_a_model_lacks_is_said(config: ablate_delta.Config, tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = tasks.build("linreg", d=D, n_pairs=N_PAIRS)
    path = tmp_path / "s4d.safetensors"
    model = models.build("s4d", d_model=8, n_layers=2, d_state=4, d_in=D, d_out=1).eval()
    measured = {f"k={k}": row for k, row in evaluate.summary(model, task, [2, 4, 8]).items()}
    models.save(model, path, {"task": "linreg", "task_config": task.config, "measured": {"model": measured, "n": 1280}})
    found = ablate_delta.run(dataclasses.replace(config, model=str(path), modes=("mean", "all-mean"), layers=(0,)))
    assert [note for note in found.provenance["notes"] if "no hook_gate: the output gate" in note]
    assert "note: " in found.summary() and set(found.table.signal) == {"", "delta", "control"}
    with pytest.raises(BadArgument, match="nothing is left of the modes all-mean: no hook_B"):
        ablate_delta.run(dataclasses.replace(config, model=str(path), modes=("all-mean",)))


def test_an_identity_that_changes_something_is_seen(
    config: ablate_delta.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert failing(config, monkeypatch, identity=torch.zeros(16, N_PAIRS)) == {
        "identity edit: largest change of an error"
    }
    monkeypatch.setattr(ablation_controls, "identity", lambda model: {"*.hook_C": lambda c: c * 1.01})
    assert failing(config, monkeypatch) == {"identity edit on the exposed path: largest change"}


def test_paths_that_disagree_are_seen(config: ablate_delta.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    import models.recurrence as module

    right = module.scan
    monkeypatch.setattr("models.mamba.recurrence", lambda decay, write, h0, edits=(): right(decay, write, h0) * 100)
    assert "fused against exposed path, relative" in failing(config, monkeypatch)


def test_predictions_that_fit_another_tasks_labels_are_seen(
    config: ablate_delta.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, task = ablate_delta._open(str(config.model), config)

    def telling(batch: tasks.Batch, generator: torch.Generator) -> tasks.Batch:
        with torch.no_grad():
            return dataclasses.replace(batch, targets=task.predict(model, batch))

    assert failing(config, monkeypatch, corrupt=telling) == {
        "another task's labels: error relative to the best constant"
    }


def test_labels_that_have_a_mean_are_not_taken_for_a_fit(
    config: ablate_delta.Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """y = |z| has mean sqrt(2/π) and variance 1 − 2/π = 0.36 of E[y²]: a model that says the mean knows no task."""
    model, task = ablate_delta._open(str(config.model), config)
    with torch.no_grad():
        model.head.linear.bias.fill_((2 / torch.pi) ** 0.5)
    measured = {f"k={k}": row for k, row in evaluate.summary(model, task, [2, 4, 8]).items()}
    path = tmp_path / "mean.safetensors"
    models.save(model, path, {**model.card, "measured": {"model": measured, "n": 1280}})

    def absolute(batch: tasks.Batch, generator: torch.Generator) -> tasks.Batch:
        return dataclasses.replace(batch, targets=torch.randn(batch.targets.shape, generator=generator).abs())

    assert failing(dataclasses.replace(config, model=str(path)), monkeypatch, corrupt=absolute) == set()


def test_rivals_that_break_their_promise_are_seen(config: ablate_delta.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    zero = torch.zeros(4, 3)
    assert failing(config, monkeypatch, rivals={"untrained": {}}) == {
        "untrained model: error relative to the best constant"
    }
    for errors, count in (
        ({Cell("mean"): zero, Cell("scale×2"): zero + 1}, 0),
        ({Cell("mean"): zero + 1, Cell("scale×2"): zero + 1}, 1),
        ({Cell("mean"): zero, Cell("scale×2"): zero}, 1),
    ):
        assert len(failing(config, monkeypatch, rivals={"lti-mamba-linreg": errors})) == count


def test_shares_that_do_not_sum_to_one_are_seen(config: ablate_delta.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    assert failing(config, monkeypatch, share=0.9) == {"variance shares: distance of their sum from 1"}


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    "narrowed",
    [
        pytest.param(("--modes", "mean", "--layers", "0"), id="one mode"),
        pytest.param((), id="all", marks=pytest.mark.slow),
    ],
)
def test_the_command_on_the_bundled_checkpoint(narrowed: tuple[str, ...], tmp_path: Path) -> None:
    """``python -m analyses.ablate_delta --task linreg --quick``: files, table, checks; and with one flag wrong."""
    command = [sys.executable, "-m", "analyses.ablate_delta", "--task", "linreg", "--quick", "--out", str(tmp_path)]
    command += narrowed
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # another test is running beside it
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=alone)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    folder = Path(done.stdout.strip().splitlines()[-1].removeprefix("written: "))
    assert sorted(p.name for p in folder.iterdir()) == [
        "arrays.npz", "figure.png", "figure.svg", "result.json", "table.csv",
    ]  # fmt: skip
    head = json.loads((folder / "result.json").read_text())
    assert head["ok"], head["checks"]
    wrong = subprocess.run([*command, "--mdoel", "x"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and wrong.stdout == "" and len(wrong.stderr.strip().splitlines()) == 1


def test_a_task_that_is_read_at_its_query_alone_is_refused() -> None:
    with pytest.raises(BadArgument, match=r"read at its last token only.*attribute_outliers"):
        ablate_delta.run(ablate_delta.Config(task="outliers", quick=True))
