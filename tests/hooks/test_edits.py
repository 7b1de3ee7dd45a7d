"""Each edit does what its name says, at the place that it names, and refuses what it cannot do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hooks

DELTA = "blocks.1.mixer.hook_delta"
SITES = {
    "3-D": DELTA,
    "4-D": "blocks.1.mixer.hook_write",
    "state sized": "blocks.1.mixer.hook_B",
    "residual": "blocks.1.hook_resid_pre",
}
EDITS: dict[str, tuple[Callable[..., hooks.Edit], Callable[[Tensor], Tensor]]] = {
    "zero": (hooks.zero, torch.zeros_like),
    "scale": (lambda **at: hooks.scale(0.5, **at), lambda v: v * 0.5),
    "add": (lambda **at: hooks.add(3.0, **at), lambda v: v + 3),
    "set_to": (lambda **at: hooks.set_to(0.7, **at), lambda v: torch.full_like(v, 0.7)),
    "mean": (lambda **at: hooks.mean("batch", **at), lambda v: v.mean(0, keepdim=True).expand_as(v)),
}
PLACES: dict[str, tuple[dict[str, Any], list[int], list[int]]] = {
    "everywhere": ({}, list(range(11)), [0, 1, 2, 3]),
    "one position": ({"pos": 3}, [3], [0, 1, 2, 3]),
    "from the end": ({"pos": -1}, [10], [0, 1, 2, 3]),
    "positions": ({"pos": [7, 2]}, [7, 2], [0, 1, 2, 3]),
    "a slice": ({"pos": slice(1, None, 4)}, [1, 5, 9], [0, 1, 2, 3]),
    "a backward slice": ({"pos": slice(None, None, -5)}, [10, 5, 0], [0, 1, 2, 3]),
    "a range": ({"pos": range(2, 4)}, [2, 3], [0, 1, 2, 3]),
    "a tensor": ({"pos": torch.tensor([0, 4])}, [0, 4], [0, 1, 2, 3]),
    "a mask": ({"pos": torch.arange(11) > 8}, [9, 10], [0, 1, 2, 3]),
    "channels": ({"channels": [0, 3]}, list(range(11)), [0, 3]),
    "both": ({"pos": [1, -2], "channels": slice(1, 3)}, [1, 9], [1, 2]),
}


def edited(model: Any, x: Tensor, edits: Any, site: str, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """(value of ``site``, output) of a run with ``edits``."""
    with hooks.edit(model, edits, **kwargs) as report:
        found = hooks.record(model, x, site)
    assert all(report.fired.values())
    return found[site], found.output


@pytest.mark.edit
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", EDITS)
def test_values_of_an_edit_on_a_tensor(name: str, place: str) -> None:
    """Any number of axes after the channels; what is not picked stays, and the tensor given is not written to."""
    make_edit, expected = EDITS[name]
    at, positions, channels = PLACES[place]
    for shape in ((4, 11, 4), (4, 11, 4, 3)):
        value = torch.randn(shape, dtype=torch.float64)
        before, target = value.clone(), value.clone()
        grid = torch.meshgrid(torch.tensor(positions), torch.tensor(channels), indexing="ij")
        target[(slice(None), *grid)] = expected(value)[(slice(None), *grid)]
        result = make_edit(**at)(value)
        torch.testing.assert_close(result, target)
        torch.testing.assert_close(value, before, rtol=0, atol=0)
        assert not torch.equal(result, value)


@pytest.mark.edit
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", EDITS)
def test_an_edit_of_a_model_is_the_edit_of_its_tensor(
    make: Callable[..., Any], x: Tensor, name: str, site: str
) -> None:
    model, where = make(), SITES[site]
    clean = hooks.record(model, x, where)
    edit = EDITS[name][0](pos=[2, 6], channels=[0, 2])
    value, output = edited(model, x, {where: edit}, where)
    torch.testing.assert_close(value, edit(clean[where], where))
    assert not torch.allclose(output, clean.output)
    torch.testing.assert_close(output[:, :2], clean.output[:, :2], msg="causality: nothing earlier changes")


@pytest.mark.edit
def test_fact_2_zeroing_the_time_step(make: Callable[..., Any], x: Tensor) -> None:
    """Δ = 0 forgets nothing and writes nothing; a zero before the softplus would be a step of ln 2."""
    model = make()
    value, _ = edited(model, x, {DELTA: hooks.zero()}, DELTA)
    assert not value.any()
    with hooks.edit(model, {DELTA: hooks.zero()}):
        v = hooks.record(model, x, "blocks.1.mixer.*")
    assert bool((v["blocks.1.mixer.hook_decay"] == 1).all()) and not v["blocks.1.mixer.hook_state"].any()
    value, _ = edited(model, x, {f"{DELTA}_pre": hooks.zero()}, DELTA)
    torch.testing.assert_close(value, torch.full_like(value, torch.tensor(2.0).log().item()), rtol=1e-7, atol=0)


@pytest.mark.edit
@pytest.mark.parametrize("role", ["decay", "write"])
def test_the_two_roles_of_the_time_step_are_apart(make: Callable[..., Any], x: Tensor, role: str) -> None:
    model, other = make(), {"decay": "write", "write": "decay"}[role]
    clean = hooks.record(model, x, "blocks.1.mixer.*")
    with hooks.edit(model, {f"{DELTA}_{role}": hooks.scale(2.0)}):
        found = hooks.record(model, x, "blocks.1.mixer.*")
    stem = "blocks.1.mixer.hook_"
    torch.testing.assert_close(found[f"{stem}{other}"], clean[f"{stem}{other}"], rtol=0, atol=0)
    powers = {"decay": clean[f"{stem}decay"] ** 2, "write": 2 * clean[f"{stem}write"]}
    torch.testing.assert_close(found[f"{stem}{role}"], powers[role])


@pytest.mark.edit
def test_resample_takes_another_prompt_at_the_same_position(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    clean = hooks.record(model, x, "*.hook_delta")
    first, second = clean
    with hooks.edit(model, {"*.hook_delta": hooks.resample(seed=3)}):
        found = hooks.record(model, x, [first, second, "blocks.1.mixer.hook_B"])
    order = [next(j for j in range(4) if torch.equal(found[first][i], clean[first][j])) for i in range(4)]
    assert sorted(order) == [0, 1, 2, 3] and all(i != j for i, j in enumerate(order)), "a derangement"
    value = torch.randn(4, 11, 16)
    torch.testing.assert_close(hooks.resample(seed=3)(value), value[order], msg="all sites take the same prompts")
    assert (
        len({tuple(hooks.resample(seed=s)(torch.arange(4.0)[:, None, None]).flatten().tolist()) for s in range(30)}) > 3
    )
    for size in (2, 3, 17):
        taken = hooks.resample(seed=size)(torch.arange(float(size))[:, None, None]).flatten()
        assert bool((taken != torch.arange(float(size))).all()) and len(taken.unique()) == size
    with pytest.raises(hooks.BadArgument, match="one prompt"):
        edited(model, x[:1], {DELTA: hooks.resample()}, DELTA)


@pytest.mark.edit
def test_resample_from_a_source(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    source = hooks.record(model, torch.randn_like(x), [DELTA])
    value, _ = edited(model, x, {DELTA: hooks.resample(source=source)}, DELTA)
    torch.testing.assert_close(value, source[DELTA])
    value, _ = edited(model, x, {DELTA: hooks.resample(source=source, pos=[3], channels=[1])}, DELTA)
    torch.testing.assert_close(value[:, 3, 1], source[DELTA][:, 3, 1])
    assert not torch.allclose(value[:, 4], source[DELTA][:, 4])
    for wrong in (source[DELTA][:1], source[DELTA][:, :5]):
        with pytest.raises(hooks.BadArgument, match="source"):
            edited(model, x, {DELTA: hooks.resample(source={DELTA: wrong})}, DELTA)
    with pytest.raises(hooks.BadArgument, match="hook_B"):
        edited(model, x, {"blocks.1.mixer.hook_B": hooks.resample(source=source)}, DELTA)


@pytest.mark.edit
def test_values_that_broadcast_and_values_that_do_not(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    per_channel, per_prompt = torch.randn(16, dtype=x.dtype), torch.randn(4, 1, 1, dtype=x.dtype)
    clean = hooks.record(model, x, DELTA)[DELTA]
    value, _ = edited(model, x, {DELTA: hooks.set_to(per_channel)}, DELTA)
    torch.testing.assert_close(value, per_channel.expand(4, 11, 16))
    value, _ = edited(model, x, {DELTA: hooks.add(per_prompt, pos=[0, 5])}, DELTA)
    torch.testing.assert_close(value[:, [0, 5]], clean[:, [0, 5]] + per_prompt)
    value, _ = edited(model, x, {DELTA: hooks.scale(per_channel[:2], channels=[4, 6])}, DELTA)
    torch.testing.assert_close(value[..., [4, 6]], clean[..., [4, 6]] * per_channel[:2])
    for wrong in (torch.randn(5), torch.randn(2, 4, 11, 16), torch.randn(4, 3, 16)):
        for maker in (hooks.set_to, hooks.add, hooks.scale):
            with pytest.raises(hooks.BadArgument, match="shape"):
                edited(model, x, {DELTA: maker(wrong)}, DELTA)


@pytest.mark.edit
def test_scale_by_zero_is_zero_where_the_value_is_infinite() -> None:
    value = torch.tensor([[[torch.inf, 2.0], [3.0, torch.nan]]])
    assert not hooks.scale(0.0)(value).any()
    torch.testing.assert_close(hooks.scale(torch.tensor([0.0, 2.0]))(value)[0, 0], torch.tensor([0.0, 4.0]))
    assert hooks.set_to(1.0)(value).eq(1).all()


@pytest.mark.edit
def test_a_plain_function_is_an_edit(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    clean = hooks.record(model, x, DELTA)

    def scale(delta: Tensor) -> Tensor:  # the name of a maker, and still the caller's own function
        return 2 * delta

    value, output = edited(model, x, {DELTA: scale}, DELTA)
    torch.testing.assert_close(value, 2 * clean[DELTA])
    assert not torch.allclose(output, clean.output)
    value, _ = edited(model, x, {DELTA: lambda d: d.mean((0, 1))}, DELTA)
    torch.testing.assert_close(value, clean[DELTA].mean((0, 1)).expand(4, 11, 16))

    class Module(torch.nn.Module):
        def forward(self, delta: Tensor) -> Tensor:
            return delta.flip(0)

    value, _ = edited(model, x, {DELTA: Module()}, DELTA)
    torch.testing.assert_close(value, clean[DELTA].flip(0))


@pytest.mark.edit
def test_a_function_that_writes_in_place_changes_its_site_only(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    clean = hooks.record(model, x)

    def in_place(value: Tensor) -> Tensor:
        value[:, 3] = 0
        return value

    name = "blocks.1.hook_resid_pre"
    with hooks.edit(model, {name: in_place}):
        found = hooks.record(model, x)
    assert not found[name][:, 3].any()
    torch.testing.assert_close(found["blocks.0.hook_resid_post"], clean["blocks.0.hook_resid_post"], rtol=0, atol=0)

    def forgets_to_return(value: Tensor) -> None:
        value.zero_()

    with pytest.raises(hooks.BadArgument, match="NoneType"), hooks.edit(model, {name: forgets_to_return}):
        model(x)


@pytest.mark.edit
@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda v: None, "NoneType"),
        (lambda v: 3.0, "float"),
        (lambda v: v[:, 1:], "shape"),
        (lambda v: v[:2], "shape"),
        (lambda v: v[None], "shape"),
        (lambda v: torch.cat([v, v], dim=2), "shape"),
    ],
    ids=["None", "a number", "fewer positions", "fewer prompts", "one axis more", "more channels"],
)
def test_trap_1_answers_that_do_not_fit_are_refused(
    make: Callable[..., Any], x: Tensor, leftovers: Callable[[Any], list[str]], answer: Any, says: str
) -> None:
    """A compiled scan does not check shapes: what is wrong has to stop before it."""
    model = make()
    for name in (DELTA, "blocks.1.mixer.hook_decay", "blocks.1.mixer.hook_state", "hook_embed"):
        with pytest.raises(hooks.BadArgument, match=says), hooks.edit(model, {name: answer}):
            model(x)
        assert leftovers(model) == []


@pytest.mark.edit
@pytest.mark.parametrize(
    ("at", "says"),
    [
        ({"pos": []}, "nothing"),
        ({"pos": slice(5, 5)}, "nothing"),
        ({"pos": torch.zeros(11, dtype=torch.bool)}, "nothing"),
        ({"pos": 11}, "outside"),
        ({"pos": [0, -12]}, "outside"),
        ({"pos": torch.tensor(2.7)}, "integers"),
        ({"pos": {"a": 1}}, "int"),
        ({"pos": [3, 3]}, "twice"),
        ({"pos": [-1, 10]}, "twice"),
        ({"pos": torch.ones(10, dtype=torch.bool)}, "mask"),
        ({"channels": 16}, "outside"),
        ({"channels": []}, "nothing"),
    ],
    ids=str,
)
def test_places_that_do_not_exist_are_refused(
    make: Callable[..., Any], x: Tensor, leftovers: Callable[[Any], list[str]], at: dict[str, Any], says: str
) -> None:
    model = make()
    for name in (DELTA, "blocks.1.mixer.hook_state"):
        with pytest.raises((hooks.BadArgument, TypeError), match=says), hooks.edit(model, {name: hooks.zero(**at)}):
            model(x)
        assert leftovers(model) == []


@pytest.mark.edit
@pytest.mark.parametrize("kind", ["hook_state_init", "hook_conv_init"])
def test_sites_without_positions(make: Callable[..., Any], x: Tensor, kind: str) -> None:
    """There axis 1 counts channels, so pos= has no meaning and channels= means that axis."""
    model, name = make(), f"blocks.0.mixer.{kind}"
    value, _ = edited(model, x, {name: hooks.set_to(1.0, channels=[2, 5])}, name)
    expected = torch.zeros_like(value)
    expected[:, [2, 5]] = 1
    torch.testing.assert_close(value, expected)
    value, _ = edited(model, x, [{name: hooks.set_to(torch.randn_like(value))}, {name: hooks.mean("channel")}], name)
    torch.testing.assert_close(value, value[:, :1].expand_as(value))
    for edit in (hooks.zero(pos=3), hooks.mean("pos"), hooks.mean("kind", kinds=[0] * 11)):
        with pytest.raises(hooks.BadArgument, match="no position axis"):
            edited(model, x, {name: edit}, name)


@pytest.mark.edit
@pytest.mark.parametrize(
    ("edits", "error", "says"),
    [
        ({"*.hook_dleta": hooks.zero()}, hooks.UnknownSite, r"\*\.hook_delta"),
        ({DELTA: hooks.zero}, hooks.BadArgument, r"zero\(…\)"),
        ({DELTA: hooks.mean}, hooks.BadArgument, r"mean\(…\)"),
        ({DELTA: hooks.do_state}, hooks.BadArgument, r"do_state\(…\)"),
        ({DELTA: 0.0}, hooks.BadArgument, "float"),
        ({DELTA: hooks.do_state(0, [1], 0.0)}, hooks.BadArgument, "DoState"),
        ({}, hooks.BadArgument, "nothing to edit"),
        ([], hooks.BadArgument, "nothing to edit"),
        ({DELTA: hooks.freeze()}, hooks.BadArgument, "hook_state"),
        (hooks.do_state(9, [1], 0.0), hooks.UnknownSite, "blocks.9"),
        ({DELTA: hooks.zero(), "nothing": hooks.zero()}, hooks.UnknownSite, "nothing"),
    ],
)
def test_bad_arguments_are_refused_before_anything_changes(
    make: Callable[..., Any], leftovers: Callable[[Any], list[str]], edits: Any, error: type[Exception], says: str
) -> None:
    model = make()
    with pytest.raises(error, match=says), hooks.edit(model, edits):
        pytest.fail("the body must not run")
    assert leftovers(model) == []


@pytest.mark.edit
def test_readout_only_is_about_states(make: Callable[..., Any]) -> None:
    with (
        pytest.raises(hooks.BadArgument, match="readout_only"),
        hooks.edit(make(), {DELTA: hooks.zero()}, readout_only=True),
    ):
        pytest.fail("the body must not run")


@pytest.mark.edit
def test_an_edit_that_does_not_fire_raises(
    make: Callable[..., Any], x: Tensor, leftovers: Callable[[Any], list[str]]
) -> None:
    model = make()
    with pytest.raises(hooks.DidNotFire, match="not run inside"), hooks.edit(model, {DELTA: hooks.zero()}):
        pass
    model(x, stop_at_layer=1)
    with pytest.raises(hooks.DidNotFire, match="not run inside"), hooks.edit(model, {DELTA: hooks.zero()}):
        pass  # and not "stop_at_layer=1", which was another run
    for name in (DELTA, "blocks.1.mixer.hook_state"):
        with (
            pytest.raises(hooks.DidNotFire, match=rf"{name}.*stop_at_layer=1"),
            hooks.edit(model, {name: hooks.zero()}),
        ):
            model(x, stop_at_layer=1)
    with pytest.raises(hooks.DidNotFire, match=r"blocks\.1"), hooks.edit(model, {"*.hook_delta": hooks.zero()}):
        model(x, stop_at_layer=1)
    assert leftovers(model) == []
    with hooks.edit(model, {"*.hook_delta": hooks.zero()}) as report:
        model(x)
        model(x)
    assert report.fired == {"blocks.0.mixer.hook_delta": 2, DELTA: 2}
    assert repr(report).splitlines()[1] == f"{DELTA}  edited 2 times"


@pytest.mark.edit
def test_did_not_fire_never_hides_an_exception_of_the_body(
    make: Callable[..., Any], x: Tensor, leftovers: Callable[[Any], list[str]]
) -> None:
    model = make()
    with pytest.raises(KeyError, match="mine"), hooks.edit(model, {DELTA: hooks.zero()}):
        raise KeyError("mine")
    assert leftovers(model) == []
    with pytest.raises(ZeroDivisionError), hooks.edit(model, {DELTA: lambda v: v / (1 // 0)}):
        model(x)
    assert leftovers(model) == []
    with pytest.raises(KeyboardInterrupt), hooks.edit(model, {"*.hook_state": hooks.zero(pos=0)}):
        raise KeyboardInterrupt
    assert leftovers(model) == []


@pytest.mark.hygiene
@pytest.mark.parametrize("variant", ["mamba", "lti", "s4d"])
def test_nothing_is_left_behind(
    make: Callable[..., Any], x: Tensor, leftovers: Callable[[Any], list[str]], variant: str
) -> None:
    model = make(variant)
    before = model(x)
    edits = {
        "*.hook_delta": hooks.scale(2.0), "*.hook_state": lambda h: 2 * h, "*.hook_out": hooks.zero(pos=2),
    }  # fmt: skip
    with hooks.edit(model, edits):
        assert leftovers(model)
        assert not torch.allclose(model(x), before)
    assert leftovers(model) == []
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


@pytest.mark.hygiene
def test_transformer_lens_resets_inside_the_block_leave_nothing(
    make: Callable[..., Any], x: Tensor, leftovers: Callable[[Any], list[str]]
) -> None:
    """TransformerLens replaces a point's list of hooks whenever it removes any."""
    model = make()
    edits = {"*.hook_delta": hooks.scale(2.0), "*.hook_state": hooks.zero(pos=3)}
    with hooks.edit(model, edits):
        expected = model(x)
        model.run_with_hooks(x, fwd_hooks=[("*.hook_delta", lambda v, hook: None)])
        model.run_with_cache(x, names_filter="*.hook_delta")
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert leftovers(model) == []
    clean = model(x)
    with hooks.edit(model, edits):
        model(x)
        model.reset_hooks()
        assert leftovers(model) == []
        torch.testing.assert_close(model(x), clean)
    assert leftovers(model) == []


