"""Edits and activation checkpointing: the gradient is the one without checkpointing, or it is an error."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import hooks
from tests.hooks.conftest import build
from tests.small_transformer import small

Open = Callable[[Any], AbstractContextManager[Any]]


def shift(value: Tensor, hook: Any = None) -> Tensor:
    return value + 1.0


RESID, STATE = "blocks.0.hook_resid_post", "blocks.1.mixer.hook_state"
IDIOMS: dict[str, Open] = {
    "hooks.edit": lambda m: hooks.edit(m, {RESID: hooks.add(1.0)}),
    "a state": lambda m: hooks.edit(m, {STATE: hooks.scale(0.5)}),
    "a state, interrupted": lambda m: hooks.edit(m, {STATE: lambda h: h * 0.5}),
    "do_state": lambda m: hooks.edit(m, hooks.do_state(1, [2], 0.7)),
    "a read-out": lambda m: hooks.edit(m, {STATE: hooks.scale(0.5)}, readout_only=True),
    "model.hooks": lambda m: m.hooks(fwd_hooks=[(RESID, shift)]),
    "in place": lambda m: m.hooks(fwd_hooks=[(RESID, lambda t, hook: t.add_(1.0))]),
    "the input of all": lambda m: m.hooks(fwd_hooks=[("hook_embed", shift)]),
    "a torch hook": lambda m: m.hook_dict[RESID].register_forward_hook(lambda *call: shift(call[2])),
}
SEEN_BY_US = ("hooks.edit", "model.hooks", "in place", "the input of all", "a torch hook")
"""Those that change no tensor's shape and no number of tensors: torch sees nothing of them."""
BOTH = pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])


def again(reentrant: bool, function: Callable[..., Any], x: Tensor) -> Any:
    return checkpoint(function, x, use_reentrant=reentrant)


def gradients(model: Any, x: Tensor, run: Callable[[Tensor], None]) -> list[Tensor]:
    model.zero_grad()
    given = x.clone().requires_grad_()
    run(given)
    return [given.grad, *(p.grad for p in model.parameters() if p.grad is not None)]  # type: ignore[list-item]


def back(out: Tensor) -> None:
    out.pow(2).sum().backward()


@pytest.fixture
def short(x: Tensor) -> Tensor:
    return x[:2, :5]


@pytest.mark.edit
@BOTH
@pytest.mark.parametrize(
    ("variant", "idiom"),
    [("mamba", idiom) for idiom in IDIOMS]
    + [("s4", "a state"), ("s4", "do_state"), ("linear", "do_state")]
    + [("transformer", idiom) for idiom in SEEN_BY_US],
)
def test_the_whole_model(short: Tensor, variant: str, idiom: str, reentrant: bool) -> None:
    model = small() if variant == "transformer" else build(variant)
    edited = IDIOMS[idiom]

    def plain(x: Tensor) -> None:
        with edited(model):
            back(model(x))

    def inside(x: Tensor) -> None:
        with edited(model):
            back(again(reentrant, model, x))

    def in_the_function(x: Tensor) -> None:
        def function(x: Tensor) -> Tensor:
            with edited(model):
                return model(x)

        back(again(reentrant, function, x))

    def too_late(x: Tensor) -> None:
        with edited(model):
            out = again(reentrant, model, x)
        back(out)

    def too_early(x: Tensor) -> None:
        out = again(reentrant, model, x)
        with edited(model):
            back(out)

    expected = gradients(model, short, plain)
    assert_close(gradients(model, short, inside), expected)
    assert_close(gradients(model, short, in_the_function), expected)
    for wrong in (too_late, too_early):
        # torch itself notices where the two runs took another path; what it cannot see we say.
        with pytest.raises((hooks.RunFailed, torch.utils.checkpoint.CheckpointError)) as caught:
            gradients(model, short, wrong)
        if idiom in SEEN_BY_US or reentrant:
            message = str(caught.value)
            assert "runs" in message and "again for the backward pass" in message and "\n" not in message
    assert_close(gradients(model, short, plain), expected)


