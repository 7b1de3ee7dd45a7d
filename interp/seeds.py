"""Random streams by name: the same purpose, seed and index give the same stream on every machine.

A stream is named, never taken from the global seed, so that an added draw in one place changes no
number in another, and so that prompts that measure a model cannot be those that trained it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor

from hooks.errors import BadArgument, told

PROMPTS = ("train", "validation", "evaluate", "reference", "probe", "ablate")
"""Purposes that draw prompts. Append only: the place in this tuple is part of the stream's seed."""

_OWN_BITS = 28
_OTHER_BITS = 31


def number(purpose: str, seed: int, *index: int) -> int:
    """A whole number in [0, 2**32) that depends on all the arguments and on nothing else.

    torch's CPU generator reads only the lower 32 bits of its seed, too few for a hash alone to
    rule out that two streams are one. So the range is divided first: each of ``PROMPTS`` has 2**28
    numbers to itself, and any other purpose (``"noise"``, ``"corrupt"``, …) shares the upper half.
    A stream of evaluation prompts can therefore never be a stream of training prompts, whatever
    the seeds. Within one purpose two streams meet with probability 2**-28: two steps of a long
    training may see the same batch, which does no harm.
    """
    if not 0 <= seed < 1 << 63:
        bound = "at least 0" if seed < 0 else f"from 0 to {(1 << 63) - 1}"
        raise BadArgument(f"seed={told(seed)} does not work; give a whole number, {bound}")
    named = json.dumps([purpose, int(seed), *(int(i) for i in index)])
    digest = int.from_bytes(hashlib.blake2b(named.encode(), digest_size=8).digest(), "little")
    if purpose in PROMPTS:
        return (PROMPTS.index(purpose) << _OWN_BITS) | (digest % (1 << _OWN_BITS))
    return (1 << _OTHER_BITS) | (digest % (1 << _OTHER_BITS))


def generator(purpose: str, seed: int, *index: int) -> torch.Generator:
    """A fresh CPU generator at the start of the stream that ``number`` names.

    It is on the CPU for every device, so that a GPU run sees the same prompts; the normal numbers
    drawn from it agree between machines to fp32 rounding (their logarithm and cosine may differ).
    ``generator("train", seed, step)`` makes step ``step`` repeatable without replaying the others.
    """
    return torch.Generator().manual_seed(number(purpose, seed, *index))


def normal(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """N(0, 1) numbers on the generator's device: neither torch's default dtype nor its default device changes them."""
    return torch.randn(tuple(shape), generator=generator, dtype=dtype, device=_place(generator))


def uniform(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers in [0, 1) on the generator's device, as :func:`normal`."""
    return torch.rand(tuple(shape), generator=generator, dtype=dtype, device=_place(generator))


def integers(low: int, high: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Whole numbers low … high − 1 on the generator's device."""
    return torch.randint(low, high, tuple(shape), generator=generator, device=_place(generator))


def signs(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """−1 or 1 by a fair coin, in fp32 on the generator's device."""
    return 2.0 * integers(0, 2, shape, generator).to(torch.float32) - 1


def order(size: int, generator: torch.Generator) -> Tensor:
    """0 … size − 1 in a random order, on the generator's device."""
    return torch.randperm(size, generator=generator, device=_place(generator))


def _place(generator: torch.Generator) -> torch.device:
    """The device of ``generator``; raises ``BadArgument`` for what is none."""
    if not isinstance(generator, torch.Generator):
        raise BadArgument(
            f"generator={told(generator)} does not work; give a torch.Generator, e.g. torch.Generator().manual_seed(0)"
        )
    return generator.device
