"""Contributions sum to what they explain, are the gradient through the model's own scan, and find what was planted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import hooks
import models
from hooks.errors import BadArgument
from interp.attention import contributions, matrix, recurrence
from tests.hooks.conftest import left_on
from tests.interp.recurrences import (
    DECOY,
    DECOYED,
    EDITS,
    LAYER,
    MARKED,
    MIXER,
    S4D_EDITS,
    TRANSITION_EDITS,
    VALUE,
    VARIANTS,
    build,
    copier,
    marked,
    prompts,
)

PARTS = ["scan", "taps", "gate", ("taps", "gate")]


def parts_of(variant: str) -> list[Any]:
    return PARTS if variant in ("mamba", "lti") else ["scan"]


def last(out: Tensor) -> Tensor:
    return out[:, -1, 0]


def weights_of(model: Any, layer: int, batch: int = 3, length: int = 11, dtype: Any = torch.float64) -> Tensor:
    width = model.blocks[layer].mixer.axis_sizes()["d_inner"]
    return torch.randn(batch, length, width, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).to(dtype)


def whole(found: Any) -> Tensor:
    beside = found.state_init + found.conv_bias + found.conv_init + found.edited
    return found.tokens.sum(1) + beside + found.skip.sum(1)


@pytest.mark.law
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_they_sum_to_a_linear_function_of_the_scan(variant: str, dtype: torch.dtype, bound: float) -> None:
    model, x, layer = build(variant, dtype), prompts(dtype=dtype), LAYER.get(variant, 1)
    weights = weights_of(model, layer, dtype=dtype)
    seen = hooks.record(model, x, f"blocks.{layer}.mixer.*")
    for inside in parts_of(variant):
        found = contributions(model, x, layer, weights=weights, inside=inside)
        value = (
            seen["*.hook_y"] + seen["*.hook_skip"] if any("hook_skip" in name for name in seen) else seen["*.hook_y"]
        )
        if "gate" in inside:
            value = seen["*.hook_gated"]
        expected = (weights * value).sum((1, 2))
        assert_close(found.total, expected, rtol=bound, atol=bound)
        assert_close(whole(found), expected, rtol=bound, atol=bound * float(expected.abs().max()))
        assert found.relative_error < bound and found.exact and found.order == "exact" and found.scalar is None


@pytest.mark.law
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tile", [4, 64])
def test_they_are_the_rows_of_the_matrix(variant: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrence, "TILE", tile)
    model, x, layer = build(variant), prompts(), LAYER.get(variant, 1)
    weights = weights_of(model, layer)
    edits = None if variant == "theory" else {f"blocks.{layer}.mixer.hook_state": hooks.add(0.3, pos=[1, 4])}
    for inside in parts_of(variant):
        M = matrix(model, x, layer, inside=inside, edits=edits)
        found = contributions(model, x, layer, weights=weights, inside=inside, edits=edits)
        g = weights.mT
        assert_close(found.by_channel, torch.einsum("bct,bcts->bsc", g, M.shares), rtol=1e-9, atol=1e-11)
        for name in ("state_init", "conv_bias", "conv_init", "edited"):
            assert_close(getattr(found, name), (g * getattr(M, name)).sum((1, 2)), rtol=1e-9, atol=1e-11, msg=name)
        assert_close(found.skip, (g * M.skip).sum(1), rtol=1e-9, atol=1e-11)


@pytest.mark.law
@pytest.mark.parametrize("variant", VARIANTS)
def test_of_a_prediction_they_are_gradient_times_write(variant: str) -> None:
    """By autograd through the model's own scan and everything after it, which nothing here uses."""
    model, x, layer = build(variant), prompts(), LAYER.get(variant, 1)
    site = f"blocks.{layer}.mixer.hook_write"
    seen = hooks.record(model, x, site, grad=True)
    (gradient,) = torch.autograd.grad(last(seen.output).sum(), seen[site])
    found = contributions(model, x, layer, scalar=last)
    assert_close(found.by_channel, (gradient * seen[site]).sum(-1).detach(), rtol=1e-9, atol=1e-12)
    assert not found.exact and found.order == "first order"
    assert found.scalar is not None
    assert_close(found.scalar, last(model(x)).detach(), rtol=1e-10, atol=1e-12)
    assert found.relative_error < 1e-10
    if variant != "theory":  # what it sums to is g · (y + D x), and no prediction
        assert float((whole(found) - found.scalar).abs().min()) > 1e-3


