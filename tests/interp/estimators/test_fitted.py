"""Lasso, trees and boosted trees: against scikit-learn prompt by prompt, and against conditions of the minimum."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.linear_model import Lasso, LassoLars
from sklearn.tree import DecisionTreeRegressor
from torch import Tensor

from hooks.errors import BadArgument
from interp import estimators, seeds
from interp.machine.refit import ExactLasso

SLOW: dict[str, dict[str, Any]] = {
    "lasso": {},
    "tree": {},
    "boosted_trees": {"trees": 3},
    "mlp": {"steps": 5},
}
"""The estimators that take ``ks``."""


def sparse(n: int = 3, n_pairs: int = 14, d: int = 6, noise: float = 0.3, seed: int = 0) -> SimpleNamespace:
    """Linear regression with two coordinates in use."""
    generator = seeds.generator("probe", seed)
    x = torch.randn(n, n_pairs, d, generator=generator, dtype=torch.float64)
    w = torch.randn(n, d, generator=generator, dtype=torch.float64)
    w[:, 2:] = 0
    y = torch.einsum("bki,bi->bk", x, w)
    return SimpleNamespace(x=x, y=y + noise * torch.randn(y.shape, generator=generator, dtype=torch.float64), w=w)


def by(regressor: Any, pairs: SimpleNamespace) -> Tensor:
    """scikit-learn's predictions, one call after the other."""
    found = torch.zeros(pairs.y.shape, dtype=torch.float64)
    for b, (x, y) in enumerate(zip(pairs.x.numpy(), pairs.y.numpy(), strict=True)):
        for k in range(1, len(y)):
            found[b, k] = float(regressor.fit(x[:k], y[:k]).predict(x[k : k + 1])[0])
    return found


