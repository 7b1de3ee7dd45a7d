"""The nnsight idiom on our models, and that it gives the numbers of the other two idioms.

nnsight runs the body of a ``with`` itself, so those blocks stand on lines of their own.
"""

# ruff: noqa: SIM117

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nnsight import NNsight
from torch import Tensor

import hooks

VARIANTS = ["mamba", "lti", "s4d"]
EVERY = [*VARIANTS, "s4", "linear"]
LAYER = "blocks.1.mixer."
DELTA, STATE = LAYER + "hook_delta", LAYER + "hook_state"


def at(wrapped: Any, name: str) -> Any:
    """The envoy of the site called ``name``."""
    for part in name.split("."):
        wrapped = wrapped[int(part)] if part.isdigit() else getattr(wrapped, part)
    return wrapped


@pytest.mark.hygiene
@pytest.mark.parametrize("variant", VARIANTS)
def test_names_are_the_same_and_reads_equal_the_record(make: Callable[..., Any], x: Tensor, variant: str) -> None:
    model = make(variant, n_layers=1)
    expected = hooks.record(model, x)
    wrapped = NNsight(model)
    assert wrapped.blocks[0].mixer.hook_delta._module is model.hook_dict["blocks.0.mixer.hook_delta"]
    for name in model.hook_dict:
        point = at(wrapped, name)
        with wrapped.trace(x):
            before = point.input.save()
            value = point.output.save()
            output = wrapped.output.save()
        torch.testing.assert_close(value, expected[name])
        torch.testing.assert_close(before, expected[name])
        torch.testing.assert_close(output, expected.output)


def double(value: Tensor, hook: Any = None) -> Tensor:
    changed = value.clone()
    changed[:, 2:5] = value[:, 2:5] * 2 + 0.1
    return changed


@pytest.mark.edit
@pytest.mark.parametrize("variant", EVERY)
def test_the_three_idioms_give_identical_outputs_at_every_site(
    make: Callable[..., Any], x: Tensor, variant: str
) -> None:
    """Bit for bit; also after nnsight has wrapped the model. (``hook_state``: as a read-out, see the last test.)"""
    model = make(variant, n_layers=1)
    clean, outputs = model(x), {}
    for name in model.hook_dict:
        with hooks.edit(model, {name: double}, readout_only=name.endswith("hook_state")):
            edited = model(x)
        lens = model.run_with_hooks(x, fwd_hooks=[(name, double)])
        torch.testing.assert_close(lens, edited, rtol=0, atol=0)
        outputs[name] = edited
    wrapped = NNsight(model)
    for name, expected in outputs.items():
        point = at(wrapped, name)
        with wrapped.trace(x):
            point.output = double(point.output)
            output = wrapped.output.save()
        torch.testing.assert_close(output, expected, rtol=0, atol=0)
        lens = model.run_with_hooks(x, fwd_hooks=[(name, double)])
        torch.testing.assert_close(lens, expected, rtol=0, atol=0)
        assert not torch.allclose(output, clean), name
    torch.testing.assert_close(model(x), clean, rtol=0, atol=0)


@pytest.mark.edit
@pytest.mark.parametrize("variant", VARIANTS)
def test_in_place_edits(make: Callable[..., Any], x: Tensor, variant: str) -> None:
    """nnsight's usual way of writing them, with gradients on; one role of Δ does not leak into the other."""
    model = make(variant)
    for kind in ("hook_delta_decay", "hook_delta_write", "hook_decay", "hook_write", "hook_x"):
        with hooks.edit(model, {LAYER + kind: hooks.zero(pos=[3, 4])}):
            expected = model(x)
        wrapped = NNsight(model)
        point = at(wrapped, LAYER + kind)
        with wrapped.trace(x):
            point.output[:, 3:5] = 0
            output = wrapped.output.save()
        torch.testing.assert_close(output, expected, rtol=0, atol=0)
        output.sum().backward()


