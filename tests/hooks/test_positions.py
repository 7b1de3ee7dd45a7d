"""What ``pos=`` counts where a sequence is given in parts: the whole run at once is the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import hooks
import models

DELTA, RESID = "blocks.0.mixer.hook_x", "blocks.0.hook_resid_post"
STATE, INIT = "blocks.1.mixer.hook_state", "blocks.0.mixer.hook_state_init"
VALUES = torch.arange(3.0, dtype=torch.float64)[None, :, None]
MASK = torch.arange(11) % 4 == 1


def edits(x: Tensor) -> dict[str, Any]:
    return {
        "zero": {DELTA: hooks.zero(pos=[2, 7])},
        "a value for each position, in another order": {RESID: hooks.set_to(VALUES, pos=[8, 0, 5])},
        "one value": {RESID: hooks.add(1.0, pos=6)},
        "a slice": {RESID: hooks.add(1.0, pos=slice(3, None, 2))},
        "a mask": {RESID: hooks.scale(2.0, pos=MASK)},
        "mean of others": {RESID: hooks.mean("batch", reference=x.flip(0) * 2, pos=[1, 9])},
        "mean of these": {RESID: hooks.mean("batch", pos=[1, 9])},
        "resample": {RESID: hooks.resample(pos=[1, 9])},
        "do_state": hooks.do_state(1, [2, 7], VALUES[:, :2, :, None]),
        "freeze": {STATE: hooks.freeze(pos=[3, 4])},
        "an own edit of a state": {STATE: hooks.Edit("double", lambda h, whole, site: 2 * h, pos=[5, 10])},
        "two": [{RESID: hooks.zero(pos=[3])}, hooks.do_state(0, [6], 0.5)],
        "everywhere": {RESID: hooks.add(1.0)},
    }


NAMES = list(edits(torch.zeros(1, 1, 1)))


def whole(model: Any, x: Tensor) -> Tensor:
    return model(x)


def chunks(model: Any, x: Tensor) -> Tensor:
    parts, state = [], None
    for part in x.split(4, dim=1):
        out, state = model(part, state=state, return_state=True)
        parts.append(out)
    return torch.cat(parts, 1)


def steps(model: Any, x: Tensor) -> Tensor:
    parts, state = [], None
    for t in range(x.shape[1]):
        out, state = model.step(x[:, t], state)
        parts.append(out[:, None])
    return torch.cat(parts, 1)


@pytest.mark.edit
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("variant", ["mamba", pytest.param("s4d", marks=pytest.mark.slow), "s4", "linear"])
def test_positions_of_the_sequence(make: Callable[..., Any], x: Tensor, variant: str, name: str) -> None:
    model, edit = make(variant), edits(x)[name]
    with torch.no_grad():
        with hooks.edit(model, edit):
            expected = whole(model, x)
        assert not torch.allclose(expected, model(x))
        for run in (whole, chunks, steps):
            with hooks.edit(model, edit, positions="sequence") as edited:
                assert_close(run(model, x), expected)
            assert all(edited.fired.values())


@pytest.mark.edit
@pytest.mark.parametrize("readout_only", [False, True])
def test_not_said_it_is_refused_and_the_run_s_own_can_be_meant(
    make: Callable[..., Any], x: Tensor, readout_only: bool
) -> None:
    model = make()
    site = STATE if readout_only else RESID
    edit = {site: hooks.zero(pos=[0])}
    with hooks.edit(model, edit, readout_only=readout_only):
        out, state = model.step(x[:, 0])
        told = r'goes on from a state, after 1 tokens.*positions="sequence"'
        with pytest.raises(hooks.BadArgument, match=told) as caught:
            model.step(x[:, 1], state)
        assert "\n" not in str(caught.value)
        assert_close(model(x[:, :1])[:, 0], out)  # another sequence begins
    with pytest.raises(hooks.BadArgument, match="goes on"), hooks.edit(model, hooks.do_state(0, [0], 1.0)):
        steps(model, x)
    with hooks.edit(model, {RESID: hooks.zero()}):
        every = whole(model, x)
    with hooks.edit(model, {RESID: hooks.zero(pos=[0])}, positions="run"):
        assert_close(steps(model, x), every)
    with pytest.raises(hooks.BadArgument, match='"sequence" or "run"'), hooks.edit(model, edit, positions="call"):
        pass


@pytest.mark.edit
def test_the_state_says_how_many_tokens_came_before(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    with torch.no_grad():
        _, state = model(x[:, :4], return_state=True)
    assert isinstance(state, list) and state.seen == 4
    assert copy.deepcopy(state).seen == 4
    _, later = model(x[:, 4:6], state=state, return_state=True)
    assert later.seen == 6
    leaves, tree = torch.utils._pytree.tree_flatten(state)
    assert all(isinstance(leaf, Tensor) for leaf in leaves)
    assert torch.utils._pytree.tree_unflatten(leaves, tree).seen == 4
    plain = [models.LayerState(*layer) for layer in state]
    assert_close(model(x[:, 4:], state=plain), model(x[:, 4:], state=state), rtol=0, atol=0)
    edit = {RESID: hooks.zero(pos=[5])}
    with hooks.edit(model, edit):
        expected = model(x)[:, 4:]
    for given in (state, models.Carried(plain, seen=4)):
        with hooks.edit(model, edit, positions="sequence"):
            assert_close(model(x[:, 4:], state=given), expected)
    with (
        pytest.raises(hooks.BadArgument, match="does not say how many"),
        hooks.edit(model, edit, positions="sequence"),
    ):
        model(x[:, 4:], state=plain)


@pytest.mark.edit
def test_what_no_part_can_know_is_refused_and_what_never_comes_is_said(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    for wrong in (hooks.zero(pos=-1), hooks.zero(pos=slice(-2, None)), hooks.mean(("batch", "pos"), pos=[3])):
        with pytest.raises(hooks.BadArgument), hooks.edit(model, {RESID: wrong}, positions="sequence"):
            chunks(model, x)
    with pytest.raises(hooks.DidNotFire), hooks.edit(model, {RESID: hooks.zero(pos=[11])}, positions="sequence"):
        chunks(model, x)
    with hooks.edit(model, {RESID: hooks.zero(pos=[3]), INIT: hooks.add(1.0)}, positions="sequence"):
        chunks(model, x)


@pytest.mark.edit
def test_a_single_model_of_the_theory_counts_as_well() -> None:
    model = models.build("theory", d_in=3).double()
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    edit = {"blocks.0.mixer.hook_B": hooks.zero(pos=[4])}
    with hooks.edit(model, edit):
        expected = model(x)
    with hooks.edit(model, edit, positions="sequence"):
        assert_close(steps(model, x), expected)
