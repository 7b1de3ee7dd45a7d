"""Edits: pure functions from a site's tensor to the tensor that takes its place.

Each is made by calling (``zero()``, ``scale(.5)``, ``mean(over="batch")`` …) and takes ``pos=`` and
``channels=`` to act on part of the site only (``channels`` counts heads where a site has them, else along the axis
after position; where a site has no position, along the axis after batch). Used through
``hooks.edit(model, {pattern: edit})``; calling one on a tensor works too: ``zero(pos=0)(delta)``.

On ``hook_state`` an edit propagates (``hooks/propagate.py``): h_t is replaced and the recurrence goes on from there. A
plain function is there called at each position by itself, with (batch, 1, d_inner, d_state).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hooks.errors import BadArgument, told
from hooks.transforms import active
from hooks.vocabulary import kind_of

Index = int | slice | Sequence[int] | Tensor | None
# (values of the chosen region, the whole tensor, the site's name) -> new values, broadcastable to the region
Change = Callable[[Tensor, Tensor, str], Tensor]
# (the site's name, the site's shape or None while it is not known) -> (m, c) of h <- m h + c
Affine = Callable[[str, tuple[int, ...] | None], tuple[float | Tensor, float | Tensor]]


@dataclass(frozen=True)
class Edit:
    """One edit: what it is called, what it does to a region, and where the region is."""

    label: str
    change: Change = field(repr=False)
    affine: Affine | None = field(default=None, repr=False)
    pos: Index = None
    channels: Index = None
    across_positions: bool = field(default=False, repr=False)
    prompts: Tensor | None = field(default=None, repr=False)
    bind: Callable[[Mapping[str, Tensor]], Edit] | None = field(default=None, repr=False)
    given: str = field(default="", repr=False)
    # the edit at other positions, where ``change`` knows of them
    moved: Callable[[Index], Edit] | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        """As it is called, a tensor by its shape: ``set_to(a Tensor of shape (8, 1, 16) and float32, pos=[7])``."""
        where = [f"{name}={told(at)}" for name in ("pos", "channels") if (at := getattr(self, name)) is not None]
        name, _, rest = self.label.partition("(")
        return f"{name}({', '.join(filter(None, (rest.removesuffix(')'), self.given, *where)))})"

    def __call__(self, tensor: Tensor, site: str = "the tensor") -> Tensor:
        """``tensor`` with the region replaced; the input is never written to."""
        if self.pos is None and self.channels is None:
            return _conform(self.change(tensor, tensor, site), tensor, site, self.label)
        at, columns = _axes(site)
        chosen = {columns: indices(self.channels, tensor.shape[columns], "channels", site)}
        if at is not None:
            chosen[at] = indices(self.pos, tensor.shape[at], "pos", site)
        elif self.pos is not None:
            raise BadArgument(f"{self.label} at {site} takes no pos=: this site has no position axis")
        region = tensor
        picks = [chosen[axis] for axis in sorted(chosen)]  # of axes 1 and 2, or of axis 1 alone
        for axis, index in enumerate(picks, start=1):
            region = region.index_select(axis, index.to(tensor.device))
        new = _conform(self.change(region, tensor, site), region, site, self.label)
        # Not in place: under vmap ``new`` may stand for many, and ``tensor`` not. The batch, which is whole, goes last.
        last, place = len(picks), torch.meshgrid(*picks, indexing="ij")
        return tensor.movedim(0, last).index_put(place, new.movedim(0, last)).movedim(last, 0)

    @property
    def at_positions(self) -> bool:
        """Whether ``pos`` picks some positions and not all."""
        return self.pos is not None and not (isinstance(self.pos, slice) and self.pos == slice(None))

    def within(self, start: int, length: int, site: str) -> Edit | None:
        """This edit, whose ``pos`` counts a whole sequence, for a run over the tokens from ``start`` to ``start`` +
        ``length``; None where it touches none of them. A value for each position is cut to those that are there.

        Raises :class:`BadArgument` for positions counted from the end and for a mean over positions: neither is known
        before the sequence has ended.
        """
        if not self.at_positions:
            return self
        known = start + length
        if isinstance(self.pos, slice):
            ends: list[int] = [part for part in (self.pos.start, self.pos.stop, self.pos.step) if part is not None]
            counted = list(range(known)[self.pos])
        else:
            # Only the largest position counts here, so that all may lie ahead.
            chosen = torch.as_tensor(self.pos, device="cpu").reshape(-1)
            size = (
                len(chosen) if chosen.dtype == torch.bool else max(known, 1 + int(chosen.max()) if len(chosen) else 0)
            )
            ends = [] if chosen.dtype == torch.bool else chosen.long().tolist()
            counted = indices(self.pos, size, "pos", site).tolist()
        if any(end < 0 for end in ends):
            raise BadArgument(f"{self.label} at {site}: positions of a sequence count from its first token, 0, 1, …")
        if self.across_positions:
            raise BadArgument(f"{self.label} at {site} is over positions, and a run sees a part of the sequence only")
        rows = [row for row, p in enumerate(counted) if start <= p < known]
        if not rows:
            return None
        local = [counted[row] - start for row in rows]
        if self.affine is None:
            return replace(self, pos=local) if self.moved is None else self.moved(local)
        affine = self.affine

        def operands(at: str, shape: tuple[int, ...] | None) -> tuple[float | Tensor, float | Tensor]:
            m, c = affine(at, None)
            axes = 4 if shape is None else len(shape)
            return _rows(m, rows, len(counted), axes, at), _rows(c, rows, len(counted), axes, at)

        def change(region: Tensor, whole: Tensor, at: str) -> Tensor:
            return affine_map(region, *operands(at, tuple(region.shape)))

        return replace(self, pos=local, change=change, affine=operands)

    def positions(self, length: int, site: str) -> list[int]:
        """The positions that the edit touches in a prompt of ``length`` tokens, in the order given."""
        # One by one: inside a transform of torch.func torch 2.6 has no tolist.
        return [int(place) for place in indices(self.pos, length, "pos", site)]


def _rows(value: float | Tensor, rows: list[int], count: int, axes: int, site: str) -> float | Tensor:
    """``value``, which broadcasts to a region of ``axes`` axes and ``count`` positions, at ``rows`` of these."""
    at = _axes(site)[0]
    axis = -1 if at is None or not isinstance(value, Tensor) else value.ndim - axes + at
    if axis < 0 or not isinstance(value, Tensor) or value.shape[axis] == 1:
        return value
    if value.shape[axis] != count:
        raise BadArgument(f"the value for {site} has {value.shape[axis]} positions, and pos= picks {count}")
    return value.index_select(axis, torch.tensor(rows, device=value.device))


def indices(chosen: Index, size: int, what: str, site: str) -> Tensor:
    """``chosen`` (integers, a slice, a mask, None for all) as places in ``size``, none of them twice.

    Raises :class:`BadArgument` for anything else; ``what`` is the argument's name and ``site`` what is picked from.
    """
    if chosen is None:
        return torch.arange(size, device="cpu")
    if isinstance(chosen, slice):
        found = torch.tensor(range(size)[chosen], dtype=torch.long, device="cpu")
    else:
        try:
            found = torch.as_tensor(chosen, device="cpu").reshape(-1)
        except (TypeError, ValueError, RuntimeError) as error:
            raise BadArgument(f"{what}={told(chosen)} for {site}: give integers, a slice or a mask") from error
        if len(found) and (found.is_floating_point() or found.is_complex()):
            raise BadArgument(f"{what}={told(chosen)} for {site}: indices are integers or a mask")
        if found.dtype == torch.bool:
            if len(found) != size:
                raise BadArgument(f"{what}: a mask of {len(found)} entries for {site}, which has {size}")
            found = found.nonzero().reshape(-1)
        found = found.long()
        if len(found) and (int(found.max()) >= size or int(found.min()) < -size):
            raise BadArgument(f"{what}={told(chosen)} is outside {site}, which has {size}")
        found = found % size if size else found
    if len(found) == 0:
        raise BadArgument(f"{what}={told(chosen)} picks nothing of the {size} of {site}")
    if len(found.unique()) < len(found):
        raise BadArgument(f"{what}={told(chosen)} picks the same entry of {site} twice")
    return found


def _axes(site: str) -> tuple[int | None, int]:
    """The position axis of ``site`` (None where it has none) and its channel axis."""
    row = kind_of(site)
    return (1, 2) if row is None else (row.pos_dim, row.channel_dim)


def position_axis(site: str) -> int | None:
    """The axis of ``site`` that counts positions; None where it has none."""
    return _axes(site)[0]


def _conform(new: Any, like: Tensor, site: str, label: str) -> Tensor:
    if not isinstance(new, Tensor):
        raise BadArgument(f"{label} at {site} returned {type(new).__name__}: an edit returns the new tensor")
    if new.ndim > like.ndim or any(
        a not in (1, b) for a, b in zip(reversed(new.shape), reversed(like.shape), strict=False)
    ):
        raise BadArgument(f"{label} at {site}: shape {tuple(new.shape)} does not fit the region {tuple(like.shape)}")
    new = new.to(device=like.device, dtype=like.dtype)
    # Memory of its own after a broadcast: a later hook may write into what it is given.
    return new if new.shape == like.shape else new.expand(like.shape).contiguous()


def region_of(values: Tensor, pos: Index, channels: Index, site: str) -> Tensor:
    """The chosen part of ``values``; an axis that was averaged away (size 1) stays as it is."""
    at, columns = _axes(site)
    for axis, chosen, what in ((at, pos, "pos"), (columns, channels, "channels")):
        if axis is not None and values.shape[axis] != 1:
            index = indices(chosen, values.shape[axis], what, site)
            values = values.index_select(axis, index.to(values.device))
    return values


def _affine_edit(
    label: str, m: float | Tensor, c: float | Tensor, pos: Index, channels: Index, given: object = None
) -> Edit:
    m, c = (_numbers(part, label) for part in (m, c))

    def change(region: Tensor, whole: Tensor, site: str) -> Tensor:
        return affine_map(region, m, c)

    words = "" if given is None else told(given)
    return Edit(label, change, lambda site, shape: (m, c), pos, channels, given=words)


def _numbers(value: Any, label: str) -> float | Tensor:
    """``value``, if it is a number or a tensor or can be made one; else :class:`BadArgument`."""
    if isinstance(value, int | float | Tensor):
        return value
    try:
        return torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise BadArgument(f"{label} takes a number or a tensor, not {told(value)}") from None


def affine_map(values: Tensor, m: float | Tensor, c: float | Tensor) -> Tensor:
    """m · values + c, where m = 0 gives exactly c (0 · inf is nan)."""
    # A factor that somebody differentiates by, or that stands for many, is not known by its numbers.
    known = not (isinstance(m, Tensor) and (m.requires_grad or active()))
    m = torch.as_tensor(m, dtype=values.dtype, device=values.device)
    c = torch.as_tensor(c, dtype=values.dtype, device=values.device)
    for part in (m, c):
        if part.ndim > values.ndim:
            raise BadArgument(f"a value of shape {tuple(part.shape)} does not fit the region {tuple(values.shape)}")
    try:
        if known and bool((m == 0).all()):
            return c.expand(values.shape).clone()
        if known and bool((m == 1).all()):
            return values + c
        # Only what is not finite is hidden from a factor of 0: its slope by the factor is the value.
        hidden = (m == 0) & ~values.isfinite()
        return torch.where(hidden, values.new_zeros(()), values) * m + c
    except RuntimeError as error:
        shapes = f"{tuple(m.shape)}, {tuple(c.shape)}"
        raise BadArgument(f"values of shape {shapes} do not fit the region {tuple(values.shape)}") from error


def zero(*, pos: Index = None, channels: Index = None) -> Edit:
    """Zeros. (Δ = 0 means: forget nothing, write nothing. The pre-softplus 0 would mean Δ = ln 2.)"""
    return _affine_edit("zero()", 0.0, 0.0, pos, channels)


def scale(factor: float | Tensor, *, pos: Index = None, channels: Index = None) -> Edit:
    """``factor`` times the value; a tensor factor broadcasts to the region."""
    return _affine_edit("scale()", factor, 0.0, pos, channels, factor)


def add(value: float | Tensor, *, pos: Index = None, channels: Index = None) -> Edit:
    """The value plus ``value`` (a direction, a steering vector, noise); broadcasts to the region."""
    return _affine_edit("add()", 1.0, value, pos, channels, value)


def set_to(value: float | Tensor, *, pos: Index = None, channels: Index = None) -> Edit:
    """``value`` in place of the region; broadcasts to (batch, len(pos), len(channels), …)."""
    return _affine_edit("set_to()", 0.0, value, pos, channels, value)


def mean(
    over: str | Sequence[str] = "batch",
    *,
    kinds: Tensor | Sequence[int] | None = None,
    reference: Tensor | Mapping[str, Tensor] | None = None,
    pos: Index = None,
    channels: Index = None,
) -> Edit:
    """The mean over the named axes: any of ``"batch"``, ``"pos"``, ``"kind"``, ``"channel"``.

    ``"kind"`` means over the positions of each token kind apart, and needs ``kinds`` (one integer for each position;
    0 for x tokens and 1 for y tokens, say). So one value per channel is ``over=("batch", "pos")``; a schedule without
    content is ``over="batch"``; one value for x and one for y is ``over=("batch", "kind")``. The mean is that of the
    whole site, also where ``pos`` or ``channels`` pick the part that it replaces.

    ``reference`` says whose mean it is: None for this batch itself, a tensor of other prompts (the model runs on them,
    unedited, when the edit begins), or a record of such a run. A mean of a reference is a constant; it carries no
    gradient. Raises :class:`BadArgument` for an unknown axis, missing or needless kinds, a reference of another length
    where positions are kept, and means over one value each, which would change nothing.
    """
    known = ("batch", "pos", "kind", "channel")
    axes = (over,) if isinstance(over, str) else over if isinstance(over, list | tuple | set) else (None,)
    for axis in axes:
        if not isinstance(axis, str) or axis not in known:
            wrong = told(over if axis is None else axis)
            raise BadArgument(f"mean(over={wrong}): an axis is one of {', '.join(known)}")
    axes = tuple(axes)
    if not axes:
        raise BadArgument(f"mean(over=()) is the value itself: name one of {', '.join(known)}")
    if ("kind" in axes) != (kinds is not None) or {"pos", "kind"} <= set(axes):
        raise BadArgument('mean(over="kind") needs kinds=, one integer for each position, and excludes "pos"')
    label = f"mean(over={axes})"
    kind_index = None if kinds is None else torch.as_tensor(_numbers(kinds, "kinds="), device="cpu").reshape(-1).long()
    if not (reference is None or isinstance(reference, Tensor | Mapping)):
        raise BadArgument(f"{label}: reference is prompts or a record of them, not {told(reference)}")

    def averaged(whole: Tensor, site: str) -> Tensor:
        at, columns = _axes(site)
        if at is None and {"pos", "kind"} & set(axes):
            raise BadArgument(f"{label}: {site} has no position axis")
        out = whole
        if "batch" in axes:
            out = out.mean(0, keepdim=True)
        if "channel" in axes:
            out = out.mean(columns, keepdim=True)
        if "pos" in axes:
            out = out.mean(at, keepdim=True)
        if kind_index is not None and at is not None:
            if len(kind_index) != out.shape[at]:
                raise BadArgument(f"kinds has {len(kind_index)} entries, {site} has {out.shape[at]} positions")
            for kind in kind_index.unique():
                here = (kind_index == kind).nonzero().reshape(-1).to(out.device)
                values = out.index_select(at, here)
                out = out.index_copy(at, here, values.mean(at, keepdim=True).expand_as(values))
        return out

    def of(values: Mapping[str, Tensor] | None) -> Edit:
        if values is None:
            across = bool({"pos", "kind"} & set(axes))
            return Edit(label, own, None, pos, channels, across, moved=moved)
        known_values = values

        def constant(site: str, shape: tuple[int, ...] | None) -> tuple[float, Tensor]:
            if site not in known_values:
                raise BadArgument(f"the reference holds no {site}: record the sites that are edited")
            value = averaged(known_values[site], site).detach()
            reduced = {i for i, axis in zip(_axes(site), ("pos", "channel"), strict=True) if axis in axes}
            kept = [i for i in range(1, value.ndim) if i not in reduced]
            if shape is not None and any(value.shape[i] != shape[i] for i in kept):
                raise BadArgument(
                    f"{label} at {site}: the reference's is {tuple(value.shape)}, this run's is {shape}: "
                    "give reference prompts of the same length"
                )
            return 0.0, region_of(value, pos, channels, site)

        def change(region: Tensor, whole: Tensor, site: str) -> Tensor:
            return affine_map(region, *constant(site, tuple(whole.shape)))

        return Edit(label, change, constant, pos, channels)

    def own(region: Tensor, whole: Tensor, site: str) -> Tensor:
        at, columns = _axes(site)
        sizes = {"batch": whole.shape[0], "pos": whole.shape[at or 1], "channel": whole.shape[columns]}
        repeats = kind_index is not None and len(kind_index.unique()) < len(kind_index)
        new = averaged(whole, site)
        if not repeats and all(sizes.get(axis, 1) == 1 for axis in axes):
            raise BadArgument(f"{label} at {site}: each mean is over one value and changes nothing; use reference=")
        return region_of(new, pos, channels, site)

    def moved(to: Index) -> Edit:
        return mean(over, kinds=kinds, pos=to, channels=channels)

    def unbound(region: Tensor, whole: Tensor, site: str) -> Tensor:
        raise BadArgument(
            f"{label} has reference prompts, which hooks.edit runs: use it there, or give a record of them"
        )

    if isinstance(reference, Tensor):
        return Edit(label, unbound, None, pos, channels, prompts=reference, bind=of)
    return of(reference)


def resample(
    *, source: Mapping[str, Tensor] | None = None, seed: int = 0, pos: Index = None, channels: Index = None
) -> Edit:
    """The value of another prompt at the same position.

    Without ``source`` the batch is permuted so that no prompt keeps its own value; the permutation depends on ``seed``
    and the batch size alone, so that all sites of one edit take the same other prompt. ``source`` is a record
    of other prompts, in this batch's shape. Raises :class:`BadArgument` for a batch of one, or a source of another
    shape.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise BadArgument(f"resample(seed={told(seed)}): give a whole number")
    if not (source is None or isinstance(source, Mapping)):
        raise BadArgument(f"resample(source=…) is a record of other prompts, not {told(source)}")
    if source is None:

        def permute(region: Tensor, whole: Tensor, site: str) -> Tensor:
            return region[derangement(whole.shape[0], seed).to(region.device)]

        return Edit(f"resample({f'seed={seed}' if seed else ''})", permute, None, pos, channels)
    values = source

    def constant(site: str, shape: tuple[int, ...] | None) -> tuple[float, Tensor]:
        if site not in values:
            raise BadArgument(f"resample(source=…) holds no {site}: record the sites that are edited")
        if shape is not None and tuple(values[site].shape) != shape:
            raise BadArgument(
                f"resample() at {site}: the source's is {tuple(values[site].shape)}, this run's is {shape}"
            )
        return 0.0, region_of(values[site], pos, channels, site)

    def change(region: Tensor, whole: Tensor, site: str) -> Tensor:
        return affine_map(region, *constant(site, tuple(whole.shape)))

    return Edit("resample(source=…)", change, constant, pos, channels)


