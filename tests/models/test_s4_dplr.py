"""S4: both paths of the model against dense matrices, state in and out, edits of the transition and of the state, the
three idioms, gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from nnsight import NNsight
from torch import Tensor
from torch.testing import assert_close

import hooks
import models
from hooks.errors import BadArgument
from hooks.vocabulary import sites
from models import s4_dplr
from models.s4 import pair, unpair
from models.s4_dplr import transition_scan
from models.scan import dplr
from tests.models.dense_s4 import by_powers, dense, prompts, small
from tests.tolerances import assert_matches

pytestmark = pytest.mark.definition

MIXER = "blocks.0.mixer."
STATE = MIXER + "hook_state"
LONG = dplr.CAUCHY + 2
"""A length whose response is computed by the Cauchy kernel."""


def recurred(model: models.Stack, x: Tensor) -> Tensor:
    with hooks.expose(model):
        return model(x)


@pytest.mark.parametrize("length", [1, 2, 7, 33])
def test_both_paths_are_the_definition(length: int) -> None:
    model, x = small(n_layers=1), prompts(length)
    mixer, names = model.blocks[0].mixer, [MIXER + kind for kind in ("hook_x", "hook_y", "hook_skip")]
    fast = hooks.record(model, x, names)
    with hooks.expose(model):
        slow = hooks.record(model, x, names)
    taps, scan_input = by_powers(mixer, length), fast[MIXER + "hook_x"]
    wanted = torch.stack(
        [sum(taps[:, lag] * scan_input[:, t - lag] for lag in range(t + 1)) for t in range(length)], dim=1
    )
    for record in (fast, slow):
        assert_matches(record[MIXER + "hook_y"], wanted)
        assert_matches(record[MIXER + "hook_skip"], mixer.D.detach() * scan_input)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("length", [1, 2, 33, LONG, LONG + 1, 300])
def test_paths_agree(length: int, dtype: torch.dtype) -> None:
    model, x = small(n_layers=1, dtype=dtype), prompts(length, dtype=dtype)
    assert_matches(model(x), recurred(model, x))
    assert model(x).dtype == dtype


def test_the_kernel_is_chosen_by_length(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = small(n_layers=1), []
    for name in ("cauchy", "response"):
        original = getattr(dplr, name)
        monkeypatch.setattr(dplr, name, lambda *a, n=name, f=original: (asked.append((n, a[-1])), f(*a))[1])
    for length in (1, dplr.CAUCHY, dplr.CAUCHY + 1):
        model(prompts(length))
    recurred(model, prompts(5))
    assert asked == [("response", 1), ("response", dplr.CAUCHY), ("cauchy", dplr.CAUCHY + 1)]


@pytest.mark.parametrize("bound", [4, dplr.CAUCHY])
def test_gradients_of_both_paths_agree(bound: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By either kernel, in every weight, the input and the initial state."""
    monkeypatch.setattr(dplr, "CAUCHY", bound)
    model, x = small(), prompts(10)
    weight, start = torch.randn(2, 10, 2, dtype=torch.float64), torch.randn(2, 2, 6, 8, dtype=torch.float64)

    def gradients(run: Callable[..., Tensor]) -> list[Tensor]:
        inputs, h0 = x.clone().requires_grad_(), start.clone().requires_grad_()
        out, last = run(inputs, state=[models.LayerState(None, h) for h in h0], return_state=True)
        loss = (out * weight).sum() + sum(state.h.sin().sum() for state in last)
        return list(torch.autograd.grad(loss, [inputs, h0, *model.parameters()]))

    fast = gradients(model)
    with hooks.expose(model):
        slow = gradients(model)
    for mine, theirs in zip(fast, slow, strict=True):
        assert_matches(mine, theirs)
        assert mine.abs().max() > 0


