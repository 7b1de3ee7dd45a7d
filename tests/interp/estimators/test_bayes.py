"""Posterior means by brute force, and a network trained in context."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import norm

from hooks.errors import BadArgument
from interp import estimators, seeds, tasks
from interp.estimators import network


def noisy(
    n: int = 4, n_pairs: int = 9, d: int = 3, noise: float = 0.5, prior: float = 1.0, seed: int = 0
) -> SimpleNamespace:
    generator = seeds.generator("probe", seed)
    x = torch.randn(n, n_pairs, d, generator=generator, dtype=torch.float64)
    w = prior * torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = torch.einsum("bki,bi->bk", x, w)
    return SimpleNamespace(x=x, y=y + noise * torch.randn(y.shape, generator=generator, dtype=torch.float64), w=w)


@pytest.mark.definition
@pytest.mark.parametrize(("noise", "prior"), [(0.5, 1.0), (1.0, 2.0), (2.0, 0.3)])
def test_bayes_is_the_conditional_mean_of_the_joint_normal(noise: float, prior: float) -> None:
    """Labels have covariance prior² X Xᵀ + noise² I; E[y_k | y_0 … y_{k-1}] is read off it."""
    pairs = noisy()
    found = estimators.build("bayes", noise=noise, prior=prior)(pairs)
    for b, k in itertools.product(range(4), range(1, 9)):
        x, y = pairs.x[b, : k + 1], pairs.y[b, :k]
        covariance = prior**2 * x @ x.T + noise**2 * torch.eye(k + 1, dtype=x.dtype)
        expected = covariance[k, :k] @ torch.linalg.inv(covariance[:k, :k]) @ y
        torch.testing.assert_close(found[b, k], expected)


@pytest.mark.statistics
def test_bayes_error_is_the_posterior_variance() -> None:
    pairs = noisy(n=20_000, n_pairs=6, noise=0.7, prior=1.5)
    error = (estimators.build("bayes", noise=0.7, prior=1.5)(pairs) - pairs.y)[:, 5].square()
    x, query = pairs.x[:, :5], pairs.x[:, 5]
    precision = x.mT @ x / 0.7**2 + torch.eye(3, dtype=x.dtype) / 1.5**2
    variance = 0.7**2 + (query * torch.linalg.solve(precision, query)).sum(-1)
    gap = error - variance
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / len(gap) ** 0.5 < 0.1 * float(variance.mean())
    for other in (0.2, 3.0):
        wrong = (estimators.build("bayes", noise=other, prior=1.5)(pairs) - pairs.y)[:, 5].square()
        assert float((wrong - error).mean()) > 4 * float((wrong - error).std()) / len(gap) ** 0.5


@pytest.mark.definition
def test_bayes_without_noise_is_least_squares_of_minimum_norm() -> None:
    pairs = noisy()
    limit = estimators.build("bayes", noise=0.0)(pairs)
    torch.testing.assert_close(limit, estimators.build("ols")(pairs))
    torch.testing.assert_close(estimators.build("bayes", noise=1e-4)(pairs), limit, rtol=1e-4, atol=1e-4)
    assert not torch.isclose(estimators.build("bayes", noise=0.5)(pairs)[:, 1:], limit[:, 1:]).any()


@pytest.mark.definition
@pytest.mark.parametrize("noise", [0.3, 2.0])
def test_dmmse_enumerates_the_pool(noise: float) -> None:
    """Each task's weight is the product of the densities of the labels seen."""
    pairs = noisy()
    pool = torch.randn(5, 3, generator=seeds.generator("pool", 0), dtype=torch.float64)
    found = estimators.build("dmmse", pool=pool, noise=noise)(pairs)
    for b, k in itertools.product(range(4), range(9)):
        total, mean = 0.0, 0.0
        for w in pool:
            weight = math.prod(
                math.exp(-(float(pairs.y[b, i] - w @ pairs.x[b, i]) ** 2) / (2 * noise**2)) for i in range(k)
            )
            total, mean = total + weight, mean + weight * float(w @ pairs.x[b, k])
        assert float(found[b, k]) == pytest.approx(mean / total, rel=1e-9)


@pytest.mark.planted
def test_dmmse_finds_the_task_that_is_in_the_pool_and_only_there() -> None:
    pool = torch.randn(64, 3, generator=seeds.generator("pool", 1), dtype=torch.float64)
    pairs = noisy(n=64)
    labels = torch.einsum("bki,bi->bk", pairs.x, pool)
    estimator = estimators.build("dmmse", pool=pool, noise=0.05)
    found = estimator(SimpleNamespace(x=pairs.x, y=labels))
    torch.testing.assert_close(found[:, 8], labels[:, 8], rtol=1e-3, atol=1e-3)
    outside = estimator(pairs)
    assert float((outside - pairs.y)[:, 8].square().mean()) > 0.3


