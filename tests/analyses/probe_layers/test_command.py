"""The layer probe: table and figure, what is left out is said, refusals, and every check seen failing."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models
from analyses import probe_layers
from analyses.probe_layers import families, fitting
from analyses.probe_layers import readings as layers
from analyses.probe_layers.checks import all_checks
from hooks.errors import BadArgument
from interp import cli, evaluate, lens, tasks
from interp.result import Result
from interp.stats import Interval
from interp.tasks.base import model_shape

D, N_PAIRS, BLOCKS = 3, 9, 4


@pytest.fixture(scope="module", autouse=True)
def few_steps() -> Iterator[None]:
    """Solvers of at most two steps, fitted in few rounds: what is named is asked in ``test_probe_layers_planted``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "STEPS", 2)
        patch.setattr(fitting, "ROUNDS", (1, 2, 1))
        patch.setattr(fitting, "KEPT", 1)
        yield


def checkpoint(folder: Path, architecture: str = "mamba", task: str = "linreg", **options: Any) -> Path:
    """A small untrained model with a card that tells the truth about it."""
    torch.manual_seed(0)
    asked = tasks.build(task, n_pairs=N_PAIRS, **options)
    shape = {"d_model": 8, "n_layers": BLOCKS, **model_shape(asked)}
    model = models.build(architecture, **shape).eval()
    measured = {f"k={k}": row for k, row in evaluate.summary(model, asked).items()}
    path = folder / f"{architecture}-{task}.safetensors"
    card = {"task": task, "task_config": asked.config, "measured": {"model": measured, "n": 1280}}
    models.save(model, path, card)
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> probe_layers.Config:
    path = checkpoint(tmp_path_factory.mktemp("checkpoint"), d=D)
    return probe_layers.Config(model=str(path), prompts=40, queries=6)


@pytest.fixture(scope="module")
def result(config: probe_layers.Config) -> Result:
    return probe_layers.run(config)


@pytest.mark.end_to_end
def test_the_table_has_every_part_with_interval_and_n(result: Result) -> None:
    table = result.table
    assert list(dict.fromkeys(table.part)) == ["lens", "profile", "probe", "match", "map"]
    assert (table.low <= table.value + 1e-9).all() and (table.value <= table.high + 1e-9).all()
    lens_rows = table[table.part == "lens"]
    assert set(lens_rows.block) == set(range(BLOCKS + 1)) and (lens_rows.n == 40).all()
    probes = table[table.part == "probe"]
    for features in ("residual", "state", "running sum"):
        for target in ("w", "Xty", "w_ols", "y"):
            rows = probes[probes.what == f"{features} → {target}"]
            assert set(rows.k) == {2, 8}
            assert set(rows.setting) == {"", "shuffled"} | (set() if features == "running sum" else {"untrained"})
    named = set(table[table.part == "match"].what)
    solvers = {"GD", "GD on sums", "GD++", "Newton", "online GD", "online GD of labels", "ridge", "least squares"}
    assert solvers | {"k-NN", "averaging", "zero", "the labels themselves"} <= named
    assert {f"{name}, scaled" for name in solvers} <= named
    assert {8, 17} <= set(table[table.part == "map"].k)
    late = table[(table.part == "match") & table.k.notna()]
    assert set(late.k) == {3, 6, 8} and set(late.block) == set(range(BLOCKS + 1))
    for how in ("as it is", "with a scale"):
        assert sum(late.what == f"{how}: none of these") == 3 * (BLOCKS + 1), "random weights are no algorithm"
    assert set(result.provenance["last block"]) == {"as it is", "with a scale"}
    assert result.ok, [check for check in result.checks if not check.ok]
    assert len(result.checks) >= 8 and result.provenance["notes"] == []


