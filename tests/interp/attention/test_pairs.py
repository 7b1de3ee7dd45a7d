"""All pairs of positions: the compiled loops and the tree are both the product of decays, written out."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hooks.errors import BadArgument
from interp.attention import pairs, pairs_compiled
from interp.attention.pairs import all_pairs, tree
from interp.attention.pairs_compiled import LANES, TOGETHER

Operands = tuple[Tensor, Tensor, Tensor]


def operands(batch: int, length: int, width: int, n: int, dtype: torch.dtype = torch.float64) -> Operands:
    generator = torch.Generator().manual_seed(length + 100 * n)
    shape = (batch, length, width, n)
    decay = torch.rand(shape, generator=generator, dtype=dtype)
    gain, row = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    return decay, gain, row


def by_definition(decay: Tensor, gain: Tensor, row: Tensor) -> Tensor:
    """Product by product."""
    batch, length, width, _ = decay.shape
    values = torch.zeros(batch, width, length, length, dtype=decay.dtype)
    for t in range(length):
        for s in range(t + 1):
            values[:, :, t, s] = (row[:, t] * decay[:, s + 1 : t + 1].prod(1) * gain[:, s]).sum(-1)
    return values


def filled(given: Operands) -> Tensor:
    batch, length, width, _ = given[0].shape
    out = torch.zeros(batch, width, length, length, dtype=given[0].dtype)
    all_pairs(*given, out)
    return out


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


SHAPES = [
    (2, length, width, n)
    for length in (1, LANES - 1, LANES, LANES + 1, 3 * LANES + 5)
    for width, n in ((1, 1), (TOGETHER - 1, 3), (TOGETHER + 1, 16), (3, 70))
]


@pytest.mark.definition
@pytest.mark.parametrize("shape", SHAPES)
def test_the_compiled_loops_are_the_definition(shape: tuple[int, int, int, int]) -> None:
    given = operands(*shape)
    before = [part.clone() for part in given]
    assert_close(filled(given), by_definition(*given), rtol=1e-12, atol=1e-13)
    assert all(torch.equal(part, kept) for part, kept in zip(given, before, strict=True))  # nothing is written over


@pytest.mark.definition
@pytest.mark.parametrize("length", [1, 2, 16])
def test_the_tree_is_the_definition(length: int) -> None:
    given = operands(2, length, 5, 3)
    out = torch.zeros(2, 5, length, length, dtype=torch.float64)
    tree(*(part.transpose(1, 2).clone(memory_format=torch.contiguous_format) for part in given), out)
    assert_close(out, by_definition(*given), rtol=1e-12, atol=1e-13)


@pytest.mark.definition
@pytest.mark.parametrize("length", [1, 8, 21])
def test_complex_states_go_through_the_tree(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decay, gain, row = (torch.complex(*operands(2, length, 5, n)[:2]) for n in (3, 4, 5))
    decay, gain, row = (part[..., :3] / 2 for part in (decay, gain, row))
    out = torch.zeros(2, 5, length, length, dtype=torch.float64)
    monkeypatch.setattr(pairs, "TREE_NUMBERS", 2 * 2 * 32 * 32)  # two channels at a time, or more
    all_pairs(decay, gain, row, out)
    assert_close(out, by_definition(decay, gain, row).real, rtol=1e-12, atol=1e-13)


@pytest.mark.law
def test_single_precision_is_the_rounded_double() -> None:
    double = operands(2, 50, 20, 16)
    single = filled(tuple(part.float() for part in double))  # type: ignore[arg-type]
    expected = by_definition(*double)
    assert single.dtype == torch.float32
    assert_close(single.double(), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.law
def test_any_number_of_threads_gives_the_same_bits(threads: None) -> None:
    given = operands(2, 70, 50, 16, torch.float32)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(filled(given))
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.law
@pytest.mark.parametrize("at", [0, 3, LANES, 2 * LANES + 1])
def test_a_decay_of_zero_cuts_and_one_that_is_no_number_stays_where_it_is(at: int) -> None:
    decay, gain, row = operands(1, 3 * LANES, 4, 2)
    spans = torch.ones(3 * LANES, 3 * LANES, dtype=torch.bool).tril()
    spans[:at] = False
    spans[:, at:] = False  # s < at ≤ t
    clean = filled((decay, gain, row))
    decay[:, at] = 0
    cut = filled((decay, gain, row))
    assert bool((cut[..., spans] == 0).all())
    assert torch.equal(cut[..., ~spans], clean[..., ~spans])
    decay[:, at] = math.nan
    broken = filled((decay, gain, row))
    assert bool(broken[..., spans].isnan().all())
    assert_close(broken[..., ~spans], clean[..., ~spans], rtol=1e-12, atol=1e-13)


def test_operands_that_do_not_fit_are_refused() -> None:
    decay, gain, row = operands(1, 9, 4, 2)
    out = torch.zeros(1, 4, 9, 9, dtype=torch.float64)
    with pytest.raises(BadArgument, match=r"gain is torch.float64 \(1, 8, 4, 2\), decay torch.float64 \(1, 9, 4, 2\)"):
        pairs_compiled.all_pairs(decay, gain[:, :8], row, out)
    with pytest.raises(BadArgument, match=r"row is torch.float32"):
        pairs_compiled.all_pairs(decay, gain, row.float(), out)
    with pytest.raises(BadArgument, match=r"out is torch.float64 \(1, 3, 9, 9\)"):
        pairs_compiled.all_pairs(decay, gain, row, out[:, :3])
