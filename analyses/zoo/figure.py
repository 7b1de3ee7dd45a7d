"""The figure of the bundled models, drawn from its result alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from interp import plot as draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from interp.result import Result


def figure(result: Result) -> Figure:
    """The grid: a row for each task, a column for each architecture."""
    arrays = result.arrays
    rows, columns = arrays["rows"], arrays["columns"]
    whole, (axes,) = draw.canvas([1.0], height=1.5 + 0.72 * len(rows), width=3.6 + 1.25 * len(columns))
    draw.ratio_map(
        axes,
        arrays["ratio"],
        arrays["error"],
        [str(row) for row in rows],
        [str(column) for column in columns],
        label="error ÷ the rival's",
    )
    whole.suptitle(_title(result), fontsize=9.5)
    return draw.settle(whole)


def _title(result: Result) -> str:
    """The sentence that the figure supports, made from its numbers."""
    value, low, high = result.arrays["ratio"]
    measured = int(np.isfinite(value).sum())
    better = int((np.isfinite(value) & ((high < 1) | (value == 0))).sum())
    worse = int((np.isfinite(value) & (low > 1)).sum())
    prompts = int(result.arrays["prompts"])
    return (
        f"{better} of {measured} models have a smaller error than the best classical rival that is not exact, "
        f"{worse} a larger one\n(below an error its ratio to the rival's and its 95 % interval over {prompts} prompts)"
    )
