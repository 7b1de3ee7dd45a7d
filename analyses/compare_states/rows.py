"""The table and the arrays of a comparison of states: one quantity of one model, layer and place a row.

``control`` is what the quantity is where there is nothing to find: shuffled targets for R², permuted prompts for a
similarity (their mean), permuted tokens for resets, 0 otherwise left empty. ``p`` is family-wise for a similarity.
``layer`` and ``k`` are numbers, NaN where a row is of no one layer ("all", "mean", "1 ~ 2" in ``layers``) or k.
At ``k=0`` the state is the one at the query, which is all that was read; else the one before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from analyses.compare_states.study import Plan, Study
from interp.forgetting import half_life, survival
from interp.result import numbers
from interp.similarity import Similarity
from interp.states import stride
from interp.stats import bootstrap
from interp.variance import LEVELS

COLUMNS = ("model", "quantity", "layers", "at", "value", "low", "high", "control", "p", "n")
Alike = Mapping[int, Mapping[tuple[int, int], Mapping[str, Similarity]]]
"""By number of examples and pair of models."""
Lines = Float[np.ndarray, "x 3"]
"""Estimate, low end, high end."""


def table(studies: Sequence[Study], alike: Alike, asked: Plan) -> pd.DataFrame:
    """Every number, the headline of each model first."""
    rows = [row for study in studies for row in _headline(study, asked)]
    rows += [row for study in studies for row in _of_one(study, asked)]
    for k, pairs in sorted(alike.items(), reverse=True):
        rows += [row for (i, j), measures in pairs.items() for row in _of_pair(studies[i], studies[j], measures, k)]
    made = pd.DataFrame(rows, columns=list(COLUMNS))
    made.insert(2, "layer", numbers(made["layers"]))
    made.insert(5, "k", numbers(made["at"], "k="))
    return made


def arrays(studies: Sequence[Study], alike: Alike, asked: Plan) -> dict[str, np.ndarray]:
    """What the figure is drawn from; a name ends in the model's place in ``config["models"]``.

    A similarity's is ``<measure>_<i>_<j>`` (value, null mean, null edge, p, family-wise p; layer, layer), and of its
    most alike pair of layers ``<measure>_best_<i>_<j>`` (value, null edge); after ``middle`` examples, and with ``_k0``
    after none.
    """
    one = studies[0]
    made: dict[str, np.ndarray] = {
        "ks": np.array(asked.ks),
        "middle": np.array(asked.middle),
        "swap_k": np.array(asked.swap_k),
        "targets": np.array(list(one.reading)),
        "kinds": np.array(asked.task.kinds),
        "sums": np.stack([reading.sums for reading in one.reading.values()]),
        "few": np.array(asked.few),
        "some": np.array(asked.some),
    }
    for i, study in enumerate(studies):
        made[f"r2_{i}"] = np.stack([reading.score for reading in study.reading.values()])
        made[f"shuffled_{i}"] = np.stack([reading.shuffled for reading in study.reading.values()])
        made[f"folds_{i}"] = np.stack([reading.folds for reading in study.reading.values()])
        made[f"untrained_{i}"] = np.stack([reading.untrained for reading in study.reading.values()])
        if study.reach is not None:
            made[f"reach_{i}"] = remains(study, asked, total=True)
        if study.forgets is not None:
            made[f"left_{i}"] = remains(study, asked, total=False)
            made[f"half_{i}"] = half_lives(study)
            made[f"half_channels_{i}"] = channel_half_lives(study)
        if study.content is not None:
            parts = study.content
            made[f"shares_{i}"] = np.stack([parts.share, parts.low, parts.high])
        if study.resets is not None:
            events = study.resets
            moved = (events.rate, events.control, events.low, events.high, events.p)
            made[f"resets_{i}"] = np.stack([part.numpy() for part in moved])
        made[f"within_{i}"] = _lines(study.within.mean(0))
        made[f"across_{i}"] = study.across.mean(0).numpy()
        made[f"norm_{i}"] = relative_norm(study, asked)
        made[f"long_error_{i}"] = _lines(study.long_error)
        made[f"swaps_{i}"], made[f"swaps_all_{i}"] = study.swaps, study.all_layers
        made[f"parts_{i}"] = np.array(study.parts)
    for k, pairs in alike.items():
        for (i, j), measures in pairs.items():
            for name, found in measures.items():
                each = (found.value, found.null_mean, found.null_edge, found.p, found.p_family)
                end = "" if k == asked.middle else f"_k{k}"
                made[f"{name}_{i}_{j}{end}"] = np.stack(each)
                made[f"{name}_best_{i}_{j}{end}"] = np.array([most_alike(found), found.edge])
    return made


def most_alike(found: Similarity) -> float:
    """The measure of the most alike pair of layers."""
    return float(np.nanmin(found.value) if found.measure == "procrustes" else np.nanmax(found.value))


def remains(study: Study, asked: Plan, *, total: bool, layer: int | None = None) -> Lines:
    """By age of an example, newest first: what is left of its write (``total=False``: ‖∏ decay · w‖ / ‖w‖), or the
    total derivative relative to its root mean square over all ages; root mean square over layers and prompts.
    """
    step = stride(asked.batch)
    if total:
        assert study.reach is not None
        found = survival(study.reach, None, step)
        found = found / found.mean(-1, keepdim=True).clamp(min=1e-300)
    else:
        assert study.forgets is not None
        found = survival(study.forgets.left, study.forgets.written, step)
    chosen = found.mean(0) if layer is None else found[layer]
    return np.sqrt(np.maximum(_lines(chosen), 0))


def half_lives(study: Study) -> Float[np.ndarray, "2 layer 3"]:
    """In tokens: of a channel's slowest mode, and at the rate at which it loses what it holds; median and quartiles
    over channels.
    """
    # A channel that never forgets is infinitely slow, which is an order and not a mistake.
    orders = np.quantile(channel_half_lives(study), [0.5, 0.25, 0.75], axis=2, method="nearest")
    return np.moveaxis(orders, 0, -1)


def channel_half_lives(study: Study) -> Float[np.ndarray, "2 layer d_inner"]:
    """In tokens, for every channel: of its slowest mode, and at the rate at which it loses what it holds."""
    assert study.forgets is not None
    rates = (-study.forgets.slow.clamp(min=1e-38).log(), study.forgets.lost)
    return np.stack([half_life(rate).numpy() for rate in rates])


def relative_norm(study: Study, asked: Plan) -> Lines:
    """‖h‖ after 0, 1, … examples relative to that after ``last``; root mean square over prompts, layers."""
    square = study.norms.double().square()
    base = square[..., asked.last].mean(1)[:, None, None].clamp(min=1e-300)
    return np.sqrt(_lines((square / base).mean(0)))


def _headline(study: Study, asked: Plan) -> Iterator[tuple[Any, ...]]:
    """The few numbers that a reader looks for, over all layers."""
    name, n = study.name, len(asked.split.test)
    for target, reading in study.reading.items():
        at_end = reading.score[:, -1]
        if np.isfinite(at_end[:, 0]).any():
            best = reading.best
            chance = reading.shuffled[best, -1, 0]
            yield (name, f"R² of {target}, best layer", str(best), f"k={asked.last}", *at_end[best], chance, None, n)
    for part, line in zip(study.parts, study.all_layers, strict=True):
        half = len(asked.batch) // 2
        yield (name, f"recovery by a swap of {part}", "all", f"k={asked.swap_k}", *line, None, None, half)
    if study.forgets is not None:
        for what, quartiles in zip(("slowest mode", "what is held"), half_lives(study), strict=True):
            middle = np.quantile(quartiles, 0.5, axis=0, method="nearest")
            yield (name, f"half-life in tokens, {what} (quartiles of channels)", "median", "", *middle, None, None, n)
    if study.content is not None:
        for level, *line in zip(LEVELS, study.content.share, study.content.low, study.content.high, strict=True):
            yield (name, f"share of the variance of ln decay: {level}", "all", "", *line, None, None, asked.some)
    within, across = _lines(study.within.mean(0)), study.across.mean(0)
    yield (name, "effective rank of a state", "mean", f"k={asked.last}", *within[-1], None, None, asked.some)
    yield (
        *(name, "effective rank across prompts", "mean", f"k={asked.last}"),
        *(float(across[-1]), math.nan, math.nan, None, None, len(asked.batch)),
    )


def _of_one(study: Study, asked: Plan) -> Iterator[tuple[Any, ...]]:
    name, n, ks = study.name, len(asked.split.test), asked.ks
    for target, reading in study.reading.items():
        for j, k in enumerate(ks):
            if np.isfinite(reading.sums[j, 0]):
                yield (name, f"R² of {target} from sums", "", f"k={k}", *reading.sums[j], None, None, n)
            for layer in range(len(reading.score)):
                if np.isfinite(reading.score[layer, j, 0]):
                    chance = reading.shuffled[layer, j, 0]
                    place = (str(layer), f"k={k}")
                    yield (name, f"R² of {target}", *place, *reading.score[layer, j], chance, None, n)
                if np.isfinite(reading.untrained[layer, j, 0]):
                    line = reading.untrained[layer, j]
                    yield (name, f"R² of {target}, untrained", str(layer), f"k={k}", *line, None, None, n)
    first = next(iter(study.reading))
    for count, score in study.by_count.items():
        line = (float(score.mean), float(score.low), float(score.high))
        yield (name, f"R² of {first}, best layer", "best", f"{count} components", *line, None, None, n)
    layers = range(len(study.within))
    for layer in layers:
        for j, (k, line) in enumerate(zip(ks, _lines(study.within[layer]), strict=True)):
            yield (name, "effective rank of a state", str(layer), f"k={k}", *line, None, None, asked.some)
            rank = float(study.across[layer, j])
            row = (rank, math.nan, math.nan, None, None, len(asked.batch))
            yield (name, "effective rank across prompts", str(layer), f"k={k}", *row)
        for age, line in enumerate(remains(study, asked, total=True, layer=layer) if study.reach is not None else ()):
            place = (str(layer), f"age={age}")
            yield (name, "derivative by an example, of its mean", *place, *line, None, None, asked.few)
        for part, line in zip(study.parts, study.swaps[:, layer], strict=True):
            place = (str(layer), f"k={asked.swap_k}")
            yield (name, f"recovery by a swap of {part}", *place, *line, None, None, len(asked.batch) // 2)
    if study.forgets is not None:
        for layer in layers:
            for age, line in enumerate(remains(study, asked, total=False, layer=layer)):
                yield (name, "left of a write", str(layer), f"age={age}", *line, None, None, asked.some)
        for what, found in zip(("slowest mode", "what is held"), half_lives(study), strict=True):
            for layer, line in enumerate(found):
                yield (
                    *(name, f"half-life in tokens, {what} (quartiles of channels)", str(layer), ""),
                    *(*line, None, None, asked.some),
                )
    if study.resets is not None:
        found = study.resets
        for layer in layers:
            for kind, label in enumerate(asked.task.kinds[: found.rate.shape[1]]):
                line = [
                    float(part[layer, kind]) for part in (found.rate, found.low, found.high, found.control, found.p)
                ]
                yield (name, "resets (ends: permuted tokens)", str(layer), label, *line, asked.some)
    for k, line in enumerate(relative_norm(study, asked)):
        yield (name, "norm of the state", "mean", f"k={k}", *line, None, None, asked.some)
    for k, line in enumerate(_lines(study.long_error)):
        yield (name, "error", "", f"k={k}", *line, None, None, asked.some)


def _of_pair(one: Study, two: Study, measures: Mapping[str, Similarity], k: int) -> Iterator[tuple[Any, ...]]:
    for measure, found in measures.items():
        for (i, j), value in np.ndenumerate(found.value):
            if np.isnan(value):
                continue  # a layer whose state is the same for every prompt
            yield (
                *(f"{one.name} ~ {two.name}", measure, f"{i} ~ {j}", f"k={k}"),
                *(value, math.nan, math.nan, found.null_mean[i, j], found.p_family[i, j], found.n),
            )


def _lines(values: Float[Tensor, "n x"]) -> NDArray[np.float64]:
    """(x, 3): mean over prompts with its bootstrap interval."""
    found = bootstrap(values.double())
    return np.stack([found.mean, found.low, found.high], axis=-1)
