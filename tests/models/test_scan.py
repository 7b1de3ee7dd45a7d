"""The scan: compiled paths against the definition, the definition against closed forms, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from models.scan import pages, reference, scan, selective_scan, selective_scan_states, selective_states
from tests.tolerances import assert_matches

INF = math.inf
NAMES = ("x", "delta_decay", "delta_write", "A", "B", "C", "h0")
# (batch, pos, d_inner, d_state): every length of the contract, chunk borders (16), lane borders (32), one of each axis
SHAPES = [
    (1, 1, 1, 1),
    (2, 2, 5, 3),
    (1, 16, 32, 4),
    (2, 17, 33, 16),
    (3, 33, 7, 8),
    (1, 130, 33, 3),
    (66, 5, 3, 2),
    (1, 33, 65, 32),
]


def operands(
    batch: int, pos: int, d_inner: int, d_state: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> dict[str, Tensor]:
    """Operands as a trained Mamba has them: Δ around 0.1 to 1, two different ones; decays between 0 and 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    values = {
        "x": normal(batch, pos, d_inner),
        "delta_decay": torch.nn.functional.softplus(normal(batch, pos, d_inner) - 1),
        "delta_write": torch.nn.functional.softplus(normal(batch, pos, d_inner) - 1),
        "A": -torch.exp(normal(d_inner, d_state)),
        "B": normal(batch, pos, d_state),
        "C": normal(batch, pos, d_state),
        "h0": normal(batch, d_inner, d_state),
    }
    return {name: value.requires_grad_() for name, value in values.items()}


def gradients(outputs: tuple[Tensor, ...], inputs: list[Tensor], seed: int = 1) -> list[Tensor]:
    """Gradients of the inputs for one fixed random gradient of each output."""
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    return list(torch.autograd.grad(outputs, inputs, grads))


def compare(fast: Callable[..., object], slow: Callable[..., object], given: dict[str, Tensor]) -> None:
    """Values and all gradients of ``fast`` in its dtype against ``slow`` in float64."""
    wide = {name: value.detach().double().requires_grad_() for name, value in given.items()}
    actual, expected = fast(*given.values()), slow(*wide.values())
    actual = actual if isinstance(actual, tuple) else (actual,)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for k, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert_matches(one, other, f"output {k}")
    found = gradients(actual, list(given.values()))
    wanted = gradients(expected, list(wide.values()))
    for name, one, other in zip(given, found, wanted, strict=True):
        assert_matches(one, other, f"gradient of {name}")


# --- the definition against closed forms ------------------------------------------------------


@pytest.mark.definition
def test_definition_is_the_recurrence_written_out_in_numpy() -> None:
    given = {name: value.detach().numpy() for name, value in operands(2, 7, 3, 4).items()}
    x, delta_decay, delta_write, A, B, C, h0 = given.values()
    h, y = h0.copy(), np.zeros_like(x)
    for b, t, d in np.ndindex(*x.shape):
        for n in range(A.shape[1]):
            written = delta_write[b, t, d] * B[b, t, n] * x[b, t, d]
            h[b, d, n] = math.exp(delta_decay[b, t, d] * A[d, n]) * h[b, d, n] + written
            y[b, t, d] += C[b, t, n] * h[b, d, n]
    got_y, got_last = reference.selective_scan(*(torch.from_numpy(value) for value in given.values()))
    assert_matches(got_y, torch.from_numpy(y))
    assert_matches(got_last, torch.from_numpy(h))


@pytest.mark.definition
@pytest.mark.parametrize("run", [scan, reference.scan])
def test_constant_decay_gives_a_geometric_sum(run: Callable[..., Tensor]) -> None:
    t = torch.arange(1, 34, dtype=torch.float64)
    decay, write = torch.full((1, 33), 0.75, dtype=torch.float64), torch.full((1, 33), 2.0, dtype=torch.float64)
    assert_matches(run(decay, write), (2 * (1 - 0.75**t) / 0.25)[None])
    assert_matches(run(0 * decay + 1, write), 2 * t[None])


@pytest.mark.definition
def test_complex_decay_turns_the_state() -> None:
    decay, write = torch.full((1, 8, 1), 1j), torch.zeros(1, 8, 1, dtype=torch.complex64)
    write[:, 0] = 1
    assert_close(scan(decay, write)[0, :, 0], torch.tensor([1, 1j, -1, -1j] * 2, dtype=torch.complex64))


