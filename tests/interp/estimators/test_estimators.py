"""Estimators against scikit-learn, against numpy prompt by prompt, and against closed forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsRegressor
from torch import Tensor

from hooks.errors import BadArgument
from interp import estimators, seeds, tasks

NEEDED: dict[str, dict[str, Any]] = {
    "gd": {"steps": 3},
    "gdpp": {"steps": 3},
    "newton": {"steps": 3},
    "online_gd": {"rate": 0.1},
    "bayes": {"noise": 0.5},
    "dmmse": {"noise": 0.5, "pool": [[1.0, 0.0, 2.0, 0.0], [0.0, -1.0, 0.0, 0.5], [0.3, 0.7, -1.0, 1.0]]},
    "boosted_trees": {"trees": 2},
    "mlp": {"steps": 2, "hidden": 8},
}
"""Options without a default, by estimator, and fewer steps of the slow ones."""
OF_PAIRS = [name for name in estimators.names() if name != "add_beta"]
"""The estimators of regression; the one of symbols is tested in ``test_markov``."""


@dataclass(frozen=True)
class Pairs:
    """Inputs and labels without a task."""

    x: Tensor
    y: Tensor


def noisy(n: int = 5, n_pairs: int = 12, d: int = 4, seed: int = 0) -> Pairs:
    """Regression with label noise, so that no method is exact."""
    generator = seeds.generator("probe", seed)
    x = torch.randn(n, n_pairs, d, generator=generator, dtype=torch.float64)
    w = torch.randn(n, d, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, n_pairs, generator=generator, dtype=torch.float64)
    return Pairs(x, (x @ w)[..., 0] + 0.5 * noise)


def loss(name: str, pairs: Pairs) -> Tensor:
    return (estimators.build(name)(pairs) - pairs.y) ** 2


def expect(mean: Tensor, expected: float) -> None:
    """The mean over prompts is within 4 standard errors of the closed form."""
    error = float(mean.std()) / len(mean) ** 0.5
    assert abs(float(mean.mean()) - expected) < 4 * error
    assert 4 * error < 0.1 * max(expected, 0.2), "too few draws to tell anything"


def each(pairs: Pairs) -> list[tuple[int, int]]:
    return [(b, k) for b in range(len(pairs.y)) for k in range(1, pairs.y.shape[1])]


@pytest.mark.definition
def test_ols_is_numpys_least_squares_of_each_prefix() -> None:
    pairs = noisy()
    found = estimators.build("ols")(pairs)
    for b, k in each(pairs):
        x, y = pairs.x[b].numpy(), pairs.y[b].numpy()
        w = np.linalg.lstsq(x[:k], y[:k], rcond=None)[0]
        assert float(found[b, k]) == pytest.approx(w @ x[k], rel=1e-9, abs=1e-9)


@pytest.mark.definition
def test_ols_has_minimum_norm_where_inputs_repeat_or_coordinates_are_zero() -> None:
    pairs = noisy()
    x = pairs.x.clone()
    x[..., 3] = 0
    x[:, 2] = x[:, 1]
    x[:, 5] = 2 * x[:, 4]
    weights = estimators.ols_weights(x, pairs.y)
    assert not weights[..., 3].any()
    for b, k in each(pairs):
        expected = np.linalg.pinv(x[b, :k].numpy(), rcond=1e-10) @ pairs.y[b, :k].numpy()
        np.testing.assert_allclose(weights[b, k].numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.definition
def test_ols_stays_exact_on_ill_conditioned_inputs() -> None:
    """Where the normal equations lose all digits: two inputs that differ by 1e-8."""
    x = torch.linalg.qr(noisy(n=1, n_pairs=3, d=3).x).Q.repeat(1, 2, 1)
    x[0, 1] = x[0, 0] + 1e-8 * x[0, 1]
    w = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    found = estimators.ols_weights(x, (x @ w))
    torch.testing.assert_close(found[0, 3], w, rtol=1e-6, atol=1e-6)
    xtx, xty = estimators.moments(x, x @ w)
    squared = torch.linalg.solve(xtx[0, 3], xty[0, 3])
    assert not torch.allclose(squared, w, rtol=1e-4, atol=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize("alpha", [0.01, 1.0, 30.0])
def test_ridge_is_scikit_learns(alpha: float) -> None:
    pairs = noisy()
    found = estimators.build("ridge", alpha=alpha)(pairs)
    for b, k in each(pairs):
        x, y = pairs.x[b].numpy(), pairs.y[b].numpy()
        fitted = Ridge(alpha=alpha, fit_intercept=False).fit(x[:k], y[:k])
        assert float(found[b, k]) == pytest.approx(float(fitted.predict(x[k : k + 1])[0]), rel=1e-8)


@pytest.mark.parity
@pytest.mark.parametrize("neighbours", [1, 3, 5])
def test_knn_is_scikit_learns(neighbours: int) -> None:
    pairs = noisy()
    found = estimators.build("knn", neighbours=neighbours)(pairs)
    for b, k in each(pairs):
        x, y = pairs.x[b].numpy(), pairs.y[b].numpy()
        fitted = KNeighborsRegressor(min(neighbours, k)).fit(x[:k], y[:k])
        assert float(found[b, k]) == pytest.approx(float(fitted.predict(x[k : k + 1])[0]))


@pytest.mark.definition
def test_averaging_is_the_mean_of_y_x() -> None:
    pairs = noisy()
    found = estimators.build("averaging")(pairs)
    for b, k in each(pairs):
        w = sum(pairs.y[b, i] * pairs.x[b, i] for i in range(k)) / k
        torch.testing.assert_close(found[b, k], w @ pairs.x[b, k])


@pytest.mark.law
@pytest.mark.parametrize("name", OF_PAIRS)
def test_no_estimator_looks_ahead(name: str) -> None:
    pairs, estimator = noisy(), estimators.build(name, **NEEDED.get(name, {}))
    before = estimator(pairs)
    y, x = pairs.y.clone(), pairs.x.clone()
    y[:, 6] += 5
    changed = ((estimator(Pairs(pairs.x, y)) - before).abs() > 1e-9).any(dim=0)
    assert not changed[:7].any() and changed[7]
    x[:, 6] += 5
    changed = ((estimator(Pairs(x, pairs.y)) - before).abs() > 1e-9).any(dim=0)
    assert not changed[:6].any() and changed[6]


@pytest.mark.law
@pytest.mark.parametrize("name", [name for name in OF_PAIRS if name != "dmmse"])
def test_every_estimator_predicts_zero_before_the_first_pair_and_keeps_the_type(name: str) -> None:
    pairs, estimator = noisy(), estimators.build(name, **NEEDED.get(name, {}))
    found = estimator(Pairs(pairs.x.float(), pairs.y.float()))
    assert found.dtype == torch.float32 and found.shape == pairs.y.shape
    assert not found[:, 0].any() and found[:, 1:].all()
    one = estimator(Pairs(pairs.x[:, :1, :1], pairs.y[:, :1]))
    torch.testing.assert_close(one, torch.zeros(5, 1, dtype=torch.float64))


@pytest.mark.law
@pytest.mark.parametrize(
    "name", ["ols", "ridge", "bayes", "lasso", "averaging", "kernel_ridge", "gd", "gdpp", "newton"]
)
def test_estimators_do_not_care_for_the_order_of_the_pairs(name: str) -> None:
    pairs = noisy()
    order = torch.tensor([5, 3, 8, 0, 9, 1, 10, 7, 2, 6, 4, 11])
    estimator = estimators.build(name, **NEEDED.get(name, {}))
    shuffled = estimator(Pairs(pairs.x[:, order], pairs.y[:, order]))
    found = estimator(pairs)
    torch.testing.assert_close(shuffled[:, -1], found[:, -1])
    assert not torch.isclose(shuffled[:, 5], found[:, 5]).any()


@pytest.mark.statistics
@pytest.mark.parametrize("covariance", ["isotropic", "skewed"])
def test_ols_error_is_zero_from_d_on(covariance: str) -> None:
    task = tasks.build("linreg", d=5, covariance=covariance)
    error = task.baselines(task.sample(1280, seeds.generator("evaluate", 0)))["ols"] / 5
    torch.testing.assert_close(error[:, 5:], torch.zeros(1280, 16), rtol=0, atol=1e-6)
    assert float(error[:, 4].mean()) > 0.01


@pytest.mark.statistics
def test_ols_error_is_one_minus_k_over_d() -> None:
    task = tasks.build("linreg", d=5, n_pairs=5)
    batch = task.sample(20_000, seeds.generator("evaluate", 1))
    error = (estimators.build("ols")(batch) - batch.y) ** 2 / 5
    for k in range(5):
        expect(error[:, k], 1 - k / 5)


@pytest.mark.statistics
def test_averaging_error_is_d_plus_one_over_k() -> None:
    task = tasks.build("linreg", d=5, n_pairs=11)
    batch = task.sample(200_000, seeds.generator("evaluate", 2))
    error = (estimators.build("averaging")(batch) - batch.y) ** 2 / 5
    for k in range(1, 11):
        expect(error[:, k], 6 / k)
    expect(error[:, 0], 1.0)


@pytest.mark.statistics
def test_one_neighbour_at_one_example_has_error_two() -> None:
    task = tasks.build("linreg", d=5, n_pairs=2)
    batch = task.sample(100_000, seeds.generator("evaluate", 3))
    expect((estimators.build("knn")(batch) - batch.y)[:, 1] ** 2 / 5, 2.0)


@pytest.mark.statistics
def test_ridge_with_the_noise_as_penalty_is_the_best_of_its_kind() -> None:
    pairs = noisy(n=20_000, n_pairs=5)
    error = {
        alpha: float(((estimators.build("ridge", alpha=alpha)(pairs) - pairs.y)[:, -1] ** 2).mean())
        for alpha in (0.05, 0.25, 1.0)
    }
    assert error[0.25] < min(error[0.05], error[1.0])


@pytest.mark.contract
@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("gd", {"steps": -1}, "steps=-1"),
        ("gd", {"steps": 2, "rate": -1.0}, "rate=-1"),
        ("gdpp", {"steps": 2, "form": "twice"}, "twice"),
        ("newton", {"steps": -2}, "steps=-2"),
        ("online_gd", {"rate": 0.1, "forgetting": 3.0}, "forgetting=3"),
    ],
)
def test_a_solvers_option_that_does_not_work_is_refused_when_it_is_built(name: str, options: Any, said: str) -> None:
    with pytest.raises(BadArgument, match=said):
        estimators.build(name, **options)


@pytest.mark.contract
def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(BadArgument, match='no estimator is called "rigde"; did you mean "ridge"'):
        estimators.build("rigde")
    with pytest.raises(BadArgument, match=r'option of ridge is called "alhpa".*there is: alpha'):
        estimators.build("ridge", alhpa=1.0)
    with pytest.raises(BadArgument, match="there is: nothing yet"):
        estimators.build("ols", alpha=1.0)
    for alpha in (0.0, -1.0):
        with pytest.raises(BadArgument, match=f"alpha={alpha}"):
            estimators.build("ridge", alpha=alpha)
    with pytest.raises(BadArgument, match="neighbours=0"):
        estimators.build("knn", neighbours=0)