@pytest.mark.edit
@pytest.mark.parametrize("variant", EVERY)
def test_a_trace_on_the_state_changes_one_read_out(make: Callable[..., Any], x: Tensor, variant: str) -> None:
    """As a raw TransformerLens hook does; ``hooks.edit`` is what propagates."""
    model = make(variant)
    (clean, state), y = model(x, return_state=True), hooks.record(model, x, LAYER + "hook_y")[LAYER + "hook_y"]
    wrapped = NNsight(model)
    for in_place in (False, True):
        with wrapped.trace(x, return_state=True):
            value = wrapped.blocks[1].mixer.hook_state.output
            if in_place:
                value[:, 4] = 0
            else:
                wrapped.blocks[1].mixer.hook_state.output = value * (torch.arange(11) != 4)[:, None, None]
            read = wrapped.blocks[1].mixer.hook_y.output.save()
            result = wrapped.output.save()
        output, after = result
        rest = [t for t in range(11) if t != 4]
        assert not read[:, 4].any()
        torch.testing.assert_close(read[:, rest], y[:, rest])
        torch.testing.assert_close(after[1].h, state[1].h)
        assert not torch.allclose(output, clean)


@pytest.mark.edit
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients(make: Callable[..., Any], x: Tensor, variant: str) -> None:
    model = make(variant)
    names = [DELTA, LAYER + "hook_write", STATE]
    found = hooks.record(model, x, names, grad=True)
    expected = torch.autograd.grad(found.output.pow(2).sum(), [found[name] for name in names])
    wrapped = NNsight(model)
    with wrapped.trace(x):
        delta = wrapped.blocks[1].mixer.hook_delta.output
        write = wrapped.blocks[1].mixer.hook_write.output
        state = wrapped.blocks[1].mixer.hook_state.output
        loss = wrapped.output.pow(2).sum()
        with loss.backward():
            of_state = state.grad.save()
            of_write = write.grad.save()
            of_delta = delta.grad.save()
    torch.testing.assert_close((of_delta, of_write, of_state), expected)