@pytest.mark.end_to_end
def test_the_figure_is_redrawn_from_disk_with_its_controls(result: Result, tmp_path: Path) -> None:
    saved = result.save(tmp_path, analysis="probe_layers")
    assert saved.folder is not None
    figure = probe_layers.plot(Result.load(saved.folder))
    panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in panels] == list("abcdefgh")
    labels = [text.get_text() for text in panels[0].get_legend().get_texts()]
    for control in ("untrained weights", "labels of another w", "knows nothing (formula)"):
        assert control in labels
    in_probes = [text.get_text() for text in panels[5].get_legend().get_texts()]
    assert {"w, shuffled", "w, untrained", "w, from running sums"} <= set(in_probes)
    assert figure.get_suptitle().startswith("mamba-linreg, 8 examples: ")
    assert "none of the algorithms tried fits the last block's predictions as they are" in figure.get_suptitle()


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("given", "targets", "notes"),
    [
        pytest.param({"k": 0}, {"w", "y"}, ["after 0 examples w_ols, Xty"], marks=pytest.mark.slow),
        ({"task_config": ("n_pairs=1",)}, {"w", "y"}, ["have no context", "after 0 examples w_ols, Xty"]),
    ],
)
def test_without_examples_there_is_no_sum_to_probe(
    config: probe_layers.Config, given: dict[str, Any], targets: set[str], notes: list[str]
) -> None:
    found = probe_layers.run(dataclasses.replace(config, prompts=32, queries=4, m=6, **given))
    probed = found.table[(found.table.part == "probe") & found.table.what.str.startswith("residual")]
    assert set(probed.k) == {0} and set(probed.what) == {f"residual → {target}" for target in targets}
    assert len(found.provenance["notes"]) == len(notes)
    assert all(note in said for note, said in zip(notes, found.provenance["notes"], strict=True))
    assert found.ok, [check for check in found.checks if not check.ok]
    assert probe_layers.plot(found).get_suptitle()


