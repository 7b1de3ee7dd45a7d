"""``edit``: changes at chosen sites for the runs inside a ``with`` block; ``expose``: forces the materialised path."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from hooks.edits import DoState, Edit, Freeze, as_edit, position_axis
from hooks.errors import BadArgument, DidNotFire, told
from hooks.gradients import check_gradient
from hooks.placed import Placed, opened, whole
from hooks.point import one_gradient, unhooked, why_silent
from hooks.propagate import StateEdit
from hooks.records import record
from hooks.vocabulary import Pattern, resolve

Edits = Mapping[Any, Any] | DoState | Sequence[Any]
SCAN_SITES = ("hook_decay", "hook_transition", "hook_write", "hook_state")


class Edited:
    """What ``with hooks.edit(...) as edited`` gives: how often each site's edit has fired."""

    def __init__(self) -> None:
        self.fired: dict[str, int] = {}

    def __repr__(self) -> str:
        return "\n".join(f"{name}  edited {count} times" for name, count in self.fired.items())


@whole
def edit(
    model: Any,
    edits: Edits,
    *,
    backward: Mapping[Any, Callable[[Tensor], Tensor]] | None = None,
    readout_only: bool = False,
    positions: str | None = None,
) -> Iterator[Edited]:
    """Inside the block every run of ``model`` has the edits made; ``edits`` is ``{pattern: edit}`` or ``do_state(…)``.

    An edit is one of ``hooks.zero() mean() scale() add() set_to() resample() freeze()`` or a tensor function.
    On ``hook_state`` it propagates (see ``hooks/propagate.py``); ``readout_only=True`` changes what is read out at that
    position and nothing later. ``backward={pattern: function}`` edits gradients. Edits of the same site act in the
    order in which they are given; nested blocks act from the outside in.

    ``positions`` says what ``pos=`` counts where a run goes on from a state, as ``model.step`` and chunks do:
    ``"sequence"``, from the first token of all, which the state knows; ``"run"``, from the first token of each run. Not
    said, such a run raises :class:`BadArgument`.

    Raises :class:`UnknownSite` before anything is changed, :class:`DidNotFire` on exit where the site of an edit did
    not fire (never hiding an exception of the body), :class:`BadArgument` for an edit that does not fit its site.
    Nothing is left behind.
    """
    plan = [(name, as_edit(given, name)) for pattern, given in _pairs(edits) for name in resolve(model, pattern)]
    gradients = [(name, fn) for pattern, fn in (backward or {}).items() for name in resolve(model, pattern)]
    if not plan and not gradients:
        raise BadArgument("hooks.edit was given nothing to edit")
    if positions not in (None, "sequence", "run"):
        raise BadArgument(f'positions={told(positions)}: it is "sequence" or "run"')
    states = [name for name, _ in plan if name.rsplit(".", 1)[-1] == "hook_state"]
    if readout_only and not states:
        raise BadArgument("readout_only=True is about edits of hook_state, and none is edited here")
    for name, change in plan:
        if isinstance(change, Freeze) and (readout_only or name not in states):
            raise BadArgument(f"freeze() at {name}: it is an edit of hook_state that propagates")
    plan = opened(partial(_bind, model, plan))
    edited = Edited()
    here = partial(_here, model, positions)
    runs = getattr(model, "runs", None)
    with Placed(model) as placed:
        for name, change in plan:
            edited.fired.setdefault(name, 0)
            if name in states and not readout_only:
                _propagate(placed, model, name, change, edited, here)
            else:
                placed.hook(model.hook_dict[name], partial(_apply, change=change, site=name, edited=edited, here=here))
        for name, fn in gradients:
            edited.fired.setdefault(f"{name} (backward)", 0)
            placed.hook(model.hook_dict[name], partial(_apply_backward, fn=fn, site=name, edited=edited), "bwd")
        yield edited
    silent = [name for name, count in edited.fired.items() if count == 0]
    if silent:
        backwards = [name for name in silent if name.endswith(" (backward)")]
        ran = runs is None or model.runs > runs
        why = why_silent(model, backwards or silent, "bwd" if backwards else "fwd", ran)
        raise DidNotFire(f"the edit did nothing: {why}")