class Checkpointed(nn.Module):
    """A block that is computed again for the backward pass, as gradient checkpointing does it inside a model."""

    def __init__(self, block: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, r: Tensor, *state: Any) -> Any:
        return again(self.reentrant, lambda r: self.block(r, *state), r)


@pytest.mark.edit
@BOTH
@pytest.mark.parametrize("idiom", ["hooks.edit", "do_state", "model.hooks"])
def test_blocks_inside_the_model(short: Tensor, idiom: str, reentrant: bool) -> None:
    plain_model = build("mamba")
    edited = IDIOMS[idiom]

    def plain(x: Tensor) -> None:
        with edited(model):
            back(model(x))

    def after(x: Tensor) -> None:
        with edited(model):
            out = model(x)
        back(out)

    model = plain_model
    expected = gradients(model, short, plain)
    assert_close(gradients(model, short, after), expected)  # nothing is computed again: it is right there as well
    for i, block in enumerate(model.blocks):
        model.blocks[i] = Checkpointed(block, reentrant)
    assert_close(gradients(model, short, plain), expected)
    with pytest.raises((hooks.RunFailed, torch.utils.checkpoint.CheckpointError)):
        gradients(model, short, after)


@pytest.mark.edit
@BOTH
def test_a_part_with_several_runs_and_parts_within_parts(short: Tensor, reentrant: bool) -> None:
    """The first run unedited, the second with a mean over reference prompts, for which a third is run."""
    model = build("mamba")

    def effect(x: Tensor) -> Tensor:
        clean = model(x)
        with hooks.edit(model, {RESID: hooks.mean("batch", reference=short)}):
            return model(x) - clean

    def twice(x: Tensor) -> Any:
        return again(reentrant, effect, x * 2) + again(reentrant, model, x)

    expected = gradients(model, short, lambda x: back(effect(x * 2) + model(x)))
    assert_close(gradients(model, short, lambda x: back(again(reentrant, twice, x))), expected)


@pytest.mark.edit
@BOTH
def test_reading_is_no_edit(short: Tensor, reentrant: bool) -> None:
    model = build("mamba")
    expected = gradients(model, short, lambda x: back(model(x)))

    def read(x: Tensor) -> None:
        with model.hooks(fwd_hooks=[("*.hook_delta", lambda t, hook: None)]):
            out = again(reentrant, model, x)
        back(out)

    assert_close(gradients(model, short, read), expected)


@pytest.mark.edit
@BOTH
def test_an_edit_of_a_trace_is_not_there_again(short: Tensor, reentrant: bool) -> None:
    model = build("mamba")
    traced = hooks.nnsight(Checkpointing(model, reentrant))
    with traced.trace(short.requires_grad_()):
        point = traced.model.blocks[0].hook_resid_post
        point.output = point.output + 1.0
        out = traced.output.save()
    with pytest.raises(hooks.RunFailed, match="again for the backward pass"):
        back(out)


class Checkpointing(nn.Module):
    def __init__(self, model: Any, reentrant: bool) -> None:
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x: Tensor) -> Any:
        return again(self.reentrant, self.model, x)


class Recomputing(torch.autograd.Function):
    """Somebody else's reentrant checkpointing."""

    @staticmethod
    def forward(ctx: Any, model: Any, x: Tensor) -> Any:
        ctx.model = model
        ctx.save_for_backward(x)
        with torch.no_grad():
            return model(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            given = x.detach().requires_grad_()
            ctx.model(given).backward(grad)
        return None, given.grad


@pytest.mark.edit
def test_checkpointing_that_is_not_torch_s(short: Tensor) -> None:
    model = build("mamba")

    def run(x: Tensor) -> None:
        with hooks.edit(model, {RESID: hooks.add(1.0)}):
            back(model(x))

    def inside(x: Tensor) -> None:
        with hooks.edit(model, {RESID: hooks.add(1.0)}):
            back(Recomputing.apply(model, x))

    def after(x: Tensor) -> None:
        with hooks.edit(model, {RESID: hooks.add(1.0)}):
            out = Recomputing.apply(model, x)
        back(out)

    assert_close(gradients(model, short, inside), gradients(model, short, run))
    with pytest.raises(hooks.RunFailed, match=RESID):
        gradients(model, short, after)
