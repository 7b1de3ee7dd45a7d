"""Matching: a model that is an algorithm is called by its name, and noise is called by none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hooks.errors import BadArgument
from interp import estimators, seeds, tasks
from interp.estimators import iterative
from interp.layers import matching, readings

TASK = tasks.build("linreg", d=4, n_pairs=13)


@pytest.fixture(scope="module")
def batch() -> tasks.Batch:
    return TASK.sample(80, seeds.generator("probe", 0))


@pytest.fixture(scope="module")
def found(batch: tasks.Batch) -> matching.Candidates:
    return matching.candidates(batch, steps=8)


@pytest.mark.planted
@pytest.mark.parametrize(
    ("family", "setting"),
    [
        ("averaging", ""),
        ("k-NN", "3 nearest"),
        ("online GD", "rate 0.06, forgetting 0.97"),
        ("GD", "fastest rate, 3 steps"),
        ("GD", "rate 0.2, 5 steps"),
        ("GD++", "once, 4 steps"),
        ("GD++", "iterated, 2 steps"),
        ("Newton", "6 steps"),
        ("ridge", "α = 0.3"),
        ("least squares", ""),
    ],
)
def test_an_algorithm_in_the_place_of_a_model_is_found(
    family: str, setting: str, batch: tasks.Batch, found: matching.Candidates
) -> None:
    noise = torch.randn(80, 13, generator=seeds.generator("noise", 0), dtype=torch.float64)
    own = dict(zip(zip(found.family, found.setting, strict=True), found.prediction, strict=True))[family, setting]
    match = matching.match(own + 1e-3 * noise, found, range(1, 13))
    assert match.best == family and match.family[family][0] == setting
    assert match.clear and match.agreement > 0.95
    assert float(match.family[family][1].mean) < 1e-4
    if "step" in setting:
        count = int(setting.split()[-2])
        assert match.steps == (count, count, count)
    else:
        assert match.steps == (-1, -1, -1)


@pytest.mark.definition
def test_candidates_are_the_estimators(batch: tasks.Batch, found: matching.Candidates) -> None:
    exact = replace(batch, x=batch.x.double(), y=batch.y.double())
    named = dict(zip(zip(found.family, found.setting, strict=True), found.prediction, strict=True))
    for key, expected in {
        ("ridge", "α = 1"): estimators.build("ridge", alpha=1.0)(exact),
        ("Newton", "2 steps"): estimators.build("newton", steps=2)(exact),
        ("GD", "rate 0.1, 1 step"): iterative.gd_path(exact.x, exact.y, 1, 0.1)[1],
        ("online GD", "rate 0.03, forgetting 0.9"): estimators.build("online_gd", rate=0.03, forgetting=0.9)(exact),
    }.items():
        torch.testing.assert_close(named[key], expected)


@pytest.mark.planted
def test_what_is_like_no_algorithm_is_nearest_to_zero(batch: tasks.Batch, found: matching.Candidates) -> None:
    noise = torch.randn(80, 13, generator=seeds.generator("noise", 1))
    match = matching.match(0.1 * noise, found, range(1, 13))
    assert match.best == "zero" and float(match.family["zero"][1].mean) == pytest.approx(1.0)
    assert min(float(interval.mean) for name, (_, interval) in match.family.items() if name != "zero") > 1


@pytest.mark.statistics
def test_two_that_agree_are_not_told_apart(found: matching.Candidates) -> None:
    """Half-way between ridge and least squares, both are as near."""
    own = dict(zip(zip(found.family, found.setting, strict=True), found.prediction, strict=True))
    middle = (own["ridge", "α = 0.01"] + own["least squares", ""]) / 2
    both = [i for i, key in enumerate(zip(found.family, found.setting, strict=True)) if key in (
        ("ridge", "α = 0.01"), ("least squares", ""),
    )]  # fmt: skip
    two = matching.Candidates(
        tuple(found.family[i] for i in both),
        tuple(found.setting[i] for i in both),
        tuple(found.step[i] for i in both),
        found.prediction[both],
    )
    match = matching.match(middle, two, range(1, 13))
    assert not match.clear and float(match.lead.mean) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.planted
def test_a_change_of_algorithm_over_the_examples_is_found_at_each_k(
    batch: tasks.Batch, found: matching.Candidates
) -> None:
    """3 nearest up to k = 6 and averaging after it; over all k together neither is the answer at every one."""
    named = dict(zip(zip(found.family, found.setting, strict=True), found.prediction, strict=True))
    last = torch.where(torch.arange(13) <= 6, named["k-NN", "3 nearest"], named["averaging", ""])
    own = torch.stack([named["ridge", "α = 0.3"], last])
    levels = readings.Map(batch, own, own.square(), own, trained=13)
    matches = readings.matches_by_k(levels, found, [4, 8, 99], seed=0)
    assert set(matches) == {(0, 4), (0, 8), *((1, k) for k in range(1, 13))}
    for (block, k), one in matches.items():
        planted = "ridge" if block == 0 else "k-NN" if k <= 6 else "averaging"
        # With one or two examples several algorithms are the same function.
        assert float(one.family[planted][1].mean) < 1e-20 and (k < 4 or one.best == planted)
        zero = one.family["zero"][1]
        assert float(zero.mean) == pytest.approx(1.0) and float(zero.low) == pytest.approx(1.0)


@pytest.mark.contract
def test_what_cannot_be_matched_is_refused(found: matching.Candidates) -> None:
    blank = torch.zeros(80, 13)
    for prediction, ks, message in (
        (blank, range(1, 13), "zero in every example"),
        (blank[:, :5], range(1, 5), "shape"),
        (blank + 1, [], "too few"),
    ):
        with pytest.raises(BadArgument, match=message):
            matching.match(prediction, found, ks)
