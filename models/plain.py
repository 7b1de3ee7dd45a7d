"""The weights that a model computes with, by the names that a checkpoint gives them.

Wrappers (``torch.compile``, DataParallel, DDP) are looked through, and what torch keeps in parts (a parametrisation, a
pruning mask, a weight norm) is put together: both mean the same as the plain model. What a checkpoint has no place for
is named, so that it is refused before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from models.stack import Root
from models.transformer import Transformer, tidy


def unwrapped(model: Any) -> Any:
    """What is inside ``torch.compile``, DataParallel and DistributedDataParallel, however deep; else ``model``."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(model, nn.Module) and isinstance(model._modules.get("_orig_mod"), nn.Module):
            model = model._modules["_orig_mod"]  # torch's OptimizedModule, named without importing its compiler
        else:
            return model


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, as :func:`models.build` names them.

    A parameter that is kept as it is comes back itself; what is kept in parts comes back as the values that the model
    computes with in eval mode, detached.
    """
    found: dict[str, Tensor] = {}
    for path, part in parts(model):
        hidden, computed = _put_together(part)
        kept = {**part._parameters, **part._buffers}
        for name, value in kept.items():
            if value is not None and name not in hidden and name not in part._non_persistent_buffers_set:
                found.setdefault(path + name, value)
        for name, value in computed.items():
            found.setdefault(path + name, value)
    return found


def misfit(model: Root, plain: Root) -> str:
    """Why weights are not all that tells ``model`` from ``plain``, a fresh model of its config; or nothing.

    A module that is not one of the architecture, two places that share a tensor, a parametrisation that is random.
    """
    theirs, ours = _kinds(model), _kinds(plain)
    for path, kinds in ours.items():
        name = path.removesuffix(".") or "the model"
        if path not in theirs:
            return f"{name} is gone"
        if theirs[path] != kinds:
            found, kind = (", ".join(one.__name__ for one in each) for each in (theirs[path], kinds))
            if found == kind:  # one of the same name: torch's quantised Linear, a user's own
                found = ", ".join(f"{one.__module__}.{one.__name__}" for one in theirs[path])
            return f"{name} is a {found}, where its architecture has a {kind}"
    for path, kinds in theirs.items():
        if path not in ours:
            return f"{path.removesuffix('.')}, a {kinds[0].__name__}, is not part of its architecture"
    return _shared(model) or _random(model)


def _kinds(model: Root) -> dict[str, list[type]]:
    found: dict[str, list[type]] = {}
    for path, part in parts(model):
        found.setdefault(path, []).append(parametrize.type_before_parametrizations(part))
    return found


def _shared(model: Root) -> str:
    """Two names of one tensor, in words, or nothing."""
    names: dict[Any, str] = {}
    for path, part in parts(model):
        for name, value in {**part._parameters, **part._buffers}.items():
            if value is None or value.is_meta or value.numel() == 0:
                continue
            place = (value.device, value.data_ptr())
            first = names.setdefault(place, path + name)
            if first != path + name:
                return f"{path}{name} and {first} are one tensor (give each its own with copy.deepcopy)"
    return ""


def parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path with a dot at its end, module) of ``model`` and all that is in it, without wrappers and parametrisations.

    TransformerLens has every part at two places of its tree; both have one path.
    """
    root = unwrapped(model)
    clean = tidy if isinstance(root, Transformer) else str
    return _walk(root, "", clean)


def _walk(part: nn.Module, path: str, clean: Any) -> Iterator[tuple[str, nn.Module]]:
    yield clean(path), part
    for name, child in part._modules.items():
        if child is None or (name == "parametrizations" and parametrize.is_parametrized(part)):
            continue
        yield from _walk(unwrapped(child), f"{path}{name}.", clean)


def _random(model: Root) -> str:
    for path, part in parts(model):
        once, again = _put_together(part)[1], _put_together(part)[1]
        for name, value in once.items():
            if not torch.equal(value, again[name]):
                return f"{path}{name} has another value at each look (its parametrisation is random)"
    return ""


@torch.no_grad()
def _put_together(part: nn.Module) -> tuple[set[str], dict[str, Tensor]]:
    """(names that torch keeps in the place of a tensor, that tensor by its name) of one module."""
    hidden: set[str] = set()
    computed: dict[str, Tensor] = {}
    if parametrize.is_parametrized(part):
        modes = [(inner, inner.training) for inner in part.modules()]
        try:
            part.eval()  # a spectral norm goes on with its iteration at each look in training mode
            computed |= {name: getattr(part, name).detach() for name in part.parametrizations}  # type: ignore[union-attr]
        finally:
            for inner, mode in modes:
                inner.training = mode
    for hook in part._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod):
            name = hook._tensor_name
            hidden |= {f"{name}_orig", f"{name}_mask"}
            computed[name] = hook.apply_mask(part).detach()
        elif isinstance(hook, WeightNorm):
            hidden |= {f"{hook.name}_g", f"{hook.name}_v"}
            computed[hook.name] = hook.compute_weight(part).detach()
        elif isinstance(hook, SpectralNorm):
            hidden |= {f"{hook.name}_orig", f"{hook.name}_u", f"{hook.name}_v"}
            computed[hook.name] = hook.compute_weight(part, do_power_iteration=False).detach()
    return hidden, computed
