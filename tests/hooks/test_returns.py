"""What a plain hook may return, at every site of every model: a tensor like the one it was given, or an error."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import hooks
import models
from tests.hooks.conftest import VARIANTS, build, left_on
from tests.small_transformer import small

EVERY: dict[str, Callable[[], Any]] = {
    **{variant: lambda variant=variant: build(variant, n_layers=1) for variant in VARIANTS},
    "linear with a convolution": lambda: build("linear", n_layers=1, d_conv=3),
    "one head": lambda: build("linear", n_layers=1, n_heads=1, normalise=False),
    "tangent, linear gate": lambda: build("mamba", n_layers=1, step="tangent", gate="linear"),
    "constant step": lambda: build("mamba", n_layers=1, selection="constant_step"),
    "theory": lambda: models.build("theory", d_in=5, d_state=4).double().eval(),
    "transformer": lambda: small(n_layers=1),
}
ALIKE = ("linear with a convolution", "one head", "tangent, linear gate", "constant step", "lti", "s4d")
"""Their sites are those of others too."""
LENGTH = 4  # as many as there are prompts, so that a lost axis broadcasts


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in EVERY])
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    built = EVERY[request.param]()
    yield built
    assert left_on(built) == []


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, LENGTH, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def under(model: Any, name: str, hook: Callable[..., Any], x: Tensor) -> Tensor:
    return model.run_with_hooks(x, fwd_hooks=[(name, hook)])


@pytest.mark.contract
def test_something_else_than_such_a_tensor_is_refused(model: Any, x: Tensor) -> None:
    wrong: dict[str, Callable[[Tensor], Any]] = {
        "another number of axes": lambda t: t[:, 0],
        "too many": lambda t: torch.cat([t, t], dim=1),
        "a number": lambda t: 3,
        "complex": lambda t: t + 0j,
        "a mask": lambda t: t > 0,
        "another device": lambda t: t.to("meta"),
    }
    for name in model.hook_dict:
        for what, change in wrong.items():
            with pytest.raises(hooks.BadArgument) as caught:
                under(model, name, lambda t, hook, change=change: change(t), x)
            message = str(caught.value)
            assert name in message and "\n" not in message and len(message) < 200, (what, message)


@pytest.mark.contract
def test_what_broadcasts_or_has_another_dtype_is_conformed(model: Any, x: Tensor) -> None:
    """The reference: the same hook, which does by hand what is promised."""
    with torch.no_grad():
        for name in model.hook_dict:
            pairs: list[tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]] = [
                (lambda t: t.mean(0, keepdim=True), lambda t: t.mean(0, keepdim=True).expand_as(t).contiguous()),
                (lambda t: t[..., :1].float() + 1, lambda t: (t[..., :1].float() + 1).double().expand_as(t).clone()),
                (lambda t: (3 * t).round().abs().int() + 1, lambda t: (3 * t).round().abs() + 1),
            ]
            for given, meant in pairs:
                found = under(model, name, lambda t, hook, given=given: given(t), x)
                expected = under(model, name, lambda t, hook, meant=meant: meant(t), x)
                assert_close(found, expected, rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.contract
def test_the_second_hook_of_a_site_is_given_what_the_table_says(model: Any, x: Tensor) -> None:
    shapes = {name: tuple(value.shape) for name, value in hooks.record(model, x).items()}
    given: dict[str, Any] = {}
    for name in model.hook_dict:
        pair = [
            (name, lambda t, hook: t.float().mean(0, keepdim=True)),
            (name, lambda t, hook, name=name: given.update({name: (tuple(t.shape), t.dtype)})),
        ]
        model.run_with_hooks(x, fwd_hooks=pair)
    assert given == {name: (shape, torch.float64) for name, shape in shapes.items()}


@pytest.mark.contract
@pytest.mark.parametrize("grad", [pytest.param(False, marks=pytest.mark.slow), True], ids=["no gradient", "gradient"])
def test_writing_in_place_is_the_same_as_returning_a_new_tensor(model: Any, x: Tensor, grad: bool) -> None:
    """Also for what fired before, which shares memory with nothing that a hook is given, and for all gradients."""

    def new(t: Tensor, hook: Any) -> Tensor:
        return t * 0.5 + 0.25

    def written(t: Tensor, hook: Any) -> None:
        t.mul_(0.5).add_(0.25)

    def run(name: str, change: Callable[..., Any]) -> tuple[Any, Any, Any]:
        model.zero_grad()
        kept: dict[str, Tensor] = {}
        save = [(site, lambda t, hook, site=site: kept.update({site: t.detach()})) for site in model.hook_dict]
        given = x.clone().requires_grad_(grad)
        out = model.run_with_hooks(given, fwd_hooks=[*save, (name, change)])
        if grad:
            out.pow(2).sum().backward()
        gradients = {weight: p.grad for weight, p in model.named_parameters() if p.grad is not None}
        assert torch.equal(given.detach(), x), name
        before = list(kept)[: list(kept).index(name)]
        return out.detach(), gradients, {site: kept[site] for site in before}

    with torch.set_grad_enabled(grad):
        for name in model.hook_dict:
            out, gradients, before = run(name, new)
            for found, expected in zip(run(name, written), (out, gradients, before), strict=True):
                assert_close(found, expected, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.contract
@pytest.mark.parametrize("torch_s_own", [False, True])
def test_each_site_of_the_transformer_changes_what_the_table_says_and_nothing_else(
    x: Tensor, torch_s_own: bool
) -> None:
    """A hook that writes in place where q, k or a norm alone reads leaves the residual stream and the others."""
    model = small(n_layers=1)
    clean = {name: value.clone() for name, value in hooks.record(model, x).items()}
    reads = {
        "blocks.0.attn.q.hook_in": ("attn.hook_k", "attn.hook_v", "hook_resid_pre"),
        "blocks.0.attn.k.hook_in": ("attn.hook_q", "attn.hook_v", "hook_resid_pre"),
        "blocks.0.attn.v.hook_in": ("attn.hook_q", "attn.hook_k", "hook_resid_pre"),
    }
    for name, others in reads.items():
        point = model.hook_dict[name]
        handle = point.register_forward_hook(lambda *call: call[2].mul_(0)) if torch_s_own else None
        write = [] if torch_s_own else [(name, lambda t, hook: t.mul_(0))]
        with model.hooks(fwd_hooks=write):
            found = hooks.record(model, x)
        if handle is not None:
            handle.remove()
        for other in others:
            assert_close(found[f"blocks.0.{other}"], clean[f"blocks.0.{other}"], rtol=0, atol=0)
    # The residual stream goes on as it was: what is added to it is all that differs.
    for name, site in (("blocks.0.ln1.hook_in", "hook_attn_out"), ("blocks.0.ln2.hook_in", "hook_mlp_out")):
        with model.hooks(fwd_hooks=[(name, lambda t, hook: t.mul_(0))]):
            found = hooks.record(model, x)
        attention, mlp = found["blocks.0.hook_attn_out"], found["blocks.0.hook_mlp_out"]
        assert not torch.allclose(found[f"blocks.0.{site}"], clean[f"blocks.0.{site}"])
        expected = clean["blocks.0.hook_resid_pre"] + attention + mlp
        assert_close(found["blocks.0.hook_resid_post"], expected, rtol=0, atol=1e-12)


@pytest.mark.contract
def test_a_plain_torch_hook_is_held_to_the_same(model: Any, x: Tensor) -> None:
    for name, point in model.hook_dict.items():
        for wrong in (lambda *call: 3, lambda *call: call[2][:, 0]):
            handle = point.register_forward_hook(wrong)
            with pytest.raises(hooks.BadArgument), warnings.catch_warnings():
                model(x)
            handle.remove()
        handle = point.register_forward_hook(lambda *call: call[2].float())
        out = model(x)
        handle.remove()
        assert_close(out, model(x), rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
