"""NaN and inf: noticed on every run, and traced to where they first appear."""

# ruff: noqa: SIM117, for nnsight needs its `with` on a line of its own

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hooks
from hooks import finite

DELTA = "blocks.1.mixer.hook_delta"
VARIANTS = ["mamba", "lti", "s4d", "s4", "linear"]


@pytest.mark.hygiene
@pytest.mark.parametrize(("bad", "word"), [(torch.nan, "NaN"), (torch.inf, "inf"), (-torch.inf, "inf")])
def test_in_the_input(make: Callable[..., Any], x: Tensor, bad: float, word: str) -> None:
    model = make()
    model(x)
    x[2, 7, 1] = bad
    with pytest.raises(hooks.NonFinite, match=rf"the input holds {word} at \(2, 7, 1\) \(1 of 220 numbers\)"):
        model(x)


@pytest.mark.hygiene
def test_integers_are_finite(make: Callable[..., Any]) -> None:
    assert bool(make(head="lm", d_out=7)(torch.randint(7, (2, 5))).isfinite().all())


@pytest.mark.hygiene
def test_in_the_weights(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    weight = model.blocks[1].mixer.D
    model(x)
    with torch.no_grad():
        weight[3] = torch.nan
    for _ in range(2):
        with pytest.raises(hooks.NonFinite, match=r"the weight blocks\.1\.mixer\.D holds NaN at \(3,\) \(1 of 16"):
            model(x)
    with torch.no_grad():
        weight[3] = 1.0
    assert bool(model(x).isfinite().all())
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.grad = torch.full_like(weight, torch.inf)
    optimizer.step()
    with pytest.raises(hooks.NonFinite, match="inf"):
        model(x)


@pytest.mark.hygiene
def test_in_weights_that_were_written_past_torchs_counter(make: Callable[..., Any], x: Tensor) -> None:
    """``.data`` is not counted, so the weights are looked at again before a site is blamed."""
    model = make()
    model(x)
    model.blocks[0].mixer.out_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(hooks.NonFinite, match=r"the weight blocks\.0\.mixer\.out_proj\.weight"):
        model(x)


@pytest.mark.hygiene
def test_weights_are_looked_at_once_while_they_do_not_change(
    make: Callable[..., Any], x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, looked = make(), []
    true = finite._finite
    monkeypatch.setattr(finite, "_finite", lambda value: looked.append(1) or true(value))
    model(x)
    first = len(looked)
    model(x)
    assert len(looked) - first == 3 < first, "the input, the output, and the scales of all norms together"
    with torch.no_grad():
        model.head.linear.bias += 1
    looked.clear()
    model(x)
    assert len(looked) == first


@pytest.mark.hygiene
@pytest.mark.parametrize("variant", VARIANTS)
def test_at_a_site(make: Callable[..., Any], x: Tensor, leftovers: Callable[[Any], list[str]], variant: str) -> None:
    """Every site in turn: its name, and the first place; what was on the model is as it was."""
    model = make(variant, n_layers=1)
    for name in model.hook_dict:

        def spoil(value: Tensor, hook: Any) -> Tensor:
            value = value.clone()
            value[1, 2] = torch.nan
            return value

        model.add_hook(name, spoil)
        with pytest.raises(hooks.NonFinite, match=rf"first seen at {name} \(NaN at \(1, 2"):
            model(x)
        model.reset_hooks()
        assert leftovers(model) == []
        assert bool(model(x).isfinite().all())


@pytest.mark.hygiene
def test_under_an_edit_in_every_idiom(
    make: Callable[..., Any], x: Tensor, leftovers: Callable[[Any], list[str]]
) -> None:
    model = make()
    with (
        pytest.raises(hooks.NonFinite, match=rf"first seen at {DELTA} \(inf"),
        hooks.edit(model, {DELTA: hooks.scale(torch.inf)}),
    ):
        model(x)
    with pytest.raises(hooks.NonFinite, match=r"first seen at blocks\.0\.mixer\.hook_state "):
        with hooks.edit(model, hooks.do_state(0, [4], torch.nan)):
            model(x)
    with pytest.raises(hooks.NonFinite, match=r"first seen at hook_embed"):
        model.run_with_cache(x, fwd_hooks=[("hook_embed", lambda value, hook: value / 0)])
    with pytest.raises(hooks.NonFinite, match=DELTA):
        model.run_with_hooks(x, fwd_hooks=[(DELTA, lambda value, hook: value * torch.nan)])
    assert leftovers(model) == []
    wrapped = hooks.nnsight(model)
    with pytest.raises(Exception, match="the output holds NaN"):
        with wrapped.trace(x):
            wrapped.blocks[1].mixer.hook_delta.output = wrapped.blocks[1].mixer.hook_delta.output * torch.nan
    assert leftovers(model) == []


@pytest.mark.hygiene
def test_trap_2_a_time_step_steered_negative_gives_inf_and_not_garbage(make: Callable[..., Any], x: Tensor) -> None:
    """exp(−1000 · A) is inf; an approximate exp that wraps around would give a number. Fused and materialised agree."""
    model = make()
    edit = {"blocks.1.mixer.hook_delta_decay": hooks.set_to(-1000.0)}
    with pytest.raises(hooks.NonFinite), hooks.edit(model, edit):
        model(x)
    with pytest.raises(hooks.NonFinite), hooks.edit(model, edit), hooks.expose(model):
        model(x)
    mild = {"blocks.1.mixer.hook_delta_decay": hooks.set_to(-2.0)}
    with hooks.edit(model, mild):
        fused = model(x)
        with hooks.expose(model):
            torch.testing.assert_close(fused, model(x))


@pytest.mark.hygiene
def test_in_the_state_that_is_given(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    _, state = model(x, return_state=True)
    state[1].h.data[0, 0, 0] = torch.nan
    with pytest.raises(hooks.NonFinite, match=r"blocks\.1\.mixer\.hook_state_init"):
        model(x, state=state)


@pytest.mark.hygiene
def test_large_is_not_infinite(make: Callable[..., Any]) -> None:
    """A sum that overflows is looked at closely before anybody is accused."""
    huge = torch.full((3, 2, 5), 3e38)
    finite.check_input(huge)
    assert not bool(huge.sum().isfinite())
    with pytest.raises(hooks.NonFinite, match=r"\(0, 1, 2\)"):
        huge[0, 1, 2] = torch.inf
        finite.check_input(huge)


@pytest.mark.hygiene
def test_under_inference_mode(make: Callable[..., Any], x: Tensor) -> None:
    """Tensors made there have no version counter; then every storage is looked at once."""
    with torch.inference_mode():
        model = make()
        output = model(x)
    torch.testing.assert_close(output.clone(), hooks.record(model, x, DELTA).output)


@pytest.mark.hygiene
def test_under_torch_func(make: Callable[..., Any], x: Tensor) -> None:
    """There a weight has no address; it is looked at on every run."""
    model = make()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(given: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, given, (x,)).sum()

    found = torch.func.grad(loss)(weights)
    model(x).sum().backward()
    torch.testing.assert_close(found, {name: parameter.grad for name, parameter in model.named_parameters()})
    weights["head.linear.bias"] = torch.full_like(weights["head.linear.bias"], torch.nan)
    with pytest.raises(hooks.NonFinite, match=r"head\.linear\.bias"):
        torch.func.grad(loss)(weights)


@pytest.mark.hygiene
def test_stopped_runs_and_returned_states_are_checked(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    spoil = [("blocks.0.mixer.hook_out", lambda value, hook: value * torch.nan)]
    with pytest.raises(hooks.NonFinite, match=r"blocks\.0\.mixer\.hook_out"):
        model.run_with_hooks(x, fwd_hooks=spoil, stop_at_layer=1)
    with pytest.raises(hooks.NonFinite, match=r"blocks\.0\.mixer\.hook_out"):
        model.run_with_hooks(x, fwd_hooks=spoil, return_state=True)
    assert bool(model(x, stop_at_layer=1).isfinite().all())
