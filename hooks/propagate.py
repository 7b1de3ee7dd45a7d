"""How an edit of ``hook_state`` propagates: h_t is replaced and the recurrence goes on from there.

Elementwise affine edits, h ← m h + c, fold into the scan's own operands, decay ← m · decay and write ← m · write + c,
and stay one differentiable scan; so do(h_t := v) is exactly decay_t := 0, write_t := v, and freezing is decay 1, write
0. The others interrupt the scan at the edited positions. Both are carried out after ``hook_decay`` and ``hook_write``
have fired: the state comes after them, so an edit of it holds whatever is done to them, by whom and in which order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hooks.edits import Change, Edit, Freeze, affine_map, region_of
from hooks.errors import BadArgument

FACTORED = 5
"""Axes of ``hook_transition``, one more than those of ``hook_decay``."""


class StateEdit:
    """One edit of h in one mixer, as the recurrence (``models/recurrence.py``) carries it out.

    ``folds`` says whether :meth:`fold` can; :meth:`interrupt` always can. ``parts`` is 2 where the state is complex and
    shown as pairs of reals. ``fired`` is called once in each run that is edited. ``here(edit, length, site)`` is the
    edit as it is in the run that is going on, over ``length`` tokens, or None.
    """

    def __init__(
        self,
        edit: Edit,
        site: str,
        parts: int,
        fired: Callable[[], None],
        here: Callable[[Edit, int, str], Edit | None] = lambda edit, length, site: edit,
    ) -> None:
        if edit.across_positions:
            raise BadArgument(
                f"{edit.label} at {site} needs later states to make earlier ones: use reference= or readout_only=True"
            )
        self.edit, self.site, self.parts, self.fired, self.here = edit, site, parts, fired, here
        self.folds = isinstance(edit, Freeze) or self._is_factor()

    def _is_factor(self) -> bool:
        if self.edit.affine is None:
            return False
        m, _ = self.edit.affine(self.site, None)
        # A complex decay is a pair of reals: a factor that differs along the last axis is no complex multiplication.
        return not isinstance(m, Tensor) or self.parts == 1 or m.ndim == 0 or m.shape[-1] == 1

    def fold(self, decay: Tensor, write: Tensor) -> tuple[Tensor, Tensor]:
        """(m · decay, m · write + c) at the edited positions and channels; the tensors given are not written to."""
        if self.positions(decay.shape[1]):
            self.fired()
        return self.folded(decay, write)

    def folded(self, decay: Tensor, write: Tensor) -> tuple[Tensor, Tensor]:
        """What ``fold`` gives, for who only looks: like the three below it does not count as firing."""
        return self.kept(decay), self._affine(write, torch.zeros_like, added=True)

    def kept(self, decay: Tensor) -> Tensor:
        """m · decay, or 1 where the edit freezes; also of the factors (batch, pos, d_inner, 3, n) of a transition."""
        if decay.ndim == FACTORED:  # m ⊙ (a ⊙ h + u ⟨q, h⟩): the diagonal and the column are multiplied
            diagonal, column, row = decay.unbind(-2)
            return torch.stack([self.kept(diagonal), self.factor(column), row], dim=-2)
        return self._affine(decay, self._one, added=False)

    def factor(self, values: Tensor) -> Tensor:
        """m · values, or 0 where the edit freezes: what it leaves of something that is put into the state."""
        return self._affine(values, torch.zeros_like, added=False)

    def offset(self, like: Tensor) -> Tensor:
        """c, in zeros of the shape of ``like``; 0 where the edit freezes."""
        return self._affine(torch.zeros_like(like), torch.zeros_like, added=True)

    def positions(self, length: int) -> list[int]:
        """The positions at which h is edited in a run over ``length`` tokens."""
        edit = self.here(self.edit, length, self.site)
        return [] if edit is None else edit.positions(length, self.site)

    def interrupt(self, state: Tensor, previous: Tensor, t: int, length: int) -> Tensor:
        """h_t (batch, d_inner, n) with the edit made; ``previous`` is h_{t−1}."""
        edit = self.here(self.edit, length, self.site)
        assert edit is not None  # there are positions, and t is one
        if t == min(self.positions(length)):
            self.fired()
        there = Edit(edit.label, self._change(edit, state, previous, t, length), channels=edit.channels)
        return there(state[:, None], self.site)[:, 0]

    def _change(self, edit: Edit, state: Tensor, previous: Tensor, t: int, length: int) -> Change:
        if isinstance(edit, Freeze):
            kept = region_of(previous[:, None], None, edit.channels, self.site)
            return lambda region, whole, site: kept
        if edit.affine is None:
            return edit.change
        at = edit.positions(length, self.site)
        operands = edit.affine(self.site, (state.shape[0], length, *state.shape[1:]))
        m, c = (_at(value, at.index(t), len(at)) for value in operands)
        return lambda region, whole, site: affine_map(region, m, c)

    def _affine(self, values: Tensor, frozen: Callable[[Tensor], Tensor], *, added: bool) -> Tensor:
        edit = self.here(self.edit, values.shape[1], self.site)
        if edit is None:
            return values
        if isinstance(edit, Freeze):
            return self._on(edit, values, frozen)
        assert edit.affine is not None
        m, c = edit.affine(self.site, tuple(values.shape))
        return self._on(edit, values, lambda v: affine_map(v, m, c if added else 0.0))

    def _on(self, edit: Edit, tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        there = Edit(edit.label, lambda region, whole, site: change(region), pos=edit.pos, channels=edit.channels)
        return there(tensor, self.site)

    def _one(self, decay: Tensor) -> Tensor:
        one = torch.ones_like(decay)
        if self.parts == 2:
            one[..., decay.shape[-1] // 2 :] = 0
        return one


def _at(value: Any, rank: int, count: int) -> Any:
    """What a value that broadcasts to (batch, count, d_inner, n) is at one of the ``count`` positions."""
    if isinstance(value, Tensor) and value.ndim >= 3 and value.shape[-3] == count:
        return value[..., rank : rank + 1, :, :]
    return value
