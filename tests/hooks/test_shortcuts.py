"""Shortcuts of the mixer: taken only where nobody can tell, apart from the time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nnsight import NNsight
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

import hooks
from hooks.onlookers import only_read, plain_linear

LAYER = "blocks.1.mixer."


@pytest.mark.hygiene
def test_a_state_that_is_only_recorded_is_read_out_in_the_scan(make: Callable[..., Any], x: Tensor) -> None:
    """Recording may not wait for the point; anything that could write, or wants a gradient, makes the mixer wait."""
    model = make()
    point = model.hook_dict[LAYER + "hook_state"]
    seen: list[bool] = []
    asked = only_read

    def asking(at: nn.Module) -> bool:
        seen.append(asked(at))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.mamba.only_read", asking)
        recorded = hooks.record(model, x, LAYER + "hook_state")
        assert seen == [True] and not only_read_by_nobody(point)
        doubled = point.add_hook(lambda value, hook: value * 2)
        twice = hooks.record(model, x, [LAYER + "hook_state", LAYER + "hook_y"])
        assert seen == [True, False], "a hook that may write is on the point"
        doubled.hook.remove()
        point.fwd_hooks.clear()
    clean = hooks.record(model, x, LAYER + "hook_y")
    torch.testing.assert_close(twice[LAYER + "hook_y"], 2 * clean[LAYER + "hook_y"])
    torch.testing.assert_close(recorded.output, model(x))


def only_read_by_nobody(point: Any) -> bool:
    """Whether a reader has been left on ``point``."""
    return bool(point._forward_hooks or point.readers)


@pytest.mark.hygiene
def test_a_recorded_state_has_the_gradient_of_its_read_out(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    found = hooks.record(model, x, LAYER + "hook_state", grad=True)
    (gradient,) = torch.autograd.grad(found.output.sum(), found[LAYER + "hook_state"])
    assert gradient.abs().sum() > 0


@pytest.mark.hygiene
def test_the_two_branches_are_computed_apart_unless_their_projection_is_looked_at(
    make: Callable[..., Any], x: Tensor
) -> None:
    """Hooks, global hooks, a subclass, another forward and a trace on ``in_proj`` are all served."""
    model = make()
    linear, clean = model.blocks[1].mixer.in_proj, model(x)
    assert plain_linear(linear)
    for register in (linear.register_forward_hook, linear.register_forward_pre_hook):
        handle = register(lambda *given: None)
        assert not plain_linear(linear)
        torch.testing.assert_close(model(x), clean)
        handle.remove()
    handle = torch_module.register_module_forward_hook(lambda module, args, out: None)
    assert not plain_linear(linear)
    handle.remove()

    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model.blocks[1].mixer.in_proj = Doubled(linear.in_features, linear.out_features, bias=False)
    model.blocks[1].mixer.in_proj.weight = linear.weight
    doubled = model(x)
    assert not torch.allclose(doubled, clean)
    model.blocks[1].mixer.in_proj = linear
    linear.forward = lambda r: 2 * nn.functional.linear(r, linear.weight)
    torch.testing.assert_close(model(x), doubled)
    del linear.forward
    assert plain_linear(linear)
    wrapped = NNsight(model)
    with wrapped.trace(x):
        seen = wrapped.blocks[1].mixer.in_proj.output.save()
        wrapped.blocks[1].mixer.in_proj.output = seen * 2
        traced = wrapped.output.save()
    assert seen.shape[-1] == linear.out_features
    torch.testing.assert_close(traced, doubled)
