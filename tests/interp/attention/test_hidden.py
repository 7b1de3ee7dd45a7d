"""The hidden attention: it is the recurrence, with every edit in it, and it finds what was planted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import hooks
import models
from hooks.errors import BadArgument, TooLarge
from interp.attention import contributions, hidden, matrix, recurrence
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
WHERE = [
    *(("mamba", inside) for inside in PARTS),
    ("lti", ("taps", "gate")),
    ("s4d", "scan"),
    ("s4", "scan"),
    ("linear", "scan"),
]


def recorded(model: Any, x: Tensor, layer: int = 1, edits: Any = None, **options: Any) -> dict[str, Tensor]:
    """Every site of the layer's mixer by kind, (batch, pos, …), from a run of its own."""
    prefix = f"blocks.{layer}.mixer."
    with recurrence.edited(model, edits):
        seen = hooks.record(model, x, prefix + "*", **options)
    return {name.removeprefix(prefix): value for name, value in seen.items()}


def numbers(values: Tensor, parts: int) -> Tensor:
    return torch.complex(*values.chunk(2, -1)) if parts == 2 else values


def by_definition(model: Any, variant: str, x: Tensor) -> Tensor:
    """M[b, c, t, s] = Σ_n C_t ∏_{s<k≤t} decay_k B̄_s, product by product, from the equations of each model."""
    layer = LAYER.get(variant, 1)
    seen, mixer = recorded(model, x, layer), model.blocks[layer].mixer
    if variant == "s4":
        return by_powers(mixer, *x.shape[:2])
    decay = numbers(seen["hook_decay"], 2 if variant == "s4d" else 1)
    batch, length, width, _ = decay.shape
    if variant == "s4d":
        A = torch.complex(-mixer.log_A_real.exp(), mixer.A_imag)
        gain = ((torch.exp(seen["hook_delta"][..., None] * A) - 1) / A).expand_as(decay)
        C = (2 * torch.view_as_complex(mixer.C)).expand_as(decay)
    elif variant == "linear":
        gain, C = (seen[kind].repeat_interleave(width // 2, dim=2) for kind in ("hook_B", "hook_C"))
    else:
        write = seen["hook_delta_write"]
        factor = -torch.expm1(-write) if variant == "theory" else write
        gain = factor[..., None] * seen["hook_B"][:, :, None]
        C = seen["hook_C"][:, :, None].expand_as(decay)
    values = torch.zeros(batch, width, length, length, dtype=x.dtype)
    for t in range(length):
        for s in range(t + 1):
            product = decay[:, s + 1 : t + 1].prod(1)
            values[:, :, t, s] = (C[:, t] * product * gain[:, s]).sum(-1).real
    return values.detach()


def by_powers(mixer: Any, batch: int, length: int) -> Tensor:
    """S4's C Āᵗ⁻ˢ B̄ with dense matrices over every state and its conjugate, by the bilinear rule."""
    P, B, C = (torch.view_as_complex(part.detach()) for part in (mixer.A_low_rank, mixer.B, mixer.C))
    P, B, C = (torch.cat([part, part.conj()], dim=-1) for part in (P, B, C))
    diagonal = torch.complex(-mixer.log_A_real.exp(), mixer.A_imag).detach()
    A = torch.diag_embed(torch.cat([diagonal, diagonal.conj()], dim=-1)) - P[:, :, None] * P.conj()[:, None]
    half = mixer.log_dt.detach().exp()[:, None, None] / 2 * A
    one = torch.eye(A.shape[-1], dtype=A.dtype)
    step = torch.linalg.solve(one - half, one + half)
    held = torch.linalg.solve(one - half, mixer.log_dt.detach().exp()[:, None] * B)
    values = torch.zeros(len(C), length, length, dtype=torch.float64)
    for lag in range(length):
        values.diagonal(-lag, 1, 2).copy_((C * held).sum(-1).real[:, None])
        held = (step @ held[..., None])[..., 0]
    return values.expand(batch, -1, -1, -1)


@pytest.mark.definition
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_matrix_is_the_product_of_decays(variant: str) -> None:
    model, x = build(variant), prompts()
    found = matrix(model, x, LAYER.get(variant, 1))
    assert_close(found.values, by_definition(model, variant, x), rtol=1e-10, atol=1e-12)
    assert bool((found.values.triu(1) == 0).all())  # causal, exactly
    assert float(found.values.tril(-1).abs().max()) > 1e-2


@pytest.mark.law
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_y_is_the_matrix_times_x_and_the_skip_is_apart(variant: str, dtype: torch.dtype, bound: float) -> None:
    model, x, layer = build(variant, dtype), prompts(dtype=dtype), LAYER.get(variant, 1)
    seen, found = recorded(model, x, layer), matrix(model, x, layer)
    y = seen["hook_y"].mT
    assert_close(found.shares.sum(-1), y, rtol=0, atol=bound * max(1.0, float(y.abs().max())))
    assert found.relative_error < bound and found.error < bound * float(y.abs().max())
    assert_close(found.source, seen["hook_x"].mT, rtol=0, atol=0)
    skip = seen["hook_skip"].mT if "hook_skip" in seen else torch.zeros_like(y)
    assert_close(found.skip, skip, rtol=0, atol=0)


@pytest.mark.law
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 2), (2, 8), (1, 13)])
def test_every_length_and_a_batch_of_one(variant: str, batch: int, length: int) -> None:
    model, x, layer = build(variant), prompts(batch, length), LAYER.get(variant, 1)
    found = matrix(model, x, layer)
    assert found.values.shape == (batch, len(found.channels), length, length)
    assert found.relative_error < 1e-10
    assert_close(found.values, by_definition(model, variant, x), rtol=1e-10, atol=1e-12)


