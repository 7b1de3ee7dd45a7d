"""Shifts: what moves and what stays, closed forms of the errors under them, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from hooks.errors import BadArgument
from interp import estimators, evaluate, seeds, tasks
from interp.tasks import Batch, Task, shifts
from interp.tasks.regression import Regression
from tests.interp.queries import OtherQueries

NEEDED: dict[str, dict[str, Any]] = {"scaled_inputs": {"factor": 2.0}, "scaled_labels": {"factor": 0.5}}
"""Options without a default, by shift."""
EVERY = pytest.mark.parametrize("name", shifts.names())


def base(name: str = "linreg", **config: Any) -> Regression:
    task = tasks.build(name, **config)
    assert isinstance(task, Regression)
    return task


def shifted(name: str, d: int = 4, **config: Any) -> Task:
    return shifts.apply(base(d=d), [(name, NEEDED.get(name, {}) | config)])


def prompts(task: Task, n: int = 5, seed: int = 0, **shape: int) -> Batch:
    return task.sample(n, seeds.generator("evaluate", seed), **shape)


def within(values: Tensor, expected: float) -> None:
    """The mean over prompts is within 4 standard errors of ``expected``, and these are small."""
    error = 4 * float(values.std()) / len(values) ** 0.5
    assert abs(float(values.mean()) - expected) < error
    assert error < 0.15 * max(expected, 0.2), "too few draws to tell anything"


def last_error(name: str, task: Task, k: int, n: int = 4000, **config: Any) -> Tensor:
    """An estimator's error at the last of k + 1 examples, one number a prompt."""
    batch = prompts(task, n, seed=k, n_pairs=k + 1)
    predicted = estimators.build(name, **config)(batch)
    return task.error(predicted[:, -1:], batch.last())[:, 0]


@EVERY
@pytest.mark.contract
def test_a_shifted_task_is_a_task_that_its_config_builds_again(name: str) -> None:
    task = shifted(name)
    assert isinstance(task, Task) and task.name == "linreg"
    kept = json.loads(json.dumps(task.config))
    again = shifts.apply(tasks.build(task.name, **{k: v for k, v in kept.items() if k != "shifts"}), kept["shifts"])
    assert again.config == task.config == kept and again.config["shifts"][0][0] == name
    for field in ("tokens", "targets", "y"):
        assert torch.equal(getattr(prompts(again), field), getattr(prompts(task), field))
    assert max(task.report_ks) < task.n_pairs
    assert task.query_only == (name in ("random_quadrants", "orthogonal_query", "overlapping_query"))
    assert not task.query_only or task.report_ks == (task.n_pairs - 1,)


@EVERY
@pytest.mark.law
@pytest.mark.parametrize("tokens", ["interleaved", "joint"])
def test_the_label_of_the_query_is_in_no_token(name: str, tokens: str) -> None:
    plain = base(d=4, tokens=tokens)
    permuted = dataclasses.replace(plain, functions=OtherQueries(plain.functions))
    one, other = (prompts(shifts.apply(t, [(name, NEEDED.get(name, {}))]), n_pairs=4) for t in (plain, permuted))
    assert not torch.isclose(one.targets[:, -1], other.targets[:, -1]).any()
    assert torch.equal(one.tokens, other.tokens)


@EVERY
@pytest.mark.law
def test_the_same_generator_gives_the_functions_and_what_the_shift_leaves_alone(name: str) -> None:
    moved = {"random_quadrants": "context", "label_noise": "y", "scaled_labels": "y", "longer_context": ""}
    moved |= {"orthogonal_query": "query", "overlapping_query": "query"}
    task, plain = shifted(name), base(d=4)
    ours, theirs = (prompts(t, n_pairs=4) for t in (task, plain))
    assert torch.equal(ours.truth["w"], theirs.truth["w"])
    changed = (ours.x != theirs.x).any(dim=-1)
    assert bool(changed[:, :-1].any()) == (moved.get(name, "x") in ("context", "x"))
    assert bool(changed[:, -1].any()) == (moved.get(name, "x") in ("query", "x"))
    if name not in ("label_noise", "scaled_labels"):
        torch.testing.assert_close(ours.y, torch.einsum("bki,bi->bk", ours.x, ours.truth["w"]))
    assert torch.equal(ours.y, theirs.y) == (name == "longer_context")


