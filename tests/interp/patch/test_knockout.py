"""A knocked-out pair is taken out of what its target reads, exactly, and nothing else is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hooks
import models
from hooks.errors import BadArgument
from interp import patch
from interp.patch.knockout import _carried, _every_later, _from_every_earlier, _no_nan, _times, through_taps
from tests.hooks.conftest import build, left_on
from tests.interp.planted import ANSWER, DECOY, LENGTH, last, one_path, prompts
from tests.models.dense_s4 import dense

SHAPE: dict[str, Any] = {"d_model": 8, "n_layers": 2, "d_in": 5, "d_out": 2}
ALL = ["mamba", "lti", "s4d", "linear_attention", "s4"]
PAIRS = [(0, 3), (1, 3), (1, 6), (3, 6), (4, 4), (2, 8)]


def make(variant: str) -> Any:
    if variant == "linear_attention":
        return models.build(variant, **SHAPE, n_heads=2, d_conv=3).double().eval()
    return build(variant)


def states_of(model: Any, layer: int, x: Tensor) -> dict[str, Tensor]:
    """The sites of one layer's mixer, by kind."""
    stem = f"blocks.{layer}.mixer."
    record = hooks.record(model, x, stem + "hook_*")
    return {name.removeprefix(stem): value for name, value in record.items()}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def under(model: Any, edits: Any, x: Tensor, name: str) -> Tensor:
    with hooks.expose(model), hooks.edit(model, edits):
        return hooks.record(model, x, name)[name]


# --- in the scan --------------------------------------------------------------------------------


@pytest.mark.law
@pytest.mark.parametrize("variant", ALL)
def test_a_source_knocked_out_for_itself_and_all_later_is_a_write_of_zero(variant: str, x: Tensor) -> None:
    model = make(variant)
    pairs = [(2, t) for t in range(2, 9)]
    with torch.no_grad(), hooks.expose(model):
        with hooks.edit(model, {"*.hook_write": hooks.zero(pos=2)}):
            expected = model(x)
        with hooks.edit(model, patch.knock_out(model, pairs, inside="scan")):
            found = model(x)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
        assert (found - model(x)).abs().max() > 1e-4
        assert torch.equal(found[:, :2], model(x)[:, :2])
    later = under(model, patch.knock_out(model, pairs[1:], 1, "scan"), x, "blocks.1.mixer.hook_y")
    zeroed = under(model, {"blocks.1.mixer.hook_write": hooks.zero(pos=2)}, x, "blocks.1.mixer.hook_y")
    torch.testing.assert_close(later[:, 3:], zeroed[:, 3:], rtol=1e-9, atol=1e-11)
    clean = under(model, {"hook_embed": torch.clone}, x, "blocks.1.mixer.hook_y")
    assert torch.equal(later[:, 2], clean[:, 2])
    assert left_on(model) == []


@pytest.mark.law
@pytest.mark.parametrize("variant", ALL)
def test_all_single_knock_outs_of_a_query_sum_to_its_scan_output(variant: str, x: Tensor) -> None:
    model, name = make(variant), "blocks.1.mixer.hook_y"
    with hooks.expose(model):
        clean = hooks.record(model, x, name)[name]
    parts = [clean - under(model, patch.knock_out(model, [(s, 7)], 1, "scan"), x, name) for s in range(8)]
    torch.testing.assert_close(sum(part[:, 7] for part in parts), clean[:, 7], rtol=1e-9, atol=1e-12)
    for part in parts:
        assert part[:, [t for t in range(9) if t != 7]].abs().max() == 0  # what is not knocked out does not change
        assert part[:, 7].abs().max() > 1e-9


