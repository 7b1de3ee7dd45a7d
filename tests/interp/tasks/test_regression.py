"""The classes of functions against plain loops, closed forms of their errors, and what the public code gets wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from interp import estimators, seeds, tasks
from interp.tasks import Batch
from interp.tasks.regression import Regression
from tests.interp.queries import OtherQueries

TASKS: list[tuple[str, dict[str, Any]]] = [
    ("linreg", {}),
    ("linreg", {"covariance": "half_subspace", "d": 6}),
    ("linreg", {"noise": 1.0, "noisy_targets": True}),
    ("linreg", {"noise": 2.0, "renormalise": True, "noisy_targets": True}),
    ("linreg", {"noise": 2.0, "renormalise": True}),
    ("sparse_linreg", {"d": 6, "covariance": "skewed"}),
    ("polynomial", {"degree": 2}),
    ("polynomial", {"degree": 3}),
    ("relu_net", {"hidden": 30, "covariance": "skewed"}),
    ("decision_tree", {}),
    ("single_index", {"link": "relu", "tau": 0.5, "noisy_targets": True}),
]
EVERY = pytest.mark.parametrize(("name", "config"), TASKS)
LAYOUTS = pytest.mark.parametrize("tokens", ["interleaved", "joint"])


def regression(name: str, **config: Any) -> Regression:
    task = tasks.build(name, **config)
    assert isinstance(task, Regression)
    return task


def sample(name: str, n: int = 4, seed: int = 0, n_pairs: int | None = None, **config: Any) -> tuple[Regression, Batch]:
    task = regression(name, **config)
    return task, task.sample(n, seeds.generator("evaluate", seed), n_pairs=n_pairs)


def within(values: Tensor, expected: float, precision: float = 0.05) -> None:
    """The mean over prompts is within 4 standard errors of ``expected``, and these are small."""
    error = 4 * float(values.std()) / len(values) ** 0.5
    assert abs(float(values.mean()) - expected) < error
    assert error < precision * max(expected, 0.2), "too few draws to tell anything"


def least_squares_of_last(batch: Batch) -> Tensor:
    """Least squares' prediction of the last example alone, by the pseudo-inverse; of every k would take long."""
    x, y = batch.x.double(), batch.y.double()
    w = torch.linalg.pinv(x[:, :-1]) @ y[:, :-1, None]
    return (x[:, -1] * w[..., 0]).sum(-1)


@EVERY
@LAYOUTS
@pytest.mark.law
def test_the_label_of_the_query_is_in_no_token(name: str, config: dict[str, Any], tokens: str) -> None:
    task = regression(name, **config, tokens=tokens)
    permuted = dataclasses.replace(task, functions=OtherQueries(task.functions))
    one, other = (t.sample(6, seeds.generator("evaluate", 0), n_pairs=5) for t in (task, permuted))
    assert not torch.isclose(one.targets[:, -1], other.targets[:, -1]).all()
    assert torch.equal(one.tokens, other.tokens)
    y = one.y.clone()
    y[:, -2] += 1
    assert not torch.equal(task.layout.batch(one.x, y, one.targets, one.truth).tokens, one.tokens)


@EVERY
@pytest.mark.statistics
def test_scale_is_the_mean_square_of_a_target(name: str, config: dict[str, Any]) -> None:
    task, batch = sample(name, n=60_000, n_pairs=1, **config)
    within(batch.targets[:, 0] ** 2, task.scale, precision=0.1)


@EVERY
@pytest.mark.law
def test_corrupt_keeps_inputs_and_noise_and_nothing_of_the_function(name: str, config: dict[str, Any]) -> None:
    task, batch = sample(name, **config)
    corrupted = task.corrupt(batch, seeds.generator("corrupt", 0))
    assert torch.equal(corrupted.x, batch.x)
    for key in batch.truth:
        same = torch.equal(corrupted.truth[key], batch.truth[key])
        assert same == (key in ("noise", "subspace")), key
    y, targets = task.labels(batch.x, corrupted.truth)
    assert torch.equal(corrupted.y, y) and torch.equal(corrupted.targets, targets)


@pytest.mark.definition
def test_a_prompt_of_linear_regression_is_w_then_x_from_the_generator() -> None:
    """The bundled checkpoints were trained and measured on these draws: an option must not move them."""
    _, batch = sample("linreg", d=3, n_pairs=4)
    generator = seeds.generator("evaluate", 0)
    assert torch.equal(batch.truth["w"], torch.randn(4, 3, generator=generator))
    assert torch.equal(batch.x, torch.randn(4, 4, 3, generator=generator))
    assert set(batch.truth) == {"w"} and torch.equal(batch.targets, batch.y)


