"""The figures' one style, and the few kinds of panel that analyses are made of.

Colour-blind-safe (Okabe & Ito), told apart in grey by line style and marker too; every curve has its interval, every
figure its n and its baseline. This is the one place that imports matplotlib and seaborn.
"""

import interp.plot.backend  # noqa: F401  # before anything loads matplotlib
from interp.plot.lines import baseline, boundary, curves, families, learning
from interp.plot.maps import heat_map, level_map, ratio_map
from interp.plot.marks import bars, dots, shares
from interp.plot.outside import mark_outside
from interp.plot.style import MARKERS, beside, called, canvas, count, grid, house, png, settle, svg

__all__ = [
    "MARKERS",
    "bars",
    "baseline",
    "beside",
    "boundary",
    "called",
    "canvas",
    "count",
    "curves",
    "dots",
    "families",
    "grid",
    "heat_map",
    "house",
    "learning",
    "level_map",
    "mark_outside",
    "png",
    "ratio_map",
    "settle",
    "shares",
    "svg",
]
