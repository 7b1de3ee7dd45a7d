"""Intervals cover as often as they say, p-values are uniform where nothing is, and closed forms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats
import torch

from hooks.errors import BadArgument, NonFinite
from interp import stats

pytestmark = pytest.mark.statistics


def draws(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def within_binomial_error(share: float, expected: float, n: int) -> bool:
    return abs(share - expected) < 4 * (expected * (1 - expected) / n) ** 0.5


def test_the_bootstrap_interval_of_a_mean_is_the_normal_one() -> None:
    values = draws(1000, 3) * [1, 10, 100] + 5
    found = stats.bootstrap(values, n_boot=4000)
    error = values.std(axis=0) / 1000**0.5
    np.testing.assert_allclose(found.mean, values.mean(axis=0))
    np.testing.assert_allclose((found.mean - found.low) / error, 1.96, atol=0.12)
    np.testing.assert_allclose((found.high - found.mean) / error, 1.96, atol=0.12)
    assert (found.n, found.level) == (1000, 0.95)


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_bootstrap_covers(level: float) -> None:
    simulations = 2000
    values = draws(400, simulations) + 1
    found = stats.bootstrap(values, level=level)
    share = float(((found.low <= 1) & (found.high >= 1)).mean())
    assert within_binomial_error(share, level, simulations)
    away = float(((found.low <= 1.3) & (found.high >= 1.3)).mean())
    assert away < 0.01


@pytest.mark.parametrize("n", [10, 16])
def test_of_few_prompts_the_interval_is_students(n: int) -> None:
    """Of normal values the expanded percentile interval is as wide as Student's, up to the draws of the bootstrap."""
    values = draws(n, 300, seed=n)
    found = stats.bootstrap(values, n_boot=2000)
    student = scipy.stats.t.ppf(0.975, n - 1) * values.std(axis=0, ddof=1) / n**0.5
    normal = 1.96 * values.std(axis=0, ddof=1) / n**0.5
    width = ((found.high - found.low) / 2).mean()
    assert width > 0.9 * student.mean() and width > 1.03 * ((n - 1) / n) ** 0.5 * normal.mean()


def test_paired_difference_covers_and_uses_the_pairing() -> None:
    simulations = 2000
    prompt = 10 * draws(400, simulations, seed=1)
    first, second = prompt + draws(400, simulations, seed=2) + 0.5, prompt
    found = stats.paired_difference(first, second)
    assert within_binomial_error(float(((found.low <= 0.5) & (found.high >= 0.5)).mean()), 0.95, 2000)
    unpaired = stats.paired_difference(first, np.roll(second, 1, axis=0))
    assert (unpaired.high - unpaired.low).min() > 5 * (found.high - found.low).max()


def test_ratio_covers_and_is_the_ratio_of_means() -> None:
    simulations = 2000
    rng = np.random.default_rng(3)
    prompt = rng.exponential(size=(500, simulations)) + 0.5
    second = prompt * rng.uniform(0.5, 1.5, size=prompt.shape)
    first = 2 * prompt * rng.uniform(0.5, 1.5, size=prompt.shape)
    found = stats.ratio(first, second)
    np.testing.assert_allclose(found.mean, first.mean(0) / second.mean(0))
    assert within_binomial_error(float(((found.low <= 2) & (found.high >= 2)).mean()), 0.95, 2000)
    exact = stats.ratio(3 * second, second)
    np.testing.assert_allclose(exact.low, 3)
    np.testing.assert_allclose(exact.high, 3)


def test_axes_types_and_repeats() -> None:
    values = draws(50, 4, 3)
    found = stats.bootstrap(values, seed=5)
    assert found.mean.shape == found.low.shape == found.high.shape == (4, 3)
    again = stats.bootstrap(torch.from_numpy(values).requires_grad_(), seed=5)
    np.testing.assert_array_equal(found.low, again.low)
    alone = stats.bootstrap(values[:, 2, 1], seed=5)
    assert alone.low.shape == ()
    assert float(alone.low) == pytest.approx(found.low[2, 1])
    assert not np.array_equal(found.low, stats.bootstrap(values, seed=6).low)


def test_blocks_of_resamples_are_invisible(monkeypatch: pytest.MonkeyPatch) -> None:
    values = draws(40, 2)
    whole = stats.bootstrap(values, n_boot=100)
    p = stats.permutation_test(values, n_perm=100)
    monkeypatch.setattr(stats, "_BLOCK", 40 * 7)
    np.testing.assert_allclose(stats.bootstrap(values, n_boot=100).low, whole.low)
    np.testing.assert_allclose(stats.permutation_test(values, n_perm=100), p)


def test_another_statistic_is_resampled_in_the_same_way() -> None:
    values = draws(60, 2)
    by_matrix = stats.bootstrap(values, n_boot=200)
    by_loop = stats.bootstrap(values, n_boot=200, statistic=lambda v: v.mean(axis=0))
    np.testing.assert_allclose(by_loop.low, by_matrix.low)
    np.testing.assert_allclose(by_loop.high, by_matrix.high)
    heavy = np.random.default_rng(0).standard_cauchy(size=2001)
    median = stats.bootstrap(heavy, n_boot=300, statistic=lambda v: np.median(v, axis=0))
    assert float(median.mean) == np.median(heavy)
    # The median of n Cauchy draws has standard error π / (2 sqrt(n)).
    assert float(median.high - median.low) == pytest.approx(2 * 1.96 * np.pi / 2 / 2001**0.5, rel=0.4)


