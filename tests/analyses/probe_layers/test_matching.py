"""Matching: a model that is an algorithm is called by its name, scaled or not, and what is none of them by none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from analyses.probe_layers import families, matching, readings
from analyses.probe_layers.families import Where
from hooks.errors import BadArgument
from interp import estimators, seeds, tasks

TASK = tasks.build("linreg", d=4, n_pairs=13)
KS = range(1, 13)
PLANTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "averaging": ("averaging", {}, "averaging"),
    "k-NN": ("knn", {"neighbours": 3}, "k-NN (3 nearest)"),
    "least squares": ("ols", {}, "least squares"),
    "ridge": ("ridge", {"alpha": 0.37}, "ridge (α = 0.37)"),
    "GD, fastest": ("gd", {"steps": 3}, "GD (fastest rate, 3 steps)"),
    "GD": ("gd", {"steps": 3, "rate": 0.137}, "GD (rate 0.137, 3 steps)"),
    "GD on sums": ("gd", {"steps": 2, "rate": 0.011, "over": "sums"}, "GD on sums (rate 0.011, 2 steps)"),
    "Newton": ("newton", {"steps": 4}, "Newton (4 steps)"),
    "online GD": ("online_gd", {"rate": 0.09, "forgetting": 0.93}, "online GD (rate 0.09, forgetting 0.93)"),
    "online GD of labels": (
        "online_gd", {"rate": 0.05, "forgetting": 0.93, "form": "label"},
        "online GD of labels (rate 0.05, forgetting 0.93)",
    ),
    "GD++, own": ("gdpp", {"steps": 3}, "GD++ (iterated, each prompt's own η and γ, 3 steps)"),
    "GD++": ("gdpp", {"steps": 2, "rate": 0.5, "gamma": 0.1}, "GD++ (iterated, η 0.5, γ 0.1, 2 steps)"),
    "GD++, once": (
        "gdpp", {"steps": 3, "rate": 0.3, "gamma": 0.05, "form": "once"}, "GD++ (once, η 0.3, γ 0.05, 3 steps)",
    ),
    "GD++ on sums": (
        "gdpp", {"steps": 4, "rate": 0.02, "gamma": 0.005, "over": "sums"},
        "GD++ (iterated on sums, η 0.02, γ 0.005, 4 steps)",
    ),
}  # fmt: skip
"""Each algorithm at settings that are in no list of ours: name → (estimator, options, what is to be said)."""


@pytest.fixture(scope="module")
def batch() -> tasks.Batch:
    return TASK.sample(96, seeds.generator("probe", 0))


@pytest.fixture(scope="module")
def found(batch: tasks.Batch) -> families.Candidates:
    return families.candidates(batch, steps=5)


def predicted(batch: tasks.Batch, name: str, **options: Any) -> Tensor:
    """The estimator's predictions in fp32, as a model's are."""
    exact = replace(batch, x=batch.x.double(), y=batch.y.double())
    return estimators.build(name, **options)(exact).float()


@pytest.fixture(scope="module")
def matched(batch: tasks.Batch, found: families.Candidates) -> dict[tuple[str, str], matching.Match]:
    """Every planted algorithm as it is and as 2 p − 1, all matched at once as a model's blocks are."""
    plants = {key: predicted(batch, name, **options) for key, (name, options, _) in PLANTED.items()}
    both = {
        (key, how): plant if how == "raw" else 2 * plant - 1
        for key, plant in plants.items()
        for how in ("raw", "2 p − 1")
    }
    each = matching.match(torch.stack(list(both.values())), found, KS, targets=batch.targets)
    return {key: one for key, (one,) in zip(both, each, strict=True)}