@pytest.mark.law
@pytest.mark.parametrize(("variant", "inside"), WHERE)
def test_chosen_rows_and_channels_are_those_of_the_whole(variant: str, inside: Any, monkeypatch: Any) -> None:
    model, x = build(variant), prompts(2, 70)
    monkeypatch.setattr(recurrence, "TILE", 16)  # several tiles, and a short one
    edits = {MIXER + "hook_state": hooks.add(0.3, pos=[1, 20])}
    whole = matrix(model, x, 1, inside=inside, edits=edits)
    ways = {
        "adjoint": {"queries": [69, 0, 33], "channels": [5, 1]},
        "tree, some": {"queries": slice(3, 60), "channels": slice(0, 4)},
        "mask": {"queries": torch.arange(70) % 2 == 0},
        "last": {"queries": -1},
        "all channels, in another order": {"channels": torch.arange(len(whole.channels)).flip(0)},
    }
    for way, picks in ways.items():
        some = matrix(model, x, 1, inside=inside, edits=edits, **picks)
        rows, columns = some.queries, some.channels
        assert some.relative_error < 1e-10, way
        assert_close(some.values, whole.values[:, columns][:, :, rows], rtol=1e-9, atol=1e-12, msg=way)
        for share in ("state_init", "conv_bias", "conv_init", "edited", "skip", "output"):
            wanted = getattr(whole, share)[:, columns][..., rows]
            assert_close(getattr(some, share), wanted, rtol=1e-9, atol=1e-12, msg=f"{way}, {share}")
    monkeypatch.setattr(hidden, "TILE_NUMBERS", 3 * 2 * 128 * 128)  # three channels at a time, of 8 or 16
    assert_close(matrix(model, x, 1, inside=inside, edits=edits).values, whole.values, rtol=1e-10, atol=1e-12)


@pytest.mark.law
def test_heads_pick_all_of_their_channels() -> None:
    model, x = build("linear"), prompts()
    whole = matrix(model, x, 1)
    each = len(whole.channels) // 2
    found = matrix(model, x, 1, heads=[1])
    assert found.channels.tolist() == list(range(each, 2 * each))
    assert_close(found.values, whole.values[:, each:], rtol=0, atol=0)
    # One head reads with one key: its channels share one matrix.
    assert_close(found.values, found.values[:, :1].expand_as(found.values), rtol=1e-12, atol=1e-14)


@pytest.mark.law
@pytest.mark.parametrize(("variant", "inside"), WHERE)
def test_a_state_from_before_has_the_share_of_its_tokens(variant: str, inside: Any) -> None:
    model, x, cut = build(variant), prompts(2, 12), 5
    whole = matrix(model, x, 1, inside=inside)
    _, state = model(x[:, :cut], return_state=True)
    later = matrix(
        model, x[:, cut:], 1, inside=inside, state=[type(s)(*(_detached(part) for part in s)) for s in state]
    )
    assert later.relative_error < 1e-10
    assert_close(later.values, whole.values[:, :, cut:, cut:], rtol=1e-9, atol=1e-12)
    assert_close(later.output, whole.output[..., cut:], rtol=1e-9, atol=1e-12)
    # With taps, the writes after the cut hold some of what came before: it is in conv_init, no longer in the tokens.
    before = whole.shares[:, :, cut:, :cut].sum(-1)
    bias = whole.conv_bias[..., cut:] - later.conv_bias
    assert_close(later.state_init + later.conv_init, before + bias, rtol=1e-9, atol=1e-12)


