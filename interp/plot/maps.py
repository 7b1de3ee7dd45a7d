"""Panels of cells: levels, signed values, ratios."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize, SymLogNorm


def level_map(
    axes: Axes, values: Float[np.ndarray, "row column"], rows: Sequence[str], *, label: str, edge: float | None = None
) -> None:
    """Values on a log colour scale, dark where small; black where 0, which has no place on it (the bar then ends in a
    black arrow). ``edge`` is a line between two columns.
    """
    some = values[np.isfinite(values) & (values > 0)]
    low, high = (float(some.min()), float(some.max())) if len(some) else (1.0, 1.0)
    # A little below the smallest: drawing rounds, and it would be black.
    norm = LogNorm(0.999 * low, high if high > low else low * 1.01)
    none = values <= 0
    colours = matplotlib.colormaps["viridis"].with_extremes(under="black")
    shown = np.where(none, low / 2, values)
    image = axes.imshow(shown, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.tick_params(length=2)
    if edge is not None:
        axes.axvline(edge, color="white", linewidth=1.6, linestyle="--")
    extend = "min" if none.any() else "neither"
    axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, extend=extend).set_label(label)


def heat_map(
    axes: Axes,
    values: Float[np.ndarray, "row column"],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    label: str,
    unsure: np.ndarray | None = None,
    linear: bool = False,
    top: float | None = None,
    bar: bool = True,
) -> None:
    """Signed values on a symmetric log (or linear) colour scale, each written in its cell; ``unsure`` cells (interval
    holds 0) in grey italics. Maps side by side share ``top``, the scale's end, and one bar. A NaN is an empty cell.
    """
    top = (float(np.nanmax(np.abs(values))) or 1.0) if top is None else top
    small = max(top / 300, 1e-12)
    norm = Normalize(-top, top) if linear else SymLogNorm(small, vmin=-top, vmax=top)
    image = axes.imshow(values, cmap="PuOr_r", norm=norm, aspect="auto")
    for i, j in np.argwhere(np.isfinite(values)):
        value: Any = values[i, j]
        doubt = unsure is not None and bool(unsure[i, j])
        shade = image.cmap(image.norm(value))
        dark = 0.299 * shade[0] + 0.587 * shade[1] + 0.114 * shade[2] < 0.5
        axes.text(
            j,
            i,
            _short(value),
            ha="center",
            va="center",
            fontsize=6.5,
            color="white" if dark else ("0.45" if doubt else "black"),
            fontstyle="italic" if doubt else "normal",
        )
    turned: dict[str, Any] = {"rotation": 55, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(columns)), columns, **(turned if max(map(len, columns)) > 2 else {}))
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if not bar:
        return
    scale = axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    decades = 10.0 ** np.arange(np.ceil(np.log10(small * 3)), np.floor(np.log10(top)) + 1)
    if not linear:
        scale.set_ticks([*-decades[::-1], 0.0, *decades])
    scale.minorticks_off()
    scale.set_label(label, fontsize=8)


def ratio_map(
    axes: Axes,
    ratio: Float[np.ndarray, "three row column"],
    value: Float[np.ndarray, "row column"],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    label: str,
) -> None:
    """Ratios (with low and high) on a log colour scale that is white at 1; in each cell the value, and below it the
    ratio with its interval, in italics where the interval holds 1. A cell without a ratio is empty.
    """
    bound = 30.0
    shown = np.clip(ratio[0], 1 / bound, bound)
    image = axes.imshow(np.ma.masked_invalid(np.log10(shown)), cmap="PuOr_r", norm=Normalize(-1.5, 1.5), aspect="auto")
    for (i, j), one in np.ndenumerate(ratio[0]):
        if not np.isfinite(one):
            if np.isfinite(value[i, j]):
                axes.text(j, i, _short(float(value[i, j])), ha="center", va="center", fontsize=8)
            continue
        low, high = ratio[1:, i, j]
        doubt = bool(low <= 1 <= high)
        shade = image.cmap(image.norm(np.log10(shown[i, j])))
        dark = 0.299 * shade[0] + 0.587 * shade[1] + 0.114 * shade[2] < 0.5
        look: dict[str, Any] = {"ha": "center", "color": "white" if dark else "black"}
        look["fontstyle"] = "italic" if doubt else "normal"
        ends = f" [{_times(low)}, {_times(high)}]" if np.isfinite(low) else ""
        axes.text(j, i - 0.06, f"{value[i, j]:.2g}", va="bottom", fontsize=9, **look)
        axes.text(j, i + 0.06, f"×{_times(one)}{ends}", va="top", fontsize=6.5, **look)
    axes.set_xticks(range(len(columns)), [name.replace("-", "-\n", 1) if len(name) > 11 else name for name in columns])
    axes.set_yticks(range(len(rows)), list(rows))
    axes.tick_params(length=0, labelsize=8.5)
    axes.set_xticks(np.arange(len(columns) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="minor", length=0)
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, extend="both")
    ticks = (1 / 30, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    bar.set_ticks([np.log10(tick) for tick in ticks], labels=["1/30", "0.1", "0.3", "1", "3", "10", "30"])
    bar.minorticks_off()
    bar.set_label(label)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _short(value: float) -> str:
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 10:
        return f"{value:.0f}"
    if size >= 0.1:
        return f"{value:.2f}"
    return f"{value:.3f}" if size >= 0.001 else f"{value:.0e}".replace("e-0", "e-")


def _times(value: float) -> str:
    """A ratio in two digits."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