@pytest.mark.definition
def test_definition_has_both_derivatives() -> None:
    given = list(operands(1, 3, 2, 2).values())
    assert torch.autograd.gradcheck(reference.selective_scan, given)
    assert torch.autograd.gradgradcheck(reference.selective_scan, given, fast_mode=True)
    wave = [torch.randn(1, 3, 2, dtype=torch.complex128, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(reference.scan, wave)
    assert torch.autograd.gradgradcheck(reference.scan, wave, fast_mode=True)


# --- the compiled paths against the definition ------------------------------------------------


@pytest.mark.definition
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_selective_scan_is_the_definition(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    given = operands(*shape, dtype=dtype)
    compare(selective_scan, reference.selective_scan, given)
    del given["h0"]
    compare(selective_scan, reference.selective_scan, given)


@pytest.mark.definition
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_selective_states_are_the_definition(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    given = operands(*shape, dtype=dtype)
    del given["C"]
    compare(selective_states, reference.selective_states, given)
    del given["h0"]
    compare(selective_states, reference.selective_states, given)


@pytest.mark.definition
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_read_out_and_states_in_one_pass_are_the_definition(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    given = {name: value.detach() for name, value in operands(*shape, dtype=dtype).items()}
    y, states = selective_scan_states(*given.values())
    wide = reference.selective_scan_states(*(value.double() for value in given.values()))
    assert_matches(y, wide[0], "y")
    assert_matches(states, wide[1], "states")


@pytest.mark.definition
@pytest.mark.parametrize(
    "shape, dtype, streamed",
    [
        ((1, 300, 1000, 16), torch.float32, True),  # a last tile of 8 channels
        ((2, 260, 520, 8), torch.float64, True),
        ((1, 300, 1200, 12), torch.float32, False),  # 48 bytes are no whole number of vectors
        ((1, 150, 1000, 32), torch.float32, False),  # two tiles of states
        ((1, 20, 1000, 16), torch.float32, False),  # small
    ],
    ids=str,
)
def test_states_that_go_past_the_caches_are_the_same(
    shape: tuple[int, int, int, int], dtype: torch.dtype, streamed: bool
) -> None:
    """Only large results do; all of them arrive, also at the borders of tiles and threads."""
    given = {name: value.detach() for name, value in operands(*shape, dtype=dtype).items()}
    y, states = selective_scan_states(*given.values())
    assert (pages.worth_streaming(states, shape[3]) and shape[3] <= 16) == streamed
    expected_y, expected = reference.selective_scan_states(*(value.double() for value in given.values()))
    assert_matches(states, expected, "states")
    assert_matches(y, expected_y, "y")
    del given["C"]
    torch.testing.assert_close(selective_states(*given.values()), states, rtol=0, atol=0)


@pytest.mark.definition
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 2, 3), (3, 33, 5, 4), (1, 130, 1), (1, 5, 70, 2, 3)], ids=str)
def test_scan_is_the_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=dtype)

    decay, write, h0 = torch.sigmoid(normal(*shape)), normal(*shape), normal(shape[0], *shape[2:])
    given = {"decay": decay, "write": write, "h0": h0}
    given = {name: value.requires_grad_() for name, value in given.items()}
    compare(scan, reference.scan, given)
    del given["h0"]
    compare(scan, reference.scan, given)


@pytest.mark.definition
@settings(max_examples=12, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 20)),
    scale=st.floats(0, 30),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_any_size_of_delta(shape: tuple[int, int, int, int], scale: float, seed: int) -> None:
    given = operands(*shape, seed=seed)
    given["delta_decay"] = (given["delta_decay"] * scale).detach().requires_grad_()
    compare(selective_scan, reference.selective_scan, given)


@pytest.mark.law
@settings(max_examples=10, deadline=None)
@given(a=st.floats(-3, 3), b=st.floats(-3, 3), seed=st.integers(0, 2**16))
def test_state_is_linear_in_the_write(a: float, b: float, seed: int) -> None:
    one, other = operands(2, 9, 5, 3, seed=seed), operands(2, 9, 5, 3, seed=seed + 1)
    decay = torch.exp(one["delta_decay"][..., None] * one["A"])
    writes = [(v["delta_write"] * v["x"])[..., None] * v["B"][:, :, None] for v in (one, other)]
    both = scan(decay, a * writes[0] + b * writes[1])
    assert_matches(both, a * scan(decay, writes[0]) + b * scan(decay, writes[1]))


