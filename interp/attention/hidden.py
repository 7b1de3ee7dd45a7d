"""The hidden attention of a recurrence: the matrix M with y = M x + D x, one for each channel (Ali et al. 2024).

    M[t, s] = Σ_n C_t[n] ∏_{s<k≤t} decay_k[n] B̄_s[n]

of any layer with a recurrence (Mamba and its time-invariant twin, S4D with its complex states, S4, whose decays are
matrices, linear attention …), from the decays that the run itself used, edits included. M says what the scan does with
x while Δ, B and C are held: that they depend on x as well is not in it. What is in it is chosen:

    "scan"  from ``hook_x`` to ``hook_y``
    "taps"  from ``hook_x_in``, in front of the convolution: token i − 1 gets its share of x_i (``inside``)
    "gate"  to ``hook_gated``: each row times the output gate SiLU(z) of its query, held

What is not M x stands beside it: the initial state's share, what edits have put in, with taps the convolution's bias
and the inputs before the prompt, and the skip D x. ``contributions`` (``tokens``) asks for one scalar
only and needs no matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Inexact, Int
from torch import Tensor

from hooks.brief import brief
from hooks.edits import Index, indices
from hooks.errors import BadArgument, TooLarge
from hooks.inputs import readable
from hooks.memory import allowed_memory
from hooks.precision import exact
from interp.attention.inside import inside_of, taps_of
from interp.attention.pairs import all_pairs
from interp.attention.recurrence import Recurrence, adjoints, edited, mixer_of, observe, real
from interp.machine.progress import followed

__all__ = ["Attention", "matrix"]

TILE_NUMBERS = 1 << 23
"""Numbers of whole matrices at a time, where only some rows of them are asked for."""
ROW_COST = 8
"""How many rows of the whole matrix cost about as much as one row by the adjoint recurrence."""
Shares = Float[Tensor, "batch channel query"]


@dataclass(frozen=True)
class Attention:
    """M of one layer, and what else its output is made of: ``output`` = values · source + the four shares, + skip."""

    values: Float[Tensor, "batch channel query pos"]
    """For each unit of ``source``; 0 above the diagonal."""
    source: Float[Tensor, "batch channel pos"]
    """``hook_x``; with taps ``hook_x_in``."""
    state_init: Shares
    conv_bias: Shares
    conv_init: Shares
    edited: Shares
    """What edits have put into the state, or into x, that is not in proportion to the source."""
    skip: Shares
    """D x, not in ``values`` and not in ``output``; with the gate on it where the gate is inside. 0 without D."""
    output: Shares
    """``hook_y`` of that run; with the gate inside times ``hook_gate``."""
    channels: Int[Tensor, "channel"]
    queries: Int[Tensor, "query"]
    layer: int
    inside: tuple[str, ...]
    error: float
    """The largest |values · source + shares − output|."""
    relative_error: float
    """``error`` ÷ the largest |output|."""

    __repr__ = brief

    @property
    def shares(self) -> Float[Tensor, "batch channel query pos"]:
        """What each source token adds to each query's output: values times source."""
        return self.values * self.source[:, :, None]


def matrix(
    model: Any,
    x: Tensor,
    layer: int,
    *,
    channels: Index = None,
    heads: Index = None,
    queries: Index = None,
    inside: str | Sequence[str] = "scan",
    edits: Any = None,
    state: Any = None,
    max_memory: int | None = None,
) -> Attention:
    """M of ``layer`` for the prompts ``x``: (batch, channel, query, pos) numbers, rows of the chosen queries.

    ``channels``, ``queries``: integers, a slice or a mask, None for all; ``heads`` in place of channels picks all the
    channels of a head, where the model has heads. ``inside`` is one or several of "scan", "taps", "gate". ``edits``
    are those of ``hooks.edit``; with them the model runs to its end, else it stops after the layer. ``state`` is what
    went before the prompt. Memory beside the result: O(batch · pos · d_inner · d_state).

    Raises :class:`BadArgument` for a layer that lacks a site (named), for an edit of ``hook_state`` that is not a
    factor and an offset, and for an index outside; :class:`TooLarge` before any run where the result takes more than
    ``max_memory`` bytes (half of what is free).
    """
    chosen = inside_of(inside)
    _, mixer = mixer_of(model, layer, chosen.sites)
    readable(model, x)
    columns = _channels(channels, heads, mixer.axis_sizes())
    rows = indices(queries, x.shape[1], "queries", "the positions")
    size = 2 * x.shape[0] * len(columns) * len(rows) * x.shape[1] * next(model.parameters()).element_size()
    limit = allowed_memory(x.device, max_memory)
    if size > limit:
        raise TooLarge(
            f"{x.shape[0]} × {len(columns)} channels × {len(rows)} queries × {x.shape[1]} positions take {size:.3g} "
            f"bytes, allowed are {limit:.3g} (max_memory): pick channels or queries, or ask for contributions()"
        )
    with edited(model, edits):
        seen = observe(model, x, layer, gain=True, others=chosen.sites, whole=edits is not None, state=state)
    columns, rows = columns.to(x.device), rows.to(x.device)
    values, start, put = _values(seen, columns, rows)
    nothing = torch.zeros_like(start)

    def at(site: Tensor) -> Shares:
        """The site's values (batch, pos, d_inner) at the channels and queries."""
        return site.transpose(1, 2)[:, columns][..., rows].to(values.dtype)

    source, conv_bias, conv_init = seen.x.transpose(1, 2)[:, columns], nothing, nothing
    if chosen.taps:
        taps = taps_of(model, layer, seen).of_channels(columns)
        parts = taps.split(values)
        values, source, conv_bias, conv_init = parts.values, taps.source, parts.conv_bias, parts.conv_init
        put = put + parts.edited
    output, skip = at(seen.y), at(seen.sites["hook_skip"]) if "hook_skip" in seen.sites else nothing
    if chosen.gate:
        gate = at(seen.sites["hook_gate"])
        values = values * gate[..., None]
        start, conv_bias, conv_init, put, skip, output = (
            part * gate for part in (start, conv_bias, conv_init, put, skip, output)
        )
    rebuilt = exact(torch.matmul, source[:, :, None], values.mT)[:, :, 0] + start + conv_bias + conv_init + put
    error = float((rebuilt - output).abs().max())
    largest = float(output.abs().max())
    return Attention(
        values=values,
        source=source,
        state_init=start,
        conv_bias=conv_bias,
        conv_init=conv_init,
        edited=put,
        skip=skip,
        output=output,
        channels=columns,
        queries=rows,
        layer=layer,
        inside=chosen.names,
        error=error,
        relative_error=error / largest if largest else math.inf if error else 0.0,
    )


