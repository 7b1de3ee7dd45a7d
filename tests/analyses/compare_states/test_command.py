"""The comparison of states: its table and figure, its refusals, and every one of its checks seen failing."""

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

import hooks
import models
from analyses import compare_states
from analyses.compare_states import rows as state_rows
from analyses.compare_states.checks import all_checks, notes
from analyses.compare_states.study import Plan, Study, plan, study
from hooks.errors import BadArgument
from interp import cli, evaluate, seeds, similarity, states, tasks
from interp.result import Result
from interp.similarity import effective_rank
from interp.stats import Interval

D, N_PAIRS = 2, 9
SIZES: dict[str, dict[str, Any]] = {
    "mamba": {"d_model": 6, "n_layers": 2, "d_state": 4},
    "s4d": {"d_model": 6, "n_layers": 3, "d_state": 3},
    "s4": {"d_model": 4, "n_layers": 2, "d_state": 3},
}


def checkpoint(folder: Path, name: str, architecture: str, task_config: dict[str, Any], task: str = "linreg") -> str:
    """A small untrained model with a card that tells the truth about it."""
    torch.manual_seed(0)
    made = tasks.build("linreg", **task_config)
    model = models.build(architecture, **SIZES[architecture], d_in=made.d_token, d_out=1).eval()
    measured = {f"k={k}": row for k, row in evaluate.summary(model, made, [2, 4, 8], n=256).items()}
    path = folder / f"{name}.safetensors"
    models.save(model, path, {"task": task, "task_config": made.config, "measured": {"model": measured, "n": 256}})
    return str(path)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("checkpoints")
    right = {"d": D, "n_pairs": N_PAIRS}
    return {
        "mamba": checkpoint(folder, "mamba", "mamba", right),
        "s4d": checkpoint(folder, "s4d", "s4d", right),
        "s4": checkpoint(folder, "s4", "s4", right),
        "skewed": checkpoint(folder, "skewed", "s4d", {**right, "covariance": "skewed"}),
        "other": checkpoint(folder, "other", "s4d", right, task="outliers"),
    }


@pytest.fixture(scope="module")
def config(paths: dict[str, str]) -> compare_states.Config:
    return compare_states.Config(models=(paths["mamba"], paths["s4d"]), prompts=40, components=6, permutations=40)


@pytest.fixture(scope="module")
def result(config: compare_states.Config) -> Result:
    return compare_states.run(config)


@pytest.mark.end_to_end
def test_table_holds_every_quantity_of_every_model_and_pair(result: Result) -> None:
    table, (mamba, s4d) = result.table, result.config["models"]
    for name, layers in ((mamba, 2), (s4d, 3)):
        own = table[table.model == name]
        for quantity in (
            *("R² of w", "R² of Xty", "R² of w_ols", "R² of y", "R² of w, untrained", "effective rank of a state"),
            *("effective rank across prompts", "left of a write", "derivative by an example, of its mean"),
            *("half-life in tokens, slowest mode (quartiles of channels)", "recovery by a swap of h"),
            "resets (ends: permuted tokens)",
        ):
            rows = own[own.quantity == quantity]
            assert set(range(layers)) <= set(rows.layer), quantity
        assert {"norm of the state", "error", "R² of w from sums"} <= set(own.quantity)
    assert set(table[table.quantity == "recovery by a swap of conv"].model) == {mamba}
    pair = table[table.model == f"{mamba} ~ {s4d}"]
    for measure in ("cka", "svcca", "procrustes"):
        rows = pair[pair.quantity == measure]
        assert len(rows) == 12 and set(rows["at"]) == {"k=4", "k=0"}
        assert rows.p.between(1 / 41, 1).all() and rows.control.notna().all()
    bounded = table[table.low.notna() & ~table.quantity.str.startswith(("half-life", "resets"))]
    assert (bounded.low <= bounded.value + 1e-9).all() and (bounded.value <= bounded.high + 1e-9).all()
    assert (table.n > 1).all()
    for i, layers in enumerate((2, 3)):
        channels, quartiles = result.arrays[f"half_channels_{i}"], result.arrays[f"half_{i}"]
        assert channels.shape[:2] == (2, layers) and (channels > 0).all()
        inside = (channels >= quartiles[..., 1:2]) & (channels <= quartiles[..., 2:])
        assert (inside.mean(-1) >= 0.5).all()  # half of the channels lie between their quartiles
    assert result.ok, [check for check in result.checks if not check.ok]


