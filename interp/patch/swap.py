"""Swaps of the state between prompts: what does a model know of its context by the state alone?

Two prompts are read up to a position. Then the second goes on from a state of which chosen parts, in chosen layers, are
the first's: the recurrence's h, the convolution's last inputs (conv), or both. With both in all layers it has the
first's context, so that its predictions are exactly those after the first context; with none, those after its own.
In between, the slope over prompts (``metric.recovery``) says how much of the context the swapped parts carry.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from hooks.errors import BadArgument
from hooks.inputs import arguments, readable
from hooks.vocabulary import points
from interp import stats
from interp.arguments import listed, one_of, whole_number
from interp.machine.progress import followed
from interp.metric import Metric, one_number, recovered

PARTS = ("h", "conv")


class Swap:
    """Pairs of prompts that have been read up to position ``at``, and the ways to go on with the second's tokens.

    ``first`` and ``second`` are the predictions (batch, pos − at, d_out) for the second prompt's tokens from ``at`` on,
    after the first's and after the second's context. Prompt i of one batch is paired with prompt i of the other.
    """

    def __init__(self, model: Any, first: Tensor, second: Tensor, at: int) -> None:
        readable(model, first, "first")
        readable(model, second, "second")
        if first.shape[0] != second.shape[0]:
            raise BadArgument(
                f"{first.shape[0]} first prompts and {second.shape[0]} second ones: they are swapped in pairs"
            )
        whole_number("at", at, 1, min(first.shape[1], second.shape[1] - 1))
        self.model, self.at, self.rest = model, at, second[:, at:]
        self._one, self._two = _states(model, first[:, :at]), _states(model, second[:, :at])
        self.first, self.second = self._go_on(self._one), self._go_on(self._two)

    def __repr__(self) -> str:
        prompts, rest = self.rest.shape[:2]
        return f"Swap: {prompts} pairs of prompts, swapped at {self.at}, {rest} tokens after; {', '.join(self.parts)}"

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the state that the model has in any layer."""
        return tuple(part for part in PARTS if any(getattr(layer, part) is not None for layer in self._two))

    @property
    def n_layers(self) -> int:
        """Number of layers of the state."""
        return len(self._two)

    def patched(
        self, parts: Iterable[str] = PARTS, layers: int | Sequence[int] | None = None
    ) -> Float[Tensor, "batch left d_out"]:
        """The predictions with ``parts`` of the state in ``layers`` (None: all) taken from the first context.

        No part or no layer swaps nothing, which is a control. A part that the model lacks changes nothing either, but
        is refused where there is no other: :class:`BadArgument`, as for a layer or a part that there is not.
        """
        chosen = [one_of("parts", part, PARTS) for part in listed("parts", parts)]
        if chosen and not set(chosen) & set(self.parts):
            raise BadArgument(f"this model's state has no {chosen[0]}: it has {', '.join(self.parts)}")
        where = range(self.n_layers) if layers is None else listed("layers", layers)
        swapped = {whole_number("layer", layer, 0, self.n_layers - 1) for layer in where}
        mixed = [
            two._replace(**{part: getattr(one, part) for part in chosen}) if layer in swapped else two
            for layer, (one, two) in enumerate(zip(self._one, self._two, strict=True))
        ]
        return self._go_on(mixed)

    def _go_on(self, state: Sequence[Any]) -> Tensor:
        with torch.no_grad():
            return self.model(self.rest, state=state)


def swap_states(
    model: Any,
    first: Tensor,
    second: Tensor,
    at: int,
    parts: Iterable[str] = PARTS,
    layers: int | Sequence[int] | None = None,
) -> Float[Tensor, "batch left d_out"]:
    """Predictions for ``second``'s tokens from position ``at`` on, out of its state there with ``parts`` in ``layers``
    taken from ``first``'s. :class:`Swap` makes several out of the same contexts, and the two that they lie between.
    """
    return Swap(model, first, second, at).patched(parts, layers)


def swap_table(
    model: Any,
    first: Tensor,
    second: Tensor,
    at: int | Sequence[int],
    metric: Metric,
    *,
    by_layer: bool = True,
    n_boot: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Recovery, with its interval over pairs of prompts, of each swap: at × part (h, conv, both) × layer (NA: all).

    ``metric`` takes the predictions from ``at`` on, so that ``out[:, -1, 0]`` is the prompt's last and ``out[:, 0, 0]``
    the first after the swap. Columns: at, part, layer, recovery, recovery_low, recovery_high, n; the recovery is NaN
    where the two contexts give every pair the same metric, its interval where they do so for too few, or for one pair.
    Raises as :class:`Swap`, for every ``at`` before the first run, and where no recovery is left.
    """
    stats.valid(n_boot, level)
    rows = []
    places = [whole_number("at", place, 1, second.shape[1] - 1) for place in listed("at", at)]
    for position in places:
        swap = Swap(model, first, second, position)
        size = first.shape[0]
        f_1, f_2 = (one_number(metric, output, size) for output in (swap.first, swap.second))
        names: dict[str, tuple[str, ...]] = {part: (part,) for part in swap.parts}
        if len(names) > 1:
            names["both"] = swap.parts
        layers = [None, *(range(swap.n_layers) if by_layer else ())]
        for label, layer in followed([(label, layer) for label in names for layer in layers], "swap"):
            f_patch = one_number(metric, swap.patched(names[label], layer), size)
            share = recovered(f_patch, f_1, f_2, n_boot=n_boot, level=level, seed=seed)
            numbers = float(share.mean), float(share.low), float(share.high)
            rows.append((position, label, layer, *numbers, share.n))
    if all(math.isnan(row[3]) for row in rows):
        raise BadArgument("both contexts give every pair the same metric: there is no difference to recover")
    columns = ["at", "part", "layer", "recovery", "recovery_low", "recovery_high", "n"]
    return pd.DataFrame(rows, columns=columns).astype({"layer": "Int64"})


def _states(model: Any, context: Tensor) -> list[Any]:
    """The state of each layer after ``context``, if the model has one."""
    if not {"state", "return_state"} <= set(arguments(model)):
        points(model)  # a wrapper is told how to take the model out of it
        raise BadArgument(f"{type(model).__name__} carries no state from token to token: there is nothing to swap")
    with torch.no_grad():
        _, states = model(context, return_state=True)
    if any(getattr(layer, "h", None) is None for layer in states):
        raise BadArgument(f"{type(model).__name__} carries no state in some layer: there is nothing to swap")
    return list(states)
