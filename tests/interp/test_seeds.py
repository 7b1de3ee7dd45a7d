"""Streams have names: equal names give equal streams, and prompts for one purpose stay there."""

from __future__ import annotations

import itertools

import pytest
import torch

from hooks.errors import BadArgument
from interp import seeds


@pytest.mark.law
@pytest.mark.parametrize("purpose", [*seeds.PROMPTS, "noise"])
def test_the_same_name_gives_the_same_stream(purpose: str) -> None:
    first = torch.randn(100, generator=seeds.generator(purpose, 3, 1))
    torch.manual_seed(123)
    again = torch.randn(100, generator=seeds.generator(purpose, 3, 1))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    for other in (seeds.generator(purpose, 3, 2), seeds.generator(purpose, 4, 1)):
        assert not torch.equal(first, torch.randn(100, generator=other))


@pytest.mark.law
def test_nothing_of_the_global_generator_is_used_or_moved() -> None:
    before = torch.random.get_rng_state()
    torch.randn(10, generator=seeds.generator("evaluate", 0))
    assert torch.equal(before, torch.random.get_rng_state())
    torch.randn(1)
    assert not torch.equal(before, torch.random.get_rng_state())


@pytest.mark.definition
def test_the_number_is_that_of_any_other_machine() -> None:
    # The digests are those of `printf '["train", 0, 3]' | b2sum -l 64`, read as little-endian.
    train = int.from_bytes(bytes.fromhex("6c6603dcd30df158"), "little")
    noise = int.from_bytes(bytes.fromhex("52f88105cf1d6181"), "little")
    assert seeds.number("train", 0, 3) == train % 2**28
    assert seeds.number("noise", 1) == 2**31 + noise % 2**31


@pytest.mark.law
def test_purposes_cannot_meet() -> None:
    ranges = {
        purpose: [seeds.number(purpose, seed, i) for seed in range(20) for i in range(100)]
        for purpose in (*seeds.PROMPTS, "noise")
    }
    for one, other in itertools.pairwise(ranges):
        assert max(ranges[one]) < min(ranges[other])
    assert max(ranges["noise"]) < 2**32
    assert len(set(ranges["probe"])) == 2000


@pytest.mark.law
def test_the_generator_reads_as_many_bits_as_the_numbers_have() -> None:
    """The reason for dividing 32 bits: torch's CPU generator ignores the rest of a seed."""
    low, high = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5 + 2**32)
    assert torch.equal(torch.randn(4, generator=low), torch.randn(4, generator=high))
    one = torch.randn(4, generator=torch.Generator().manual_seed(2**31 + 5))
    assert not torch.equal(one, torch.randn(4, generator=torch.Generator().manual_seed(5)))


@pytest.mark.law
def test_an_index_is_not_part_of_a_seed() -> None:
    assert seeds.number("train", 1, 23) != seeds.number("train", 12, 3)
    assert seeds.number("train", 1) != seeds.number("train", 1, 0)


@pytest.mark.contract
def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(BadArgument, match="seed=-1 does not work"):
        seeds.generator("probe", -1)
