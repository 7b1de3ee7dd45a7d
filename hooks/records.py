"""``record``: the values of chosen sites in one run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hooks.brief import LINES
from hooks.errors import BadArgument, DidNotFire
from hooks.gradients import watch_gradient
from hooks.inputs import gradients_can_be, readable
from hooks.memory import check_memory
from hooks.onlookers import watched
from hooks.placed import Placed, opened, unsplit
from hooks.point import HookedModule, why_silent
from hooks.transforms import active
from hooks.vocabulary import Pattern, resolve


class Record(Mapping[str, Tensor]):
    """Site name → tensor of one run, in firing order, with the run's ``output``.

    A later hook or an in-place edit does not change the tensors.
    """

    def __init__(self, values: dict[str, Tensor], output: Any, aliases: Mapping[str, str] | None = None) -> None:
        self._values, self.output, self._aliases = values, output, aliases or {}

    def __getitem__(self, name: str) -> Tensor:
        found = [name] if name in self._values else self._resolve(name)
        if len(found) > 1:
            raise BadArgument(
                f'"{name}" matches {len(found)} recorded sites, {found[0]} first: take one, or .stack("{name}")'
            )
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
        return torch.stack([self._values[name] for name in self._resolve(pattern)])

    def _resolve(self, pattern: str) -> list[str]:
        return resolve(_Names(self._values, self._aliases), pattern, "recorded site")

    def __repr__(self) -> str:
        rows = [f"{name}  {tuple(value.shape)}" for name, value in self.items()]
        more = len(rows) - (LINES - 1)
        return "\n".join(rows if more <= 1 else [*rows[: LINES - 1], f"… {more} more sites"])


class _Names:
    def __init__(self, values: dict[str, Tensor], aliases: Mapping[str, str]) -> None:
        self.hook_dict, self.aliases = values, aliases


@unsplit
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

    Positions are those of this run: where ``state=`` says that it goes on, they begin after what came before.
    Nothing that runs later changes a recorded tensor: it is a copy, or the run's own where nobody else holds it.
    ``grad=True`` keeps the tensors in the graph (they are then not copies); a backward that brings NaN or inf to one of
    them raises :class:`NonFinite` there. Other hooks and edits that are on the
    model act as they are: the record sees their result. Raises :class:`UnknownSite`, :class:`TooLarge` before the
    forward, :class:`DidNotFire` where a site did not fire, :class:`NonFinite` where NaN or inf first appears.
    """
    if grad:
        gradients_can_be("hooks.record(grad=True)")
    names = resolve(model, sites)
    readable(model, x, model_kwargs=model_kwargs)
    check_memory(model, x, names, max_memory)
    values: dict[str, Tensor] = {}
    # Our models never write in place, so with no other hook about the first record of a tensor can be the tensor.
    # Copying would take longer than the scan: each state of 50 MB is a fresh page fault every 4 kB.
    alone = isinstance(model, HookedModule) and not watched(*model.hook_dict.values())
    held = set() if active() else {_memory(tensor) for tensor in (x, *model.parameters())}

    def save(tensor: Tensor, hook: Any, name: str) -> None:
        if grad:
            watch_gradient(tensor, name)
            values[name] = tensor
        elif alone and not active() and _memory(tensor) not in held:
            held.add(_memory(tensor))
            values[name] = tensor.detach()
        else:
            values[name] = tensor.detach().clone()

    with Placed(model) as placed:
        for name in names:
            placed.hook(model.hook_dict[name], partial(save, name=name), reads=True)
        with torch.set_grad_enabled(grad):
            output = opened(lambda: model(x, **model_kwargs))
    if not grad and isinstance(output, Tensor):
        output = output.clone()
    silent = [name for name in names if name not in values]
    if silent and (sites is not None or not values):
        raise DidNotFire(why_silent(model, silent))
    return Record(values, output, getattr(model, "aliases", None))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