@pytest.mark.law
@pytest.mark.parametrize("inside", PARTS[1:])
def test_of_a_prediction_the_gate_changes_nothing_and_taps_move_shares(inside: Any) -> None:
    model, x = build("mamba"), prompts()
    scan, found = contributions(model, x, 1, scalar=last), contributions(model, x, 1, scalar=last, inside=inside)
    assert_close(whole(found), whole(scan), rtol=1e-9, atol=1e-12)
    moved = float((found.tokens - scan.tokens).abs().max())
    assert moved > 1e-6 if "taps" in inside else moved < 1e-12


@pytest.mark.edit
@pytest.mark.parametrize(
    ("variant", "name"),
    [
        *(("mamba", name) for name in EDITS),
        *(("s4d" if name in S4D_EDITS else "lti", name) for name in EDITS),
        *(("s4", name) for name in TRANSITION_EDITS),
    ],
)
def test_edits_are_in_them(variant: str, name: str) -> None:
    model, x, make = build(variant), prompts(), {**EDITS, **TRANSITION_EDITS}[name]
    weights = weights_of(model, 1)
    with hooks.edit(model, make()):
        seen = hooks.record(model, x, MIXER + "*")
    expected = (weights * (seen["*.hook_y"] + seen["*.hook_skip"])).sum((1, 2))
    for inside in parts_of(variant)[::3]:  # the scan, and with everything
        g = weights / seen["*.hook_gate"] if "gate" in inside else weights
        found = contributions(model, x, 1, weights=g, inside=inside, edits=make())
        assert_close(whole(found), expected, rtol=1e-9, atol=1e-10 * float(expected.abs().max()))
        assert found.relative_error < 1e-10
    first = contributions(model, x, 1, scalar=last, edits=make())
    assert first.relative_error < 1e-10
    assert not left_on(model)


@pytest.mark.edit
@pytest.mark.parametrize("variant", ["mamba", "s4d", "s4", "linear"])
def test_what_is_put_into_a_state_takes_no_digits_from_what_was_there(variant: str) -> None:
    """An offset that is 10,000 times a write: in fp32 the parts still sum to the run as they do without it."""
    model, x = build(variant, torch.float32), prompts(dtype=torch.float32)
    edits = {MIXER + "hook_state": hooks.add(1e4, pos=3)}
    weights = weights_of(model, 1, dtype=torch.float32)
    found = contributions(model, x, 1, weights=weights, edits=edits)
    clean = contributions(model, x, 1, weights=weights)
    assert found.relative_error < 1e-5 and float(found.edited.abs().min()) > 100
    assert_close(found.tokens[:, 4:], clean.tokens[:, 4:], rtol=1e-4, atol=1e-4)


@pytest.mark.edit
@pytest.mark.parametrize("variant", ["mamba", "s4"])
def test_looking_does_not_count_as_firing(variant: str) -> None:
    model, x = build(variant), prompts()
    with hooks.edit(model, {MIXER + "hook_state": hooks.add(0.3, pos=3)}) as made:
        contributions(model, x, 1, weights=weights_of(model, 1))
        once = dict(made.fired)
    with hooks.edit(model, {MIXER + "hook_state": hooks.add(0.3, pos=3)}) as made:
        model(x)
    assert once == dict(made.fired)


@pytest.mark.edit
def test_nothing_from_before_a_set_state_is_counted() -> None:
    model, x = build("mamba"), prompts()
    weights = torch.zeros(11, 16, dtype=torch.float64)
    weights[6:] = weights_of(model, 1)[0, 6:]
    found = contributions(model, x, 1, weights=weights, edits=hooks.do_state(1, 6, 0.5))
    assert bool((found.tokens[:, :7] == 0).all()) and bool((found.tokens[:, 7:] != 0).all())
    assert bool((found.state_init == 0).all()) and float(found.edited.abs().min()) > 0


