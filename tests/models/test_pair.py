"""The complex recurrence over pairs: compiled loops are the definition, forward and backward, zeros and infs too."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hooks.errors import BadArgument
from models.s4 import unpair
from models.scan import constant_pair_states, pair, pair_scan
from models.scan.pair_kernels import STATES, TOGETHER

SHAPES = [
    (2, length, width, n)
    for length, width in ((1, 1), (2, TOGETHER - 1), (13, TOGETHER + 1))
    for n in (1, 5, 32, STATES + 3)
]
EXPANDED = {"all its own": (), "one for the batch": (0,), "one for all tokens": (1,), "one": (0, 1)}


def operands(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Decays of size under 1, writes, and a start."""
    batch, length, width, n = shape
    generator = torch.Generator().manual_seed(sum(shape))
    draw = (torch.randn(batch, length, width, 2 * n, generator=generator, dtype=dtype) for _ in range(2))
    decay, write = draw
    return decay / 3, write, torch.randn(batch, width, 2 * n, generator=generator, dtype=dtype)


def one_by_one(decay: Tensor, write: Tensor, start: Tensor) -> Tensor:
    """In torch's own complex numbers."""
    h, found = unpair(start), []
    for t in range(write.shape[1]):
        h = unpair(decay[:, t]) * h + unpair(write[:, t])
        found.append(torch.cat([h.real, h.imag], dim=-1))
    return torch.stack(found, dim=1)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.definition
@pytest.mark.parametrize("expanded", EXPANDED)
@pytest.mark.parametrize("shape", SHAPES)
def test_states_and_gradients_are_those_of_complex_numbers(shape: tuple[int, int, int, int], expanded: str) -> None:
    decay, write, start = operands(shape)
    for axis in EXPANDED[expanded]:
        decay = decay.narrow(axis, 0, 1).clone()
    leaves = [part.requires_grad_() for part in (decay, write, start)]
    weight = torch.randn(write.shape, generator=torch.Generator().manual_seed(0), dtype=write.dtype)
    found, expected = (f(decay.expand_as(write), write, start) for f in (pair_scan, one_by_one))
    assert_close(found, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for in_torch in (pair.by_definition, pair._in_torch):
            assert_close(in_torch(decay.expand_as(write), write, start), expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad((states * weight).sum(), leaves) for states in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.law
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_a_gradient_that_nobody_asks_for_changes_no_other(wanted: int) -> None:
    given = operands((2, 6, 3, 4))
    leaves = [part.requires_grad_() for part in given]
    whole = torch.autograd.grad(pair_scan(*given).square().sum(), leaves)[wanted]
    alone = [part.detach().requires_grad_(i == wanted) for i, part in enumerate(given)]
    (found,) = torch.autograd.grad(pair_scan(*alone).square().sum(), alone[wanted])
    assert torch.equal(found, whole)


@pytest.mark.definition
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_constant_decay_and_gain_in_one_pass(shape: tuple[int, int, int, int], started: bool) -> None:
    decay, write, start = operands(shape)
    x = write[..., 0]
    weights = [part[0, 0] for part in (decay, write, operands((1, *shape[1:]))[1])]
    expected = one_by_one(
        weights[0].expand_as(write), weights[1] * x[..., None], start if started else torch.zeros_like(start)
    )
    y, states = constant_pair_states(x, *weights, start if started else None)
    assert_close(states, expected, rtol=1e-12, atol=1e-12)
    assert_close(y, (expected * weights[2]).sum(-1), rtol=1e-11, atol=1e-11)


@pytest.mark.law
def test_a_zero_wins_over_inf_as_by_definition() -> None:
    decay, write, start = operands((2, 9, 3, 5))
    write[:, 1, 0] = math.inf
    start[:, 1] = math.inf
    start[:, 2] = 0
    decay[:, 0, 2] = math.inf  # an empty past stays empty
    decay[:, 4, 0] = 0
    decay[:, 0, 1] = 0
    found = pair_scan(decay, write, start)
    for in_torch in (pair.by_definition, pair._in_torch):
        assert_close(found, in_torch(decay, write, start), rtol=1e-12, atol=1e-12, equal_nan=True)
    assert bool(found[:, 4:].isfinite().all()) and bool(found[:, 1, 0].isinf().all())
    decay[:, 6] = math.nan
    assert bool(pair_scan(decay, write, start)[:, 6:].isnan().all())

    empty = torch.zeros_like(write)  # a NaN is not hidden by an empty past
    assert bool(pair_scan(decay, empty, torch.zeros_like(start))[:, 6:].isnan().all())

    ends = [operands((1, 1, 3, 5))[i][0, 0] for i in (0, 1)]
    ends[0][1] = 0
    read = operands((1, 1, 3, 5))[1][0, 0]
    y, states = constant_pair_states(write[..., 0], ends[0], ends[1], read, start)
    expected = pair.by_definition(ends[0].expand_as(decay), ends[1] * write[..., :1], start)
    assert bool(states[:, :, 1].isfinite().all()) and not bool(states.isfinite().all())
    assert_close(states, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert_close(y, (expected * read).sum(-1), rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.law
def test_a_gradient_of_inf_does_not_pass_a_cut() -> None:
    decay, write, start = operands((1, 6, 2, 3))
    decay[:, 3] = 0
    write.requires_grad_()
    weight = torch.ones_like(write)
    weight[:, 4] = math.inf
    (found,) = torch.autograd.grad((pair_scan(decay, write, start) * weight).sum(), write)
    assert bool(found[:, :3].isfinite().all()) and bool(found[:, 4].isinf().all())


@pytest.mark.law
def test_any_number_of_threads_gives_the_same_bits(threads: None) -> None:
    decay, write, start = operands((3, 40, 40, 8), torch.float32)
    write.requires_grad_()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        states = pair_scan(decay, write, start)
        found.append((states.detach(), *torch.autograd.grad(states.square().sum(), write)))
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_operands_that_do_not_fit_are_refused() -> None:
    scan, constant = inspect.unwrap(pair_scan), inspect.unwrap(constant_pair_states)  # below the tests' own checks
    decay, write, start = operands((2, 4, 3, 2))
    with pytest.raises(BadArgument, match="decay has shape"):
        scan(decay[:, :3], write, start)
    with pytest.raises(BadArgument, match="h0 has shape"):
        scan(decay, write, start[:, :2])
    with pytest.raises(BadArgument, match="as many imaginary"):
        scan(decay[..., :3], write[..., :3])
    weights = [part[0, 0] for part in (decay, write, write)]
    with pytest.raises(BadArgument, match="as many imaginary"):
        constant(write[..., 0], *(part[:, :3] for part in weights))
    with pytest.raises(BadArgument, match="gain has shape"):
        constant(write[..., 0], weights[0], weights[1][:2], weights[2])
