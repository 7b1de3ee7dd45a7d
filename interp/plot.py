"""The figures' one style, and the few kinds of panel that analyses are made of.

Colour-blind-safe (Okabe & Ito), told apart in grey by line style and marker too; every curve has its interval, every
figure its n and its baseline. This is the one place that imports matplotlib and seaborn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from string import ascii_lowercase
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import seaborn
from jaxtyping import Float, Num
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A6FB5", "#7F4F24", "#6B705C")
STYLES = (
    "-",
    "--",
    "-.",
    ":",
    (0, (5, 1)),
    (0, (3, 1, 1, 1)),
    (0, (1, 1)),
    (0, (6, 2, 1, 2)),
    (0, (2, 1)),
    (0, (8, 3)),
)
GREYS = ("0.25", "0.45", "0.62", "0.35", "0.55", "0.70")
MARKERS = ("o", "s", "^", "v", "D", "P", "X", "*", "<", "p")


def canvas(columns: Sequence[float], height: float, width: float = 12.5) -> tuple[Figure, list[Axes]]:
    """A figure with one row of panels of the given relative widths, lettered a, b, c …"""
    seaborn.set_theme(context="paper", style="ticks", font_scale=1.05)
    matplotlib.rcParams["svg.fonttype"] = "none"
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, len(columns), gridspec_kw={"width_ratios": list(columns)})
    panels = list(np.atleast_1d(axes))
    if len(panels) > 1:
        for letter, panel in zip("abcdefgh", panels, strict=False):
            panel.set_title(letter, loc="left", fontweight="bold")
    return figure, panels


def grid(
    rows: Sequence[Sequence[float | tuple[float, ...]]], heights: Sequence[float], width: float = 14.0, deep: int = 1
) -> tuple[Figure, list[Axes]]:
    """A figure with rows of panels, each row with its own relative widths and its height in inches; lettered.

    A tuple of widths in the place of one is a block: as wide as their sum, with ``deep`` rows of panels of its own.
    """
    seaborn.set_theme(context="paper", style="ticks", font_scale=1.0)
    matplotlib.rcParams["svg.fonttype"] = "none"
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    parts = figure.add_gridspec(len(rows), 1, height_ratios=list(heights))
    panels = []
    for i, columns in enumerate(rows):
        blocks = [one if isinstance(one, tuple) else (one,) for one in columns]
        row = parts[i].subgridspec(1, len(blocks), width_ratios=[sum(block) for block in blocks])
        for j, block in enumerate(blocks):
            own = row[j].subgridspec(deep if isinstance(columns[j], tuple) else 1, len(block), width_ratios=block)
            panels += [figure.add_subplot(own[a, b]) for a in range(own.nrows) for b in range(own.ncols)]
    for letter, panel in zip(ascii_lowercase, panels, strict=False):
        panel.set_title(letter, loc="left", fontweight="bold")
    return figure, panels


def settle(figure: Figure) -> Figure:
    """``figure`` with its layout computed now and then left alone: it takes as long as drawing does, and a figure is
    drawn once for each format that it is saved in.
    """
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    figure.set_layout_engine("none")
    return figure


def curves(
    axes: Axes,
    x: Num[np.ndarray, "k"],
    lines: Mapping[str, tuple[Float[np.ndarray, "k"], Float[np.ndarray, "k"], Float[np.ndarray, "k"]]],
    *,
    floor: float | None,
) -> None:
    """Lines with interval bands on a log axis; ``lines`` is name → (mean, low, high). Below ``floor`` nothing is
    drawn; ``floor=None`` is a linear axis.
    """
    bottom = -np.inf if floor is None else floor
    for i, (name, (mean, low, high)) in enumerate(lines.items()):
        style = i % len(STYLES)
        axes.plot(
            x,
            np.maximum(mean, bottom),
            color=COLOURS[style],
            linestyle=STYLES[style],
            marker=MARKERS[style],
            markersize=3.5,
            markevery=(i % 3, 3),
            linewidth=1.4,
            label=name,
        )
        axes.fill_between(
            x, np.maximum(low, bottom), np.maximum(high, bottom), color=COLOURS[style], alpha=0.18, linewidth=0
        )
    if floor is not None:
        axes.set_yscale("log")
        axes.set_ylim(bottom=floor)
    seaborn.despine(ax=axes)


def families(
    axes: Axes,
    groups: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]],
    *,
    floor: float | None,
    key: bool = False,
) -> None:
    """Several curves for each of several groups: group → member → (x (k,), mean, low and high (k, 3)).

    Colour and marker tell the groups apart, line style the members. NaN ends draw no band. ``floor`` as in
    :func:`curves`; ``key`` also names the groups in the legend (once in a figure is enough). What was drawn before with
    a label (:func:`baseline`) is in the legend too.
    """
    bottom = -np.inf if floor is None else floor
    members = list(dict.fromkeys(member for lines in groups.values() for member in lines))
    for i, lines in enumerate(groups.values()):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        for member, (x, line) in lines.items():
            mean, low, high = np.maximum(line, bottom).T
            style = STYLES[members.index(member) % len(STYLES)]
            every = (0, max(1, len(x) // 8))
            axes.plot(
                x, mean, color=colour, linestyle=style, marker=marker, markersize=3, markevery=every, linewidth=1.3
            )
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
            if len(x) == 1:  # a band of one point has no width
                axes.vlines(x, low, high, color=colour, linewidth=1.3)
    named = list(enumerate(groups)) if key else []
    handles: list[Any] = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)]) for i, _ in named
    ]
    labels = [name for _, name in named]
    if len(members) > 1:
        styles: Any = STYLES
        handles += [Line2D([], [], color="0.3", linestyle=styles[i % len(STYLES)]) for i in range(len(members))]
        labels += members
    beside, names = axes.get_legend_handles_labels()
    if floor is not None:
        axes.set_yscale("log")
    if handles or beside:
        _headroom(axes, 0.085 * -(-len([*handles, *beside]) // 2))
        legend = ([*handles, *beside], [*labels, *names])
        axes.legend(*legend, frameon=False, fontsize=7, ncols=2, loc="upper left", borderaxespad=0.2)
    if floor is not None:
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 300 * low else (1.0,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    seaborn.despine(ax=axes)


def _headroom(axes: Axes, share: float) -> None:
    """Empty room above the curves, for a legend: that share of the axis."""
    low, high = axes.get_ylim()
    if axes.get_yscale() == "log":
        axes.set_ylim(low, low * (high / low) ** (1 / (1 - share)))
    else:
        axes.set_ylim(low, low + (high - low) / (1 - share))


def boundary(axes: Axes, x: float, label: str) -> None:
    """A vertical line between what was trained and what was not."""
    axes.axvline(x, color="0.45", linewidth=1.0, linestyle=":", zorder=0)
    axes.text(x, 1.0, f" {label}", transform=axes.get_xaxis_transform(), fontsize=7, color="0.35", va="top")


def baseline(
    axes: Axes,
    x: Num[np.ndarray, "k"],
    y: Float[np.ndarray, "k"],
    name: str,
    *,
    floor: float | None,
    style: int = 0,
) -> None:
    """A reference curve: thick, grey, without a band of its own; ``style`` tells several apart."""
    axes.plot(
        x,
        np.maximum(y, -np.inf if floor is None else floor),
        color="0.45",
        linestyle=STYLES[style],
        linewidth=2.6 if style == 0 else 1.8,
        alpha=0.75,
        zorder=1,
        label=name,
    )


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


def level_map(
    axes: Axes, values: Float[np.ndarray, "row column"], rows: Sequence[str], *, label: str, edge: float | None = None
) -> None:
    """Values on a log colour scale, dark where small, 0 as the smallest that is not; ``edge`` is a line between two
    columns.
    """
    shown = np.maximum(values, values[values > 0].min() if (values > 0).any() else 1.0)
    low, high = float(shown.min()), float(shown.max())
    norm = LogNorm(low, high if high > low else low * 1.01)
    image = axes.imshow(shown, cmap="viridis", norm=norm, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.tick_params(length=2)
    if edge is not None:
        axes.axvline(edge, color="white", linewidth=1.6, linestyle="--")
    axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02).set_label(label)


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


def shares(
    axes: Axes, bars: Mapping[str, Mapping[str, tuple[float, float, float]]], levels: Sequence[str], *, label: str
) -> None:
    """Stacked bars that sum to 1: bar name → level → (share, low, high); the share and its interval written in."""
    shades = {level: COLOURS[i % len(COLOURS)] for i, level in enumerate(levels)}
    hatches = dict(zip(levels, ("", "///", "...", "xx", "\\\\", "++"), strict=False))
    for position, parts in enumerate(bars.values()):
        bottom = 0.0
        for level, (share, low, high) in parts.items():
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
    axes.set_xticks(range(len(bars)), list(bars))
    axes.set_ylim(0, 1)
    axes.set_ylabel(label)
    seaborn.despine(ax=axes)
    present = [level for level in levels if any(level in parts for parts in bars.values())]
    handles = [
        Rectangle((0, 0), 1, 1, facecolor=shades[level], hatch=hatches[level], edgecolor="white") for level in present
    ]
    axes.legend(handles[::-1], present[::-1], frameon=False, fontsize=7.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _short(value: float) -> str:
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 10:
        return f"{value:.0f}"
    if size >= 0.1:
        return f"{value:.2f}"
    return f"{value:.3f}" if size >= 0.001 else f"{value:.0e}".replace("e-0", "e-")


def learning(axes: Axes, lines: Sequence[Any], order: Mapping[str, Sequence[str]], *, log: bool) -> None:
    """Curves against k, each with ``who``, ``kind``, ``ks`` and ``levels`` (mean, low, high; k).

    Models in colour with a band and marks; rivals in grey without, told apart by line style and shade; published
    numbers as rings. ``order`` is kind → names: a name looks the same in every panel. On a log axis what is smaller
    than any model's error is drawn at the bottom, and a rival may leave the panel at the top.
    """
    floor = _floor(lines) if log else -np.inf
    for line in lines:
        place = list(order[line.kind]).index(line.who)
        mean, low, high = np.maximum(line.levels, floor)
        look: dict[str, Any] = {"label": line.who}
        if line.kind == "model":
            colour = COLOURS[place % len(COLOURS)]
            every = (0, max(1, len(mean) // 8))
            look |= {"linestyle": STYLES[place % len(STYLES)], "marker": MARKERS[place % len(MARKERS)]}
            look |= {"markersize": 3.5, "markevery": every, "linewidth": 1.5, "zorder": 3}
        elif line.kind == "rival":
            colour = GREYS[place % len(GREYS)]
            few = len(mean) < 8
            look |= {"linestyle": STYLES[place % len(STYLES)], "linewidth": 1.5, "zorder": 2}
            look |= {"marker": "|" if few else None, "markersize": 6}
        else:
            ends = np.abs(np.stack([low, high]) - mean)
            ring = MARKERS[place % len(MARKERS)]
            look |= {"fmt": ring, "markerfacecolor": "none", "markersize": 8, "elinewidth": 1.2, "zorder": 4}
            axes.errorbar(line.ks, mean, yerr=ends, color="black", **look)
            continue
        axes.plot(line.ks, mean, color=colour, **look)
        if line.kind == "model":
            axes.fill_between(line.ks, low, high, color=colour, alpha=0.18, linewidth=0)
    if log:
        models = [line.levels[0].max() for line in lines if line.kind == "model"]
        axes.set_yscale("log")
        axes.set_ylim(floor / 1.3, min(axes.get_ylim()[1], 12 * max(models, default=10.0)))
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if axes.get_ylim()[1] < 300 * floor else (1.0,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    seaborn.despine(ax=axes)


def count(axes: Axes, text: str) -> None:
    """What a panel shows and on how many prompts, beside its letter."""
    axes.set_title(text, loc="center", fontsize=8.5)


def called(model: str) -> str:
    """A model's name in a figure: the bundled name, or the last part of the path that was given."""
    return PurePath(model).name.removesuffix(".safetensors")


def beside(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend for all ``panels``, outside on the right: each name once."""
    named: dict[str, Any] = {}
    for axes in panels:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(name, handle)
    figure.legend(
        list(named.values()), list(named), loc="outside right center", frameon=False, fontsize=8, handlelength=3.2
    )


def _floor(lines: Sequence[Any]) -> float:
    """The bottom of a log axis: below the smallest error of a model, or of a rival that is not 0 but for rounding."""
    models = [line.levels[0].min() for line in lines if line.kind == "model"]
    others = [line.levels[0][line.levels[0] > 1e-6].min(initial=1.0) for line in lines if line.kind != "model"]
    smallest = min(models) if models else min(others, default=1e-3)
    return float(max(smallest, 1e-7)) / 2


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


def _times(value: float) -> str:
    """A ratio in two digits."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