@pytest.mark.planted
def test_a_row_of_the_lens_is_that_of_a_run_made_by_hand(result: Result, config: probe_layers.Config) -> None:
    """Block 2 again: every query in a prompt of its own, stopped before the third block, numpy's fit."""
    model = models.load(str(config.model))
    subject = probe_layers._subject(config)
    batch = subject.sample(40, 0, 8 + 10 + 6)
    guesses = []
    for query in range(8, 24):
        tokens = torch.cat([batch.tokens[:, :16], batch.tokens[:, [2 * query]]], dim=1)
        with torch.no_grad():
            residual = model(tokens, stop_at_layer=2)
            guesses.append(model.head(model.ln_final(residual))[:, -1, 0].double().numpy())
    errors = []
    for guess, labels in zip(np.array(guesses).T, batch.y[:, 8:].double().numpy(), strict=True):
        a, b = np.polyfit(guess[:10], labels[:10], 1)
        errors.append(((a * guess[10:] + b - labels[10:]) ** 2).mean() / D)
    rows = result.table[(result.table.what == "error, fitted") & (result.table.block == 2)]
    assert float(rows.value.iloc[0]) == pytest.approx(np.mean(errors), rel=1e-3)


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("architecture", "task", "options", "notes"),
    [
        pytest.param("transformer", "linreg", {"d": D}, ["no recurrent state"], marks=pytest.mark.slow),
        pytest.param("mamba", "linreg", {"d": D, "tokens": "joint"}, [], marks=pytest.mark.slow),
        pytest.param(
            "mamba",
            "outliers",
            {"d": 12, "M1": 3, "M2": 4},
            ["the lens is not fitted", "no algorithm is matched"],
            marks=pytest.mark.slow,
        ),
        ("mamba", "decision_tree", {"d": D, "depth": 2}, ["no algorithm is matched"]),
        ("mamba", "markov", {}, ["m is not used"]),
        pytest.param(
            "transformer",
            "mqar",
            {},
            ["no recurrent state", "m is not used", "no algorithm", "no variable"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_a_model_or_task_does_not_have_is_left_out_and_said(
    architecture: str, task: str, options: dict[str, Any], notes: list[str], tmp_path: Path
) -> None:
    path = checkpoint(tmp_path, architecture, task, **options)
    found = probe_layers.run(probe_layers.Config(task=task, model=str(path), prompts=32, queries=4, m=6))
    assert len(found.provenance["notes"]) == len(notes)
    assert all(note in said for note, said in zip(notes, found.provenance["notes"], strict=True))
    assert found.ok, [check for check in found.checks if not check.ok]
    assert probe_layers.plot(found).get_suptitle()
    assert ("match" in set(found.table.part)) == (task in ("linreg", "markov"))
    assert found.table.what.str.startswith("state").any() == (architecture == "mamba")


@pytest.mark.contract
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"task": "lingre"}, "no task is called"),
        ({"model": "mamba-nothing"}, "mamba-nothing"),
        ({"task": "outliers"}, 'trained on "linreg", not on "outliers"'),
        ({"m": 5}, "m=5"),
        ({"queries": 0}, "queries=0"),
        ({"k": 18}, "k=18"),
        ({"prompts": 8}, "prompts=8"),
        ({"device": "tpu"}, "tpu"),
        ({"task_config": ("d=7",)}, "reads tokens of 3 numbers and this task has 7"),
    ],
)
def test_wrong_arguments_are_one_line(config: probe_layers.Config, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(BadArgument, match=message) as error:
        probe_layers.run(dataclasses.replace(config, **flags))
    code, line = cli.explain(error.value)
    assert code == 2 and "\n" not in line


@pytest.fixture(scope="module")
def parts(config: probe_layers.Config) -> dict[str, Any]:
    """What ``all_checks`` is given."""
    with torch.no_grad():
        subject = probe_layers._subject(config)
        levels = layers.error_map(subject, 80)
        return {
            "subject": subject,
            "seen": layers.through_lens(subject, 40, config.m, config.queries),
            "probes": layers.probes(subject, 80)[:8],
            "levels": levels,
            "found": families.candidates(levels.within()),
            "config": config,
        }


def failing(parts: dict[str, Any], **changes: Any) -> set[str]:
    return {check.name for check in all_checks(**{**parts, **changes}) if not check.ok}


def test_untampered_checks_hold(parts: dict[str, Any]) -> None:
    assert failing(parts) == set()


def test_a_map_that_is_not_the_models_own_is_seen(parts: dict[str, Any]) -> None:
    levels = dataclasses.replace(parts["levels"], decoded=parts["levels"].decoded * 1.001)
    assert failing(parts, levels=levels) == {"map after the last block against the model itself, relative"}


def test_forks_that_read_another_context_are_seen(parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    right = lens._after
    monkeypatch.setattr(lens, "_after", lambda model, context, *rest: right(model, context.flip(0), *rest))
    assert failing(parts) == {"lens after the last block against a run of its own, relative"}


def test_a_card_that_says_another_error_is_seen(parts: dict[str, Any]) -> None:
    raw = parts["levels"].raw.clone()
    raw[-1, :, 6] += 50
    levels = dataclasses.replace(parts["levels"], raw=raw)
    assert failing(parts, levels=levels) == {"error at k=6 against the card, in standard errors"}


def test_shuffled_probes_above_chance_are_seen(parts: dict[str, Any]) -> None:
    high = Interval(np.array(0.1), np.array(0.0), np.array(0.2), 20)
    tampered = [
        dataclasses.replace(one, probe=dataclasses.replace(one.probe, controls={"shuffled": high}))
        for one in parts["probes"]
    ]
    assert failing(parts, probes=tampered) == {"probes of shuffled targets: mean R²"}


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("nothing", "floor, formula against a feature drawn at random, in standard errors"),
        ("other_labels", "other labels: lens after the last block below chance, in standard errors"),
        ("untrained", "untrained weights: lens after the last block below chance, in standard errors"),
    ],
)
def test_a_floor_that_is_not_one_is_seen(parts: dict[str, Any], part: str, name: str) -> None:
    low = getattr(parts["seen"], part) / 5
    assert failing(parts, seen=dataclasses.replace(parts["seen"], **{part: low})) == {name}


def test_predictions_that_fit_another_ws_labels_are_seen(
    parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from interp import estimators

    subject, levels = parts["subject"], parts["levels"]
    monkeypatch.setattr(type(subject.task), "corrupt", lambda task, batch, generator: batch)
    solved = estimators.build("ols")(levels.within()).double()
    answers = levels.answers.double()
    answers[-1, :, : levels.trained] = solved
    tampered = dataclasses.replace(levels, answers=answers)
    assert failing(parts, levels=tampered) == {"distance to least squares of another w's labels"}


@pytest.mark.slow
@pytest.mark.end_to_end
def test_the_command_on_the_bundled_checkpoint(tmp_path: Path) -> None:
    """``python -m analyses.probe_layers --task linreg --quick``: files, checks; and one flag wrong."""
    command = [sys.executable, "-m", "analyses.probe_layers", "--task", "linreg", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
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
