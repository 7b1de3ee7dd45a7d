"""The figure of a comparison of states, drawn from its result alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from interp import plot as draw
from interp.result import Result
from interp.variance import LEVELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAPPED, ACROSS = 4, 3
"""Up to so many models every pair has a map, so many in a row."""
SHOWN = {"debiased CKA": "cka", "SVCCA": "svcca", "Procrustes\n(1 − d²/2)": "procrustes"}


def figure(result: Result) -> Figure:
    """What is read by k and by layer; which layers are alike, in a map for each pair of models and by measure against
    chance; memory with its half-life and its content; rank, norm, error, swaps.

    All pairs of up to four models; of more, those with the first.
    """
    arrays, config = result.arrays, result.config
    names = _labels(config["models"])
    count = len(names)
    pairs = [(i, j) for i in range(count if count <= MAPPED else 1) for j in range(i + 1, count)]
    whole, panel = _panels(pairs, arrays)
    _draw_reading(panel["reads"], panel["layers"], arrays, names)
    _draw_alike([panel[f"alike {i} {j}"] for i, j in pairs], pairs, arrays, names)
    _draw_measures(panel["measures"], pairs, arrays, names)
    if "memory" in panel:
        _draw_memory(panel["memory"], panel["half"], panel["content"], arrays, names)
    _draw_sizes(panel["rank"], panel["norm"], panel["error"], arrays, names)
    if "swap" in panel:
        _draw_swaps(panel["swap"], arrays, names)

    whole.suptitle(_title(result), fontsize=11)
    letter = {name: axes.get_title(loc="left") for name, axes in panel.items()}
    maps = sorted(letter[name] for name in panel if name.startswith("alike"))
    lives = f", in {letter['half']} quartiles of channels" if "half" in letter else ""
    whole.supxlabel(
        f"n = {config['prompts']} prompts (probes judged on a quarter, {config['components']} components; decays, "
        f"ranks within, norm and error {int(arrays['some'])}; derivatives {int(arrays['few'])}); bands: 95 % bootstrap "
        f"over prompts{lives};\nstates before the query, at k = 0 at it; "
        f"{maps[0]}{f'–{maps[-1]}' if len(maps) > 1 else ''}: grey italics where family-wise p > 0.05; "
        f"{letter['measures']}: the most alike pair of layers, ticks: the 95 % level of the most alike pair of "
        f"permuted prompts{'' if count <= MAPPED else f'; pairs without {names[0]} are in the table'}",
        fontsize=7.5,
        color="0.35",
    )
    return draw.settle(whole)


def _panels(pairs: list[tuple[int, int]], arrays: Mapping[str, Any]) -> tuple[Figure, dict[str, Any]]:
    """The figure and its panels by name; the maps of several pairs have a block of their own, three in a row.

    What was not measured, because the prompts are too short, has no panel.
    """
    maps = [f"alike {i} {j}" for i, j in pairs]
    memory = ["memory", "half", "content"] if "reach_0" in arrays else []
    ends = ["norm", "error", *(["swap"] if len(arrays["parts_0"]) else [])]
    if len(pairs) == 1:
        deep, blank = 1, 0
        rows: list[tuple[list[str], tuple[Any, ...], float]] = [
            (["reads", "layers", *maps, "measures"], (1.0, 1.0, 1.1, 0.85), 3.3),
            (memory, (1.0,) * len(memory), 3.3),
            (["rank", *ends], (1.0,) * (1 + len(ends)), 3.1),
        ]
    else:
        across = _across(len(pairs))
        deep = -(-len(pairs) // across)
        blank = deep * across - len(maps)
        spare = [f"spare {i}" for i in range(blank)]
        block = (*[1.0] * (across - 1), 1.12)
        height = max(3.1 * deep, 1.1 * len(pairs) + 0.8)
        rows = [
            (["reads", "layers", "rank"], (1.0, 1.0, 1.0), 3.3),
            ([*maps, *spare, "measures"], (block, 1.0), height),
            (memory, (1.0,) * len(memory), 3.3),
            (ends, (1.0,) * len(ends), 3.1),
        ]
    rows = [row for row in rows if row[0]]
    whole, axes = draw.grid([widths for _, widths, _ in rows], [height for *_, height in rows], width=16.0, deep=deep)
    panel = dict(zip([name for names, *_ in rows for name in names], axes, strict=True))
    for i in range(blank):
        panel.pop(f"spare {i}").remove()
    return whole, panel


def _across(maps: int) -> int:
    """How many maps stand in a row: three, but four are a square."""
    return 2 if maps == 4 else min(ACROSS, maps)


def _draw_reading(reads: Any, layers: Any, arrays: Mapping[str, Any], names: list[str]) -> None:
    ks, target = arrays["ks"], str(arrays["targets"][0])
    by_k, by_layer = {}, {}
    for i, name in enumerate(names):
        score, untrained = arrays[f"r2_{i}"][0], arrays[f"untrained_{i}"][0]
        best, asked = _best(arrays, i), ~(untrained[0, :, 0] != untrained[0, :, 0])
        by_k[name] = {"trained": (ks, score[best[0]]), "untrained": (ks[asked], untrained[best[1]][asked])}
        by_layer[name] = {"trained": _over(score[:, -1]), "untrained": _over(untrained[:, -1])}
    draw.baseline(reads, ks, arrays["sums"][0, :, 0], "from sums of y x and x xᵀ")
    draw.baseline(reads, ks, arrays["shuffled_0"][0, :, :, 0].mean(0), f"shuffled ({names[0]})", style=3)
    reads.set_ylim(-0.15, 1.0)
    draw.families(reads, by_k, floor=None, key=True)
    _axis(reads, "examples seen, k", f"R² of {target}, best layer")
    layers.set_ylim(-0.15, 1.0)
    draw.families(layers, by_layer, floor=None)
    _axis(layers, "layer", f"R² of {target} at k = {ks[-1]}")
    for panel in (reads, layers):
        panel.set_yticks([0.0, 0.25, 0.5, 0.75, 1.0])


def _draw_alike(panels: list[Any], pairs: list[tuple[int, int]], arrays: Mapping[str, Any], names: list[str]) -> None:
    """A map of debiased CKA for each pair of models, layer against layer, on one colour scale."""
    have = {pair: arrays[f"cka_{pair[0]}_{pair[1]}"] for pair in pairs if f"cka_{pair[0]}_{pair[1]}" in arrays}
    top = max((float(np.nanmax(np.abs(each[0]))) for each in have.values()), default=1.0)
    k, across = int(arrays["middle"]), _across(len(pairs))
    for place, (axes, (i, j)) in enumerate(zip(panels, pairs, strict=True)):
        if (i, j) not in have:
            _nothing(axes, f"{names[i]}, {names[j]}:\nstates are the same for every prompt")
            continue
        value, _, _, _, family = have[i, j]
        rows, columns = ([str(layer) for layer in range(size)] for size in value.shape)
        last = (place + 1) % across == 0 or place == len(pairs) - 1
        label = f"debiased CKA at k = {k}"
        draw.heat_map(axes, value, rows, columns, label=label, unsure=family > 0.05, linear=True, top=top, bar=last)
        axes.set_xlabel(f"layer of {names[j]}")
        axes.set_ylabel(f"layer of {names[i]}", fontsize=8)


def _draw_measures(axes: Any, pairs: list[tuple[int, int]], arrays: Mapping[str, Any], names: list[str]) -> None:
    """Each measure of the most alike pair of layers beside its level under permutation, after ``middle`` examples and
    none; a Procrustes distance d as the overlap 1 − d²/2, so that alike is 1 for all three.
    """
    ks = sorted({0, int(arrays["middle"])}, reverse=True)
    blank, groups = np.array([np.nan, np.nan]), {}
    for i, j in pairs:
        rows = {}
        for name, measure in SHOWN.items():
            ends = ["" if k == int(arrays["middle"]) else f"_k{k}" for k in ks]
            both = np.stack([arrays.get(f"{measure}_best_{i}_{j}{end}", blank) for end in ends])
            rows[name] = tuple((1 - both**2 / 2 if measure == "procrustes" else both).T)
        groups[f"{names[i]} ~ {names[j]}"] = rows
    _beyond_chance(axes, groups, [f"k = {k}" for k in ks], chance="chance")
    axes.set_xlabel("similarity of the most alike layers")


def _beyond_chance(
    axes: Axes,
    groups: Mapping[str, Mapping[str, tuple[Float[np.ndarray, "mark"], Float[np.ndarray, "mark"]]]],
    marks: Sequence[str],
    *,
    chance: str,
) -> None:
    """A headed block of rows for each group: group → row → (values, levels), one mark for each of ``marks``, the first
    filled and the next hollow, with a line from the tick at its level. NaN draws nothing.
    """
    place, ticks, names, lowest = 0.0, [], [], 0.0
    for group, rows in groups.items():
        axes.text(0.02, place, group, transform=axes.get_yaxis_transform(), fontsize=7.5, va="center", zorder=4)
        for name, (values, levels) in rows.items():
            place += 1
            ticks.append(place)
            names.append(name)
            for i, (value, level) in enumerate(zip(values, levels, strict=True)):
                at, colour = place + (i - (len(values) - 1) / 2) * 0.36, "0.55" if i else "black"
                axes.hlines(at, level, value, color=colour, linewidth=1.4)
                axes.plot(level, at, "|", color="0.35", markersize=7, markeredgewidth=1.6)
                inside = colour if i == 0 else "white"
                axes.plot(value, at, draw.MARKERS[i], color=colour, markersize=5, markerfacecolor=inside, clip_on=False)
                lowest = np.nanmin([lowest, value, level])
        place += 1.2
    for i, mark in enumerate(marks):
        look: dict[str, Any] = {"color": "0.55" if i else "black", "markerfacecolor": "white" if i else "black"}
        axes.plot([], [], marker=draw.MARKERS[i], label=mark, **look)
    axes.plot([], [], "|", color="0.35", markersize=7, markeredgewidth=1.6, label=chance)
    axes.set_yticks(ticks, names, fontsize=7.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(lowest * 1.05 if lowest < 0 else 0.0, 1.0)
    axes.set_ylim(place - 0.6, -0.6)
    axes.grid(axis="x", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    key: dict[str, Any] = {"frameon": False, "fontsize": 7, "ncols": len(marks) + 1, "columnspacing": 0.9}
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.1, **key)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _nothing(axes: Axes, text: str) -> None:
    """An empty panel that says why."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=8, color="0.35", transform=axes.transAxes)


