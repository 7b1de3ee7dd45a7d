"""Learning curves: numbers against closed forms and runs made by hand, refusals, and every check seen failing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import models
from analyses import ablate_delta, compare_states, learning_curves
from analyses.learning_curves import errors as curves
from analyses.learning_curves import published
from analyses.learning_curves import rows as curve_rows
from hooks.errors import BadArgument
from interp import cli, evaluate, rivals, seeds, tasks
from interp.result import Result
from interp.tasks import shifts
from interp.tasks.base import model_shape

D, N_PAIRS = 4, 13
SIZES: dict[str, dict[str, Any]] = {
    "mamba": {"d_model": 8, "n_layers": 2, "d_state": 4},
    "s4d": {"d_model": 8, "n_layers": 2, "d_state": 4},
    "transformer": {"d_model": 8, "n_layers": 1, "n_heads": 2, "n_ctx": 2 * N_PAIRS - 1},
}


def checkpoint(folder: Path, name: str, architecture: str, task_name: str, options: dict[str, Any]) -> str:
    """A small untrained model with a card that tells the truth about it."""
    task = tasks.build(task_name, **options)
    torch.manual_seed(0)
    model = models.build(architecture, **SIZES[architecture], **model_shape(task)).eval()
    measured = {f"k={k}": row for k, row in evaluate.summary(model, task, n=256).items()}
    path = folder / f"{name}.safetensors"
    card = {"task": task_name, "task_config": task.config, "measured": {"n": 256, "model": measured}}
    models.save(model, path, card)
    return str(path)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder, right = tmp_path_factory.mktemp("checkpoints"), {"d": D, "n_pairs": N_PAIRS}
    return {
        "mamba": checkpoint(folder, "mamba", "mamba", "linreg", right),
        "transformer": checkpoint(folder, "transformer", "transformer", "linreg", right),
        "skewed": checkpoint(folder, "skewed", "s4d", "linreg", {**right, "covariance": "skewed"}),
        "markov": checkpoint(folder, "markov", "mamba", "markov", {"n_pairs": 24}),
        "mqar": checkpoint(folder, "mqar", "mamba", "mqar", {"n_pairs": 4, "n_keys": 8, "n_values": 4}),
        "outliers": checkpoint(folder, "outliers", "mamba", "outliers", {"d": 8, "M1": 2, "M2": 2, "n_pairs": 9}),
    }


@pytest.fixture(scope="module")
def config(paths: dict[str, str]) -> learning_curves.Config:
    return learning_curves.Config(
        models=(paths["mamba"], paths["transformer"]),
        rivals=("ols", "ridge", "averaging", "gd:steps=3", "lasso:alpha=0.1"),
        shifts=("skewed_inputs", "orthogonal_query", "overlapping_query+label_noise:sigma=0.5"),
        prompts=64,
        fitted=6,
    )


@pytest.fixture(scope="module")
def result(config: learning_curves.Config) -> Result:
    return learning_curves.run(config)


@pytest.mark.end_to_end
def test_every_setting_has_every_curve_and_its_figure_is_redrawn_from_disk(
    result: Result, config: learning_curves.Config, tmp_path: Path
) -> None:
    assert result.ok, [check for check in result.checks if not check.ok]
    names = ["as trained", "2 times as long", *config.shifts]
    assert list(dict.fromkeys(result.table.setting)) == names == result.config["shifts"]
    for name in names:
        who = set(result.table[result.table.setting == name].who)
        # The transformer's n_ctx ends with the trained prompts: it has no longer ones, and the result says so.
        assert who == {*config.models, *config.rivals} - ({config.models[1]} if name == names[1] else set())
    assert f"{config.models[1]} reads no prompts of 26 pairs" in result.provenance["notes"]
    saved = result.save(tmp_path, analysis="learning_curves")
    assert saved.folder is not None
    figure = learning_curves.plot(Result.load(saved.folder))
    panels = [" ".join(axes.get_title("center").split()) for axes in figure.axes if axes.get_title("center")]
    said = [*names[:-1], "overlapping_query + label_noise sigma=0.5"]
    assert panels == [f"{name}, n = {32 if i == 1 else 64}" for i, name in enumerate(said)]
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(texts) == sorted(["mamba", "transformer", *config.rivals])
    row = result.table[(result.table.who == config.models[0]) & (result.table.quantity == "error at k=12")].iloc[0]
    assert row.n == 64 and row.low <= row.value <= row.high


@pytest.mark.planted
def test_numbers_are_those_of_runs_made_by_hand(result: Result, config: learning_curves.Config) -> None:
    """A model as trained, a rival under a shift, and a shift whose query stands apart: each k has its own prompts."""
    task, model = tasks.build("linreg", d=D, n_pairs=N_PAIRS), models.load(config.models[0])
    panels = {panel.name: {line.who: line for line in panel.lines} for panel in curve_rows.panels(result.arrays)}
    batch = task.sample(64, seeds.generator("probe", 0))
    with torch.no_grad():
        error = (model(batch.tokens)[:, 0::2, 0] - batch.y).square() / D
    line = panels["as trained"][config.models[0]]
    np.testing.assert_allclose(line.levels[0], error.mean(0).numpy(), rtol=1e-4)
    np.testing.assert_allclose(line.ks, np.arange(N_PAIRS))

    shifted = shifts.apply(task, ["skewed_inputs"]).sample(64, seeds.generator("probe", 0))
    k, prompt = 8, 3
    x, y = shifted.x.double().numpy(), shifted.y.double().numpy()
    errors = [
        (x[i, k] @ np.linalg.solve(x[i, :k].T @ x[i, :k] + np.eye(D), x[i, :k].T @ y[i, :k]) - y[i, k]) ** 2 / D
        for i in range(64)
    ]
    assert panels["skewed_inputs"]["ridge"].levels[0, k] == pytest.approx(np.mean(errors), rel=1e-4)

    orthogonal = panels["orthogonal_query"]["ols"]
    assert list(orthogonal.ks) == sorted(set(orthogonal.ks)) and orthogonal.ks[-1] == D - 1
    alone = shifts.apply(task, ["orthogonal_query"]).sample(64, seeds.generator("probe", 0), n_pairs=prompt + 1)
    # A prediction in the span of the context is 0 there: the error is that of zero.
    expected = float(alone.y[:, -1].square().mean()) / D
    assert orthogonal.levels[0, list(orthogonal.ks).index(prompt)] == pytest.approx(expected, rel=1e-4)
    assert panels["as trained"]["lasso:alpha=0.1"].n == 6
    assert 1 < len(panels["as trained"]["lasso:alpha=0.1"].ks) <= curves.FITS + 1


@pytest.mark.statistics
def test_an_infinite_mean_is_a_median_in_the_table_and_a_gap_in_the_figure(config: learning_curves.Config) -> None:
    """Least squares under label noise, within one example of d: no number of prompts settles its mean."""
    asked = dataclasses.replace(
        config, models=config.models[:1], rivals=("ols", "ridge"), shifts=("label_noise",), prompts=300, longer=1
    )
    results = [learning_curves.run(dataclasses.replace(asked, seed=seed)) for seed in (0, 1)]
    name = f"median error at k={D} (the mean is infinite)"
    found = [one.table[(one.table.quantity == name) & (one.table.setting == "label_noise")] for one in results]
    assert all(list(rows.who) == ["ols"] for rows in found)
    values = [float(rows.value.iloc[0]) for rows in found]
    assert max(values) < 2 * min(values)  # seeds agree, as they do not on a mean
    panel = next(panel for panel in curve_rows.panels(results[0].arrays) if panel.name == "label_noise")
    lines = {line.who: line.levels[0] for line in panel.lines}
    assert list(np.flatnonzero(np.isnan(lines["ols"]))) == [D - 1, D, D + 1] and np.isfinite(lines["ridge"]).all()


@pytest.mark.contract
def test_a_rival_that_is_shown_the_subspace_says_so() -> None:
    assert curve_rows.shown("kernel_ridge:project=beta", "rival").endswith("(told)")
    assert curve_rows.shown("kernel_ridge:alpha=0.1", "rival") == "kernel_ridge:alpha=0.1"
    assert rivals.fair(["kernel_ridge:project=subspace", "knn_on_index", "ridge"]) == ["ridge"]


@pytest.mark.definition
def test_an_error_is_reached_where_it_stays() -> None:
    ks = (0, 1, 2, 5)
    levels = np.array([[1.0, 0.05, 0.2, 0.1], [0.9, 0.04, 0.1, 0.05], [1.1, 0.06, 0.3, 0.2]])
    assert curves.reach(ks, levels, 0.1) == (5, 1, None)
    assert curves.reach(ks, levels, 2.0) == (0, 0, 0)
    assert curves.reach(ks, levels, 0.01) == (None, None, None)


@pytest.mark.statistics
def test_least_squares_reaches_an_error_at_d_and_averaging_never(result: Result) -> None:
    """1 - k / d is above 0.1 until k = d = 4, and 0 from there; (d + 1) / k is 0.42 at k = 12."""
    own = result.table[result.table.setting == "as trained"].set_index(["who", "quantity"])
    assert own.loc[("ols", "k to reach 0.1"), "reads"] == "4"
    assert own.loc[("ols", "k to reach 0.01"), "value"] == 4
    assert own.loc[("averaging", "k to reach 0.1"), "reads"] == "never"
    assert np.isnan(own.loc[("averaging", "k to reach 0.1"), "value"])


@pytest.mark.end_to_end
@pytest.mark.parametrize(("task", "own"), [("markov", "bayes"), ("mqar", "in_context"), ("outliers", "vote")])
def test_tokens_and_queries_of_their_own(paths: dict[str, str], task: str, own: str) -> None:
    found = learning_curves.run(learning_curves.Config(task=task, models=(paths[task],), quick=True))
    assert found.ok, [check for check in found.checks if not check.ok]
    assert {"as trained", "2 times as long"} == set(found.config["shifts"])
    assert own in set(found.table.who)
    learning_curves.plot(found)
    if task == "markov":
        # An estimator of no model's: add-β with the task's own options is the Bayes predictor.
        rows = found.table[found.table.quantity.str.startswith("k to come within")]
        assert (rows.quantity.str.endswith("of bayes")).all() and rows[rows.who == "bayes"]["reads"].eq("0").all()
        same = learning_curves.run(
            learning_curves.Config(task=task, models=(paths[task],), rivals=("add_beta", "bayes"), quick=True)
        )
        values = same.table[same.table.quantity == "error at k=23"].groupby("who").value.mean()
        assert values["add_beta"] == pytest.approx(values["bayes"])
    if task == "outliers":
        assert "clean_vote (told)" in set(found.table.who)


@pytest.mark.contract
def test_a_rival_that_fails_does_not_take_the_others_with_it(config: learning_curves.Config) -> None:
    """Gradient descent at a rate far above 2 / λ_max diverges beyond every float; least squares is there."""
    diverging = "gd:steps=2000,rate=50.5"
    asked = dataclasses.replace(config, models=("none",), rivals=("ols", diverging), shifts=("none",), longer=1)
    found = learning_curves.run(asked)
    assert set(found.table.who) == {"ols"} and found.ok
    assert [note for note in found.provenance["notes"] if note.startswith(f"no {diverging} on as trained: its errors")]
    with pytest.raises(BadArgument, match=r"no gd:steps=2000,rate=50.5 on as trained"):
        learning_curves.run(dataclasses.replace(asked, rivals=(diverging,)))


@pytest.mark.planted
def test_published_numbers_are_drawn_where_the_setting_is_the_same(config: learning_curves.Config) -> None:
    asked = dataclasses.replace(
        config, task_config=("d=20", "n_pairs=41"), models=("none",), rivals=("ols",), shifts=("none",), published=True
    )
    found = learning_curves.run(dataclasses.replace(asked, quick=True, longer=1))
    rows = found.table[found.table.kind == "published"]
    row = rows[rows.who.str.startswith("transformer") & (rows.quantity == "error at k=20")].iloc[0]
    assert row.value == 0.0207 and "2208.01066" in row.who
    labels = [text.get_text() for text in learning_curves.plot(found).legends[0].get_texts()]
    assert any("2208.01066" in label for label in labels)
    with pytest.raises(BadArgument, match=r"no numbers are published for linreg with d=4 .*--task-config d=20"):
        learning_curves.run(dataclasses.replace(config, published=True))


@pytest.mark.statistics
def test_published_least_squares_agrees_with_its_closed_form() -> None:
    """Of noisy labels that are rescaled: (1 + 1 / d) ÷ … as in the source's setting; k > d + 1."""
    noisy = shifts.apply(
        tasks.build("linreg", d=20, n_pairs=41),
        [("label_noise", {"sigma": 1.0, "renormalise": True, "noisy_targets": True})],
    )
    ols = next(curve for curve in published.of(noisy) if curve.who == "OLS")
    for k in (30, 40):
        variance = 20 / 21
        assert ols.range(k)[0] == pytest.approx(variance * (1 + 20 / (k - 21)) / 20, rel=0.05)
    assert not published.of(tasks.build("linreg", d=20, noise=1.0)) and not published.of(tasks.build("linreg", d=5))
    tree = {curve.who: curve for curve in published.of(tasks.build("decision_tree", d=20)) if "2402" in curve.source}
    assert tree["Mamba"].range(100) == pytest.approx((0.094, 0.122))


