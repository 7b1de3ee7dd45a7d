"""All pairs of positions of a real diagonal recurrence, compiled (numba): the same as ``pairs.tree``.

Time is cut into blocks of LANES positions. Within a block the sources of all its positions are carried along together,
one multiplication by each decay. From a block to the later ones they go as they are at its end: a row of C that is
multiplied down to the start of its own block meets them there, and each block that they pass multiplies them by all of
its decay. As in ``tree`` there is neither a division nor a logarithm, so a decay of exactly 0 is nothing special.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numba import carray
from torch import Tensor

from hooks.errors import BadArgument
from hooks.machine.native import compiled, stack
from hooks.machine.threads import run

LANES = 8
_SQUARE = LANES * LANES
TOGETHER = 16
"""Neighbouring channels that are fetched at a time: their numbers lie side by side."""


def all_pairs(
    decay: Float[Tensor, "batch pos d_inner n"],
    gain: Float[Tensor, "batch pos d_inner n"],
    row: Float[Tensor, "batch pos d_inner n"],
    out: Float[Tensor, "batch d_inner pos pos"],
) -> None:
    """Fill ``out``, which is contiguous, with Σ_n row_t ∏_{s<k≤t} decay_k gain_s at (t, s), and 0 where s > t.

    On the CPU, all in float32 or all in float64. Raises BadArgument where shapes or dtypes differ: compiled code would
    read past the end of what is shorter.
    """
    batch, length, width, n = decay.shape
    for name, part, shape in (
        ("gain", gain, decay.shape),
        ("row", row, decay.shape),
        ("out", out, (batch, width, length, length)),
    ):
        if part.shape != shape or part.dtype != decay.dtype:
            raise BadArgument(f"{name} is {part.dtype} {tuple(part.shape)}, decay {decay.dtype} {tuple(decay.shape)}")
    arrays = tuple(part.detach().contiguous().numpy() for part in (decay, gain, row))
    groups = -(-width // TOGETHER)
    run(_all_pairs, batch * groups, groups, batch * width * length**2 * n // 4, (*arrays, out.numpy()))


@compiled
def _all_pairs(first, last, groups, decay, gain, row, out):  # type: ignore[no-untyped-def]
    """For units first … last − 1, each ``TOGETHER`` channels of one sequence; each writes memory of its own.

    What is written in a loop over lanes is on the stack, where it is known to overlap with nothing.
    """
    length, width, n = decay.shape[1], decay.shape[2], decay.shape[3]
    carried = carray(stack(decay, LANES), (LANES,))
    total = carray(stack(decay, LANES), (LANES,))
    square = carray(stack(decay, _SQUARE), (LANES, LANES))
    decays = np.empty((TOGETHER, length, n), decay.dtype)
    gains = np.empty((TOGETHER, length, n), decay.dtype)
    rows = np.empty((TOGETHER, length, n), decay.dtype)
    down = np.empty((length, n), decay.dtype)  # each row, multiplied down to the start of its block
    passes = np.empty((length // LANES + 1, n), decay.dtype)  # what is left of a state after each block
    ends = np.empty((n, LANES), decay.dtype)
    zero, one = decay.dtype.type(0), decay.dtype.type(1)
    for unit in range(first, last):
        b, start = unit // groups, unit % groups * TOGETHER
        some = min(TOGETHER, width - start)
        for t in range(length):
            for c in range(some):
                for k in range(n):
                    decays[c, t, k] = decay[b, t, start + c, k]
                    gains[c, t, k] = gain[b, t, start + c, k]
                    rows[c, t, k] = row[b, t, start + c, k]
        for c in range(some):
            for block in range(0, length, LANES):
                for k in range(n):
                    passes[block // LANES, k] = one
                for t in range(block, min(block + LANES, length)):
                    for k in range(n):
                        product = passes[block // LANES, k] * decays[c, t, k]
                        passes[block // LANES, k] = product
                        down[t, k] = rows[c, t, k] * product
            for source in range(0, length, LANES):
                lanes = min(LANES, length - source)
                for i in range(lanes):
                    for j in range(LANES):
                        square[i, j] = zero
                for k in range(n):
                    for j in range(LANES):
                        carried[j] = zero
                    for i in range(lanes):
                        kept, new, read = decays[c, source + i, k], gains[c, source + i, k], rows[c, source + i, k]
                        for j in range(LANES):
                            value = new if j == i else carried[j] * kept
                            carried[j] = value
                            square[i, j] += read * value
                    for j in range(LANES):
                        ends[k, j] = carried[j]
                for i in range(lanes):
                    for j in range(lanes):
                        out[b, start + c, source + i, source + j] = square[i, j] if j <= i else zero
                for block in range(source + LANES, length, LANES):
                    for t in range(block, min(block + LANES, length)):
                        for j in range(LANES):
                            total[j] = zero
                        for k in range(n):
                            read = down[t, k]
                            for j in range(LANES):
                                total[j] += read * ends[k, j]
                        for j in range(LANES):
                            out[b, start + c, t, source + j] = total[j]
                    for k in range(n):
                        product = passes[block // LANES, k]
                        for j in range(LANES):
                            ends[k, j] *= product
