"""The outlier analysis: its table and figure, its edges and refusals, and every one of its checks seen failing."""

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
from analyses import attribute_outliers as analysis
from analyses.attribute_outliers import edits as outlier_edits
from analyses.attribute_outliers import factors as outlier_factors
from analyses.attribute_outliers import parts as outlier_parts
from analyses.attribute_outliers.checks import all_checks
from analyses.attribute_outliers.parts import FLAGS, GATED, IDENTITY, LEFT_OUT, PRODUCTS, SHARES, SUMS, UNDONE, Findings
from analyses.attribute_outliers.prompts import draw
from hooks.errors import BadArgument
from interp import cli, evaluate, tasks
from interp.attention.recurrence import Recurrence
from interp.result import Result
from models.theory import Theory, TheoryConfig, pattern_vote

CONFIG = {"d": 8, "n_pairs": 9, "M1": 2, "M2": 2, "V": 3}
SIZES: dict[str, dict[str, Any]] = {
    "mamba": {"d_model": 8, "n_layers": 2, "d_state": 4},
    "s4d": {"d_model": 8, "n_layers": 1},
    "linear_attention": {"d_model": 8, "n_layers": 1, "n_heads": 2, "d_mlp": 8},
    "transformer": {"d_model": 8, "n_layers": 1, "n_heads": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small untrained models whose cards tell the truth about them, one a file; and one of another task."""
    where = tmp_path_factory.mktemp("checkpoints")
    task = tasks.build("outliers", **CONFIG)
    for architecture, sizes in SIZES.items():
        torch.manual_seed(0)
        model = models.build(architecture, d_in=9, **sizes).eval()
        measured = {f"k={k}": row for k, row in evaluate.summary(model, task, n=256).items()}
        card = {"task": "outliers", "task_config": task.config, "measured": {"model": measured, "n": 256}}
        models.save(model, where / f"{architecture}.safetensors", card)
        if architecture == "mamba":
            other = {**card, "task_config": {**task.config, "p_a": 0.3}}
            models.save(model, where / "other-share.safetensors", other)
    linreg = tasks.build("linreg", d=3, n_pairs=6)
    model = models.build("mamba", d_in=3, **SIZES["mamba"]).eval()
    measured = {f"k={k}": row for k, row in evaluate.summary(model, linreg, [5], n=256).items()}
    card = {"task": "linreg", "task_config": linreg.config, "measured": {"model": measured, "n": 256}}
    models.save(model, where / "linreg.safetensors", card)
    joint = tasks.build("linreg", d=3, n_pairs=13, tokens="joint")
    summing = Theory(TheoryConfig(d_in=4, d_state=3, selection=False))
    summing.set_weights(W_B=torch.eye(3, 4), W_C=torch.eye(3, 4) / 12).eval()
    measured = {f"k={k}": row for k, row in evaluate.summary(summing, joint, [12], n=256).items()}
    card = {"task": "linreg", "task_config": joint.config, "measured": {"model": measured, "n": 256}}
    models.save(summing, where / "sums.safetensors", card)
    return where


def config(folder: Path, name: str = "mamba", **flags: Any) -> analysis.Config:
    given: dict[str, Any] = {"model": str(folder / f"{name}.safetensors"), "prompts": 48, "alphas": (0.0, 0.5, 1.0)}
    return analysis.Config(**{**given, **flags})


@pytest.fixture(scope="module")
def result(folder: Path) -> Result:
    return analysis.run(config(folder, layers=(0, 1)))


def rows(result: Result, **wanted: Any) -> Any:
    table = result.table
    for column, value in wanted.items():
        table = table[table[column] == value]
    return table


@pytest.mark.end_to_end
def test_the_table_holds_every_part_with_interval_and_n(result: Result) -> None:
    assert result.ok, [check for check in result.checks if not check.ok]
    name = result.config["model"]
    curve = rows(result, part="curve")
    assert set(curve.condition) == {"flip", "one", "coin", "flip, outliers outside training"}
    assert set(curve.alpha) == {0.0, 0.5, 1.0}
    assert set(curve.model) >= {name, GATED, analysis.PLAIN, "vote", "clean_vote", "chance"}
    assert set(rows(result, part="placement").condition) == {"far", "random", "close"}
    for layer in (0, 1):
        for group in ("outlier, same pattern", "outlier, other pattern"):
            split = rows(result, part="split", layer=layer, group=group).set_index("quantity").value
            factors = [*outlier_factors.FACTORS, "what follows"]
            assert float(split[factors].sum()) == pytest.approx(float(split["difference"]), rel=1e-6)
            assert float(split["difference"]) == pytest.approx(float(split["twin"] - split["outlier"]), rel=1e-6)
        quantities = set(rows(result, part="contribution", layer=layer).quantity)
        assert {"first order", "first order, taps inside", "write knocked out"} <= quantities
        assert any(quantity.startswith("gap of the first order") for quantity in quantities)
    for model in (name, "untrained"):
        use = rows(result, part="use", model=model)
        assert {"error", "change of error", "change of margin", "recovery"} <= set(use.quantity)
        assert "control" in set(use.group)
    shown = result.table[result.table.part != "skipped"]
    assert (shown.low <= shown.value + 1e-9).all() and (shown.value <= shown.high + 1e-9).all()
    assert (shown.n > 0).all()


@pytest.mark.planted
def test_an_error_of_the_curve_is_that_of_a_run_by_hand(result: Result, folder: Path) -> None:
    task = tasks.build("outliers", **CONFIG, alpha=0.5, rule="one")
    batch = evaluate.prompts(task, 48, 0)
    model = models.load(folder / "mamba.safetensors")
    with torch.no_grad():
        wrong = (model(batch.tokens)[:, -1, 0] * batch.targets[:, -1] < 0).double().mean()
    found = rows(result, part="curve", condition="one", alpha=0.5, model=result.config["model"])
    assert found.value.tolist() == [float(wrong)]
    gated = rows(result, part="curve", condition="flip", model=GATED).sort_values("alpha").value.tolist()
    plain = rows(result, part="curve", condition="flip", model=analysis.PLAIN).sort_values("alpha").value.tolist()
    assert gated[0] == plain[0] == 0 and gated[1] == 0 and plain[2] == 1


@pytest.mark.planted
def test_the_gate_of_the_theory_is_drawn_from_its_numbers(result: Result) -> None:
    gate = rows(result, part="gate", model=GATED).set_index("quantity").value
    assert float(gate["log G per clean example between"]) == pytest.approx(-np.log(2), abs=1e-4)
    assert float(gate["log G per outlier between"]) == pytest.approx(0, abs=1e-4)
    line = result.arrays[f"gate|{GATED}|clean"][0]
    np.testing.assert_allclose(line, 0.5 ** np.arange(2, 6), rtol=1e-4)


@pytest.mark.end_to_end
def test_the_figure_is_redrawn_from_disk_without_the_model(result: Result, tmp_path: Path) -> None:
    saved = result.save(tmp_path, analysis="attribute_outliers")
    assert saved.folder is not None
    figure = analysis.plot(Result.load(saved.folder))
    assert [axes.get_title(loc="left") for axes in figure.axes] == list("abcdef")
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert {"vote by pattern", "vote, outliers known", "chance", GATED} <= set(labels)
    assert "error" in figure.get_suptitle() and "n = 48" in figure.get_supxlabel()


@pytest.mark.contract
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({"alpha": 0.0}, id="no outliers"),
        pytest.param({"alpha": 1.0}, id="only outliers", marks=pytest.mark.slow),
        pytest.param({"task_config": ("n_pairs=1",)}, id="empty prompts"),
        pytest.param({"task_config": ("n_pairs=2", "orthogonal=0.5")}, id="one example"),
        pytest.param({"alphas": (), "rules": (), "layers": ()}, id="nothing asked", marks=pytest.mark.slow),
    ],
)
def test_edges_run_and_say_what_they_leave_out(folder: Path, flags: dict[str, Any]) -> None:
    found = analysis.run(config(folder, **{"prompts": 24, "alphas": (0.0, 1.0), **flags}))
    assert found.ok, [check for check in found.checks if not check.ok]
    assert analysis.plot(found).axes
    if flags.get("alpha") == 0.0 or "task_config" in flags:
        said = rows(found, part="skipped", model=found.config["model"]).condition.tolist()
        assert any("no outliers" in line for line in said), said


@pytest.mark.contract
@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("transformer", ("hook_decay", "hook_delta", "hook_gate")),
        pytest.param("s4d", ("hook_B", "hook_gate"), marks=pytest.mark.slow),
        ("linear_attention", ("hook_delta", "hook_gate", "hook_x_pre")),
    ],
)
def test_a_model_that_lacks_sites_says_which(folder: Path, name: str, missing: tuple[str, ...]) -> None:
    found = analysis.run(config(folder, name, prompts=24, alphas=(0.5,)))
    said = " ".join(rows(found, part="skipped", model=found.config["model"]).condition)
    assert all(site in said for site in missing), said
    assert found.ok and analysis.plot(found).axes
    assert (len(rows(found, part="split")) > 0) == (name == "linear_attention")


@pytest.mark.contract
@pytest.mark.parametrize(
    "options", [(), pytest.param(("orthogonal_to=fresh",), marks=pytest.mark.slow), ("n_pairs=1",)]
)
def test_regression_with_outliers_takes_a_model_of_the_clean_task(folder: Path, options: tuple[str, ...]) -> None:
    given = config(folder, "linreg", task="outlier_linreg", task_config=options, prompts=24, alphas=(0.0, 0.95))
    found = analysis.run(given)
    assert {"ols", "clean_ols"} <= set(rows(found, part="curve").model)
    assert found.ok and analysis.plot(found).axes
    if options != ("n_pairs=1",):
        assert set(rows(found, part="contribution", quantity="first order").group) == {"outlier", "clean"}
        # Outliers are drawn one by one here: prompts have other numbers of them, and are left with other lengths.
        recovered = set(rows(found, part="use", quantity="recovery", model=found.config["model"]).condition)
        for who in ("outliers", "as many clean"):
            assert {f"{who} out of {way}" for way in ("the scan", "the taps", "both")} <= recovered


@pytest.mark.contract
@pytest.mark.parametrize("alpha", [0.0, pytest.param(0.02, marks=pytest.mark.slow), 0.5, 1.0])
def test_what_outliers_cost_in_regression_is_undone_or_said_to_be_undefined(folder: Path, alpha: float) -> None:
    """Outliers of length 20 in a model that sums its examples, by its own weights; the untrained one next to it."""
    options = ("r=20.0", "tokens=joint")
    given = config(folder, "sums", task="outlier_linreg", task_config=options, alpha=alpha, prompts=24, alphas=())
    found = analysis.run(given)
    name = found.config["model"]
    undone = rows(found, part="use", model=name, quantity=UNDONE).set_index("condition").value
    said = " ".join(rows(found, part="skipped", model=name).condition)
    if alpha in (0.0, 0.02):  # none, and in too few prompts
        why = "these prompts have no outliers" if alpha == 0 else f"{UNDONE}: outliers "
        assert undone.empty and why in said and ("recovery: fewer than 12" in said) == (alpha > 0)
        assert "recovery" not in set(rows(found, part="use", model=name, group="").quantity)
    else:
        assert float(undone["outliers out of the scan"]) == pytest.approx(float(undone[LEFT_OUT]), abs=1e-4)
        assert float(undone[LEFT_OUT]) > 0.9
        assert ("no clean examples" in said) == (alpha == 1) == ("as many clean out of the scan" not in undone)
    panel = analysis.plot(found).axes[1]
    shown = [label.get_text() for label in panel.get_yticklabels()] if alpha >= 0.5 else [panel.texts[0].get_text()]
    assert ("outliers out of the scan" in shown) == (alpha >= 0.5), shown


@pytest.mark.contract
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"task": "outlierz"}, 'no task is called "outlierz"'),
        ({"task": "linreg"}, "no share of outliers"),
        ({"model": "mamba-nothing"}, "mamba-nothing"),
        ({"models": ("mamba-linreg",)}, 'was trained on "linreg"'),
        ({"layers": (5,)}, "no layer 5"),
        ({"rules": ("flop",)}, 'no value of rule is called "flop"'),
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"alphas": (-0.1,)}, "alpha=-0.1"),
        ({"prompts": 1}, "prompts=1"),
        ({"device": "tpu"}, "tpu"),
        ({"task_config": ("d=20",)}, "reads tokens of 9 numbers and this task has 21"),
        ({"task_config": ("alpha",)}, "takes name=value"),
    ],
)
def test_wrong_arguments_are_one_line(folder: Path, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(BadArgument, match=message) as error:
        analysis.run(config(folder, **flags))
    code, line = cli.explain(error.value)
    assert code == 2 and "\n" not in line


def test_models_trained_with_other_options_are_refused(folder: Path) -> None:
    with pytest.raises(BadArgument, match=r"another task than .*: p_a=0\.3 instead of 0\.6"):
        analysis.run(config(folder, models=(str(folder / "other-share.safetensors"),)))
    with pytest.raises(BadArgument, match='trained on "linreg", not on "outliers"'):
        analysis.run(config(folder, "linreg"))


# --- every check seen failing -------------------------------------------------------------------


def failing(
    given: analysis.Config, found: Findings | None = None, untrained: Any = None, card: float = 0.0
) -> set[str]:
    """Names of the checks that do not hold."""
    subjects = analysis._open(given)
    subjects.model.card["measured"]["model"]["k=8"]["error"] += card
    untrained = analysis._untrained(subjects, given) if untrained is None else untrained
    checks = all_checks(found or Findings(), subjects, untrained, 64, 0)
    return {check.name for check in checks if not check.ok}


def looked_into(given: analysis.Config) -> Findings:
    """What the two parts find in the model."""
    subjects, found = analysis._open(given), Findings()
    prompts, others = (draw(subjects.task, 24, 0, p, 0.5, rule="flip") for p in ("ablate", "reference"))
    outlier_parts.why(found, "it", subjects.model, prompts, 0, 4, 0)
    outlier_parts.used(found, "it", subjects.model, prompts, others, 0)
    return found


def test_untampered_checks_hold(folder: Path) -> None:
    found = looked_into(config(folder))
    assert set(found.checks) == {SUMS, PRODUCTS, SHARES, FLAGS, IDENTITY}
    assert failing(config(folder), found) == set()


def test_a_card_that_says_another_error_is_seen(folder: Path) -> None:
    (name,) = failing(config(folder), card=0.9)
    assert name.endswith("error against the card, in standard errors")


def test_an_untrained_model_that_knows_the_task_is_seen(folder: Path) -> None:
    task: Any = tasks.build("outliers", **CONFIG)
    knows = pattern_vote(task.mu, task.v_star).eval()
    assert failing(config(folder), untrained=knows) == {"untrained model: distance from chance, in standard errors"}


def test_paths_that_disagree_are_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import models.recurrence as module

    right = module.recurrence
    monkeypatch.setattr("models.mamba.recurrence", lambda *args: right(*args) * 100)
    monkeypatch.setattr("models.mamba.selective_states", lambda x, *args: x[..., None].expand(*x.shape, 4) * 100)
    assert failing(config(folder)) == {"fused against exposed path, relative"}


def test_contributions_that_do_not_sum_are_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Recurrence.pull_back

    def short(self: Recurrence, weights: Any, onto: Any) -> Any:
        found, start = right(self, weights, onto)
        return [part * 0.9 for part in found], start

    monkeypatch.setattr(Recurrence, "pull_back", short)
    assert SUMS in failing(config(folder), looked_into(config(folder)))


def test_factors_that_give_another_contribution_are_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = outlier_parts.factors

    def wrong(*args: Any) -> Any:
        one = right(*args)
        return dataclasses.replace(one, write=one.write * 1.1)

    monkeypatch.setattr(outlier_parts, "factors", wrong)
    assert failing(config(folder), looked_into(config(folder))) == {PRODUCTS}


def test_shares_that_do_not_sum_are_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = outlier_factors.shapley
    monkeypatch.setattr(outlier_factors, "shapley", lambda value, players: right(value, players) * 0.9)
    assert failing(config(folder), looked_into(config(folder))) == {SHARES}


def test_shuffled_flags_that_still_mean_something_are_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hand-set model gives outliers no weight; with the flags not shuffled at all the control is the effect."""
    task: Any = tasks.build("outliers", **CONFIG)
    prompts = draw(task, 48, 0, "ablate", 0.5, rule="flip")
    model = pattern_vote(task.mu, task.v_star).eval()
    found = Findings()
    outlier_parts.why(found, "it", model, prompts, 0, 4, 0)
    assert FLAGS not in failing(config(folder), found)
    monkeypatch.setattr(outlier_parts, "shuffled", lambda prompts, generator: prompts.outlier)
    found = Findings()
    outlier_parts.why(found, "it", model, prompts, 0, 4, 0)
    assert failing(config(folder), found) == {FLAGS}


def test_an_identity_that_changes_something_is_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlier_edits, "identity", lambda model: {"*.hook_delta": lambda delta: delta * 1.01})
    assert failing(config(folder), looked_into(config(folder))) == {IDENTITY}


def test_a_quick_run_compares_two_trained_models_unless_some_are_named() -> None:
    pair = {"mamba-outliers", "s4d-outliers"}
    assert set(analysis._open(analysis.Config(quick=True)).measured()) == pair
    other = analysis.Config(quick=True, model="mamba-1layer-outliers")
    assert set(analysis._open(other).measured()) == {*pair, "mamba-1layer-outliers"}
    named = ("linear-transformer-outliers", "mamba-1layer-outliers")
    assert set(analysis._open(analysis.Config(quick=True, models=named)).measured()) == {*named, "mamba-outliers"}


@pytest.mark.slow
@pytest.mark.end_to_end
def test_the_command_on_the_bundled_checkpoints(tmp_path: Path) -> None:
    """``python -m analyses.attribute_outliers --quick``: files and checks; and one flag wrong."""
    command = [sys.executable, "-m", "analyses.attribute_outliers", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    folder = Path(done.stdout.strip().splitlines()[-1].removeprefix("written: "))
    assert sorted(p.name for p in folder.iterdir()) == [
        "arrays.npz", "figure.png", "figure.svg", "result.json", "table.csv",
    ]  # fmt: skip
    head = json.loads((folder / "result.json").read_text())
    assert head["ok"], head["checks"]
    wrong = subprocess.run([*command, "--alhpa", "1"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and wrong.stdout == "" and len(wrong.stderr.strip().splitlines()) == 1
