"""The figure of an outlier analysis, drawn from its result alone; a panel without numbers says why in a line."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from analyses.attribute_outliers.edits import FROM_TWINS
from analyses.attribute_outliers.factors import FACTORS
from analyses.attribute_outliers.parts import GATED, LEFT_OUT, UNDONE
from interp import plot as draw
from interp.result import Result, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASELINES = {
    "vote": "vote by pattern",
    "clean_vote": "vote, outliers known",
    "chance": "chance",
    "ols": "least squares",
    "clean_ols": "least squares, outliers known",
}
"""Baselines that are drawn, with their names in the figure."""
PLACES = ("far", "random", "close")
TOLERATED = 0.1
"""The title speaks of the largest α up to which no interval of the error lies above this."""
FLOOR = 1e-4
"""Below this a squared error is not told apart."""


def figure(result: Result) -> Figure:
    """Error against α; placement, else what knock-outs undo; votes, their split, the gate; what edits change."""
    whole, panels = draw.grid([(1.25, 1.1, 1.0), (1.15, 0.95, 1.3)], (4.0, 5.0), width=15.0)
    for panel, fill in zip(panels, (_curve, _placement, _votes, _shares, _gates, _uses), strict=True):
        why = fill(panel, result)
        if why:
            panel.text(0.5, 0.5, _wrapped(why), ha="center", va="center", transform=panel.transAxes, fontsize=8)
            panel.set_axis_off()
    config, name = result.config, draw.called(result.config["model"])
    placed = f"b: α = {config['alpha']:g}. c to f" if "placement" in set(result.table.part) else "b to f"
    whole.suptitle(_title(result), fontsize=11)
    whole.supxlabel(
        f"n = {config['prompts']} prompts; intervals: 95 %, Wilson for rates of errors, else bootstrap over prompts. "
        f"{placed}: {name}, α = {config['alpha']:g}, {_rule(result)}; "
        f"c to e: layer {_layer(result)}. Hand-set models are references, not trained",
        fontsize=7.5,
        color="0.35",
    )
    return draw.settle(whole)


def _curve(axes: Axes, result: Result) -> str:
    rows = result.table[(result.table.part == "curve") & (result.table.condition == _rule(result))]
    if rows.empty:
        return "no shares were asked for"
    lines: dict[str, Any] = {}
    floor = None if _classes_of(result) else FLOOR
    for name in [*result.config["models"], *(b for b in BASELINES if b in set(rows.model))]:
        one = rows[rows.model == name].sort_values("alpha")
        line = (np.array(one.alpha), tuple(np.array(one[column]) for column in ("value", "low", "high")))
        if name in BASELINES:
            draw.baseline(axes, line[0], line[1][0], BASELINES[name], style=list(BASELINES).index(name))
        else:
            lines[name] = line[1]
    draw.curves(axes, np.sort(rows.alpha.unique()), lines, floor=floor)
    axes.set_xlabel("share α of outliers in the context" + (f" ({_rule(result)})" if _classes_of(result) else ""))
    axes.set_ylabel("error at the clean query")
    if _classes_of(result):
        axes.set_ylim(-0.02, 1.02)
    elif lines:  # least squares on outliers can be off by any factor
        axes.set_ylim(FLOOR, 10 * max(float(np.nanmax(line[2])) for line in lines.values()))
    axes.legend(frameon=False, fontsize=6.5, loc="upper left")
    return ""


def _placement(axes: Axes, result: Result) -> str:
    rows = result.table[result.table.part == "placement"]
    if rows.empty:
        return _knock_outs(axes, result)
    names = [*result.config["models"], *(b for b in BASELINES if b in set(rows.model))]
    groups = {place: _columns(rows[rows.condition == place].set_index("model"), names) for place in PLACES}
    draw.dots(axes, [BASELINES.get(name, name) for name in names], groups)
    axes.tick_params(axis="y", labelsize=7.5)
    axes.set_xlabel(f"error at α = {result.config['alpha']:g}, by where the outliers stand")
    axes.legend(frameon=False, fontsize=7, title="from the query", title_fontsize=7)
    return ""


def _knock_outs(axes: Axes, result: Result) -> str:
    """The share of the outliers' error that knock-outs undo, for a task without placement."""
    rows = _undone_rows(result)
    if rows.empty:
        return _skipped(result, "no outliers to knock out", (UNDONE, "interventions"))
    controls = set(rows[rows.group == "control"].index)
    names = [name for name in rows.index if " out of " in name or "frozen" in name] + [LEFT_OUT]
    shown = [f"({name})" if name in controls else name for name in names]
    draw.dots(axes, shown, {str(result.config["model"]): _columns(rows, names)}, zero=0.0)
    axes.axvline(1, color="0.45", linewidth=1.2, linestyle=":", zorder=0)
    axes.tick_params(axis="y", labelsize=7.5)
    axes.set_xlabel("share of the outliers' error undone\n(dotted: clean in their place); controls in brackets")
    return ""