def _detached(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.detach()


@pytest.mark.edit
@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("inside", ["scan", ("taps", "gate")])
def test_edits_are_in_it(name: str, inside: Any) -> None:
    model, x = build("mamba"), prompts()
    _check_edit(model, x, EDITS[name], inside)


@pytest.mark.edit
@pytest.mark.parametrize("name", S4D_EDITS)
def test_edits_are_in_it_also_where_states_are_complex(name: str) -> None:
    _check_edit(build("s4d"), prompts(), EDITS[name], "scan")


@pytest.mark.edit
@pytest.mark.parametrize("name", TRANSITION_EDITS)
def test_edits_are_in_it_also_where_states_are_mixed(name: str) -> None:
    _check_edit(build("s4"), prompts(), TRANSITION_EDITS[name], "scan")


def _check_edit(model: Any, x: Tensor, edits: Any, inside: Any) -> None:
    clean, seen = matrix(model, x, 1, inside=inside), recorded(model, x, 1, edits())
    for picks in ({}, {"queries": [10]}):
        found = matrix(model, x, 1, inside=inside, edits=edits(), **picks)
        assert found.relative_error < 1e-10
        y, gated = seen["hook_y"].mT[..., found.queries], seen.get("hook_gate")
        if "gate" in inside:
            y = y * gated.mT[..., found.queries]
        assert_close(found.output, y, rtol=1e-12, atol=1e-14)
        rebuilt = found.shares.sum(-1) + found.state_init + found.conv_bias + found.conv_init + found.edited
        assert_close(rebuilt, y, rtol=1e-9, atol=1e-11)
    assert float((found.output - clean.output[..., -1:]).abs().max()) > 1e-6  # the edit did something
    assert not left_on(model)


@pytest.mark.edit
@pytest.mark.parametrize("variant", ["mamba", "s4d", "s4"])
def test_where_the_state_is_set_nothing_from_before_arrives(variant: str) -> None:
    model, x = build(variant), prompts()
    found = matrix(model, x, 1, edits=hooks.do_state(1, 4, 0.7))
    clean = matrix(model, x, 1)
    assert bool((found.values[:, :, 4:, :5] == 0).all())  # exactly; token 4's own write is overwritten as well
    assert_close(found.values[:, :, 5:, 5:], clean.values[:, :, 5:, 5:], rtol=1e-10, atol=1e-13)
    assert_close(found.values[:, :, :4], clean.values[:, :, :4], rtol=1e-10, atol=1e-13)
    assert bool((found.edited[..., :4] == 0).all()) and float(found.edited[..., 4].abs().min()) > 0


@pytest.mark.edit
def test_a_token_without_a_step_neither_writes_nor_forgets() -> None:
    model, x = build("mamba"), prompts()
    clean = matrix(model, x, 1)
    found = matrix(model, x, 1, edits={MIXER + "hook_delta": hooks.zero(pos=3)})
    assert bool((found.values[..., 3] == 0).all())
    decay = recorded(model, x)["hook_decay"]
    assert float(decay[:, 3].max()) < 1
    assert float((found.values[:, :, 4:, :3] - clean.values[:, :, 4:, :3]).abs().max()) > 1e-4
    written = matrix(model, x, 1, edits={MIXER + "hook_write": hooks.zero(pos=3)})
    others = [s for s in range(11) if s != 3]
    assert bool((written.values[..., 3] == 0).all()) and bool((written.edited == 0).all())
    assert_close(written.values[..., others], clean.values[..., others], rtol=1e-10, atol=1e-14)


@pytest.mark.law
@pytest.mark.parametrize("variant", ["mamba", "lti", "s4d", "s4", "linear"])
def test_taking_out_a_write_subtracts_its_column(variant: str) -> None:
    model, x = build(variant), prompts()
    found = matrix(model, x, 1)
    for source in (0, 6, 10):
        knocked_out = recorded(model, x, 1, {MIXER + "hook_write": hooks.zero(pos=source)})["hook_y"].mT
        assert_close(found.output - knocked_out, found.shares[..., source], rtol=1e-9, atol=1e-12)


@pytest.mark.law
@pytest.mark.parametrize("variant", ["mamba", "lti"])
@pytest.mark.parametrize("gate", [False, True])
def test_with_the_taps_it_is_the_derivative_by_what_enters_the_convolution(variant: str, gate: bool) -> None:
    """σ of the convolution, Δ, B, C and the gate held; by autograd through the model's own convolution and scan."""
    model, x = build(variant), prompts()
    seen, leaf, conv = recorded(model, x), [], []
    kinds = ("hook_delta", "hook_B", "hook_C", "hook_gate")

    def enter(values: Tensor) -> Tensor:
        leaf.append(values.detach().requires_grad_())
        return leaf[0]

    def note(values: Tensor) -> Tensor:
        conv.append(values)
        return values

    edits = {
        "hook_x_in": enter,
        "hook_x_pre": note,
        "hook_x": lambda values: torch.sigmoid(seen["hook_x_pre"]) * conv[0],
        **{kind: hooks.set_to(seen[kind]) for kind in kinds},
    }
    with hooks.edit(model, {MIXER + kind: change for kind, change in edits.items()}):
        y = hooks.record(model, x, MIXER + "hook_y", grad=True)[MIXER + "hook_y"]
    out = y * seen["hook_gate"] if gate else y
    found = matrix(model, x, 1, inside=("taps", "gate") if gate else "taps")
    assert_close(found.source, seen["hook_x_in"].mT, rtol=0, atol=0)
    for t in (0, 2, 10):
        (derivative,) = torch.autograd.grad(out[:, t].sum(), leaf[0], retain_graph=True)
        assert_close(found.values[:, :, t], derivative.mT, rtol=1e-9, atol=1e-12)


@pytest.mark.law
def test_with_the_gate_it_is_what_hook_gated_holds() -> None:
    model, x = build("mamba"), prompts()
    found = matrix(model, x, 1, inside="gate")
    assert_close(found.output + found.skip, recorded(model, x)["hook_gated"].mT, rtol=1e-10, atol=1e-13)
    assert found.inside == ("scan", "gate")


@pytest.mark.law
def test_an_x_of_zero_has_a_column_all_the_same() -> None:
    """Where x is 0 nothing is written; what would be written for each unit of x is not 0 for that."""
    model, x = build("theory"), prompts()
    with_zero = x.clone()
    with_zero[:, 4, -1] = 0  # x is the token's last number, and here the others alone decide Δ, B and C
    model.set_weights(**{name: _without_last(getattr(model.blocks[0].mixer, name)) for name in ("W_B", "W_C", "w")})
    assert_close(matrix(model, with_zero, 0).values, matrix(model, x, 0).values, rtol=1e-12, atol=1e-14)


def _without_last(weight: Tensor) -> Tensor:
    kept = weight.detach().clone()
    kept[..., -1] = 0
    return kept


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that any operation inside makes."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor) and not tensor.is_sparse:
                self.entries = max(self.entries, tensor.untyped_storage().nbytes() // tensor.element_size())
        return made


@pytest.mark.law
@pytest.mark.parametrize(("name", "config"), [("mamba", {"expand": 4}), ("s4d", {"d_model": 64})])
def test_no_tensor_is_larger_than_the_result(name: str, config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = models.build(name, **{"d_model": 16, "n_layers": 1, "d_state": 16, "d_in": 5, **config})
    x = torch.randn(2, 64, 5)
    states = 2 * 64 * 64 * 16 * (2 if name == "s4d" else 1)  # batch pos d_inner n
    with Largest() as largest:
        found = matrix(model, x, 0)
    assert found.values.numel() == 2 * 64 * 64 * 64
    assert largest.entries <= max(found.values.numel(), states)
    with Largest() as largest:
        matrix(model, x, 0, queries=[63])
    assert largest.entries <= states
    with Largest() as largest:
        contributions(model, x, 0, weights=torch.ones(64))
    assert largest.entries <= states


@pytest.mark.contract
def test_a_result_that_does_not_fit_is_refused_before_the_run() -> None:
    model, x = build("mamba"), prompts()
    runs = model.runs
    with pytest.raises(TooLarge, match="3 × 16 channels × 11 queries × 11 positions"):
        matrix(model, x, 1, max_memory=1000)
    assert model.runs == runs
    matrix(model, x, 1, channels=[0], queries=[10], max_memory=1000)


@pytest.mark.contract
def test_a_model_without_the_sites_is_told_which() -> None:
    x = prompts()
    transformer = models.build("transformer", d_model=8, n_layers=2, n_heads=2, d_in=5, n_ctx=16).double()
    with pytest.raises(BadArgument, match=r"layer 1 of this transformer has no hook_x, hook_decay.*no recurrence"):
        matrix(transformer, x, 1)
    s4d = build("s4d")
    with pytest.raises(BadArgument, match="s4d has no hook_gate"):
        matrix(s4d, x, 1, inside="gate")
    with pytest.raises(BadArgument, match="has no hook_x_in, hook_x_pre, hook_conv_init"):
        contributions(s4d, x, 1, weights=torch.ones(8), inside="taps")
    convolved = build("linear", d_conv=4)
    with pytest.raises(BadArgument, match="other channels than its x"):
        matrix(convolved, x, 1, inside="taps")
    assert matrix(convolved, x, 1).relative_error < 1e-10


@pytest.mark.contract
def test_what_is_asked_wrongly_is_refused_in_one_line() -> None:
    model, x = build("mamba"), prompts()
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("there is no layer 2", {"layer": 2}),
        ("there is no layer -1", {"layer": -1}),
        ('no part to have inside is called "conv"', {"inside": "conv"}),
        ("queries=11 is outside the positions", {"queries": 11}),
        (r"channels=\[\] picks nothing", {"channels": []}),
        ("indices are integers or a mask", {"channels": torch.rand(2, 2)}),
        ("picks the same entry of the positions twice", {"queries": [2, 2]}),
        ("has no heads", {"heads": 0}),
        ("were both given", {"heads": 0, "channels": 0}),
        ("cannot be split over tokens", {"edits": {MIXER + "hook_state": torch.tanh}}),
        ("cannot be split over tokens", {"edits": {MIXER + "hook_state": hooks.mean("batch", pos=2)}}),
    ]
    for message, options in wrong:
        with pytest.raises(BadArgument, match=message) as caught:
            matrix(model, x, **{"layer": 1, **options})
        assert "\n" not in str(caught.value)
        assert not left_on(model)


@pytest.mark.law
def test_an_output_that_the_recurrence_does_not_give_shows_as_an_error() -> None:
    """The figure beside every picture can be bad: here a hook changes what is read out at one position only."""
    model, x = build("mamba"), prompts()
    with hooks.edit(model, {MIXER + "hook_state": hooks.scale(2.0, pos=5)}, readout_only=True):
        found = matrix(model, x, 1)
    assert found.relative_error > 0.01
    assert_close(float(found.error), float(found.output[..., 5].abs().max()) / 2, rtol=1e-9, atol=0)


@pytest.mark.planted
def test_the_marked_token_is_found_and_the_decoy_is_not() -> None:
    x = marked()
    for listens, found_at, not_at in ((1, MARKED, DECOYED), (DECOY, DECOYED, MARKED)):
        row = matrix(copier(listens), x, 0, channels=[VALUE], queries=[-1]).values[:, 0, 0].abs()
        assert row.argmax(-1).tolist() == [found_at] * 4
        others = row.clone()
        others[:, found_at] = 0
        assert float(row[:, found_at].min()) > 1
        assert float(others.max()) < 1e-6 and float(row[:, not_at].max()) < 1e-6


@pytest.mark.planted
def test_the_taps_give_the_token_whose_value_it_is() -> None:
    """The copier writes at the marked token what stood two tokens before: only with the taps is that seen."""
    model, x = copier(back=2), marked()
    scan = matrix(model, x, 0, channels=[VALUE], queries=[-1]).shares[:, 0, 0].abs()
    taps = matrix(model, x, 0, channels=[VALUE], queries=[-1], inside="taps").shares[:, 0, 0].abs()
    assert scan.argmax(-1).tolist() == [MARKED] * 4
    assert taps.argmax(-1).tolist() == [MARKED - 2] * 4
    assert float(taps[:, MARKED].max()) < 1e-6 and float(scan[:, MARKED - 2].max()) < 1e-6
    assert float(taps[:, MARKED - 2].min()) > 0.1
