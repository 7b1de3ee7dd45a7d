"""The long table of an outlier analysis: one quantity of one group of examples, with its interval, a row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from torch import Tensor

from interp.result import numbers
from interp.stats import Interval, bootstrap, ratio

PARTS = ("skipped", "use", "split", "gate", "contribution", "placement", "curve")
ENOUGH = 12
"""Prompts that must have an example of a group: with fewer a resample might have none."""


class Rows:
    """Rows in the order of ``PARTS``; ``skipped`` ones say in words what was not measured."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def add(
        self,
        part: str,
        model: str,
        condition: str,
        quantity: str,
        found: Interval | None,
        *,
        group: str = "",
        layer: str = "",
        alpha: float = math.nan,
    ) -> None:
        """One row; nothing where there is no interval because nothing was there to measure."""
        if found is None:
            return
        value, low, high = (float(v) for v in (found.mean, found.low, found.high))
        self._row(part, model, condition, quantity, group, layer, alpha, value, low, high, found.n)

    def skip(self, model: str, why: str) -> None:
        """A line in the place of numbers."""
        self._row("skipped", model, why, "", "", "", math.nan, math.nan, math.nan, math.nan, 0)

    def take(self, other: Rows) -> None:
        """Put the other's rows behind these."""
        self._rows += other._rows

    def table(self) -> pd.DataFrame:
        """Every row, skipped parts first; ``layer`` is a number, NaN where a row is of no one layer."""
        rows = sorted(self._rows, key=lambda row: PARTS.index(row["part"]))
        found = pd.DataFrame(rows, columns=_COLUMNS)
        return found.assign(layer=numbers(found["layer"]))

    def _row(self, *values: Any) -> None:
        self._rows.append(dict(zip(_COLUMNS, values, strict=True)))


_COLUMNS = ["part", "model", "condition", "quantity", "group", "layer", "alpha", "value", "low", "high", "n"]


def rate(values: Float[Tensor, "n"] | Float[np.ndarray, "n"], z: float = 1.959964) -> Interval:
    """The mean of values in [0, 1] with Wilson's interval (1927), at 95 % as it stands.

    The bootstrap of a rate that is 0 in the sample is the point 0; this one is not.
    """
    data = np.asarray(values, dtype=np.float64)
    n, p = len(data), float(data.mean())
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    ends = (min(middle - half, p), max(middle + half, p))
    return Interval(np.array(p), np.array(max(ends[0], 0.0)), np.array(min(ends[1], 1.0)), n)


def level(error: Float[Tensor, "n"]) -> Interval:
    """The mean error of prompts with its interval: Wilson's where every error is 0 or 1, else the bootstrap."""
    values = error.detach().cpu().double()
    return rate(values.numpy()) if bool(((values == 0) | (values == 1)).all()) else bootstrap(values)


def mean_in(values: Float[Tensor, "batch example"], chosen: Bool[Tensor, "batch example"]) -> Interval | None:
    """The mean of ``values`` over the ``chosen`` examples, bootstrap over prompts; None if too few prompts have any."""
    if int(chosen.any(1).sum()) < ENOUGH:
        return None
    return ratio((values.double() * chosen).sum(1), chosen.double().sum(1))


def by_place(values: Float[np.ndarray, "batch place"], least: int = ENOUGH) -> Float[np.ndarray, "3 place"]:
    """Mean, low and high at each place over the prompts that have one there (not NaN); NaN where too few have."""
    found = np.full((3, values.shape[1]), np.nan)
    for place in range(values.shape[1]):
        here = values[:, place][np.isfinite(values[:, place])]
        if len(here) >= least:
            one = bootstrap(here)
            found[:, place] = one.mean, one.low, one.high
    return found