@pytest.mark.parity
@pytest.mark.parametrize("alpha", [1.0, 0.1, 0.01])
def test_lasso_is_scikit_learns_coordinate_descent(alpha: float) -> None:
    pairs = sparse()
    expected = by(Lasso(alpha=alpha, fit_intercept=False, tol=1e-12, max_iter=1_000_000), pairs)
    torch.testing.assert_close(estimators.build("lasso", alpha=alpha)(pairs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.definition
@pytest.mark.parametrize("alpha", [0.1, 1e-4])
@pytest.mark.parametrize("k", [1, 3, 6, 13])
def test_lasso_is_the_minimum_of_its_objective(alpha: float, k: int) -> None:
    """No move of one coordinate, nor of all in a random direction, lowers it."""
    rng = np.random.default_rng(0)
    pairs = sparse(noise=0.0)

    def objective(w: np.ndarray) -> float:
        return float(((y - x @ w) ** 2).sum() / (2 * k) + alpha * np.abs(w).sum())

    for b in range(3):
        x, y = pairs.x[b, :k].numpy(), pairs.y[b, :k].numpy()
        w = ExactLasso(alpha).fit(x, y).w
        least = objective(w)
        moves = np.concatenate([np.eye(6), -np.eye(6), rng.normal(size=(200, 6))])
        assert min(objective(w + 1e-4 * move) for move in moves) > least - 1e-12
        assert objective(w + 0.1) > least + 1e-4 * alpha


@pytest.mark.planted
def test_a_path_that_took_a_wrong_turn_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = sparse()
    x, y = pairs.x[0].numpy(), pairs.y[0].numpy()
    regressor = ExactLasso(0.1).fit(x, y)
    right = regressor.w
    assert regressor.is_minimum(x, y)
    for wrong in (right * 1.01, np.where(np.arange(6) == 4, 0.05, right), np.zeros(6)):
        regressor.w = wrong
        assert not regressor.is_minimum(x, y)
    asked = LassoLars.fit

    def astray(self: Any, x: np.ndarray, y: np.ndarray) -> Any:
        asked(self, x, y).coef_ *= 1.5
        return self

    monkeypatch.setattr(LassoLars, "fit", astray)
    np.testing.assert_allclose(regressor.fit(x, y).w, right, rtol=1e-3, atol=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize("depth", [1, 4, None])
def test_tree_is_scikit_learns(depth: int | None) -> None:
    pairs = sparse()
    expected = by(DecisionTreeRegressor(max_depth=depth, random_state=0), pairs)
    torch.testing.assert_close(estimators.build("tree", depth=depth)(pairs), expected)


@pytest.mark.planted
def test_tree_finds_a_tree() -> None:
    """Labels that are one of four leaves: with many pairs depth 2 has them, and depth 1 cannot."""
    pairs = sparse(n=4, n_pairs=200, d=3)
    right = (pairs.x > 0).double()
    leaves = torch.where(right[..., 0] > 0, 3.0 + right[..., 1], 0.5 * right[..., 2])
    pairs = SimpleNamespace(x=pairs.x, y=leaves)
    two, one = (estimators.build("tree", depth=depth, ks=[199])(pairs)[:, 199] for depth in (2, 1))
    torch.testing.assert_close(two, leaves[:, 199])
    assert not torch.isclose(one, leaves[:, 199], atol=0.1).any()


@pytest.mark.parity
def test_boosted_trees_are_scikit_learns() -> None:
    pairs = sparse(n=2)
    expected = by(GradientBoostingRegressor(n_estimators=6, max_depth=2, learning_rate=0.3, random_state=0), pairs)
    found = estimators.build("boosted_trees", trees=6, depth=2, rate=0.3)(pairs)
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.parity
def test_boosted_trees_are_xgboosts_where_asked() -> None:
    xgboost = pytest.importorskip("xgboost", reason="the extra 'boosted' is not installed")
    pairs = sparse(n=2)
    expected = by(xgboost.XGBRegressor(n_estimators=6, max_depth=2, learning_rate=0.3), pairs)
    found = estimators.build("boosted_trees", trees=6, depth=2, rate=0.3, library="xgboost")(pairs)
    torch.testing.assert_close(found, expected)


@pytest.mark.contract
def test_xgboost_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xgboost", None)
    with pytest.raises(BadArgument, match=r'library="xgboost" is not installed; pip install "mambascope\[boosted\]"'):
        estimators.build("boosted_trees", library="xgboost")


@pytest.mark.contract
@pytest.mark.parametrize("name", SLOW)
def test_only_the_ks_that_were_asked_are_computed(name: str) -> None:
    pairs = sparse()
    whole = estimators.build(name, **SLOW[name])(pairs)
    found = estimators.build(name, ks=[9, 0, 4], **SLOW[name])(pairs)
    asked = torch.tensor([0, 4, 9])
    torch.testing.assert_close(found[:, asked], whole[:, asked])
    assert whole.isfinite().all() and int(found.isnan().sum()) == 3 * (14 - 3)
    assert estimators.build(name, ks=[0], **SLOW[name])(pairs)[:, 0].eq(0).all()
    for ks in ([14], [-1]):
        with pytest.raises(BadArgument, match=rf"ks={ks[0]} does not work; give a whole number, from 0 to 13"):
            estimators.build(name, ks=ks, **SLOW[name])(pairs)


@pytest.mark.law
@pytest.mark.parametrize("name", SLOW)
def test_a_prompt_does_not_depend_on_the_others(name: str) -> None:
    pairs = sparse()
    estimator = estimators.build(name, ks=[4, 9, 13], **SLOW[name])
    whole = estimator(pairs)
    y = pairs.y.clone()
    y[1:] = y[1:].flip(1)
    changed = estimator(SimpleNamespace(x=pairs.x, y=y))
    torch.testing.assert_close(changed[0], whole[0], equal_nan=True)
    assert not torch.isclose(changed[1:, 9], whole[1:, 9]).any()


@pytest.mark.law
@pytest.mark.parametrize("name", [pytest.param("tree", marks=pytest.mark.slow), "mlp"])
def test_any_number_of_workers_gives_the_same_numbers(name: str) -> None:
    """Processes for what scikit-learn fits, threads for networks; more than one piece of work for each."""
    pairs = sparse(n=130)
    one, two = (estimators.build(name, ks=[5, 13], workers=workers, **SLOW[name])(pairs) for workers in (1, 2))
    assert torch.equal(one[:, [5, 13]], two[:, [5, 13]]) and one[:, 13].all()


@pytest.mark.contract
def test_what_cannot_be_fitted_is_refused() -> None:
    for name, option in (
        ("lasso", {"alpha": 0.0}),
        ("lasso", {"workers": 0}),
        ("mlp", {"workers": 0}),
        ("tree", {"depth": 0}),
        ("boosted_trees", {"trees": 0}),
        ("boosted_trees", {"rate": -1.0}),
    ):
        (key, value), *_ = option.items()
        with pytest.raises(BadArgument, match=rf"{key}={value}"):
            estimators.build(name, **option)
    with pytest.raises(BadArgument, match='no value of library is called "catboost"'):
        estimators.build("boosted_trees", library="catboost")
