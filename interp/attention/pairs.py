"""What every position writes, as every later one reads it: all pairs of positions of a recurrence.

CPU tensors in float32 or float64 go to compiled loops (``pairs_compiled.py``), everything else to ``tree``. Both only
multiply decays, as ``recurrence`` does.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from hooks.precision import exact
from interp.attention.recurrence import real

TREE_NUMBERS = 1 << 20
"""Numbers in the result of one tile of channels in ``tree``: it then stays in the processor's cache."""


def all_pairs(
    decay: Inexact[Tensor, "batch pos d_inner n"],
    gain: Inexact[Tensor, "batch pos d_inner n"],
    row: Inexact[Tensor, "batch pos d_inner n"],
    out: Float[Tensor, "batch d_inner pos pos"],
) -> None:
    """Σ_n row_t ∏_{s<k≤t} decay_k gain_s into ``out`` at (t, s) for s ≤ t; ``out`` is contiguous, and zeros."""
    if out.device.type == "cpu" and decay.dtype in (torch.float32, torch.float64):
        from hooks.machine import native  # numba: half a second that only those pay who ask for a matrix

        if native.usable():
            from interp.attention import pairs_compiled

            pairs_compiled.all_pairs(decay, gain, row, out)
            return
    length = decay.shape[1]
    size = 1 << (length - 1).bit_length()
    whole = out if size == length else out.new_zeros(*out.shape[:2], size, size)
    width = max(1, TREE_NUMBERS // (out.shape[0] * size * size))
    for first in range(0, out.shape[1], width):
        here = slice(first, first + width)
        tiles = [_by_channel(part[:, :, here], size) for part in (decay, gain, row)]
        tree(tiles[0], tiles[1], tiles[2], whole[:, here])
    if whole is not out:
        out.copy_(whole[:, :, :length, :length])


def tree(
    decay: Inexact[Tensor, "batch d_inner pos n"],
    gain: Inexact[Tensor, "batch d_inner pos n"],
    row: Inexact[Tensor, "batch d_inner pos n"],
    out: Float[Tensor, "batch d_inner pos pos"],
) -> None:
    """``all_pairs`` of anything, complex numbers too; ``gain`` and ``row`` are written over; pos is a power of 2.

    Blocks of 1, 2, 4 … positions: ``row`` is multiplied down to its block's first position, ``gain`` up to its block's
    last, so the pairs across two neighbouring blocks are one matrix product for each channel. O(pos²) products of
    numbers in all, and no tensor of more than batch · d_inner · pos · n beside the result.
    """
    batch, width, length, n = decay.shape
    out.diagonal(dim1=-2, dim2=-1).copy_(real((row * gain).sum(-1)))
    row *= decay
    half = 1
    while half < length:
        blocks = length // (2 * half)
        rows, gains = (t.view(batch, width, blocks, 2, half, n) for t in (row, gain))
        ends = decay.view(batch, width, blocks, 2, 1, n)
        across = _real_product(rows[:, :, :, 1], gains[:, :, :, 0])
        corner = out.view(batch, width, blocks, 2, half, blocks, 2, half)[:, :, :, 1, :, :, 0]
        corner.diagonal(dim1=2, dim2=4).copy_(across.permute(0, 1, 3, 4, 2))
        rows[:, :, :, 1].mul_(ends[:, :, :, 0])
        half *= 2
        if half < length:
            gains[:, :, :, 0].mul_(ends[:, :, :, 1])
            decay = ends[:, :, :, 0] * ends[:, :, :, 1]


def _by_channel(values: Tensor, size: int) -> Inexact[Tensor, "batch channel size n"]:
    """A copy of (batch, pos, channel, n), with zeros after the last position."""
    made = values.new_zeros(values.shape[0], values.shape[2], size, values.shape[3])
    made[:, :, : values.shape[1]] = values.transpose(1, 2)
    return made


def _real_product(rows: Tensor, gains: Tensor) -> Tensor:
    """Re(rows · gainsᵀ)."""
    if not rows.is_complex():
        return exact(torch.matmul, rows, gains.mT)
    return exact(torch.matmul, rows.real, gains.real.mT) - exact(torch.matmul, rows.imag, gains.imag.mT)
