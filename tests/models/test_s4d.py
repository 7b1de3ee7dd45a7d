"""S4D: both of its paths against numpy, state in and out, edits of Δ and of the complex sites,
gradients.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import hooks
import models
from hooks.errors import BadArgument
from hooks.vocabulary import sites
from models.s4 import S4DMixer, pair, unpair
from models.scan import pair_scan
from models.scan.causal import DIRECT

MIXER = "blocks.0.mixer."
LONG = DIRECT + 3
"""A length that is convolved by FFT."""


def small(n_layers: int = 2, dtype: torch.dtype = torch.float64, **config: int) -> models.Stack:
    fields = {"d_model": 6, "n_layers": n_layers, "d_state": 4, "d_in": 3, "d_out": 2, **config}
    return models.build("s4d", **fields).to(dtype).eval()


def prompts(length: int, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(batch, length, 3, generator=generator, dtype=dtype)


def recurred(model: models.Stack, x: Tensor) -> Tensor:
    with hooks.expose(model):
        return model(x)


def by_numpy(mixer: S4DMixer, x: np.ndarray) -> np.ndarray:
    """The layer's y + D x (batch, pos, d_inner) by the definition, one complex number after the
    other.
    """
    weights = {name: value.detach().double().numpy() for name, value in mixer.named_parameters()}
    A = -np.exp(weights["log_A_real"]) + 1j * weights["A_imag"]
    C = weights["C"][..., 0] + 1j * weights["C"][..., 1]
    decay = np.exp(np.exp(weights["log_dt"])[:, None] * A)
    y = np.zeros_like(x)
    for b in range(x.shape[0]):
        h = np.zeros_like(A)
        for t in range(x.shape[1]):
            h = decay * h + (decay - 1) / A * x[b, t, :, None]
            y[b, t] = 2 * (C * h).sum(-1).real + weights["D"] * x[b, t]
    return y


@pytest.mark.definition
@pytest.mark.parametrize("length", [1, 2, 7, 33])
def test_both_paths_are_the_definition(length: int) -> None:
    model, x = small(n_layers=1), prompts(length)
    mixer = model.blocks[0].mixer
    wanted = torch.from_numpy(by_numpy(mixer, model.blocks[0].norm(model.embed(x)).detach().numpy()))
    for record in (
        hooks.record(model, x, [MIXER + "hook_y", MIXER + "hook_skip"]),
        exposed_record(model, x),
    ):
        got = record[MIXER + "hook_y"] + record[MIXER + "hook_skip"]
        assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    mixed = nn.functional.gelu(wanted)
    a, b = mixer.out_proj(mixed).chunk(2, dim=-1)
    assert_close(hooks.record(model, x, [MIXER + "hook_out"])[MIXER + "hook_out"], a * torch.sigmoid(b))


def exposed_record(model: models.Stack, x: Tensor) -> hooks.Record:
    with hooks.expose(model):
        return hooks.record(model, x, [MIXER + "hook_y", MIXER + "hook_skip"])


@pytest.mark.definition
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-5)])
@pytest.mark.parametrize("length", [1, 2, 33, LONG])
def test_paths_agree(length: int, dtype: torch.dtype, tolerance: float) -> None:
    model, x = small(dtype=dtype), prompts(length, dtype=dtype)
    assert_close(model(x), recurred(model, x), rtol=tolerance, atol=tolerance)
    assert model(x).dtype == dtype


@pytest.mark.definition
def test_gradients_of_both_paths_agree() -> None:
    model, x = small(), prompts(9)
    weight = torch.randn(2, 9, 2, dtype=torch.float64)

    def gradients(exposed: bool) -> list[Tensor]:
        inputs = x.clone().requires_grad_()
        out = recurred(model, inputs) if exposed else model(inputs)
        return list(torch.autograd.grad((out * weight).sum(), [inputs, *model.parameters()]))

    for fast, slow in zip(gradients(False), gradients(True), strict=True):
        assert_close(fast, slow, rtol=1e-8, atol=1e-8)
        assert fast.abs().max() > 0


@pytest.mark.definition
def test_complex_scan_and_its_first_and_second_derivatives() -> None:
    decay, write = (torch.randn(1, 4, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    start = torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True)
    h, expected = unpair(start), []
    for t in range(4):
        h = unpair(decay[:, t]) * h + unpair(write[:, t])
        expected.append(pair(h))
    assert_close(pair_scan(decay, write, start), torch.stack(expected, 1))
    assert torch.autograd.gradcheck(pair_scan, (decay, write, start), fast_mode=True)
    assert torch.autograd.gradgradcheck(pair_scan, (decay, write, start), fast_mode=True)
    with torch.no_grad():
        decay[:, 2, 1] = 0
    assert torch.autograd.gradcheck(pair_scan, (decay, write, start), fast_mode=True)


@pytest.mark.law
def test_a_zero_decay_cuts_an_infinite_past() -> None:
    decay, write = torch.zeros(1, 4, 1, 2), torch.ones(1, 4, 1, 2)
    decay[..., 0] = 1
    write[:, 0] = torch.inf
    assert not torch.isfinite(pair_scan(decay, write)[:, 3]).any()
    decay[:, 2] = 0
    assert_close(pair_scan(decay, write)[0, 2:, 0], torch.tensor([[1.0, 1.0], [2.0, 2.0]]))


@pytest.mark.law
@pytest.mark.parametrize("exposed", [False, True])
def test_steps_and_chunks_equal_the_whole(exposed: bool) -> None:
    model, x = small(), prompts(11)
    whole, last = model(x, return_state=True)

    def run(part: Tensor, state: models.stack.State | None) -> tuple[Tensor, models.stack.State]:
        if not exposed:
            return model(part, state=state, return_state=True)
        with hooks.expose(model):
            return model(part, state=state, return_state=True)

    state, outs = None, []
    for t in range(11):
        out, state = run(x[:, t : t + 1], state)
        outs.append(out)
    assert_close(torch.cat(outs, 1), whole, rtol=1e-10, atol=1e-10)
    first, middle = run(x[:, :4], None)
    second, end = run(x[:, 4:], middle)
    assert_close(torch.cat([first, second], 1), whole, rtol=1e-10, atol=1e-10)
    for got in (state, end):
        for mine, theirs in zip(got, last, strict=True):
            assert mine.conv is None
            assert_close(mine.h, theirs.h, rtol=1e-10, atol=1e-10)
    assert (second - run(x[:, 4:], None)[0]).abs().max() > 1e-3
    token, _ = model.step(x[:, 4], middle)
    assert_close(token, whole[:, 4], rtol=1e-10, atol=1e-10)


@pytest.mark.law
def test_gradients_through_a_chunk_boundary_equal_the_whole() -> None:
    model, x = small(), prompts(8)
    (whole,) = torch.autograd.grad(model(x)[:, -1].sum(), [model.blocks[0].mixer.log_dt], retain_graph=False)
    _, state = model(x[:, :5], return_state=True)
    out = model(x[:, 5:], state=state)
    (chunks,) = torch.autograd.grad(out[:, -1].sum(), [model.blocks[0].mixer.log_dt])
    assert_close(chunks, whole, rtol=1e-8, atol=1e-10)
    _, state = model(x[:, :5])[:, 0], [models.LayerState(None, s.h.detach()) for s in state]
    (cut,) = torch.autograd.grad(model(x[:, 5:], state=state)[:, -1].sum(), [model.blocks[0].mixer.log_dt])
    assert (cut - whole).abs().max() > 1e-6


def test_a_state_of_another_shape_is_refused() -> None:
    model = small(n_layers=1)
    with pytest.raises(BadArgument, match=r"state's h has shape \(2, 6, 4\).*\(2, 6, 8\)"):
        model(prompts(3), state=[models.LayerState(None, torch.zeros(2, 6, 4))])


@pytest.mark.planted
def test_planted_kernel_has_the_closed_form() -> None:
    """One state with A = −a + iπ/2 at Δ = 1 rings with period 4; y is 2 Re(C (e^A − 1)/A e^{A l})
    at each lag l.
    """
    model = small(n_layers=1, d_state=1)
    mixer, rate = model.blocks[0].mixer, math.log(2)
    with torch.no_grad():
        mixer.log_dt.zero_()
        mixer.log_A_real.fill_(math.log(rate))
        mixer.A_imag.fill_(math.pi / 2)
        mixer.D.zero_()
        A = complex(-rate, math.pi / 2)
        # C undoes the write, so that the response at lag l is 2 · 2^−l cos(π l / 2) for real x.
        C = A / (np.exp(A) - 1)
        mixer.C[..., 0], mixer.C[..., 1] = C.real, C.imag
    pulse = torch.zeros(1, 7, 6, dtype=torch.float64)
    pulse[:, 0] = 1
    wanted = torch.tensor([2, 0, -0.5, 0, 0.125, 0, -0.03125], dtype=torch.float64)
    y, _ = mixer._scan(pulse, None, False)
    assert_close(y[0], wanted[:, None].expand(7, 6), rtol=1e-12, atol=1e-12)
    with hooks.expose(model):
        y, last = mixer._scan(pulse, None, True)
    assert_close(y[0], wanted[:, None].expand(7, 6), rtol=1e-12, atol=1e-12)
    assert_close(unpair(last)[0, 0] * C, torch.tensor([np.exp(A) ** 6]))


@pytest.mark.hygiene
def test_sites_fire_in_the_order_listed_and_have_the_listed_shapes() -> None:
    model, x = small(), prompts(5)
    fired: list[str] = []
    listed = sites(model)

    def note(tensor: Tensor, hook: hooks.point.HookPoint) -> None:
        fired.append(str(hook.name))
        row = next(row for row in listed if row.name == hook.name)
        sizes = {"batch": 2, "pos": 5}
        assert tensor.shape == tuple(
            sizes[axis] if size is None else size for axis, size in zip(row.axes, row.shape, strict=True)
        )
        assert tensor.is_contiguous()

    model.run_with_hooks(x, fwd_hooks=[("*", note)])
    assert fired == listed.names
    kinds = {name.rsplit(".", 1)[-1] for name in fired if ".mixer." in name}
    assert not kinds & {
        "hook_x_in",
        "hook_x_pre",
        "hook_gate",
        "hook_gated",
        "hook_conv_init",
        "hook_B",
        "hook_C",
    }
    assert next(row for row in listed if row.name.endswith("hook_state")).shape == (
        None,
        None,
        6,
        8,
    )


@pytest.mark.hygiene
def test_sites_of_the_fast_path_are_contiguous() -> None:
    model, seen = small(), []
    model.run_with_hooks(
        prompts(LONG),
        fwd_hooks=[("*.hook_y", lambda tensor, hook: seen.append(tensor.is_contiguous()))],
    )
    assert seen == [True, True]


@pytest.mark.hygiene
def test_a_hook_that_writes_in_place_is_a_hook_that_returns() -> None:
    """At every site alike, with gradients, and with no trace of it in the next run."""
    model, x = small(n_layers=1), prompts(5)
    parameters = list(model.parameters())

    def in_place(tensor: Tensor, hook: hooks.point.HookPoint) -> None:
        tensor.mul_(1.5)

    def returned(tensor: Tensor, hook: hooks.point.HookPoint) -> Tensor:
        return tensor * 1.5

    clean = model(x)
    for site in sites(model).names:
        found = []
        for hook in (in_place, returned):
            out, state = model.run_with_hooks(x, return_state=True, fwd_hooks=[(site, hook)])
            grads = torch.autograd.grad(out.sum(), parameters, allow_unused=True)
            found.append([out, state[0].h, *grads])
        assert_close(*found, rtol=1e-12, atol=1e-12)
        assert (found[0][0] - clean).abs().max() > 0 or site.endswith("hook_state_init")
        assert_close(model(x), clean, rtol=0, atol=0)


@pytest.mark.edit
@pytest.mark.parametrize("site", ["hook_delta", "hook_delta_decay", "hook_delta_write"])
def test_delta_edited_at_one_position_is_used_there(site: str) -> None:
    """Against numpy with the edited Δ in its role at that position; earlier outputs stay, later
    ones change.
    """
    model, x = small(n_layers=1), prompts(6)
    mixer, at = model.blocks[0].mixer, 2
    with hooks.edit(model, {MIXER + site: hooks.scale(3.0, pos=at)}):
        record = hooks.record(model, x, [MIXER + "hook_y", MIXER + "hook_x"])
    step = mixer.log_dt.detach().exp().numpy()
    A = (-mixer.log_A_real.exp() + 1j * mixer.A_imag).detach().numpy()
    C = torch.view_as_complex(mixer.C.detach()).numpy()
    scan_input = record[MIXER + "hook_x"].detach().numpy()
    h, wanted = np.zeros((2, *A.shape), complex), []
    for t in range(6):
        forgets = step * (3 if t == at and site != "hook_delta_write" else 1)
        writes = step * (3 if t == at and site != "hook_delta_decay" else 1)
        h = np.exp(forgets[:, None] * A) * h + (np.exp(writes[:, None] * A) - 1) / A * scan_input[:, t, :, None]
        wanted.append(2 * (C * h).sum(-1).real)
    assert_close(record[MIXER + "hook_y"], torch.from_numpy(np.stack(wanted, 1)), rtol=1e-10, atol=1e-10)
    change = (
        (hooks.record(model, x, [MIXER + "hook_y"])[MIXER + "hook_y"] - record[MIXER + "hook_y"]).abs().amax((0, 2))
    )
    assert (change[:at] < 1e-12).all() and (change[at + 1 :] > 1e-4).all()


@pytest.mark.edit
def test_a_constant_edit_of_delta_is_the_model_with_that_step() -> None:
    model, x = small(n_layers=1), prompts(6)
    with hooks.edit(model, {"*.hook_delta": hooks.scale(2.0)}), torch.no_grad():
        edited = model(x)
    before = model(x)
    with torch.no_grad():
        model.blocks[0].mixer.log_dt += math.log(2)
    assert_close(edited, model(x).detach(), rtol=1e-10, atol=1e-10)
    assert (edited - before).abs().max() > 1e-3


@pytest.mark.edit
def test_gradient_of_delta_is_apart_for_each_token() -> None:
    """A site that is only read keeps its gradient, token by token: by finite differences."""
    model, x = small(n_layers=1), prompts(5)
    kept: dict[str, Tensor] = {}

    def keep(tensor: Tensor, hook: hooks.point.HookPoint) -> None:
        tensor.retain_grad()
        kept["delta"] = tensor

    with model.hooks(fwd_hooks=[(MIXER + "hook_delta", keep)]):
        model(x)[:, -1].sum().backward()
    gradient = kept["delta"].grad
    assert gradient is not None
    for t in range(5):
        bump = torch.zeros(2, 5, 6, dtype=torch.float64)
        bump[1, t, 3] = 1e-6
        with hooks.edit(model, {MIXER + "hook_delta": hooks.add(bump)}), torch.no_grad():
            up = model(x)[:, -1].sum()
        with hooks.edit(model, {MIXER + "hook_delta": hooks.add(-bump)}), torch.no_grad():
            down = model(x)[:, -1].sum()
        assert_close(gradient[1, t, 3], (up - down) / 2e-6, rtol=1e-5, atol=1e-9)
    assert gradient.abs().max() > 1e-4


@pytest.mark.edit
def test_decay_in_pair_layout_multiplies_as_a_complex_number() -> None:
    """Zeros cut the past; real parts 1 keep it; a quarter turn swaps real and imaginary parts
    with a sign.
    """
    model, x = small(n_layers=1), prompts(5)
    clean = hooks.record(model, x, [MIXER + "hook_state", MIXER + "hook_write"])
    state, write = clean[MIXER + "hook_state"], clean[MIXER + "hook_write"]

    def edited(real: float, imag: float) -> Tensor:
        factor = torch.cat([torch.full((4,), real), torch.full((4,), imag)]).double()
        with hooks.edit(model, {MIXER + "hook_decay": hooks.set_to(factor, pos=2)}):
            return hooks.record(model, x, [MIXER + "hook_state"])[MIXER + "hook_state"]

    assert_close(edited(0, 0)[:, 2], write[:, 2])
    assert_close(edited(1, 0)[:, 2], state[:, 1] + write[:, 2])
    real, imag = state[:, 1].chunk(2, dim=-1)
    assert_close(edited(0, 1)[:, 2], torch.cat([-imag, real], -1) + write[:, 2])


@pytest.mark.edit
def test_freeze_and_do_state_on_complex_states() -> None:
    model, x = small(), prompts(6)
    name = MIXER + "hook_state"
    with hooks.edit(model, {name: hooks.freeze(pos=[1, 3])}):
        frozen = hooks.record(model, x, [name])[name]
    assert_close(frozen[:, 1], frozen[:, 0])
    assert_close(frozen[:, 3], frozen[:, 2])
    assert (frozen[:, 4] - frozen[:, 3]).abs().max() > 1e-3
    value = torch.randn(2, 1, 6, 8, dtype=torch.float64)
    with hooks.edit(model, hooks.do_state(0, 3, value)):
        record = hooks.record(model, x, [name, MIXER + "hook_y"])
    assert_close(record[name][:, 3:4], value)
    # What follows is a run of the rest from that state.
    mixer = model.blocks[0].mixer
    rest = hooks.record(model, x, [MIXER + "hook_x"])[MIXER + "hook_x"][:, 4:]
    y, _ = mixer._scan(rest, value[:, 0], False)
    assert_close(record[MIXER + "hook_y"][:, 4:], y)


@pytest.mark.edit
def test_an_edit_that_is_no_complex_factor_propagates_too() -> None:
    """Zeroing the imaginary halves is not affine in the complex state: the scan is interrupted
    there.
    """
    model, x = small(n_layers=1), prompts(6)
    name = MIXER + "hook_state"
    keep_real = torch.cat([torch.ones(4), torch.zeros(4)]).double()
    with hooks.edit(model, {name: hooks.scale(keep_real, pos=2)}):
        record = hooks.record(model, x, [name, MIXER + "hook_decay", MIXER + "hook_write"])
    state = record[name]
    assert_close(state[:, 2, :, 4:], torch.zeros(2, 6, 4, dtype=torch.float64))
    after = unpair(record[MIXER + "hook_decay"][:, 3]) * unpair(state[:, 2]) + unpair(
        record[MIXER + "hook_write"][:, 3]
    )
    assert_close(state[:, 3], pair(after))


@pytest.mark.law
def test_later_tokens_do_not_reach_earlier_outputs() -> None:
    model, x = small(), prompts(9)
    changed = x.clone()
    changed[:, 5] += 1
    for run in (model, lambda tokens: recurred(model, tokens)):
        difference = (run(x) - run(changed)).abs().amax((0, 2))
        assert (difference[:5] < 1e-12).all() and (difference[5:] > 1e-6).all()


def test_initialisation_is_s4d_lin() -> None:
    model = models.build("s4d", d_model=500, n_layers=1, d_state=3, dt_min=0.01, dt_max=0.02)
    mixer = model.blocks[0].mixer
    assert_close(-mixer.log_A_real.exp(), torch.full((500, 3), -0.5))
    assert_close(mixer.A_imag[7], torch.tensor([0, math.pi, 2 * math.pi]))
    step = mixer.log_dt.exp()
    assert 0.01 <= step.min() < 0.0105 and 0.0195 < step.max() <= 0.02


@pytest.mark.parametrize(
    "config, reason",
    [
        ({"d_state": 0}, "d_state=0"),
        ({"dt_min": 0.0}, "0 < dt_min"),
        ({"dt_min": 0.2}, "dt_min=0.2, dt_max=0.1"),
    ],
)
def test_impossible_configs_are_refused(config: dict[str, float], reason: str) -> None:
    with pytest.raises(BadArgument, match=reason):
        models.build("s4d", **config)
