"""A site takes, position by position, its value of another run: how much of the other's answer comes along."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

import hooks
from hooks.brief import brief
from hooks.errors import BadArgument, NonFinite, short, told
from hooks.inputs import arguments, readable
from hooks.vocabulary import Pattern, kind_of
from interp import stats
from interp.arguments import listed, whole_number
from interp.machine.progress import followed
from interp.metric import Metric, kind, one_arithmetic, one_number, recovered

__all__ = ["Patched", "activations", "patched"]

Sites = Pattern | Mapping[str, Any]
"""Sites that are patched one after the other, or ``{label: pattern}``: those of one label are patched together."""
Positions = str | Sequence[int] | Mapping[str, Sequence[int]] | None
"""``"each"`` by itself, these by themselves, ``{label: positions}``: those of one label at once, None: all at once."""


@dataclass(frozen=True)
class Patched:
    """The metric of every prompt under every patch.

    cells      what was patched: (site or label, position or label); "all" where every position was
    values     the metric under each, (cells, n)
    clean      the metric of the clean run, (n,)
    corrupted  the metric of the corrupted run, which the patches go into, (n,)
    """

    cells: tuple[tuple[str, int | str], ...]
    values: Float[Tensor, "cells n"]
    clean: Float[Tensor, " n"]
    corrupted: Float[Tensor, " n"]

    __repr__ = brief

    def table(self, n_boot: int = 1000, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
        """One row for each cell: site, kind, layer, pos; effect and recovery with their intervals over prompts; n.

        ``effect`` is the mean of f_patched − f_corrupted in the metric's unit, ``recovery`` its slope on
        f_clean − f_corrupted (:func:`recovery`); NaN where those two differ for no prompt. Intervals are empty (NaN)
        for a single prompt, and those of the recovery where so few prompts differ that a resample may have none.
        Cells whose run or metric was not finite are NaN throughout.
        """
        values, clean, corrupted = (part.double().cpu().numpy() for part in (self.values, self.clean, self.corrupted))
        whole = np.isfinite(values).all(axis=1)
        effect = stats.bootstrap((values[whole] - corrupted).T, n_boot=n_boot, level=level, seed=seed)
        share = recovered(values[whole].T, clean, corrupted, n_boot=n_boot, level=level, seed=seed)
        labels = [label for label, _ in self.cells]
        return pd.DataFrame(
            {
                "site": labels,
                "kind": [kind(label) for label in labels],
                "layer": pd.array([_layer(label) for label in labels], dtype="Int64"),
                "pos": [pos for _, pos in self.cells],
                **_columns("effect", effect, whole),
                **_columns("recovery", share, whole),
                "n": effect.n,
            }
        )


def activations(
    model: Any,
    clean: Tensor,
    corrupted: Tensor,
    sites: Sites,
    metric: Metric,
    *,
    positions: Positions = "each",
    readout_only: bool = False,
    n_boot: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    **model_kwargs: Any,
) -> pd.DataFrame:
    """The table of :func:`patched`: the effect and the recovery of each site × layer × position, with intervals."""
    stats.valid(n_boot, level)
    found = patched(
        model, clean, corrupted, sites, metric, positions=positions, readout_only=readout_only, **model_kwargs
    )
    return found.table(n_boot=n_boot, level=level, seed=seed)


def patched(
    model: Any,
    clean: Tensor,
    corrupted: Tensor,
    sites: Sites,
    metric: Metric,
    *,
    positions: Positions = "each",
    readout_only: bool = False,
    **model_kwargs: Any,
) -> Patched:
    """The metric of the corrupted run with each of ``sites``, at each of ``positions``, as in the clean run.

    ``clean`` and ``corrupted`` are prompts of one shape; exchange the two to see what is lost instead of what is
    restored. One run for each cell, from the patched layer on where the model can start there. A patched
    ``hook_state`` propagates; ``readout_only=True`` changes what is read at that position only. A site without
    positions is patched whole. Patching a run from itself changes no bit: all runs share one arithmetic.

    Raises, before the first patched run, :class:`UnknownSite`, :class:`TooLarge` where the clean run's sites do not fit
    in memory, :class:`BadArgument` for prompts of two shapes, a position that there is not or a metric that is not one
    number for each prompt, and :class:`NonFinite` where the metric is NaN or inf of either run. A cell whose patched
    run or metric is not finite is NaN, with a warning: it does not take the other cells with it.
    """
    readable(model, clean, "clean", model_kwargs)
    readable(model, corrupted, "corrupted", model_kwargs)
    if clean.shape != corrupted.shape:
        raise BadArgument(
            f"clean prompts {tuple(clean.shape)}, corrupted ones {tuple(corrupted.shape)}: give one shape"
        )
    groups = _groups(model, sites)
    names = hooks.resolve(model, {name for group in groups.values() for name in group})
    asked = [
        (label, group, pos, at)
        for label, group in groups.items()
        for pos, at in _cells(group, positions, clean.shape[1])
    ]
    size = clean.shape[0]
    values: list[Tensor] = []
    with torch.no_grad(), one_arithmetic(model):
        source = hooks.record(model, clean, names, **model_kwargs)
        runs = _Runs(model, corrupted, names, model_kwargs)
        before, goal = _finite(metric, runs.whole(), size, "corrupted"), _finite(metric, source.output, size, "clean")
        for label, group, pos, at in followed(asked, "patch"):
            states = any(kind(name) == "hook_state" for name in group)
            changes = {name: hooks.resample(source=source, pos=at if _has_positions(name) else None) for name in group}
            try:
                with hooks.edit(model, changes, readout_only=readout_only and states):
                    output = runs.through(group)
                values.append(_finite(metric, output, size, "patched"))
            except NonFinite as error:
                warnings.warn(f"{label} at {pos} is NaN in the table: {error}", stacklevel=2)
                values.append(torch.full_like(before, torch.nan))
    return Patched(tuple((label, pos) for label, _, pos, _ in asked), torch.stack(values), goal, before)


def _finite(metric: Metric, output: Any, size: int, which: str) -> Float[Tensor, " batch"]:
    found = one_number(metric, output, size)
    bad = size - int(found.isfinite().sum())
    if bad:
        raise NonFinite(f"the metric of the {which} run is NaN or inf for {bad} of {size} prompts")
    return found


class _Runs:
    """Runs of the model on the corrupted prompts; from a layer on where nothing before it is patched."""

    def __init__(self, model: Any, tokens: Tensor, names: Sequence[str], model_kwargs: Mapping[str, Any]) -> None:
        self.model, self.tokens, self.model_kwargs = model, tokens, dict(model_kwargs)
        self.before: Mapping[str, Tensor] = {}
        can_start = "start_at_layer" in arguments(model)
        first = [f"blocks.{layer}.hook_resid_pre" for layer in sorted({_layer(name) or 0 for name in names}) if layer]
        if can_start and "start_at_layer" not in self.model_kwargs and all(name in model.hook_dict for name in first):
            self.before = hooks.record(model, tokens, first, **model_kwargs) if first else {}

    def whole(self) -> Any:
        return self.model(self.tokens, **self.model_kwargs)

    def through(self, names: Sequence[str]) -> Any:
        """A run that passes all of ``names``."""
        layer = min((_layer(name) or 0 for name in names), default=0)
        start = f"blocks.{layer}.hook_resid_pre"
        if start not in self.before:
            return self.whole()
        return self.model(self.before[start], start_at_layer=layer, **self.model_kwargs)


def _groups(model: Any, sites: Sites) -> dict[str, list[str]]:
    if isinstance(sites, Mapping):
        if not sites:
            raise BadArgument("no sites to patch: give a pattern or {label: pattern}")
        return {label: hooks.resolve(model, pattern) for label, pattern in sites.items()}
    return {name: [name] for name in hooks.resolve(model, sites)}


def _cells(group: Sequence[str], positions: Positions, length: int) -> list[tuple[int | str, Sequence[int] | None]]:
    """(label, positions) of each patch; everything at once where no site of the group has positions."""
    if positions is None or not any(_has_positions(name) for name in group):
        return [("all", None)]
    if isinstance(positions, Mapping) and positions:
        return [(label, [_inside(t, length) for t in at]) for label, at in positions.items()]
    if isinstance(positions, str):
        if positions != "each":
            raise BadArgument(f'positions="{short(positions)}": give "each", None, positions or {{label: positions}}')
        return [(t, [t]) for t in range(length)]
    positions = listed("positions", positions)
    if not positions:
        raise BadArgument(f"positions={told(positions)} picks none: there is nothing to patch")
    return [(t, [t]) for t in (_inside(t, length) for t in positions)]


def _inside(t: Any, length: int) -> int:
    # A number of numpy's or torch's is as good as one of Python's.
    given = int(t) if isinstance(t, numbers.Integral) and not isinstance(t, bool) else t
    if isinstance(given, int) and not isinstance(given, bool) and not -length <= given < length:
        raise BadArgument(f"position {given} is outside: the prompts have {length}, 0 … {length - 1}")
    return whole_number("position", given, -length, length - 1)


def _has_positions(name: str) -> bool:
    row = kind_of(name)
    return row is None or row.pos_dim is not None


def _layer(name: str) -> int | None:
    """The layer that a site's full name says it is in; None for the others, and for labels."""
    parts = name.split(".")
    return int(parts[1]) if len(parts) > 2 and parts[0] == "blocks" and parts[1].isdecimal() else None


def _columns(what: str, interval: stats.Interval, where: NDArray[np.bool_]) -> dict[str, Any]:
    """The interval's columns, whose entries are the rows ``where``; NaN in the others."""
    columns = {name: np.full(len(where), np.nan) for name in (what, f"{what}_low", f"{what}_high")}
    for column, part in zip(columns.values(), (interval.mean, interval.low, interval.high), strict=True):
        column[where] = part
    return columns