@pytest.mark.end_to_end
def test_the_figure_is_redrawn_from_disk_without_the_models(result: Result, tmp_path: Path) -> None:
    saved = result.save(tmp_path, analysis="compare_states")
    assert saved.folder is not None
    figure = compare_states.plot(Result.load(saved.folder))
    letters = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
    assert letters == list("abcdefghijk")
    title = figure.get_suptitle()
    row = result.table[result.table.quantity == "R² of w, best layer"].iloc[0]
    assert f"R² {row.value:.2f}" in title and "After 8 examples" in title


@pytest.mark.planted
def test_numbers_are_those_of_runs_made_by_hand(result: Result, config: compare_states.Config) -> None:
    """The swap of one layer's h, a norm and a share that is left, again without the analysis."""
    model, task = models.load(config.models[0]), tasks.build("linreg", d=D, n_pairs=N_PAIRS)
    batch = evaluate.prompts(task, 40, 0, "probe")
    own = result.table[result.table.model == config.models[0]]
    at = int(batch.read[4])
    with torch.no_grad():
        _, first = model(batch.tokens[:20, :at], return_state=True)
        _, second = model(batch.tokens[20:, :at], return_state=True)
        query = batch.tokens[20:, at : at + 1]
        mixed = [second[0], second[1]._replace(h=first[1].h)]
        f_patch, f_1, f_2 = (model(query, state=s)[:, 0, 0].double() for s in (mixed, first, second))
    slope = float(((f_patch - f_2) * (f_1 - f_2)).sum() / (f_1 - f_2).square().sum())
    row = own[(own.quantity == "recovery by a swap of h") & (own.layer == 1)].iloc[0]
    assert row["at"] == "k=4" and row.n == 20
    assert row.value == pytest.approx(slope, rel=1e-3, abs=1e-5)

    record = hooks.record(model, batch.tokens[:10], ["*.hook_decay", "*.hook_write"])
    decay, write = (record[f"blocks.0.mixer.{kind}"].double() for kind in ("hook_decay", "hook_write"))
    end = int(batch.read[8]) - 1
    left = [(decay[:, s + 1 : end + 1].prod(1) * write[:, s]).square().sum((1, 2)) for s in (end - 3, end - 2)]
    base = [write[:, s].square().sum((1, 2)) for s in (end - 3, end - 2)]
    expected = float(((left[0] + left[1]) / (base[0] + base[1])).mean().sqrt())
    row = own[(own.quantity == "left of a write") & (own.layer == 0) & (own["at"] == "age=1")].iloc[0]
    assert row.value == pytest.approx(expected, rel=1e-4)

    # The newest example's tokens are the last two before the query, and so on back to the first two.
    energy = states.reach(model, batch.tokens[:8], end)[1, :, : end + 1].double()
    ages = torch.stack([energy[:, s] + energy[:, s + 1] for s in range(end - 1, -1, -2)], dim=1)
    expected_ages = (ages / ages.mean(1, keepdim=True)).mean(0).sqrt()
    rows = own[(own.quantity == "derivative by an example, of its mean") & (own.layer == 1)]
    np.testing.assert_allclose(rows.value.to_numpy(), expected_ages.numpy(), rtol=1e-4)


