"""Reading: what ``hooks.record`` gives, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hooks

DELTA = "blocks.1.mixer.hook_delta"
STATE = "blocks.1.mixer.hook_state"


@pytest.mark.definition
def test_values_are_what_a_torch_hook_sees(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    seen: dict[str, Tensor] = {}
    handles = [
        point.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out.detach().clone()}))
        for name, point in model.hook_dict.items()
    ]
    expected = model(x)
    for handle in handles:
        handle.remove()
    values = hooks.record(model, x)
    torch.testing.assert_close(values.output, expected, rtol=0, atol=0)
    torch.testing.assert_close(dict(values), seen, rtol=0, atol=0)


@pytest.mark.definition
def test_the_sites_satisfy_their_equations(make: Callable[..., Any], x: Tensor) -> None:
    """Each row of the vocabulary, checked from the recorded neighbours alone."""
    model = make()
    v = {name.removeprefix("blocks.1.mixer."): value for name, value in hooks.record(model, x).items()}
    mixer = model.blocks[1].mixer
    close = torch.testing.assert_close
    close(v["hook_x"], v["hook_x_pre"] * torch.sigmoid(v["hook_x_pre"]))
    close(v["hook_delta"], torch.log1p(torch.exp(v["hook_delta_pre"])))
    close(v["hook_delta_decay"], v["hook_delta"])
    close(v["hook_delta_write"], v["hook_delta"])
    close(v["hook_decay"], torch.exp(-v["hook_delta"][..., None] * torch.exp(mixer.A_log)))
    close(v["hook_write"], (v["hook_delta"] * v["hook_x"])[..., None] * v["hook_B"][:, :, None, :])
    before = torch.cat([v["hook_state_init"][:, None], v["hook_state"][:, :-1]], dim=1)
    close(v["hook_state"], v["hook_decay"] * before + v["hook_write"])
    close(v["hook_y"], (v["hook_state"] * v["hook_C"][:, :, None, :]).sum(-1))
    close(v["hook_skip"], mixer.D * v["hook_x"])
    close(v["hook_gate"], v["hook_gate_pre"] * torch.sigmoid(v["hook_gate_pre"]))
    close(v["hook_gated"], (v["hook_y"] + v["hook_skip"]) * v["hook_gate"])
    close(v["hook_out"], v["hook_gated"] @ mixer.out_proj.weight.T)
    close(v["blocks.1.hook_resid_post"], v["blocks.1.hook_resid_pre"] + v["hook_out"])
    close(v["blocks.1.hook_resid_pre"], v["blocks.0.hook_resid_post"])
    close(v["blocks.1.norm.hook_scale"], (v["blocks.1.hook_resid_pre"].pow(2).mean(-1, keepdim=True) + 1e-5).sqrt())
    close(v["blocks.1.norm.hook_normalized"], v["blocks.1.hook_resid_pre"] / v["blocks.1.norm.hook_scale"])
    close(v["head.hook_out"], model(x))
    assert not v["hook_state_init"].any() and not v["hook_conv_init"].any()


@pytest.mark.hygiene
def test_one_site_by_name_glob_or_predicate(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    full = hooks.record(model, x)
    for pattern in (DELTA, [DELTA], {DELTA}, lambda name: name == DELTA, "blocks.1.mixer.hook_delt[a]"):
        found = hooks.record(model, x, pattern)
        assert list(found) == [DELTA]
        torch.testing.assert_close(found[DELTA], full[DELTA])
    with pytest.raises(hooks.UnknownSite, match="did you mean"):
        hooks.record(model, x, "*.hook_dleta")


@pytest.mark.hygiene
def test_the_record_is_a_mapping_and_never_guesses(make: Callable[..., Any], x: Tensor) -> None:
    found = hooks.record(make(), x, "*.hook_delta")
    assert len(found) == 2 and DELTA in found and "nothing" not in found
    assert found.get("nothing") is None and found.get(DELTA) is found[DELTA]
    assert found["blocks.1*"] is found[DELTA], "a glob that picks one recorded site"
    with pytest.raises(hooks.BadArgument, match="stack"):
        found["*.hook_delta"]
    with pytest.raises(hooks.UnknownSite, match="hook_delta"):
        found["blocks.1.mixer.hook_dleta"]
    assert found.stack("*.hook_delta").shape == (2, 4, 11, 16)
    torch.testing.assert_close(found.stack("*.hook_delta")[1], found[DELTA])
    assert repr(found).splitlines()[1] == f"{DELTA}  (4, 11, 16)"


@pytest.mark.hygiene
def test_trap_9_recorded_values_are_copies(make: Callable[..., Any], x: Tensor) -> None:
    """Two hooks, one site: what a later hook writes in place does not reach into the record of a finished run, and
    an in-place hook that was there before shows, because the record reads last.
    """
    model = make()
    clean = hooks.record(model, x)

    def in_place(value: Tensor, hook: Any) -> None:
        value[:, 2] = 7.0

    with torch.no_grad(), model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", in_place)]):
        found = hooks.record(model, x)
    assert bool((found["blocks.1.hook_resid_pre"][:, 2] == 7).all())
    torch.testing.assert_close(found["blocks.0.hook_resid_post"], clean["blocks.0.hook_resid_post"])
    before = found[DELTA].clone()
    with torch.no_grad(), model.hooks(fwd_hooks=[(DELTA, in_place)]):
        changed = model(x)
    torch.testing.assert_close(found[DELTA], before, rtol=0, atol=0)
    assert not torch.allclose(changed, found.output)


@pytest.mark.law
def test_grad_keeps_the_graph_and_its_absence_does_not(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    found = hooks.record(model, x, [DELTA, STATE], grad=True)
    gradients = torch.autograd.grad(found.output.sum(), [found[DELTA], found[STATE]])
    assert all(bool(g.any()) for g in gradients)
    with torch.no_grad():
        again = hooks.record(model, x, DELTA, grad=True)
    assert again.output.requires_grad and again[DELTA].requires_grad
    plain = hooks.record(model, x, DELTA)
    assert not plain[DELTA].requires_grad and not plain.output.requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.law
def test_the_gradient_at_hook_write_is_that_of_the_state(make: Callable[..., Any], x: Tensor) -> None:
    """∂L/∂h_t through all later states is the gradient at ``hook_write``; ``hook_state`` has the read-out's alone."""
    model = make()
    sites = [f"blocks.1.mixer.{kind}" for kind in ("hook_decay", "hook_write", "hook_state")]
    found = hooks.record(model, x, sites, grad=True)
    decay, write, state = (found[name] for name in sites)
    total, direct = torch.autograd.grad(found.output.sum(), [write, state])
    expected, later = torch.empty_like(total), torch.zeros_like(total[:, 0])
    for t in reversed(range(11)):
        later = direct[:, t] + (decay[:, t + 1] * later if t < 10 else 0)
        expected[:, t] = later
    torch.testing.assert_close(total, expected)
    assert not torch.allclose(total, direct)