def _votes(axes: Axes, result: Result) -> str:
    start = "left_out|"
    found = {key.removeprefix(start): line for key, line in result.arrays.items() if key.startswith(start)}
    found = {group: line for group, line in found.items() if np.isfinite(line).any()}
    if not found:
        return "no context examples"
    length = next(iter(found.values())).shape[1]
    draw.curves(axes, np.arange(1, length + 1), {g: tuple(line) for g, line in found.items()}, floor=None)
    axes.axhline(0, color="0.45", linewidth=1.0, linestyle="--", zorder=0)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("place, counted back from the query")
    axes.set_ylabel("vote for its own label: what is lost\nof the prediction if it is left out")
    axes.legend(frameon=False, fontsize=7)
    return ""


def _shares(axes: Axes, result: Result) -> str:
    from interp import plot as draw

    rows = result.table[(result.table.part == "split") & (numbers(result.table.layer) == _layer(result))]
    if rows.empty:
        return _skipped(result, "no outliers to split a contribution of")
    names = [*FACTORS, "what follows", "difference"]
    groups = {
        group.removeprefix("outlier, "): _columns(rows[rows.group == group].set_index("quantity"), names)
        for group in rows.group.unique()
    }
    draw.bars(axes, [name.replace(" ", "\n") for name in names], groups)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_ylabel("first-order vote of the clean twin − of the outlier,\na token, split by Shapley values")
    _legend_above(axes)
    return ""


def _gates(axes: Axes, result: Result) -> str:
    config, lines, longest = result.config, {}, 1
    for name in (config["model"], GATED):
        for kind in ("clean", "outlier"):
            line = result.arrays.get(f"gate|{name}|{kind}")
            if line is not None and np.isfinite(line).any():
                lines[f"{kind}: {name}"] = line
                longest = max(longest, line.shape[1])
    if not lines:
        return _skipped(result, "no examples with a gate")
    padded = {
        name: tuple(np.pad(line, ((0, 0), (0, longest - line.shape[1])), constant_values=np.nan))
        for name, line in lines.items()
    }
    rank = np.arange(1, longest + 1)
    draw.curves(axes, rank, padded, floor=1e-6)
    top = next(iter(lines.values()))[0, 0]
    halved = top * 0.5 ** (rank - 1.0)
    halved[halved < 1e-6] = np.nan  # a slope, not a level: where it leaves the panel says nothing
    draw.baseline(axes, rank, halved, "halved by each (theory: slope −log 2)")
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("rank of closeness to the query, among its kind")
    axes.set_ylabel("selection gate G (write × later decays)")
    axes.legend(frameon=False, fontsize=6.5, loc="lower left")
    return ""


def _uses(axes: Axes, result: Result) -> str:
    rows = result.table[(result.table.part == "use") & (result.table.quantity == "change of margin")]
    names = list(dict.fromkeys(rows[rows.model == result.config["model"]].condition))
    if not names:
        return _skipped(result, "no outliers to edit")
    models = (result.config["model"], "untrained")
    groups = {name: _columns(rows[rows.model == name].set_index("condition"), names) for name in models}
    controls = set(rows[rows.group == "control"].condition)
    draw.dots(axes, [f"({name})" if name in controls else name for name in names], groups, zero=0.0)
    axes.tick_params(axis="y", labelsize=6.5)
    margin = result.table[(result.table.model == models[0]) & (result.table.quantity == "margin")].value.iloc[0]
    what = "margin" if _classes_of(result) else "prediction × target ÷ E[y²]"
    axes.set_xlabel(f"change of the {what}\n(unedited: {margin:.2f}); controls in brackets")
    _legend_above(axes)
    return ""