def _draw_memory(memory: Any, half: Any, content: Any, arrays: Mapping[str, Any], names: list[str]) -> None:
    total, left = "∂h/∂x, all paths (÷ its mean)", "‖∏ decay · w‖ / ‖w‖"
    kept: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(names):
        kept[name] = {total: _over(arrays[f"reach_{i}"])}
        if f"left_{i}" in arrays:
            kept[name][left] = _over(arrays[f"left_{i}"])
    draw.families(memory, kept, floor=1e-3)
    _axis(memory, "age of the example", "what reaches the state")
    lives = {
        name: {
            what: _over(line) for what, line in zip(("slowest mode", "what is held"), arrays[f"half_{i}"], strict=True)
        }
        for i, name in enumerate(names)
        if f"half_{i}" in arrays
    }
    if lives:
        draw.families(half, {name: lives.get(name, {}) for name in names}, floor=1e-1)
        _axis(half, "layer", "half-life in tokens")
    else:
        _nothing(half, "half-lives: no model has decays")
    bars = {}
    for i, name in enumerate(names):
        if f"shares_{i}" in arrays:
            label = f"{_folded(name, len(names))}\n{_resets(arrays, i)}"
            bars[label] = dict(zip(LEVELS, map(tuple, arrays[f"shares_{i}"].T.tolist()), strict=True))
    if bars:
        draw.shares(content, bars, LEVELS, label="share of the variance of ln decay")
        content.set_ylabel(content.get_ylabel(), fontsize=8)
        content.tick_params(axis="x", labelsize=6.5)
    else:
        _nothing(content, "no model's decays vary")