@EVERY
@pytest.mark.law
def test_corrupt_keeps_the_shifted_inputs_and_the_noise(name: str) -> None:
    task = shifted(name)
    batch = prompts(task)
    corrupted = task.corrupt(batch, seeds.generator("corrupt", 0))
    assert torch.equal(corrupted.x, batch.x) and not torch.isclose(corrupted.targets, batch.targets).any()
    assert set(corrupted.truth) == set(batch.truth)
    for key, value in batch.truth.items():
        assert torch.equal(corrupted.truth[key], value) == (key != "w")
    clean = torch.einsum("bki,bi->bk", corrupted.x, corrupted.truth["w"])
    torch.testing.assert_close(corrupted.targets, clean * (0.5 if name == "scaled_labels" else 1))
    noise = batch.truth.get("label_noise", torch.zeros_like(clean))
    torch.testing.assert_close(corrupted.y, corrupted.targets + noise)


@pytest.mark.statistics
def test_an_orthogonal_query_leaves_nothing_to_span_methods() -> None:
    d = 4
    task = shifted("orthogonal_query", d)
    for k in range(1, d):
        batch = prompts(task, 4000, seed=k, n_pairs=k + 1)
        products = torch.einsum("bki,bi->bk", batch.x[:, :-1], batch.x[:, -1])
        assert float(products.abs().max()) < 1e-4
        plain = prompts(base(d=d), 4000, seed=k, n_pairs=k + 1)
        torch.testing.assert_close(batch.x[:, -1].norm(dim=-1), plain.x[:, -1].norm(dim=-1))
        for name, config in (("ols", {}), ("ridge", {}), ("averaging", {}), ("gd", {"steps": 1})):
            predicted = estimators.build(name, **config)(batch)[:, -1]
            assert float(predicted.abs().quantile(0.99)) < 1e-4
            within(task.error(predicted[:, None], batch.last())[:, 0], 1.0)
        assert float(estimators.build("knn")(batch)[:, -1].abs().median()) > 0.1
    assert prompts(task, n_pairs=1).x.shape == (5, 1, d) and task.n_pairs == d


@pytest.mark.definition
def test_an_orthogonal_query_of_skewed_and_scaled_inputs_is_still_orthogonal() -> None:
    given = ["orthogonal_query", "skewed_inputs", ("scaled_inputs", {"factor": 3.0})]
    batch = prompts(shifts.apply(base(d=6), given), n_pairs=4)
    products = torch.einsum("bki,bi->bk", batch.x[:, :-1], batch.x[:, -1])
    assert float(products.abs().max()) < 1e-3 < float(batch.x.square().sum(-1).min())


@pytest.mark.statistics
def test_an_overlapping_query_was_seen() -> None:
    task = shifted("overlapping_query")
    batch = prompts(task, 1000, n_pairs=7)
    place = batch.truth["overlaps"]
    assert torch.equal(batch.x[:, -1], batch.x[torch.arange(1000), place])
    assert ((place.bincount(minlength=6) / 1000 - 1 / 6).abs() < 4 * (5 / 36 / 1000) ** 0.5).all()
    for k in (1, 3, 6):
        assert float(last_error("ols", task, k, n=500).quantile(0.99)) < 1e-6
        assert float(last_error("knn", task, k, n=500, neighbours=1).max()) < 1e-9
        assert float(last_error("averaging", task, k, n=500).mean()) > 0.1


@pytest.mark.statistics
def test_random_quadrants_fix_the_signs_of_the_context_and_free_the_query() -> None:
    task, n = shifted("random_quadrants"), 4000
    batch = prompts(task, n, n_pairs=6)
    signs = batch.x.sign()
    assert (signs[:, :5] == signs[:, :1]).all()
    for one, other in ((signs[:, 5], signs[:, 0]), (signs[:, 0], torch.ones(n, 4))):
        assert ((one * other).mean(0).abs() < 4 / n**0.5).all()
    plain = prompts(base(d=4), n, n_pairs=6)
    assert torch.equal(batch.x.abs(), plain.x.abs()) and torch.equal(batch.x[:, -1], plain.x[:, -1])
    within(last_error("ols", task, 0), 1.0)
    assert float(last_error("ols", task, 8).max()) < 1e-6