@pytest.mark.statistics
@pytest.mark.parametrize("d", [6, 7])
def test_half_subspace_inputs_fill_half_of_the_dimensions_of_each_prompt(d: int) -> None:
    _, batch = sample("linreg", n=3000, d=d, n_pairs=20, covariance="half_subspace")
    singular = torch.linalg.svdvals(batch.x.double())
    assert (singular[:, d // 2 - 1] > 0.1).all() and (singular[:, d // 2 :] < 1e-5).all()
    within(batch.x.square().sum(-1).mean(-1), d)
    both = torch.linalg.svdvals(torch.cat([batch.x[0], batch.x[1]]).double())
    assert float(both[d // 2]) > 0.1


@pytest.mark.statistics
def test_least_squares_in_a_half_subspace_is_done_at_half_of_d() -> None:
    d = 8
    task, batch = sample("linreg", n=10_000, d=d, n_pairs=7, covariance="half_subspace")
    error = (estimators.build("ols")(batch) - batch.targets) ** 2 / task.scale
    for k in range(d // 2):
        within(error[:, k], 1 - k / (d / 2), precision=0.15)
    # At k = d/2 the inputs of a few prompts are nearly dependent, and fp32 labels leave their rounding.
    assert float(error[:, d // 2].quantile(0.99)) < 1e-6 and float(error[:, d // 2 + 2 :].max()) < 1e-6


@pytest.mark.statistics
@pytest.mark.parametrize("noisy_targets", [True, False])
def test_least_squares_in_renormalised_noise(noisy_targets: bool) -> None:
    """tasks.md section 1, and without the floor σe²/d that a noisy query adds. k = d has no finite mean: not asked."""
    d, noise = 10, 10 / 11
    task = regression("linreg", d=d, noise=1.0, renormalise=True, noisy_targets=noisy_targets)
    floor = noise / d if noisy_targets else 0.0
    for k in (2, 4, 25, 40):
        batch = task.sample(8000, seeds.generator("evaluate", k), n_pairs=k + 1)
        error = (least_squares_of_last(batch) - batch.targets[:, -1]) ** 2 / d
        if k < d:
            expected = (1 - k / d) * d / (d + 1) + noise / d * k / (d - k - 1) + floor
        else:
            expected = noise / d * d / (k - d - 1) + floor
        within(error, expected, precision=0.15)


@pytest.mark.definition
def test_noise_is_rescaled_by_its_expectation_and_not_by_the_batch() -> None:
    d, sigma = 5, 2.0
    _, batch = sample("linreg", n=10_000, d=d, n_pairs=3, noise=sigma, renormalise=True)
    w, noise = batch.truth["w"], batch.truth["noise"]
    torch.testing.assert_close(batch.targets, torch.einsum("bki,bi->bk", batch.x, w))
    torch.testing.assert_close(batch.y, batch.targets + noise)
    share = d / (d + sigma**2)
    within(w.square().sum(-1), d * share)
    within(noise.square().mean(-1), sigma**2 * share)
    # A batch rescaled by its own standard deviation would have this one exactly.
    assert abs(float(batch.y.std()) - d**0.5) > 1e-4


@pytest.mark.statistics
def test_sparse_weights_have_their_support_everywhere_alike() -> None:
    d, sparsity, n = 8, 3, 10_000
    task, batch = sample("sparse_linreg", n=n, d=d, n_pairs=d, sparsity=sparsity)
    support = batch.truth["support"]
    assert (support.sum(dim=1) == sparsity).all()
    assert torch.equal(batch.truth["w"] != 0, support)
    share = sparsity / d
    assert ((support.double().mean(0) - share).abs() < 4 * (share * (1 - share) / n) ** 0.5).all()
    torch.testing.assert_close(batch.y, torch.einsum("bki,bi->bk", batch.x, batch.truth["w"]))
    error = {name: loss / task.scale for name, loss in task.baselines(batch).items()}
    for k in (0, 3, 6):
        within(error["ols"][:, k], 1 - k / d, precision=0.15)
    told = error["ols_on_support"]
    assert float(told[:, sparsity].quantile(0.99)) < 1e-6 and float(told[:, sparsity + 2 :].max()) < 1e-6
    within(told[:, 2], 1 - 2 / sparsity, precision=0.2)


@pytest.mark.definition
@pytest.mark.parametrize(("active", "size"), [(2, 2), (4, 3)])
def test_a_sparse_support_lies_in_the_active_coordinates(active: int, size: int) -> None:
    task = regression("sparse_linreg", d=8)
    batch = task.sample(50, seeds.generator("train", 0), d_active=active)
    for made in (batch, task.corrupt(batch, seeds.generator("corrupt", 0))):
        assert not made.truth["support"][:, active:].any()
        assert (made.truth["support"].sum(dim=1) == size).all()


@pytest.mark.definition
@pytest.mark.parametrize(("degree", "norm"), [(2, 3), (3, 15)])
def test_polynomials_are_sums_of_powers(degree: int, norm: int) -> None:
    task, batch = sample("polynomial", d=3, degree=degree)
    for b, k in np.ndindex(4, task.n_pairs):
        terms = [float(batch.truth["w"][b, i]) * float(batch.x[b, k, i]) ** degree for i in range(3)]
        assert float(batch.y[b, k]) == pytest.approx(sum(terms) / norm**0.5, rel=1e-4, abs=1e-5)
    loss = task.baselines(batch)
    assert float(loss["ols_on_powers"][:, 3:].max()) < 1e-5 < float(loss["ols"][:, 3:].min(0).values.max())


@pytest.mark.definition
def test_relu_networks_are_networks() -> None:
    _, batch = sample("relu_net", d=3, hidden=4, n_pairs=5)
    for b in range(4):
        first, second = batch.truth["W1"][b].numpy(), batch.truth["W2"][b].numpy()
        expected = np.maximum(batch.x[b].numpy() @ first, 0) @ second / 2**0.5
        np.testing.assert_allclose(batch.y[b].numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.statistics
def test_the_linear_part_of_a_relu_network_is_its_correlation_with_x() -> None:
    task, batch = sample("relu_net", n=1, d=3, hidden=7, n_pairs=200_000)
    linear = task.functions.variables(batch)["linear"][0]
    products = (batch.y[0, :, None] * batch.x[0]).double()
    for i in range(3):
        error = 4 * float(products[:, i].std()) / 200_000**0.5
        assert abs(float(products[:, i].mean() - linear[i])) < error < 0.1


def walk(x: Tensor, coordinate: Tensor, leaf: Tensor) -> tuple[int, float]:
    """The leaf of one x and its value, by halving the lists of nodes and leaves at each question."""

    def down(node: int, low: int, high: int) -> int:
        if high - low == 1:
            return low
        half = (low + high) // 2
        right = float(x[int(coordinate[node])]) > 0
        return down(2 * node + 2, half, high) if right else down(2 * node + 1, low, half)

    at = down(0, 0, len(leaf))
    return at, float(leaf[at])


@pytest.mark.definition
@pytest.mark.parametrize("depth", [1, 4])
def test_trees_against_recursion(depth: int) -> None:
    task, batch = sample("decision_tree", d=3, depth=depth, n_pairs=30)
    leaf = task.variables(batch)["leaf"]
    error = task.baselines(batch)["mean_in_leaf"]
    for b in range(4):
        seen = set()
        for k in range(30):
            at, value = walk(batch.x[b, k], batch.truth["coordinate"][b], batch.truth["leaf"][b])
            assert (int(leaf[b, k]), float(batch.y[b, k])) == (at, value)
            assert float(error[b, k]) == pytest.approx(0.0 if at in seen else value**2, abs=1e-6)
            seen.add(at)
        assert len(seen) > 1


@pytest.mark.statistics
def test_trees_come_from_the_generator_one_for_each_prompt() -> None:
    """The released code has a seeded path to fix trees that does not run; here a seed is a generator."""
    n, d = 20_000, 4
    _, batch = sample("decision_tree", n=n, d=d, n_pairs=1)
    again, other = (sample("decision_tree", n=n, d=d, n_pairs=1, seed=seed)[1] for seed in (0, 1))
    assert torch.equal(batch.truth["coordinate"], again.truth["coordinate"])
    assert not torch.equal(batch.truth["coordinate"], other.truth["coordinate"])
    assert batch.truth["coordinate"].shape == (n, 15) and batch.truth["leaf"].shape == (n, 16)
    for i in range(d):
        share = (batch.truth["coordinate"] == i).double().mean(0)
        assert ((share - 1 / d).abs() < 4.5 * (1 / d * (1 - 1 / d) / n) ** 0.5).all()
    within(batch.truth["leaf"].square().mean(-1), 1.0)
