"""Panels of curves: with their bands, in families, and errors against the number of examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import seaborn
from jaxtyping import Float, Num
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from interp.plot.outside import hidden
from interp.plot.style import COLOURS, GREYS, MARKERS, STYLES

MARGIN = 0.05
"""What matplotlib leaves free at each end of an axis, as a share of it."""
NEAR = 30.0
"""A panel of learning curves goes down to the errors of rivals that are at most this many times below a model's."""


def curves(
    axes: Axes,
    x: Num[np.ndarray, "k"],
    lines: Mapping[str, tuple[Float[np.ndarray, "k"], Float[np.ndarray, "k"], Float[np.ndarray, "k"]]],
    *,
    floor: float | None,
) -> None:
    """Lines with interval bands on a log axis; ``lines`` is name → (mean, low, high). What is below ``floor`` is below
    the panel; ``floor=None`` is a linear axis.
    """
    for i, (name, (mean, low, high)) in enumerate(lines.items()):
        style = i % len(STYLES)
        axes.plot(
            x,
            mean,
            color=COLOURS[style],
            linestyle=STYLES[style],
            marker=MARKERS[style],
            markersize=3.5,
            markevery=(i % 3, 3),
            linewidth=1.4,
            label=name,
        )
        axes.fill_between(x, low, high, color=COLOURS[style], alpha=0.18, linewidth=0)
    if floor is not None:
        axes.set_yscale("log")
        axes.set_ylim(floor, _range([end for line in lines.values() for end in line], floor)[1])
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
    members = list(dict.fromkeys(member for lines in groups.values() for member in lines))
    for i, (group, lines) in enumerate(groups.items()):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        for member, (x, line) in lines.items():
            mean, low, high = np.asarray(line).T
            style = STYLES[members.index(member) % len(STYLES)]
            look: dict[str, Any] = {"marker": marker, "markersize": 3, "markevery": (0, max(1, len(x) // 8))}
            look["label"] = hidden(" ".join(filter(None, (group, member))))
            axes.plot(x, mean, color=colour, linestyle=style, linewidth=1.3, **look)
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
        drawn = [np.asarray(line) for lines in groups.values() for _, line in lines.values()]
        axes.set_ylim(*_range(drawn, floor))
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


def _range(values: Sequence[Num[np.ndarray, "..."]], floor: float) -> tuple[float, float]:
    """The ends of a log axis for what is at ``floor`` or above it, with the margin that matplotlib leaves."""
    every = np.concatenate([np.ravel(each) for each in values]) if len(values) else np.array([])
    every = every[np.isfinite(every)]
    shown = np.maximum(every, floor)
    low, high = float(shown.min(initial=np.inf)), float(shown.max(initial=0.0))
    if not low < high:
        return floor, 10 * max(floor, high)
    room = (high / low) ** MARGIN
    return floor if (every < floor).any() else low / room, high * room


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
    style: int = 0,
) -> None:
    """A reference curve: thick, grey, without a band of its own; ``style`` tells several apart."""
    axes.plot(
        x,
        y,
        color="0.45",
        linestyle=STYLES[style],
        linewidth=2.6 if style == 0 else 1.8,
        alpha=0.75,
        zorder=1,
        label=name,
    )


def learning(axes: Axes, lines: Sequence[Any], order: Mapping[str, Sequence[str]], *, log: bool) -> None:
    """Curves against k, each with ``who``, ``kind``, ``ks`` and ``levels`` (mean, low, high; k).

    Models in colour with a band and marks; rivals in grey without, told apart by line style and shade; published
    numbers as rings. ``order`` is kind → names: a name looks the same in every panel. A log axis is that of the models
    and of what is near them: others leave the panel, at the bottom (a rival that is exact) or at the top.
    """
    for line in lines:
        place = list(order[line.kind]).index(line.who)
        mean, low, high = line.levels
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
        floor = _floor(lines)
        models = [line.levels[0].max() for line in lines if line.kind == "model"]
        top = _range([line.levels for line in lines], floor)[1]
        axes.set_yscale("log")
        axes.set_ylim(floor / 1.3, min(top, 12 * max(models, default=10.0)))
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if axes.get_ylim()[1] < 300 * floor else (1.0,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    seaborn.despine(ax=axes)


def _floor(lines: Sequence[Any]) -> float:
    """The bottom of a log axis: below the smallest error of a model, and below those of rivals near it."""
    models = [float(np.nanmin(line.levels[0])) for line in lines if line.kind == "model"]
    others = np.concatenate([line.levels[0] for line in lines if line.kind != "model"] or [np.array([])])
    smallest = max(min(models), 1e-7) if models else float(others[others > 1e-6].min(initial=1.0))
    return float(others[others >= smallest / NEAR].min(initial=smallest)) / 2