def test_the_scan_and_its_first_and_second_derivatives() -> None:
    factors = torch.randn(1, 3, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    write = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    h0 = torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(transition_scan, (factors, write, h0), fast_mode=True)
    assert torch.autograd.gradgradcheck(transition_scan, (factors, write, h0), fast_mode=True)


@pytest.mark.law
def test_a_zero_transition_cuts_an_infinite_past() -> None:
    factors, write = torch.zeros(1, 4, 1, 3, 2), torch.ones(1, 4, 1, 2)
    factors[..., 0, 0] = 1
    factors[..., 1:, :] = 0.5
    write[:, 0] = torch.inf
    assert not torch.isfinite(transition_scan(factors, write)[:, 3]).any()
    factors[:, 2] = 0
    # Then h_3 = (1 + ½) times each of the ones, and the ones written.
    assert_close(transition_scan(factors, write)[0, 2:, 0], torch.tensor([[1.0, 1.0], [2.5, 2.5]]))


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
    assert_matches(torch.cat(outs, 1), whole)
    first, middle = run(x[:, :4], None)
    second, end = run(x[:, 4:], middle)
    assert_matches(torch.cat([first, second], 1), whole)
    for got in (state, end):
        for mine, theirs in zip(got, last, strict=True):
            assert mine.conv is None
            assert_matches(mine.h, theirs.h)
    assert (second - run(x[:, 4:], None)[0]).abs().max() > 1e-3
    token, _ = model.step(x[:, 4], middle)
    assert_matches(token, whole[:, 4])


@pytest.mark.law
def test_a_long_prompt_in_unequal_chunks() -> None:
    model, x = small(n_layers=1), prompts(LONG + 40)
    whole, last = model(x, return_state=True)
    first, middle = model(x[:, :37], return_state=True)
    second, end = model(x[:, 37:], state=middle, return_state=True)
    assert_matches(torch.cat([first, second], 1), whole)
    assert_matches(end[0].h, last[0].h)


def test_a_state_of_another_shape_is_refused() -> None:
    with pytest.raises(BadArgument, match=r"state's h has shape \(2, 6, 4\).*\(2, 6, 8\)"):
        small(n_layers=1)(prompts(3), state=[models.LayerState(None, torch.zeros(2, 6, 4))])


@pytest.mark.law
def test_later_tokens_do_not_reach_earlier_outputs() -> None:
    model, x = small(), prompts(9)
    changed = x.clone()
    changed[:, 5] += 1
    for run in (model, lambda tokens: recurred(model, tokens)):
        difference = (run(x) - run(changed)).abs().amax((0, 2))
        assert (difference[:5] < 1e-12).all() and (difference[5:] > 1e-6).all()


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
    kinds = [name.removeprefix(MIXER) for name in fired if name.startswith(MIXER)]
    assert kinds == [
        *("hook_x", "hook_delta", "hook_delta_decay", "hook_delta_write", "hook_state_init"),
        *("hook_transition", "hook_write", "hook_state", "hook_y", "hook_skip", "hook_out"),
    ]
    shapes = {row.name: row.shape for row in listed}
    assert shapes[MIXER + "hook_transition"] == (None, None, 6, 3, 8)
    assert shapes[STATE] == (None, None, 6, 8)
    assert "hook_transition" in str(hooks.show(model))


@pytest.mark.hygiene
def test_a_hook_that_writes_in_place_is_a_hook_that_returns() -> None:
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
def test_the_three_idioms_agree_at_every_site() -> None:
    """Bit for bit (``hook_state`` as a read-out), and each of them acts."""
    model, x = small(n_layers=1), prompts(6)
    start = [models.LayerState(None, torch.randn(2, 6, 8, dtype=torch.float64))]
    clean, outputs = model(x, state=start), {}

    def change(value: Tensor, hook: object = None) -> Tensor:
        return value * 2 + 0.1

    for name in model.hook_dict:
        with hooks.edit(model, {name: change}, readout_only=name == STATE):
            outputs[name] = model(x, state=start)
        lens = model.run_with_hooks(x, state=start, fwd_hooks=[(name, change)])
        assert_close(lens, outputs[name], rtol=0, atol=0)
        assert not torch.allclose(lens, clean), name
    wrapped = NNsight(model)
    for name, expected in outputs.items():
        point = wrapped
        for part in name.split("."):
            point = point[int(part)] if part.isdigit() else getattr(point, part)
        with wrapped.trace(x, state=start):
            value = point.output.save()
            point.output = change(value)
            output = wrapped.output.save()
        assert_close(output, expected, rtol=0, atol=0)
    assert_close(model(x, state=start), clean, rtol=0, atol=0)


def advanced(record: hooks.Record, state: Tensor, t: int) -> Tensor:
    """h_t that follows from h_{t−1} = ``state`` by the recorded factors and write, one real matrix a channel."""
    a, u, q = record[MIXER + "hook_transition"][:, t].unbind(-2)
    real, imag = (torch.diag_embed(part) for part in a.chunk(2, -1))
    matrix = torch.cat([torch.cat([real, -imag], -1), torch.cat([imag, real], -1)], -2) + u[..., None] * q[..., None, :]
    return (matrix @ state[..., None])[..., 0] + record[MIXER + "hook_write"][:, t]


VALUE = torch.randn(2, 2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
EDITS: dict[str, tuple[Callable[[], object], Callable[[Tensor, Tensor, int], Tensor]]] = {
    "set_to": (lambda: hooks.set_to(VALUE, pos=[2, 5]), lambda h, before, rank: VALUE[:, rank]),
    "zero": (lambda: hooks.zero(pos=[2, 5]), lambda h, before, rank: 0 * h),
    "scale": (lambda: hooks.scale(0.5, pos=[2, 5]), lambda h, before, rank: h / 2),
    "add": (lambda: hooks.add(0.3, pos=[2, 5]), lambda h, before, rank: h + 0.3),
    "freeze": (lambda: hooks.freeze(pos=[2, 5]), lambda h, before, rank: before),
    "mean": (lambda: hooks.mean("batch", pos=[2, 5]), lambda h, before, rank: h.mean(0, True).expand_as(h)),
}


@pytest.mark.edit
@pytest.mark.parametrize("name", EDITS)
def test_an_edit_of_the_state_propagates(name: str) -> None:
    model, x = small(n_layers=1), prompts(8)
    make, new = EDITS[name]
    kinds = ["hook_transition", "hook_write", "hook_state", "hook_y"]
    clean = hooks.record(model, x, [MIXER + kind for kind in kinds])
    state, states = torch.zeros(2, 6, 8, dtype=torch.float64), []
    for t in range(8):
        after = advanced(clean, state, t)
        state = new(after, state, [2, 5].index(t)) if t in (2, 5) else after
        states.append(state)
    with hooks.edit(model, {STATE: make()}) as edited:
        got, (last,) = hooks.record(model, x, [MIXER + kind for kind in kinds]), model(x, return_state=True)[1]
    assert edited.fired == {STATE: 2}
    assert_matches(got[STATE], torch.stack(states, 1))
    assert_matches(last.h, states[-1])
    change = (got[MIXER + "hook_y"] - clean[MIXER + "hook_y"]).abs().amax((0, 2))
    assert (change[:2] < 1e-12).all() and (change[2:] > 1e-6).all()
    C = torch.view_as_complex(model.blocks[0].mixer.C.detach())
    assert_matches(got[MIXER + "hook_y"], 2 * (C * unpair(got[STATE])).sum(-1).real)


@pytest.mark.edit
def test_do_state_forgets_what_came_before_and_carries_gradients() -> None:
    model, x = small(), prompts(8)
    value = VALUE[:, :1].clone().requires_grad_()
    with hooks.edit(model, hooks.do_state(0, 3, value)):
        record = hooks.record(model, x, [STATE, MIXER + "hook_y"])
        model(x)[:, -1].sum().backward()
    assert_close(record[STATE][:, 3:4], value.detach(), rtol=0, atol=0)
    assert value.grad is not None and value.grad.abs().min() > 0
    scan_input = hooks.record(model, x, [MIXER + "hook_x"])[MIXER + "hook_x"]
    y, _ = model.blocks[0].mixer._scan(scan_input[:, 4:], value.detach()[:, 0], False)
    assert_matches(record[MIXER + "hook_y"][:, 4:], y.detach())


@pytest.mark.edit
def test_an_edited_transition_acts() -> None:
    """Zeros cut the past, a = 1 with u = 0 keeps it, and a column alone moves what the row reads."""
    model, x = small(n_layers=1), prompts(5)
    clean = hooks.record(model, x, [STATE, MIXER + "hook_write"])
    state, write = clean[STATE], clean[MIXER + "hook_write"]

    def edited(factors: Tensor) -> Tensor:
        with hooks.edit(model, {MIXER + "hook_transition": hooks.set_to(factors, pos=2)}):
            return hooks.record(model, x, [STATE])[STATE]

    factors = torch.zeros(3, 8, dtype=torch.float64)
    assert_matches(edited(factors)[:, 2], write[:, 2])
    factors[0, :4] = 1
    assert_matches(edited(factors)[:, 2], state[:, 1] + write[:, 2])
    factors[0], factors[1, 3], factors[2, 6] = 0, 1, 2
    moved = torch.zeros_like(write[:, 2])
    moved[..., 3] = 2 * state[:, 1, :, 6]
    assert_matches(edited(factors)[:, 2], moved + write[:, 2])


@pytest.mark.edit
@pytest.mark.parametrize("kind", ["hook_delta", "hook_delta_decay", "hook_delta_write"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_an_edited_delta_acts_in_its_role(kind: str, everywhere: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against dense matrices, at one position (the recurrence) and at all of them (either kernel)."""
    model, x, at = small(n_layers=1), prompts(6), range(6) if everywhere else [2]
    mixer, names = model.blocks[0].mixer, [MIXER + "hook_x", MIXER + "hook_y"]
    scan_input = hooks.record(model, x, names)[MIXER + "hook_x"].numpy()
    (A, B, C), (A3, B3, _) = dense(mixer), dense(mixer, 3.0)
    h, wanted = np.zeros((2, *B.shape), complex), []
    for t in range(6):
        forgets, writes = (t in at and role in kind for role in ("decay", "write"))
        both_roles = t in at and kind == "hook_delta"
        h = ((A3 if forgets or both_roles else A) @ h[..., None])[..., 0]
        h = h + (B3 if writes or both_roles else B) * scan_input[:, t, :, None]
        wanted.append((C * h).sum(-1).real)
    for bound in (dplr.CAUCHY, 1):
        monkeypatch.setattr(dplr, "CAUCHY", bound)
        with hooks.edit(model, {MIXER + kind: hooks.scale(3.0, pos=None if everywhere else 2)}):
            got = hooks.record(model, x, names)[MIXER + "hook_y"]
        assert_matches(got, torch.from_numpy(np.stack(wanted, 1)))


@pytest.mark.edit
def test_gradient_of_delta_is_apart_for_each_token() -> None:
    model, x = small(n_layers=1), prompts(5)
    record = hooks.record(model, x, [MIXER + "hook_delta"], grad=True)
    (gradient,) = torch.autograd.grad(record.output[:, -1].sum(), record[MIXER + "hook_delta"])
    for t in range(5):
        bump = torch.zeros(2, 5, 6, dtype=torch.float64)
        bump[1, t, 3] = 1e-6
        ends = []
        for sign in (1, -1):
            with hooks.edit(model, {MIXER + "hook_delta": hooks.add(sign * bump)}), torch.no_grad():
                ends.append(model(x)[:, -1].sum())
        assert_close(gradient[1, t, 3], (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-8)
    assert gradient.abs().max() > 1e-4


@pytest.mark.hygiene
def test_the_recurrence_runs_only_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, calls = small(n_layers=1), prompts(4), [0]

    def counted(*args: Tensor) -> Tensor:
        calls[0] += 1
        return transition_scan(*args)

    monkeypatch.setattr(s4_dplr, "transition_scan", counted)
    model(x)
    hooks.record(model, x, ["*.hook_y", "*.hook_delta"])
    assert calls == [0]
    for kind in ("hook_transition", "hook_write", "hook_state"):
        hooks.record(model, x, [MIXER + kind])
    assert calls == [3]


@pytest.mark.hygiene
def test_a_checkpoint_comes_back_the_same(tmp_path: Path) -> None:
    model, x = small(dtype=torch.float32), prompts(7, dtype=torch.float32)
    models.save(model, tmp_path / "s4.safetensors", {"task": "none"})
    again = models.load(tmp_path / "s4.safetensors")
    assert isinstance(again, models.S4) and again.cfg == model.cfg
    assert models.digest(again) == models.digest(model)
    assert_close(again(x), model(x), rtol=0, atol=0)


def test_bfloat16_autocast_keeps_states_and_kernels_in_single_precision() -> None:
    model, x = small(n_layers=1, dtype=torch.float32), prompts(12, dtype=torch.float32)
    mixer, scan_input = model.blocks[0].mixer, torch.randn(2, 12, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, last = mixer._scan(scan_input, None, True)
        assert torch.isfinite(model(x)).all()
    wanted_y, wanted_last = mixer._scan(scan_input, None, True)
    assert_close((y, last), (wanted_y, wanted_last), rtol=0, atol=0)
    assert last.dtype == torch.float32 and pair(unpair(last)).equal(last)


@pytest.mark.parametrize("config, reason", [({"d_state": 0}, "d_state=0"), ({"dt_min": 0.2}, "dt_min=0.2, dt_max=0.1")])
def test_impossible_configs_are_refused(config: dict[str, float], reason: str) -> None:
    with pytest.raises(BadArgument, match=reason):
        models.build("s4", **config)