@pytest.mark.statistics
@pytest.mark.parametrize("k", [0, 2])
def test_scaling_is_a_factor_of_the_error_of_least_squares(k: int) -> None:
    for given, factor in (
        ([("scaled_inputs", {"factor": 3.0})], 9.0),
        ([("scaled_labels", {"factor": 0.5})], 0.25),
        ([("scaled_inputs", {"factor": 2.0}), ("scaled_labels", {"factor": 0.5})], 1.0),
    ):
        within(last_error("ols", shifts.apply(base(d=4), given), k, n=8000), factor * (1 - k / 4))


@pytest.mark.definition
def test_scaled_inputs_of_a_polynomial_scale_its_labels_by_the_power() -> None:
    plain = base("polynomial", d=3, degree=3)
    task = shifts.apply(plain, [("scaled_inputs", {"factor": 2.0})])
    torch.testing.assert_close(prompts(task).y, 8 * prompts(plain).y)
    assert task.scale == plain.scale == 3.0
    tree = base("decision_tree", d=3)
    assert torch.equal(prompts(shifts.apply(tree, [("scaled_inputs", {"factor": 2.0})])).y, prompts(tree).y)


@pytest.mark.statistics
@pytest.mark.parametrize("noisy_targets", [True, False])
def test_label_noise_of_the_papers(noisy_targets: bool) -> None:
    """tasks.md section 1: noise of standard deviation 1, renormalised; the floor σe²/d is a noisy query's."""
    d, noise = 10, 10 / 11
    task = shifted("label_noise", d, sigma=1.0, renormalise=True, noisy_targets=noisy_targets)
    floor = noise / d if noisy_targets else 0.0
    within(last_error("ols", task, 2, n=6000), (1 - 2 / d) * d / (d + 1) + noise / d * 2 / (d - 3) + floor)
    within(last_error("ols", task, 25, n=2000), noise / d * d / (25 - d - 1) + floor)


@pytest.mark.definition
def test_label_noise_stands_in_the_tokens_and_not_in_the_targets() -> None:
    task, plain = shifted("label_noise", sigma=0.5), prompts(base(d=4))
    batch = prompts(task)
    assert torch.equal(batch.targets, plain.targets)
    torch.testing.assert_close(batch.y - plain.y, 0.5 * batch.truth["label_noise"], rtol=1e-4, atol=1e-5)
    assert torch.equal(batch.tokens[:, 1::2, 0], batch.y[:, :-1])
    noisy = prompts(shifted("label_noise", sigma=0.5, noisy_targets=True))
    assert torch.equal(noisy.targets, noisy.y) and torch.equal(noisy.y, batch.y)


@pytest.mark.definition
def test_shifts_of_labels_act_in_the_order_given() -> None:
    noise, scaled = ("label_noise", {"sigma": 0.5}), ("scaled_labels", {"factor": 3.0})
    before, after = (prompts(shifts.apply(base(d=4), given)) for given in ([noise, scaled], [scaled, noise]))
    assert torch.equal(before.targets, after.targets)
    torch.testing.assert_close(before.y - before.targets, 3 * (after.y - after.targets), rtol=1e-3, atol=1e-4)
    one_by_one = shifts.apply(shifts.apply(base(d=4), [noise]), [scaled])
    assert torch.equal(prompts(one_by_one).y, before.y)


@pytest.mark.statistics
def test_skewed_inputs_are_skewed_along_axes_of_each_prompt() -> None:
    d, draws = 4, 100_000
    batch = prompts(shifted("skewed_inputs", d), n=2, n_pairs=draws)
    inverse_squares = torch.tensor([1 / i**2 for i in range(d, 0, -1)], dtype=torch.float64)
    expected = d * inverse_squares / inverse_squares.sum()
    covariances = [torch.cov(x.T) for x in batch.x.double()]
    for covariance in covariances:
        found = torch.linalg.eigvalsh(covariance)
        assert ((found / expected - 1).abs() < 4 * (2 / draws) ** 0.5).all()
    top = [torch.linalg.eigh(covariance).eigenvectors[:, -1] for covariance in covariances]
    assert abs(float(top[0] @ top[1])) < 0.99
    assert not prompts(shifted("skewed_inputs", d), d_active=2).x[..., 2:].any()


@pytest.mark.definition
def test_a_longer_context_goes_on_where_training_stopped() -> None:
    task = shifts.apply(base(d=4, n_pairs=9), [("longer_context", {"n_pairs": 30})])
    assert task.n_pairs == 30 and task.config["n_pairs"] == 9
    assert task.report_ks == (4, 8, 16, 29)
    assert torch.equal(prompts(task).x, prompts(base(d=4, n_pairs=30)).x)
    assert shifted("longer_context").n_pairs == 2 * base(d=4).n_pairs