@pytest.mark.edit
def test_edits_of_one_site_act_in_the_order_given_and_blocks_from_outside_in(
    make: Callable[..., Any], x: Tensor
) -> None:
    model = make()
    clean = hooks.record(model, x, DELTA)[DELTA]
    twice, plus = hooks.scale(2.0), hooks.add(1.0)
    value, _ = edited(model, x, [{DELTA: twice}, {DELTA: plus}], DELTA)
    torch.testing.assert_close(value, 2 * clean + 1)
    value, _ = edited(model, x, [{DELTA: plus}, {DELTA: twice}], DELTA)
    torch.testing.assert_close(value, 2 * (clean + 1))
    value, _ = edited(model, x, {"*.hook_delta": twice, DELTA: plus}, DELTA)
    with hooks.edit(model, {"*.hook_delta": twice}):
        nested, _ = edited(model, x, {DELTA: plus}, DELTA)
        torch.testing.assert_close(nested, value, rtol=0, atol=0)
        outer, _ = hooks.record(model, x, DELTA)[DELTA], None
    with hooks.edit(model, {"*.hook_delta": twice}):
        torch.testing.assert_close(hooks.record(model, x, DELTA)[DELTA], outer, rtol=0, atol=0)


@pytest.mark.edit
def test_edits_keep_the_gradient_and_carry_one(make: Callable[..., Any], x: Tensor) -> None:
    """Through scale and add to what is edited and to the value; through set_to to the value only."""
    model = make()
    value = torch.full((16,), 0.3, dtype=x.dtype, requires_grad=True)
    for edit, passes in ((hooks.add(value), True), (hooks.scale(value), True), (hooks.set_to(value), False)):
        before = torch.zeros(4, 11, 16, dtype=x.dtype, requires_grad=True)
        with hooks.edit(model, [{DELTA: lambda v, z=before: v + z}, {DELTA: edit}]):
            output = model(x).sum()
        to_value, to_site = torch.autograd.grad(output, [value, before], allow_unused=True)
        assert bool(to_value.any())
        assert (to_site is not None and bool(to_site.any())) == passes


