"""The contract of a task, over every task there is: a new line in ``TASKS`` has its tests here.

Those whose tokens are integers have theirs in ``test_token_tasks``.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hooks.errors import BadArgument
from interp import seeds, tasks
from interp.tasks import Batch, Task, TokenTask
from interp.tasks.base import guess, least_by_constant

pytestmark = pytest.mark.contract

# Configurations beside the default in which a task is worth testing.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "linreg": [
        {"tokens": "joint"},
        {"covariance": "skewed", "d": 3},
        {"tokens": "joint", "covariance": "skewed", "d": 1, "n_pairs": 1},
        {"d": 1, "n_pairs": 1},
        {"covariance": "half_subspace", "noise": 0.5},
        {"noise": 1.0, "renormalise": True, "noisy_targets": True},
    ],
    "sparse_linreg": [
        {"tokens": "joint", "covariance": "half_subspace"},
        {"d": 3, "covariance": "skewed"},
        {"d": 1, "sparsity": 1, "n_pairs": 1},
    ],
    "polynomial": [{"degree": 3}, {"tokens": "joint", "d": 1, "n_pairs": 1}],
    "relu_net": [{"tokens": "joint", "covariance": "skewed"}, {"d": 1, "hidden": 50, "n_pairs": 1}],
    "decision_tree": [{"tokens": "joint", "depth": 1}, {"d": 1, "n_pairs": 1}],
    "single_index": [
        {"tokens": "interleaved", "link": "tanh", "noise_form": "gaussian", "noisy_targets": True},
        {"d": 2, "r": 2, "link": [0.0, 1.0, 0.0, 0.5], "tau": 0.0, "n_pairs": 1},
        {"link": "he2", "subspace_seed": None, "n_pairs": 9},
    ],
    "outlier_linreg": [
        {"tokens": "joint"},
        {"outlier": "ones", "d": 3, "n_pairs": 20},
        {"tokens": "joint", "outlier": "ones", "d": 1, "n_pairs": 4, "p": 0.5},
        {"orthogonal_to": "fresh", "per": "prompt", "d": 4},
        {"p": 0.0, "covariance": "skewed", "r": 3.0},
        {"p": 0.0, "d": 1, "n_pairs": 1},
    ],
    "outliers": [
        {"alpha": 0.0, "pattern_seed": None},
        {"alpha": 1.0, "rule": "flip", "placement": "close", "outside": True, "orthogonal": 0.5},
        {"n_pairs": 1, "M1": 3, "M2": 1, "V": 1, "d": 5, "rule": "keep"},
    ],
    "sparse_parity": [{"d": 6, "k": 3, "n_pairs": 12}, {"d": 8, "k": 1, "n_pairs": 3}],
}
# The drawn truth that makes one prompt another task than the next: what ``corrupt`` draws anew.
TASK_VARIABLE = {
    "linreg": "w",
    "sparse_linreg": "w",
    "polynomial": "w",
    "relu_net": "W2",
    "decision_tree": "leaf",
    "single_index": "beta",
    "outlier_linreg": "w",
    "outliers": "pair",
    "sparse_parity": "hidden",
}
# Tasks whose inputs are made of patterns: they have no coordinates to switch on one by one.
WHOLE_INPUTS = {"outliers"}
# Tasks with few different labels: another task variable leaves some of them as they were.
COINCIDE = {"sparse_parity"}
# Values that a task must refuse, with what the refusal has to say.


CASES = [
    pytest.param((name, config), id=f"{name}-{'-'.join(map(str, config.values())) or 'default'}")
    for name in tasks.names()
    if not isinstance(tasks.build(name), TokenTask)
    for config in [{}, *VARIANTS.get(name, [])]
]


@pytest.fixture(params=CASES)
def task(request: pytest.FixtureRequest) -> Task:
    name, config = request.param
    return tasks.build(name, **config)


def prompts(task: Task, n: int = 6, seed: int = 0, **shape: int) -> Batch:
    return task.sample(n, seeds.generator("evaluate", seed), **shape)


def fields(batch: Batch) -> dict[str, Tensor]:
    """Every tensor of a batch by name."""
    named = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return named | {f"truth.{name}": value for name, value in batch.truth.items()}


def assert_equal(one: Batch, other: Batch) -> None:
    torch.testing.assert_close(fields(one), fields(other), rtol=0, atol=0)


class RunningMean(nn.Module):
    """A causal model of the task's shape: a linear map of the mean of the tokens so far."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.head = nn.Linear(task.d_token, task.d_out)

    def forward(self, tokens: Tensor) -> Tensor:
        count = torch.arange(1, tokens.shape[1] + 1)
        return self.head(tokens.cumsum(dim=1) / count[:, None])


