"""Similarity of representations and their ranks: closed forms, invariances, calibrated nulls, planted subspaces."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from torch import Tensor

from hooks.errors import BadArgument, NonFinite
from interp import similarity
from interp.similarity import (
    cka,
    compare,
    coordinates,
    effective_rank,
    leading,
    participation_ratio,
    procrustes,
    svcca,
)

MEASURES = {"cka": cka, "svcca": svcca, "procrustes": procrustes}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(width: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(width, width, seed=seed))[0]


def hsic(x: Tensor, y: Tensor) -> float:
    """The unbiased estimator in the form of Song et al. 2012, eq. 5."""
    n = len(x)
    k, m = x @ x.T, y @ y.T
    k.fill_diagonal_(0)
    m.fill_diagonal_(0)
    one = torch.ones(n, dtype=x.dtype)
    total = torch.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return float((total - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3)))


@pytest.mark.definition
def test_debiased_cka_is_the_ratio_of_unbiased_hsic() -> None:
    x, y = normal(12, 5) + 3.0, normal(12, 7, seed=1)
    y[:, :3] += x[:, :3]
    expected = hsic(x, y) / math.sqrt(hsic(x, x) * hsic(y, y))
    assert cka(x, y) == pytest.approx(expected, rel=1e-10)


@pytest.mark.definition
def test_svcca_and_procrustes_equal_independent_implementations() -> None:
    x, y = normal(40, 4), normal(40, 6, seed=1)
    y[:, :2] += x[:, :2]
    a, b = (v - v.mean(0) for v in (x, y))
    angles = scipy.linalg.subspace_angles(a.numpy(), b.numpy())
    assert svcca(x, y, share=1.0) == pytest.approx(float(np.cos(angles).mean()), rel=1e-9)
    # scipy's Procrustes takes equal widths and gives 1 − ‖x̂ᵀŷ‖_*², after its own scaling of y.
    wide = torch.nn.functional.pad(a, (0, 2))
    _, _, disparity = scipy.spatial.procrustes(wide.numpy(), b.numpy())
    assert procrustes(x, y) == pytest.approx(math.sqrt(2 - 2 * math.sqrt(1 - disparity)), rel=1e-9)


@pytest.mark.law
@pytest.mark.parametrize("name", MEASURES)
def test_rotation_scale_and_shift_change_nothing(name: str) -> None:
    x, y = normal(30, 6), normal(30, 8, seed=1)
    y[:, :4] += 2 * x[:, :4]
    measure = MEASURES[name]
    same = measure(3.7 * x @ rotation(6, 2) + 5, -0.2 * y @ rotation(8, 3) - 1)
    assert same == pytest.approx(measure(x, y), rel=1e-8)
    assert measure(y, x) == pytest.approx(measure(x, y), rel=1e-8)
    stretched = x * torch.linspace(0.1, 10, 6)
    if name != "svcca":
        assert abs(measure(stretched, y) - measure(x, y)) > 1e-3


@pytest.mark.law
def test_identical_representations_are_as_alike_as_can_be() -> None:
    x = normal(30, 9)
    assert cka(x, x) == pytest.approx(1) and cka(x, x, debiased=False) == pytest.approx(1)
    assert svcca(x, x @ rotation(9)) == pytest.approx(1)
    assert procrustes(x, x @ rotation(9)) == pytest.approx(0, abs=1e-6)


@pytest.mark.statistics
def test_unrelated_representations_are_at_zero_only_when_debiased() -> None:
    """Wide independent Gaussians: plain CKA is about width / (width + n), the debiased one 0."""
    n, width, draws = 40, 200, 30
    pairs = [(normal(n, width, seed=2 * i), normal(n, width, seed=2 * i + 1)) for i in range(draws)]
    debiased = np.array([cka(x, y) for x, y in pairs])
    plain = np.array([cka(x, y, debiased=False) for x, y in pairs])
    assert abs(debiased.mean()) < 3 * debiased.std() / math.sqrt(draws)
    assert plain.min() > 0.7


@pytest.mark.statistics
@pytest.mark.parametrize(
    "name", [name if name == "cka" else pytest.param(name, marks=pytest.mark.slow) for name in MEASURES]
)
def test_p_values_are_uniform_under_independence(name: str) -> None:
    """Kolmogorov–Smirnov against the uniform law; and the family-wise p-value rejects no more often than it says."""
    p, family = [], []
    for i in range(60):
        found = compare(
            [normal(16, 5, seed=3 * i), normal(16, 3, seed=3 * i + 1)],
            [normal(16, 4, seed=3 * i + 2)],
            name,
            components=3,
            n_perm=79,
            seed=i,
        )
        p.append(found.p[0, 0])
        family.append(found.p_family.min())
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.01
    assert scipy.stats.binomtest(int(np.sum(np.array(family) <= 0.1)), 60, 0.1, "greater").pvalue > 0.01


@pytest.mark.planted
@pytest.mark.parametrize("name", MEASURES)
def test_a_shared_subspace_is_found_and_the_decoy_is_not(name: str) -> None:
    """Layer 1 of the right side holds two directions of the left's; layer 0, the decoy, has the same spectrum and
    the same numbers, but each row belongs to another prompt.
    """
    n = 60
    shared, left_rest, right_rest = normal(n, 2), normal(n, 10, seed=1), normal(n, 14, seed=2)
    left = torch.cat([2 * shared, left_rest], 1) @ rotation(12)
    right = torch.cat([2 * shared, right_rest], 1) @ rotation(16)
    decoy = right[torch.randperm(n, generator=torch.Generator().manual_seed(5))]
    torch.testing.assert_close(torch.linalg.svdvals(decoy), torch.linalg.svdvals(right))
    found = compare([left], [decoy, right], name, components=4, n_perm=199)
    assert found.p[0, 1] == pytest.approx(1 / 200) and found.p_family[0, 1] == pytest.approx(1 / 200)
    assert found.p[0, 0] > 0.05
    beyond = found.value < found.null_edge if name == "procrustes" else found.value > found.null_edge
    assert beyond.tolist() == [[False, True]]
    assert found.n == n and found.n_perm == 199


@pytest.mark.definition
@pytest.mark.parametrize("name", MEASURES)
def test_compare_gives_the_single_measures_and_the_null_of_permuted_rows(name: str) -> None:
    xs, ys = [normal(20, 5), normal(20, 3, seed=1)], [normal(20, 6, seed=2)]
    options = {} if name == "cka" else {"components": 2}
    found = compare(xs, ys, name, components=2, n_perm=7, seed=3)
    generator = torch.Generator().manual_seed(3)
    orders = [torch.randperm(20, generator=generator) for _ in range(7)]
    for i, x in enumerate(xs):
        measure = MEASURES[name]
        assert found.value[i, 0] == pytest.approx(measure(x, ys[0], **options), rel=1e-9)
        chance = [measure(x, ys[0][order], **options) for order in orders]
        assert found.null_mean[i, 0] == pytest.approx(np.mean(chance), rel=1e-8, abs=1e-12)
        alike = np.sum([c <= found.value[i, 0] if name == "procrustes" else c >= found.value[i, 0] for c in chance])
        assert found.p[i, 0] == pytest.approx((1 + alike) / 8)
    sign = -1 if name == "procrustes" else 1
    best = [max(sign * MEASURES[name](x, ys[0][order], **options) for x in xs) for order in orders]
    assert found.edge == pytest.approx(sign * np.quantile(best, 0.95), rel=1e-8)


@pytest.mark.law
@pytest.mark.parametrize("name", ["svcca", "procrustes"])
def test_the_leading_components_are_all_that_a_measure_of_so_many_sees(name: str) -> None:
    x, y = normal(20, 7) * torch.linspace(1, 3, 7), normal(20, 9, seed=1)
    y[:, :5] += x[:, :5]
    whole, few = (compare([a], [b], name, components=3, n_perm=5) for a, b in ((x, y), (leading(x, 3), leading(y, 3))))
    assert leading(x, 3).shape == (20, 3)
    for part in ("value", "null_mean", "null_edge"):
        np.testing.assert_allclose(getattr(few, part), getattr(whole, part), rtol=1e-9)
    less = compare([leading(x, 2)], [leading(y, 2)], name, components=3, n_perm=5)
    assert abs(less.value - whole.value).item() > 1e-3


@pytest.mark.planted
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_ranks_of_planted_low_rank_matrices(rank: int) -> None:
    """k equal singular values give exactly k in both; one dominant among them brings both down."""
    left, right = rotation(12)[:, :rank], rotation(9, 1)[:, :rank]
    flat = 5.0 * left @ right.T
    assert float(effective_rank(flat)) == pytest.approx(rank, rel=1e-9)
    assert float(participation_ratio(flat)) == pytest.approx(rank, rel=1e-9)
    if rank > 1:
        steep = left @ torch.diag(torch.tensor([10.0] + [1.0] * (rank - 1), dtype=torch.float64)) @ right.T
        assert 1 < float(participation_ratio(steep)) < float(effective_rank(steep)) < rank


@pytest.mark.definition
def test_effective_rank_by_hand_and_in_batches() -> None:
    """σ = (3, 1): p = (¾, ¼), exp(−¾ ln ¾ − ¼ ln ¼); (9 + 1)² / (81 + 1)."""
    matrix = torch.diag(torch.tensor([3.0, 1.0]))
    many = torch.stack([matrix, torch.zeros(2, 2), torch.eye(2)])
    expected = [math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)), 0.0, 2.0]
    np.testing.assert_allclose(effective_rank(many).numpy(), expected)
    np.testing.assert_allclose(participation_ratio(many).numpy(), [100 / 82, 0.0, 2.0])


@pytest.mark.law
def test_coordinates_keep_every_inner_product() -> None:
    wide = normal(9, 50)
    few = coordinates(wide)
    assert few.shape == (9, 9)
    torch.testing.assert_close(few @ few.T, wide @ wide.T)
    assert cka(few, normal(9, 4, seed=1)) == pytest.approx(cka(wide, normal(9, 4, seed=1)))


@pytest.mark.contract
def test_what_cannot_be_compared_is_refused_in_one_line() -> None:
    x = normal(8, 3)
    for call, message in (
        (lambda: cka(x, normal(9, 3)), "8 and 9"),
        (lambda: cka(x[:3], x[:3]), "at least 4"),
        (lambda: svcca(x, torch.ones(8, 2)), "no variance"),
        (lambda: compare([x], [normal(9, 3)]), "rows"),
        (lambda: compare([x], [x], "ckaa"), 'did you mean "cka"'),
        (lambda: compare([x], [x], n_perm=0), "n_perm"),
        (lambda: procrustes(x, x, components=0), "components"),
    ):
        with pytest.raises(BadArgument, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    for broken in (lambda: effective_rank(torch.full((2, 2), math.nan)), lambda: cka(x, x * math.inf)):
        with pytest.raises(NonFinite):
            broken()


@pytest.mark.contract
def test_every_measure_has_its_function() -> None:
    assert set(similarity.MEASURES) == set(MEASURES)
