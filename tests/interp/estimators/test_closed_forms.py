"""Errors on shifted prompts whose mean is known: noise, half a subspace, orthogonal and repeated queries."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from interp import estimators, seeds

pytestmark = pytest.mark.statistics
D = 6


def prompts(n: int, n_pairs: int, seed: int, noise: float = 0.0) -> SimpleNamespace:
    generator = seeds.generator("evaluate", seed)
    x = torch.randn(n, n_pairs, D, generator=generator, dtype=torch.float64)
    w = torch.randn(n, D, generator=generator, dtype=torch.float64)
    xi = noise * torch.randn(n, n_pairs, generator=generator, dtype=torch.float64)
    return SimpleNamespace(x=x, w=w, y=torch.einsum("bki,bi->bk", x, w) + xi)


def relabelled(pairs: SimpleNamespace, x: Tensor) -> SimpleNamespace:
    return SimpleNamespace(x=x, w=pairs.w, y=torch.einsum("bki,bi->bk", x, pairs.w))


def error(name: str, pairs: SimpleNamespace, **options: float) -> Tensor:
    return (estimators.build(name, **options)(pairs) - pairs.y).square() / D


def expect(found: Tensor, expected: float) -> None:
    """The mean over prompts is within 4 standard errors of the closed form, and those are small."""
    deviation = float(found.std()) / len(found) ** 0.5
    assert abs(float(found.mean()) - expected) < 4 * deviation < 0.1 * max(expected, 0.2)


def test_ols_error_in_noise_on_both_sides_of_its_peak() -> None:
    """(1 - k/d) + (σ²/d)(1 + k/(d-k-1)) for k < d-1, (σ²/d)(1 + d/(k-d-1)) for k > d+1.

    Only where k is at least 4 away from d has the squared error a variance to speak of.
    """
    sigma = 0.8
    found = error("ols", prompts(40_000, 21, 10, sigma))
    for k in (1, 2):
        expect(found[:, k], (1 - k / D) + sigma**2 / D * (1 + k / (D - k - 1)))
    for k in (12, 16, 20):
        expect(found[:, k], sigma**2 / D * (1 + D / (k - D - 1)))


def test_ols_error_in_half_the_space_falls_twice_as_fast() -> None:
    """Inputs in d/2 random directions, their covariance's trace kept: 1 - k/(d/2), then nothing."""
    pairs = prompts(20_000, 7, 11)
    half = torch.linalg.qr(pairs.x[:, :D].mT).Q[..., : D // 2]
    fresh = prompts(20_000, 7, 12)
    inside = torch.einsum("bki,bij,blj->bkl", fresh.x, half, half) * 2**0.5
    found = error("ols", relabelled(fresh, inside))
    for k in range(1, D // 2):
        expect(found[:, k], 1 - k / (D / 2))
    torch.testing.assert_close(found[:, D // 2 :], torch.zeros(20_000, 4, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "options"), [("ols", {}), ("averaging", {}), ("ridge", {"alpha": 0.3}), ("bayes", {"noise": 0.5})]
)
def test_an_orthogonal_query_is_out_of_reach_of_the_span(name: str, options: dict[str, float]) -> None:
    """Every estimator in the span of the inputs predicts 0: the error is y², of mean d."""
    pairs = prompts(40_000, 4, 13)
    q = torch.linalg.qr(pairs.x[:, :3].mT).Q
    away = pairs.x[:, 3] - torch.einsum("bij,bkj,bk->bi", q, q, pairs.x[:, 3])
    away = away * pairs.x[:, 3].norm(dim=-1, keepdim=True) / away.norm(dim=-1, keepdim=True)
    turned = relabelled(pairs, torch.cat([pairs.x[:, :3], away[:, None]], dim=1))
    found = estimators.build(name, **options)(turned)
    assert float(found[:, 3].abs().max()) < 1e-9
    assert float(found[:, 2].abs().mean()) > 0.1
    expect(error(name, turned, **options)[:, 3], 1.0)


def test_a_repeated_query_is_known_to_ols() -> None:
    pairs = prompts(500, 5, 14)
    fresh = error("ols", pairs)[:, 4]
    pairs.x[:, 4] = pairs.x[:, 1]
    pairs.y[:, 4] = pairs.y[:, 1]
    torch.testing.assert_close(error("ols", pairs)[:, 4], torch.zeros(500, dtype=torch.float64), rtol=0, atol=1e-9)
    assert float(fresh.mean()) > 0.1
    assert float(error("averaging", pairs)[:, 4].mean()) > 0.1


def test_three_neighbours_at_three_examples() -> None:
    """The mean of three labels that have nothing to do with the query's: E y² (1 + 1/3)."""
    expect(error("knn", prompts(40_000, 4, 15))[:, 3], 4 / 3)
