"""Feature learning: table and figure, what is left out is said, refusals, and every check seen failing."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models
from analyses import feature_learning, train
from analyses.feature_learning.checks import all_checks
from analyses.feature_learning.rows import All
from analyses.feature_learning.variants import VARIANTS
from hooks.errors import BadArgument
from interp import cli, evaluate, seeds, tasks
from interp.result import Result
from interp.stats import Interval
from interp.training import recipe

LAYERS = 2
RECIPES = Path(feature_learning.__file__).parents[1] / "recipes"


def checkpoint(folder: Path, name: str, steps: int = 12, task: str = "single_index", **config: Any) -> str:
    """A small model, trained for a few steps, with a card that tells the truth about it."""
    torch.manual_seed(0)
    made = tasks.build("single_index", d=3, r=2, n_pairs=9, link=[0.0, 1.0, 0.0, 1.0])
    shape = {"d_model": 8, "n_layers": LAYERS, "d_state": 3, "d_in": made.d_token, "d_out": 1}
    model = models.build("mamba", **shape, **config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        batch = made.sample(32, seeds.generator("train", 0, step))
        optimizer.zero_grad()
        made.training_loss(model, batch, seeds.generator("k", 0, step)).mean().backward()
        optimizer.step()
    measured = {f"k={k}": row for k, row in evaluate.summary(model.eval(), made, n=256).items()}
    models.save(model, folder / f"{name}.safetensors", {
        "task": task, "task_config": made.config, "measured": {"model": measured, "n": 256},
    })  # fmt: skip
    return str(folder / f"{name}.safetensors")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "mamba": checkpoint(folder, "mamba"),
        "constant": checkpoint(folder, "constant", selection="constant_step"),
        "linear": checkpoint(folder, "linear", steps=1, gate="linear"),
        "both": checkpoint(folder, "both", steps=1, gate="linear", step="tangent"),
        "twin": checkpoint(folder, "twin", steps=1, selective=False),
        "foreign": checkpoint(folder, "foreign", steps=1, task="linreg"),
    }


@pytest.fixture(scope="module")
def config(paths: dict[str, str]) -> feature_learning.Config:
    return feature_learning.Config(
        model=paths["mamba"], variants=("tangent-step", paths["constant"], paths["linear"]), prompts=40, components=12
    )


@pytest.fixture(scope="module")
def result(config: feature_learning.Config) -> Result:
    return feature_learning.run(config)


@pytest.mark.end_to_end
def test_the_table_has_every_part_with_interval_and_n(result: Result) -> None:
    table = result.table
    assert list(dict.fromkeys(table.part)) == ["error", "difference", "reading", "transform"]
    assert (table.low <= table.value + 1e-6).all() and (table.value <= table.high + 1e-6).all() and (table.n > 1).all()
    errors = table[table.part == "error"]
    assert set(errors[errors.how == "rival"].who) == {
        *("kernel ridge, RBF", "kernel ridge, polynomial", "kernel ridge, told the subspace"),
        *("kernel ridge, told β", "told subspace and link"),
    }
    ran = {(who, how) for who, how in zip(errors.who, errors.how, strict=True) if how != "rival"}
    assert ran == {
        *(("published block", "trained"), ("published block", "untrained")),
        *((variant, "ablated") for variant in VARIANTS),
        *(("constant-step", "retrained"), ("linear-gate", "retrained")),
    }
    assert set(errors["at"]) == {"k=0", "k=1", "k=2", "k=3", "k=4", "k=5…6", "k=7…8"}
    assert {"kernel ridge, told the subspace", *VARIANTS} == set(table[table.part == "difference"].who)
    reading = table[table.part == "reading"]
    assert {"trained", "untrained", "shuffled", "ablated", "retrained", "running sum"} == set(reading.how)
    transforms = table[(table.part == "transform") & (table.how == "trained")]
    assert set(transforms.what) == {
        f"{what}: {words}" for what in ("write", "write, Δ at its mean", "Δ") for words in ("share", "coefficient")
    }
    assert set(transforms.layer) == {0, 1}
    assert result.ok, [check for check in result.checks if not check.ok]
    assert len(result.provenance["notes"]) == 1 and "tangent-step is only ablated" in result.provenance["notes"][0]
    assert set(result.provenance["weights"]) == set(result.config["variants"][1:]) | {result.config["model"]}


@pytest.mark.contract
def test_a_variant_counts_as_retrained_where_it_learned_the_models_task(paths: dict[str, str]) -> None:
    for name, how, notes in (("mamba-single_index", "retrained", 0), (paths["mamba"], "ablated", len(VARIANTS))):
        asked = feature_learning.Config(model=name)
        found, said = feature_learning._subjects(asked, name, models.load(name))
        assert {one.variant for one in found if one.how == how and one.variant is not None} == set(VARIANTS)
        assert len(said) == notes and all("only ablated" in line for line in said)
        assert ("retrained" in {one.how for one in found}) == (how == "retrained")


@pytest.mark.end_to_end
def test_the_figure_is_redrawn_from_disk_with_its_controls(result: Result, tmp_path: Path) -> None:
    saved = result.save(tmp_path, analysis="feature_learning")
    assert saved.folder is not None
    figure = feature_learning.plot(Result.load(saved.folder))
    panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in panels] == list("abcdef")
    legends = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in panels]
    assert {"the model", "kernel ridge, told the subspace", "predict 0"} <= set(legends[0])
    assert legends[1] == legends[2] == ["only ablated", "retrained", "as trained"]
    assert {"untrained", "shuffled", "Σ y φ(x)"} <= set(legends[3])
    assert {"write, Δ at its mean", "write, untrained", "the label itself"} <= set(legends[4]) & set(legends[5])
    row = result.table[(result.table.part == "error") & (result.table.how == "trained")].iloc[0]
    assert row["at"] == "k=7…8" and f"leaves {row.value:.3f}".rstrip("0") in figure.get_suptitle()


@pytest.mark.planted
def test_a_row_of_the_table_is_that_of_a_run_made_by_hand(result: Result, config: feature_learning.Config) -> None:
    model = models.load(str(config.model))
    task = tasks.build("single_index", **model.card["task_config"])
    batch = evaluate.prompts(task, 40, 0)
    missed = []
    for k in (7, 8):
        query = torch.cat([batch.x[:, k : k + 1], torch.zeros(40, 1, 1)], dim=-1)
        with torch.no_grad():
            said = model(torch.cat([batch.tokens[:, :k], query], dim=1))[:, -1, 0]
        missed.append((said - batch.targets[:, k]).square().mean())
    expected = float(sum(missed) / batch.targets[:, 7:].square().mean(0).sum())
    row = result.table[(result.table.part == "error") & (result.table.how == "trained")].iloc[0]
    assert row.value == pytest.approx(expected, rel=1e-4)


@pytest.mark.contract
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"task": "single_indx"}, "no task is called"),
        ({"task": "linreg"}, '"linreg" has none'),
        ({"model": "mamba-nothing"}, "mamba-nothing"),
        ({"model": "foreign"}, 'trained on "linreg"'),
        ({"model": "twin"}, "no selective Mamba"),
        ({"model": "constant"}, "constant-step variant: give it as --variants"),
        ({"variants": ("mamba",)}, "is the published block and no variant"),
        ({"variants": ("both",)}, "none of constant-step"),
        ({"variants": ("constant-stp",)}, "constant-stp"),
        ({"prompts": 8}, "prompts=8"),
        ({"device": "tpu"}, "tpu"),
    ],
)
def test_wrong_arguments_are_one_line(
    config: feature_learning.Config, paths: dict[str, str], flags: dict[str, Any], message: str
) -> None:
    if "model" in flags:
        flags = {**flags, "model": paths.get(flags["model"], flags["model"])}
    if "variants" in flags:
        flags = {**flags, "variants": tuple(paths.get(each, each) for each in flags["variants"])}
    with pytest.raises(BadArgument, match=message) as error:
        feature_learning.run(dataclasses.replace(config, **flags))
    code, line = cli.explain(error.value)
    assert code == 2 and "\n" not in line


@pytest.mark.contract
def test_a_retrained_model_of_another_task_is_refused(config: feature_learning.Config, tmp_path: Path) -> None:
    tensors, header = models.checkpoint.read(config.variants[1])
    model = models.load(config.variants[1])
    card = {**header.card, "task_config": {**header.card["task_config"], "tau": 0.5}}
    models.save(model, tmp_path / "other.safetensors", card)
    with pytest.raises(BadArgument, match=r"tau=0.5 instead of 0.1"):
        feature_learning.run(dataclasses.replace(config, variants=(str(tmp_path / "other.safetensors"),)))
    assert tensors


@pytest.fixture(scope="module")
def every(config: feature_learning.Config) -> All:
    return feature_learning._measured(dataclasses.replace(config, prompts=32))[1]


def failing(every: All) -> set[str]:
    return {check.name for check in all_checks(every) if not check.ok}


def changed(every: All, i: int = 0, **fields: Any) -> All:
    found = list(every.found)
    found[i] = dataclasses.replace(found[i], **fields)
    return dataclasses.replace(every, found=found)


def test_untampered_checks_hold(every: All) -> None:
    assert failing(every) == set()


@pytest.mark.parametrize("i", [0, 4])
def test_a_card_that_says_another_error_is_seen(every: All, i: int) -> None:
    error = every.found[i].error.clone()
    error[8:, 6] += 50
    who = every.found[i].subject.variant or "model"
    assert failing(changed(every, i, error=error)) == {f"{who}: error at k=6 against the card, in standard errors"}


def test_errors_that_are_not_the_walks_are_seen(every: All) -> None:
    error = every.found[0].error.clone()
    error[3] *= 1.01
    name = "errors of all queries at once against those one by one, relative"
    assert failing(changed(every, error=error)) == {name}


def test_an_edit_that_is_another_function_is_seen(every: All, monkeypatch: pytest.MonkeyPatch) -> None:
    from analyses.feature_learning import variants as feature_variants

    monkeypatch.setattr(feature_variants._Kept, "held", lambda self, value: 2 * value)
    assert failing(every) == {"tangent-step: edit against the config with the same weights, relative"}


def test_an_identity_that_changes_something_is_seen(every: All, monkeypatch: pytest.MonkeyPatch) -> None:
    import hooks

    right = hooks.scale
    monkeypatch.setattr(hooks, "scale", lambda factor: right(1.001 * factor))
    assert failing(every) == {"identity edit, largest change"}


def test_shuffled_probes_above_chance_are_seen(every: All) -> None:
    high = Interval(np.array(0.9), np.array(0.8), np.array(1.0), 20)
    reading = {
        key: dataclasses.replace(one, controls={"shuffled": high}) for key, one in every.found[0].reading.items()
    }
    assert failing(changed(every, reading=reading)) == {"probes of shuffled β: mean R²"}


def test_a_transform_that_is_not_recovered_is_seen(every: All) -> None:
    labels = every.asked.asked.labels
    asked = dataclasses.replace(every.asked.asked, labels=dataclasses.replace(labels, z=1.3 * labels.z))
    tampered = dataclasses.replace(every, asked=dataclasses.replace(every.asked, asked=asked))
    assert failing(tampered) == {"planted transform y σ(y − 1): shares against quadrature"}


def test_a_label_in_what_has_none_is_seen(every: All, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analyses.feature_learning.checks._without", lambda y: y)
    assert failing(every) == {"planted write without the label: what follows it"}


@pytest.mark.contract
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_recipes_differ_from_the_plain_one_by_their_variant(variant: str) -> None:
    made = recipe.read(RECIPES / f"mamba-{variant}-single_index.json")
    others = [recipe.read(RECIPES / f"mamba-{other}-single_index.json") for other in VARIANTS if other != variant]
    assert {key: made.model_config[key] for key in VARIANTS[variant]} == VARIANTS[variant]
    plain = {key: value for key, value in made.model_config.items() if key not in VARIANTS[variant]}
    for other in others:
        kept = {key: value for key, value in other.model_config.items() if key in plain}
        assert kept == plain and recipe.difference(
            dataclasses.replace(made, model_config=plain), dataclasses.replace(other, model_config=plain)
        ) is None  # fmt: skip
    whole = train.named("mamba-single_index")
    assert recipe.difference(dataclasses.replace(made, model_config=plain), whole) is None
    task = tasks.build(made.task, **made.task_config)
    assert task.config["r"] == 2 and models.build(made.model, **made.model_config, d_in=task.d_token).cfg is not None


@pytest.mark.slow
@pytest.mark.end_to_end
def test_the_command_on_a_checkpoint(paths: dict[str, str], tmp_path: Path) -> None:
    """``python -m analyses.feature_learning --model … --quick``: files, checks; and one flag wrong."""
    command = [sys.executable, "-m", "analyses.feature_learning", "--model", paths["mamba"], "--quick", "--out"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    folder = Path(done.stdout.strip().splitlines()[-1].removeprefix("written: "))
    assert sorted(p.name for p in folder.iterdir()) == [
        "arrays.npz", "figure.png", "figure.svg", "result.json", "table.csv",
    ]  # fmt: skip
    head = json.loads((folder / "result.json").read_text())
    assert head["ok"], head["checks"]
    wrong = subprocess.run([*command, "x", "--mdoel", "x"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and wrong.stdout == "" and len(wrong.stderr.strip().splitlines()) == 1
