"""Natural mistakes: what was asked, what there is, what to try; the same wherever the input goes in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hooks
import models
from hooks import inputs
from hooks.errors import BadArgument
from interp import attention, attribute, patch
from interp.patch.knockout import left
from tests.interp.verbs import VERBS, batches, last, tiny

pytestmark = pytest.mark.contract

ROOT = Path(__file__).resolve().parents[2]
INTO: dict[str, Callable[[Any, Any], Any]] = {
    "model": lambda m, x: m(x),
    "run_with_cache": lambda m, x: m.run_with_cache(x),
    "record": lambda m, x: hooks.record(m, x),
    "show": lambda m, x: hooks.show(m, x),
    "patch": lambda m, x: patch.activations(m, x, x, "*.hook_x", last),
    "swap": lambda m, x: patch.swap_states(m, x, x, 1),
    "knock out": lambda m, x: left(m, x, [(0, 1)]),
    "gradients": lambda m, x: attribute.gradients(m, x, "*.hook_x", last),
    "attribution patching": lambda m, x: attribute.attribution_patching(m, x, x, "*.hook_x", last),
    "integrated gradients": lambda m, x: attribute.integrated_gradients(m, x, "hook_embed", last),
    "matrix": lambda m, x: attention.matrix(m, x, 0),
    "contributions": lambda m, x: attention.contributions(m, x, 0, scalar=last),
}


@pytest.mark.parametrize("verb", INTO)
@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (lambda x: x.double(), r"float64 and the model's weights are float32: try x\.to\(torch\.float32\)"),
        (lambda x: x.long(), r"int64 and the model's weights are float32: try x\.to\(torch\.float32\)"),
        (lambda x: x[0], r"takes \(batch, pos, 2\), .* has shape \(9, 2\): one prompt is x\[None\]"),
        (lambda x: x[..., :1], r"takes \(batch, pos, 2\), .* has shape \(8, 9, 1\)"),
        (lambda x: x[:0], "at least one prompt of one token"),
    ],
    ids=["fp64", "integers", "single", "narrow", "empty"],
)
def test_a_wrong_input_is_told_with_what_to_try(verb: str, mistake: Callable[[Tensor], Tensor], says: str) -> None:
    with pytest.raises(BadArgument, match=says):
        INTO[verb](tiny("mamba"), mistake(batches()[0].tokens))


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.ones(2, 3), r"float32 and the model reads tokens, 0 to 4: try x\.long\(\)"),
        (torch.tensor([[0, 5]]), "holds the token 5, and the model's vocabulary is 0 to 4"),
        (torch.tensor([[0, -1]]), "holds the token -1"),
        (torch.tensor([0, 1]), r"one prompt is x\[None\]"),
    ],
    ids=["real", "beyond", "negative", "single"],
)
def test_tokens_are_told_as_tokens(x: Tensor, says: str) -> None:
    model = models.build("mamba", d_model=8, n_layers=1, head="lm", d_out=5)
    with pytest.raises(BadArgument, match=says):
        hooks.record(model, x)


def test_what_is_no_tensor_is_told_with_the_call_that_makes_one() -> None:
    weight = torch.ones(1, dtype=torch.float64)
    with pytest.raises(BadArgument, match=r"a list of 1, not a tensor: try torch\.as_tensor\(x, dtype"):
        inputs.tensor([[[0.5]]], weight)
    with pytest.raises(BadArgument, match=r"a ndarray of shape \(2, 3\) and float64, not a tensor"):
        inputs.tensor(torch.ones(2, 3, dtype=torch.float64).numpy(), weight)


def test_a_step_takes_one_token_of_each_prompt() -> None:
    with pytest.raises(BadArgument, match=r"step takes one token of each prompt, \(batch, 2\)"):
        tiny("mamba").step(batches()[0].tokens)


def test_a_state_of_another_kind_is_refused() -> None:
    model, x = tiny("mamba"), batches()[0].tokens
    _, state = model(x, return_state=True)
    with pytest.raises(BadArgument, match="what return_state=True returned, one part a layer"):
        model.check_input(x, list(state[0]))  # one layer's two parts, and the model has two layers


@pytest.mark.parametrize("verb", [verb for verb in INTO if verb not in ("model", "run_with_cache")])
def test_a_wrapper_is_told_where_the_model_is(verb: str) -> None:
    wrapped = torch.nn.DataParallel(tiny("mamba"))
    with pytest.raises(BadArgument, match=r"a DataParallel has no sites: it wraps a Mamba: give model\.module"):
        INTO[verb](wrapped, batches()[0].tokens)


@pytest.mark.parametrize(
    "verb",
    [
        "record",
        "swap",
        *(pytest.param(v, marks=pytest.mark.slow) for v in ("patch", "knock out", "matrix", "edit, add")),
    ],
)
def test_a_compiled_model_answers_as_the_one_inside(verb: str) -> None:
    model, (batch, other) = tiny("mamba"), batches()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(VERBS[verb](compiled, batch, other), VERBS[verb](model, batch, other))


@pytest.mark.parametrize("verb", ["record", "patch", "swap", "integrated gradients"])
def test_a_model_that_accelerate_has_prepared_answers(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # A process has one precision for all that it prepares, which other tests have chosen or will choose.
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    model, (batch, other) = tiny("mamba"), batches()
    expected = VERBS[verb](model, batch, other)
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model, evaluation_mode=True)
    found = VERBS[verb](prepared, batch, other).to(expected.dtype)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_a_backward_pass_of_the_cache_starts_at_one_number() -> None:
    model, x = tiny("mamba"), batches()[0].tokens
    with pytest.raises(BadArgument, match=r"which is a Tensor of shape \(8, 9, 1\) and float32 and not one number"):
        model.run_with_cache(x, incl_bwd=True)
    with torch.no_grad(), pytest.raises(BadArgument, match=r"torch\.no_grad\(\) is on"):
        model.run_with_cache(x[:1, :1], incl_bwd=True)
    _, cache = model.run_with_cache(x[:1, :1], names_filter="*.hook_x", incl_bwd=True)
    assert "blocks.0.mixer.hook_x_grad" in cache


GRADIENTS = ("gradients", "attribution patching", "integrated gradients", "contributions")


@pytest.mark.parametrize("verb", GRADIENTS)
def test_attribution_in_inference_mode_has_one_reason(verb: str) -> None:
    model, x = tiny("mamba"), batches()[0].tokens
    with torch.inference_mode(), pytest.raises(BadArgument, match=r"needs gradients: torch\.inference_mode\(\) is on"):
        INTO[verb](model, x)
    with torch.no_grad():
        INTO[verb](model, x)


def test_a_record_that_should_keep_its_graph_is_refused_in_inference_mode() -> None:
    with torch.inference_mode(), pytest.raises(BadArgument, match="needs gradients"):
        hooks.record(tiny("mamba"), batches()[0].tokens, grad=True)


@pytest.mark.parametrize("architecture", ["mamba", "s4d", "linear_attention"])
def test_what_needs_no_gradient_of_the_model_works_in_inference_mode(architecture: str) -> None:
    model, (batch, other) = tiny(architecture), batches()
    for verb in ("matrix", "contributions, weights", "patch", "swap", "knock out"):
        expected = VERBS[verb](model, batch, other)
        with torch.inference_mode():
            assert torch.equal(VERBS[verb](model, batch, other), expected), verb


@pytest.mark.parametrize("name", ["models", "hooks", "interp"])
def test_a_folder_of_the_same_name_in_the_working_directory_is_told(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("x = 1\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "analyses.ablate_delta", "--quick"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2 and not run.stdout
    assert run.stderr.count("\n") == 1
    assert f'error: "import {name}" finds' in run.stderr and "from another folder" in run.stderr
