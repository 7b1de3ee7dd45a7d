"""NaN and inf: noticed on every run, and traced to where they first appear."""

# ruff: noqa: SIM117, for nnsight needs its `with` on a line of its own

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hooks
from hooks import finite
from tests.hooks.conftest import build
from tests.small_transformer import small

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
    with pytest.raises(Exception, match=rf"the output holds NaN.*first seen at {DELTA} \(NaN"):
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


EDITS = [(kind, sign * 10.0**power) for kind in ("set", "scale") for sign in (1, -1) for power in (12, 21, 37)]


def fp32(variant: str) -> Any:
    return small(n_layers=2).float() if variant == "transformer" else build(variant).float()


@pytest.mark.definition
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["hook_delta", pytest.param("hook_out", marks=pytest.mark.slow)])
def test_extreme_values_in_fp32_are_right_or_an_error(x: Tensor, variant: str, kind: str) -> None:
    """Against the same weights in fp64, whose squares do not overflow: where a norm's do, all behind it would be 0."""
    model = fp32(variant)
    reference, given, refused, right = copy.deepcopy(model).double(), x[:2, :6].float(), 0, 0
    names = [name for name in model.hook_dict if name.rsplit(".", 1)[-1].startswith(kind)]
    for name in names[:2]:
        for how, value in EDITS:
            change = hooks.set_to(value, pos=[2]) if how == "set" else hooks.scale(value)
            with torch.no_grad(), hooks.edit(reference, {name: change}):
                try:
                    expected = reference(given.double())
                except hooks.NonFinite:
                    expected = None
            try:
                with torch.no_grad(), hooks.edit(model, {name: change}):
                    found = model(given)
            except hooks.NonFinite as error:
                assert "first seen at " in str(error)
                refused += 1
                continue
            assert expected is not None, (name, how, value)
            size = float(expected.abs().max())
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-3 * size, msg=f"{name} {how} {value}")
            right += 1
    assert not names or (right and (refused or variant == "s4")), "both happen"


@pytest.mark.hygiene
@pytest.mark.parametrize("variant", [*VARIANTS, "transformer"])
def test_a_norm_that_overflows_is_named(x: Tensor, variant: str) -> None:
    """By an edit and by a weight, watched and not: inf in the scale is 0 behind it, and the output was finite."""
    model, given = fp32(variant), x.float()
    out = "blocks.0.attn.o.hook_out" if variant == "transformer" else "blocks.0.mixer.hook_out"
    scale = next(name for name in list(model.hook_dict)[list(model.hook_dict).index(out) :] if "hook_scale" in name)
    told = rf"finite and wrong; first seen at {scale} \(inf at"
    with torch.no_grad():
        for readers in ([], ["*"]):
            with hooks.edit(model, {out: hooks.scale(1e22)}):
                with pytest.raises(hooks.NonFinite, match=told):
                    hooks.record(model, given, readers) if readers else model(given)
        assert bool(model(given).isfinite().all())
        weight = next(p for name, p in model.named_parameters() if name.startswith("blocks.0") and ".o" in name)
        weight.mul_(1e22)
        with pytest.raises(hooks.NonFinite, match=told):
            model(given)


@pytest.mark.hygiene
def test_a_linear_attention_whose_divisor_overflows_is_named(x: Tensor) -> None:
    model = fp32("linear")
    with hooks.edit(model, {"blocks.0.mixer.hook_norm": hooks.scale(1e38)}), torch.no_grad():
        with pytest.raises(hooks.NonFinite, match=r"first seen at blocks\.0\.mixer\.hook_norm"):
            model(x.float() * 10)


@pytest.mark.hygiene
def test_scores_of_minus_inf_keep_a_position_from_being_looked_at(x: Tensor) -> None:
    model, scores = small(n_layers=1), "blocks.0.attn.hook_attn_scores"

    def without_the_second(value: Tensor, hook: Any) -> Tensor:
        value[..., 2:, 1] = -torch.inf
        return value

    pattern = "blocks.0.attn.hook_pattern"
    with model.hooks(fwd_hooks=[(scores, without_the_second)]):
        found = hooks.record(model, x, pattern)
    assert float(found[pattern][..., 2:, 1].abs().max()) == 0
    with pytest.raises(hooks.NonFinite, match=r"first seen at blocks\.0\.attn\.hook_attn_scores"):
        model.run_with_hooks(x, fwd_hooks=[(scores, lambda value, hook: value - torch.inf)])


@pytest.mark.hygiene
def test_what_a_trace_did_beside_the_sites_is_seen_where_it_first_goes_through_one(
    make: Callable[..., Any], x: Tensor
) -> None:
    model = make()
    wrapped = hooks.nnsight(model)
    with pytest.raises(Exception, match=r"first seen at blocks\.0\.mixer\.hook_out \(NaN"):
        with wrapped.trace(x):
            wrapped.blocks[0].mixer.out_proj.output = wrapped.blocks[0].mixer.out_proj.output * torch.nan
