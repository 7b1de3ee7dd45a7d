"""The figure of learning curves, drawn from its result alone."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from analyses.learning_curves import rows as curve_rows
from interp import plot as draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from interp.result import Result


def figure(result: Result) -> Figure:
    """A panel for each setting: models in colour, rivals in grey, published numbers as rings."""
    panels_of = curve_rows.short(curve_rows.panels(result.arrays))
    across = min(3, len(panels_of))
    rows = [[1.0] * len(panels_of[i : i + across]) for i in range(0, len(panels_of), across)]
    rows = [row + [1.0] * (across - len(row)) for row in rows]
    whole, axes = draw.grid(rows, heights=[3.6] * len(rows), width=4.2 * across + 2.6)
    for spare in axes[len(panels_of) :]:
        spare.set_title("", loc="left")
        spare.set_axis_off()
    everyone = list(dict.fromkeys(line.who for panel in panels_of for line in panel.lines))
    kinds = {line.who: line.kind for panel in panels_of for line in panel.lines}
    order = {kind: [who for who in everyone if kinds[who] == kind] for kind in ("model", "rival", "published")}
    linear = str(result.arrays["metric"]).startswith(("nats", "share"))
    for panel, place in zip(panels_of, axes, strict=False):
        draw.learning(place, panel.lines, order, log=not linear)
        name = panel.name.replace(",", ", ").replace(":", " ").replace("+", " + ")
        draw.count(place, textwrap.fill(f"{name}, n = {panel.prompts}", 44))
        if panel.trained is not None:
            draw.boundary(place, panel.trained - 0.5, "longer than trained")
        place.set_xlabel("examples seen, k")
        place.set_ylabel(str(result.arrays["metric"]))
    draw.beside(whole, axes[: len(panels_of)])
    title = _title(result).replace("k = ", "k\u00a0=\u00a0")  # no line ends within it
    whole.suptitle(textwrap.fill(title, 52 * across), fontsize=10)
    return draw.settle(whole)


def _title(result: Result) -> str:
    """The sentence that the figure supports, made from its numbers."""
    return curve_rows.sentence(result.config, curve_rows.short(curve_rows.panels(result.arrays)))