def test_a_permutation_p_is_uniform_where_nothing_is() -> None:
    simulations = 2000
    difference = draws(30, simulations) * np.random.default_rng(1).exponential(size=(30, simulations))
    for alternative in ("two-sided", "greater", "less"):
        p = stats.permutation_test(difference, n_perm=999, alternative=alternative)
        assert p.min() >= 1 / 1000
        assert scipy.stats.kstest(p, "uniform").pvalue > 1e-3, alternative


def test_a_permutation_p_is_small_where_there_is_an_effect() -> None:
    prompt = draws(100, seed=4)
    first, second = prompt + 0.1 + 0.1 * draws(100, seed=5), prompt
    smallest = pytest.approx(1 / 1000)
    assert float(stats.permutation_test(first, second, n_perm=999)) == smallest
    assert float(stats.permutation_test(first, second, n_perm=999, alternative="greater")) == smallest
    assert float(stats.permutation_test(first, second, n_perm=999, alternative="less")) > 0.99


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_few_prompts_are_enumerated(alternative: str) -> None:
    difference = np.array([1.0, 2.0, -0.5, 3.0, 0.3])
    sums = [np.dot(signs, difference) for signs in itertools.product((-1, 1), repeat=5)]
    turn = {"two-sided": abs, "greater": lambda v: v, "less": lambda v: -v}[alternative]
    expected = np.mean([turn(s) >= turn(difference.sum()) - 1e-9 for s in sums])
    found = stats.permutation_test(difference, alternative=alternative)
    assert float(found) == pytest.approx(expected)
    parity = scipy.stats.permutation_test(
        (difference,), np.sum, permutation_type="samples", alternative=alternative, n_resamples=32
    )
    assert float(found) == pytest.approx(parity.pvalue)


def test_no_difference_at_all_has_p_one() -> None:
    same = draws(50)
    assert float(stats.permutation_test(same, same.copy())) == 1
    assert float(stats.permutation_test(same + 3, 3.0)) < 1


def test_a_shifted_null_is_tested() -> None:
    values = draws(200, seed=7) + 3
    assert float(stats.permutation_test(values, 3.0, n_perm=999)) > 0.01
    assert float(stats.permutation_test(values, n_perm=999)) == pytest.approx(0.001)


def test_holm_by_hand() -> None:
    p = np.array([[0.01, 0.04], [0.03, 0.005]])
    expected = np.array([[0.03, 0.06], [0.06, 0.02]])
    np.testing.assert_allclose(stats.holm(p), expected)
    np.testing.assert_allclose(stats.holm(np.array([0.9, 0.8])), [1, 1])


def test_benjamini_hochberg_is_scipys() -> None:
    p = np.random.default_rng(0).uniform(size=(5, 20)) ** 2
    expected = scipy.stats.false_discovery_control(p.reshape(-1)).reshape(5, 20)
    np.testing.assert_allclose(stats.benjamini_hochberg(p), expected)


def test_one_prompt_has_an_estimate_and_no_interval() -> None:
    one, other = draws(1, 3), draws(1, 3, seed=1)
    for found, mean in (
        (stats.bootstrap(one), one[0]),
        (stats.bootstrap(one, statistic=lambda v: v.max(axis=0)), one[0]),
        (stats.paired_difference(one, other), one[0] - other[0]),
        (stats.ratio(one, other), one[0] / other[0]),
    ):
        np.testing.assert_allclose(found.mean, mean)
        assert found.n == 1 and np.isnan([found.low, found.high]).all()
    with pytest.raises(BadArgument, match="level=95"):
        stats.bootstrap(one, level=95.0)


def test_corrections_keep_their_promises() -> None:
    """1000 families of 20 tests without any effect: 5 % of families have a false rejection."""
    p = np.random.default_rng(0).uniform(size=(1000, 20))
    uncorrected = np.mean([(family <= 0.05).any() for family in p])
    assert uncorrected > 0.5
    for correct in (stats.holm, stats.benjamini_hochberg):
        wrong = float(np.mean([(correct(family) <= 0.05).any() for family in p]))
        assert wrong < 0.05 + 4 * (0.05 * 0.95 / 1000) ** 0.5
        assert (correct(np.array([1e-4, *p[0]])) <= 0.05)[0]


def test_what_would_give_a_wrong_number_is_refused() -> None:
    good = draws(20, 2)
    bad = good.copy()
    bad[3, 1] = np.nan
    for call in (stats.bootstrap, stats.permutation_test):
        with pytest.raises(NonFinite, match="1 of 40 values"):
            call(bad)
        with pytest.raises(BadArgument, match="or more on axis 0"):
            call(good[:0])
    with pytest.raises(BadArgument, match="two or more"):
        stats.permutation_test(good[:1])
    with pytest.raises(BadArgument, match=r"\(20, 2\) and \(20, 1\)"):
        stats.paired_difference(good, good[:, :1])
    with pytest.raises(BadArgument, match="no ratio exists"):
        stats.ratio(good, np.zeros_like(good))
    with pytest.raises(BadArgument, match="in a resample"):
        stats.ratio(good, np.eye(20)[:, :2])
    with pytest.raises(BadArgument, match=r"level=95\.0"):
        stats.bootstrap(good, level=95.0)
    with pytest.raises(BadArgument, match="n_boot=0"):
        stats.bootstrap(good, n_boot=0)
    with pytest.raises(BadArgument, match="p-value"):
        stats.holm(np.array([0.5, np.nan]))
    with pytest.raises(BadArgument, match="p-value"):
        stats.benjamini_hochberg(np.array([1.5]))