@pytest.mark.edit
def test_backward_edits_change_gradients_and_are_counted(
    make: Callable[..., Any], x: Tensor, leftovers: Callable[[Any], list[str]]
) -> None:
    model = make()
    x.requires_grad_()
    clean = torch.autograd.grad(model(x).sum(), x)[0]
    assert bool(clean.any())
    with hooks.edit(model, {}, backward={"hook_embed": hooks.scale(3.0)}) as report:
        tripled = torch.autograd.grad(model(x).sum(), x)[0]
    torch.testing.assert_close(tripled, 3 * clean)
    assert report.fired == {"hook_embed (backward)": 1}
    with pytest.raises(hooks.DidNotFire, match="gradient"), hooks.edit(model, {}, backward={DELTA: lambda g: g}):
        model(x)
    assert leftovers(model) == []


@pytest.mark.edit
def test_trap_8_a_backward_edit_under_a_constant_never_fires(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    with (
        pytest.raises(hooks.DidNotFire, match="constant"),
        hooks.edit(model, {DELTA: hooks.set_to(0.5)}, backward={DELTA: lambda g: g}),
    ):
        model(x).sum().backward()
    with pytest.raises(hooks.DidNotFire), hooks.edit(model, {}, backward={"*.hook_state_init": lambda g: g}):
        model(x).sum().backward()
    _, state = model(x, return_state=True)
    state = [type(s)(s.conv.detach(), s.h.detach().requires_grad_()) for s in state]
    with hooks.edit(model, {}, backward={"*.hook_state_init": lambda g: g}) as report:
        model(x, state=state).sum().backward()
    assert all(report.fired.values()) and bool(state[0].h.grad.any())
