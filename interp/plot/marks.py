"""Panels of single values with their intervals: bars, dots, and bars of shares that sum to 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import seaborn
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from interp.plot.style import COLOURS, MARKERS


def bars(
    axes: Axes,
    names: Sequence[str],
    groups: Mapping[str, tuple[Float[np.ndarray, "k"], Float[np.ndarray, "k"], Float[np.ndarray, "k"]]],
    *,
    even: float | None = None,
) -> None:
    """Bars side by side with their intervals: group → (mean, low, high) for each of ``names``; ``even`` is drawn as
    the level that all would have if they were equal.
    """
    place, wide = np.arange(len(names)), 0.8 / len(groups)
    for i, (group, (mean, low, high)) in enumerate(groups.items()):
        at = place + (i - (len(groups) - 1) / 2) * wide
        hatch = ("", "///", "...", "xx")[i % 4]
        axes.bar(at, mean, wide, color=COLOURS[i], hatch=hatch, edgecolor="white", linewidth=0.5, label=group)
        axes.vlines(at, low, high, color="black", linewidth=1.1)
    axes.axhline(0, color="black", linewidth=0.8)
    if even is not None:
        axes.axhline(even, color="0.45", linewidth=1.4, linestyle="--", label="all equal")
    axes.set_xticks(place, list(names))
    seaborn.despine(ax=axes)


def dots(
    axes: Axes,
    names: Sequence[str],
    groups: Mapping[str, tuple[Float[np.ndarray, "k"], Float[np.ndarray, "k"], Float[np.ndarray, "k"]]],
    *,
    zero: float | None = None,
) -> None:
    """One row for each of ``names``, first on top, a mark with its interval for each group: group → (mean, low, high).
    NaN draws nothing; ``zero`` is a level to compare with.
    """
    place = np.arange(len(names), dtype=float)
    for i, (group, (mean, low, high)) in enumerate(groups.items()):
        at = place + (i - (len(groups) - 1) / 2) * 0.6 / len(groups)
        axes.hlines(at, low, high, color=COLOURS[i], linewidth=1.4)
        axes.plot(mean, at, MARKERS[i], color=COLOURS[i], markersize=4.5, linestyle="none", label=group)
    if zero is not None:
        axes.axvline(zero, color="0.45", linewidth=1.2, linestyle="--", zorder=0)
    axes.set_yticks(place, list(names))
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    seaborn.despine(ax=axes)


def shares(
    axes: Axes, bars: Mapping[str, Mapping[str, tuple[float, float, float]]], levels: Sequence[str], *, label: str
) -> None:
    """Stacked bars that sum to 1: bar name → level → (share, low, high); the share and its interval written in.

    An estimate below 0 has no bar: it is written under the others, which then reach above 1.
    """
    shades = {level: COLOURS[i % len(COLOURS)] for i, level in enumerate(levels)}
    hatches = dict(zip(levels, ("", "///", "...", "xx", "\\\\", "++"), strict=False))
    names, top = [], 1.0
    for position, (name, parts) in enumerate(bars.items()):
        bottom = 0.0
        names.append(
            "\n".join([name, *(f"{level} {part[0]:.2f}" for level, part in parts.items() if part[0] < -0.005)])
        )
        for level, (share, low, high) in parts.items():
            if share <= 0:
                continue
            axes.bar(
                position,
                share,
                0.72,
                bottom,
                color=shades[level],
                hatch=hatches[level],
                edgecolor="white",
                linewidth=0.5,
            )
            if share > 0.045:
                text = (
                    f"{share:.2f}\n[{low:.2f}, {high:.2f}]" if share > 0.09 else f"{share:.2f} [{low:.2f}, {high:.2f}]"
                )
                axes.text(
                    position,
                    bottom + share / 2,
                    text,
                    ha="center",
                    va="center",
                    fontsize=6.5,
                    bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 0.6},
                )
            bottom += share
        top = max(top, bottom)
    axes.set_xticks(range(len(bars)), names)
    axes.set_ylim(0, top)
    axes.set_ylabel(label)
    seaborn.despine(ax=axes)
    present = [level for level in levels if any(level in parts for parts in bars.values())]
    handles = [
        Rectangle((0, 0), 1, 1, facecolor=shades[level], hatch=hatches[level], edgecolor="white") for level in present
    ]
    axes.legend(handles[::-1], present[::-1], frameon=False, fontsize=7.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
