"""Edits of ``hook_state``: they propagate, fold where they can, and agree with the recurrence carried out by hand."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

import hooks

LAYER = "blocks.1.mixer."
STATE = LAYER + "hook_state"
VARIANTS = ["mamba", "lti", "s4d"]
EVERY = [*VARIANTS, "s4", "linear"]
Change = Callable[[Tensor, Tensor, int], Tensor]  # (h_t, h_{t-1}, t) -> the new h_t


def times(decay: Tensor, past: Tensor, parts: int) -> Tensor:
    """decay · past for one position; complex numbers as halves where ``parts`` is 2."""
    if parts == 1:
        return decay * past
    decay, past = (torch.complex(*z.chunk(2, dim=-1)) for z in (decay, past))
    return torch.cat([(decay * past).real, (decay * past).imag], dim=-1)


def by_hand(clean: hooks.Record, change: Change, parts: int = 1) -> Tensor:
    """All states of the layer when each h_t is replaced by ``change`` as soon as it is there."""
    decay, write = clean[LAYER + "hook_decay"], clean[LAYER + "hook_write"]
    past, states = clean[LAYER + "hook_state_init"], []
    for t in range(decay.shape[1]):
        past = change(times(decay[:, t], past, parts) + write[:, t], past, t)
        states.append(past)
    return torch.stack(states, dim=1)


def at(positions: list[int], new: Change) -> Change:
    return lambda h, before, t: new(h, before, t) if t in positions else h


V = torch.randn(4, 2, 16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
EDITS: dict[str, tuple[Callable[[], Any], Change]] = {
    "zero": (lambda: hooks.zero(pos=[3, 7]), at([3, 7], lambda h, before, t: 0 * h)),
    "zero everywhere": (hooks.zero, lambda h, before, t: 0 * h),
    "scale": (lambda: hooks.scale(0.5, pos=slice(2, 6)), at([2, 3, 4, 5], lambda h, before, t: h / 2)),
    "scale everywhere": (lambda: hooks.scale(0.5), lambda h, before, t: h / 2),
    "add": (lambda: hooks.add(0.3, pos=-1), at([10], lambda h, before, t: h + 0.3)),
    "freeze": (lambda: hooks.freeze(pos=[0, 4, 5]), at([0, 4, 5], lambda h, before, t: before)),
    "a function": (lambda: torch.tanh, lambda h, before, t: h.tanh()),
    "mean": (lambda: hooks.mean("batch", pos=[2, 8]), at([2, 8], lambda h, before, t: h.mean(0, True).expand_as(h))),
    "channel mean": (
        lambda: hooks.mean("channel", pos=4), at([4], lambda h, before, t: h.mean(1, True).expand_as(h))
    ),
}  # fmt: skip


@pytest.mark.edit
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", EDITS)
def test_fact_3_an_edit_propagates_as_the_recurrence_by_hand(
    make: Callable[..., Any], x: Tensor, name: str, variant: str
) -> None:
    """The states after it follow from it, and so does the output; nothing before it changes."""
    model = make(variant)
    parts = 2 if variant == "s4d" else 1
    build, change = EDITS[name]
    clean = hooks.record(model, x)
    expected = by_hand(clean, change, parts)
    with hooks.edit(model, {STATE: build()}) as report:
        found = hooks.record(model, x)
        plain = model(x)
    torch.testing.assert_close(found[STATE], expected)
    assert not torch.allclose(expected, clean[STATE])
    # The rest of the model, given this layer's read-out computed by hand.
    if variant == "s4d":
        halves = torch.complex(*expected.chunk(2, dim=-1))
        read = 2 * (halves * torch.view_as_complex(model.blocks[1].mixer.C)).real.sum(-1)
    else:
        read = (expected * clean[LAYER + "hook_C"][:, :, None, :]).sum(-1)
    with hooks.edit(model, {LAYER + "hook_y": hooks.set_to(read)}):
        output = model(x)
    torch.testing.assert_close(found.output, output)
    torch.testing.assert_close(plain, output)
    assert not torch.allclose(plain, clean.output)
    assert report.fired == {STATE: 2}, "once in each run, however many positions"


@pytest.mark.edit
@pytest.mark.parametrize("variant", ["mamba", "lti"])
def test_edits_of_channels_leave_the_others(make: Callable[..., Any], x: Tensor, variant: str) -> None:
    model = make(variant)
    clean = hooks.record(model, x)
    some = [1, 6, 15]
    cases: list[tuple[Any, Change]] = [
        (hooks.zero(pos=[3], channels=some), at([3], lambda h, before, t: 0 * h)),
        (hooks.freeze(pos=[3], channels=some), at([3], lambda h, before, t: before)),
        (hooks.mean("batch", pos=[3], channels=some), at([3], lambda h, before, t: h.mean(0, True).expand_as(h))),
    ]
    for edit, change in cases:
        for edits in (edit, [{STATE: torch.clone}, {STATE: edit}]):  # folded; and interrupting, behind a function
            with hooks.edit(model, {STATE: edits} if isinstance(edits, hooks.Edit) else edits):
                found = hooks.record(model, x, STATE)[STATE]
            whole = by_hand(clean, change)
            others = [c for c in range(16) if c not in some]
            torch.testing.assert_close(found[:, :, some], whole[:, :, some])
            torch.testing.assert_close(found[:, :, others], clean[STATE][:, :, others])


@pytest.mark.law
@pytest.mark.parametrize("variant", EVERY)
def test_folding_and_interrupting_agree(make: Callable[..., Any], x: Tensor, variant: str) -> None:
    """Behind a function that does nothing every edit has to interrupt; values and gradients are the same."""
    model = make(variant)
    width = model.axis_sizes()["d_inner"]
    value = torch.randn(4, 2, width, hooks.record(model, x, STATE)[STATE].shape[-1], dtype=x.dtype)
    others = torch.randn_like(x)
    folding = [
        hooks.set_to(value, pos=[7, 2]), hooks.add(value[:1], pos=[7, 2]), hooks.scale(0.3), hooks.zero(pos=-1),
        hooks.scale(value[:, :1, :, :1], pos=[1, 5]), hooks.freeze(pos=[0, 6]), hooks.freeze(),
        hooks.mean("batch", reference=others, pos=[7, 2]),
        hooks.resample(source=hooks.record(model, others, STATE), pos=[4]),
        hooks.set_to(value[0], pos=[3, 9]),
    ]  # fmt: skip
    for edit in folding:
        results = []
        for edits in ([{STATE: edit}], [{STATE: torch.clone}, {STATE: edit}]):
            model.zero_grad()
            with hooks.edit(model, edits):
                found = hooks.record(model, x, STATE, grad=True)
            found.output.pow(2).sum().backward()
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
            results.append((found[STATE].detach(), found.output.detach(), gradients))
        torch.testing.assert_close(results[0], results[1], msg=lambda m, e=edit: f"{e}: {m}")


@pytest.mark.law
def test_freezing_is_a_step_of_zero_in_both_roles(make: Callable[..., Any], x: Tensor) -> None:
    for variant in ("mamba", "lti"):
        model, still = make(variant), [0, 3, 4, 10]
        clean = model(x)
        with hooks.edit(model, {"*.hook_state": hooks.freeze(pos=still)}):
            frozen = hooks.record(model, x, "*.hook_state")
        roles = {"*.hook_delta_decay": hooks.zero(pos=still), "*.hook_delta_write": hooks.zero(pos=still)}
        with hooks.edit(model, roles):
            stepped = hooks.record(model, x, "*.hook_state")
        torch.testing.assert_close(dict(frozen), dict(stepped))
        torch.testing.assert_close(frozen.output, stepped.output)
        assert not torch.allclose(frozen.output, clean)
        states = frozen[STATE]
        torch.testing.assert_close(states[:, 3:5], states[:, [2, 2]], rtol=0, atol=0)
        assert not states[:, 0].any(), "frozen at the first token: the empty state stays"


@pytest.mark.law
@pytest.mark.parametrize("variant", EVERY)
def test_do_state_sets_the_state_and_doing_it_twice_is_doing_it_once(
    make: Callable[..., Any], x: Tensor, variant: str
) -> None:
    model = make(variant)
    clean = hooks.record(model, x, STATE)
    value = torch.randn_like(clean[STATE][:, [3, 6]])
    do = hooks.do_state(layer=1, pos=[3, 6], value=value)
    results = []
    for edits in (do, [do], [do, do], {STATE: hooks.set_to(value, pos=[3, 6])}):
        with hooks.edit(model, edits):
            found = hooks.record(model, x, STATE)
        torch.testing.assert_close(found[STATE][:, [3, 6]], value, rtol=0, atol=0)
        torch.testing.assert_close(found[STATE][:, :3], clean[STATE][:, :3])
        results.append(found.output)
    with hooks.edit(model, do), hooks.edit(model, do):
        results.append(model(x))
    for output in results[1:]:
        torch.testing.assert_close(output, results[0], rtol=0, atol=0)
    assert not torch.allclose(results[0][:, 3:], clean.output[:, 3:])
    torch.testing.assert_close(results[0][:, :3], clean.output[:, :3])


@pytest.mark.law
def test_do_state_of_the_state_that_is_there_changes_nothing(make: Callable[..., Any], x: Tensor) -> None:
    """And cuts the graph there: nothing before it has a gradient through the state any more."""
    model = make()
    clean = hooks.record(model, x, STATE)
    with hooks.edit(model, hooks.do_state(1, [4], clean[STATE][:, [4]])), hooks.expose(model):
        same = model(x)
    torch.testing.assert_close(same, clean.output)
    sites = [LAYER + "hook_write", LAYER + "hook_y"]
    with hooks.edit(model, hooks.do_state(1, [4], clean[STATE][:, [4]])):
        found = hooks.record(model, x, sites, grad=True)
    gradient = torch.autograd.grad(found.output[:, 4:].sum(), found[sites[0]])[0]
    assert not gradient[:, :5].any() and bool(gradient[:, 5:].any())


@pytest.mark.edit
def test_do_state_in_several_layers_and_with_every_kind_of_index(make: Callable[..., Any], x: Tensor) -> None:
    model = make(n_layers=3)
    for layer in ([0, 2], (0, 2)):
        with hooks.edit(model, hooks.do_state(layer, 5, 1.0)):
            found = hooks.record(model, x, "*.hook_state")
        for i, name in enumerate(found):
            assert bool((found[name][:, 5] == 1).all()) == (i in (0, 2))
    with hooks.edit(model, [hooks.do_state(0, -1, 1.0), {"blocks.2.mixer.hook_state": hooks.zero(pos=0)}]):
        found = hooks.record(model, x, "*.hook_state")
    assert bool((found["blocks.0.mixer.hook_state"][:, 10] == 1).all())
    assert not found["blocks.2.mixer.hook_state"][:, 0].any()
    per_channel = torch.randn(4, 1, 2, 4, dtype=x.dtype)
    with hooks.edit(model, hooks.do_state(1, [3], per_channel, channels=[0, 7])):
        found = hooks.record(model, x, STATE)[STATE]
    torch.testing.assert_close(found[:, [3]][:, :, [0, 7]], per_channel)
    for wrong in (torch.zeros(4, 3, 16, 4), torch.zeros(16), torch.zeros(1, 4, 1, 16, 4)):
        with pytest.raises(hooks.BadArgument, match="shape"), hooks.edit(model, hooks.do_state(1, [3, 5], wrong)):
            model(x)


@pytest.mark.edit
@pytest.mark.parametrize("variant", [*VARIANTS, "linear"])  # S4's edits interrupt, and its gradient there is 0 · inf
def test_do_state_guards_against_infinity_in_the_past(make: Callable[..., Any], x: Tensor, variant: str) -> None:
    """0 · inf is NaN; the past is cut exactly, in values and in gradients."""
    model = make(variant)
    start = f"{LAYER}hook_state_init"
    infinite = {start: hooks.set_to(torch.inf)}
    with pytest.raises(hooks.NonFinite, match="hook_state_init"), hooks.edit(model, infinite):
        model(x)
    do = hooks.do_state(1, [0], 0.5)
    with hooks.edit(model, do):
        expected = model(x)
    with hooks.edit(model, [infinite, do]):
        found = model(x)
        found.sum().backward()
    torch.testing.assert_close(found, expected)
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    with hooks.edit(model, [infinite, {STATE: lambda h: torch.full_like(h, 0.5)}]):
        interrupted = hooks.record(model, x, STATE)[STATE]
    assert bool((interrupted == 0.5).all())


@pytest.mark.law
@pytest.mark.parametrize("where", ["hook_write", "hook_decay", "hook_delta", "hook_x"])
def test_an_edit_of_the_state_holds_whatever_is_done_upstream(make: Callable[..., Any], x: Tensor, where: str) -> None:
    """The state comes after its operands: an edit of those, inside or outside, by whatever idiom, cannot undo it."""
    model = make()
    do = hooks.do_state(1, [3], 0.25)
    upstream = {LAYER + where: hooks.scale(0.5)}

    def raw(value: Tensor, hook: Any) -> Tensor:
        return value * 0.5

    results = []
    with hooks.edit(model, do), hooks.edit(model, upstream):
        results.append(hooks.record(model, x, STATE))
    with hooks.edit(model, upstream), hooks.edit(model, do):
        results.append(hooks.record(model, x, STATE))
    with hooks.edit(model, [do, upstream]):
        results.append(hooks.record(model, x, STATE))
    with hooks.edit(model, do), model.hooks(fwd_hooks=[(LAYER + where, raw)]):
        results.append(hooks.record(model, x, STATE))
    for found in results:
        assert bool((found[STATE][:, 3] == 0.25).all())
        torch.testing.assert_close(found[STATE], results[0][STATE], rtol=0, atol=0)
        torch.testing.assert_close(found.output, results[0].output, rtol=0, atol=0)
    with hooks.edit(model, do):
        assert not torch.allclose(model(x), results[0].output), "the upstream edit does something"


@pytest.mark.edit
def test_several_edits_of_one_state_act_in_order(make: Callable[..., Any], x: Tensor) -> None:
    """Folding ones and interrupting ones, mixed, nested or in one block."""
    model = make()
    clean = hooks.record(model, x)
    steps: dict[str, tuple[Any, Change]] = {
        "scale": (hooks.scale(2.0, pos=[2, 5]), at([2, 5], lambda h, before, t: 2 * h)),
        "tanh": (torch.tanh, lambda h, before, t: h.tanh()),
        "freeze": (hooks.freeze(pos=[5, 6]), at([5, 6], lambda h, before, t: before)),
    }
    outcomes = []
    for order in permutations(steps):
        chain = [steps[name] for name in order]

        def change(h: Tensor, before: Tensor, t: int, chain: Any = chain) -> Tensor:
            for _, step in chain:
                h = step(h, before, t)
            return h

        expected = by_hand(clean, change)
        with hooks.edit(model, [{STATE: edit} for edit, _ in chain]):
            together = hooks.record(model, x, STATE)[STATE]
        torch.testing.assert_close(together, expected, msg=lambda m, o=order: f"{o}: {m}")
        (a, _), (b, _), (c, _) = chain
        with hooks.edit(model, {STATE: a}), hooks.edit(model, [{STATE: b}, {STATE: c}]):
            nested = hooks.record(model, x, STATE)[STATE]
        torch.testing.assert_close(nested, expected, msg=lambda m, o=order: f"{o}, nested: {m}")
        outcomes.append(expected)
    assert len({tuple(o[0, 5:7].flatten().tolist()) for o in outcomes}) > 4, "the order matters"


@pytest.mark.edit
@pytest.mark.parametrize("variant", EVERY)
def test_readout_only_changes_what_is_read_and_nothing_later(make: Callable[..., Any], x: Tensor, variant: str) -> None:
    model = make(variant)
    clean, (_, state) = hooks.record(model, x, [STATE, LAYER + "hook_y"]), model(x, return_state=True)
    with hooks.edit(model, {STATE: hooks.zero(pos=[4])}, readout_only=True):
        found = hooks.record(model, x, [STATE, LAYER + "hook_y"])
        _, after = model(x, return_state=True)
    expected = clean[STATE].clone()
    expected[:, 4] = 0
    torch.testing.assert_close(found[STATE], expected)
    y, clean_y = found[LAYER + "hook_y"], clean[LAYER + "hook_y"]
    rest = [t for t in range(11) if t != 4]
    assert not y[:, 4].any()
    torch.testing.assert_close(y[:, rest], clean_y[:, rest])
    torch.testing.assert_close(after[1].h, state[1].h)
    with hooks.edit(model, {STATE: hooks.zero(pos=[4])}):
        propagated = hooks.record(model, x, LAYER + "hook_y")[LAYER + "hook_y"]
    assert not torch.allclose(propagated[:, 5:], clean_y[:, 5:])


@pytest.mark.edit
def test_a_mean_over_positions_needs_the_future(make: Callable[..., Any], x: Tensor) -> None:
    model, kinds = make(), [0, 1] * 5 + [0]
    for edit in (hooks.mean("pos"), hooks.mean(("batch", "kind"), kinds=kinds)):
        with pytest.raises(hooks.BadArgument, match="reference="), hooks.edit(model, {STATE: edit}):
            pytest.fail("the body must not run")
        with hooks.edit(model, {STATE: edit}, readout_only=True):
            assert not torch.allclose(model(x), hooks.record(model, x, STATE).output * 0)
    reference = hooks.mean(("batch", "pos"), reference=torch.randn_like(x))
    with hooks.edit(model, {STATE: reference}):
        found = hooks.record(model, x, STATE)[STATE]
    torch.testing.assert_close(found, found[:1, :1].expand_as(found))


@pytest.mark.edit
def test_freeze_is_for_states_that_propagate(make: Callable[..., Any]) -> None:
    model = make()
    for edits, kwargs in (({STATE: hooks.freeze()}, {"readout_only": True}), ({"*.hook_delta": hooks.freeze()}, {})):
        with pytest.raises(hooks.BadArgument, match="freeze"), hooks.edit(model, edits, **kwargs):
            pytest.fail("the body must not run")


@pytest.mark.edit
@pytest.mark.parametrize("variant", EVERY)
def test_the_returned_state_is_that_of_the_edited_run(make: Callable[..., Any], x: Tensor, variant: str) -> None:
    """An edit in the first chunk acts on in the second; positions count within a call."""
    model = make(variant)
    with hooks.edit(model, {STATE: hooks.scale(0.5, pos=[3])}):
        whole = model(x)
        first, state = model(x[:, :6], return_state=True)
    second = model(x[:, 6:], state=state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    assert not torch.allclose(whole[:, 6:], model(x)[:, 6:])
    with pytest.raises(hooks.BadArgument, match="outside"), hooks.edit(model, {STATE: hooks.scale(0.5, pos=[3])}):
        model.step(x[:, 0])


@pytest.mark.edit
def test_freezing_the_first_token_of_a_chunk_keeps_the_state_that_came_in(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    _, state = model(x[:, :4], return_state=True)
    for edits in ([{STATE: hooks.freeze(pos=0)}], [{STATE: torch.clone}, {STATE: hooks.freeze(pos=0)}]):
        with hooks.edit(model, edits, positions="run"):
            found = hooks.record(model, x[:, 4:], STATE, state=state)
        torch.testing.assert_close(found[STATE][:, 0], state[1].h, rtol=0, atol=0)


@pytest.mark.edit
def test_complex_factors_that_are_no_multiplication_interrupt(make: Callable[..., Any], x: Tensor) -> None:
    """Scaling real and imaginary parts apart is affine in the pair but no complex factor: folding would be wrong."""
    model = make("s4d")
    factor = torch.cat([torch.ones(4), torch.zeros(4)]).to(x.dtype)
    clean = hooks.record(model, x)
    with hooks.edit(model, {STATE: hooks.scale(factor, pos=[2, 6])}):
        found = hooks.record(model, x, STATE)[STATE]
    torch.testing.assert_close(found, by_hand(clean, at([2, 6], lambda h, before, t: h * factor), parts=2))
    with hooks.edit(model, {STATE: hooks.scale(factor[:4].repeat(2), pos=[2, 6])}):
        same = hooks.record(model, x, STATE)[STATE]
    torch.testing.assert_close(same, clean[STATE])


@pytest.mark.edit
def test_decay_and_write_sites_keep_their_own_values_under_an_edit_of_the_state(
    make: Callable[..., Any], x: Tensor
) -> None:
    model = make()
    clean = hooks.record(model, x)
    with hooks.edit(model, hooks.do_state(1, [3], 0.25)):
        found = hooks.record(model, x)
    for kind in ("hook_decay", "hook_write"):
        torch.testing.assert_close(found[LAYER + kind], clean[LAYER + kind], rtol=0, atol=0)