def _pairs(edits: Edits) -> list[tuple[Any, Any]]:
    if isinstance(edits, DoState):
        return list(edits.as_patterns().items())
    if isinstance(edits, Mapping):
        return list(edits.items())
    if isinstance(edits, Sequence) and not isinstance(edits, str):
        return [pair for entry in edits for pair in _pairs(entry)]
    raise BadArgument(f"edits are {{pattern: edit}}, do_state(…) or a list of those, not {type(edits).__name__}")


def _bind(model: Any, plan: list[tuple[str, Edit]]) -> list[tuple[str, Edit]]:
    """Run the model once for each set of reference prompts, without the edits and hooks that are on it, and hand its
    values to the edits that asked for them.
    """
    groups: dict[int, tuple[Tensor, list[str]]] = {}
    for name, change in plan:
        if change.prompts is not None:
            groups.setdefault(id(change.prompts), (change.prompts, []))[1].append(name)
    if not groups:
        return plan
    with unhooked(model):
        records = {key: record(model, prompts, names) for key, (prompts, names) in groups.items()}
    return [
        (name, change if change.bind is None else change.bind(records[id(change.prompts)])) for name, change in plan
    ]


Here = Callable[[Edit, int, str], Edit | None]


def _here(model: Any, positions: str | None, change: Edit, length: int, site: str) -> Edit | None:
    """``change`` as it is in the run that is going on, over ``length`` tokens; None where it touches none of them."""
    before = getattr(model, "tokens_before", 0)
    if positions == "run" or not change.at_positions or (positions is None and before == 0):
        return change
    if positions is None:
        after = "a state" if before is None else f"a state, after {before} tokens"
        raise BadArgument(
            f"pos={told(change.pos)} at {site}: this run goes on from {after}; say what pos= counts, "
            'hooks.edit(…, positions="sequence") from the first token of all or positions="run" from this run\'s'
        )
    if before is None:
        raise BadArgument(
            'positions="sequence": the state does not say how many tokens came before; give the one that the model '
            "returned, or models.Carried(layers, seen=…)"
        )
    return change.within(before, length, site)


def _apply(tensor: Tensor, hook: Any, *, change: Edit, site: str, edited: Edited, here: Here) -> Tensor | None:
    axis = position_axis(site)
    found = change if axis is None else here(change, tensor.shape[axis], site)
    if found is None:
        return None
    edited.fired[site] += 1
    return found(tensor, site)


def _apply_backward(tensor: Tensor, hook: Any, *, fn: Callable[[Tensor], Tensor], site: str, edited: Edited) -> Tensor:
    edited.fired[f"{site} (backward)"] += 1
    check_gradient(tensor, site)
    return as_edit(lambda gradient: one_gradient(fn(gradient)), site)(tensor, site)


def _propagate(placed: Placed, model: Any, name: str, change: Edit, edited: Edited, here: Here) -> None:
    point = model.hook_dict[name]

    def fired() -> None:
        edited.fired[name] += 1

    if not hasattr(point, "interrupts"):
        raise BadArgument(
            f"{name} of this model is not ours to propagate: readout_only=True changes what is read there"
        )
    entry = StateEdit(change, name, getattr(point, "parts", 1), fired, here)
    entries = point.interrupts

    def remove() -> None:
        # reset_hooks() inside the block has removed it already.
        if entry in entries:
            entries.remove(entry)

    placed.put(partial(entries.append, entry), remove)


@whole
def expose(model: Any, pattern: Pattern = "*") -> Iterator[None]:
    """Inside the block the scan sites (decay, write, state) that ``pattern`` picks are formed whether watched or not.

    For comparisons, so that a clean run and an edited run share one arithmetic, and for nnsight's ``.source``.
    Raises :class:`UnknownSite` where the pattern matches nothing, :class:`BadArgument` where it picks no scan site.
    """
    names = [name for name in resolve(model, pattern) if name.rsplit(".", 1)[-1] in SCAN_SITES]
    if not names:
        raise BadArgument(f'expose("{pattern}") picks none of {", ".join(SCAN_SITES)}: only those are ever left out')
    points = [model.hook_dict[name] for name in names]

    def turn(by: int) -> None:
        for point in points:
            point.exposed += by

    with Placed(model) as placed:
        placed.put(partial(turn, 1), partial(turn, -1))
        yield