def _legend_above(axes: Axes) -> None:
    """Where no interval can run through it."""
    axes.legend(frameon=False, fontsize=7, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)


def _undone_rows(result: Result) -> Any:
    """What is undone of the outliers' error in the model that is looked into, by condition."""
    table = result.table
    chosen = (table.part == "use") & (table.model == result.config["model"]) & (table.quantity == UNDONE)
    return table[chosen].set_index("condition")


def _columns(rows: Any, names: list[str]) -> Any:
    """(value, low, high) in the order of ``names``; NaN for what is not there."""
    kept = rows.reindex(names)
    return tuple(kept[column].to_numpy() for column in ("value", "low", "high"))


def _rule(result: Result) -> str:
    rows = result.table[result.table.part == "curve"]
    return str(rows.condition.iloc[0]) if len(rows) else "outliers"


def _classes_of(result: Result) -> bool:
    return "rule" in result.config["task_config"]


def _layer(result: Result) -> int:
    return int((result.config["layers"] or [0])[0])


def _skipped(result: Result, otherwise: str, words: tuple[str, ...] = ("split", "scan", "interventions")) -> str:
    """What the table says in the place of this part: its first line with one of these words."""
    rows = result.table[(result.table.part == "skipped") & (result.table.model == result.config["model"])]
    said = [line for line in rows.condition if any(word in line for word in words)]
    return said[0] if said else otherwise


def _wrapped(text: str, width: int = 44) -> str:
    return "\n".join(textwrap.wrap(text, width))


def _title(result: Result) -> str:
    """The sentence that the figure supports, made from its numbers."""
    table, config = result.table, result.config
    name = config["model"]
    curve = table[(table.part == "curve") & (table.condition == _rule(result))]
    parts = []
    own = curve[curve.model == name].sort_values("alpha")
    if len(own):
        held = own[(own.low <= TOLERATED).cumprod().astype(bool)]
        worst = held.iloc[-1] if len(held) else own.iloc[0]
        parts.append(
            f"{draw.called(name)}: error {worst.value:.2f} [{worst.low:.2f}, {worst.high:.2f}] with {worst.alpha:.0%} "
            f"of the context contaminated{_beside(curve, worst.alpha)}"
        )
    use = table[(table.part == "use") & (table.model == name) & (table.quantity == "recovery")]
    shown = [
        f"{condition.removesuffix(FROM_TWINS).replace(', ', ' + ')} {value:.2f}".replace("-0.00", "0.00")
        for condition, value in zip(use.condition, use.value, strict=True)
        if condition.endswith(FROM_TWINS)
    ]
    if shown:
        parts.append(
            f"outliers put at their clean twins' values recover this share of the twins' effect: {', '.join(shown)}"
        )
    undone = _undone_rows(result)
    for way in ("both", "the scan"):
        if f"outliers out of {way}" in undone.index:
            parts.append(_knocked(undone, way))
            break
    return ";\n".join(parts) or draw.called(name)


def _knocked(undone: Any, way: str) -> str:
    """What the knock-out undoes, beside its control and the prompts that never had the outliers."""
    one = undone.loc[f"outliers out of {way}"]
    beside = {"as many clean": f"as many clean out of {way}", "left out of the prompt": LEFT_OUT}
    others = [f"{label}: {undone.value[name]:.2f}" for label, name in beside.items() if name in undone.index]
    where = "scan and taps" if way == "both" else way
    return (
        f"outliers out of {where} undo {one.value:.2f} [{one.low:.2f}, {one.high:.2f}] of the error that they cause "
        f"({', '.join(others)})"
    )


def _beside(curve: Any, alpha: float) -> str:
    """The error of the first baseline at this α."""
    for name, shown in BASELINES.items():
        rows = curve[(curve.model == name) & (curve.alpha == alpha)]
        if len(rows):
            return f" ({shown}: {rows.value.iloc[0]:.2f})"
    return ""
