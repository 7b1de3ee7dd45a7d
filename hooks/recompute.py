"""Activation checkpointing: a part of a run that is computed again for the backward pass has to have the same edits.

``torch.utils.checkpoint`` forgets what a part of a run held and runs it again when the backward pass gets there. Where
that is after the ``with`` block of an edit, the gradient would be that of other numbers than the output, in silence
(torch compares shapes only). So what was changed at the first time is written down on torch's own object for the part,
and compared when the part is run again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch.autograd.function import FunctionCtx

from hooks.errors import RunFailed
from hooks.onlookers import watched

_FILE = torch.utils.checkpoint.__file__


class _Notes:
    """Which points changed their value in one part: before any run of a whole model in it, in the first, and so on."""

    def __init__(self) -> None:
        self.runs: list[set[Any]] = [set()]
        self.again: dict[int, int] = {}
        """Backward pass → the run that it is at."""


def in_backward() -> bool:
    """Whether this is called from within a backward pass, as a run is that is made again."""
    return torch._C._current_graph_task_id() != -1


def begin() -> None:
    """A run of a whole model begins here."""
    for notes, again in _parts():
        if again:
            task = torch._C._current_graph_task_id()
            notes.again[task] = notes.again.get(task, 0) + 1
        else:
            notes.runs.append(set())


def passed(point: Any, changed: bool) -> None:
    """A value went through ``point``, and whether it was changed there.

    Raises :class:`RunFailed` where this part of the run is made again and was not changed at the same points before.
    """
    for notes, again in _parts():
        if not again:
            if changed:
                notes.runs[-1].add(point)
            continue
        run = notes.again.get(torch._C._current_graph_task_id(), 0)
        before = notes.runs[run] if run < len(notes.runs) else set()
        if changed and point not in before:
            raise RunFailed(_told(point, "was not there"))
        # Also those that are not passed this time: without an edit of the state nobody forms it.
        for other in before:
            if (other is point and not changed) or not watched(other):
                raise RunFailed(_told(other, "was there"))


def _told(point: Any, how: str) -> str:
    name = getattr(point, "listed", None) or point.name
    return (
        f"activation checkpointing runs {name} again for the backward pass, and its edit {how} the first time: "
        "call backward() inside the with block of the edit, or make the edit inside the checkpointed function"
    )


def _parts() -> Iterator[tuple[_Notes, bool]]:
    """The parts that are to be computed again and that this call is in, inside out; whether each is run again now.

    What lies around a part that is run again is a backward pass and no part of this run.
    """
    seen: set[int] = set()
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # not in torch 2.6
    hooks = top(True) if top is not None else None
    for cell in getattr(hooks[0], "__closure__", None) or () if hooks else ():
        if isinstance(cell.cell_contents, torch.utils.checkpoint._CheckpointFrame):
            seen.add(id(cell.cell_contents))
            yield _notes(cell.cell_contents), False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == _FILE or frame.f_code.co_name in ("forward", "backward"):
            for part, again in _part_of(frame):
                if part is not None and id(part) not in seen:
                    seen.add(id(part))
                    yield _notes(part), again
                    if again:
                        return
        frame = frame.f_back


def _part_of(frame: FrameType) -> Iterator[tuple[Any, bool]]:
    code = frame.f_code
    if code.co_argcount and code.co_varnames[0] == "ctx" and code.co_name in ("forward", "backward"):
        # Reentrant: one object, of torch's or somebody else's function, in the forward and in the backward pass.
        ctx = frame.f_locals["ctx"]
        if isinstance(ctx, FunctionCtx) and (code.co_name == "forward" or hasattr(ctx, _NAME)):
            yield ctx, code.co_name == "backward"
    elif code.co_filename == _FILE and code.co_name == "unpack_hook":
        yield frame.f_locals.get("frame"), True
    elif code.co_filename == _FILE and "gen" in code.co_varnames:  # checkpoint(), or what it calls from torch 2.14 on
        inside = getattr(frame.f_locals.get("gen"), "gi_frame", None)
        if inside is not None:
            yield inside.f_locals.get("new_frame"), False


_NAME = "_what_was_edited"


def _notes(part: Any) -> _Notes:
    if not hasattr(part, _NAME):
        setattr(part, _NAME, _Notes())
    found: _Notes = getattr(part, _NAME)
    return found
