"""The figures' one style, and the few kinds of panel that analyses are made of.

Colour-blind-safe (Okabe & Ito), told apart in grey by line style and marker too; every curve has its interval, every
figure its n and its baseline. This is the one place that imports matplotlib and seaborn.
"""

from interp.plot.lines import baseline, boundary, curves, families, learning
from interp.plot.maps import heat_map, level_map, ratio_map
from interp.plot.marks import bars, dots, shares
from interp.plot.style import MARKERS, beside, called, canvas, count, grid, png, settle, svg

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
    "learning",
    "level_map",
    "png",
    "ratio_map",
    "settle",
    "shares",
    "svg",
]
