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

from hooks.propagate import StateEdit
from models.scan import scan

States = Float[Tensor, "batch pos d_inner n"]


def recurrence(
    decay: Float[Tensor, "batch pos d_inner *factors n"],
    write: States,
    h0: Float[Tensor, "batch d_inner n"] | None,
    edits: Sequence[StateEdit] = (),
    run: Callable[[Tensor, Tensor, Any], Tensor] = scan,
    elementwise: bool = True,
) -> States:
    """All states (batch, pos, d_inner, n), with the ``edits`` that a ``hook_state`` point holds carried out in order.

    ``run`` is the scan of one segment. ``elementwise`` says whether ``decay`` multiplies the state entry by entry;
    where it does not (factors of a transition matrix), no edit is folded into it and each interrupts.
    """
    length = decay.shape[1]
    waiting: list[tuple[StateEdit, set[int]]] = []
    for edit in edits:
        # What comes after an interruption has to wait for it, so it interrupts as well.
        if elementwise and edit.folds and not waiting:
            decay, write = edit.fold(decay, write)
        else:
            waiting.append((edit, set(edit.positions(length))))
    pieces: list[Tensor] = []
    start, state = 0, h0
    for t in sorted(set().union(*(at for _, at in waiting))):
        segment = run(decay[:, start : t + 1], write[:, start : t + 1], state)
        before = segment[:, -2] if t > start else torch.zeros_like(segment[:, 0]) if state is None else state
        state = segment[:, -1]
        for edit, at in waiting:
            if t in at:
                state = edit.interrupt(state, before, t, length)
        pieces += [segment[:, :-1], state[:, None]]
        start = t + 1
    if start < length:
        pieces.append(run(decay[:, start:], write[:, start:], state))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