@pytest.mark.hygiene
def test_a_site_cut_off_by_stop_at_layer_is_named(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    with pytest.raises(hooks.DidNotFire, match=r"blocks\.1\.mixer\.hook_delta.*stop_at_layer=1"):
        hooks.record(model, x, DELTA, stop_at_layer=1)
    with pytest.raises(hooks.DidNotFire, match=r"blocks\.1"):
        hooks.record(model, x, "*.hook_delta", stop_at_layer=1)
    with pytest.raises(hooks.DidNotFire, match="hook_embed"):
        hooks.record(model, torch.randn(4, 11, 8, dtype=x.dtype), "hook_embed", start_at_layer=1)
    found = hooks.record(model, x, stop_at_layer=1)
    assert list(found)[-1] == "blocks.0.hook_resid_post", "asked for every site, those that fired"
    torch.testing.assert_close(found.output, found["blocks.0.hook_resid_post"])


@pytest.mark.hygiene
def test_keywords_go_to_the_model(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    _, state = model(x[:, :4], return_state=True)
    found = hooks.record(model, x[:, 4:], "*.hook_state_init", state=state, return_state=True)
    torch.testing.assert_close(found["blocks.1.mixer.hook_state_init"], state[1].h)
    assert isinstance(found.output, tuple)


@pytest.mark.hygiene
def test_too_large_is_said_before_the_forward(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    runs = model.runs
    with pytest.raises(hooks.TooLarge, match="max_memory"):
        hooks.record(model, x, max_memory=1000)
    assert model.runs == runs
    hooks.record(model, x, max_memory=10**8)
    assert model.runs == runs + 1


@pytest.mark.hygiene
def test_nothing_is_left_after_the_model_raised(
    make: Callable[..., Any], x: Tensor, leftovers: Callable[[Any], list[str]]
) -> None:
    model = make()

    def fail(value: Tensor, hook: Any) -> None:
        assert leftovers(model), "the hooks are on while the model runs"
        raise KeyError("body")

    with pytest.raises(KeyError, match="body"), model.hooks(fwd_hooks=[(STATE, fail)]):
        hooks.record(model, x)
    assert leftovers(model) == []
    with pytest.raises(hooks.BadArgument):
        hooks.record(model, x[..., :2])
    assert leftovers(model) == []
