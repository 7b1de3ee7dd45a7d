"""One layer's recurrence as one run used it, and the two things that can be done with it without running again.

    h_t = decay_t ⊙ h_{t−1} + write_t,   write_t = gain_t x_t + edited_t,   y_t = C_t h_t

``observe`` takes decay, write and C from the run itself, edits included. An edit of ``hook_state`` that is a factor and
an offset (``hooks.do_state``, ``zero``, ``scale``, ``add``, ``set_to``, ``freeze``) is folded in as the scan does it:
its factor into decay and write, its offset into ``edited``, which is what edits and no token have put into the state.

``Recurrence.pull_back`` is the adjoint recurrence λ_t = C_t g_t + decay_{t+1} λ_{t+1}: with it Σ_t g_t y_t is
Σ_s λ_s write_s + λ_0 decay_0 h_0, in O(pos · d_inner · d_state); ``pairs.all_pairs`` multiplies the same out for all
pairs of positions. Both only multiply decays: no logarithm and no division, so a decay of exactly 0 is nothing
special, and complex decays (pairs of reals in the sites of S4D) are as good as real ones. Where ``hook_transition``
takes the place of ``hook_decay`` (S4), decay_t h is a ⊙ h + u ⟨q, h⟩, and its adjoint a ⊙ λ + q̄ Re(Σ u λ); that is
not among all pairs.

What a mixer must have: ``hook_x``, ``hook_decay`` or ``hook_transition``, ``hook_write``, ``hook_y`` and, for the
states (batch, pos, d_inner, n) as ``hook_state`` shows them, a method ``read(states, C)`` that gives y, linear in the
states; ``C`` is what ``hook_C`` held, and is left out where there is no such site because C is a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

import hooks
from hooks.brief import brief
from hooks.edits import Edit
from hooks.errors import BadArgument, told
from hooks.onlookers import state_edits, watched
from hooks.vocabulary import points

Inner = Float[Tensor, "batch pos d_inner"]
States = Float[Tensor, "batch pos d_inner n"]

TILE = 64
"""Positions at a time in ``pull_back``."""
SMALLEST = 1e-15
"""The least |x| that the write is divided by."""
NEEDED = ("hook_x", "hook_decay", "hook_write", "hook_y")
FACTORS = "hook_transition"
"""Takes the place of ``hook_decay`` where the states are mixed: (batch, pos, d_inner, 3, n), the factors a, u and q."""
HELD = ("hook_delta", "hook_delta_decay", "hook_delta_write", "hook_B", "hook_C")


@dataclass(frozen=True)
class Recurrence:
    """Decay, writes and read-out of one layer in one run; n is d_state, or 2 · d_state where states are complex."""

    x: Inner
    decay: States | Float[Tensor, "batch pos d_inner 3 n"]
    """Where ``factored``, the three factors: (batch, pos, d_inner, 3, n)."""
    write: States
    """What the tokens write: linear in x."""
    gain: States | None
    """``write`` for each unit of x; only where it was asked for."""
    edited: States | None
    """What edits of ``hook_write`` and ``hook_state`` write; None where there are none."""
    init: Float[Tensor, "batch d_inner n"]
    y: Inner
    C: Tensor | None
    sites: Mapping[str, Tensor]
    """The other sites of this mixer by kind (``hook_gate`` …)."""
    changed: frozenset[str]
    """The kinds of site that somebody's hooks or edits are on."""
    parts: int
    """2 where states are complex: real parts, then imaginary parts."""
    read: Callable[..., Tensor]
    output: Any
    """What the run returned."""

    __repr__ = brief

    @property
    def factored(self) -> bool:
        """Whether what is kept is a diagonal and a product of two vectors."""
        return self.decay.ndim > self.write.ndim

    def numbers(self, values: Float[Tensor, "*shape n"]) -> Inexact[Tensor, "*shape d_state"]:
        """Values in the layout of ``hook_state`` as what they stand for: real, or complex numbers."""
        return values if self.parts == 1 else torch.complex(*values.chunk(2, dim=-1))

    def rows(self, weights: Inner, pos: slice = slice(None)) -> Inexact[Tensor, "batch some d_inner d_state"]:
        """What multiplies h_t in Σ_t weights_t y_t, for the positions ``pos``; with weights 1 it is C.

        Real parts p and imaginary parts q of a complex state are read as Re((p − iq) h).
        """
        # Also where somebody has switched gradients off altogether: the line is ours, and no tensor of theirs is in it.
        with torch.inference_mode(False), torch.enable_grad():
            C = () if self.C is None else (self.C[:, pos].detach().clone(),)
            # One zero, seen everywhere: y is linear in the states, so none of them needs a place of its own.
            states = self.write.new_zeros(()).expand_as(self.write[:, pos]).requires_grad_()
            y = self.read(states, *C)
            (found,) = torch.autograd.grad(y, states, weights[:, pos].to(y.dtype, copy=True))
        found = self.numbers(found)
        return found.conj().resolve_conj() if found.is_complex() else found.contiguous()

    def pull_back(self, weights: Inner, onto: Sequence[States | None]) -> tuple[list[Inner], Tensor]:
        """Σ_t weights_t y_t split over what is written: Σ_n λ_s · onto_s for each of ``onto``, zeros for None.

        Returns those, each (batch, pos, d_inner), and the same of h_0, (batch, d_inner). With all that is written in
        ``onto`` they sum to the whole, over positions and channels.
        """
        found = [torch.zeros_like(self.write[..., 0]) for _ in onto]

        def seeds(pos: slice) -> Tensor:
            return self.rows(weights, pos)

        def keep(pos: slice, adjoint: Tensor) -> None:
            for result, values in zip(found, onto, strict=True):
                if values is not None:
                    result[:, pos] = real((adjoint * self.numbers(values[:, pos])).sum(-1))

        start = adjoints(self.decay.shape[1], lambda pos: self.numbers(self.decay[:, pos]), seeds, keep)
        return found, real((start * self.numbers(self.init)).sum(-1))