def test_it_is_a_task_with_all_its_fields(task: Task) -> None:
    assert isinstance(task, Task)
    assert task.name in tasks.names()
    assert all(isinstance(n, int) and n >= 1 for n in (task.d, task.n_pairs, task.d_token))
    assert task.d_out >= 1
    assert task.scale > 0
    assert task.kinds and all(isinstance(kind, str) for kind in task.kinds)
    assert task.metric


def test_its_config_goes_through_json_and_builds_it_again(task: Task) -> None:
    kept = json.loads(json.dumps(task.config))
    again = tasks.build(task.name, **kept)
    assert again.config == task.config == kept
    assert (again.d, again.n_pairs, again.kinds) == (task.d, task.n_pairs, task.kinds)
    assert_equal(prompts(again), prompts(task))


@pytest.mark.parametrize("shape", [{}, {"d_active": 1}, {"n_pairs": 2}, {"n_pairs": 40}])
def test_shapes(task: Task, shape: dict[str, int]) -> None:
    batch = prompts(task, **shape)
    n_pairs = shape.get("n_pairs", task.n_pairs)
    assert len(batch) == 6
    assert batch.tokens.shape[0] == 6 and batch.tokens.shape[2] == task.d_token
    assert batch.targets.shape == batch.y.shape == (6, n_pairs)
    assert batch.x.shape == (6, n_pairs, task.d)
    assert batch.kinds.shape == (batch.tokens.shape[1],)
    assert set(batch.kinds.tolist()) <= set(range(len(task.kinds)))
    assert len(batch.read) in (1, n_pairs)
    assert int(batch.read.min()) >= 0 and int(batch.read.max()) == batch.tokens.shape[1] - 1
    assert all(len(value) == 6 for value in batch.truth.values())


def test_inactive_coordinates_are_zero_and_active_ones_are_not(task: Task) -> None:
    x = prompts(task, d_active=1).x
    if task.name in WHOLE_INPUTS:
        assert torch.equal(x, prompts(task).x)
        return
    assert not x[..., 1:].any()
    assert x[..., 0].all()
    assert prompts(task).x.all()


def test_a_sample_is_its_generators_and_nothing_elses(task: Task) -> None:
    before = torch.random.get_rng_state()
    first = prompts(task)
    torch.testing.assert_close(torch.random.get_rng_state(), before)
    assert_equal(first, prompts(task))
    other = prompts(task, seed=1)
    assert not torch.equal(first.x, other.x) and not torch.equal(first.y, other.y)


def test_prompts_of_a_batch_differ(task: Task) -> None:
    batch = prompts(task)
    variable = batch.truth[TASK_VARIABLE[task.name]]
    assert len(torch.unique(batch.x.reshape(6, -1), dim=0)) == 6
    assert len(torch.unique(variable, dim=0)) == 6 or not variable.is_floating_point()
    assert len(torch.unique(variable, dim=0)) > 1


def test_corrupt_keeps_the_inputs_and_draws_the_rest_anew(task: Task) -> None:
    batch = prompts(task)
    kept = {name: value.clone() for name, value in fields(batch).items()}
    corrupted = task.corrupt(batch, seeds.generator("corrupt", 0))
    torch.testing.assert_close(fields(batch), kept, rtol=0, atol=0)
    for name in ("x", "read", "kinds"):
        assert torch.equal(getattr(corrupted, name), getattr(batch, name))
    for name, value in fields(corrupted).items():
        assert value.shape == kept[name].shape and value.dtype == kept[name].dtype
    same_target = torch.isclose(corrupted.targets, batch.targets)
    assert not (same_target.all() if task.name in COINCIDE else same_target.any())
    variable = TASK_VARIABLE[task.name]
    same = (corrupted.truth[variable] == batch.truth[variable]).flatten(1).all(dim=1)
    assert not same.any()
    assert task.n_pairs == 1 or not torch.equal(corrupted.tokens, batch.tokens)
    assert_equal(corrupted, task.corrupt(batch, seeds.generator("corrupt", 0)))


def test_loss_is_of_each_prompt_and_example(task: Task) -> None:
    batch = prompts(task)
    loss = task.loss(batch.targets, batch)
    assert loss.shape == (6, task.n_pairs)
    torch.testing.assert_close(loss, torch.zeros_like(loss))
    wrong = batch.targets.clone()
    wrong[2, -1] *= -2
    for measure in (task.loss, task.error):
        right = measure(batch.targets, batch)
        torch.testing.assert_close(right, torch.zeros_like(loss))
        changed = measure(wrong, batch) != right
        assert changed[2, -1] and int(changed.sum()) == 1