@pytest.mark.planted
def test_k_0_is_the_state_at_a_query_with_nothing_before_it(result: Result, config: compare_states.Config) -> None:
    """Ranks, norm and similarity at k = 0 again from runs of the first token alone; what they can and cannot tell."""
    batch = evaluate.prompts(tasks.build("linreg", d=D, n_pairs=N_PAIRS), 40, 0, "probe")
    held = []
    for name in config.models:
        record = hooks.record(models.load(name), batch.x[:, :1], "*.hook_state")
        held.append([h[:, 0].double() for h in record.values()])
    table = result.table[result.table.k == 0]
    for name, layers in zip(config.models, held, strict=True):
        own = table[table.model == name]
        for layer, h in enumerate(layers):
            rows = own[own.layer == layer].set_index("quantity").value
            assert rows["effective rank of a state"] == pytest.approx(float(effective_rank(h[:10]).mean()), rel=1e-5)
            flat = h.flatten(1)
            expected = float(effective_rank(flat - flat.mean(0)))
            assert rows["effective rank across prompts"] == pytest.approx(expected, rel=1e-4)
        assert {"R² of w", "R² of w, untrained", "R² of y", "error", "norm of the state"} <= set(own.quantity)
        assert not {"R² of Xty", "R² of XtX", "R² of w_ols"} & set(own.quantity)
        assert (own[own.quantity == "R² of w"].value < 0.3).all()  # w is not known yet
    pair = table[(table.quantity == "cka") & (table.layers == "1 ~ 2")].iloc[0]
    assert pair.value == pytest.approx(similarity.cka(*(h.flatten(1) for h in (held[0][1], held[1][2]))), rel=1e-4)
    best = result.arrays["cka_best_0_1_k0"]
    assert best[0] == pytest.approx(table[table.quantity == "cka"].value.max())
    few, alike = result.provenance["notes"]
    assert few.startswith("10 prompts judge the probes: below 32, from 64 prompts on, their intervals")
    assert alike == "after 0 examples XtX, Xty, w_ols are the same for every prompt: not probed"
    # The norm is of the longer prompts: the first token's, over that after the last trained example.
    made = tasks.build("linreg", d=D, n_pairs=N_PAIRS)
    longer = made.sample(10, seeds.generator("probe", 0, 1), n_pairs=2 * N_PAIRS)
    square = states.norms(models.load(config.models[0]), longer.tokens).double().square()
    first, last = square[..., 0], square[..., int(longer.read[N_PAIRS - 1]) - 1]
    expected = float((first / last.mean(1, keepdim=True)).mean().sqrt())
    norm = table[(table.model == config.models[0]) & (table.quantity == "norm of the state")].iloc[0]
    assert norm.value == pytest.approx(expected, rel=1e-4)


@pytest.mark.end_to_end
@pytest.mark.parametrize(("n_pairs", "panels"), [(1, 7), pytest.param(2, 8, marks=pytest.mark.slow)])
def test_prompts_too_short_to_remember_run_to_the_end_and_say_what_is_missing(
    config: compare_states.Config, tmp_path: Path, n_pairs: int, panels: int
) -> None:
    found = compare_states.run(dataclasses.replace(config, task_config=(f"n_pairs={n_pairs}",), permutations=10))
    assert found.config["task_config"]["n_pairs"] == n_pairs
    assert found.ok, [check for check in found.checks if not check.ok]
    notes, table = found.provenance["notes"], found.table
    assert any("was trained with n_pairs=9" in note for note in notes)
    assert any("no room to remember" in note for note in notes)
    assert any("no state is swapped" in note for note in notes) == (n_pairs == 1)
    assert table.quantity.str.startswith("recovery").any() == (n_pairs == 2)
    assert not table.quantity.str.startswith(("left of", "half-life", "resets", "derivative", "share of")).any()
    decoded = table[table.quantity == "R² of w"]
    assert set(decoded["at"]) == {f"k={k}" for k in range(n_pairs)} and set(table[table.quantity == "svcca"]["at"]) >= {
        "k=0"
    }
    saved = found.save(tmp_path, analysis="compare_states")
    assert saved.folder is not None
    figure = compare_states.plot(Result.load(saved.folder))
    letters = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
    assert letters == list("abcdefghijkl"[:panels])
    start = "With no example before a query" if n_pairs == 1 else "After 1 examples"
    assert figure.get_suptitle().startswith(start)


@pytest.mark.contract
def test_a_layer_that_is_the_same_for_every_prompt_at_k_0_is_not_compared(
    parts: tuple[list[Study], list[Any], Any, Plan],
) -> None:
    found, loaded, _, asked = parts
    rows = [torch.ones_like(found[0].rows[0][0]), *found[0].rows[0][1:]]
    still = [dataclasses.replace(found[0], rows={**found[0].rows, 0: rows}), found[1]]
    alike = compare_states._alike(still, asked)
    for measure, each in alike[0][0, 1].items():
        assert np.isnan(each.value[0]).all() and np.isnan(each.p_family[0]).all(), measure
        np.testing.assert_allclose(each.value[1:], parts[2][0][0, 1][measure].value[1:])
    names = dict(zip([one.name for one in still], loaded, strict=True))
    (note,) = [note for note in notes(still, names, asked) if "states of" in note]
    assert f"{still[0].name} in layers 0 are the same" in note
    all_checks(still, loaded, alike, asked)
    assert state_rows.table(still, alike, asked).query("quantity == 'cka' and k == 0").layers.tolist() == [
        "1 ~ 0", "1 ~ 1", "1 ~ 2",
    ]  # fmt: skip
    none = [dataclasses.replace(found[0], rows={**found[0].rows, 0: [rows[0], rows[0]]}), found[1]]
    assert compare_states._alike(none, asked)[0] == {}