@pytest.mark.law
@pytest.mark.parametrize("variant", ["mamba", "s4d", "s4", "linear"])
def test_a_state_from_before_contributes_what_its_tokens_did(variant: str) -> None:
    model, x, cut = build(variant), prompts(2, 12), 5
    weights = weights_of(model, 1, 2, 12)
    weights[:, :cut] = 0
    for inside in parts_of(variant):
        one = contributions(model, x, 1, weights=weights, inside=inside)
        state = [
            type(s)(*(None if part is None else part.detach() for part in s))
            for s in model(x[:, :cut], return_state=True)[1]
        ]
        two = contributions(model, x[:, cut:], 1, weights=weights[:, cut:], inside=inside, state=state)
        assert_close(two.total, one.total, rtol=1e-9, atol=1e-12)
        assert_close(two.tokens, one.tokens[:, cut:], rtol=1e-9, atol=1e-12)
        assert two.relative_error < 1e-10 and float(two.state_init.abs().min()) > 1e-6


@pytest.mark.law
@pytest.mark.parametrize("variant", ["mamba", "s4d", "s4", "linear"])
def test_the_finite_effect_is_that_of_the_run_without_the_write(variant: str) -> None:
    model, x = build(variant), prompts()
    found = contributions(model, x, 1, scalar=last, finite=True).finite
    assert found is not None and found.pos.tolist() == list(range(11))
    first = contributions(model, x, 1, scalar=last).tokens
    for s in (0, 5, 10):
        with hooks.edit(model, {MIXER + "hook_write": hooks.zero(pos=s)}), torch.no_grad():
            effect = last(model(x) * 1)
        assert_close(found.effect[:, s], last(model(x)).detach() - effect, rtol=1e-8, atol=1e-12)
    assert_close(found.gap, found.effect - first, rtol=1e-9, atol=1e-12)
    assert float(found.gap.abs().max()) > 1e-4  # the head's norm is no linear function
    small = contributions(model, x, 1, scalar=lambda out: 1e-3 * last(out), finite=[-1, 2]).finite
    assert small is not None and small.pos.tolist() == [10, 2]
    assert_close(small.effect, 1e-3 * found.effect[:, [10, 2]], rtol=1e-8, atol=1e-14)


@pytest.mark.law
def test_the_finite_effect_of_a_small_write_is_its_first_order() -> None:
    """The gap shrinks with the square of the write: what is called first order is."""
    model, x = build("mamba"), prompts()
    gaps = []
    for size in (1e-1, 1e-2):
        edits = {MIXER + "hook_write": hooks.scale(size, pos=5)}
        found = contributions(model, x, 1, scalar=last, edits=edits, finite=[5]).finite
        assert found is not None
        gaps.append(float(found.gap.abs().max()))
        assert gaps[-1] < 0.1 * float(found.effect.abs().max())
    assert 50 < gaps[0] / gaps[1] < 200


@pytest.mark.law
def test_runs_that_start_at_the_layer_and_runs_with_edits_agree() -> None:
    model, x = build("mamba"), prompts()
    plain = contributions(model, x, 1, scalar=last, finite=[2, 7]).finite
    identity = contributions(model, x, 1, scalar=last, finite=[2, 7], edits={"*.hook_x_in": hooks.scale(1.0)}).finite
    with hooks.edit(model, {"*.hook_x_in": hooks.scale(1.0)}):
        around = contributions(model, x, 1, scalar=last, finite=[2, 7]).finite
    assert plain is not None and identity is not None and around is not None
    assert_close(identity.effect, plain.effect, rtol=1e-9, atol=1e-13)
    assert_close(around.effect, plain.effect, rtol=1e-9, atol=1e-13)


@pytest.mark.definition
def test_of_the_gated_theory_model_they_are_the_papers_formula() -> None:
    """arXiv 2510.00399 §3: F = Σ_i σ_i ∏_{j>i} (1 − σ_j) y_i p_iᵀ W_Bᵀ W_C p_query, whose output is the scan's own."""
    model, x = build("theory"), prompts()
    x[:, -1, -1] = 0  # the query's y
    mixer = model.blocks[0].mixer
    gate = torch.sigmoid(x @ mixer.w)
    score = torch.einsum("bip,np,nq,bq->bi", x, mixer.W_B, mixer.W_C, x[:, -1])
    later = torch.stack([(1 - gate[:, i + 1 :]).prod(1) for i in range(11)], dim=1)
    expected = (gate * later * x[..., -1] * score).detach()
    found = contributions(model, x, 0, scalar=last, finite=True)
    assert_close(found.tokens, expected, rtol=1e-10, atol=1e-13)
    assert found.finite is not None and found.scalar is not None
    assert_close(found.finite.gap, torch.zeros_like(expected), rtol=0, atol=1e-12)
    assert_close(found.total, found.scalar, rtol=1e-10, atol=1e-13)


