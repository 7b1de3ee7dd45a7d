"""One look for every figure: its colours, the sheet with its panels, what is written around them, and its files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from io import BufferedIOBase
from pathlib import Path, PurePath
from string import ascii_lowercase
from typing import Any

import numpy as np
import seaborn
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

from interp.plot.outside import mark_outside

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
DPI = 200
"""Of the PNG."""


def house_look(font_scale: float = 1.0) -> dict[str, Any]:
    """The settings of this project's figures, on top of matplotlib's own defaults."""
    return {
        **seaborn.axes_style("ticks", {"font.family": "sans-serif"}),
        **seaborn.plotting_context("paper", font_scale=font_scale),
        "axes.prop_cycle": cycler("color", seaborn.color_palette("deep")),
        "svg.fonttype": "none",
        "svg.hashsalt": "mambascope",  # names in an SVG are random without it
    }


@contextmanager
def house(font_scale: float = 1.0) -> Iterator[None]:
    """Inside the block matplotlib has its defaults and this project's look; afterwards the settings of the session.

    Back end, windows and the like are the session's all the time.
    """
    before = _font_scale.set(font_scale)
    try:
        with style.context(["default", house_look(font_scale)]):
            yield
    finally:
        _font_scale.reset(before)


_font_scale = ContextVar("font_scale", default=1.0)


class HouseFigure(Figure):
    """A figure that is drawn, by whomever and whenever, in the look in which it was made.

    Ticks and their labels are made in drawing: under the session's settings they would be of another size, or be
    handed to LaTeX.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._scale = _font_scale.get()
        with house(self._scale):
            super().__init__(*args, **kwargs)

    def draw(self, renderer: Any) -> None:
        with house(self._scale):
            super().draw(renderer)

    def get_tightbbox(self, renderer: Any = None, *, bbox_extra_artists: Any = None) -> Any:
        with house(self._scale):
            return super().get_tightbbox(renderer, bbox_extra_artists=bbox_extra_artists)


def canvas(columns: Sequence[float], height: float, width: float = 12.5) -> tuple[Figure, list[Axes]]:
    """A figure with one row of panels of the given relative widths, lettered a, b, c …"""
    figure = HouseFigure(figsize=(width, height), layout="constrained")
    with house(_font_scale.get()):
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
    figure = HouseFigure(figsize=(width, sum(heights)), layout="constrained")
    parts = figure.add_gridspec(len(rows), 1, height_ratios=list(heights))
    panels = []
    for i, columns in enumerate(rows):
        blocks = [one if isinstance(one, tuple) else (one,) for one in columns]
        row = parts[i].subgridspec(1, len(blocks), width_ratios=[sum(block) for block in blocks])
        for j, block in enumerate(blocks):
            own = row[j].subgridspec(deep if isinstance(columns[j], tuple) else 1, len(block), width_ratios=block)
            with house(_font_scale.get()):
                panels += [figure.add_subplot(own[a, b]) for a in range(own.nrows) for b in range(own.ncols)]
    for letter, panel in zip(ascii_lowercase, panels, strict=False):
        panel.set_title(letter, loc="left", fontweight="bold")
    return figure, panels


def settle(figure: Figure) -> Figure:
    """``figure`` with what its panels leave out marked, and its layout computed now and then left alone: it takes as
    long as drawing does, and a figure is drawn once for each format that it is saved in.
    """
    for axes in figure.axes:
        mark_outside(axes)
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    figure.set_layout_engine("none")
    return figure


def png(figure: Figure, file: Path | BufferedIOBase) -> None:
    """Draw ``figure`` into a PNG file and leave the layout as it then is.

    ``savefig`` would draw it twice: once for the layout alone, which drawing computes anyway.
    """
    before = figure.dpi
    figure.set_dpi(DPI)
    FigureCanvasAgg(figure).print_png(file)
    figure.set_dpi(before)
    figure.set_layout_engine("none")


def svg(figure: Figure, file: Path | BufferedIOBase) -> None:
    """Draw ``figure`` into an SVG file, without the date: equal figures are equal files."""
    FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})


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
