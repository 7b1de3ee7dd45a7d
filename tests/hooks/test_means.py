"""``hooks.mean``: over what, of whom."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hooks

DELTA = "blocks.1.mixer.hook_delta"
KINDS = [0, 1] * 5 + [0]


def by_hand(value: Tensor, over: tuple[str, ...], kinds: list[int] | None = None) -> Tensor:
    """The mean at each entry, one entry at a time: over everything that shares its coordinates on the kept axes."""
    array = value.numpy()
    out = np.empty_like(array)
    for b, t, c in np.ndindex(array.shape):
        rows = range(array.shape[0]) if "batch" in over else [b]
        columns = range(array.shape[2]) if "channel" in over else [c]
        times = range(array.shape[1]) if "pos" in over else [t]
        if "kind" in over and kinds is not None:
            times = [s for s, kind in enumerate(kinds) if kind == kinds[t]]
        out[b, t, c] = array[np.ix_(rows, times, columns)].mean()
    return torch.from_numpy(out)


OVERS = [
    ("batch",), ("pos",), ("channel",), ("kind",), ("batch", "pos"), ("batch", "kind"), ("batch", "channel"),
    ("pos", "channel"), ("batch", "kind", "channel"), ("batch", "pos", "channel"),
]  # fmt: skip


@pytest.mark.edit
@pytest.mark.parametrize("over", OVERS, ids="+".join)
def test_mean_over_each_choice_of_axes(over: tuple[str, ...]) -> None:
    value = torch.randn(3, 11, 4, dtype=torch.float64)
    kinds = KINDS if "kind" in over else None
    torch.testing.assert_close(hooks.mean(over, kinds=kinds)(value), by_hand(value, over, kinds))
    given = over[0] if len(over) == 1 else list(over)
    part = hooks.mean(given, kinds=kinds, pos=[2, -1], channels=[1])(value)
    expected = value.clone()
    expected[:, [2, -1], 1] = by_hand(value, over, kinds)[:, [2, -1], 1]
    torch.testing.assert_close(part, expected, msg="the mean of the whole site, in the part that is picked")


@pytest.mark.edit
@pytest.mark.parametrize("over", OVERS, ids="+".join)
@pytest.mark.parametrize("how", ["prompts", "record"])
def test_mean_of_reference_prompts(make: Callable[..., Any], x: Tensor, over: tuple[str, ...], how: str) -> None:
    model, kinds = make(), KINDS if "kind" in over else None
    others = torch.randn(4, 11, 5, dtype=x.dtype)
    clean = hooks.record(model, others, [DELTA])
    reference = others if how == "prompts" else clean
    with hooks.edit(model, {DELTA: hooks.mean(over, kinds=kinds, reference=reference, pos=slice(1, None))}):
        found = hooks.record(model, x, DELTA)[DELTA]
    torch.testing.assert_close(found[:, 1:], by_hand(clean[DELTA], over, kinds)[:, 1:])
    assert not torch.allclose(found[:, 0], by_hand(clean[DELTA], over, kinds)[:, 0])


@pytest.mark.edit
def test_number_of_reference_prompts_is_free_and_their_length_is_not(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    many, short, one = (torch.randn(n, length, 5, dtype=x.dtype) for n, length in ((9, 11), (9, 4), (9, 1)))
    with hooks.edit(model, {DELTA: hooks.mean("batch", reference=many)}):
        found = hooks.record(model, x, DELTA)[DELTA]
    torch.testing.assert_close(found, hooks.record(model, many, DELTA)[DELTA].mean(0, keepdim=True).expand_as(found))
    with hooks.edit(model, {DELTA: hooks.mean(("batch", "pos"), reference=short)}):
        found = hooks.record(model, x, DELTA)[DELTA]
    torch.testing.assert_close(found, hooks.record(model, short, DELTA)[DELTA].mean((0, 1)).expand_as(found))
    for wrong in (short, one):
        for at in ({}, {"pos": 0}, {"pos": -1}):
            for name in (DELTA, "blocks.1.mixer.hook_state"):
                edit = hooks.mean("batch", reference=wrong, **at)
                with pytest.raises(hooks.BadArgument, match="same length"), hooks.edit(model, {name: edit}):
                    model(x)
    with pytest.raises(hooks.BadArgument), hooks.edit(model, {DELTA: hooks.mean("pos", reference=many)}):
        model(x)  # nine prompts' own means for a batch of four


@pytest.mark.edit
def test_reference_prompts_are_run_clean(
    make: Callable[..., Any], x: Tensor, leftovers: Callable[[Any], list[str]]
) -> None:
    """Neither edits around, nor edits beside it, nor hooks touch the reference run; they are there again after it."""
    model = make()
    others = torch.randn(6, 11, 5, dtype=x.dtype)
    expected = hooks.record(model, others, DELTA)[DELTA].mean(0)
    upstream = "blocks.0.mixer.hook_out"
    seen: list[int] = []

    def note(value: Tensor, hook: Any) -> None:
        seen.append(len(value))

    edit = hooks.mean("batch", reference=others)
    with (
        model.hooks(fwd_hooks=[(DELTA, note)]),
        hooks.edit(model, {upstream: hooks.zero(), "blocks.0.mixer.hook_state": lambda h: 3 * h}) as outer,
        hooks.edit(model, {"blocks.0.mixer.hook_x": hooks.zero(), DELTA: edit}),
    ):
        assert seen == [] and not any(outer.fired.values())
        found = hooks.record(model, x, [DELTA, upstream])
    torch.testing.assert_close(found[DELTA], expected.expand(4, 11, 16))
    assert not found[upstream].any(), "the outer edit is on again"
    assert seen == [4] and all(count == 1 for count in outer.fired.values())
    assert leftovers(model) == []


@pytest.mark.edit
def test_a_failing_reference_run_restores_the_edits_around(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    bad = torch.full((2, 11, 5), torch.nan, dtype=x.dtype)
    with hooks.edit(model, {DELTA: hooks.zero()}):
        with pytest.raises(hooks.NonFinite), hooks.edit(model, {DELTA: hooks.mean("batch", reference=bad)}):
            pytest.fail("the body must not run")
        assert not hooks.record(model, x, DELTA)[DELTA].any()


@pytest.mark.edit
def test_one_reference_run_serves_all_sites(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    others = torch.randn(6, 11, 5, dtype=x.dtype)
    runs = model.runs
    with hooks.edit(
        model,
        {"*.hook_delta": hooks.mean("batch", reference=others), "*.hook_B": hooks.mean("batch", reference=others)},
    ):
        assert model.runs == runs + 1
        model(x)


@pytest.mark.edit
def test_a_mean_carries_gradient_only_of_this_batch(make: Callable[..., Any], x: Tensor) -> None:
    model, upstream = make(), "blocks.1.mixer.dt_proj.weight"
    weight = dict(model.named_parameters())[upstream]
    for edit, expected in (
        (hooks.mean("batch"), True),
        (hooks.mean("batch", reference=torch.randn_like(x)), False),
        (hooks.mean("batch", reference=hooks.record(model, x, DELTA, grad=True)), False),
    ):
        with hooks.edit(model, {DELTA: edit}):
            gradient = torch.autograd.grad(model(x).sum(), weight, allow_unused=True)[0]
        assert (gradient is not None and bool(gradient.any())) == expected


@pytest.mark.edit
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"over": "layer"}, "layer"),
        ({"over": ()}, "itself"),
        ({"over": "kind"}, "kinds="),
        ({"over": "batch", "kinds": KINDS}, "kinds="),
        ({"over": ("kind", "pos"), "kinds": KINDS}, "excludes"),
    ],
    ids=str,
)
def test_bad_arguments(given: dict[str, Any], says: str) -> None:
    with pytest.raises(hooks.BadArgument, match=says):
        hooks.mean(**given)


@pytest.mark.edit
def test_a_mean_that_would_change_nothing_is_refused(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    for over, kinds in (("batch", None), (("kind",), list(range(11))), (("batch", "kind"), list(range(11)))):
        with (
            pytest.raises(hooks.BadArgument, match="one value"),
            hooks.edit(model, {DELTA: hooks.mean(over, kinds=kinds)}),
        ):
            model(x[:1])
    for over, kinds in ((("batch", "pos"), None), ("kind", KINDS), (("batch", "kind"), KINDS)):
        with hooks.edit(model, {DELTA: hooks.mean(over, kinds=kinds)}):
            assert not torch.allclose(hooks.record(model, x[:1], DELTA).output, model(x[:1]) * 0)
    with (
        pytest.raises(hooks.BadArgument, match="11 positions"),
        hooks.edit(model, {DELTA: hooks.mean("kind", kinds=[0, 1])}),
    ):
        model(x)
    with pytest.raises(hooks.BadArgument, match="reference prompts"):
        hooks.mean("batch", reference=x)(torch.randn(4, 11, 16))
    with (
        pytest.raises(hooks.BadArgument, match="hook_B"),
        hooks.edit(model, {"blocks.1.mixer.hook_B": hooks.mean("batch", reference=hooks.record(model, x, DELTA))}),
    ):
        model(x)
