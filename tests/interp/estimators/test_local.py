"""Nearest neighbours and kernel ridge, against scikit-learn prompt by prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge
from sklearn.neighbors import KNeighborsRegressor
from torch import Tensor

from hooks.errors import BadArgument
from interp import estimators, seeds, tasks


@dataclass(frozen=True)
class Pairs:
    """Inputs and labels without a task, and what a rival may be told."""

    x: Tensor
    y: Tensor
    truth: Mapping[str, Tensor] = field(default_factory=dict)


def single_index(n: int = 3, n_pairs: int = 13, d: int = 5, r: int = 2, seed: int = 0) -> Pairs:
    """y = u² - 1 of one direction of a subspace that ``truth`` holds, β in it."""
    generator = seeds.generator("probe", seed)
    x = torch.randn(n, n_pairs, d, generator=generator, dtype=torch.float64)
    subspace = torch.linalg.qr(torch.randn(n, d, r, generator=generator, dtype=torch.float64)).Q
    beta, other = subspace[..., 0], torch.linalg.qr(torch.cat([subspace, subspace.new_ones(n, d, 1)], -1)).Q[..., r:]
    truth = {"subspace": subspace.mT, "beta": beta, "other": other.mT}
    return Pairs(x, torch.einsum("bki,bi->bk", x, beta) ** 2 - 1, truth)


def each(pairs: Pairs) -> list[tuple[int, int]]:
    return [(b, k) for b in range(len(pairs.y)) for k in range(1, pairs.y.shape[1])]


@pytest.mark.parity
@pytest.mark.parametrize("neighbours", [1, 3, 5])
def test_knn_by_distance_is_scikit_learns(neighbours: int) -> None:
    """Where the query is an earlier input, one or two of them, their labels alone count."""
    pairs = single_index()
    pairs.x[:, 11] = pairs.x[:, 2]
    pairs.x[:, 12] = pairs.x[:, 2]
    found = estimators.build("knn", neighbours=neighbours, weights="distance")(pairs)
    for b, k in each(pairs):
        if k == 12 and neighbours == 1:
            continue  # either of two labels at distance 0
        x, y = pairs.x[b].numpy(), pairs.y[b].numpy()
        fitted = KNeighborsRegressor(min(neighbours, k), weights="distance").fit(x[:k], y[:k])
        assert float(found[b, k]) == pytest.approx(float(fitted.predict(x[k : k + 1])[0]))
    torch.testing.assert_close(found[:, 11], pairs.y[:, 2])
    if neighbours > 1:
        torch.testing.assert_close(found[:, 12], (pairs.y[:, 2] + pairs.y[:, 11]) / 2)
        uniform = estimators.build("knn", neighbours=neighbours)(pairs)
        assert not torch.isclose(uniform[:, 2:], found[:, 2:]).all(dim=0).any()


@pytest.mark.parity
@pytest.mark.parametrize("alpha", [1e-6, 0.1, 10.0])
@pytest.mark.parametrize("kernel", ["rbf", "polynomial"])
@pytest.mark.parametrize("bandwidth", [None, 1.7])
def test_kernel_ridge_is_scikit_learns(kernel: str, alpha: float, bandwidth: float | None) -> None:
    pairs = single_index()
    found = estimators.build("kernel_ridge", kernel=kernel, alpha=alpha, bandwidth=bandwidth, degree=2)(pairs)
    square = 5.0 if bandwidth is None else bandwidth**2
    gamma = 1 / (2 * square) if kernel == "rbf" else 1 / square
    rival = KernelRidge(alpha=alpha, kernel=kernel, gamma=gamma, degree=2, coef0=1)
    for b, k in each(pairs):
        x, y = pairs.x[b].numpy(), pairs.y[b].numpy()
        expected = float(rival.fit(x[:k], y[:k]).predict(x[k : k + 1])[0])
        assert float(found[b, k]) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("project", ["subspace", "beta"])
def test_kernel_ridge_of_projected_inputs_is_scikit_learns(project: str) -> None:
    pairs = single_index()
    found = estimators.build("kernel_ridge", alpha=0.01, project=project)(pairs)
    for b, k in each(pairs):
        basis = pairs.truth[project][b].reshape(-1, 5).T.numpy()
        x, y = pairs.x[b].numpy() @ basis, pairs.y[b].numpy()
        rival = KernelRidge(alpha=0.01, kernel="rbf", gamma=1 / (2 * basis.shape[1])).fit(x[:k], y[:k])
        assert float(found[b, k]) == pytest.approx(float(rival.predict(x[k : k + 1])[0]), rel=1e-8, abs=1e-10)


@pytest.mark.planted
def test_the_right_coordinates_help_and_others_do_not() -> None:
    pairs = single_index(n=200, n_pairs=41, d=10, r=1, seed=1)
    error = {
        project: float(
            (estimators.build("kernel_ridge", alpha=0.01, project=project)(pairs) - pairs.y)[:, -1].square().mean()
        )
        for project in (None, "subspace", "other")
    }
    assert error["subspace"] < 0.2 * error[None]  # type: ignore[operator]
    assert error["other"] > error[None]  # type: ignore[operator]


@pytest.mark.contract
@pytest.mark.parametrize("project", ["subspace", "beta"])
def test_the_single_index_task_holds_the_coordinates(project: str) -> None:
    """Its label is a function of them, so a rival that is told them is ahead."""
    task = tasks.build("single_index")
    batch = task.sample(400, seeds.generator("probe", 2))
    told, untold = (
        float((estimators.build("kernel_ridge", alpha=0.1, project=p)(batch) - batch.y)[:, -1].square().mean())
        for p in (project, None)
    )
    assert told < untold


@pytest.mark.definition
def test_kernel_ridge_with_little_penalty_passes_through_the_pairs() -> None:
    """A query that is an earlier input has that input's label as its prediction."""
    pairs = single_index()
    pairs.x[:, -1] = pairs.x[:, 4]
    found = estimators.build("kernel_ridge", alpha=1e-9)(pairs)
    torch.testing.assert_close(found[:, -1], pairs.y[:, 4], rtol=1e-5, atol=1e-5)
    penalised = estimators.build("kernel_ridge", alpha=1.0)(pairs)
    assert not np.allclose(penalised[:, -1], pairs.y[:, 4], rtol=0.05, atol=0.05)


@pytest.mark.contract
def test_what_cannot_be_computed_is_refused() -> None:
    pairs = single_index()
    with pytest.raises(BadArgument, match=r'no truth of this batch is called "subspaec"; did you mean "subspace"'):
        estimators.build("kernel_ridge", project="subspaec")(pairs)
    wrong = Pairs(pairs.x, pairs.y, {"beta": pairs.truth["beta"][:, :3]})
    with pytest.raises(BadArgument, match=r'truth "beta" is \(3, 3\); a subspace is \(3, r, 5\) or \(3, 5\) here'):
        estimators.build("kernel_ridge", project="beta")(wrong)
    pairs.x[:, 3] = pairs.x[:, 2]
    with pytest.raises(BadArgument, match=r"alpha=1e-20 does not work: K \+ alpha I is singular"):
        estimators.build("kernel_ridge", alpha=1e-20)(pairs)
    with pytest.raises(BadArgument, match='no value of weights is called "unifrom"'):
        estimators.build("knn", weights="unifrom")
    with pytest.raises(BadArgument, match='no value of kernel is called "linear"'):
        estimators.build("kernel_ridge", kernel="linear")
    for option in ("alpha", "bandwidth"):
        with pytest.raises(BadArgument, match=rf"{option}=0\.0"):
            estimators.build("kernel_ridge", **{option: 0.0})