@pytest.mark.end_to_end
@pytest.mark.slow
def test_every_pair_of_models_and_measure_is_in_the_figure(
    paths: dict[str, str], config: compare_states.Config, tmp_path: Path
) -> None:
    names = tuple(paths[name] for name in ("mamba", "s4d", "s4"))
    found = compare_states.run(dataclasses.replace(config, models=names, permutations=10))
    saved = found.save(tmp_path, analysis="compare_states")
    assert saved.folder is not None
    loaded = Result.load(saved.folder)
    figure = compare_states.plot(loaded)
    letters = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
    assert letters == list("abcdefghijklm")
    pairs = {(0, 1): ("mamba", "s4d"), (0, 2): ("mamba", "s4"), (1, 2): ("s4d", "s4")}
    maps = {(axes.get_ylabel(), axes.get_xlabel()): axes for axes in figure.axes if axes.images}
    for (i, j), (one, two) in pairs.items():
        drawn = maps[f"layer of {one}", f"layer of {two}"].images[0]
        np.testing.assert_array_equal(drawn.get_array(), loaded.arrays[f"cka_{i}_{j}"][0])
        assert drawn.get_clim() == maps["layer of mamba", "layer of s4d"].images[0].get_clim()
    (measures,) = [axes for axes in figure.axes if axes.get_xlabel() == "similarity of the most alike layers"]
    marks = [(float(x), line.get_marker()) for line in measures.lines for x in line.get_xdata()]
    for i, j in pairs:
        for measure in ("cka", "svcca", "procrustes"):
            for end in ("", "_k0"):
                value, edge = loaded.arrays[f"{measure}_best_{i}_{j}{end}"]
                if measure == "procrustes":
                    value, edge = 1 - value**2 / 2, 1 - edge**2 / 2
                for x, ticks in ((value, False), (edge, True)):
                    at = [place for place, marker in marks if (marker == "|") == ticks]
                    assert min(abs(place - x) for place in at) < 1e-9, (measure, i, j, end)
    assert len(marks) == 3 * 3 * 2 * 2
    assert not _overlapping(figure)