def _draw_sizes(rank: Any, norm: Any, error: Any, arrays: Mapping[str, Any], names: list[str]) -> None:
    ks = arrays["ks"]
    last, trained = int(ks[-1]), int(arrays["trained"])
    both = {}
    for i, name in enumerate(names):
        alone = arrays[f"across_{i}"]
        both[name] = {
            "across prompts": (ks, _bare(alone)),
            "of one prompt's matrix": (ks, arrays[f"within_{i}"]),
        }
    draw.families(rank, both, floor=1.0)
    _axis(rank, "examples seen, k", "effective rank")
    sizes = {name: {"": _over(arrays[f"norm_{i}"])} for i, name in enumerate(names)}
    draw.families(norm, sizes, floor=None)
    _axis(norm, "examples seen, k", f"‖h‖ relative to k = {last}")
    errors = {name: {"": _over(arrays[f"long_error_{i}"])} for i, name in enumerate(names)}
    draw.families(error, errors, floor=1e-4)
    error.axhline(1.0, color="0.45", linewidth=2.0, alpha=0.75, zorder=1)
    _axis(error, "examples seen, k", "error (grey: predict 0)")
    for panel in (norm, error):
        if trained < len(arrays["norm_0"]):
            draw.boundary(panel, float(trained), "trained")