@pytest.mark.contract
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"task": "lingre"}, "no task is called"),
        ({"models": ("mamba", "nothing")}, "nothing"),
        ({"models": ("mamba", "mamba")}, "given twice"),
        ({"models": ("mamba", "markov")}, 'trained on "markov", not on "linreg"'),
        ({"task_config": ("d=7",)}, "reads tokens of 4 numbers and this task has 7"),
        ({"rivals": ("olls",)}, 'no rival is called "olls".*there is: .*boosted_trees'),
        ({"rivals": ("ols", "ols")}, "given twice"),
        ({"rivals": ("gd",)}, "the rival gd needs steps: write gd:steps="),
        ({"rivals": ("ridge:alhpa=1",)}, "alhpa"),
        ({"rivals": ("ridge:alpha=-1.0",)}, "alpha=-1"),
        ({"rivals": ("dmmse",)}, "needs a table"),
        ({"rivals": ("add_beta",)}, 'counts the symbols of a Markov chain, which "linreg" is not'),
        ({"models": ("none",), "rivals": ("none",)}, "neither models nor rivals"),
        ({"shifts": ("noise",)}, "no shift is called"),
        ({"shifts": ("scaled_inputs",)}, "factor"),
        ({"shifts": ("orthogonal_query+random_quadrants",)}, "both say what the query is"),
        ({"task": "markov", "models": ("markov",), "shifts": ("label_noise",)}, 'the task "markov" is made otherwise'),
        ({"task": "markov", "models": ("markov",), "rivals": ("ols",)}, "predicts a number"),
        ({"longer": 0}, "longer=0"),
        ({"reach": (-1.0,)}, "reach"),
        ({"prompts": 2}, "prompts=2"),
        ({"device": "tpu"}, "tpu"),
    ],
)
def test_wrong_arguments_are_one_line(
    config: learning_curves.Config, paths: dict[str, str], flags: dict[str, Any], message: str
) -> None:
    if "models" in flags:
        flags = {
            "rivals": (),
            "shifts": (),
            **flags,
            "models": tuple(paths.get(name, name) for name in flags["models"]),
        }
    with pytest.raises(BadArgument, match=message) as error:
        learning_curves.run(dataclasses.replace(config, **flags))
    code, line = cli.explain(error.value)
    assert code == 2 and "\n" not in line


