"""``edit``: changes at chosen sites for the runs inside a ``with`` block; ``expose``: forces the materialised path."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hooks.edit import DoState, Edit, Freeze, affine_map, as_edit
from hooks.errors import BadArgument, DidNotFire
from hooks.point import why_silent
from hooks.record import record
from hooks.sites import Pattern, resolve

Edits = Mapping[Any, Any] | DoState | Sequence[Any]
SCAN_SITES = ("hook_decay", "hook_write", "hook_state")


class Edited:
    """What ``with hooks.edit(...) as edited`` gives: how often each site's edit has fired."""

    def __init__(self) -> None:
        self.fired: dict[str, int] = {}

    def __repr__(self) -> str:
        return "\n".join(f"{name}  edited {count} times" for name, count in self.fired.items())


@contextmanager
def edit(
    model: Any, edits: Edits, *, backward: Mapping[Any, Callable[[Tensor], Tensor]] | None = None, readout_only: bool = False
) -> Iterator[Edited]:
    """Inside the block every run of ``model`` has the edits made; ``edits`` is ``{pattern: edit}`` or ``do_state(…)``.

    An edit is one of ``hooks.zero() mean() scale() add() set_to() resample() freeze()`` or a function from tensor to tensor.
    On ``hook_state`` it propagates (see ``hooks/edit.py``); ``readout_only=True`` changes what is read out at that
    position and nothing later. ``backward={pattern: function}`` edits gradients. Edits of the same site act in the
    order in which they are given; nested blocks act from the outside in.

    Raises :class:`UnknownSite` before anything is changed, :class:`DidNotFire` on exit where an edit's site did not fire (never hiding
    an exception of the body), :class:`BadArgument` for an edit that does not fit its site. Nothing is left behind.
    """
    plan = [(name, as_edit(given, name)) for pattern, given in _pairs(edits) for name in resolve(model, pattern)]
    gradients = [(name, fn) for pattern, fn in (backward or {}).items() for name in resolve(model, pattern)]
    if not plan and not gradients:
        raise BadArgument("hooks.edit was given nothing to edit")
    plan = _bind(model, plan)
    edited = Edited()
    with ExitStack() as stack:
        chains: dict[str, list[Edit]] = {}
        for name, change in plan:
            edited.fired.setdefault(name, 0)
            if name.endswith("hook_state") and not readout_only:
                chains.setdefault(name, []).append(change)
            else:
                _hook(stack, model, name, partial(_apply, change=change, site=name, edited=edited))
        for name, chain in chains.items():
            _propagate(stack, model, name, chain, edited)
        for name, fn in gradients:
            edited.fired.setdefault(f"{name} (backward)", 0)
            _hook(stack, model, name, partial(_apply_backward, fn=fn, site=name, edited=edited), "bwd")
        yield edited
    silent = [name for name, count in edited.fired.items() if count == 0]
    if silent:
        backwards = [name for name in silent if name.endswith(" (backward)")]
        raise DidNotFire("the edit did nothing: " + why_silent(model, backwards or silent, "bwd" if backwards else "fwd"))


def _pairs(edits: Edits) -> list[tuple[Any, Any]]:
    if isinstance(edits, DoState):
        return list(edits.as_patterns().items())
    if isinstance(edits, Mapping):
        return list(edits.items())
    if isinstance(edits, Sequence) and not isinstance(edits, str):
        return [pair for entry in edits for pair in _pairs(entry)]
    raise BadArgument(f"edits are {{pattern: edit}}, do_state(…) or a list of those, not {type(edits).__name__}")


def _bind(model: Any, plan: list[tuple[str, Edit]]) -> list[tuple[str, Edit]]:
    """Run the model once for each set of reference prompts, and hand its values to the edits that asked for them."""
    groups: dict[int, tuple[Tensor, list[str]]] = {}
    for name, change in plan:
        if change.prompts is not None:
            groups.setdefault(id(change.prompts), (change.prompts, []))[1].append(name)
    records = {key: record(model, prompts, names) for key, (prompts, names) in groups.items()}
    return [
        (name, change if change.bind is None else change.bind(records[id(change.prompts)])) for name, change in plan
    ]


def _hook(stack: ExitStack, model: Any, name: str, fn: Callable[..., Any], direction: str = "fwd") -> None:
    point = model.hook_dict[name]
    handle = point.add_hook(fn, direction)
    listed = point.fwd_hooks if direction == "fwd" else point.bwd_hooks

    def remove() -> None:
        handle.hook.remove()
        listed[:] = [kept for kept in listed if kept is not handle]

    stack.callback(remove)


def _apply(tensor: Tensor, hook: Any, *, change: Edit, site: str, edited: Edited) -> Tensor:
    edited.fired[site] += 1
    return change(tensor, site)


def _apply_backward(tensor: Tensor, hook: Any, *, fn: Callable[[Tensor], Tensor], site: str, edited: Edited) -> Tensor:
    edited.fired[f"{site} (backward)"] += 1
    return as_edit(fn, site)(tensor, site)


