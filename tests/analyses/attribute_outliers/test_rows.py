"""Rows and intervals of the outlier table."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from analyses.attribute_outliers.rows import Rows, by_place, level, mean_in, rate
from interp.stats import bootstrap

pytestmark = pytest.mark.statistics


@pytest.mark.parametrize(("wrong", "n"), [(0, 64), (3, 64), (64, 64), (100, 200)])
def test_the_interval_of_a_rate_is_wilsons(wrong: int, n: int) -> None:
    values = torch.zeros(n)
    values[:wrong] = 1
    found = level(values)
    expected = binomtest(wrong, n).proportion_ci(method="wilson")
    np.testing.assert_allclose([found.mean, found.low, found.high], [wrong / n, expected.low, expected.high], atol=1e-6)


def test_no_error_in_the_sample_is_not_no_error() -> None:
    assert rate(np.zeros(64)).high > 0.05 and bootstrap(np.zeros(64)).high == 0


def test_errors_that_are_no_rate_are_bootstrapped() -> None:
    values = torch.rand(40)
    assert float(level(values).low) == float(bootstrap(values).low)
    assert float(level(torch.full((9,), 0.5)).high) == 0.5


def test_a_groups_mean_weighs_examples_and_not_prompts() -> None:
    values = torch.arange(60.0).reshape(20, 3)
    chosen = torch.zeros(20, 3, dtype=torch.bool)
    chosen[:, 0] = True
    chosen[0] = True
    found = mean_in(values, chosen)
    assert found is not None and float(found.mean) == pytest.approx(float(values[chosen].mean()))
    assert float(found.low) < float(found.mean) < float(found.high)
    chosen[5:] = False
    assert mean_in(values, chosen) is None


def test_places_that_too_few_prompts_have_are_left_open() -> None:
    values = np.random.default_rng(0).normal(size=(30, 3))
    values[5:, 1] = np.nan
    values[:, 2] = np.nan
    found = by_place(values)
    assert found[0, 0] == pytest.approx(values[:, 0].mean()) and found[1, 0] < found[0, 0] < found[2, 0]
    assert np.isnan(found[:, 1:]).all()


def test_skipped_parts_come_first_and_nothing_is_no_row() -> None:
    rows = Rows()
    rows.add("curve", "m", "flip", "error", rate(np.zeros(4)), alpha=0.5)
    rows.add("use", "m", "x", "error", None)
    rows.skip("m", "no hook_gate")
    table = rows.table()
    assert table.part.tolist() == ["skipped", "curve"] and table.alpha.tolist()[1] == 0.5
    assert table.n.tolist() == [0, 4]