def _overlapping(figure: Any) -> list[tuple[str, str]]:
    """Pairs of texts of two panels, or of a panel and the figure, that lie over each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [(-1, text) for text in (figure._suptitle, figure._supxlabel)]
    for i, axes in enumerate(figure.axes):
        ticks = [tick.label1 for axis in (axes.xaxis, axes.yaxis) for tick in axis._update_ticks()]
        keys = [] if axes.get_legend() is None else axes.get_legend().get_texts()
        labels = (axes.xaxis.label, axes.yaxis.label, axes._left_title)
        texts += [(i, text) for text in (*labels, *ticks, *keys, *axes.texts)]
    boxes = [
        (i, text.get_text(), text.get_window_extent(canvas.get_renderer())) for i, text in texts if text.get_text()
    ]
    return [
        (one, two)
        for a, (i, one, first) in enumerate(boxes)
        for j, two, second in boxes[a + 1 :]
        if i != j and first.overlaps(second)
    ]


@pytest.mark.contract
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"task_config": ("n_pairs",)}, "--task-config takes name=value"),
        ({"task_config": ("d=3",)}, "reads tokens of 2 numbers and this task has 3"),
        ({"task": "lingre"}, "no task is called"),
        ({"models": ("mamba",)}, "two or more different models"),
        ({"models": ("mamba", "mamba")}, "two or more different models"),
        ({"models": ("mamba", "nothing")}, "nothing"),
        ({"models": ("mamba", "skewed")}, "another task than .*covariance=skewed instead of isotropic"),
        ({"models": ("mamba", "other")}, 'trained on "outliers", not on "linreg"'),
        ({"device": "tpu"}, "tpu"),
        ({"components": 30}, "components=30"),
        ({"components": 0}, "components=0"),
        ({"prompts": 6}, "6 prompts"),
        ({"reset": 1.5}, "reset=1.5"),
        ({"longer": 1}, "longer=1"),
        ({"permutations": 0}, "permutations=0"),
    ],
)
def test_wrong_arguments_are_one_line(
    config: compare_states.Config, paths: dict[str, str], flags: dict[str, Any], message: str
) -> None:
    if "models" in flags:
        flags = {"models": tuple(paths.get(name, name) for name in flags["models"])}
    with pytest.raises(BadArgument, match=message) as error:
        compare_states.run(dataclasses.replace(config, **flags))
    code, line = cli.explain(error.value)
    assert code == 2 and "\n" not in line


@pytest.mark.contract
def test_a_model_without_states_is_refused_with_the_sites_it_lacks(
    config: compare_states.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "missing", lambda model, kinds: [kind for kind in kinds if kind == "hook_state"])
    with pytest.raises(BadArgument, match="has no hook_state: the comparison of states needs"):
        compare_states.run(config)


@pytest.mark.end_to_end
@pytest.mark.slow
def test_joint_tokens_and_a_query_of_its_own(tmp_path: Path) -> None:
    """One token a pair, prompts that are read at the last token only, a recurrence that never forgets."""
    task = tasks.build("outliers", d=8, M1=2, M2=2, n_pairs=9)
    paths = []
    for architecture, options in (("mamba", {"d_state": 4}), ("linear_attention", {})):
        torch.manual_seed(0)
        model = models.build(architecture, d_model=8, n_layers=2, d_in=task.d_token, d_out=1, **options).eval()
        error = evaluate.errors(model, task, n=256, query_only=True).double()
        row = {"error": float(error.mean()), "standard_error": float(error.std()) / 16, "n": 256}
        path = tmp_path / f"{architecture}.safetensors"
        models.save(
            model,
            path,
            {"task": "outliers", "task_config": task.config, "measured": {"model": {"k=8": row}, "n": 1280}},
        )
        paths.append(str(path))
    found = compare_states.run(
        compare_states.Config(task="outliers", models=tuple(paths), prompts=64, components=6, permutations=20)
    )
    assert found.ok, [check for check in found.checks if not check.ok]
    table = found.table
    assert {"R² of direction", "R² of Xty", "R² of outlier"} <= set(table.quantity)
    lives = table[(table.model == paths[1]) & table.quantity.str.startswith("half-life")]
    assert np.isinf(lives.value).all()
    left = table[(table.model == paths[1]) & (table.quantity == "left of a write")]
    np.testing.assert_allclose(left.value, 1.0)
    assert "linear_attention" in compare_states.plot(found).get_suptitle()


@pytest.mark.end_to_end
@pytest.mark.slow
def test_a_model_with_a_transition_matrix_is_compared_in_everything(paths: dict[str, str]) -> None:
    """S4's transition mixes the states; it is the same at every token, so it has neither content nor resets."""
    config = compare_states.Config(models=(paths["s4"], paths["s4d"]), prompts=40, components=6, permutations=20)
    found = compare_states.run(config)
    assert found.ok, [check for check in found.checks if not check.ok]
    assert found.provenance["without decays"] == []
    own = set(found.table[found.table.model == paths["s4"]].quantity)
    assert {"R² of w", "derivative by an example, of its mean", "recovery by a swap of h", "left of a write"} <= own
    table = found.table[found.table.model == paths["s4"]]
    shares = table[table.quantity.str.startswith("share of the variance")].set_index("quantity").value
    assert abs(shares["share of the variance of ln decay: content"]) < 1e-9 and float(shares.sum()) == pytest.approx(1)
    assert (table[table.quantity.str.startswith("resets")].value == 0).all()
    assert "s4d" in compare_states.plot(found).get_suptitle()


@pytest.fixture(scope="module")
def parts(config: compare_states.Config) -> tuple[list[Study], list[Any], Any, Plan]:
    names, loaded, task = compare_states._open(config)
    asked = plan(task, 40, components=6, permutations=40, reset=0.5, longer=2, seed=0)
    untrained = [compare_states._untrained(model, config) for model in loaded]
    found = [study(name, model, u, asked) for name, model, u in zip(names, loaded, untrained, strict=True)]
    return found, loaded, compare_states._alike(found, asked), asked


def failing(parts: tuple[list[Study], list[Any], Any, Plan], **changes: Any) -> set[str]:
    """What the checks say that fail when the first model's study is tampered with, without the model's name."""
    found, loaded, alike, asked = parts
    alike = changes.pop("alike", alike)
    changed = [dataclasses.replace(found[0], **changes), *found[1:]]
    checks = all_checks(changed, loaded, alike, asked)
    return {check.name.split(": ", 1)[1] for check in checks if not check.ok}


