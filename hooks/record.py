"""``record``: the values of chosen sites in one run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hooks.errors import BadArgument, DidNotFire
from hooks.memory import check_memory
from hooks.point import why_silent
from hooks.sites import Pattern, resolve


class Record(Mapping[str, Tensor]):
    """Site name → tensor of one run, in firing order, with the run's ``output``.

    The tensors are copies: a later hook or an in-place edit does not change them.
    """

    def __init__(self, values: dict[str, Tensor], output: Any) -> None:
        self._values, self.output = values, output

    def __getitem__(self, name: str) -> Tensor:
        found = [name] if name in self._values else resolve(_Names(self._values), name, "recorded site")
        if len(found) > 1:
            raise BadArgument(f'"{name}" matches {len(found)} recorded sites, {found[0]} first: take one, or .stack("{name}")')
        return self._values[found[0]]

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def get(self, name: str, default: Any = None) -> Any:
        """The tensor of the site called ``name`` in full, else ``default``."""
        return self._values.get(name, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def stack(self, pattern: str) -> Tensor:
        """The sites that ``pattern`` picks, stacked in firing order on a new first axis (layer …)."""
        return torch.stack([self._values[name] for name in resolve(_Names(self._values), pattern, "recorded site")])

    def __repr__(self) -> str:
        return "\n".join(f"{name}  {tuple(value.shape)}" for name, value in self.items())


class _Names:
    def __init__(self, values: dict[str, Tensor]) -> None:
        self.hook_dict = values


def record(
    model: Any,
    x: Tensor,
    sites: Pattern = None,
    *,
    grad: bool = False,
    max_memory: int | None = None,
    **model_kwargs: Any,
) -> Record:
    """What ``model(x)`` held at ``sites`` (name, glob, list, predicate; None for all), and its output.

    ``grad=True`` keeps the tensors in the graph (they are then not copies). Other hooks and edits that are on the
    model act as they are: the record sees their result. Raises :class:`UnknownSite`, :class:`TooLarge` before the
    forward, :class:`DidNotFire` where a site did not fire, :class:`NonFinite` where NaN or inf first appears.
    """
    names = resolve(model, sites)
    check_memory(model, x, names, max_memory)
    values: dict[str, Tensor] = {}

    def save(tensor: Tensor, hook: Any, name: str) -> None:
        values[name] = tensor if grad else tensor.detach().clone()

    handles: list[Any] = []
    try:
        for name in names:
            handles.append(model.hook_dict[name].add_hook(partial(save, name=name)))
        with torch.set_grad_enabled(grad):
            output = model(x, **model_kwargs)
    finally:
        _remove(model, names, handles)
    silent = [name for name in names if name not in values]
    if silent and (sites is not None or not values):
        raise DidNotFire(why_silent(model, silent))
    return Record(values, output)


def _remove(model: Any, names: list[str], handles: list[Any]) -> None:
    for name, handle in zip(names, handles, strict=False):
        handle.hook.remove()
        hooks = model.hook_dict[name].fwd_hooks
        hooks[:] = [kept for kept in hooks if kept is not handle]
