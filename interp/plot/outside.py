"""What lies outside a panel is said beside it: a curve is drawn as it is, never held at the edge as if it were there.

Where a curve leaves the panel there is a small mark at the edge; below the panel stand the names and values of those
that end outside it, or that are never in it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.lines import Line2D

SIDES = {"below": (1, -1, "v"), "above": (1, 1, "^"), "left of it": (0, -1, "<"), "right of it": (0, 1, ">")}
"""Side → the axis that is left (x 0, y 1), in which direction, and the mark."""
SLACK = 1e-6
"""A point this far beyond the edge, as a share of the panel, lies on it."""


def hidden(name: str) -> str:
    """The label of a curve that has no place of its own in a legend; :func:`mark_outside` still reads its name."""
    return f"_{name}"


def mark_outside(axes: Axes) -> list[str]:
    """Mark every curve and dot of ``axes`` that its limits leave out, and return what was written below the panel.

    Called once the limits are final. A curve has a mark wherever it leaves; it is named, with its smallest
    and largest value out there, where its last point or all of it is outside, and where it is dots and no curve.
    """
    axes.get_xlim(), axes.get_ylim()  # limits that are still to be found from the data are found now
    said: dict[str, list[str]] = {}
    for name, line in _named(axes):
        xy = np.stack(np.broadcast_arrays(*line.get_data(orig=False)), axis=-1).astype(float)
        xy = xy[np.isfinite(xy).all(axis=1)]
        if not len(xy):
            continue
        place = axes.transAxes.inverted().transform(axes.transData.transform(xy))
        for side, (axis, way, mark) in SIDES.items():
            beyond = place[:, axis] > 1 + SLACK if way > 0 else place[:, axis] < -SLACK
            if not beyond.any():
                continue
            dots = str(line.get_linestyle()).lower() in ("none", "", " ")
            starts = np.flatnonzero(beyond & ~np.concatenate([[False], beyond[:-1]]))
            _mark(axes, line, place[beyond if dots else starts], axis, way, mark)
            if dots or beyond[-1]:
                said.setdefault(side, []).append(f"{name} {_values(xy[beyond, axis])}")
    text = [f"{side}: {', '.join(each)}" for side, each in said.items()]
    if text:
        _write(axes, "; ".join(text))
    return text


def _named(axes: Axes) -> Iterator[tuple[str, Line2D]]:
    """The curves and dots in the coordinates of the data that have a name."""
    for line in axes.lines:
        name = str(line.get_label()).removeprefix("_")
        if name and not name.startswith(("child", "nolegend_")) and line.get_transform() is axes.transData:
            yield name, line
    for container in axes.containers:
        if isinstance(container, ErrorbarContainer) and isinstance(container.lines[0], Line2D):
            yield str(container.get_label()), container.lines[0]


def _mark(axes: Axes, line: Line2D, place: Float[np.ndarray, "points 2"], axis: int, way: int, mark: str) -> None:
    at = np.clip(place, 0.0, 1.0)
    at[:, axis] = 1.0 if way > 0 else 0.0
    look: dict[str, Any] = {"linestyle": "none", "marker": mark, "markersize": 4, "zorder": 5}
    axes.plot(*at.T, color=line.get_color(), clip_on=False, transform=axes.transAxes, **look)


def _values(values: Float[np.ndarray, " points"]) -> str:
    low, high = (f"{end:.2g}" for end in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"


def _write(axes: Axes, text: str) -> None:
    """Below the axis' label, or in its place; the layout makes room."""
    wide = axes.get_position().width * axes.get_figure(root=True).get_figwidth()  # type: ignore[union-attr]
    folded = textwrap.fill(text, max(24, int(wide * 72 / 3.2)))
    if not axes.get_xlabel():
        axes.set_xlabel(folded, fontsize=6.5)
        return
    look: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "top", "fontsize": 6.5}
    axes.annotate(folded, (0.5, 0.0), xycoords=axes.xaxis.label, xytext=(0, -1.5), **look)