@pytest.mark.contract
def test_every_check_fails_when_what_it_checks_is_broken(parts: tuple[list[Study], list[Any], Any, Plan]) -> None:
    one = parts[0][0]
    assert failing(parts) == set()
    assert failing(parts, error=one.error + 5) == {
        f"clean error at k={k} against the card, standard errors" for k in (2, 4, 8)
    }
    half = Interval(np.array(0.9), np.array(0.8), np.array(1.0), n=20)
    assert failing(parts, exact=half) == {"swap of the whole state, distance of its slope from 1"}
    assert failing(parts, nothing=1e-3) == {"swap of nothing, largest change"}
    assert failing(parts, reach_gap=0.2) == {"derivative against differences, relative"}
    assert one.forgets is not None
    off = dataclasses.replace(one.forgets, error=0.01)
    assert failing(parts, forgets=off) == {"states rebuilt from decays and writes, relative"}
    told = {name: dataclasses.replace(r, shuffled=r.score * 0 + 0.5) for name, r in one.reading.items()}
    assert {"shuffled w, mean R²", "shuffled Xty, mean R²"} <= failing(parts, reading=told)
    biased = {
        k: {
            pair: {"cka": dataclasses.replace(m["cka"], null_mean=m["cka"].null_mean + 0.3)} for pair, m in each.items()
        }
        for k, each in parts[2].items()
    }
    assert failing(parts, alike=biased) == {
        f"debiased CKA of permuted prompts, k={k}, largest in standard errors" for k in (0, 4)
    }


@pytest.mark.planted
def test_broken_runs_are_seen_by_the_study_itself(
    parts: tuple[list[Study], list[Any], Any, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state that does not go in whole, and shuffled targets that are not shuffled, reach the checks."""
    import interp.patch.swap as swapping
    import interp.probe as module

    _, loaded, _, asked = parts
    right = swapping._states

    def forgetful(model: Any, context: Any) -> Any:
        return [layer._replace(h=0.5 * layer.h, conv=0.5 * layer.conv) for layer in right(model, context)]

    monkeypatch.setattr(swapping, "_states", forgetful)
    monkeypatch.setattr(
        module.np.random, "default_rng", lambda seed=None, real=np.random.default_rng: _Still(real(seed))
    )
    broken = study("it", loaded[0], loaded[0], asked)
    # The bound is that of 200 prompts that judge, not 10: an untrained state tells little of its prompt.
    told = {
        name: dataclasses.replace(r, lucky=r.lucky * len(asked.split.test) / 200) for name, r in broken.reading.items()
    }
    checks = all_checks([dataclasses.replace(broken, reading=told)], loaded[:1], {}, asked)
    names = {check.name.split(": ", 1)[1] for check in checks if not check.ok}
    assert "swap of the whole state, distance of its slope from 1" in names
    assert names & {f"shuffled {target}, mean R²" for target in broken.reading}


class _Still:
    """A random generator whose permutations leave everything in its place."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def permutation(self, n: int) -> Any:
        return np.arange(n)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


@pytest.mark.contract
def test_a_quick_run_compares_two_models_where_none_is_named() -> None:
    every = [f"{stem}-linreg" for stem in ("mamba", "s4d", "lti-mamba")]
    assert compare_states._open(compare_states.Config())[0] == every
    assert compare_states._open(compare_states.Config(quick=True))[0] == every[:2]
    named = compare_states.Config(quick=True, models=tuple(every))
    assert compare_states._open(named)[0] == every


@pytest.mark.slow
@pytest.mark.end_to_end
def test_the_command(paths: dict[str, str], tmp_path: Path) -> None:
    """``python -m analyses.compare_states --quick``: files, table, checks; and one model only."""
    command = [sys.executable, "-m", "analyses.compare_states", "--quick", "--out", str(tmp_path), "--models"]
    done = subprocess.run([*command, paths["mamba"], paths["s4d"]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    folder = Path(done.stdout.strip().splitlines()[-1].removeprefix("written: "))
    assert sorted(p.name for p in folder.iterdir()) == [
        "arrays.npz", "figure.png", "figure.svg", "result.json", "table.csv",
    ]  # fmt: skip
    head = json.loads((folder / "result.json").read_text())
    assert head["ok"], head["checks"]
    wrong = subprocess.run([*command, paths["mamba"]], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and wrong.stdout == "" and len(wrong.stderr.strip().splitlines()) == 1
