"""Edits: pure functions from a site's tensor to the tensor that takes its place.

Each is made by calling (``zero()``, ``scale(.5)``, ``mean(over="batch")`` …) and takes ``pos=`` and
``channels=`` to act on part of the site only (``channels`` counts along the axis after position). Used through
``hooks.edit(model, {pattern: edit})``; calling one on a tensor works too: ``zero(pos=0)(delta)``.

On ``hook_state`` an edit propagates: h_t is replaced and the recurrence goes on from there. Elementwise affine edits,
h ← m h + c, fold into the scan's own operands (decay ← m · decay, write ← m · write + c) and stay one
differentiable scan; the others interrupt the scan at the edited positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hooks.errors import BadArgument

Index = int | slice | Sequence[int] | Tensor | None
# (values of the chosen region, the whole tensor, the site's name) -> new values, broadcastable to the region
Change = Callable[[Tensor, Tensor, str], Tensor]
# the site's name -> (m, c) of h <- m h + c
Affine = Callable[[str], tuple[float | Tensor, float | Tensor]]


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

    def __call__(self, tensor: Tensor, site: str = "the tensor") -> Tensor:
        """``tensor`` with the region replaced; the input is never written to."""
        if self.pos is None and self.channels is None:
            return _conform(self.change(tensor, tensor, site), tensor, site, self.label)
        at = _indices(self.pos, tensor.shape[1], "pos", site)
        columns = _indices(self.channels, tensor.shape[2], "channels", site)
        region = tensor.index_select(1, at.to(tensor.device)).index_select(2, columns.to(tensor.device))
        new = _conform(self.change(region, tensor, site), region, site, self.label)
        result = tensor.clone()
        result[:, at[:, None], columns[None, :]] = new
        return result

    def positions(self, length: int, site: str) -> list[int]:
        """The positions that the edit touches in a prompt of ``length`` tokens, in the order given."""
        return _indices(self.pos, length, "pos", site).tolist()


def _indices(chosen: Index, size: int, what: str, site: str) -> Tensor:
    if chosen is None:
        return torch.arange(size)
    if isinstance(chosen, slice):
        found = torch.arange(size)[chosen]
    else:
        found = torch.as_tensor(chosen).reshape(-1)
        if found.dtype == torch.bool:
            if len(found) != size:
                raise BadArgument(f"{what}: a mask of {len(found)} entries for {site}, which has {size}")
            found = found.nonzero().reshape(-1)
        found = found.long()
        if len(found) and (int(found.max()) >= size or int(found.min()) < -size):
            raise BadArgument(f"{what}={chosen} is outside {site}, which has {size}")
        found = found % size if size else found
    if len(found) == 0:
        raise BadArgument(f"{what}={chosen} picks nothing of the {size} at {site}: nothing would be edited")
    return found


def _conform(new: Any, like: Tensor, site: str, label: str) -> Tensor:
    if not isinstance(new, Tensor):
        raise BadArgument(f"{label} at {site} returned {type(new).__name__}: an edit returns the new tensor")
    if new.ndim > like.ndim or any(
        a not in (1, b) for a, b in zip(reversed(new.shape), reversed(like.shape), strict=False)
    ):
        raise BadArgument(f"{label} at {site}: shape {tuple(new.shape)} does not fit the region {tuple(like.shape)}")
    return new.to(device=like.device, dtype=like.dtype).expand(like.shape)


def _region(values: Tensor, pos: Index, channels: Index, site: str) -> Tensor:
    """The chosen part of ``values``; an axis that was averaged away (size 1) stays as it is."""
    if values.shape[1] != 1:
        values = values.index_select(1, _indices(pos, values.shape[1], "pos", site).to(values.device))
    if values.shape[2] != 1:
        values = values.index_select(2, _indices(channels, values.shape[2], "channels", site).to(values.device))
    return values


def _affine_edit(
    label: str, m: float | Tensor, c: float | Tensor, pos: Index, channels: Index
) -> Edit:
    def change(region: Tensor, whole: Tensor, site: str) -> Tensor:
        return affine_map(region, m, c)

    return Edit(label, change, lambda site: (m, c), pos, channels)


def affine_map(values: Tensor, m: float | Tensor, c: float | Tensor) -> Tensor:
    """m · values + c, where m = 0 gives exactly c (0 · inf is nan)."""
    m = torch.as_tensor(m, dtype=values.dtype, device=values.device)
    c = torch.as_tensor(c, dtype=values.dtype, device=values.device)
    for part in (m, c):
        if part.ndim > values.ndim:
            raise BadArgument(f"a value of shape {tuple(part.shape)} does not fit the region {tuple(values.shape)}")
    try:
        if not m.requires_grad and bool((m == 0).all()):
            return c.expand(values.shape)
        if not m.requires_grad and bool((m == 1).all()):
            return values + c
        return torch.where(m == 0, torch.zeros((), dtype=values.dtype), values) * m + c
    except RuntimeError as error:
        shapes = f"{tuple(m.shape)}, {tuple(c.shape)}"
        raise BadArgument(f"values of shape {shapes} do not fit the region {tuple(values.shape)}") from error


def zero(*, pos: Index = None, channels: Index = None) -> Edit:
    """Zeros. (Δ = 0 means: forget nothing, write nothing. The pre-softplus 0 would mean Δ = ln 2.)"""
    return _affine_edit("zero()", 0.0, 0.0, pos, channels)


def scale(factor: float | Tensor, *, pos: Index = None, channels: Index = None) -> Edit:
    """``factor`` times the value; a tensor factor broadcasts to the region."""
    return _affine_edit("scale()", factor, 0.0, pos, channels)


def add(value: float | Tensor, *, pos: Index = None, channels: Index = None) -> Edit:
    """The value plus ``value`` (a direction, a steering vector, noise); broadcasts to the region."""
    return _affine_edit("add()", 1.0, value, pos, channels)


def set_to(value: float | Tensor, *, pos: Index = None, channels: Index = None) -> Edit:
    """``value`` in place of the region; broadcasts to (batch, len(pos), len(channels), …)."""
    return _affine_edit("set_to()", 0.0, value, pos, channels)


def mean(
    over: str | Sequence[str] = "batch",
    *,
    kinds: Tensor | Sequence[int] | None = None,
    reference: Tensor | Mapping[str, Tensor] | None = None,
    pos: Index = None,
    channels: Index = None,
) -> Edit:
    """The mean over the named axes: any of ``"batch"``, ``"pos"``, ``"kind"``, ``"channel"``.

    ``"kind"`` means over the positions of each token kind apart, and needs ``kinds`` (one integer for each position; 0 for
    x tokens and 1 for y tokens, say). So one value per channel is ``over=("batch", "pos")``; a schedule without
    content is ``over="batch"``; one value for x and one for y is ``over=("batch", "kind")``.

    ``reference`` says whose mean it is: None for this batch itself, a tensor of other prompts (the model runs on them,
    unedited, when the edit begins), or a record of such a run. A mean of a reference is a constant; it carries no
    gradient. Raises :class:`BadArgument` for an unknown axis, missing kinds, or a reference of another length
    where positions are kept.
    """
    axes = (over,) if isinstance(over, str) else tuple(over)
    known = ("batch", "pos", "kind", "channel")
    for axis in axes:
        if axis not in known:
            raise BadArgument(f'mean(over="{axis}"): an axis is one of {", ".join(known)}')
    if "kind" in axes and (kinds is None or "pos" in axes):
        raise BadArgument('mean(over="kind") needs kinds=, one integer for each position, and excludes "pos"')
    kind_index = None if kinds is None else torch.as_tensor(kinds).reshape(-1).long()
    label = f"mean(over={axes})"

    def averaged(whole: Tensor, site: str) -> Tensor:
        out = whole
        if "batch" in axes:
            out = out.mean(0, keepdim=True)
        if "channel" in axes:
            out = out.mean(2, keepdim=True)
        if "pos" in axes:
            out = out.mean(1, keepdim=True)
        if "kind" in axes:
            assert kind_index is not None
            if len(kind_index) != out.shape[1]:
                raise BadArgument(f"kinds has {len(kind_index)} entries, {site} has {out.shape[1]} positions")
            out = out.clone()
            for kind in kind_index.unique():
                here = (kind_index == kind).to(out.device)
                out[:, here] = out[:, here].mean(1, keepdim=True)
        return out

    def of(values: Mapping[str, Tensor] | None) -> Edit:
        if values is None:
            return Edit(label, own, None, pos, channels, across_positions=bool({"pos", "kind"} & set(axes)))
        known_values = values

        def constant(site: str) -> tuple[float, Tensor]:
            if site not in known_values:
                raise BadArgument(f"the reference holds no {site}: record the sites that are edited")
            return 0.0, _region(averaged(known_values[site], site).detach(), pos, channels, site)

        def change(region: Tensor, whole: Tensor, site: str) -> Tensor:
            return affine_map(region, *constant(site))

        return Edit(label, change, constant, pos, channels)

    def own(region: Tensor, whole: Tensor, site: str) -> Tensor:
        return _region(averaged(whole, site), pos, channels, site)

    if isinstance(reference, Tensor):
        return replace(of(None), prompts=reference, bind=of, across_positions=False)
    return of(reference)


def resample(
    *, source: Mapping[str, Tensor] | None = None, seed: int = 0, pos: Index = None, channels: Index = None
) -> Edit:
    """The value of another prompt at the same position.

    Without ``source`` the batch is permuted so that no prompt keeps its own value; the permutation depends on ``seed``
    and the batch size alone, so that all sites of one edit take the same other prompt. ``source`` is a record
    of other prompts, in this batch's shape. Raises :class:`BadArgument` for a batch of one.
    """

    if source is None:

        def permute(region: Tensor, whole: Tensor, site: str) -> Tensor:
            return region[derangement(whole.shape[0], seed).to(region.device)]

        return Edit("resample()", permute, None, pos, channels)
    values = source

    def constant(site: str) -> tuple[float, Tensor]:
        if site not in values:
            raise BadArgument(f"resample(source=…) holds no {site}: record the sites that are edited")
        return 0.0, _region(values[site], pos, channels, site)

    def change(region: Tensor, whole: Tensor, site: str) -> Tensor:
        return affine_map(region, *constant(site))

    return Edit("resample()", change, constant, pos, channels)


def derangement(size: int, seed: int = 0) -> Tensor:
    """A permutation of ``size`` indices without a fixed point: a shuffled cycle, the same for the same seed."""
    if size < 2:
        raise BadArgument("resample() takes another prompt's value and this batch has one prompt: give it more")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    result = torch.empty_like(order)
    result[order] = order.roll(1)
    return result


@dataclass(frozen=True)
class Freeze(Edit):
    """decay 1, write 0 at the chosen positions; see :func:`freeze`."""


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

    def as_patterns(self) -> dict[str, Edit]:
        """The same as ``{pattern: edit}``."""
        layers = [self.layer] if isinstance(self.layer, int) else list(self.layer)
        return {f"blocks.{layer}.mixer.hook_state": self.edit for layer in layers}


def do_state(layer: int | Sequence[int], pos: int | Sequence[int], value: Tensor | float, channels: Index = None) -> DoState:
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
        if name in _MAKERS:
            raise BadArgument(f"{name} for {site} is a function that makes an edit: call it, {name}(…)")
        return Edit(name, lambda region, whole, at: given(region))
    raise BadArgument(f"the edit for {site} is {type(given).__name__}: give hooks.zero(), hooks.scale(…) … or a function")


_MAKERS = {"zero", "scale", "add", "set_to", "mean", "resample", "freeze", "do_state"}