def adjoints(
    length: int,
    decay: Callable[[slice], Tensor],
    seeds: Callable[[slice], Tensor],
    keep: Callable[[slice, Tensor], None],
) -> Inexact[Tensor, "batch d_inner d_state"]:
    """λ_t = seeds_t + decay_{t+1} λ_{t+1} from the last position to the first, ``TILE`` positions at a time.

    ``decay`` and ``seeds`` give a tile (batch, some, d_inner, d_state), that of ``seeds`` to be written to; ``keep`` is
    handed λ in its place. Decays may be factors (batch, some, d_inner, 3, d_state). Returns decay_0 λ_0, which
    multiplies h_0.
    """
    carry = None
    for start in reversed(range(0, length, TILE)):
        pos = slice(start, min(start + TILE, length))
        adjoint = seeds(pos)
        for at, kept in zip(reversed(adjoint.unbind(1)), reversed(decay(pos).unbind(1)), strict=True):
            if carry is not None:
                at += carry
            carry = torch.mul(at, kept, out=carry) if kept.ndim == at.ndim else _through_factors(at, kept)
        keep(pos, adjoint)
    assert carry is not None
    return carry


def _through_factors(adjoint: Inexact[Tensor, "*shape n"], factors: Inexact[Tensor, "*shape 3 n"]) -> Tensor:
    """The λ' with Re(λ' · h) = Re(λ · (a ⊙ h + u Re(q̄ · h))) for every h."""
    diagonal, column, row = factors.unbind(-2)
    return adjoint * diagonal + row.conj() * real((adjoint * column).sum(-1, keepdim=True))


def refuse_real_factors(model: Any, stem: str, asked: str) -> None:
    """Raise :class:`BadArgument` where the factors at ``stem`` are real, for who reads them as complex pairs.

    A mixer says which by ``site("hook_transition", parts=2)``. No shape would tell: half of the states would be
    multiplied as if they were the imaginary parts of the other half.
    """
    point = model.hook_dict.get(stem + FACTORS)
    if point is not None and getattr(point, "parts", 1) != 2:
        raise BadArgument(
            f"{asked} reads transitions as pairs of real and imaginary parts, and {stem + FACTORS} holds real factors: "
            "there is attention.matrix() and contributions() for these"
        )


