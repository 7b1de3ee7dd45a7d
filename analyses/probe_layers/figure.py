"""The figure of ``probe_layers``, drawn from its result alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from analyses.probe_layers.matching import NONE
from interp import plot as draw
from interp.result import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {
    "w": "w", "w_ols": "least-squares estimate", "Xty": "Xᵀy", "y": "y",
    "direction": "direction", "label": "label", "Xty_clean": "Xᵀy of clean ones", "n_clean": "number of clean ones",
    "table": "transition table", "estimate": "its Bayes estimate", "row": "row in force", "counts": "counts of pairs",
}  # fmt: skip
"""What the figure calls the targets of the probes."""
DISTANCE = "distance: Σ (ŷ − algorithm)² ÷ Σ (ŷ − mean)²"
NAMED = ("name", "said", "clear")
OFF = 3.3
"""Largest distance that is drawn; a constant has 1."""


def figure(result: Result) -> Figure:
    """Lens, scale and shift, shares of the decrease; probes of residual and state, nearest algorithms, map."""
    arrays, config = result.arrays, result.config
    blocks = np.arange(arrays["lens_fitted"].shape[1])
    sheet, panels = draw.grid([(1.2, 0.9, 1.1, 1.15), (0.85, 0.85, 1.1, 0.95)], heights=(3.8, 4.4), width=17.0)
    lens, fit, decrease, mapped, residual, state, match, match_k = panels
    _draw_lens(lens, arrays, blocks)
    symbols = len(arrays["rivals"]) > 0
    fitted = {"scale a": "scale"} if symbols else {"scale a": "scale", "shift b": "shift"}
    draw.curves(fit, blocks, {name: tuple(arrays[key]) for name, key in fitted.items()}, floor=None)
    draw.baseline(fit, blocks, np.ones(len(blocks)), "no scaling" if symbols else "no scaling, no shift", style=1)
    draw.baseline(fit, blocks, np.zeros(len(blocks)), "_", style=1)
    fit.set_ylabel("scale a in log softmax(a z + b)" if symbols else "y ≈ a ŷ + b, median over prompts")
    shares = {"error": tuple(arrays["share"])} if symbols else {}
    shares = shares or {"error": tuple(arrays["share"]), "log error": tuple(arrays["factor"])}
    draw.bars(
        decrease,
        [str(b) for b in blocks[1:]],
        {name: ends for name, ends in shares.items() if np.isfinite(ends[0]).all()},
        even=1 / max(1, len(blocks) - 1),
    )
    decrease.set_ylabel("share of the decrease")
    draw.level_map(
        mapped,
        arrays["map"],
        [str(b) for b in blocks],
        label=f"{arrays['metric']}, not fitted",
        edge=float(arrays["map_trained"]) - 0.5,
    )
    mapped.set_xlabel("examples seen, k (beyond the line: more than in training)")
    mapped.set_ylabel("block")
    _draw_probes(residual, arrays, "residual")
    _draw_probes(state, arrays, "state")
    _draw_matches(match, match_k, arrays, blocks)
    for panel in (lens, fit, residual, state, match):
        panel.set_xlabel("block (0: before the first)")
    decrease.set_xlabel("block")
    for panel in (lens, fit, match):
        panel.set_xticks(blocks)
    for panel in (lens, fit, decrease):
        panel.legend(frameon=False, fontsize=7)
    # Panels side by side share their lines, so one legend does for both; it stands at the last one that has any.
    for pair in ((residual, state), (match, match_k)):
        drawn = [panel for panel in pair if panel.lines]
        if drawn:
            drawn[-1].legend(frameon=False, fontsize=6.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    panels[0].set_ylabel(str(arrays["metric"]))
    sheet.suptitle(_title(result), fontsize=10.5)
    how = f"m = {config['m']} points fit, {config['queries']} judge"
    if symbols:
        how = f"as many others fit, the last {config['queries']} examples judge"
    sheet.supxlabel(
        f"n = {config['prompts']} prompts (lens; {how}), "
        f"{2 * config['prompts']} others (probes: a quarter judges; matching: half; map); k = {config['k']}; "
        "bands and lines: 95 % bootstrap over prompts; * the one that fits, (*) with ties, none: nothing fits",
        fontsize=7.5,
        color="0.35",
    )
    return draw.settle(sheet)


def _draw_lens(axes: Any, arrays: Mapping[str, Any], blocks: np.ndarray) -> None:
    regression, rivals = bool(arrays["lens_refit"]), [str(name) for name in arrays["rivals"]]
    other = "labels of another w" if regression else "labels of another prompt"
    if rivals:
        other = "symbols of another chain"
    named = {"as the model says it": "lens_raw", "untrained weights": "lens_untrained", other: "lens_other_labels"}
    lowest = min(float(arrays["lens_fitted"].min()), float(arrays["lens_raw"].min()))
    floor = max(1e-4, 0.3 * lowest) if regression and not rivals else None
    if regression:
        named = {"scale and shift fitted": "lens_fitted", **named}
    draw.curves(axes, blocks, {name: tuple(arrays[key]) for name, key in named.items()}, floor=floor)
    level = np.full(len(blocks), float(arrays["lens_floor"]))
    nothing = "chance" if not regression else "knows nothing (fitted)" if rivals else "knows nothing (formula)"
    draw.baseline(axes, blocks, level, nothing)
    # One who knows nothing is drawn already.
    for style, (name, value) in enumerate(zip(rivals, arrays["rival_errors"], strict=True), start=1):
        if name != "uniform":
            draw.baseline(axes, blocks, np.full(len(blocks), float(value)), name, style=style)
    for style, (name, key) in enumerate({"GD, a step a block": "descent_gd", "GD++": "descent_gdpp"}.items(), start=2):
        if key in arrays:
            draw.baseline(axes, blocks, arrays[key], name, style=style)


def _draw_probes(axes: Any, arrays: Mapping[str, Any], features: str) -> None:
    ks, name = arrays["probe_ks"], f"probe_{features}"
    late = arrays.get(f"{name}_{ks[-1]}") if len(ks) else None
    if late is None:
        axes.set_axis_off()
        axes.text(0.5, 0.5, f"no {features} to probe", ha="center", transform=axes.transAxes)
        return
    targets = [str(target) for target in arrays["probe_targets"]]
    at = np.arange(late.shape[-1]) + (0 if features == "residual" else 1)
    # With as many pairs as unknowns least squares is w: it is drawn where the pairs do not determine it.
    lines = {NAMES[t]: tuple(late[i]) for i, t in enumerate(targets) if t != "w_ols" or len(ks) == 1}
    if "w_ols" in targets and len(ks) > 1:
        lines[f"{NAMES['w_ols']}, k = {ks[0]}"] = tuple(arrays[f"{name}_{ks[0]}"][targets.index("w_ols")])
    draw.curves(axes, at, lines, floor=None)
    first = NAMES[targets[0]]
    draw.baseline(axes, at, arrays[f"{name}_{ks[-1]}_shuffled"][0, 0], f"{first}, shuffled")
    draw.baseline(axes, at, arrays[f"{name}_{ks[-1]}_untrained"][0, 0], f"{first}, untrained", style=1)
    sums = np.full(len(at), arrays[f"probe_sums_{ks[-1]}"][0, 0, 0])
    draw.baseline(axes, at, sums, f"{first}, from running sums", style=3)
    axes.set_xticks(at)
    axes.set_ylim(-0.28, 1.05)
    axes.set_ylabel(f"R² of a ridge probe from the {features}")


def _draw_matches(axes: Any, by_k: Any, arrays: Mapping[str, Any], blocks: np.ndarray) -> None:
    """Distances by block, and of the last block by number of examples, with the nearest named."""
    if "match" not in arrays:
        for panel in (axes, by_k):
            panel.set_axis_off()
        axes.text(0.5, 0.5, "no algorithm is matched", ha="center", transform=axes.transAxes)
        return
    names = [str(name) for name in arrays["match_families"]]
    for panel, x, key in ((axes, blocks, "match"), (by_k, 1 + np.arange(arrays["match_by_k"].shape[-1]), "match_by_k")):
        # What is above the panel is marked at its edge; the band of what diverges on one prompt would cover the rest.
        shown = arrays[key].copy()
        shown[:, 1:][np.repeat(shown[:, :1] > OFF, 2, axis=1)] = np.nan
        drawn = {name: tuple(ends) for name, ends in zip(names, shown, strict=True) if name != "zero"}
        positive = [float(mean[mean > 0].min()) for mean, *_ in drawn.values() if (mean > 0).any()]
        lowest = 0.5 * max(min(positive, default=1.0), 1e-7)
        draw.curves(panel, x, drawn, floor=lowest)
        fit = np.full(len(x), float(arrays["match_fit"]))
        draw.baseline(panel, x, np.ones(len(x)), "a constant")
        draw.baseline(panel, x, fit, "largest of a name", style=1)
        named, room = None, (x[-1] - x[0]) / 30
        for at, name, said, clear in zip(x, *(arrays[f"{key}_{part}"] for part in NAMED), strict=True):
            # Many numbers of examples: named where it changes, and where there is room.
            if named is not None and (at - named[0] < room or (len(x) > 40 and named[1] == name)):
                continue
            named = (at, name)
            text = str(said).split(", not told apart")[0] if name != NONE else "none"
            mark = "* " if clear else "(*) " if name != NONE else ""
            place = {"rotation": 90, "ha": "center", "va": "bottom", "fontsize": 6}
            panel.text(at, lowest / 2500, f"{mark}{text}", **place)
        panel.set_ylim(lowest / 4000, OFF)
    axes.set_ylabel("distance: Σ (p̂ − algorithm)² ÷ Σ (p̂ − mean)²" if len(arrays["rivals"]) else DISTANCE)
    by_k.set_xlabel(f"examples seen, k (block {blocks[-1]}, each k alone)")


def _title(result: Result) -> str:
    """The sentence that the figure supports, made from its numbers."""
    arrays, config = result.arrays, result.config
    fitted, share, words = arrays["lens_fitted"], arrays["share"], str(arrays["profile_words"][0])
    (before, *between), (after, *end) = fitted[:, 0], fitted[:, -1]
    blocks = share.shape[1]
    way = {
        "steady": "steadily",
        "stepwise": "in few steps",
        "neither steady nor stepwise": "neither evenly nor in few steps",
        "flat": "without a clear decrease",
        "rising": "with an increase",
    }.get(words, "too few blocks to call it even or stepwise")
    largest = int(np.argmax(share[0]))
    what, digits = ("nats go", 3) if len(arrays["rivals"]) else ("error goes", 2)
    text = (
        f"{draw.called(config['model'])}, {config['k']} examples: over {blocks} blocks the {what} from "
        f"{before:.{digits}g} [{between[0]:.{digits}g}, {between[1]:.{digits}g}] to {after:.{digits}g} "
        f"[{end[0]:.{digits}g}, {end[1]:.{digits}g}], {way}"
    )
    if words not in ("flat", "rising"):
        ends = f"[{share[1, largest]:.0%}, {share[2, largest]:.0%}]"
        text += f"; the largest share is block {largest + 1}'s, {share[0, largest]:.0%} {ends}"
    if "match_name" in arrays:
        text += f";\n{_named(arrays)}"
    return text


def _named(arrays: Mapping[str, Any]) -> str:
    """Which algorithm the last block's predictions are, as they are; and with a scale, where that says more."""

    def left(key: str) -> str:
        mean, low, high = (float(end) for end in arrays[f"{key}_nearest"][:, -1])
        return f"{_percent(mean)} [{_percent(low)}, {_percent(high)}] of their spread left"

    name, scaled = (str(arrays[f"{key}_name"][-1]) for key in ("match", "match_scaled"))
    said, scaled_said = (str(arrays[f"{key}_said"][-1]) for key in ("match", "match_scaled"))
    if not math.isfinite(arrays["match_nearest"][0, -1]):
        return "the last block's predictions are the same for every prompt: no algorithm"
    text = f"the last block's predictions, as they are, fit {said}: {left('match')}"
    if name == NONE:
        nearest = said.removeprefix(f"{NONE}, ")
        text = (
            f"none of the algorithms tried fits the last block's predictions as they are ({nearest}: {left('match')})"
        )
        if scaled != NONE and arrays["match_nearest"][2, -1] <= arrays["match_fit"]:
            text = f"the last block's predictions fit {scaled_said}: {left('match_scaled')}"
            text += f"; as they are, {nearest}: {left('match')}"
        elif scaled != NONE:
            text += f"; scaled, {scaled_said} does: {left('match_scaled')}"
    return text


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 10 else f"{100 * share:.0f} %"