@pytest.mark.planted
@pytest.mark.parametrize("key", PLANTED)
def test_an_algorithm_in_the_place_of_a_model_has_its_own_name_and_settings(
    key: str, matched: dict[tuple[str, str], matching.Match]
) -> None:
    """Also at rates that no grid holds. Least squares is what Newton and GD++ end at: they may tie with it."""
    match, said = matched[key, "raw"], PLANTED[key][2]
    assert match.as_it_is.best.said() == said and match.as_it_is.fits
    assert match.named.best.said() == said, "scale 1 is preferred"
    assert set(match.as_it_is.ties) <= ({"Newton", "GD++"} if key == "least squares" else set())
    assert float(match.as_it_is.best.distance.mean) < 1e-10
    assert match.as_it_is.best.steps == (int(said.split()[-2].strip("(")) if "step" in said else -1)


@pytest.mark.planted
@pytest.mark.parametrize("key", PLANTED)
def test_with_a_scale_and_a_shift_it_is_found_as_that_and_as_it_is_never_under_another_name(
    key: str, matched: dict[tuple[str, str], matching.Match]
) -> None:
    """Some rescaled algorithms are other settings of themselves, which keeps the name. No label is used."""
    match, own = matched[key, "2 p − 1"], PLANTED[key][2].split(" (")[0]
    assert match.as_it_is.name == matching.NONE, "a shift of 1 is none of these"
    best = match.named.best
    assert match.named.name == own and float(best.distance.mean) < 1e-5
    assert best.shift == pytest.approx(-1, abs=0.05)
    if best.said().startswith(PLANTED[key][2]):
        assert best.scale == pytest.approx(2, rel=1e-4) and f"{PLANTED[key][2]} × 2 − 1" == best.said()


@pytest.mark.planted
def test_half_of_averaging_is_a_step_of_descent_and_both_are_said(
    batch: tasks.Batch, found: families.Candidates
) -> None:
    """(1/k) Σ y x times 0.7 is one step at rate 0.7: at scale 1 a step, and averaging is named as the same."""
    averaging = predicted(batch, "averaging")
    ((one,), (scaled,)) = matching.match(torch.stack([averaging, 0.7 * averaging]), found, KS)
    assert one.named.said() == "averaging" and one.named.same == ("GD",) and one.named.clear
    assert scaled.named.said() == "GD (rate 0.7, 1 step)" and scaled.named.same == ("averaging",)


@pytest.mark.planted
@pytest.mark.parametrize("factor", [0.6, pytest.param(2.0, marks=pytest.mark.slow)])
def test_with_a_scale_alone_it_has_as_it_is_its_own_name_or_none(
    factor: float, batch: tasks.Batch, found: families.Candidates
) -> None:
    """Steps on sums times 0.6 are within 1e-6 of a step of GD++: a name that they should not have."""
    kept = ("GD on sums", "ridge", "least squares")
    plants = torch.stack([factor * predicted(batch, PLANTED[key][0], **PLANTED[key][1]) for key in kept])
    for key, (one,) in zip(kept, matching.match(plants, found, KS), strict=True):
        assert one.as_it_is.name in (key, matching.NONE) and one.named.name == key
        assert one.named.best.said() == f"{PLANTED[key][2]} × {factor:g}" and one.named.clear
    near = matching.match(plants[:1], found, KS)[0][0].as_it_is
    assert near.outdone and not near.clear and near.said().startswith("none of these, nearest GD++")


@pytest.mark.planted
def test_steps_that_diverge_after_few_examples_are_found_as_they_are() -> None:
    """A fit without a scale alone stays at ten steps of another rate, a third of the spread away."""
    batch = tasks.build("linreg", d=5).sample(64, torch.Generator().manual_seed(1))
    own = predicted(batch, "gd", steps=8, rate=0.4)
    ((one,),) = matching.match(own[None], families.candidates(batch, steps=10), range(1, 21))
    assert one.as_it_is.said() == "GD (rate 0.4, 8 steps)" and float(one.as_it_is.best.distance.mean) < 1e-10


@pytest.mark.planted
def test_the_nearest_is_told_by_the_prompts_that_judge(batch: tasks.Batch, found: families.Candidates) -> None:
    bent = 3 * torch.tanh(predicted(batch, "ols") / 3)
    ((one,),) = matching.match(bent[None], found, KS)
    assert one.as_it_is.name == matching.NONE
    assert float(one.as_it_is.best.distance.mean) == min(float(fit.distance.mean) for fit in one.raw.values())