@pytest.mark.end_to_end
def test_models_that_were_trained_on_other_inputs_see_the_same_prompts(
    config: learning_curves.Config, paths: dict[str, str]
) -> None:
    both = (paths["mamba"], paths["skewed"])
    asked = dataclasses.replace(config, models=both, rivals=("ols",), shifts=("none",), longer=1)
    found = learning_curves.run(asked)
    assert found.ok and found.config["task_config"]["covariance"] == "isotropic"
    assert found.provenance["notes"] == [f"{paths['skewed']} was trained with covariance=skewed"]
    assert not any(paths["skewed"] in check.name and "card" in check.name for check in found.checks)
    turned = learning_curves._open(dataclasses.replace(asked, models=both[::-1]))[1]
    assert turned.config["covariance"] == "skewed"


@pytest.mark.contract
@pytest.mark.parametrize("analysis", [ablate_delta, compare_states])
@pytest.mark.parametrize("task", ["markov", "mqar", "selective_copy"])
def test_the_other_analyses_refuse_tokens_that_are_integers(
    analysis: Any, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(analysis, ["--task", task]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f'"{task}" has integers for tokens' in said


@pytest.mark.planted
def test_the_other_label_changes_later_predictions_only(paths: dict[str, str]) -> None:
    """Nothing up to the query, something after it: tokens of both layouts, and integers."""
    for name, options, k in (
        ("linreg", {"d": 3, "n_pairs": 8}, 3),
        ("linreg", {"d": 3, "n_pairs": 8, "tokens": "joint"}, 3),
        ("markov", {"n_pairs": 8}, 3),
        ("mqar", {"n_pairs": 4, "n_keys": 8}, 1),
    ):
        task = tasks.build(name, **options)
        torch.manual_seed(0)
        model = models.build("mamba", **SIZES["mamba"], **model_shape(task)).eval()
        batch = task.sample(16, torch.Generator().manual_seed(0))
        other = curves.other_labels(task, batch, k)
        one, two = (evaluate.predictions(model, task, each) for each in (batch, other))
        torch.testing.assert_close(one[:, : k + 1], two[:, : k + 1], rtol=1e-4, atol=1e-6)
        assert (one[:, k + 1 :] - two[:, k + 1 :]).abs().max() > 1e-3, name
        assert (other.targets[:, k] != batch.targets[:, k]).any()


@pytest.mark.planted
def test_a_rival_that_reads_the_answer_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tasks.build("linreg", d=D, n_pairs=N_PAIRS)
    setting, asked = curves.setting("as trained", task, 32), rivals.build(task, ["ols", "gd:steps=1"])
    assert curve_rows.leaks(task, {}, asked, setting, 0) == {"gd:steps=1": 0.0}
    monkeypatch.setattr(rivals.Rival, "predict", lambda self, batch, ks: batch.y + 0)
    assert curve_rows.leaks(task, {}, asked, setting, 0)["gd:steps=1"] > 0.1


@pytest.mark.planted
def test_every_other_check_is_seen_failing(
    config: learning_curves.Config, paths: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that the card was not measured with, and a rival that is not what it is called."""
    small = dataclasses.replace(
        config, models=(paths["mamba"],), rivals=("ols", "averaging"), shifts=("none",), longer=1
    )
    load = models.load

    def other(name: Any) -> Any:
        model = load(name)
        with torch.no_grad():
            for parameter in model.head.parameters():
                parameter.mul_(30.0)
        return model

    with monkeypatch.context() as patch:
        patch.setattr(models, "load", other)
        failed = [check.name for check in learning_curves.run(small).checks if not check.ok]
    assert failed and all("against the card" in name for name in failed)
    wrong = rivals.Rival.errors
    monkeypatch.setattr(rivals.Rival, "errors", lambda *given: 1.2 * wrong(*given))
    failed = [check.name for check in learning_curves.run(small).checks if not check.ok]
    assert sorted(name.partition(":")[0] for name in failed) == ["averaging", "ols"]


# --- figure -----------------------------------------------------------------------------------


@pytest.mark.planted
def test_a_rival_far_below_every_model_is_not_drawn_on_the_floor() -> None:
    """Ridge .028, averaging .19 and least squares 2e-15 beside a model at .42: three lines at three places."""
    means = {"mamba": 0.42, "ridge": 0.028, "averaging": 0.19, "ols": 2e-15}
    arrays: dict[str, Any] = {"settings": ["as trained"], "prompts": [64], "trained": [-1], "metric": "error"}
    arrays |= {"who_0": list(means), "kind_0": ["model", *["rival"] * 3], "n_0": [64] * 4}
    for j, mean in enumerate(means.values()):
        arrays[f"line_0_{j}"] = np.array([np.arange(6.0), *np.outer([1.0, 0.9, 1.1], np.full(6, mean))])
    stored = {name: np.array(value) for name, value in arrays.items()}
    figure = learning_curves.plot(Result({"task": "linreg", "models": ["mamba"]}, pd.DataFrame(), stored))
    panel = figure.axes[0]
    drawn = {str(line.get_label()): set(np.asarray(line.get_ydata())) for line in panel.lines}
    for who, mean in means.items():
        assert drawn[who] == {mean}
    low, high = panel.get_ylim()
    assert low < 0.028 and low > 2e-15 and high > 0.42
    assert [text.get_text() for text in panel.texts] == ["below: ols 2e-15"]