@pytest.mark.definition
@pytest.mark.parametrize("which", ["listed", "of each prompt", "to every later"])
def test_any_pairs_are_the_double_sum_over_pairs(which: str, x: Tensor) -> None:
    model, name = build("mamba"), "blocks.1.mixer.hook_y"
    mask = torch.zeros(4, 9, 9, dtype=torch.bool)
    for s, t in PAIRS:
        mask[:, s, t] = True
    if which != "listed":
        mask = (torch.rand(4, 9, 9, generator=torch.Generator().manual_seed(2)) < 0.4).triu()
        mask[2] = False
    if which == "to every later":
        mask = patch.between(mask[:, 0], range(9), 9)
    assert _every_later(mask) == (which == "to every later")
    with hooks.edit(model, {"*.hook_delta_decay": hooks.scale(0.3)}), hooks.expose(model):  # the run's own decays
        site = states_of(model, 1, x)
        found = under(model, patch.knock_out(model, PAIRS if which == "listed" else mask, 1, "scan"), x, name)
    expected = site["hook_y"].clone()
    for b, s, t in mask.nonzero().tolist():
        survives = site["hook_decay"][b, s + 1 : t + 1].prod(0)
        expected[b, t] -= (survives * site["hook_write"][b, s]) @ site["hook_C"][b, t]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    untouched = ~mask.any(1)
    assert torch.equal(found[untouched], site["hook_y"][untouched])
    assert (found - site["hook_y"])[mask.any(1)].abs().amax(-1).min() > 1e-9