def _propagate(stack: ExitStack, model: Any, name: str, chain: list[Edit], edited: Edited) -> None:
    """Edits of h: folded into decay and write where all are affine, else by interrupting the scan."""
    stem = name[: -len("hook_state")]
    point = model.hook_dict[name]
    for change in chain:
        if change.across_positions:
            raise BadArgument(
                f"{change.label} at {name} needs later states to make earlier ones: use reference= or readout_only=True"
            )
    folds = all(_folds(change, getattr(point, "parts", 1), name) for change in chain) and not point.interrupts
    if not folds and any(isinstance(change, Freeze) for change in chain):
        raise BadArgument(f"freeze() at {name} does not combine with an edit that interrupts the scan: nest two edits")
    if not folds:
        entry = partial(_interrupt, chain=chain, site=name, edited=edited)
        positions = partial(_all_positions, chain=chain, site=name)
        point.interrupts.append((positions, entry))
        stack.callback(point.interrupts.remove, (positions, entry))
        return
    for change in chain:
        _hook(stack, model, f"{stem}hook_decay", partial(_fold_decay, change=change, site=name))
        _hook(stack, model, f"{stem}hook_write", partial(_fold_write, change=change, site=name, edited=edited))


def _folds(change: Edit, parts: int, site: str) -> bool:
    if isinstance(change, Freeze):
        return True
    if change.affine is None:
        return False
    m, _ = change.affine(site)
    # A complex decay is a pair of reals: a factor that differs along the last axis is no complex multiplication.
    return not isinstance(m, Tensor) or parts == 1 or m.ndim == 0 or m.shape[-1] == 1


def _fold_decay(tensor: Tensor, hook: Any, *, change: Edit, site: str) -> Tensor:
    def fold(region: Tensor, whole: Tensor, at: str) -> Tensor:
        if isinstance(change, Freeze):
            one = torch.ones_like(region)
            if getattr(hook, "parts", 1) == 2:
                one[..., region.shape[-1] // 2 :] = 0
            return one
        assert change.affine is not None
        return affine_map(region, change.affine(site)[0], 0.0)

    return Edit(change.label, fold, None, change.pos, change.channels)(tensor, site)


def _fold_write(tensor: Tensor, hook: Any, *, change: Edit, site: str, edited: Edited) -> Tensor:
    edited.fired[site] += 1

    def fold(region: Tensor, whole: Tensor, at: str) -> Tensor:
        if isinstance(change, Freeze):
            return torch.zeros_like(region)
        assert change.affine is not None
        return affine_map(region, *change.affine(site))

    return Edit(change.label, fold, None, change.pos, change.channels)(tensor, site)


def _all_positions(length: int, *, chain: list[Edit], site: str) -> list[int]:
    return sorted({t for change in chain for t in change.positions(length, site)})


def _interrupt(state: Tensor, t: int, length: int, *, chain: list[Edit], site: str, edited: Edited) -> Tensor:
    """The state (batch, d_inner, d_state) at position ``t`` with the edits of that position made."""
    edited.fired[site] += 1
    for change in chain:
        at = change.positions(length, site)
        if t in at:
            state = _Slice(change, at.index(t), len(at))(state[:, None], site)[:, 0]
    return state


class _Slice:
    """One edit at one of its positions: values that vary over the chosen positions are cut to this one."""

    def __init__(self, change: Edit, rank: int, count: int) -> None:
        self.change, self.rank, self.count = change, rank, count

    def __call__(self, state: Tensor, site: str) -> Tensor:
        if self.change.affine is not None:
            m, c = (self._cut(v) for v in self.change.affine(site))

            def new(region: Tensor, whole: Tensor, at: str) -> Tensor:
                return affine_map(region, m, c)
        else:
            # Only the channels are left to pick; the position has been picked already.
            new = self.change.change
        return Edit(self.change.label, new, None, None, self.change.channels)(state, site)

    def _cut(self, value: float | Tensor) -> float | Tensor:
        if isinstance(value, Tensor) and value.ndim >= 3 and value.shape[-3] == self.count:
            return value[..., self.rank : self.rank + 1, :, :]
        return value


@contextmanager
def expose(model: Any, pattern: Pattern = "*") -> Iterator[None]:
    """Inside the block the scan sites (decay, write, state) that ``pattern`` picks are formed whether watched or not.

    For comparisons, so that a clean run and an edited run share one arithmetic, and for nnsight's ``.source``.
    Raises :class:`UnknownSite` where the pattern picks no scan site.
    """
    names = [name for name in resolve(model, pattern) if name.rsplit(".", 1)[-1] in SCAN_SITES]
    if not names:
        raise BadArgument(f'expose("{pattern}") picks none of {", ".join(SCAN_SITES)}: only those are ever left out')
    points = [model.hook_dict[name] for name in names]
    for point in points:
        point.exposed += 1
    try:
        yield
    finally:
        for point in points:
            point.exposed -= 1
