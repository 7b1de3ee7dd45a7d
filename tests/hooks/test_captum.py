"""captum works on hook points, also on the 4-D ones, without a switch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import LayerActivation, LayerGradientXActivation, LayerIntegratedGradients
from torch import Tensor

import hooks
import models

LAYER = "blocks.1.mixer."
SITES = ["hook_x_in", "hook_delta", "hook_B", "hook_decay", "hook_write", "hook_state", "hook_y", "hook_out"]


@pytest.mark.hygiene
@pytest.mark.parametrize("kind", SITES)
def test_layer_activation_reads_the_site(
    make: Callable[..., Any],
    x: Tensor,
    leftovers: Callable[[Any], list[str]],
    count_fused: Callable[[], int],
    kind: str,
) -> None:
    model = make()
    expected = hooks.record(model, x, LAYER + kind)[LAYER + kind]
    found = LayerActivation(model, model.hook_dict[LAYER + kind]).attribute(x)
    torch.testing.assert_close(found, expected)
    assert leftovers(model) == []
    count_fused()
    model(x)
    assert count_fused() == 2


@pytest.mark.hygiene
@pytest.mark.parametrize("variant", ["mamba", "lti", "s4d"])
def test_gradient_times_activation(make: Callable[..., Any], x: Tensor, variant: str) -> None:
    model = make(variant)

    def last(tokens: Tensor) -> Tensor:
        return model(tokens)[:, -1, 0]

    for kind in ("hook_delta", "hook_write", "hook_state"):
        name = LAYER + kind
        found = LayerGradientXActivation(last, model.hook_dict[name]).attribute(x)
        values = hooks.record(model, x, name, grad=True)
        gradient = torch.autograd.grad(values.output[:, -1, 0].sum(), values[name])[0]
        torch.testing.assert_close(found, gradient * values[name])
        assert bool(found.any())


@pytest.mark.law
@pytest.mark.parametrize("kind", ["hook_delta", "hook_B", "hook_write", "hook_state"])
def test_trap_12_integrated_gradients_are_complete_against_the_sites_own_baseline(
    make: Callable[..., Any], x: Tensor, kind: str
) -> None:
    """captum's own convergence delta compares whole inputs, which says nothing about an interior site."""
    model, name = make(), LAYER + kind
    baseline = torch.zeros_like(x)

    def last(tokens: Tensor) -> Tensor:
        return model(tokens)[:, -1, 0]

    method = LayerIntegratedGradients(last, model.hook_dict[name])
    found = method.attribute(x, baselines=baseline, n_steps=40, method="gausslegendre")
    start = hooks.record(model, baseline, name)[name]
    with hooks.edit(model, {name: hooks.set_to(start)}, readout_only=kind == "hook_state"):
        without = last(x)
    gap = last(x) - without
    torch.testing.assert_close(found.flatten(1).sum(1), gap, rtol=1e-5, atol=1e-8)
    assert bool((gap.abs() > 1e-4).any())
    whole = last(x) - last(baseline)
    assert not torch.allclose(found.flatten(1).sum(1), whole, rtol=1e-2), "the comparison that captum makes"


@pytest.mark.hygiene
@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_the_layer_methods_work_on_whole_blocks(architecture: str, x: Tensor) -> None:
    model = models.build(architecture, d_in=x.shape[-1]).to(x.dtype).eval()

    def last(tokens: Tensor) -> Tensor:
        return model(tokens)[:, -1, 0]

    block, name = model.blocks[0], "blocks.0.hook_resid_post"
    expected = hooks.record(model, x, name)[name]
    torch.testing.assert_close(LayerActivation(last, block).attribute(x), expected)
    values = hooks.record(model, x, name, grad=True)
    (slope,) = torch.autograd.grad(values.output[:, -1, 0].sum(), values[name])
    found = LayerGradientXActivation(last, block).attribute(x)
    torch.testing.assert_close(found, slope * values[name].detach())
    assert bool(found.any())
