"""Path knock-out: chosen tokens no longer reach chosen later ones, inside chosen layers, and everything else stays.

In one layer a source token s reaches a target t in two ways, and each is taken out of the run's own values, edits
included, while the layer runs:

    scan    y_t     −= C_t · (∏_{s<r≤t} ā_r) w_s      what is left at t of what s wrote, as t reads it
    taps    x_pre_t −= W[:, t − s] x_in_s             what the short convolution shows t of s

In S4 each ā_r is a matrix. Other targets read s as before, the state itself is not touched, and Δ, B, C and the gate of
t change only through the taps. So a knocked-out source still acts on t in other ways: a token between the two sees s
(through its own taps, or in an earlier layer) and t reads that token; and with a decay ā_s of its own s decides what t
still has of earlier tokens. :func:`left` measures how much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

import hooks
from hooks.edits import Edit, derangement
from hooks.errors import BadArgument, told
from hooks.inputs import readable
from hooks.onlookers import state_edits
from hooks.precision import exact
from hooks.propagate import StateEdit
from hooks.vocabulary import points
from interp import stats
from interp.arguments import listed, one_of, whole_number
from interp.attention.recurrence import FACTORS, refuse_real_factors
from interp.machine.progress import followed, progress
from interp.metric import Metric, one_arithmetic, one_number

Mask = Bool[Tensor, "prompts source target"]
"""Which source reaches which target no more; one prompt's mask serves all."""
Pairs = Iterable[tuple[int, int]] | Tensor
"""(source, target) positions, source ≤ target, the same in each prompt; or a mask (pos, pos) or (batch, pos, pos)."""
WAYS = ("scan", "taps")


def knock_out(
    model: Any, pairs: Pairs, layers: int | Sequence[int] | None = None, inside: str | Sequence[str] = WAYS
) -> dict[str, Edit]:
    """Edits for ``hooks.edit`` that take each (source, target) of ``pairs`` out of ``layers`` (None: all of them).

    ``inside`` names the ways that are closed: the scan, the convolution's taps, or both. A model without a convolution
    has no taps to close, which is an error only where nothing else is asked. A pair (t, t) is what a token shows
    itself. :func:`between` makes masks, also such that differ from prompt to prompt; a mask may be empty.
    It costs the memory of the scan's 4-D sites, and for each source with targets of its own the time of one product of
    decays up to the last of them.

    Other edits of the same sites act first where they are made first: put this block innermost. Edits of ``hook_state``
    that are a factor and an offset (``do_state``, ``scale``, ``freeze`` …) are reckoned with whatever the transition,
    wherever they are made: what one puts into h_s counts as written by s. Others are refused in the run. One with
    ``readout_only`` is not seen: the pairs are taken out as t reads them without it.
    Raises :class:`BadArgument` for a target before its source, an empty list, a transition with real factors, and a
    model that lacks a site, which it names.
    """
    chosen = _Chosen(pairs)
    ways = {one_of("inside", way, WAYS) for way in listed("inside", inside)}
    if not ways:
        raise BadArgument(f"inside=() closes nothing: name {' or '.join(WAYS)}")
    edits: dict[str, Edit] = {}
    for layer in _layers(model, layers):
        stem = f"blocks.{layer}.mixer."
        has_taps = stem + "hook_x_pre" in model.hook_dict
        if "taps" in ways and (has_taps or ways == {"taps"}):
            _require(model, stem, ("hook_x_in", "hook_x_pre"))
            taps = CutTaps(model.blocks[layer].mixer.conv1d.weight, chosen.mask)
            edits |= {stem + "hook_x_in": _edit(taps.see), stem + "hook_x_pre": _edit(taps.subtract)}
        if "scan" in ways:
            edits |= _Scan(model, layer, chosen).edits()
    return edits