@pytest.mark.law
@pytest.mark.parametrize("cuts", [(1,), (16,), (5, 20)], ids=str)
def test_pieces_with_a_carried_state_are_the_whole(cuts: tuple[int, ...]) -> None:
    given = operands(2, 33, 34, 4)

    def in_pieces(x: Tensor, dd: Tensor, dw: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> object:
        parts = []
        for start, end in zip((0, *cuts), (*cuts, 33), strict=True):
            part = slice(start, end)
            y, h = selective_scan(x[:, part], dd[:, part], dw[:, part], A, B[:, part], C[:, part], h)
            parts.append(y)
        return torch.cat(parts, 1), h

    compare(in_pieces, reference.selective_scan, given)


@pytest.mark.definition
def test_memory_that_is_not_contiguous_and_one_delta_in_both_roles() -> None:
    given = operands(3, 20, 6, 5)
    x = given["x"].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    delta = given["delta_decay"]
    A = given["A"][:1].detach().requires_grad_()
    B = given["B"].detach()[..., :2].requires_grad_()
    h0 = given["h0"].detach()[0, 0, 0].requires_grad_()

    def run(function: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        # B and C: two slices of one tensor, with a stride; A, h0: expanded
        wide = torch.cat([B, B, B], -1)
        outputs = function(x, delta, delta, A.expand(6, 5), wide[..., :5], wide[..., 1:], h0.expand(3, 6, 5))
        # the gradient that arrives is expanded as well, as that of a plain sum is
        return [*outputs, *torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), [x, delta, A, B, h0])]

    for actual, expected in zip(run(selective_scan), run(reference.selective_scan), strict=True):
        assert_matches(actual, expected)