DRAWN = torch.randn(4, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
Changes = list[tuple[str, list[int], list[int] | None, Any]]
STATE_EDITS: dict[str, dict[int, Changes]] = {
    "do_state": {0: [("set", [2, 5], None, DRAWN)], 1: [("set", [6, 3], [1, 4], DRAWN)]},
    "freeze": {0: [("freeze", [4], None, 0.0)], 1: [("freeze", [1, 6], [0, 3], 0.0), ("freeze", [7], None, 0.0)]},
    "scale and add": {1: [("scale", [3, 7], None, -0.5), ("add", [3], [1, 2], 0.3)]},
    "several at one token": {
        0: [("add", [3], None, 0.3), ("freeze", [3, 5], None, 0.0), ("scale", [3], [2], 2.0)],
        1: [("set", [4], None, 0.7), ("scale", [4, 5], None, 0.5)],
    },
}
"""(what, positions, channels, value) in each layer, in order."""


def as_edits(plan: dict[int, Changes], ramp: Tensor) -> list[Any]:
    """The plan for ``hooks.edit``: what is put into a state is ``ramp`` times its value, one number after the other."""
    found: list[Any] = []
    for layer, changes in plan.items():
        for what, pos, channels, value in changes:
            if what == "set":
                found.append(hooks.do_state(layer, pos, value * ramp, channels))
                continue
            edit = {
                "add": hooks.add(value * ramp, pos=pos, channels=channels),
                "scale": hooks.scale(value, pos=pos, channels=channels),
                "freeze": hooks.freeze(pos=pos, channels=channels),
            }[what]
            found.append({f"blocks.{layer}.mixer.hook_state": edit})
    return found


def dense_of(model: Any, variant: str, layer: int, site: dict[str, Tensor], ramp: Tensor) -> tuple[Tensor, ...]:
    """Transitions (batch, pos, d, n, n), writes and read-outs (batch, pos, d, n), and the ramp, all complex."""
    mixer, x = model.blocks[layer].mixer, site["hook_x"]
    if variant == "mamba":
        C = site["hook_C"][:, :, None].expand(-1, -1, x.shape[-1], -1)
        return tuple(part + 0j for part in (torch.diag_embed(site["hook_decay"]), site["hook_write"], C, ramp))
    decay, write, ramp = (
        torch.complex(*part.chunk(2, -1)) for part in (site.get("hook_decay", ramp), site["hook_write"], ramp)
    )
    if variant == "s4d":
        C = 2 * torch.view_as_complex(mixer.C.detach())
        return torch.diag_embed(decay), write, C.expand_as(write), ramp
    # Of each state and its conjugate, by the definition of Ā from the weights.
    step, gain, C = (torch.from_numpy(part) for part in dense(mixer))
    both = torch.cat([ramp, ramp.conj()])
    return step.expand(*x.shape, -1, -1), gain * x[..., None], C.expand(*x.shape, -1), both


def by_hand(operands: tuple[Tensor, ...], changes: Changes, mask: Tensor) -> Tensor:
    """``hook_y`` without the pairs of ``mask``: each source's edited write by itself, carried on by edited matrices."""
    step, write, C, ramp = (part.clone() for part in operands)
    for what, pos, channels, value in changes:
        at: Any = slice(None) if channels is None else channels
        for i, t in enumerate(pos):
            kept = {"set": 0.0, "add": 1.0, "scale": value, "freeze": 0.0}[what]
            step[:, t, at], write[:, t, at] = kept * step[:, t, at], kept * write[:, t, at]
            if what == "freeze":
                step[:, t, at] = torch.eye(step.shape[-1], dtype=step.dtype)
            elif what != "scale":
                write[:, t, at] += (value[:, i] if isinstance(value, Tensor) else value) * ramp
    y = torch.zeros(C.shape[:3], dtype=torch.float64)
    for s in range(9):
        h = write[:, s]
        for t in range(s, 9):
            h = h if t == s else (step[:, t] @ h[..., None])[..., 0]
            y[:, t] += torch.where(mask[:, s, t, None], 0, (C[:, t] * h).sum(-1).real)
    return y


@pytest.mark.definition
@pytest.mark.parametrize("variant", ["mamba", "s4d", "s4"])
@pytest.mark.parametrize("name", STATE_EDITS)
def test_under_edits_of_the_state_it_is_the_product_of_the_edited_matrices(name: str, variant: str, x: Tensor) -> None:
    """Any pairs, in both layers; what an edit puts into h_s is taken out with what s wrote."""
    model, plan = build(variant), STATE_EDITS[name]
    mask = (torch.rand(4, 9, 9, generator=torch.Generator().manual_seed(2)) < 0.4).triu()
    ramp = torch.linspace(1, 2, 4 if variant == "mamba" else 8, dtype=torch.float64)
    edits, cut = as_edits(plan, ramp), patch.knock_out(model, mask, inside="scan")
    expected: dict[str, Any] = {"hook_embed": hooks.scale(1.0)}
    with torch.no_grad():
        for layer in range(2):
            with hooks.edit(model, expected):
                site = states_of(model, layer, x)
            y = by_hand(dense_of(model, variant, layer, site, ramp), plan.get(layer, []), mask)
            expected[f"blocks.{layer}.mixer.hook_y"] = hooks.set_to(y)
        with hooks.edit(model, expected):
            right = model(x)
        with hooks.edit(model, edits):
            clean = model(x)
            with hooks.edit(model, cut):
                torch.testing.assert_close(model(x), right, rtol=1e-10, atol=1e-11)
        with hooks.edit(model, cut):
            without = model(x)
            with hooks.edit(model, edits):  # the state comes after what is looked at, whoever is inside
                torch.testing.assert_close(model(x), right, rtol=1e-10, atol=1e-11)
    assert (right - clean).abs().max() > 1e-2 and (right - without).abs().max() > 1e-2
    assert left_on(model) == []


@pytest.mark.edit
@pytest.mark.parametrize("variant", ["mamba", "s4"])
def test_looking_at_an_edit_of_the_state_does_not_count_as_firing(variant: str, x: Tensor) -> None:
    model, counts = build(variant), []
    for cut in (patch.knock_out(model, [(2, 7)], 0, "scan"), {"hook_embed": torch.clone}):
        with hooks.edit(model, hooks.do_state(0, 4, 0.3)) as made, hooks.edit(model, cut):
            model(x)
        counts.append(dict(made.fired))
    assert counts[0] == counts[1] != {}


@pytest.mark.contract
@pytest.mark.parametrize("variant", ["mamba", "s4d", "s4"])
def test_edits_of_the_state_that_are_no_factor_are_refused_in_the_run(variant: str, x: Tensor) -> None:
    model, site = build(variant), "blocks.0.mixer.hook_state"
    edits = {"tanh": torch.tanh, "resample": hooks.resample(pos=3), "mean": hooks.mean("batch", pos=3)}
    if variant != "mamba":  # not the same factor for the real and the imaginary part of one state
        edits["scale"] = hooks.scale(torch.linspace(0, 1, 8), pos=3)
    transition = "hook_transition" if variant == "s4" else "hook_decay"
    for label, edit in edits.items():
        message = rf"{label}.* at blocks\.0\.mixer\.hook_state does not fold into {transition}"
        with (
            pytest.raises(BadArgument, match=message) as error,
            hooks.edit(model, {site: edit}),
            hooks.edit(model, patch.knock_out(model, [(2, 7)], 0, "scan")),
        ):
            model(x)
        assert "\n" not in str(error.value)
        with hooks.edit(model, {site: edit}), hooks.edit(model, patch.knock_out(model, [(2, 7)], 1, "scan")):
            model(x)  # in another layer than the pairs it may be anything
    assert left_on(model) == []


@pytest.mark.law
@pytest.mark.parametrize("variant", ["mamba", "s4d", "s4"])
def test_edits_of_the_state_are_reckoned_with(variant: str, x: Tensor) -> None:
    """do(h_4 := v) cuts what was written before it off; frozen tokens neither forget nor write."""
    model, name = build(variant), "blocks.0.mixer.hook_y"
    cut = hooks.do_state(0, 4, 0.3)
    with hooks.edit(model, cut):
        clean = under(model, {"blocks.0.mixer.hook_write": torch.clone}, x, name)
        before = under(model, patch.knock_out(model, [(2, 7)], 0, "scan"), x, name)
        after = under(model, patch.knock_out(model, [(5, 7)], 0, "scan"), x, name)
    assert torch.equal(before, clean)
    assert (after - clean)[:, 7].abs().max() > 1e-4
    freeze = {"blocks.0.mixer.hook_state": hooks.freeze(pos=[5, 6, 7])}
    with hooks.edit(model, freeze):
        frozen = under(model, patch.knock_out(model, [(s, 7) for s in range(8)], 0, "scan"), x, name)
        assert frozen[:, 7].abs().max() < 1e-12
    assert left_on(model) == []


@pytest.mark.law
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("carry", [_carried, _from_every_earlier])
def test_a_decay_of_zero_lets_nothing_through_not_even_nan(carry: Any, parts: int) -> None:
    decay, write = torch.rand(2, 2, 9, 3, 4, dtype=torch.float64)
    decay[:, 4], write[:, [1, 3]] = 0, torch.inf  # what 1 writes is not knocked out
    advance = _times if parts == 2 else _no_nan
    mask = patch.between([2, 3, 4], [6] if carry is _carried else range(9), 9)
    found = dict(carry(decay, write, mask, advance))
    assert list(found) == ([6] if carry is _carried else [3, 4, 5, 6, 7, 8])
    torch.testing.assert_close(found[6], advance(decay[:, 6], advance(decay[:, 5], write[:, 4])))
    assert bool(found[6].any())


@pytest.mark.definition
@pytest.mark.parametrize("carry", [_carried, _from_every_earlier])
def test_sources_with_the_same_targets_ahead_share_one_sum(carry: Any) -> None:
    """Every outlier to every later token of its own prompt costs one scan, however many there are."""
    decay, write = torch.rand(2, 3, 9, 2, 4, dtype=torch.float64)
    outlier = torch.rand(3, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    steps = []

    def advance(kept: Tensor, carried: Tensor) -> Tensor:
        steps.append(1)
        return kept * carried

    found = dict(carry(decay, write, patch.between(outlier, range(9), 9), advance))
    assert int(outlier.sum()) > 9 and len(steps) <= 8
    h = torch.zeros(3, 2, 4, dtype=torch.float64)
    for t in range(9):
        h = decay[:, t] * h
        if t in found:
            torch.testing.assert_close(found[t], h)
        h = h + outlier[:, t, None, None] * write[:, t]


# --- in the taps, and in several layers ---------------------------------------------------------


@pytest.mark.definition
@pytest.mark.parametrize("variant", ["mamba", "linear_attention"])
def test_taps_are_the_double_sum_over_pairs(variant: str, x: Tensor) -> None:
    model, pairs = make(variant), [(0, 2), (1, 2), (3, 4), (4, 4), (0, 8)]
    site, weight = states_of(model, 0, x), model.blocks[0].mixer.conv1d.weight.detach()
    found = under(model, patch.knock_out(model, pairs, 0, "taps"), x, "blocks.0.mixer.hook_x_pre")
    expected, taps = site["hook_x_pre"].clone(), weight.shape[-1]
    for s, t in pairs:
        if t - s < taps:
            expected[:, t] -= weight[:, 0, taps - 1 - (t - s)] * site["hook_x_in"][:, s]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    changed = (found - site["hook_x_pre"]).abs().amax((0, 2)).nonzero().reshape(-1).tolist()
    assert changed == [2, 4]  # 8 is out of reach of 0


@pytest.mark.law
def test_all_taps_of_a_target_leave_the_bias(x: Tensor) -> None:
    model = build("mamba")
    site = states_of(model, 0, x)
    conv = model.blocks[0].mixer.conv1d
    everything = through_taps(site["hook_x_in"], conv.weight.detach(), torch.ones(1, 9, 9, dtype=torch.bool).triu())
    torch.testing.assert_close(everything + conv.bias.detach(), site["hook_x_pre"], rtol=1e-12, atol=1e-12)


@pytest.mark.law
def test_several_layers_compose(x: Tensor) -> None:
    """One run with both layers knocked out is the second layer knocked out on what the first one leaves."""
    model = build("mamba")
    with torch.no_grad():
        with hooks.edit(model, patch.knock_out(model, PAIRS)):
            whole = model(x)
        with hooks.edit(model, patch.knock_out(model, PAIRS, 0)):
            between = model(x, stop_at_layer=1)
        with hooks.edit(model, patch.knock_out(model, PAIRS, 1)):
            split = model(between, start_at_layer=1)
        torch.testing.assert_close(whole, split, rtol=1e-10, atol=1e-12)
        with hooks.edit(model, patch.knock_out(model, PAIRS, inside="scan")):
            assert (whole - model(x)).abs().max() > 1e-4


@pytest.mark.law
def test_gradients_flow(x: Tensor) -> None:
    model = build("mamba")
    x = x.requires_grad_()
    with hooks.edit(model, patch.knock_out(model, [(2, t) for t in range(3, 9)])):
        out = model(x)
    for t in range(3, 9):
        (reached,) = torch.autograd.grad(out[:, t].sum(), x, retain_graph=True)
        assert reached[:, 1].abs().max() > 1e-8
    edits = {"*.hook_decay": hooks.set_to(0.5, pos=2)}  # else 2 still decides what is kept of 0 and 1
    with hooks.edit(model, edits), hooks.edit(model, patch.knock_out(model, [(2, t) for t in range(3, 9)])):
        out = model(x)
    for t in range(3, 9):
        (reached,) = torch.autograd.grad(out[:, t].sum(), x, retain_graph=True)
        assert reached[:, 2].abs().max() < 1e-14


# --- what is left -------------------------------------------------------------------------------


@pytest.mark.planted
@pytest.mark.parametrize(("way", "other_way"), [("scan", "taps"), ("taps", "scan")])
def test_closing_the_way_of_the_answer_leaves_nothing_and_the_other_way_everything(way: str, other_way: str) -> None:
    model, (clean, _) = one_path(way), prompts()
    query = LENGTH - 1
    source = ANSWER if way == "scan" else query - (LENGTH - ANSWER - 1)
    assert float(patch.left(model, clean, [(source, query)], inside=way).mean) < 1e-25
    assert float(patch.left(model, clean, [(source, query)]).mean) < 1e-25
    assert float(patch.left(model, clean, [(source, query)], inside=other_way).mean) == pytest.approx(1)
    with torch.no_grad(), hooks.edit(model, patch.knock_out(model, [(DECOY, query)])):
        torch.testing.assert_close(model(clean)[:, -1], model(clean[:, :LENGTH])[:, -1])
        assert last(model(clean)).abs().min() > 1e-3
    with torch.no_grad(), hooks.edit(model, patch.knock_out(model, [(source, query)])):
        assert last(model(clean)).abs().max() < 1e-12


@pytest.mark.law
def test_what_is_left_goes_through_other_tokens_and_through_forgetting(x: Tensor) -> None:
    twin, mamba = build("lti"), build("mamba")
    direct, all_later = [(3, 8)], [(3, t) for t in range(4, 9)]
    metric = last  # of position 8 alone
    assert float(patch.left(twin, x, all_later, metric=metric).mean) < 1e-20
    assert float(patch.left(twin, x, direct, metric=metric).mean) > 0.01
    forgotten = float(patch.left(mamba, x, all_later, metric=metric).mean)
    assert 1e-12 < forgotten < 1
    with hooks.edit(mamba, {"*.hook_decay": hooks.set_to(0.5, pos=3)}):
        assert float(patch.left(mamba, x, all_later, metric=metric).mean) < 1e-20
    assert float(patch.left(twin, x, all_later, inside="scan", metric=metric).mean) > 0.01


@pytest.mark.contract
def test_pairs_may_differ_from_prompt_to_prompt_and_be_none(x: Tensor) -> None:
    model = build("lti")
    outlier = torch.zeros(4, 9, dtype=torch.bool)
    outlier[0, 2] = outlier[1, [3, 5]] = outlier[3, 0] = True
    mask = patch.between(outlier, [-1], 9)
    assert mask.nonzero().tolist() == [[0, 2, 8], [1, 3, 8], [1, 5, 8], [3, 0, 8]]
    with torch.no_grad():
        with hooks.edit(model, patch.knock_out(model, mask)):
            found = model(x)
        for i, sources in enumerate(([2], [3, 5], [], [0])):
            if not sources:
                with hooks.expose(model):
                    torch.testing.assert_close(found[i], model(x)[i], rtol=1e-12, atol=1e-12)
                continue
            with hooks.edit(model, patch.knock_out(model, [(s, 8) for s in sources])):
                torch.testing.assert_close(found[i], model(x)[i], rtol=1e-12, atol=1e-12)
        with hooks.expose(model):
            clean = model(x)
        with hooks.edit(model, patch.knock_out(model, patch.between(outlier & False, [-1], 9))):
            assert torch.equal(model(x), clean)
    assert patch.between([1, -1], outlier, 9).nonzero().tolist() == [[0, 1, 2], [1, 1, 3], [1, 1, 5]]
    assert patch.left(model, x, mask).n == 3


@pytest.mark.contract
def test_what_cannot_be_knocked_out_is_refused_in_one_line(x: Tensor) -> None:
    model = build("mamba")
    transformer = models.build("transformer", **SHAPE, n_heads=2).double().eval()
    s4d = build("s4d")
    for call, message in (
        (lambda: patch.knock_out(model, [(4, 2)]), "nothing flows from a token to an earlier one"),
        (lambda: patch.knock_out(model, torch.ones(9, 9, dtype=torch.bool)), r"\(1, 0\) in the mask"),
        (lambda: patch.knock_out(model, torch.ones(9, 9)), "a mask of pairs is bool"),
        (lambda: patch.knock_out(model, []), "no pair to knock out"),
        (lambda: patch.knock_out(model, [(0, 1)], 2), "layer=2"),
        (lambda: patch.knock_out(model, [(0, 1)], inside="gate"), 'no value of inside is called "gate"'),
        (lambda: patch.knock_out(model, [(0, 1)], inside=()), "closes nothing"),
        (lambda: patch.knock_out(transformer, [(0, 1)]), "blocks.0.mixer has no .*hook_write"),
        (lambda: patch.knock_out(s4d, [(0, 1)], inside="taps"), "has no hook_x_in, hook_x_pre"),
        (lambda: patch.between([9], [1], 9), "source=9"),
        (lambda: patch.between(torch.ones(3, dtype=torch.bool), [1], 9), "a mask of sources"),
        (lambda: patch.left(model, x, [(2, 8)], other=x[1:]), "give one shape"),
        (lambda: patch.left(model, x[:1], [(2, 8)]), "left puts another prompt's tokens in .* has one prompt"),
        (lambda: patch.left(model, x, [(2, 8)], other=x), "nothing to knock out"),
    ):
        with pytest.raises(BadArgument, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    for pairs, message in (([(0, 9)], "no position 9"), (torch.zeros(3, 9, 9, dtype=torch.bool), "has 4 prompts")):
        with pytest.raises(BadArgument, match=message), hooks.edit(model, patch.knock_out(model, pairs)):
            model(x)
    assert left_on(model) == []


@pytest.mark.contract
def test_real_factors_are_refused_before_any_run() -> None:
    """They would be multiplied as if half of the states were imaginary parts of the other half."""
    model = build("s4")
    patch.knock_out(model, [(0, 1)])
    model.hook_dict["blocks.1.mixer.hook_transition"].parts = 1  # what a delta rule would say of its factors
    with pytest.raises(BadArgument, match=r"^knock_out\(\) reads .*hook_transition holds real factors[^\n]+$"):
        patch.knock_out(model, [(0, 1)])
    assert model.runs == 0