def between(sources: Any, targets: Any, length: int) -> Mask:
    """The mask of all pairs of a source and a *later* target among ``length`` positions.

    Each of the two is positions, the same in every prompt, or a mask (batch, pos): ``between(batch.truth["outlier"],
    [-1], length)`` is every outlier to the query. Raises :class:`BadArgument` for positions that there are not.
    """
    source, target = (_which(given, length, what) for given, what in ((sources, "source"), (targets, "target")))
    return (source[:, :, None] & target[:, None, :]).triu(diagonal=1)


def left(
    model: Any,
    x: Tensor,
    pairs: Pairs,
    layers: int | Sequence[int] | None = None,
    inside: str | Sequence[str] = WAYS,
    *,
    metric: Metric | None = None,
    other: Tensor | None = None,
    n_boot: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> stats.Interval:
    """What a knock-out leaves of the sources' effect on their targets, as a share of that effect: 0 is nothing, 1 all.

    One source token after the other is replaced by that of another prompt (``other``, or a derangement of the batch
    drawn with ``seed``). The model's output at the source's targets then changes by d; under the knock-out, by the same
    replacement, by d′. The result is Σ d′² / Σ d² over sources, targets and outputs, with its bootstrap interval over
    the prompts that have a pair; it is above 1 where the closed ways had cancelled the open ones. With ``metric`` d is
    the change of that number instead. At a pair (t, t) much is left, since a token's residual stream is not a way
    between tokens. Two runs, and two more for each distinct source.

    Raises :class:`BadArgument` where the sources have no effect on their targets to begin with.
    """
    readable(model, x)
    stats.valid(n_boot, level)
    edits = knock_out(model, pairs, layers, inside)
    size, length = x.shape[0], x.shape[1]
    if other is None:
        swapped = x[derangement(size, seed, "left puts another prompt's tokens in (or those of other=)")]
    else:
        swapped = readable(model, other, "other")
    mask = _Chosen(pairs).mask(size, length).expand(size, -1, -1).to(x.device)
    if swapped.shape != x.shape:
        raise BadArgument(f"other prompts {tuple(swapped.shape)}, these {tuple(x.shape)}: give one shape")
    remaining, whole = (torch.zeros(size, dtype=torch.float64, device=x.device) for _ in range(2))
    with torch.no_grad(), one_arithmetic(model):

        def change(tokens: Tensor, base: Tensor, targets: Tensor) -> Tensor:
            output = model(tokens)
            if metric is not None:
                return (one_number(metric, output, size) - one_number(metric, base, size)).double().square()
            return ((output - base).double().square().flatten(2).sum(2) * targets).sum(1)

        base = model(x)
        with hooks.edit(model, edits):
            base_out = model(x)
        for source in followed(mask.any(2).any(0).nonzero().reshape(-1).tolist(), "left"):
            targets = mask[:, source]
            tokens = x.clone()
            tokens[targets.any(1), source] = swapped[targets.any(1), source]
            whole += change(tokens, base, targets)
            with hooks.edit(model, edits):
                remaining += change(tokens, base_out, targets)
    if not bool(whole.any()):
        raise BadArgument("the sources do not change what is read at their targets: there is nothing to knock out")
    paired = mask.any(2).any(1)
    return stats.ratio(remaining[paired], whole[paired], n_boot=n_boot, level=level, seed=seed)


def through_taps(
    x_in: Float[Tensor, "batch pos d_inner"], weight: Float[Tensor, "d_inner 1 taps"], mask: Mask
) -> Float[Tensor, "batch pos d_inner"]:
    """What each target's convolution output has of its sources in ``mask``: Σ_s weight[:, t − s] x_in_s."""
    taps, length = weight.shape[-1], x_in.shape[1]
    total = torch.zeros_like(x_in)
    for lag in range(min(taps, length)):
        seen = mask.diagonal(offset=lag, dim1=1, dim2=2)  # source s to target s + lag
        if bool(seen.any()):
            total[:, lag:] += weight[:, 0, taps - 1 - lag] * x_in[:, : length - lag] * seen[..., None]
    return total


class CutTaps:
    """Sees a layer's ``hook_x_in`` and takes chosen pairs out of its ``hook_x_pre``.

    ``mask(batch, length)`` says which, once the run shows how long it is.
    """

    def __init__(self, weight: Tensor, mask: Any) -> None:
        self.weight, self.mask = weight.detach(), mask

    def see(self, x_in: Tensor) -> Tensor:
        """``x_in`` as it is."""
        self.x_in = x_in
        return x_in

    def subtract(self, x_pre: Tensor) -> Tensor:
        """``x_pre`` without the pairs."""
        mask = self.mask(*self.x_in.shape[:2]).to(x_pre.device)
        return x_pre - through_taps(self.x_in, self.weight, mask)


class _Scan:
    """Sees what one layer's recurrence is made of and takes chosen pairs out of its ``hook_y``."""

    def __init__(self, model: Any, layer: int, chosen: _Chosen) -> None:
        self.stem, self.chosen = (stem := f"blocks.{layer}.mixer."), chosen
        self.forgets = FACTORS if stem + FACTORS in model.hook_dict else "hook_decay"
        self.kinds = [self.forgets, "hook_write"]
        # (states, C), or (states) where C is a weight: linear in the states.
        self.read: Callable[..., Tensor] | None = getattr(getattr(model.blocks[layer], "mixer", None), "read", None)
        if self.read is None or stem + "hook_C" in model.hook_dict:
            self.kinds.insert(0, "hook_C")
        _require(model, stem, (*self.kinds, "hook_y"))
        refuse_real_factors(model, stem, "knock_out()")
        self.parts: int = getattr(model.hook_dict[stem + "hook_write"], "parts", 1)
        self.state = model.hook_dict.get(stem + "hook_state")
        self.seen: dict[str, Tensor] = {}

    def edits(self) -> dict[str, Edit]:
        """In the order in which the sites fire."""
        looks = {self.stem + kind: _edit(partial(self.look, kind=kind)) for kind in self.kinds}
        return looks | {self.stem + "hook_y": _edit(self.subtract)}

    def look(self, tensor: Tensor, kind: str) -> Tensor:
        """``tensor`` as it is."""
        self.seen[kind] = tensor
        return tensor

    def subtract(self, y: Float[Tensor, "batch pos d_inner"]) -> Tensor:
        """``y`` without the pairs; what was seen of this run is let go."""
        seen, self.seen = self.seen, {}
        forgets, write = self._as_run(seen[self.forgets], seen["hook_write"])
        mask = self.chosen.mask(*y.shape[:2]).to(y.device)
        carry = _from_every_earlier if _every_later(mask) else _carried
        at = mask.any(1).any(0).nonzero()[:, 0]
        carried = write.new_zeros(write.shape[0], len(at), *write.shape[2:])
        with progress(len(at), "knock_out") as tick:
            for row, (t, what) in enumerate(carry(forgets, write, mask, self._advance)):
                assert t == at[row]
                carried[:, row] = what
                tick()
        C = seen.get("hook_C")
        return y.index_add(1, at, self._read(carried, None if C is None else C[:, at]).to(y.dtype), alpha=-1)

    def _as_run(self, forgets: Tensor, write: Tensor) -> tuple[Tensor, Tensor]:
        """With the edits of the state that come after both sites have fired."""
        edits: Sequence[StateEdit] = () if self.state is None else state_edits(self.state)
        for edit in edits:
            if not edit.folds:
                raise BadArgument(
                    f"{edit.edit.label} at {edit.site} does not fold into {self.forgets} and hook_write, so that "
                    "knock_out cannot follow it: use a factor and an offset (scale, add, set_to, do_state, freeze)"
                )
            forgets, write = edit.folded(forgets, write)
        return forgets, write

    def _advance(self, forgets: Tensor, carried: Tensor) -> Tensor:
        """What is left of ``carried`` one token later."""
        if self.forgets == "hook_decay":
            return _times(forgets, carried) if self.parts == 2 else _no_nan(forgets, carried)
        a, u, q = forgets.unbind(-2)
        return _times(a, carried) + _no_nan(u, _no_nan(q, carried).sum(-1, keepdim=True))

    def _read(self, states: Tensor, C: Tensor | None) -> Tensor:
        if C is None:
            assert self.read is not None  # else hook_C was required
            return self.read(states)
        if self.read is not None:
            return self.read(states, C)
        return exact(partial(torch.einsum, "bldn,bln->bld"), states, C)


def _carried(
    forgets: Tensor,
    write: Float[Tensor, "batch pos d_inner n"],
    mask: Mask,
    advance: Callable[[Tensor, Tensor], Tensor],
) -> Iterator[tuple[int, Float[Tensor, "batch d_inner n"]]]:
    """(t, what is left in h_t of the writes of t's sources in ``mask``) for every target t, in order.

    One running sum serves all sources that have the same targets ahead, so every source to every later target is one
    scan. Decays are multiplied one after the other: they may be 0, and a quotient of products would not do.
    """
    sums: list[tuple[Tensor, Tensor]] = []  # the targets ahead (prompts, pos), and the sum (batch, d_inner, n)
    sources, targets = mask.any(2).any(0).tolist(), mask.any(1).any(0).tolist()
    at = torch.arange(write.shape[1], device=mask.device)
    for t in range(write.shape[1]):
        sums = [(ahead, advance(forgets[:, t], carried)) for ahead, carried in sums]
        if targets[t]:
            own = torch.where(mask[:, t, t, None, None], write[:, t], 0)
            yield t, sum((torch.where(ahead[:, t, None, None], carried, 0) for ahead, carried in sums), own)
            sums = [(ahead & (at > t), carried) for ahead, carried in sums]
            sums = [(ahead, carried) for ahead, carried in sums if bool(ahead.any())]
        if sources[t]:
            _join(sums, mask[:, t] & (at > t), write[:, t])


def _every_later(mask: Mask) -> bool:
    """Whether each source that there is has every later position as its target, and none has itself."""
    at = torch.arange(mask.shape[1], device=mask.device)
    return bool((mask == mask.any(2, keepdim=True) & (at > at[:, None])).all())


def _from_every_earlier(
    forgets: Tensor,
    write: Float[Tensor, "batch pos d_inner n"],
    mask: Mask,
    advance: Callable[[Tensor, Tensor], Tensor],
) -> Iterator[tuple[int, Float[Tensor, "batch d_inner n"]]]:
    """What :func:`_carried` gives where :func:`_every_later` holds: one running sum, from the first target on."""
    source = mask.any(2)
    written = torch.where(source[..., None, None], write, 0)
    carried = torch.zeros_like(write[:, 0])
    first = min(source.any(0).nonzero()[:, 0].tolist(), default=write.shape[1])
    for t in range(first + 1, write.shape[1]):
        carried = advance(forgets[:, t], carried + written[:, t - 1])
        yield t, carried


def _join(sums: list[tuple[Tensor, Tensor]], ahead: Tensor, write: Tensor) -> None:
    """Add a source's write to the sum with the same targets ahead (in each prompt: the same, or none), or begin one."""
    active = ahead.any(1)
    if not bool(active.any()):
        return
    for i, (others, carried) in enumerate(sums):
        used = others.any(1)
        if bool(((others == ahead).all(1) | ~used | ~active).all()):
            # What a prompt's targets have all read may still be there.
            kept = torch.where(used[:, None, None], carried, 0)
            sums[i] = (others | ahead, kept + torch.where(active[:, None, None], write, 0))
            return
    sums.append((ahead, write))


def _no_nan(factor: Tensor, value: Tensor) -> Tensor:
    """Their product, 0 where the factor is 0: nothing of the past arrives, not even the NaN of 0 · inf."""
    return torch.where(factor == 0, 0, factor * value)


def _times(z: Tensor, w: Tensor) -> Tensor:
    """The complex product of two pairs (real parts, then imaginary parts, on the last axis)."""
    (a, b), (p, q) = z.chunk(2, dim=-1), w.chunk(2, dim=-1)
    return torch.cat([_no_nan(a, p) - _no_nan(b, q), _no_nan(a, q) + _no_nan(b, p)], dim=-1)


class _Chosen:
    """The pairs as they were given, and as a mask once a run shows its length."""

    def __init__(self, pairs: Pairs) -> None:
        self.given: Tensor | list[tuple[int, int]]
        if isinstance(pairs, Tensor):
            if pairs.dtype != torch.bool or pairs.ndim not in (2, 3) or pairs.shape[-1] != pairs.shape[-2]:
                raise BadArgument(
                    f"a mask of pairs is bool, (pos, pos) or (batch, pos, pos), not {pairs.dtype} {tuple(pairs.shape)}"
                )
            self.given = pairs.detach().cpu() if pairs.ndim == 3 else pairs.detach().cpu()[None]
            _refuse_backward(self.given)
            return
        pairs = listed("pairs", pairs) if not isinstance(pairs, Iterator) else list(pairs)
        if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
            raise BadArgument(f"pairs is {told(pairs)}: give (source, target) positions, or a mask")
        self.given = [(whole_number("source", s, 0), whole_number("target", t, 0)) for s, t in pairs]
        if not self.given:
            raise BadArgument("no pair to knock out: give (source, target) positions, or a mask")
        for source, target in self.given:
            if source > target:
                raise BadArgument(f"({source}, {target}): nothing flows from a token to an earlier one")

    def mask(self, batch: int, length: int) -> Mask:
        """(1 or batch, length, length)."""
        if isinstance(self.given, Tensor):
            if self.given.shape[0] not in (1, batch) or self.given.shape[-1] != length:
                raise BadArgument(
                    f"the mask of pairs is {tuple(self.given.shape)}, the run has {batch} prompts of {length} tokens"
                )
            return self.given
        last = max(target for _, target in self.given)
        if last >= length:
            raise BadArgument(f"there is no position {last}: the run has {length} tokens")
        mask = torch.zeros(1, length, length, dtype=torch.bool, device="cpu")
        mask[0, [s for s, _ in self.given], [t for _, t in self.given]] = True
        return mask


def _refuse_backward(mask: Tensor) -> None:
    found = mask.tril(diagonal=-1).nonzero()
    if len(found):
        _, source, target = found[0].tolist()
        raise BadArgument(f"({source}, {target}) in the mask: nothing flows from a token to an earlier one")


def _which(given: Any, length: int, what: str) -> Bool[Tensor, "prompts pos"]:
    try:
        values = torch.as_tensor(given, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise BadArgument(f"{what}s is {told(given)}: give positions, or a mask") from None
    if values.dtype == torch.bool:
        if values.ndim > 2 or values.shape[-1] != length:
            raise BadArgument(
                f"a mask of {what}s is (pos,) or (batch, pos) with pos {length}, not {tuple(values.shape)}"
            )
        return values.reshape(-1, length)
    chosen = torch.zeros(1, length, dtype=torch.bool, device="cpu")
    for position in values.reshape(-1).tolist():
        chosen[0, whole_number(what, position, -length, length - 1)] = True
    return chosen


def _layers(model: Any, layers: int | Sequence[int] | None) -> list[int]:
    points(model)
    count = len(model.blocks)
    asked = range(count) if layers is None else listed("layers", layers)
    return [whole_number("layer", layer, 0, count - 1) for layer in asked]


def _require(model: Any, stem: str, kinds: Sequence[str]) -> None:
    missing = [kind for kind in kinds if stem + kind not in model.hook_dict]
    if missing:
        raise BadArgument(
            f"{stem.rstrip('.')} has no {', '.join(missing)}: knock_out acts inside a recurrence "
            "(in softmax attention edit hook_pattern); hooks.show(model) lists what there is"
        )


def _edit(function: Callable[[Tensor], Tensor]) -> Edit:
    """``function`` of the site's own tensor, not of a copy: the 4-D ones are large and only looked at."""
    return Edit("knock_out()", lambda region, whole, site: function(whole))


def has_taps(model: Any) -> bool:
    """Whether the model's recurrences see their input through a convolution."""
    return all(hasattr(block.mixer, "conv1d") for block in model.blocks)