@pytest.mark.contract
@pytest.mark.parametrize("tokens", ["interleaved", "joint"])
def test_a_special_query_is_trained_and_measured_alone(tokens: str) -> None:
    task = shifts.apply(base(d=4, tokens=tokens), ["overlapping_query"])

    def first(made: Tensor) -> Tensor:
        return made[..., :1]

    batch = prompts(task, 50)
    loss = task.training_loss(first, batch, seeds.generator("train", 0))
    torch.testing.assert_close(loss[:, 0], (batch.x[:, -1, 0] - batch.targets[:, -1]) ** 2)
    error = evaluate.errors(first, task, batch=batch, query_only=True)
    torch.testing.assert_close(error, loss / 4)
    torch.testing.assert_close(task.error(task.predict(first, batch), batch)[:, -1:], error)
    assert set(evaluate.summary(first, task, n=50)) == {16}


@pytest.mark.contract
def test_no_shift_is_the_task_itself() -> None:
    task = base()
    assert shifts.apply(task, []) is task
    with_one = shifts.apply(task, ["label_noise"])
    assert shifts.apply(with_one, []).config == with_one.config != task.config


@pytest.mark.contract
@pytest.mark.parametrize(
    ("task", "given", "says"),
    [
        (("decision_tree", {}), ["orthogonal_query"], "no sense on .*sign of one coordinate"),
        (("decision_tree", {}), ["random_quadrants"], "falls into one leaf"),
        (("linreg", {}), ["orthogonal_query", "overlapping_query"], "both say what the query is"),
        (("linreg", {}), ["random_quadrants", "orthogonal_query"], "both say what the query is"),
        (("linreg", {}), ["orthogonal_query", "longer_context"], "at most 5 pairs"),
        (("linreg", {}), ["label_noise", "label_noise"], "given twice"),
        (("linreg", {"covariance": "skewed"}), ["skewed_inputs"], 'covariance="isotropic"'),
        (("linreg", {"n_pairs": 1}), ["overlapping_query"], "at least 2 pairs"),
        (("linreg", {}), [("longer_context", {"n_pairs": 21})], "no longer than the task's own 21"),
        (("linreg", {}), [("label_noise", {"sigma": -1.0})], "sigma=-1.0"),
        (("linreg", {}), [("scaled_inputs", {"factor": 0.0})], "factor=0 leaves nothing"),
        (("linreg", {}), [("label_noise", {"sgima": 1.0})], 'called "sgima"; did you mean "sigma"'),
        (("linreg", {}), ["orthogonal"], 'no shift is called "orthogonal"; did you mean "orthogonal_query"'),
        (("outlier_linreg", {}), ["label_noise"], '"outlier_linreg" is made otherwise'),
        (("outliers", {}), ["scaled_inputs"], "factor"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(task: Any, given: list[Any], says: str) -> None:
    with pytest.raises(BadArgument, match=says) as refused:
        shifts.apply(tasks.build(task[0], **task[1]), given)
    assert "\n" not in str(refused.value)


@pytest.mark.contract
def test_a_length_without_such_a_query_is_refused() -> None:
    across, seen = shifted("orthogonal_query"), shifted("overlapping_query")
    with pytest.raises(BadArgument, match=r"orthogonal_query with n_pairs=5: .*at most n_pairs=4"):
        prompts(across, n_pairs=5)
    with pytest.raises(BadArgument, match=r"at most n_pairs=2"):
        prompts(across, n_pairs=3, d_active=2)
    with pytest.raises(BadArgument, match=r"overlapping_query with n_pairs=1: give at least 2"):
        prompts(seen, n_pairs=1)
    half = shifts.apply(base(d=6, covariance="half_subspace"), ["orthogonal_query"])
    assert half.n_pairs == 3 and prompts(half).x.shape == (5, 3, 6)


@pytest.mark.contract
@pytest.mark.parametrize("asked", ["label_noise", ("label_noise", {"sigma": 1.0}), ["label_noise"]])
def test_one_shift_by_itself_is_that_shift(asked: Any) -> None:
    task = tasks.build("linreg", d=2, n_pairs=4)
    assert shifts.apply(task, asked).config == shifts.apply(task, [("label_noise", {"sigma": 1.0})]).config
    with pytest.raises(BadArgument, match='did you mean "label_noise"'):
        shifts.apply(task, "label_nose")
