"""Every question in every dtype: what a model is fed is decided in one place, and the numbers are those of fp64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import hooks
import models
from hooks.inputs import fed
from interp import evaluate, tasks
from tests import default_device
from tests.interp.verbs import TASK, VERBS, batches, tiny, verbs_of

pytestmark = pytest.mark.contract

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *HALF)
# Some ten roundings of the largest number in the way, each of half a unit in the last place.
ROUNDING = {torch.float64: 1e-10, torch.float32: 5e-6, torch.bfloat16: 6e-2, torch.float16: 8e-3}
# Shares and ratios of differences: their own denominators are small.
LOOSE = {"swap table", "knock out", "probe", "similarity"}


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    default_device.put_back()


def answers(verb: str, model: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The answer of ``model``, and of its weights and prompts in fp64, where only the arithmetic differs."""
    batch, other = (one.to(dtype) for one in batches(16))
    found = VERBS[verb](model, batch, other)
    exact = VERBS[verb](model.to(torch.float64), batch.to(torch.float64), other.to(torch.float64))
    return found, exact


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.bfloat16, *(pytest.param(d, marks=pytest.mark.slow) for d in (torch.float32, torch.float16))],
    ids=str,
)
@pytest.mark.parametrize("verb", VERBS)
def test_a_question_has_one_answer_in_every_dtype(verb: str, dtype: torch.dtype) -> None:
    found, exact = answers(verb, tiny("mamba", dtype), dtype)
    bound = ROUNDING[dtype] * max(1.0, float(exact.abs().max())) * (8 if verb in LOOSE else 1)
    torch.testing.assert_close(found.double(), exact.double(), rtol=0, atol=bound)


@pytest.mark.parametrize("architecture", ["twin", "s4d", "s4", "linear_attention", "transformer", "theory"])
@pytest.mark.parametrize("verb", ["errors", "record", "patch", "integrated gradients", "swap", "matrix"])
def test_every_architecture_answers_in_half_precision(architecture: str, verb: str) -> None:
    if verb in verbs_of(architecture):
        found, exact = answers(verb, tiny(architecture, torch.bfloat16), torch.bfloat16)
        bound = ROUNDING[torch.bfloat16] * max(1.0, float(exact.abs().max()))
        torch.testing.assert_close(found.double(), exact.double(), rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prompts_of_a_task_are_fed_in_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    model, (batch, _) = tiny("mamba", dtype), batches()
    with torch.no_grad():
        told = model(batch.tokens.to(dtype))[:, batch.read, 0]
        assert torch.equal(TASK.predict(model, batch), told)
    assert torch.equal(evaluate.predictions(model, TASK, batch), told)
    assert torch.equal(fed(model, batch.tokens), batch.tokens.to(dtype))


def test_integers_and_what_a_plain_function_reads_are_left_as_they_are() -> None:
    lm = models.build("mamba", d_model=8, n_layers=1, head="lm", d_out=5).to(torch.bfloat16)
    tokens = torch.tensor([[0, 4]])
    assert fed(lm, tokens) is tokens
    assert fed(lambda x: x, x := torch.ones(1, 2, 3, dtype=torch.float64)) is x


@pytest.mark.parametrize("name", ["linreg", "markov", "outliers", "mqar"])
def test_a_batch_in_another_dtype_keeps_its_indices(name: str) -> None:
    task = tasks.build(name)
    batch = task.sample(3, torch.Generator().manual_seed(0))
    moved = batch.to(torch.float64)
    assert torch.equal(moved.read, batch.read) and moved.read.dtype == torch.int64
    assert torch.equal(moved.kinds, batch.kinds) and moved.kinds.dtype == torch.int64
    for before, after in zip((batch.tokens, *batch.truth.values()), (moved.tokens, *moved.truth.values()), strict=True):
        assert after.dtype == (torch.float64 if before.is_floating_point() else before.dtype)
        assert torch.equal(after, before.to(after.dtype))


@pytest.mark.parametrize("name", tasks.TASKS)
def test_prompts_do_not_depend_on_the_default_dtype(name: str) -> None:
    def drawn() -> list[Tensor]:
        task = tasks.build(name)
        batch = task.sample(4, torch.Generator().manual_seed(2))
        other = task.corrupt(batch, torch.Generator().manual_seed(3))
        parts = (batch.tokens, batch.targets, *batch.truth.values(), other.tokens)
        return [*parts, task.loss(guess(task, batch), batch)]

    before = drawn()
    torch.set_default_dtype(torch.float64)
    for left, right in zip(before, drawn(), strict=True):
        assert left.dtype == right.dtype and torch.equal(left, right)


def guess(task: Any, batch: Any) -> Tensor:
    from interp.tasks.base import guess as of

    return of(task, batch)


def test_the_first_lines_of_the_readme_run_in_fp64() -> None:
    torch.set_default_dtype(torch.float64)
    model = models.load("mamba-linreg")
    task = tasks.build(model.card["task"], **model.card["task_config"])
    for dtype in (torch.float32, torch.float64):
        model = model.to(dtype)
        batch = task.sample(8, torch.Generator().manual_seed(1)).fed(model)
        record = hooks.record(model, batch.tokens, "*.hook_delta")
        assert record.stack("*.hook_delta").dtype == batch.tokens.dtype
        clean = task.loss(task.predict(model, batch), batch)[:, 10].mean()
        with hooks.edit(model, {"*.hook_delta": hooks.mean(over=("batch", "pos"))}):
            fixed = task.loss(task.predict(model, batch), batch)[:, 10].mean()
        assert 10 * clean < fixed


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_a_model_is_built_in_the_default_dtype(architecture: str) -> None:
    torch.set_default_dtype(torch.float64)
    model = models.build(architecture)
    assert {weight.dtype for weight in model.parameters()} == {torch.float64}
    x = torch.randn(2, 5, model.embed.expects)
    assert model(x).dtype == torch.float64