def test_loss_refuses_another_shape(task: Task) -> None:
    batch = prompts(task, n_pairs=3)
    with pytest.raises(BadArgument, match="one prediction for each example"):
        task.loss(batch.targets[:, :1], batch)
    with pytest.raises(BadArgument, match="one prediction for each example"):
        task.error(batch.targets[:, :1], batch)


def test_a_plain_function_is_a_model(task: Task) -> None:
    batch = prompts(task)
    prediction = task.predict(RunningMean(task), batch)
    assert prediction.shape == batch.targets.shape
    assert prediction.requires_grad
    again = task.predict(lambda tokens: tokens.new_full((*tokens.shape[:2], task.d_out), 3), batch)
    torch.testing.assert_close(again, torch.full_like(batch.targets, 3))


def test_training_loss_is_some_of_the_loss_and_trains(task: Task) -> None:
    batch, model = prompts(task), RunningMean(task)
    every = task.loss(task.predict(model, batch), batch)
    some = task.training_loss(model, batch, seeds.generator("train", 0))
    assert some.shape == (6, len(batch.read))
    columns = torch.isclose(every[:, :, None], some[:, None, :]).all(dim=0).any(dim=0)
    assert columns.all()
    some.mean().backward()
    assert model.head.weight.grad is not None and model.head.weight.grad.any()


def test_variables_and_baselines_have_the_axes_that_they_promise(task: Task) -> None:
    batch = prompts(task)
    for name, value in task.variables(batch).items():
        assert len(value) == 6 and value.isfinite().all(), name
    for name, value in task.baselines(batch).items():
        assert value.shape == batch.targets.shape and value.isfinite().all(), name


def test_scale_is_the_error_of_predicting_zero(task: Task) -> None:
    batch = prompts(task, n=4000)
    zero = task.loss(torch.zeros_like(batch.targets), batch)[:, 0] / task.scale
    assert abs(float(zero.mean()) - 1) <= 4 * float(zero.std()) / 4000**0.5


def test_take_and_to_keep_prompts_whole(task: Task) -> None:
    batch = prompts(task)
    part = batch.take(torch.tensor([4, 1]))
    for name, value in fields(part).items():
        whole = fields(batch)[name]
        torch.testing.assert_close(value, whole if name in ("read", "kinds") else whole[[4, 1]])
    assert len(batch.take(slice(1, 4))) == 3
    assert {value.device.type for value in fields(batch.to("meta")).values()} == {"meta"}


def test_an_unknown_option_is_refused_with_the_options(task: Task) -> None:
    with pytest.raises(BadArgument, match=r'"n_pars"; did you mean "n_pairs"\?.*there is: '):
        tasks.build(task.name, n_pars=3)


def test_an_unknown_task_is_refused_with_the_names() -> None:
    with pytest.raises(BadArgument, match='no task is called "lingre"; did you mean "linreg"'):
        tasks.build("lingre")


@pytest.mark.parametrize("shape", [{"n": 0}, {"d_active": 0}, {"d_active": 999}, {"n_pairs": 0}])
def test_a_sample_that_cannot_be_is_refused(task: Task, shape: dict[str, int]) -> None:
    name, value = next(iter(shape.items()))
    with pytest.raises(BadArgument, match=f"{name}={value}"):
        prompts(task, **shape)


def test_the_best_constant_is_the_mean_where_labels_have_one() -> None:
    """y = |z|: E[y²] = 1 is what predicting zero leaves, its variance 1 − 2/π what predicting the mean does."""
    task = tasks.build("linreg", d=2, n_pairs=8)
    batch = task.sample(500, seeds.generator("probe", 3))
    targets = torch.randn(batch.targets.shape, generator=seeds.generator("probe", 4)).abs()
    batch = dataclasses.replace(batch, targets=targets * task.scale**0.5)
    assert float(task.error(guess(task, batch), batch).mean()) == pytest.approx(1, abs=0.1)
    assert least_by_constant(task, batch) == pytest.approx(1 - 2 / torch.pi, abs=0.04)
    centred = task.sample(500, seeds.generator("probe", 3))
    assert least_by_constant(task, centred) == pytest.approx(
        float(task.error(guess(task, centred), centred).mean()), rel=0.01
    )


def test_the_best_constant_of_classes_is_the_more_frequent_one() -> None:
    task = tasks.build("outliers")
    batch = task.sample(8, seeds.generator("probe", 0))
    targets = torch.ones_like(batch.targets)
    targets[:2] = -1
    assert least_by_constant(task, dataclasses.replace(batch, targets=targets)) == pytest.approx(0.25)