def _channels(channels: Index, heads: Index, sizes: Mapping[str, int]) -> Int[Tensor, "channel"]:
    if heads is None:
        return indices(channels, sizes["d_inner"], "channels", "d_inner")
    if channels is not None:
        raise BadArgument("channels= and heads= were both given: a head is all of its channels")
    if "head" not in sizes:
        raise BadArgument(f"this model has no heads, it has {sizes['d_inner']} channels: use channels=")
    each = sizes["d_inner"] // sizes["head"]
    first = each * indices(heads, sizes["head"], "heads", "the heads")
    return (first[:, None] + torch.arange(each, device="cpu")).reshape(-1)


def _values(seen: Recurrence, columns: Tensor, queries: Tensor) -> tuple[Tensor, Shares, Shares]:
    """M for each unit of x, and the shares of h_0 and of edits."""
    assert seen.gain is not None
    batch, length, width = seen.x.shape
    every = torch.equal(columns, torch.arange(width, device=columns.device))
    at: Any = slice(None) if every else columns
    decay, row = seen.numbers(seen.decay[:, :, at]), seen.rows(torch.ones_like(seen.x))[:, :, at]
    gain, init = (seen.numbers(part[..., at, :]) for part in (seen.gain, seen.init))
    added = None if seen.edited is None else seen.numbers(seen.edited[:, :, at])
    if seen.factored or ROW_COST * len(queries) < length:
        asked = followed(queries.tolist(), "attention")
        found = [_row(decay, gain, init, added, row, query) for query in asked]
        values, start, put = (torch.stack(part, 2) for part in zip(*found, strict=True))
        return values, start, put
    count = len(columns)
    values = seen.x.new_zeros(batch, count, len(queries), length)
    direct = torch.equal(queries, torch.arange(length, device=queries.device))
    tile = count if direct else max(1, TILE_NUMBERS // (batch * length * length))
    whole = values if direct else values.new_zeros(batch, min(tile, count), length, length)
    for first in followed(range(0, count, tile), "attention"):
        here = slice(first, min(first + tile, count))
        if here.stop - first < whole.shape[1]:  # the last tile
            whole = values.new_zeros(batch, here.stop - first, length, length)
        all_pairs(decay[:, :, here], gain[:, :, here], row[:, :, here], whole)
        if not direct:
            values[:, here] = whole[:, :, queries]
    nothing = values.new_zeros(values.shape[:3])
    start = _read_states(decay, None, row, init)[..., queries] if bool(init.any()) else nothing
    put = nothing if added is None else _read_states(decay, added, row, torch.zeros_like(init))[..., queries]
    return values, start, put


def _row(
    decay: Tensor, gain: Tensor, init: Tensor, added: Tensor | None, row: Tensor, query: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One query's row (batch, channel, pos), and its shares of h_0 and of edits (batch, channel)."""
    values = gain.new_zeros(gain.shape[0], gain.shape[2], gain.shape[1], dtype=real(gain).dtype)
    put = torch.zeros_like(values[..., 0])

    def seeds(pos: slice) -> Tensor:
        made = torch.zeros_like(row[:, pos])
        if pos.stop == query + 1:
            made[:, -1] = row[:, query]
        return made

    def keep(pos: slice, adjoint: Tensor) -> None:
        values[..., pos] = real((adjoint * gain[:, pos]).sum(-1)).transpose(1, 2)
        if added is not None:
            put.add_(real((adjoint * added[:, pos]).sum((1, -1))))

    first = adjoints(query + 1, lambda pos: decay[:, pos], seeds, keep)
    return values, real((first * init).sum(-1)), put


def _read_states(
    decay: Tensor, write: Tensor | None, row: Tensor, h: Inexact[Tensor, "batch channel n"]
) -> Float[Tensor, "batch channel pos"]:
    """What is read out of the states that ``h`` before the first position and ``write`` make."""
    found = []
    for t in range(decay.shape[1]):
        h = decay[:, t] * h if write is None else decay[:, t] * h + write[:, t]
        found.append(real((row[:, t] * h).sum(-1)))
    return torch.stack(found, dim=-1)