@pytest.mark.planted
def test_what_is_no_algorithm_has_no_name(batch: tasks.Batch, found: families.Candidates) -> None:
    """Noise; a function of the query alone; half-way between two; least squares with a tenth of its spread as noise."""
    noise = torch.randn(3, 96, 13, generator=seeds.generator("noise", 1))
    solved = predicted(batch, "ols")
    spread = float(solved[:, 1:].std())
    others = [noise[0], batch.x[..., 0], (solved + predicted(batch, "averaging")) / 2]
    loud, faint = solved + 0.2 * spread * noise[1], solved + 0.05 * spread * noise[2]
    matches = [one for (one,) in matching.match(torch.stack([*others, loud, faint]), found, KS)]
    for one in matches[:4]:
        assert one.as_it_is.name == one.named.name == matching.NONE and not one.named.clear
        assert one.named.said().startswith("none of these, nearest ")
        assert float(one.named.best.distance.mean) > matching.FIT
    assert float(matches[0].named.best.distance.mean) == pytest.approx(1.0, abs=0.1)
    assert matches[4].as_it_is.fits and matches[4].as_it_is.name == "least squares"
    left = float(matches[4].as_it_is.best.distance.mean)
    assert left == pytest.approx(0.05**2 / (1 + 0.05**2), rel=0.2), "the noise's share of the spread, in closed form"


@pytest.mark.planted
def test_predictions_that_never_vary_are_called_that(batch: tasks.Batch, found: families.Candidates) -> None:
    flat = torch.stack([torch.zeros(96, 13), torch.full((96, 13), 0.7)])
    for (one,) in matching.match(flat, found, KS):
        assert one.named.name == matching.NONE and "a constant" in one.named.said() and one.raw == {}


@pytest.mark.definition
def test_the_distance_is_that_of_a_loop_on_the_prompts_that_did_not_choose(
    batch: tasks.Batch, found: families.Candidates
) -> None:
    own = predicted(batch, "ridge", alpha=2.0) + 0.4
    ((one,),) = matching.match(own[None], found, KS, targets=batch.targets)
    judged, solved = own[48:, 1:].double().numpy(), predicted(batch, "ols")[48:, 1:].double().numpy()
    spread = np.square(judged - judged.mean()).sum()
    expected = np.square(judged - solved).sum() / spread
    assert float(one.raw["least squares"].distance.mean) == pytest.approx(expected, rel=1e-5)
    assert one.truth is not None
    labels = batch.targets[48:, 1:].double().numpy()
    assert float(one.truth.mean) == pytest.approx(np.square(judged - labels).sum() / spread, rel=1e-5)
    half, there = own[:48, 1:].double().flatten(), predicted(batch, "ols")[:48, 1:].double().flatten()
    slope, shift = np.polyfit(there.numpy(), half.numpy(), 1)
    assert (one.scaled["least squares"].scale, one.scaled["least squares"].shift) == pytest.approx(
        (slope, shift), rel=1e-5
    )