@pytest.mark.edit
def test_edited_gradients(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    weight = model.embed.linear.weight
    expected = torch.autograd.grad(model(x).sum(), weight)[0]
    wrapped = NNsight(model)
    with wrapped.trace(x):
        embedded = wrapped.hook_embed.output
        loss = wrapped.output.sum()
        with loss.backward():
            embedded.grad = embedded.grad * 3
    torch.testing.assert_close(weight.grad, 3 * expected)


@pytest.mark.edit
@pytest.mark.parametrize("variant", EVERY)
def test_trap_4_gradients_over_several_inputs_at_every_site(make: Callable[..., Any], x: Tensor, variant: str) -> None:
    """nnsight cuts a gradient by the strides of the value, silently wrong where either is strided; neither is here."""
    model = make(variant, n_layers=1)
    found = hooks.record(model, x, grad=True)
    names = [name for name in model.hook_dict if found[name].requires_grad and not name.endswith("hook_out")]
    expected = dict(zip(names, torch.autograd.grad(found.output.pow(2).sum(), [found[n] for n in names]), strict=True))
    wrapped = hooks.nnsight(model)
    for name in names:
        point = at(wrapped, name)
        with wrapped.trace() as tracer:
            with tracer.invoke(x[:3]):
                first = point.output
                loss = wrapped.output.pow(2).sum()
                with loss.backward(retain_graph=True):
                    of_first = first.grad.save()
            with tracer.invoke(x[3:]):
                second = point.output
                loss = wrapped.output.pow(2).sum()
                with loss.backward():
                    of_second = second.grad.save()
        torch.testing.assert_close(torch.cat([of_first, of_second]), expected[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.edit
def test_skip(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    with hooks.edit(model, {DELTA: hooks.zero()}):
        expected = model(x)
    with hooks.edit(model, {LAYER + "hook_decay": hooks.zero()}):
        deep = model(x)
    wrapped = NNsight(model)
    with wrapped.trace(x):
        wrapped.blocks[1].mixer.hook_delta.skip(torch.zeros(4, 11, 16, dtype=x.dtype))
        output = wrapped.output.save()
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    with wrapped.trace(x):
        wrapped.blocks[1].mixer.hook_decay.skip(torch.zeros(4, 11, 16, 4, dtype=x.dtype))
        output = wrapped.output.save()
    torch.testing.assert_close(output, deep, rtol=0, atol=0)


@pytest.mark.edit
def test_values_are_conformed_or_refused_as_in_the_other_idioms(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    with hooks.edit(model, {DELTA: hooks.mean("batch")}):
        expected = model(x)
    wrapped = NNsight(model)
    with wrapped.trace(x):
        wrapped.blocks[1].mixer.hook_delta.output = wrapped.blocks[1].mixer.hook_delta.output.mean(0, keepdim=True)
        output = wrapped.output.save()
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    with pytest.raises(Exception, match="shape"):
        with wrapped.trace(x):
            wrapped.blocks[1].mixer.hook_delta.output = wrapped.blocks[1].mixer.hook_delta.output[:2]


@pytest.mark.edit
def test_several_inputs_in_one_trace(make: Callable[..., Any], x: Tensor) -> None:
    """Trap 15: ``NNsight`` alone refuses the second input. Each invoke sees and edits its own rows."""
    model = make()
    first, second = x[:3], x[3:]
    clean = model(second)
    with hooks.edit(model, {DELTA: hooks.zero()}):
        expected = model(first)
    wrapped = hooks.nnsight(model)
    with wrapped.trace() as tracer:
        with tracer.invoke(first):
            rows = wrapped.blocks[1].mixer.hook_delta.output.save()
            wrapped.blocks[1].mixer.hook_delta.output = torch.zeros(3, 11, 16, dtype=x.dtype)
            edited = wrapped.output.save()
        with tracer.invoke(second):
            untouched = wrapped.output.save()
    assert rows.shape == (3, 11, 16)
    torch.testing.assert_close(edited, expected)
    torch.testing.assert_close(untouched, clean)
    with pytest.raises(NotImplementedError):
        plain = NNsight(model)
        with plain.trace() as tracer:
            with tracer.invoke(first):
                plain.output.save()
            with tracer.invoke(second):
                plain.output.save()


@pytest.mark.edit
@pytest.mark.parametrize("kind", ["hook_delta", "hook_write", "hook_state", "hook_x"])
def test_patching_from_one_input_into_another_equals_the_other_idioms(
    make: Callable[..., Any], x: Tensor, kind: str
) -> None:
    model, name = make(), LAYER + kind
    source, target = x[:2], x[2:]
    values = hooks.record(model, source, name)
    with hooks.edit(model, {name: hooks.resample(source=values, pos=[3])}, readout_only=kind == "hook_state"):
        expected = model(target)
    wrapped = hooks.nnsight(model)
    point = at(wrapped, name)
    with wrapped.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(source):
            value = point.output[:, 3].clone()
            barrier()
        with tracer.invoke(target):
            barrier()
            point.output[:, 3] = value
            output = wrapped.output.save()
    torch.testing.assert_close(output, expected)
    assert not torch.allclose(output, model(target))


@pytest.mark.hygiene
def test_invokes_that_cannot_be_joined_are_refused(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    _, state = model(x, return_state=True)
    wrapped = hooks.nnsight(model)
    with pytest.raises(Exception, match="same length"):
        with wrapped.trace() as tracer:
            with tracer.invoke(x[:, :5]):
                wrapped.output.save()
            with tracer.invoke(x):
                wrapped.output.save()
    with pytest.raises(Exception, match="same plain keywords"):
        with wrapped.trace() as tracer:
            with tracer.invoke(x, stop_at_layer=1):
                wrapped.output.save()
            with tracer.invoke(x):
                wrapped.output.save()
    with pytest.raises(Exception, match="no state"):
        with wrapped.trace() as tracer:
            with tracer.invoke(x, state):
                wrapped.output.save()
            with tracer.invoke(x, state):
                wrapped.output.save()
    with wrapped.trace() as tracer:
        with tracer.invoke(x[:1], stop_at_layer=1):
            first = wrapped.output.save()
        with tracer.invoke(x[1:], stop_at_layer=1):
            second = wrapped.output.save()
    torch.testing.assert_close(torch.cat([first, second]), model(x, stop_at_layer=1))


@pytest.mark.hygiene
def test_one_input_keeps_all_its_arguments(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    _, state = model(x, return_state=True)
    expected = model(x, state=state)
    wrapped = hooks.nnsight(model)
    with wrapped.trace(x, state):
        positional = wrapped.output.save()
    with wrapped.trace(x, state=state):
        by_name = wrapped.output.save()
    with wrapped.trace(x=x, state=state):
        all_named = wrapped.output.save()
    for output in (positional, by_name, all_named):
        torch.testing.assert_close(output, expected, rtol=0, atol=0)
    assert not torch.allclose(expected, model(x))


@pytest.mark.edit
def test_trap_9_at_one_point_the_trace_comes_first_then_hooks_in_order(make: Callable[..., Any], x: Tensor) -> None:
    """nnsight replaces the forward of the point; TransformerLens hooks run after it. A record is a copy of the end."""
    model = make()
    clean = hooks.record(model, x, DELTA)[DELTA]
    wrapped = NNsight(model)
    with model.hooks(fwd_hooks=[(DELTA, lambda value, hook: value + 1), (DELTA, lambda value, hook: value * 3)]):
        with wrapped.trace(x):
            seen = wrapped.blocks[1].mixer.hook_delta.output.save()
            wrapped.blocks[1].mixer.hook_delta.output = wrapped.blocks[1].mixer.hook_delta.output * 2
            used = wrapped.blocks[1].mixer.hook_delta_decay.output.save()
    torch.testing.assert_close(seen, clean)
    torch.testing.assert_close(used, (2 * clean + 1) * 3)


@pytest.mark.edit
def test_an_edit_around_a_trace(make: Callable[..., Any], x: Tensor, leftovers: Callable[[Any], list[str]]) -> None:
    """The idioms mix: a propagating edit and a trace that reads what follows from it."""
    model = make()
    with hooks.edit(model, hooks.do_state(1, [3], 0.5)):
        expected = hooks.record(model, x, [STATE, LAYER + "hook_y"])
    wrapped = NNsight(model)
    with hooks.edit(model, hooks.do_state(1, [3], 0.5)) as report:
        with wrapped.trace(x):
            state = wrapped.blocks[1].mixer.hook_state.output.save()
            y = wrapped.blocks[1].mixer.hook_y.output.save()
    assert report.fired == {STATE: 1}
    torch.testing.assert_close(state, expected[STATE], rtol=0, atol=0)
    torch.testing.assert_close(y, expected[LAYER + "hook_y"], rtol=0, atol=0)
    assert leftovers(model) == []


@pytest.mark.hygiene
def test_a_point_whose_source_is_instrumented_counts_as_watched(
    make: Callable[..., Any], x: Tensor, count_fused: Callable[[], int]
) -> None:
    """nnsight's ``.source`` rewrites a forward for good: what is not understood is slow and right."""
    model = make()
    expected = model(x)
    wrapped = NNsight(model)
    count_fused()
    with wrapped.trace(x):
        linear = wrapped.blocks[1].mixer.in_proj.source.F_linear_0.output.save()
    assert count_fused() == 2 and linear.shape == (4, 11, 32)
    assert wrapped.blocks[1].mixer.hook_state.source is not None
    torch.testing.assert_close(model(x), expected)
    assert count_fused() == 1


@pytest.mark.hygiene
def test_language_models_trace_on_integers(make: Callable[..., Any]) -> None:
    model = make(head="lm", d_out=7, d_in=1)
    tokens = torch.randint(7, (2, 6))
    wrapped = hooks.nnsight(model)
    with wrapped.trace() as tracer:
        with tracer.invoke(tokens[:1]):
            first = wrapped.output.save()
        with tracer.invoke(tokens[1:]):
            second = wrapped.output.save()
    torch.testing.assert_close(torch.cat([first, second]), model(tokens))


@pytest.mark.edit
def test_a_trace_on_a_server_is_refused_in_a_line(make: Callable[..., Any], x: Tensor) -> None:
    wrapped = hooks.nnsight(make("mamba", n_layers=1))
    with pytest.raises(hooks.BadArgument, match="remote=True") as refused:
        with wrapped.trace(x, remote=True):
            wrapped.output.save()
    assert "\n" not in str(refused.value)
