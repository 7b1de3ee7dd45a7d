"""Whether somebody looks at a hook point: what decides how a mixer computes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module
from transformer_lens.hook_points import HookPoint


def watched(*points: nn.Module) -> bool:
    """Whether calling any of ``points`` would do more than return its argument.

    True for torch hooks of any kind (so for TransformerLens and captum), global module hooks, another class in
    the slot, ``hooks.expose``, a propagating edit, and a running nnsight trace that is parked on the point or
    caches it. Anything not recognised counts as watched: slow and right. nnsight's case is exact because its
    workers take turns with the forward: whoever will be served at a 4-D point is already parked on one, or is
    woken by one that is. (Asked this way because a flag set by ``add_hook`` misses torch hooks, captum and
    copies, and never goes off.)
    """
    return _any_global() or any(_is_watched(point) for point in points)


def only_read(point: nn.Module) -> bool:
    """Whether nothing is on ``point`` but hooks that promise to change nothing (those of ``hooks.record``).

    Anything not recognised counts as a writer.
    """
    return not _any_global() and not _is_watched(point, getattr(point, "readers", ()))


def plain_linear(module: nn.Module) -> bool:
    """Whether calling ``module`` does no more than multiply by its weight and add its bias.

    Asked and answered as in :func:`watched`; a subclass counts as more.
    """
    return type(module) is nn.Linear and not _any_global() and not _is_watched(module, forward=nn.Linear.forward)


def state_edits(point: nn.Module) -> list[Any]:
    """The propagating edits of ``hooks.edit`` on a ``hook_state`` point; none where another module is in its slot."""
    return getattr(point, "interrupts", [])


def _any_global() -> bool:
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def _is_watched(point: nn.Module, but_by: Collection[int] = (), forward: Any = HookPoint.forward) -> bool:
    """``but_by``: identifiers of forward hooks that do not count. ``forward``: what an unwatched one would run."""
    if type(point).forward is not forward:
        return True
    own = point.__dict__
    if own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return True
    if any(hook not in but_by for hook in own["_forward_hooks"]):
        return True
    if own.get("exposed") or own.get("interrupts"):
        return True
    replaced = own.get("forward")
    return replaced is not None and _traced(replaced, forward)


def tracing(point: nn.Module) -> bool:
    """Whether an nnsight trace is running, which may have changed what comes here at a module that is no site."""
    try:
        return "forward" in point.__dict__ and point.__dict__["forward"].state.active()[0] is not None
    except AttributeError:
        return False


def _traced(replaced: Any, forward: Any) -> bool:
    """Whether an instance ``forward`` is anything but an nnsight controller with nobody waiting."""
    try:
        state = replaced.state
        if state.sourced or state.body is not forward:
            return True
        interleaver, _, locations = state.active()
        if interleaver is None:
            return False
        return any(place in interleaver.parked or interleaver.observers.get(place) for place in locations)
    except (AttributeError, TypeError, ValueError):
        return True
