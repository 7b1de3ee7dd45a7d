"""A variant as an edit is the model of that config with the same weights; what is no variant is refused."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import hooks
import models
from analyses.feature_learning.variants import VARIANTS, ablated, edits, variant_of
from hooks.errors import BadArgument


def build() -> Any:
    model = models.build("mamba", d_model=8, n_layers=3, d_state=4, d_in=5, d_out=1).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def tokens(n: int = 4) -> Tensor:
    return torch.randn(n, 9, 5, dtype=torch.float64)


def twin(model: Any, variant: str) -> Any:
    other = models.build("mamba", **{**asdict(model.cfg), **VARIANTS[variant]}).double().eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.edit
@pytest.mark.parametrize("variant", ["tangent-step", "linear-gate"])
def test_an_ablated_model_is_its_config_with_the_same_weights(variant: str) -> None:
    model, x = build(), tokens()
    expected, clean = twin(model, variant)(x), model(x)
    for exposed in (False, True):
        with ablated(model, variant), hooks.expose(model) if exposed else torch.no_grad():
            torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-11)
            walked, state = model(x[:, :6], return_state=True)[1], None
            for t in range(6, 9):
                out, walked = model.step(x[:, t], walked)
                torch.testing.assert_close(out, expected[:, t], rtol=1e-9, atol=1e-11)
            assert state is None
    assert not torch.allclose(clean, expected) and torch.equal(model(x), clean), "nothing is left behind"


@pytest.mark.edit
def test_a_constant_step_is_the_mean_over_the_reference_prompts() -> None:
    model, x = build(), tokens()
    means = hooks.record(model, tokens(16), "*.hook_delta")
    with ablated(model, "constant-step", means):
        found = hooks.record(model, x, ["*.hook_delta_decay", "*.hook_delta_write"])
        one = model.step(x[:, 0])[0]
        torch.testing.assert_close(one, model(x)[:, 0])
    for name, value in found.items():
        mean = means[name.replace("_decay", "").replace("_write", "")].mean((0, 1))
        torch.testing.assert_close(value, mean.expand_as(value))


@pytest.mark.edit
def test_the_gate_of_a_later_layer_is_of_this_run() -> None:
    """Layer 2's z follows from what the edit has made of layers 0 and 1."""
    model, x = build(), tokens()
    clean = hooks.record(model, x, "blocks.2.mixer.hook_gate_pre")["blocks.2.mixer.hook_gate_pre"]
    with ablated(model, "linear-gate"):
        found = hooks.record(model, x, ["blocks.2.mixer.hook_gate_pre", "blocks.2.mixer.hook_gate"])
    pre, gate = found["blocks.2.mixer.hook_gate_pre"], found["blocks.2.mixer.hook_gate"]
    assert torch.equal(pre, gate) and not torch.allclose(pre, clean)


@pytest.mark.contract
def test_none_changes_nothing() -> None:
    model, x = build(), tokens()
    clean = model(x)
    with ablated(model, None):
        assert torch.equal(model(x), clean)


@pytest.mark.contract
def test_configs_are_told_apart() -> None:
    shape = {"d_model": 8, "n_layers": 1, "d_in": 2}
    assert variant_of(models.build("mamba", **shape).cfg) is None
    for name, change in VARIANTS.items():
        assert variant_of(models.build("mamba", **shape, **change).cfg) == name
    with pytest.raises(BadArgument, match="none of constant-step"):
        variant_of(models.build("mamba", **shape, step="tangent", gate="linear").cfg)
    with pytest.raises(BadArgument, match="nor the published Mamba"):
        variant_of(SimpleNamespace(d_model=8))
    with pytest.raises(BadArgument, match=r'"tangent".*tangent-step'):
        edits(build(), "tangent")
    with pytest.raises(BadArgument, match="a record of their hook_delta"):
        edits(build(), "constant-step")