@pytest.mark.definition
def test_families_are_the_estimators(batch: tasks.Batch, found: families.Candidates) -> None:
    """Every form at one of its starts, against the loops of ``interp.estimators``, for shared and separate settings."""
    where = Where(slice(3, 40), torch.tensor(list(KS)))
    exact = replace(batch, x=batch.x.double(), y=batch.y.double())
    checked = set()
    for family in found.families:
        row = family.starts[len(family.starts) // 2]
        alone = family.predict(row[None, None], where)[0, ..., 0]
        each = family.predict(row.expand(1, len(KS), -1), where)[0, ..., 0]
        torch.testing.assert_close(alone.expand_as(each), each)
        if family.name == "zero":
            assert not alone.any()
            continue
        name, options = by_hand(family, row.tolist())
        expected = estimators.build(name, **options)(exact)[3:40, 1:]
        torch.testing.assert_close(alone, expected, rtol=1e-6, atol=1e-7)
        checked.add((name, *options, options.get("form"), options.get("over")))
    assert len(checked) == len(found.families) - 1, "no form was checked twice in the place of another"


def by_hand(family: families.Family, row: list[float]) -> tuple[str, dict[str, Any]]:
    """The estimator of the same function, and its options."""
    over = "sums" if "sums" in family.name + family.words(row) else "means"
    rate = {"rate": row[1]} if len(row) > 1 else {}
    if family.name in ("averaging", "least squares"):
        return {"averaging": "averaging", "least squares": "ols"}[family.name], {}
    if family.name == "k-NN":
        return "knn", {"neighbours": 3}
    if family.name == "ridge":
        return "ridge", {"alpha": row[0]}
    if family.name.startswith("online GD"):
        keep = {"forgetting": float(np.exp(-row[1]))} if len(row) > 1 else {}
        return "online_gd", {"rate": row[0], **keep, "form": "label" if "labels" in family.name else "residual"}
    if family.name == "GD++":
        form = "once" if family.words(row).startswith("once") else "iterated"
        more = {**rate, "gamma": row[2]} if rate else {}
        return "gdpp", {"steps": int(row[0]), **more, "form": form, "over": over}
    options = {"steps": int(row[0])}
    return ("newton", options) if family.name == "Newton" else ("gd", {**options, **rate, "over": over})


@pytest.mark.statistics
def test_two_that_agree_are_not_told_apart(batch: tasks.Batch, found: families.Candidates) -> None:
    """Half-way between ridge and least squares with both as the only candidates, neither is the name alone."""
    kept = tuple(family for family in found.families if family.name in ("ridge", "least squares"))
    alpha = torch.tensor([0.05], dtype=torch.float64)
    two = families.Candidates(
        tuple(replace(f, starts=alpha[:, None], fitted=()) if f.name == "ridge" else f for f in kept)
    )
    middle = (predicted(batch, "ridge", alpha=0.05) + predicted(batch, "ols")) / 2
    ((one,),) = matching.match(middle[None], two, KS)
    assert one.as_it_is.said() == "least squares, not told apart from ridge" and not one.as_it_is.clear
    ((one,),) = matching.match(predicted(batch, "ridge", alpha=0.05)[None], two, KS)
    assert one.as_it_is.said() == "ridge (α = 0.05)", "near, but told apart"


@pytest.mark.planted
@pytest.mark.slow
def test_a_change_of_algorithm_over_the_examples_is_found_at_each_k(
    batch: tasks.Batch, found: families.Candidates
) -> None:
    """3 nearest up to k = 6 and averaging after it; over all k together it is none."""
    last = torch.where(torch.arange(13) <= 6, predicted(batch, "knn", neighbours=3), predicted(batch, "averaging"))
    own = torch.stack([predicted(batch, "ridge", alpha=0.3), last])
    levels = readings.Map(batch, own, own.square(), own, trained=13)
    together, by_k = readings.matches(levels, found, [4, 8, 99], seed=0)
    assert [one.as_it_is.name for one in together] == ["ridge", matching.NONE]
    assert set(by_k) == {(0, 4), (0, 8), *((1, k) for k in KS)}
    for (block, k), one in by_k.items():
        planted = "ridge" if block == 0 else "k-NN" if k <= 6 else "averaging"
        assert float(one.raw[planted].distance.mean) < 1e-9
        # With one to three examples 3 nearest are all of them; after one, several solvers are the same function.
        assert one.as_it_is.name == planted or planted in (*one.as_it_is.same, *one.as_it_is.ties)


@pytest.mark.contract
def test_what_cannot_be_matched_is_refused(found: families.Candidates) -> None:
    for shape, ks in (((1, 80, 13), []), ((1, 3, 13), KS)):
        with pytest.raises(BadArgument, match="too few"):
            matching.match(torch.zeros(shape), found, ks)