@pytest.mark.definition
def test_second_derivatives() -> None:
    given = list(operands(1, 3, 2, 2).values())
    assert torch.autograd.gradcheck(selective_scan, given)
    assert torch.autograd.gradgradcheck(selective_scan, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(selective_states, [*given[:5], given[6]], fast_mode=True)
    decay = torch.rand(1, 4, 3, dtype=torch.float64, requires_grad=True)
    write = torch.randn_like(decay).requires_grad_()
    assert torch.autograd.gradgradcheck(scan, [decay, write], fast_mode=True)


@pytest.mark.definition
def test_second_derivative_where_delta_has_both_roles() -> None:
    given = operands(1, 4, 2, 3)
    delta, rest = given["delta_decay"], [given[name].detach() for name in ("A", "B", "C")]

    def curvature(function: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
        y, _ = function(given["x"], delta, delta, *rest)
        (slope,) = torch.autograd.grad(y.square().sum(), delta, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), delta)[0]

    assert curvature(selective_scan).abs().max() > 1e-3
    assert_matches(curvature(selective_scan), curvature(reference.selective_scan))


@pytest.mark.definition
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    given = {name: value.detach() for name, value in operands(2, 40, 6, 4).items()}
    low = {name: value.to(dtype) for name, value in given.items()}
    low["A"] = low["A"].float()  # as autocast leaves a parameter
    low["x"].requires_grad_()
    y, h_last = selective_scan(*low.values())
    exact, last = reference.selective_scan(*(value.double() for value in low.values()))
    assert (y.dtype, h_last.dtype) == (dtype, torch.float32)
    assert_matches(y, exact)
    assert_matches(h_last, last)
    assert torch.autograd.grad(y.sum(), low["x"])[0].dtype == dtype


# --- zeros, overflow, NaN ---------------------------------------------------------------------


def cut_after_overflow(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """decay, write, h0 (1, 7, 40) whose state overflows at position 1 and is cut at position 3."""
    decay, write = torch.full((1, 7, 40), 0.5, dtype=dtype), torch.ones(1, 7, 40, dtype=dtype)
    write[:, 1], decay[:, 3], write[:, 3] = INF, 0, 5
    return decay.requires_grad_(), write.requires_grad_(), torch.ones(1, 40, dtype=dtype).requires_grad_()


@pytest.mark.definition
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("run", [scan, reference.scan])
def test_zero_decay_cuts_the_past(run: Callable[..., Tensor], dtype: torch.dtype) -> None:
    decay, write, h0 = cut_after_overflow(dtype)
    states = run(decay, write, h0)
    assert_close(states[0, :, 0], torch.tensor([1.5, INF, INF, 5, 3.5, 2.75, 2.375], dtype=dtype))
    g_decay, g_write, g_h0 = torch.autograd.grad(states[:, 3:].sum(), [decay, write, h0])
    assert_close(g_write[0, :, 0], torch.tensor([0, 0, 0, 1.875, 1.75, 1.5, 1], dtype=dtype))
    # at the cut itself the derivative λ h_{t−1} does not exist, since h_{t−1} is inf: reported as 0
    assert_close(g_decay[0, :, 0], torch.tensor([0, 0, 0, 0, 8.75, 5.25, 2.75], dtype=dtype))
    assert not g_h0.any()


@pytest.mark.definition
@pytest.mark.parametrize("run", [scan, reference.scan])
def test_derivative_at_a_zero_decay_is_still_the_past(run: Callable[..., Tensor]) -> None:
    decay = torch.zeros(1, 2, 1, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(run(decay, torch.full_like(decay, 3.0)).sum(), decay)
    assert_close(slope.flatten(), torch.tensor([0.0, 3.0], dtype=torch.float64))


@pytest.mark.definition
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("run", [selective_scan, reference.selective_scan])
def test_decay_that_underflows_cuts_an_infinite_state(
    run: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype
) -> None:
    """Δ steered far negative at positions 2 and 3 makes the decay inf, Δ A = −2000 at position 5 makes it 0."""
    given = {name: value.detach() for name, value in operands(1, 20, 33, 4, dtype).items()}
    given["A"] = torch.full_like(given["A"], -2.0)
    given["delta_decay"][:, 2:4] = -1000.0
    given["delta_decay"][:, 5] = 1000.0
    given = {name: value.requires_grad_() for name, value in given.items()}
    y, h_last = run(*given.values())
    fresh = [given[name] if name == "A" else given[name][:, 5:] for name in NAMES[:-1]]
    y_fresh, last_fresh = run(*fresh)
    assert_matches(y[:, 5:], y_fresh)
    assert_matches(h_last, last_fresh)
    grads = torch.autograd.grad(y[:, 5:].sum() + h_last.sum(), list(given.values()), retain_graph=True)
    expected = torch.autograd.grad(y_fresh.sum() + last_fresh.sum(), fresh)
    for name, grad, wanted in zip(NAMES, grads, [*expected, None], strict=True):
        if name == "A":
            assert_matches(grad, wanted, name)
            continue
        if wanted is not None:
            assert_matches(grad[:, 5:], wanted, name)
        assert not (grad[:, :5] if wanted is not None else grad).any(), f"{name} before the cut"


@pytest.mark.definition
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("delta", [-100.0, -1e4, -1e30, -INF], ids=str)
def test_negative_delta_overflows_to_inf(delta: float, dtype: torch.dtype) -> None:
    """A range reduction that wraps would return a finite state here."""
    ones = torch.ones(1, 3, 1, dtype=dtype)
    steered = torch.tensor([1.0, delta, 1.0], dtype=dtype)[None, :, None]
    A = torch.full((1, 1), -8.0, dtype=dtype)
    for h0 in (None, torch.zeros(1, 1, 1, dtype=dtype)):
        states = selective_states(ones, steered, ones, A, ones, h0)
        assert_close(states.flatten(), torch.tensor([1.0, INF, INF], dtype=dtype))
        # an empty past stays empty, however large the factor
        states = selective_states(ones, steered.roll(-1, 1), ones, A, ones, h0)
        assert_close(states[0, 0].flatten(), torch.ones(1, dtype=dtype))
        assert torch.isfinite(states).all()


@pytest.mark.definition
def test_nan_is_not_hidden() -> None:
    for name in NAMES:
        given = {key: value.detach().clone() for key, value in operands(1, 5, 3, 2).items()}
        given[name].view(-1)[0] = math.nan
        y, h_last = selective_scan(*given.values())
        expected, expected_last = reference.selective_scan(*given.values())
        assert torch.isnan(y).any(), name
        assert torch.equal(torch.isnan(y), torch.isnan(expected)), name
        assert torch.equal(torch.isnan(h_last), torch.isnan(expected_last)), name


@pytest.mark.definition
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_compiled_exponential(dtype: torch.dtype) -> None:
    """As a decay: one step from h0 = 1 with nothing written, over the whole range of the exponent."""
    largest = math.log(torch.finfo(dtype).max)
    exponent = torch.linspace(-1.1 * largest, 1.1 * largest, 40_001, dtype=dtype)
    exponent = torch.cat([exponent, torch.tensor([0.0, -0.0, INF, -INF, largest], dtype=dtype)])
    row = exponent[None, None]
    ones, nothing = torch.ones_like(row), torch.zeros_like(row)
    wide = torch.ones(1, row.shape[2], 1, dtype=dtype)
    states = selective_states(nothing, row, ones, wide[0], torch.ones(1, 1, 1, dtype=dtype), wide).flatten()
    expected = torch.exp(exponent.double()).to(dtype)
    # what is below about twice the smallest normal number may be flushed to zero
    small = expected < 2 * torch.finfo(dtype).tiny
    assert_close(states[~small], expected[~small], rtol=3 * torch.finfo(dtype).eps, atol=0.0)
    assert (states[small] <= expected[small] * (1 + 1e-6)).all()
    assert expected[small].max() > 0
    assert not states[exponent == -INF].any()
    assert states[exponent == 0].eq(1).all()