def _draw_swaps(axes: Any, arrays: Mapping[str, Any], names: list[str]) -> None:
    moved = {
        name: {
            str(part): _over(line)
            for part, line in zip(arrays[f"parts_{i}"], arrays[f"swaps_{i}"], strict=True)
            if part != "both"
        }
        for i, name in enumerate(names)
    }
    draw.families(axes, moved, floor=None)
    axes.axhline(0, color="0.45", linewidth=0.8)
    _axis(axes, "layer whose state is swapped", f"recovery by a swap at k = {int(arrays['swap_k'])}")


def _labels(names: list[str]) -> list[str]:
    """Bundled names as they are, files and folders by the last part of their path where that tells them apart."""
    short = [Path(name).name.removesuffix(".safetensors") for name in names]
    return short if len(set(short)) == len(short) else names


def _over(line: Any, start: int = 0) -> tuple[Any, Any]:
    """A curve over 0, 1, 2 … (or ``start`` …)."""
    return np.arange(start, start + len(line)), line


def _best(arrays: Mapping[str, Any], i: int) -> tuple[int, int]:
    """The layer from which most of the first target is read after the last example, trained and untrained.

    Chosen by the prompts that fitted the probes, not by those that judge them.
    """
    trained, untrained = np.nanargmax(arrays[f"folds_{i}"][0][:, :, -1], axis=1)
    return int(trained), int(untrained)


def _bare(line: Any) -> Any:
    """A curve without an interval: resampled prompts repeat each other, which lowers a rank by itself."""
    nothing = np.full_like(line, np.nan)
    return np.stack([line, nothing, nothing], axis=-1)


def _axis(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y, fontsize=8)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1, nbins=8)


def _folded(name: str, among: int) -> str:
    """A name on lines short enough to stand under one of many bars."""
    return "-\n".join(name.rsplit("-", 1)) if among > 2 else name


def _resets(arrays: Mapping[str, Any], i: int) -> str:
    """Resets by kind of token, in a thousand, with those of permuted tokens."""
    rate, control = (arrays[f"resets_{i}"][which].mean(0) * 1000 for which in (0, 1))
    if not rate.any():
        return "no resets"
    parts = [f"{kind} {a:.2g} ({b:.2g})" for kind, a, b in zip(arrays["kinds"], rate, control, strict=False)]
    return "\n".join(["resets in 1000", *parts, "(tokens permuted)"])


def _title(result: Result) -> str:
    """The sentences that the figure supports, made from its numbers."""
    arrays, names = result.arrays, _labels(result.config["models"])
    target, last = str(arrays["targets"][0]), int(arrays["ks"][-1])
    layers = [_best(arrays, i)[0] for i in range(len(names))]
    read = ", ".join(
        f"{arrays[f'r2_{i}'][0, layer, -1, 0]:.2f} in {name} (layer {layer})"
        for i, (name, layer) in enumerate(zip(names, layers, strict=True))
    )
    begin = (
        f"After {last} examples one layer's state" if last else "With no example before a query one layer's state at it"
    )
    first = f"{begin} gives {target} linearly with R² {read}"
    left = [f"{arrays[f'left_{i}'][-1, 0]:.2f} in {name}" for i, name in enumerate(names) if f"left_{i}" in arrays]
    parts = (
        [first] if not left else [f"{first};", f"of what the oldest example wrote, the decays leave {', '.join(left)}"]
    )
    return "\n".join(fill(part, 190, break_on_hyphens=False) for part in parts)
