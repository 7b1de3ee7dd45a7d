"""NaN and inf in gradients: an error that says where, in every verb that gives gradients; and none where they are 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hooks
from hooks.errors import NonFinite
from interp import attribute
from interp.attention.tokens import contributions
from interp.states import reach
from tests.interp.recurrences import VARIANTS, build
from tests.tolerances import assert_matches

pytestmark = pytest.mark.law

MIXER = "blocks.1.mixer."
BENT = {MIXER + "hook_y": hooks.Edit("a root at 0", lambda y, whole, site: y + (0 * y).sqrt(), pos=3)}
"""Changes no number, and its slope at 0 is inf · 0: the gradient is NaN for what goes into ``hook_y``, not before."""


def number(output: Tensor) -> Tensor:
    return output[:, -1].square().sum(-1)


def with_hooks(model: Any, x: Tensor) -> None:
    with model.hooks(bwd_hooks=[(MIXER + "hook_x", lambda grad, hook: None)]):
        model(x).sum().backward()


def with_edited_gradients(model: Any, x: Tensor) -> None:
    with hooks.edit(model, {}, backward={MIXER + "hook_x": lambda grad: grad}):
        model(x).sum().backward()


def with_caching_hooks(model: Any, x: Tensor) -> None:
    try:
        model.add_caching_hooks(MIXER + "hook_x", incl_bwd=True)
        model(x).sum().backward()
    finally:
        model.reset_hooks()


VERBS: dict[str, Callable[[Any, Tensor], Any]] = {
    "gradients": lambda m, x: attribute.gradients(m, x, MIXER + "hook_x", number),
    "gradient_x_activation": lambda m, x: attribute.gradient_x_activation(m, x, "*.hook_x", number),
    "attribution_patching": lambda m, x: attribute.attribution_patching(m, x, x + 1, MIXER + "hook_x", number),
    "integrated_gradients": lambda m, x: attribute.integrated_gradients(m, x, MIXER + "hook_x", number, steps=2),
    "record": lambda m, x: hooks.record(m, x, MIXER + "hook_x", grad=True).output.sum().backward(),
    "model.hooks": with_hooks,
    "hooks.edit": with_edited_gradients,
    "add_caching_hooks": with_caching_hooks,
    "contributions": lambda m, x: contributions(m, x, 0, scalar=number),
    "reach": lambda m, x: reach(m, x, 4),
}
TRACED = ("gradients", "gradient_x_activation", "attribution_patching", "contributions")
"""Those that repeat the run to say where it first appears."""


@pytest.mark.parametrize("verb", VERBS)
def test_a_gradient_of_nan_is_an_error_that_says_where(verb: str) -> None:
    model, x = build("mamba"), torch.randn(3, 6, 5, dtype=torch.float64)
    VERBS[verb](model, x)
    edits = BENT if verb != "reach" else {"blocks.0.mixer.hook_y": BENT[MIXER + "hook_y"]}
    with (
        hooks.edit(model, edits),
        pytest.raises(NonFinite, match=r"^the gradient at blocks\.[^\n]+ holds NaN at \(") as error,
    ):
        VERBS[verb](model, x)
    message = str(error.value)
    if verb in TRACED:
        assert "; on the way back from the output first seen at blocks.1.mixer.hook_state (NaN at (" in message
    elif verb not in ("reach", "contributions"):
        assert message.startswith(f"the gradient at {MIXER}hook_x holds NaN")
    VERBS[verb](model, x)


def test_a_cache_with_gradients_says_where_it_first_appears() -> None:
    model, x = build("mamba"), torch.randn(1, 1, 5, dtype=torch.float64)
    with torch.no_grad():
        model.head.linear.weight = torch.nn.Parameter(model.head.linear.weight[:1])
        model.head.linear.bias = torch.nn.Parameter(model.head.linear.bias[:1])
    model.run_with_cache(x, names_filter="*.hook_x", incl_bwd=True)
    edit = {MIXER + "hook_y": hooks.Edit("a root at 0", lambda y, whole, site: y + (0 * y).sqrt())}
    with hooks.edit(model, edit), pytest.raises(NonFinite) as error:
        model.run_with_cache(x, names_filter="*.hook_x", incl_bwd=True)
    assert str(error.value).startswith(f"the gradient at {MIXER}hook_x holds NaN at (0, 0, ")
    assert "; on the way back from the output first seen at blocks.1.mixer.hook_state (NaN at (0, 0, " in str(
        error.value
    )


@pytest.mark.parametrize("how", ["fused", "states", "everything", "create_graph"])
@pytest.mark.parametrize("variant", ["mamba", "lti"])
def test_a_rate_that_overflows_forgets_at_once_and_has_no_gradient(variant: str, how: str) -> None:
    """exp(100) is inf in fp32: the decay is 0, as it is for exp(80), which is a number; all gradients are the same."""
    x = torch.randn(3, 20, 5)
    kinds = {"states": ["*.hook_state"], "everything": ["*.hook_decay", "*.hook_state"]}.get(how, ["*.hook_y"])

    def slopes(rate: float) -> dict[str, Tensor]:
        model = build(variant, torch.float32)
        with torch.no_grad():
            for block in model.blocks:
                block.mixer.A_log[::2, 1:] = rate
        tokens = x.clone().requires_grad_()
        names = ["tokens", *(name for name, _ in model.named_parameters())]
        output = hooks.record(model, tokens, kinds, grad=True).output
        leaves = [tokens, *model.parameters()]
        found = torch.autograd.grad(output.square().sum(), leaves, create_graph=how == "create_graph")
        if how == "create_graph":
            found = torch.autograd.grad(sum(slope.square().sum() for slope in found), leaves, allow_unused=True)
        return {name: slope for name, slope in zip(names, found, strict=True) if slope is not None}

    expected = slopes(80.0)
    assert all(bool(slope.isfinite().all()) for slope in expected.values())
    for name, slope in slopes(100.0).items():
        assert_matches(slope, expected[name], name)
        if name.endswith("A_log"):
            assert not bool(slope[::2, 1:].any()) and bool(slope[1::2].all())


def test_gradients_inside_verbs_of_every_architecture_are_finite() -> None:
    for variant in VARIANTS:
        model, x = build(variant), torch.randn(2, 5, 5, dtype=torch.float64)
        _, slopes = attribute.gradients(model, x, "*.hook_x", lambda out: out[:, -1].sum(-1))
        assert all(bool(slope.isfinite().all()) for slope in slopes.values())
