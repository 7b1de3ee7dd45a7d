"""The scan with edits of the state in it: h_t = decay_t h_{t−1} + write_t, stopped where an edit wants h_t.

``hooks.edit`` on ``hook_state`` folds affine edits into decay and write, which leaves one scan. Any other edit of h_t
needs the value of h_t before it can say what it becomes, so the scan is split there and goes on from the edited state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from models.scan import scan

States = Float[Tensor, "batch pos d_inner n"]


def recurrence(
    decay: States,
    write: States,
    h0: Float[Tensor, "batch d_inner n"] | None,
    interrupts: Sequence[tuple[Callable[[int], list[int]], Callable[[Tensor, int, int], Tensor]]] = (),
    run: Callable[[Tensor, Tensor, Any], Tensor] = scan,
) -> States:
    """All states (batch, pos, d_inner, n), with the ``interrupts`` of a ``hook_state`` point carried out.

    Each interrupt is ``(positions(length), change(state, t, length))``. ``run`` is the scan of one segment.
    """
    length = decay.shape[1]
    stops = sorted({t for positions, _ in interrupts for t in positions(length)})
    if not stops:
        return run(decay, write, h0)
    pieces: list[Tensor] = []
    start, state = 0, h0
    for t in stops:
        segment = run(decay[:, start : t + 1], write[:, start : t + 1], state)
        state = segment[:, -1]
        for positions, change in interrupts:
            if t in positions(length):
                state = change(state, t, length)
        pieces += [segment[:, :-1], state[:, None]]
        start = t + 1
    if start < length:
        pieces.append(run(decay[:, start:], write[:, start:], state))
    return torch.cat(pieces, dim=1)
