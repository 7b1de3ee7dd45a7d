"""The contract of a task whose tokens are integers, over every such task; ``test_tasks`` has that of the others."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
from hooks.errors import BadArgument, NonFinite
from interp import evaluate, seeds, tasks
from interp.tasks import Batch, TokenTask
from interp.tasks.base import guess, least_by_constant, model_shape, outputs

pytestmark = pytest.mark.contract

# Configurations beside the default in which a task is worth testing.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "markov": [
        {"order": 2, "n_symbols": 3, "beta": 0.5, "n_pairs": 24},
        {"switch": 0.2, "n_pairs": 40},
        {"n_pairs": 1},
    ],
    "mqar": [{"n_keys": 60, "n_pairs": 4, "length": 16, "power": 1.0}, {"n_pairs": 1, "n_values": 2, "n_filler": 1}],
    "selective_copy": [{"n_pairs": 5, "length": 5, "n_symbols": 4}, {"n_pairs": 1, "n_symbols": 3}],
}
# Tasks of which ``corrupt`` draws the answers at random, so that some stay as they were.
DRAWN = {"markov"}
# Values that a task must refuse, with what the refusal has to say.


NAMES = [name for name in tasks.names() if isinstance(tasks.build(name), TokenTask)]
CASES = [
    pytest.param((name, config), id=f"{name}-{'-'.join(map(str, config.values())) or 'default'}")
    for name in NAMES
    for config in [{}, *VARIANTS.get(name, [])]
]


@pytest.fixture(params=CASES)
def task(request: pytest.FixtureRequest) -> TokenTask:
    name, config = request.param
    built = tasks.build(name, **config)
    assert isinstance(built, TokenTask)
    return built


def prompts(task: TokenTask, n: int = 6, seed: int = 0, **shape: int) -> Batch:
    return task.sample(n, seeds.generator("evaluate", seed), **shape)


def fields(batch: Batch) -> dict[str, Tensor]:
    """Every tensor of a batch by name."""
    named = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return named | {f"truth.{name}": value for name, value in batch.truth.items()}


def assert_equal(one: Batch, other: Batch) -> None:
    torch.testing.assert_close(fields(one), fields(other), rtol=0, atol=0)


def sure(task: TokenTask, batch: Batch, confidence: float = 40.0) -> Tensor:
    """Log-probabilities of a predictor that knows every answer."""
    return (confidence * nn.functional.one_hot(batch.targets, task.vocabulary).float()).log_softmax(-1)


class RunningMean(nn.Module):
    """A causal language model: a linear map of the mean embedding of the tokens so far."""

    def __init__(self, task: TokenTask) -> None:
        super().__init__()
        self.table = nn.Embedding(task.vocabulary, 5)
        self.head = nn.Linear(5, task.d_out)

    def forward(self, tokens: Tensor) -> Tensor:
        count = torch.arange(1, tokens.shape[1] + 1)
        return self.head(self.table(tokens).cumsum(dim=1) / count[:, None])


def test_it_has_all_the_fields_and_its_config_builds_it_again(task: TokenTask) -> None:
    assert task.name in tasks.names()
    assert task.d == task.d_token == 1 and task.d_out == task.vocabulary > 1
    assert task.scale == 1.0 and task.metric and task.kinds and not task.query_only
    assert task.report_ks and set(task.report_ks) <= set(range(task.n_pairs))
    kept = json.loads(json.dumps(task.config))
    again = tasks.build(task.name, **kept)
    assert again.config == task.config == kept
    assert_equal(prompts(again), prompts(task))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [{}, {"d_active": 1}, {"n_pairs": 2}, {"n_pairs": 30}])
def test_shapes(task: TokenTask, shape: dict[str, int]) -> None:
    batch = prompts(task, **shape)
    n_pairs = shape.get("n_pairs", task.n_pairs)
    assert batch.tokens.dtype == torch.long and batch.tokens.ndim == 2 and len(batch) == 6
    assert batch.targets.shape == batch.y.shape == (6, n_pairs) and batch.x.shape == (6, n_pairs, 1)
    for tokens in (batch.tokens, batch.targets):
        assert int(tokens.min()) >= 0 and int(tokens.max()) < task.vocabulary
    read = batch.read.expand(6, -1)
    assert read.shape == (6, n_pairs) and (read.diff(dim=1) > 0).all()
    assert torch.equal(batch.tokens.gather(1, read), batch.x[..., 0])
    assert batch.kinds.expand(6, -1).shape == batch.tokens.shape
    assert set(batch.kinds.unique().tolist()) <= set(range(len(task.kinds)))
    assert all(len(value) == 6 for value in batch.truth.values())


def test_a_sample_is_its_generators_and_nothing_elses(task: TokenTask) -> None:
    before = torch.random.get_rng_state()
    first = prompts(task, n=20)
    torch.testing.assert_close(torch.random.get_rng_state(), before)
    assert_equal(first, prompts(task, n=20))
    assert not torch.equal(first.targets, prompts(task, n=20, seed=1).targets)
    assert len(torch.unique(torch.cat([first.tokens, first.targets], dim=1), dim=0)) > 1


def test_corrupt_keeps_the_shape_and_draws_the_answers_anew(task: TokenTask) -> None:
    batch = prompts(task, n=20)
    kept = {name: value.clone() for name, value in fields(batch).items()}
    corrupted = task.corrupt(batch, seeds.generator("corrupt", 0))
    torch.testing.assert_close(fields(batch), kept, rtol=0, atol=0)
    for name, value in fields(corrupted).items():
        assert value.shape == kept[name].shape and value.dtype == kept[name].dtype
    changed = corrupted.targets != batch.targets
    assert changed.any() if task.name in DRAWN else changed.all()
    if task.name not in DRAWN:
        for name in ("x", "read", "kinds"):
            assert torch.equal(getattr(corrupted, name), getattr(batch, name))
    assert_equal(corrupted, task.corrupt(batch, seeds.generator("corrupt", 0)))


def test_loss_is_nats_of_each_prompt_and_example(task: TokenTask) -> None:
    batch = prompts(task)
    right = sure(task, batch)
    for measure in (task.loss, task.error):
        torch.testing.assert_close(measure(right, batch), torch.zeros(6, task.n_pairs))
    wrong = right.clone()
    wrong[2, -1] = wrong[2, -1].roll(1)
    torch.testing.assert_close(task.loss(wrong, batch)[2, -1], torch.tensor(40.0))
    assert int((task.error(wrong, batch) > 0.5).sum()) == 1
    even = guess(task, batch)
    torch.testing.assert_close(even.exp().sum(-1), torch.ones(6, task.n_pairs))
    torch.testing.assert_close(task.loss(even, batch), torch.full((6, task.n_pairs), math.log(task.vocabulary)))


def test_the_best_constant_says_the_frequencies(task: TokenTask) -> None:
    """Three of one symbol to one of another: the entropy in nats, a quarter of wrong symbols."""
    batch = prompts(task, n_pairs=4)
    targets = torch.zeros_like(batch.targets)
    targets[:, -1] = 1
    found = least_by_constant(task, dataclasses.replace(batch, targets=targets))
    nats = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert found == pytest.approx(nats if task.metric.startswith("nats") else 0.25, rel=1e-5)


def test_loss_refuses_another_shape(task: TokenTask) -> None:
    batch = prompts(task, n_pairs=3)
    right = sure(task, batch)
    for bad in (right[:, :1], right[..., :-1]):
        with pytest.raises(BadArgument, match="one prediction for each example"):
            task.loss(bad, batch)
        with pytest.raises(BadArgument, match="one prediction for each example"):
            task.error(bad, batch)


def test_a_plain_function_is_a_model_and_trains(task: TokenTask) -> None:
    batch, model = prompts(task), RunningMean(task)
    prediction = task.predict(model, batch)
    assert prediction.shape == (*batch.targets.shape, task.vocabulary)
    torch.testing.assert_close(prediction.exp().sum(-1), torch.ones(batch.targets.shape))
    trained = task.training_loss(model, batch, seeds.generator("train", 0))
    torch.testing.assert_close(trained, task.loss(prediction, batch))
    trained.mean().backward()
    assert model.head.weight.grad is not None and model.head.weight.grad.any()
    logits = model(batch.tokens)
    for b, k in ((0, 0), (5, task.n_pairs - 1)):
        at = int(batch.read.expand(6, -1)[b, k])
        torch.testing.assert_close(prediction[b, k], logits[b, at].log_softmax(-1))


@pytest.mark.parametrize(
    "architecture",
    ["mamba", "transformer", *(pytest.param(name, marks=pytest.mark.slow) for name in ("s4d", "linear_attention"))],
)
def test_a_language_model_of_every_architecture_fits_it(task: TokenTask, architecture: str) -> None:
    model = models.build(architecture, d_model=8, n_layers=1, **model_shape(task))
    found = evaluate.errors(model, task, n=4)
    assert found.shape == (4, task.n_pairs) and found.isfinite().all()
    last = evaluate.errors(model, task, n=4, query_only=True)
    torch.testing.assert_close(last, found[:, -1:])
    summary = evaluate.summary(model, task, n=4)
    assert list(summary) == list(task.report_ks)
    for k, cell in summary.items():
        assert cell["error"] == pytest.approx(float(found[:, k].double().mean()), rel=1e-5)


def test_a_model_that_is_no_language_model_of_this_vocabulary_is_refused(task: TokenTask) -> None:
    tokens = prompts(task).tokens
    for other in ({"d_in": 1, "d_out": task.d_out}, {"head": "lm", "d_out": task.d_out + 1}):
        model = models.build("mamba", d_model=8, n_layers=1, **other)
        with pytest.raises(BadArgument, match=f'build the model with head="lm", d_out={task.d_out}'):
            outputs(model, tokens, task.d_out)
    with pytest.raises(BadArgument, match='head="lm"'):
        outputs(lambda tokens: torch.zeros(*tokens.shape, 1), tokens, task.d_out)


def test_a_number_that_is_none_is_located(task: TokenTask) -> None:
    def spoil(tokens: Tensor) -> Tensor:
        out = torch.zeros(*tokens.shape, task.d_out)
        out[1] = torch.nan
        return out

    with pytest.raises(NonFinite, match="prompt 1, example 0 is nan"):
        evaluate.errors(spoil, task, n=4)


def test_variables_and_baselines_have_the_axes_that_they_promise(task: TokenTask) -> None:
    batch = prompts(task)
    for name, value in task.variables(batch).items():
        assert len(value) == 6 and value.isfinite().all(), name
    for name, value in task.baselines(batch).items():
        assert value.shape == batch.targets.shape and value.isfinite().all(), name


def test_take_last_and_to_keep_prompts_whole(task: TokenTask) -> None:
    batch = prompts(task)
    part = fields(batch.take(torch.tensor([4, 1])))
    for name, whole in fields(batch).items():
        shared = name in ("read", "kinds") and whole.ndim == 1
        torch.testing.assert_close(part[name], whole if shared else whole[[4, 1]])
    assert batch.last().read.expand(6, -1).shape == batch.last().targets.shape == (6, 1)
    assert {value.device.type for value in fields(batch.to("meta")).values()} == {"meta"}


@pytest.mark.parametrize("shape", [{"n": 0}, {"d_active": 0}, {"d_active": 2}, {"n_pairs": 0}])
def test_a_sample_that_cannot_be_is_refused(task: TokenTask, shape: dict[str, int]) -> None:
    name, value = next(iter(shape.items()))
    with pytest.raises(BadArgument, match=f"{name}={value}"):
        prompts(task, **shape)