def real(values: Inexact[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The real part."""
    return values.real if values.is_complex() else values


@contextmanager
def edited(model: Any, edits: Any) -> Iterator[None]:
    """Inside the block the edits are made; ``edits`` is what ``hooks.edit`` takes, or None for none."""
    with nullcontext() if edits is None else hooks.edit(model, edits):
        yield


def observe(
    model: Any,
    x: Tensor,
    layer: int,
    *,
    gain: bool = False,
    others: Sequence[str] = (),
    whole: bool = True,
    state: Any = None,
) -> Recurrence:
    """Run ``model`` on ``x``, under whatever edits are on it, and take down the recurrence of ``layer``.

    ``gain`` asks for what is written for each unit of x: write ÷ x, or, where that would be inexact or ``hook_write``
    is edited, what is written in another run with x set to 1 and Δ, B and C held at what they were. ``others`` are
    further kinds of site that are needed. ``whole=False`` stops the runs after the layer. Raises :class:`BadArgument`
    where the layer lacks a site, naming it, and for an edit of ``hook_state`` that is not a factor and an offset.
    """
    prefix, mixer = mixer_of(model, layer, others)
    kinds = [name.removeprefix(prefix) for name in model.hook_dict if name.startswith(prefix + "hook_")]
    states = state_edits(mixer.hook_state)
    for edit in states:
        if not edit.folds:
            raise BadArgument(
                f"{edit.edit.label} at {edit.site} makes h_t a function of itself, and what reaches it cannot be split "
                "over tokens: use an edit that is a factor and an offset (scale, add, set_to, do_state, freeze)"
            )
    changed = frozenset(kind for kind in kinds if watched(model.hook_dict[prefix + kind]))
    keywords: dict[str, Any] = {} if state is None else {"state": state}
    if not whole:
        keywords["stop_at_layer"] = layer + 1
    record = hooks.record(model, x, [prefix + kind for kind in kinds if kind != "hook_state"], **keywords)
    seen = {name.removeprefix(prefix): value for name, value in record.items()}
    held = {prefix + kind: hooks.set_to(seen[kind]) for kind in HELD if kind in seen}

    def written(value: float) -> States:
        """What the layer writes where every x is ``value`` and all else is as it was; the run ends there."""
        found: list[Tensor] = []

        def stop(region: Tensor, writes: Tensor, site: str) -> Tensor:
            found.append(writes)
            raise _Written

        changes = {prefix + "hook_x": hooks.set_to(value), prefix + "hook_write": Edit("the end of the run", stop)}
        with suppress(_Written), torch.no_grad(), hooks.edit(model, {**held, **changes}):
            model(x, **keywords)
        return found[0]

    decay, write = seen.pop(FACTORS if FACTORS in seen else "hook_decay"), seen.pop("hook_write")
    added = written(0.0) if "hook_write" in changed else None
    each = None
    if gain:
        # The division spares a run; where an x is so small that it would lose digits, there is one.
        exact = added is None and bool((seen["hook_x"].abs() > SMALLEST).all())
        each = write / seen["hook_x"].to(write.dtype)[..., None] if exact else written(1.0)
    if added is not None:
        write, each = write - added, None if each is None else each - added
    if states and added is None:
        added = torch.zeros_like(write)
    for edit in states:
        assert added is not None
        write, added = edit.factor(write), edit.factor(added) + edit.offset(added)
        each = None if each is None else edit.factor(each)
        decay = edit.kept(decay)
    return Recurrence(
        x=seen["hook_x"].to(write.dtype),
        decay=decay,
        write=write,
        gain=each,
        edited=added,
        init=seen.get("hook_state_init", torch.zeros_like(write[:, 0])),
        y=seen["hook_y"],
        C=seen.get("hook_C"),
        sites=seen,
        changed=changed,
        parts=getattr(mixer.hook_state, "parts", 1),
        read=mixer.read,
        output=record.output,
    )


class _Written(Exception):
    """Ends a run of which only the writes are wanted."""


def mixer_of(model: Any, layer: int, kinds: Sequence[str]) -> tuple[str, Any]:
    """``("blocks.{layer}.mixer.", the mixer)``; raises :class:`BadArgument` that names the sites that it lacks, of
    those that every recurrence needs and of ``kinds``.
    """
    names = points(model)
    count = len(model.blocks)
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < count:
        raise BadArgument(f"there is no layer {told(layer)}: the model has layers 0 to {count - 1}")
    prefix = f"blocks.{layer}.mixer."
    needed = [FACTORS if kind == "hook_decay" and prefix + FACTORS in names else kind for kind in NEEDED]
    missing = [kind for kind in (*needed, *kinds) if prefix + kind not in names]
    mixer = getattr(model.blocks[layer], "mixer", None)
    if not missing and not hasattr(mixer, "read"):
        missing = ["hook_C (nor a read-out of its own)"]
    if missing:
        have = [name.removeprefix(prefix) for name in names if name.startswith(prefix + "hook_")]
        what = f"has {', '.join(have)}" if have else "has no recurrence"
        name = getattr(model, "architecture", type(model).__name__)
        raise BadArgument(
            f"layer {layer} of this {name} has no {', '.join(missing)}, of which this attention is made: it {what}"
        )
    return prefix, mixer
