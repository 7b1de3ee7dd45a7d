"""Single-index functions: what a label depends on, the link against scipy, the noise, the subspace."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import eval_hermitenorm, expit
from torch import Tensor

from interp import seeds, tasks
from interp.tasks import Batch
from interp.tasks.regression import Regression
from interp.tasks.single_index import LINKS, SingleIndex

BY_SCIPY = {
    "identity": lambda z: z,
    "relu": lambda z: np.maximum(z, 0.0),
    "tanh": np.tanh,
    "sigmoid": expit,
    **{f"he{k}": lambda z, k=k: eval_hermitenorm(k, z) / math.sqrt(math.factorial(k)) for k in (2, 3, 4, 5)},
}
EVERY_LINK = pytest.mark.parametrize("link", list(LINKS))


def sample(n: int = 4, seed: int = 0, n_pairs: int | None = None, **config: Any) -> tuple[Regression, Batch]:
    task = tasks.build("single_index", **config)
    assert isinstance(task, Regression)
    return task, task.sample(n, seeds.generator("evaluate", seed), n_pairs=n_pairs)


def functions(link: Any) -> SingleIndex:
    task, _ = sample(link=link)
    assert isinstance(task.functions, SingleIndex)
    return task.functions


def index(batch: Batch) -> Tensor:
    return torch.einsum("bki,bi->bk", batch.x.double(), batch.truth["beta"].double())


@pytest.mark.definition
@EVERY_LINK
def test_labels_are_the_link_of_the_index(link: str) -> None:
    _, batch = sample(link=link, tau=0.0)
    expected = BY_SCIPY[link](index(batch).numpy())
    np.testing.assert_allclose(batch.y.numpy(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.definition
@EVERY_LINK
def test_scale_is_the_integral_of_the_squared_link(link: str) -> None:
    def integrand(z: float) -> float:
        return float(BY_SCIPY[link](z)) ** 2 * math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)

    expected = quad(integrand, -12, 0)[0] + quad(integrand, 0, 12)[0]
    task, _ = sample(link=link, tau=0.3, noisy_targets=True)
    assert functions(link).scale == pytest.approx(expected, rel=1e-6)
    assert task.scale == pytest.approx(expected + 0.09, rel=1e-6)


@pytest.mark.definition
def test_coefficients_are_of_normalised_hermite_polynomials() -> None:
    coefficients = [0.5, 0.0, -1.0, 0.25, 0.0, 0.0, 2.0]
    found = functions(coefficients)
    z = torch.linspace(-3, 3, 41, dtype=torch.float64)
    terms = (c * eval_hermitenorm(k, z.numpy()) / math.sqrt(math.factorial(k)) for k, c in enumerate(coefficients))
    torch.testing.assert_close(found.g(z), torch.from_numpy(sum(terms)))
    assert found.scale == pytest.approx(sum(c**2 for c in coefficients))
    assert functions([0.0] * 12 + [1.0]).scale == pytest.approx(1.0)


@pytest.mark.law
def test_a_label_depends_on_x_through_beta_alone() -> None:
    task, batch = sample(d=8, r=3, tau=0.0, link=[0.0, 1.0, 0.5, 0.25])
    beta = batch.truth["beta"]
    move = torch.randn(batch.x.shape, generator=seeds.generator("probe", 0))
    along = torch.einsum("bki,bi->bk", move, beta)[..., None] * beta[:, None]
    stays, _ = task.labels(batch.x + 3 * (move - along), batch.truth)
    moves, _ = task.labels(batch.x + along, batch.truth)
    torch.testing.assert_close(stays, batch.y, rtol=1e-3, atol=1e-4)
    assert (moves - batch.y).abs().median() > 0.1


@pytest.mark.statistics
@pytest.mark.parametrize("subspace_seed", [None, 3])
def test_beta_is_uniform_on_the_sphere_of_one_subspace(subspace_seed: int | None) -> None:
    n, d, r = 20_000, 6, 3
    _, batch = sample(n=n, d=d, r=r, n_pairs=1, subspace_seed=subspace_seed)
    beta, rows = batch.truth["beta"].double(), batch.truth["subspace"][0].double()
    torch.testing.assert_close(rows @ rows.T, torch.eye(r, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(beta.norm(dim=1), torch.ones(n, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(batch.truth["coordinates"].double() @ rows, beta, rtol=0, atol=1e-6)
    # E[c c'] = I/r; var(c_i²) = 2 (r - 1) / (r² (r + 2)), var(c_i c_j) = 1 / (r (r + 2)).
    second = torch.einsum("bi,bj->ij", batch.truth["coordinates"].double(), batch.truth["coordinates"].double()) / n
    spread = torch.full((r, r), 1 / (r * (r + 2)), dtype=torch.float64)
    spread.fill_diagonal_(2 * (r - 1) / (r**2 * (r + 2)))
    assert ((second - torch.eye(r) / r).abs() < 4 * (spread / n).sqrt()).all()
    assert (beta.mean(0).abs() < 4 * (1 / r / n) ** 0.5).all()


@pytest.mark.definition
def test_the_subspace_is_the_tasks_and_not_the_prompts() -> None:
    first, again, other = (sample(d=6, r=3, subspace_seed=seed)[1].truth["subspace"] for seed in (0, 0, 1))
    fresh = sample(d=6, r=3, seed=5)[1].truth["subspace"]
    assert torch.equal(first, again) and torch.equal(first, fresh) and (first == first[:1]).all()
    assert not torch.allclose(first, other)
    axes = sample(d=6, r=3, subspace_seed=None)[1].truth["subspace"]
    assert torch.equal(axes[0], torch.eye(6)[:3])


@pytest.mark.statistics
def test_noise_is_on_the_label_and_on_the_target_if_asked() -> None:
    tau = 0.25
    _, batch = sample(n=500, tau=tau)
    noise = batch.y - batch.targets
    torch.testing.assert_close(noise.abs(), torch.full_like(noise, tau), rtol=1e-3, atol=1e-4)
    assert abs(float(noise.sign().mean())) < 4 / noise.numel() ** 0.5
    torch.testing.assert_close(batch.tokens[:, :-1, -1], batch.y[:, :-1])
    _, noisy = sample(n=500, tau=tau, noisy_targets=True)
    assert torch.equal(noisy.targets, noisy.y) and torch.equal(noisy.y, batch.y)
    _, gaussian = sample(n=500, tau=tau, noise_form="gaussian")
    spread = (gaussian.y - gaussian.targets).double()
    assert abs(float(spread.square().mean()) / tau**2 - 1) < 4 * (2 / spread.numel()) ** 0.5
    assert torch.equal(gaussian.targets, batch.targets)


@pytest.mark.law
@pytest.mark.parametrize("tokens", ["interleaved", "joint"])
def test_the_noise_of_the_query_is_in_no_token(tokens: str) -> None:
    task, batch = sample(tokens=tokens, n_pairs=5, noisy_targets=True)
    for k in (3, 4):
        noise = batch.truth["noise"].clone()
        noise[:, k] *= -1
        y, targets = task.labels(batch.x, {**batch.truth, "noise": noise})
        turned = task.layout.batch(batch.x, y, targets, batch.truth)
        assert not torch.equal(turned.targets, batch.targets)
        assert torch.equal(turned.tokens, batch.tokens) == (k == 4)


@pytest.mark.law
def test_corrupt_draws_another_direction_and_keeps_inputs_and_noise() -> None:
    task, batch = sample(d=6, r=2, tau=0.5)
    corrupted = task.corrupt(batch, seeds.generator("corrupt", 0))
    assert torch.equal(corrupted.x, batch.x)
    assert torch.equal(corrupted.truth["noise"], batch.truth["noise"])
    assert not torch.isclose(corrupted.truth["beta"], batch.truth["beta"]).all(dim=1).any()
    expected = BY_SCIPY["he3"](index(corrupted).numpy())
    np.testing.assert_allclose(corrupted.targets.numpy(), expected, rtol=1e-3, atol=1e-4)
    rows = batch.truth["subspace"][0]
    inside = corrupted.truth["beta"] @ rows.T @ rows
    torch.testing.assert_close(inside, corrupted.truth["beta"])


@pytest.mark.planted
def test_a_neighbour_that_is_told_more_is_nearer() -> None:
    task, batch = sample(n=400, d=12, r=3, link="he2")
    error = {name: float(loss[:, -1].mean()) / task.scale for name, loss in task.baselines(batch).items()}
    assert error["knn_on_index"] < 0.6 * error["knn_in_subspace"] and error["knn_in_subspace"] < 0.6 * error["knn"]


@pytest.mark.definition
def test_variables_are_the_direction_its_coordinates_and_the_index() -> None:
    task, batch = sample(d=6, r=2)
    found = task.variables(batch)
    torch.testing.assert_close(found["index"].double(), index(batch), rtol=1e-4, atol=1e-5)
    assert torch.equal(found["beta"], batch.truth["beta"]) and found["coordinates"].shape == (4, 2)
    assert torch.equal(found["y"], batch.y) and not torch.equal(found["y"], batch.targets)
