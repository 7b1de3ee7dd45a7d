"""Errors of a model: the right prompts, mode and units, and nothing left behind."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from hooks.errors import BadArgument, NonFinite
from interp import estimators, evaluate, seeds, tasks
from interp.tasks import Task


class Constant(nn.Module):
    """Predicts one learned number; notes how it was called."""

    def __init__(self, value: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=dtype))
        self.dropout = nn.Dropout(0.5)
        self.calls: list[tuple[int, bool, bool, torch.dtype]] = []

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls.append((len(tokens), self.training, torch.is_grad_enabled(), tokens.dtype))
        return self.dropout(self.value.expand(*tokens.shape[:2], 1))


def linreg(**config: object) -> Task:
    return tasks.build("linreg", **{"d": 3, "n_pairs": 7, **config})


@pytest.mark.definition
@pytest.mark.parametrize("tokens", ["interleaved", "joint"])
def test_errors_are_squared_and_divided_by_the_scale(tokens: str) -> None:
    task = linreg(tokens=tokens)
    found = evaluate.errors(Constant(2.0), task, n=10, seed=3)
    batch = task.sample(10, seeds.generator("evaluate", 3))
    torch.testing.assert_close(found, (batch.y - 2) ** 2 / 3)


@pytest.mark.definition
def test_a_solver_in_the_place_of_a_model_has_the_error_of_the_solver() -> None:
    task = linreg()

    def solve(tokens: Tensor) -> Tensor:
        x, y = tokens[:, 0::2], torch.nn.functional.pad(tokens[:, 1::2, 0], (0, 1))
        w = estimators.ols_weights(x, y)
        out = tokens.new_zeros(*tokens.shape[:2], 1)
        out[:, 0::2, 0] = (w * x).sum(-1)
        return out

    found = evaluate.errors(solve, task, n=50)
    expected = task.baselines(evaluate.prompts(task, 50))["ols"] / 3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert float(found[:, 0].mean()) > 0.5 and float(found[:, 3:].max()) < 1e-4


@pytest.mark.law
def test_the_prompts_do_not_depend_on_the_batch_size() -> None:
    model, task = Constant(1.0), linreg()
    whole = evaluate.errors(model, task, n=20, batch_size=64)
    torch.testing.assert_close(evaluate.errors(model, task, n=20, batch_size=7), whole)
    assert [call[0] for call in model.calls] == [20, 7, 7, 6]


@pytest.mark.law
def test_seeds_and_purposes_are_other_prompts() -> None:
    model, task = Constant(1.0), linreg()
    base = evaluate.errors(model, task, n=20)
    torch.testing.assert_close(evaluate.errors(model, task, n=20), base)
    assert not torch.isclose(evaluate.errors(model, task, n=20, seed=1), base).any()
    assert not torch.isclose(evaluate.errors(model, task, n=20, purpose="train"), base).any()


@pytest.mark.law
def test_given_prompts_are_used_as_they_are() -> None:
    task = linreg()
    batch = task.sample(5, seeds.generator("reference", 9), n_pairs=11)
    found = evaluate.errors(Constant(1.0), task, batch=batch)
    torch.testing.assert_close(found, (batch.y - 1) ** 2 / 3)


@pytest.mark.hygiene
def test_it_runs_in_eval_mode_without_gradients_and_puts_every_mode_back() -> None:
    model = Constant(1.0)
    model.train()
    model.dropout.eval()
    found = evaluate.errors(model, linreg(), n=4)
    assert model.calls == [(4, False, False, torch.float32)]
    assert not found.requires_grad
    assert (model.training, model.dropout.training) == (True, False)
    model.eval()
    model.dropout.train()
    evaluate.errors(model, linreg(), n=4)
    assert (model.training, model.dropout.training) == (False, True)


@pytest.mark.hygiene
def test_the_modes_come_back_when_the_model_raises() -> None:
    class Broken(Constant):
        def forward(self, tokens: Tensor) -> Tensor:
            raise RuntimeError("no")

    model = Broken()
    with pytest.raises(RuntimeError, match="no"):
        evaluate.errors(model, linreg(), n=4)
    assert model.training and model.dropout.training and torch.is_grad_enabled()


@pytest.mark.definition
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tokens_take_the_models_dtype_and_labels_keep_theirs(dtype: torch.dtype) -> None:
    model, task = Constant(1.0, dtype), linreg()
    found = evaluate.errors(model, task, n=4)
    assert model.calls[0][3] == dtype
    expected = (evaluate.prompts(task, 4).y - 1) ** 2 / 3
    torch.testing.assert_close(found.float(), expected)


@pytest.mark.law
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_number_that_is_none_is_located(wrong: float) -> None:
    def spoil(tokens: Tensor) -> Tensor:
        out = tokens.new_zeros(*tokens.shape[:2], 1)
        if len(tokens) == 2:  # the last batch: prompts 8 and 9
            out[1, 4] = wrong
        return out

    task = linreg()
    with pytest.raises(NonFinite, match="prompt 9, example 2"):
        evaluate.errors(spoil, task, n=10, batch_size=4)
    assert evaluate.errors(spoil, task, n=8, batch_size=4).isfinite().all()


@pytest.mark.statistics
def test_summary_has_the_mean_its_standard_error_and_n() -> None:
    task = linreg(n_pairs=13)
    found = evaluate.summary(Constant(0.0), task, n=400, seed=2)
    assert list(found) == [3, 6, 12]
    error = evaluate.errors(Constant(0.0), task, n=400, seed=2)
    for k, entry in found.items():
        assert entry["n"] == 400
        assert entry["error"] == pytest.approx(float(error[:, k].mean()))
        assert entry["standard_error"] == pytest.approx(float(error[:, k].std()) / 20)
        assert abs(entry["error"] - 1) < 4 * entry["standard_error"]
    assert json.loads(json.dumps(found))["12"]["n"] == 400
    assert list(evaluate.summary(Constant(), task, ks=[0, 5], n=4)) == [0, 5]


@pytest.mark.contract
def test_what_cannot_be_measured_is_refused() -> None:
    model, task = Constant(), linreg()
    with pytest.raises(BadArgument, match="k=7"):
        evaluate.summary(model, task, ks=[7], n=4)
    with pytest.raises(BadArgument, match="n=1"):
        evaluate.summary(model, task, n=1)
    with pytest.raises(BadArgument, match="batch_size=0"):
        evaluate.errors(model, task, n=4, batch_size=0)
    assert not model.calls
