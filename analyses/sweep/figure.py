"""The figure of a sweep, drawn from its result alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from interp import plot as draw
from interp.result import numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from interp.result import Result

FLOOR = 1e-5
"""The figure goes down to this error; what is smaller is named beside it."""


def figure(result: Result) -> Figure:
    """Error by task and model at the middle k of each task: the mean over seeds, each seed, the best rival."""
    table = middle(result.table)
    labels = list(dict.fromkeys(table["label"]))
    models = list(dict.fromkeys(table["model"]))
    panels = [models[i : i + 8] for i in range(0, len(models), 8)] or [[]]
    whole, axes = draw.canvas([1.0] * len(panels), height=1.4 + 0.55 * len(labels), width=8.5 * len(panels))
    for panel, group in zip(axes, panels, strict=True):
        groups = {model: _by_label(table[table["model"] == model], labels, "") for model in group}
        groups["best classical method"] = _by_label(table, labels, "rival_")
        draw.dots(panel, labels, groups)
        for i, model in enumerate(group):
            rows = table[table["model"] == model]
            at = [labels.index(label) + (i - (len(groups) - 1) / 2) * 0.6 / len(groups) for label in rows["label"]]
            panel.plot(rows["error"], at, ".", color="0.2", markersize=3, linestyle="none")
        panel.set_xscale("log")
        panel.set_xlim(left=max(FLOOR, panel.get_xlim()[0]))
        panel.tick_params(axis="x", which="minor", labelsize=6)
        panel.set_xlabel("error in the task's unit")
        panel.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    seeds = result.table.groupby("cell")["seed"].first().nunique() if len(result.table) else 0
    whole.suptitle(_title(table, seeds), fontsize=11)
    whole.supxlabel(
        "small dots: one training each; marks and lines: their mean and its 95 % interval over 1280 prompts, which "
        "says nothing about other trainings",
        fontsize=7,
        color="0.35",
    )
    return draw.settle(whole)


def middle(table: pd.DataFrame) -> pd.DataFrame:
    """The rows at the middle one of the numbers of examples that each task reports, with a label for each task."""
    parts = []
    table = table.assign(k=numbers(table["k"]))  # it is text in a folder of an earlier version
    for (task, size), rows in table[table["k"].notna()].groupby(["task", "size"], sort=False):
        ks = sorted({int(k) for k in rows["k"]})
        k = ks[len(ks) // 2]
        name = " ".join(filter(None, (task, size)))
        parts.append(rows[rows["k"] == k].assign(label=f"{name}, k = {k}"))
    return pd.concat(parts) if parts else table.head(0).assign(label="")


def _by_label(rows: pd.DataFrame, labels: Sequence[str], of: str) -> tuple[Any, Any, Any]:
    """For each label the mean error over its rows and its 95 % interval over prompts; ``of`` is "" or "rival_"."""
    grouped = rows.groupby("label")
    mean = grouped[f"{of}error"].mean().reindex(labels).to_numpy()
    # The models of several seeds are measured on prompts of their own seeds: their errors are independent.
    squares = (rows[f"{of}standard_error"] ** 2).groupby(rows["label"]).sum()
    spread = 1.96 * np.sqrt((squares / grouped.size() ** 2).reindex(labels).to_numpy())
    return mean, mean - spread, mean + spread


def _title(table: pd.DataFrame, seeds: int) -> str:
    """The sentence that the figure supports, made from its numbers."""
    if not len(table):
        return "no cell of the sweep has finished"
    means = table.groupby(["label", "model"])["error"].mean().unstack()
    lowest = means.idxmin(axis=1).value_counts()
    trainings = f"{seeds} training{'s' * (seeds != 1)} each"
    tasks = f"{len(means)} task{'s' * (len(means) != 1)}"
    if means.shape[1] == 1:
        rivals = table.groupby("label")["rival_error"].mean()
        below = int((means.iloc[:, 0] < rivals).sum())
        return f"{means.columns[0]} is below the best classical method on {below} of {tasks} ({trainings})"
    said = ", ".join(f"{model} on {count}" for model, count in lowest.items())
    return f"lowest error of {means.shape[1]} models on {tasks}: {said} ({trainings})"
