"""The TransformerLens idiom on our models, with what it leaves silent made loud."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

import hooks

LAYER = "blocks.1.mixer."
DELTA, STATE = LAYER + "hook_delta", LAYER + "hook_state"


# --- hooks ------------------------------------------------------------------------------------


@pytest.mark.edit
@pytest.mark.parametrize("variant", ["mamba", "lti", "s4d"])
def test_every_way_of_adding_a_hook_gives_the_same_edit(
    make: Callable[..., Any], x: Tensor, leftovers: Callable[[Any], list[str]], variant: str
) -> None:
    model = make(variant)
    clean = model(x)

    def double(value: Tensor, hook: Any) -> Tensor:
        return value * 2

    for kind in ("hook_delta", "hook_decay", "hook_write", "hook_y"):
        name = LAYER + kind
        with hooks.edit(model, {name: hooks.scale(2.0)}):
            expected = model(x)
        outputs = [
            model.run_with_hooks(x, fwd_hooks=[(name, double)]),
            model.run_with_hooks(x, fwd_hooks=[(lambda n, name=name: n == name, double)]),
            model.run_with_hooks(x, fwd_hooks=[([name], double)]),
        ]
        with model.hooks(fwd_hooks=[(name, double)]):
            outputs.append(model(x))
        model.add_hook(name, double)
        outputs.append(model(x))
        model.reset_hooks()
        model.hook_dict[name].add_hook(double)
        outputs.append(model(x))
        model.reset_hooks()
        for output in outputs:
            torch.testing.assert_close(output, expected, rtol=0, atol=0)
        assert not torch.allclose(expected, clean)
        torch.testing.assert_close(model(x), clean, rtol=0, atol=0)
        assert leftovers(model) == []


@pytest.mark.edit
@pytest.mark.parametrize("variant", ["mamba", "lti", "s4d"])
@pytest.mark.parametrize("in_place", [False, True], ids=["returned", "in place"])
def test_a_raw_hook_on_the_state_changes_one_read_out(
    make: Callable[..., Any], x: Tensor, variant: str, in_place: bool
) -> None:
    """Unlike ``hooks.edit``: later positions, and the state that the model returns, are as they were."""
    model = make(variant)
    y = LAYER + "hook_y"
    clean, (_, state) = hooks.record(model, x, y), model(x, return_state=True)

    def patch(value: Tensor, hook: Any) -> Tensor:
        value = value if in_place else value.clone()
        value[:, [4, 10]] = 0
        return value

    with torch.no_grad(), model.hooks(fwd_hooks=[(STATE, patch)]):
        found = hooks.record(model, x, y)
        _, after = model(x, return_state=True)
    rest = [t for t in range(11) if t not in (4, 10)]
    torch.testing.assert_close(found[y][:, rest], clean[y][:, rest])
    assert not found[y][:, [4, 10]].any() and bool(clean[y][:, [4, 10]].all())
    torch.testing.assert_close(after[1].h, state[1].h)
    with hooks.edit(model, {STATE: hooks.zero(pos=[4, 10])}):
        _, propagated = model(x, return_state=True)
    assert not propagated[1].h.any()


@pytest.mark.edit
def test_in_place_hooks_on_one_role_do_not_leak_into_the_other(make: Callable[..., Any], x: Tensor) -> None:
    """Δ's two roles start as one tensor; so do other sites, the caller's state and what autograd keeps for itself."""

    def zero_(value: Tensor, hook: Any) -> None:
        value.zero_()

    for variant in ("mamba", "lti", "s4d"):
        model = make(variant)
        for role, other in (("decay", "write"), ("write", "decay")):
            clean = hooks.record(model, x)
            with model.hooks(fwd_hooks=[(f"{LAYER}hook_delta_{role}", zero_)]):
                found = hooks.record(model, x)
                model(x).sum().backward()
            assert not found[f"{LAYER}hook_delta_{role}"].any()
            for name in (f"{LAYER}hook_delta", f"{LAYER}hook_delta_{other}", f"{LAYER}hook_{other}"):
                torch.testing.assert_close(found[name], clean[name], rtol=0, atol=0)
            assert not torch.allclose(found.output, clean.output)


@pytest.mark.edit
@pytest.mark.parametrize("variant", ["mamba", "lti", "s4d"])
def test_trap_5_every_site_can_be_edited_in_place_under_grad(make: Callable[..., Any], x: Tensor, variant: str) -> None:
    """And equals the edit that returns a new tensor, in values and in gradients."""
    model = make(variant, n_layers=1)

    def in_place(value: Tensor, hook: Any) -> None:
        value[:, :2] *= 0.5

    def returned(value: Tensor, hook: Any) -> Tensor:
        return torch.cat([value[:, :2] * 0.5, value[:, 2:]], dim=1)

    for name in model.hook_dict:
        results = []
        for fn in (in_place, returned):
            model.zero_grad()
            output = model.run_with_hooks(x, fwd_hooks=[(name, fn)])
            output.pow(2).sum().backward()
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
            results.append((output.detach(), gradients))
        torch.testing.assert_close(results[0], results[1], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.edit
@pytest.mark.parametrize("variant", ["mamba", "s4d"])
def test_in_place_hooks_do_not_write_into_the_callers_tensors(
    make: Callable[..., Any], x: Tensor, variant: str
) -> None:
    model = make(variant)
    with torch.no_grad():
        _, state = model(x, return_state=True)
        before = [[None if part is None else part.clone() for part in layer] for layer in state]
        names = [name for name in model.hook_dict if name.endswith("_init")]
        with model.hooks(fwd_hooks=[(names, lambda value, hook: value.zero_())]):
            zeroed = model(x, state=state)
    torch.testing.assert_close([list(layer) for layer in state], before, rtol=0, atol=0)
    assert not torch.allclose(zeroed, model(x, state=state))
    torch.testing.assert_close(zeroed, model(x))
    residual = torch.randn(4, 11, 8, dtype=x.dtype)
    kept = residual.clone()
    with torch.no_grad(), model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda value, hook: value.zero_())]):
        model(residual, start_at_layer=1)
    torch.testing.assert_close(residual, kept, rtol=0, atol=0)


@pytest.mark.edit
def test_trap_1_what_raw_hooks_return_is_conformed_or_refused(
    make: Callable[..., Any], x: Tensor, leftovers: Callable[[Any], list[str]]
) -> None:
    model = make()
    for name in (DELTA, LAYER + "hook_decay", STATE, "hook_embed", LAYER + "hook_B"):
        kept = model.run_with_hooks(x, fwd_hooks=[(name, lambda v, hook: v.mean(0, keepdim=True))])
        with hooks.edit(model, {name: hooks.mean("batch")}, readout_only=name == STATE):
            torch.testing.assert_close(kept, model(x))
        for wrong, says in (
            (lambda v, hook: v.mean(0), "shape"),
            (lambda v, hook: v[:, :5], "shape"),
            (lambda v, hook: v[..., :1, :].repeat_interleave(3, -2), "shape"),
            (lambda v, hook: "text", "str"),
            (lambda v, hook: v > 0, "bool"),
            (lambda v, hook: torch.complex(v, v), "complex"),
            (lambda v, hook: v.to("meta"), "meta"),
        ):
            with pytest.raises(hooks.BadArgument, match=says):
                model.run_with_hooks(x, fwd_hooks=[(name, wrong)])
            assert leftovers(model) == []
        same = model.run_with_hooks(x, fwd_hooks=[(name, lambda v, hook: v.to(torch.float32))])
        torch.testing.assert_close(same, model(x), rtol=1e-5, atol=1e-5)
        assert same.dtype == torch.float64


@pytest.mark.hygiene
def test_levels_of_nested_contexts(make: Callable[..., Any], x: Tensor, leftovers: Callable[[Any], list[str]]) -> None:
    model = make()

    def times(factor: float) -> Callable[[Tensor, Any], Tensor]:
        return lambda value, hook: value * factor

    clean = hooks.record(model, x, DELTA)[DELTA]

    def factor() -> float:
        return round((hooks.record(model, x, DELTA)[DELTA] / clean).mean().item(), 6)

    with model.hooks(fwd_hooks=[(DELTA, times(2))]):
        with model.hooks(fwd_hooks=[("blocks.1*.hook_delta", times(3))]):
            assert factor() == 6
            with pytest.raises(KeyError), model.hooks(fwd_hooks=[(DELTA, times(5))]):
                assert factor() == 30
                raise KeyError
            assert factor() == 6
            with hooks.edit(model, {DELTA: hooks.scale(7.0)}), model.hooks(fwd_hooks=[(DELTA, times(0.5))]):
                assert factor() == 21
            assert factor() == 6
        assert factor() == 2
        model.add_hook(DELTA, times(11))
        assert factor() == 22
    assert factor() == 11
    model.reset_hooks()
    assert factor() == 1 and leftovers(model) == []


@pytest.mark.hygiene
def test_permanent_hooks_stay(make: Callable[..., Any], x: Tensor, leftovers: Callable[[Any], list[str]]) -> None:
    model = make()
    clean = model(x)
    model.add_perma_hook("*.hook_delta", lambda value, hook: value * 2)
    doubled = model(x)
    assert not torch.allclose(doubled, clean)
    model.reset_hooks()
    with model.hooks(fwd_hooks=[(STATE, lambda value, hook: None)]):
        pass
    model.run_with_cache(x)
    torch.testing.assert_close(model(x), doubled, rtol=0, atol=0)
    assert model.hook_dict[DELTA].has_hooks() and not model.hook_dict[DELTA].has_hooks(including_permanent=False)
    assert list(model.list_hooks()) == ["blocks.0.mixer.hook_delta", DELTA]
    model.reset_hooks(including_permanent=True)
    torch.testing.assert_close(model(x), clean, rtol=0, atol=0)
    assert leftovers(model) == []


@pytest.mark.hygiene
def test_hooks_carry_their_point_and_its_context(make: Callable[..., Any], x: Tensor) -> None:
    model, names = make(), []

    def note(value: Tensor, hook: Any) -> None:
        names.append((hook.name, hook.layer()))
        hook.ctx["seen"] = value.shape

    model.run_with_hooks(x, fwd_hooks=[("*.hook_delta", note)])
    assert names == [("blocks.0.mixer.hook_delta", 0), (DELTA, 1)]
    assert model.hook_dict[DELTA].ctx["seen"] == (4, 11, 16)
    model.reset_hooks()
    assert model.hook_dict[DELTA].ctx == {}
    first, order = [DELTA, DELTA], []
    model.add_hook(first[0], lambda value, hook: order.append("second"))
    model.add_hook(first[1], lambda value, hook: order.append("first"), prepend=True)
    model(x)
    assert order == ["first", "second"]
    model.reset_hooks()


@pytest.mark.hygiene
def test_hooks_that_do_not_fire_are_reported_when_the_model_ran(
    make: Callable[..., Any], x: Tensor, leftovers: Callable[[Any], list[str]]
) -> None:
    model = make()
    with model.hooks(fwd_hooks=[(DELTA, lambda value, hook: value)]):
        pass  # as in TransformerLens, a context in which nothing runs is no error
    with pytest.raises(hooks.DidNotFire, match="stop_at_layer"), model.hooks(fwd_hooks=[(DELTA, lambda v, hook: v)]):
        model(x, stop_at_layer=1)
    with model.hooks(fwd_hooks=[("*.hook_delta", lambda v, hook: v)]):
        model(x, stop_at_layer=1)  # one of its matches fired
    with pytest.raises(KeyError, match="mine"), model.hooks(fwd_hooks=[(DELTA, lambda v, hook: v)]):
        model(x, stop_at_layer=1)
        raise KeyError("mine")
    assert leftovers(model) == []


@pytest.mark.edit
def test_backward_hooks_read_and_edit_gradients(
    make: Callable[..., Any], x: Tensor, leftovers: Callable[[Any], list[str]]
) -> None:
    model = make()
    found = hooks.record(model, x, [DELTA, STATE], grad=True)
    expected = torch.autograd.grad(found.output.sum(), [found[DELTA], found[STATE]])
    seen: dict[str, Tensor] = {}

    def note(gradient: Tensor, hook: Any) -> None:
        seen[hook.name] = gradient.clone()

    with model.hooks(bwd_hooks=[(DELTA, note), (STATE, note)]):
        model(x).sum().backward()
    torch.testing.assert_close(seen[DELTA], expected[0])
    torch.testing.assert_close(seen[STATE], expected[1])
    weight = model.blocks[1].mixer.dt_proj.bias
    model.zero_grad()
    with model.hooks(bwd_hooks=[(DELTA, lambda gradient, hook: gradient * 0)]):
        model(x).sum().backward()
    assert not weight.grad.any()
    model.zero_grad()
    model(x).sum().backward()
    assert bool(weight.grad.any()) and leftovers(model) == []


@pytest.mark.edit
def test_trap_8_backward_hooks_that_never_fire_are_reported(
    make: Callable[..., Any], x: Tensor, leftovers: Callable[[Any], list[str]]
) -> None:
    model = make()

    def note(gradient: Tensor, hook: Any) -> None:
        pytest.fail("there is no gradient to see")

    def constant(value: Tensor, hook: Any) -> Tensor:
        return torch.ones_like(value)

    with pytest.raises(hooks.DidNotFire, match="gradient"), model.hooks(bwd_hooks=[(DELTA, note)]):
        model(x)
    with pytest.raises(hooks.DidNotFire, match="constant"), model.hooks([(DELTA, constant)], [(DELTA, note)]):
        model(x).sum().backward()
    with pytest.raises(hooks.DidNotFire), model.hooks(bwd_hooks=[("*.hook_state_init", note)]):
        model(x).sum().backward()
    with pytest.raises(hooks.BadArgument, match="reset_hooks_end"):
        model.run_with_hooks(x, bwd_hooks=[(DELTA, note)])
    assert leftovers(model) == []
    gradients: list[Tensor] = []
    output = model.run_with_hooks(
        x, bwd_hooks=[(DELTA, lambda gradient, hook: gradients.append(gradient))], reset_hooks_end=False
    )
    output.sum().backward()
    assert len(gradients) == 1 and bool(gradients[0].any())
    model.reset_hooks()


@pytest.mark.hygiene
def test_a_raising_hook_leaves_nothing(
    make: Callable[..., Any], x: Tensor, leftovers: Callable[[Any], list[str]]
) -> None:
    model = make()

    def fail(value: Tensor, hook: Any) -> None:
        raise KeyError("mine")

    for call in (
        lambda: model.run_with_hooks(x, fwd_hooks=[(STATE, fail)]),
        lambda: model.run_with_cache(x, fwd_hooks=[(STATE, fail)]),
        lambda: hooks.record(model, x, fwd=fail),
    ):
        with pytest.raises((KeyError, TypeError)):
            call()
        assert leftovers(model) == []


@pytest.mark.hygiene
def test_train_and_eval_modes_and_moves_keep_hooks(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    with hooks.edit(model, {DELTA: hooks.zero(), STATE: hooks.scale(0.5)}) as report:
        first = model.train()(x)
        second = model.eval()(x)
        third = model.float()(x.float())
    model.double()
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(third, first.float(), rtol=1e-3, atol=1e-4)
    assert report.fired == {DELTA: 3, STATE: 3}


@pytest.mark.hygiene
def test_activation_patching_of_transformer_lens(make: Callable[..., Any], x: Tensor) -> None:
    """``transformer_lens.patching`` runs as it is, and its numbers are those of ``hooks.edit``."""
    from transformer_lens import patching

    model, corrupted = make(), torch.randn_like(x)
    _, clean = model.run_with_cache(x)

    def metric(output: Tensor) -> Tensor:
        return output[:, -1].sum()

    places = pd.DataFrame([(layer, t) for layer in range(2) for t in (0, 4, 10)], columns=["layer", "pos"])
    found = patching.generic_activation_patch(
        model, corrupted, clean, metric, patching.layer_pos_patch_setter, "resid_pre", index_df=places
    )
    for (layer, t), value in zip(places.itertuples(index=False), found, strict=True):
        name = f"blocks.{layer}.hook_resid_pre"
        with hooks.edit(model, {name: hooks.resample(source={name: clean[name]}, pos=t)}):
            torch.testing.assert_close(value.double(), metric(model(corrupted)), rtol=1e-5, atol=1e-5)
    assert len(found.unique()) == 6


@pytest.mark.hygiene
def test_trap_compiled_models_see_hooks_that_are_added_later(make: Callable[..., Any], x: Tensor) -> None:
    """``torch.compile`` freezes a forward as it is, hooks included; so it has to leave ours alone."""
    model = make()
    compiled = torch.compile(model, backend="eager")
    clean = compiled(x)
    torch.testing.assert_close(clean, model(x), rtol=0, atol=0)
    with hooks.edit(model, {DELTA: hooks.zero(), "blocks.0.mixer.hook_state": hooks.zero(pos=3)}) as report:
        assert not torch.allclose(compiled(x), clean)
    assert all(report.fired.values())
    torch.testing.assert_close(compiled(x), clean, rtol=0, atol=0)