@pytest.mark.law
@pytest.mark.parametrize("length", [1, 2])
def test_one_token_and_a_batch_of_one(length: int) -> None:
    for variant in VARIANTS:
        model, layer = build(variant), LAYER.get(variant, 1)
        found = contributions(model, prompts(1, length), layer, scalar=last, finite=True)
        assert found.tokens.shape == (1, length) and found.relative_error < 1e-10


@pytest.mark.hygiene
def test_the_model_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build("mamba"), prompts()

    def fails(out: Tensor) -> Tensor:
        raise RuntimeError("the scalar's own")

    with pytest.raises(RuntimeError, match="the scalar's own"):
        contributions(model, x, 1, scalar=fails)
    assert not left_on(model) and torch.is_grad_enabled()
    with torch.no_grad():
        inside = contributions(model, x, 1, scalar=last)
        assert not torch.is_grad_enabled()
    frozen = build("mamba")
    frozen.requires_grad_(False)
    assert_close(contributions(frozen, x, 1, scalar=last).tokens, inside.tokens, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not inside.by_channel.requires_grad and not left_on(model)


@pytest.mark.contract
def test_what_is_asked_wrongly_is_refused_in_one_line() -> None:
    model, x = build("mamba"), prompts()
    ones = torch.ones(16)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("weights= .* or scalar=, not both", {}),
        ("weights= .* or scalar=, not both", {"weights": ones, "scalar": last}),
        ("finite= is for a scalar", {"weights": ones, "finite": True}),
        (r"weights of shape \(5,\) do not fit", {"weights": torch.ones(5)}),
        (r"scalar returned \(3, 2\): one number for each prompt is \(3,\)", {"scalar": lambda out: out[:, -1]}),
        ("scalar returned float", {"scalar": lambda out: 1.0}),
        ("does not depend on the scan of layer 1", {"scalar": lambda out: x[:, 0, 0]}),
        ("does not depend on the scan of layer 1", {"scalar": lambda out: out[:, -1, 0].detach()}),
        ("finite=11 is outside the positions", {"scalar": last, "finite": 11}),
        ("cannot be split over tokens", {"weights": ones, "edits": {MIXER + "hook_state": torch.tanh}}),
    ]
    for message, options in wrong:
        with pytest.raises(BadArgument, match=message) as caught:
            contributions(model, x, 1, **options)
        assert "\n" not in str(caught.value)
        assert not left_on(model)


@pytest.mark.planted
def test_the_marked_token_is_found_and_the_decoy_is_not() -> None:
    x = marked()
    for listens, found_at, not_at in ((1, MARKED, DECOYED), (DECOY, DECOYED, MARKED)):
        found = contributions(copier(listens), x, 0, scalar=last, finite=True)
        assert found.finite is not None and found.scalar is not None
        for shares in (found.tokens, found.finite.effect):
            assert bool((shares[:, found_at].sign() == x[:, found_at, VALUE].sign()).all())
            relative = shares.abs() / shares[:, found_at].abs()[:, None]
            assert float(relative[:, not_at].max()) < 1e-5
            relative[:, found_at] = 0
            assert float(relative.max()) < 1e-5
            assert float(shares[:, found_at].abs().min()) > 1e-4


@pytest.mark.planted
def test_a_mechanism_that_is_cut_contributes_nothing() -> None:
    """The same copier with the marked write taken out: nothing is left to find, and nothing is found."""
    edits = {"blocks.0.mixer.hook_write": hooks.zero(pos=MARKED)}
    weights = torch.zeros(9, 4, dtype=torch.float64)
    weights[-1, VALUE] = 1
    clean = contributions(copier(), marked(), 0, weights=weights)
    cut = contributions(copier(), marked(), 0, weights=weights, edits=edits)
    assert float(clean.tokens.abs().max()) > 1
    assert float(cut.tokens.abs().max()) < 1e-6


@pytest.mark.law
def test_a_language_model_reads_integers() -> None:
    torch.manual_seed(0)
    model = models.build("mamba", d_model=8, n_layers=2, d_state=4, head="lm", d_out=7).double()
    x = torch.randint(7, (2, 9), generator=torch.Generator().manual_seed(3))
    found = contributions(model, x, 1, scalar=lambda out: out[:, -1, 3], finite=[0, 8])
    assert found.relative_error < 1e-10 and matrix(model, x, 0).relative_error < 1e-10