def derangement(size: int, seed: int = 0, asks: str = "resample() takes another prompt's value") -> Tensor:
    """A permutation of ``size`` indices without a fixed point: a shuffled cycle, the same for the same seed.

    Raises :class:`BadArgument` for fewer than two; ``asks`` says what the other prompt is for.
    """
    if size < 2:
        raise BadArgument(f"{asks} and this batch has one prompt: give it more")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed), device="cpu")
    result = torch.empty_like(order)
    result[order] = order.roll(1)
    return result


@dataclass(frozen=True)
class Freeze(Edit):
    """decay 1, write 0 at the chosen positions; see :func:`freeze`."""

    __repr__ = Edit.__repr__


def freeze(*, pos: Index = None, channels: Index = None) -> Edit:
    """Chosen tokens neither written nor forgotten in a recurrence: decay 1 and write 0, so h_t = h_{t−1}.

    For ``hook_state``. The token's share through later tokens' convolution taps stays.
    """

    def change(region: Tensor, whole: Tensor, site: str) -> Tensor:
        raise BadArgument(f"freeze() is an edit of hook_state, not of {site}")

    return Freeze("freeze()", change, None, pos, channels)


@dataclass(frozen=True)
class DoState:
    """h_t := value in the layers that ``layer`` picks; made by :func:`do_state`."""

    layer: int | Sequence[int]
    edit: Edit

    def __repr__(self) -> str:
        return f"do_state(layer={told(self.layer)}, {self.edit!r})"

    def as_patterns(self) -> dict[str, Edit]:
        """The same as ``{pattern: edit}``."""
        layers = list(self.layer) if isinstance(self.layer, Sequence) else [self.layer]
        if not all(isinstance(layer, int) for layer in layers):
            raise BadArgument(f"do_state(layer={told(self.layer)}): give the number of a layer, or several")
        return {f"blocks.{layer}.mixer.hook_state": self.edit for layer in layers}


def do_state(
    layer: int | Sequence[int], pos: int | Sequence[int], value: Tensor | float, channels: Index = None
) -> DoState:
    """do(h_t := value): exactly decay_t := 0 and write_t := value, so everything after t follows from it.

    ``value`` broadcasts to (batch, len(pos), d_inner, d_state). Doing it twice is doing it once.
    """
    return DoState(layer, set_to(value, pos=pos, channels=channels))


def as_edit(given: Any, site: str) -> Edit:
    """``given`` as an :class:`Edit`: itself, or a plain ``tensor -> tensor`` function wrapped."""
    if isinstance(given, Edit):
        return given
    if callable(given):
        name = getattr(given, "__name__", type(given).__name__)
        if any(given is maker for maker in _MAKERS):
            raise BadArgument(f"{name} for {site} is a function that makes an edit: call it, {name}(…)")
        # A copy, so that a function that writes into what it is given changes this site and nothing that shares memory.
        return Edit(name, lambda region, whole, at: given(region.clone()))
    raise BadArgument(
        f"the edit for {site} is {type(given).__name__}: give hooks.zero(), hooks.scale(…) … or a function"
    )


_MAKERS = (zero, scale, add, set_to, mean, resample, freeze, do_state)