@pytest.mark.law
def test_dmmse_of_a_dense_pool_is_ridge() -> None:
    """2000 quantiles of N(0, 1) as the pool of one coordinate; pools of this size are taken in parts."""
    pairs = noisy(n=100, d=1)
    pool = torch.from_numpy(norm.ppf((torch.arange(2000).double() + 0.5).numpy() / 2000))[:, None]
    found = estimators.build("dmmse", pool=pool, noise=0.5)(pairs)
    torch.testing.assert_close(found, estimators.build("ridge", alpha=0.25)(pairs), rtol=0, atol=5e-3)
    assert not torch.allclose(found, estimators.build("ols")(pairs), rtol=0, atol=0.1)


@pytest.mark.definition
def test_mlp_is_the_network_that_torch_trains_alone() -> None:
    pairs = noisy(n=2)
    found = estimators.build("mlp", hidden=7, steps=30, seed=3)(pairs)
    start = network._draw(2, 3, 7, 3)
    for b, k in itertools.product(range(2), (1, 4, 8)):
        w, bias, v, c = (part[b] for part in start)
        alone = torch.nn.Sequential(torch.nn.Linear(3, 7), torch.nn.ReLU(), torch.nn.Linear(7, 1)).double()
        alone.load_state_dict({"0.weight": w, "0.bias": bias, "2.weight": v[None], "2.bias": c})
        optimizer = torch.optim.Adam(alone.parameters(), lr=5e-3)
        for _ in range(30):
            optimizer.zero_grad()
            (alone(pairs.x[b, :k])[:, 0] - pairs.y[b, :k]).square().mean().backward()
            optimizer.step()
        torch.testing.assert_close(found[b, k], alone(pairs.x[b, k])[0].detach())
    rounded = SimpleNamespace(x=pairs.x.float(), y=pairs.y.float())
    with torch.inference_mode():
        off = estimators.build("mlp", hidden=7, steps=30, seed=3)(rounded)
    torch.testing.assert_close(off, found.float(), rtol=1e-4, atol=1e-4)
    assert not torch.isclose(estimators.build("mlp", hidden=7, steps=30, seed=4)(pairs)[:, 1:], found[:, 1:]).any()


@pytest.mark.slow
@pytest.mark.statistics
def test_mlp_has_the_error_of_the_released_code_and_not_of_the_released_curve() -> None:
    """ReLU networks of d = 20 after 100 pairs: 0.165 to 0.182 in three runs of that code (arXiv 2402.03170), 0.109 in
    the curve that came with the models of arXiv 2208.01066.
    """
    task = tasks.build("relu_net", d=20, n_pairs=101, hidden=100)
    batch = task.sample(400, seeds.generator("probe", 0))
    error = task.error(estimators.build("mlp", ks=[100])(batch), batch)[:, 100].double()
    spread = float(error.std()) / len(error) ** 0.5
    assert 0.165 - 4 * spread < float(error.mean()) < 0.182 + 4 * spread
    assert float(error.mean()) - 0.109 > 3 * spread


@pytest.mark.planted
def test_mlp_learns_a_function_that_no_line_is() -> None:
    generator = seeds.generator("probe", 5)
    x = torch.randn(20, 101, 2, generator=generator, dtype=torch.float64)
    pairs = SimpleNamespace(x=x, y=x[..., 0].abs() - x[..., 1].abs())
    spread = float(pairs.y.var())
    trained = estimators.build("mlp", rate=2e-2, ks=[100])(pairs)
    assert float((trained - pairs.y)[:, 100].square().mean()) < 0.1 * spread
    assert float((estimators.build("ols")(pairs) - pairs.y)[:, 100].square().mean()) > 0.5 * spread


@pytest.mark.contract
def test_what_is_no_prior_is_refused() -> None:
    for option, message in (
        ({"noise": -1.0}, r"noise=-1\.0"),
        ({"noise": 1.0, "prior": 0.0}, r"prior=0\.0"),
    ):
        with pytest.raises(BadArgument, match=message):
            estimators.build("bayes", **option)
    with pytest.raises(BadArgument, match=r"noise=0\.0"):
        estimators.build("dmmse", pool=[[1.0]], noise=0.0)
    for pool in (torch.ones(2), torch.zeros(0, 3), [[float("nan")]]):
        with pytest.raises(BadArgument, match=r"a pool of shape .* does not work"):
            estimators.build("dmmse", pool=pool, noise=1.0)
    with pytest.raises(BadArgument, match=r"tasks of d=2 and x has d=3"):
        estimators.build("dmmse", pool=[[1.0, 2.0]], noise=1.0)(noisy())
    for option, message in (({"hidden": 0}, "hidden=0"), ({"rate": 0.0}, r"rate=0\.0"), ({"steps": 0}, "steps=0")):
        with pytest.raises(BadArgument, match=message):
            estimators.build("mlp", **option)
