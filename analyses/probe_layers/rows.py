"""What ``probe_layers`` found, as the rows of its table and the arrays of its figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from analyses.probe_layers import matching
from analyses.probe_layers.families import Candidates
from analyses.probe_layers.readings import SUMS, Lens, Map, Probed, Subject
from interp.estimators import iterative
from interp.result import numbers
from interp.stats import Interval, bootstrap

COLUMNS = ("model", "part", "block", "what", "setting", "k", "value", "low", "high", "n")
Row = dict[str, Any]
ByK = Mapping[tuple[int, int], matching.Match]
"""(block, k) → match."""


def table(rows: list[Row], model: str) -> pd.DataFrame:
    """One row for each number: part (lens, profile, probe, match, map), block, what, setting, k, value, interval, n.

    ``k`` is NaN where a number is over all numbers of examples; ``block`` is -1 for the rivals.
    """
    found = pd.DataFrame([{"model": model, **row} for row in rows], columns=list(COLUMNS))
    return found.assign(k=numbers(found["k"]))


def lens_rows(seen: Lens, m: int) -> list[Row]:
    """Errors of the lens and its floors, the scales and shifts, and the shares of the decrease."""
    how = "fitted" if seen.refit else "not fitted"
    named = {
        f"error, {how}": seen.fitted,
        "error, not fitted": seen.raw,
        f"untrained: error, {how}": seen.untrained,
        f"other labels: error, {how}": seen.other_labels,
        f"another prompt's predictions: error, {how}": seen.other_prompt,
    }
    rows = [
        _row("lens", block, what, interval, setting="" if seen.rivals else f"m = {m}")
        for what, values in named.items()
        for block, interval in enumerate(_each(values))
    ]
    for what, values in (("scale (median)", seen.scale), ("shift (median)", seen.shift)):
        if values is not None:
            rows += [_row("lens", block, what, interval) for block, interval in enumerate(_each(values, median=True))]
    for what, error in seen.rivals.items():
        rows.append(_row("lens", -1, f"{what}: error", bootstrap(error.double().numpy())))
    for what, part in (("error", seen.profile.share), ("log error", seen.profile.factor)):
        for block, interval in enumerate(part.each(), start=1):
            rows.append(_row("profile", block, f"share of the decrease of the {what}", interval))
    return rows


def probe_rows(probes: list[Probed]) -> list[Row]:
    """R² of every probe and of its controls (``setting``)."""
    return [
        _row("probe", one.block, f"{one.features} → {one.target}", interval, setting=control, k=str(one.k))
        for one in probes
        for control, interval in {"": one.probe.score, **one.probe.controls}.items()
    ]


def match_rows(matches: list[matching.Match], by_k: ByK, ks: Sequence[int]) -> list[Row]:
    """The distance of every block to every algorithm at its best settings, as it is and with a scale and a shift, then
    the verdicts: over all numbers of examples, then after each of ``ks`` alone.
    """
    rows = [row for block, one in enumerate(matches) for row in _match_rows(one, block)]
    return rows + [row for (block, k), one in by_k.items() if k in ks for row in _match_rows(one, block, str(k))]


def _match_rows(one: matching.Match, block: int, k: str = "") -> list[Row]:
    rows = []
    for fit in one.raw.values():
        rows.append(_row("match", block, fit.name, fit.distance, setting=fit.setting, k=k))
    for fit in one.scaled.values():
        by = fit.said().removeprefix(fit.name).strip()
        rows.append(_row("match", block, f"{fit.name}, scaled", fit.distance, setting=by, k=k))
    if one.truth is not None:
        rows.append(_row("match", block, "the labels themselves", one.truth, k=k))
    for how, verdict in (("as it is", one.as_it_is), ("with a scale", one.named)):
        setting = verdict.said().removeprefix(verdict.name).strip(" ,")
        rows.append(_row("match", block, f"{how}: {verdict.name}", verdict.best.distance, setting=setting, k=k))
    return rows


def map_rows(levels: Map, subject: Subject) -> list[Row]:
    """The map at the task's own k, half-way beyond, and at its end."""
    last = levels.raw.shape[-1] - 1
    ks = {*subject.task.report_ks, subject.k, (levels.trained + last) // 2, last} & set(range(last + 1))
    return [
        _row("map", block, "error, not fitted", interval, k=str(k))
        for k in sorted(ks)
        for block, interval in enumerate(_each(levels.raw[..., k]))
    ]


def lens_arrays(seen: Lens) -> dict[str, np.ndarray]:
    """``lens_*``, ``scale``, ``shift``, ``share``, ``factor``: (3, block), mean, low, high; ``rivals`` by name."""
    profile = seen.profile
    fit = {"scale": seen.scale} if seen.shift is None else {"scale": seen.scale, "shift": seen.shift}
    return {
        **{name: _stack(_each(values, median=True)) for name, values in fit.items()},
        "rivals": np.array(list(seen.rivals)),
        "rival_errors": np.array([float(error.mean()) for error in seen.rivals.values()]),
        "lens_fitted": _stack(_each(seen.fitted)),
        "lens_raw": _stack(_each(seen.raw)),
        "lens_untrained": _stack(_each(seen.untrained)),
        "lens_other_labels": _stack(_each(seen.other_labels)),
        "lens_floor": np.array(seen.floor),
        "lens_refit": np.array(seen.refit),
        "share": _stack(profile.share.each()),
        "factor": _stack(profile.factor.each()),
        "profile_words": np.array([profile.words, profile.log_words]),
    }


def probe_arrays(probes: list[Probed]) -> dict[str, np.ndarray]:
    """``probe_<features>_<k>`` (target, 3, block), the same with ``_shuffled`` and ``_untrained``, and the names."""
    arrays: dict[str, np.ndarray] = {}
    targets = list(dict.fromkeys(one.target for one in probes))
    for kind, k in dict.fromkeys((one.features, one.k) for one in probes):
        chosen = [[one.probe for one in probes if (one.features, one.k, one.target) == (kind, k, t)] for t in targets]
        name = f"probe_{'sums' if kind == SUMS else kind}_{k}"
        arrays[name] = np.array([_stack([one.score for one in row]) for row in chosen])
        for control in chosen[0][0].controls:
            arrays[f"{name}_{control}"] = np.array([_stack([one.controls[control] for one in row]) for row in chosen])
    return {"probe_targets": np.array(targets), "probe_ks": np.array(sorted({one.k for one in probes})), **arrays}


def match_arrays(
    matches: list[matching.Match], by_k: ByK, found: Candidates | None, levels: Map
) -> dict[str, np.ndarray]:
    """``match`` and ``match_scaled`` (family, 3, block): distances as it is, and with a scale and a shift; for the last
    block ``match_by_k`` (family, 3, k − 1); what the verdicts say; GD and GD++ by step, where they are among the
    algorithms. NaN where a block's predictions are the same throughout.
    """
    if not matches or found is None:
        return {}
    last = [one for (block, _), one in by_k.items() if block == len(matches) - 1]
    return {
        "match_families": np.array(found.names),
        "match": _distances([one.raw for one in matches], found),
        "match_scaled": _distances([one.scaled for one in matches], found),
        "match_by_k": _distances([one.raw for one in last], found),
        "match_fit": np.array(matching.FIT),
        **_verdicts("match", matches),
        **_verdicts("match_by_k", last),
        **descents(levels, len(matches), found),
    }


def last_block(matches: list[matching.Match]) -> dict[str, Any]:
    """The verdicts on the model's own predictions, as JSON values; empty where nothing is matched."""
    if not matches:
        return {}
    verdicts = {"as it is": matches[-1].as_it_is, "with a scale": matches[-1].named}
    return {
        how: {
            "name": one.name,
            "said": one.said(),
            "nearest": one.best.said(),
            "ties": list(one.ties),
            "same": list(one.same),
            **{end: _finite(getattr(one.best.distance, end)) for end in ("mean", "low", "high")},
        }
        for how, one in verdicts.items()
    }


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _distances(fits: Sequence[Mapping[str, matching.Fit]], found: Candidates) -> Float[np.ndarray, "family 3 entry"]:
    nothing = matching.CONSTANT
    return np.array([_stack([one.get(name, nothing).distance for one in fits]) for name in found.names])


def _verdicts(key: str, matches: Sequence[matching.Match]) -> dict[str, np.ndarray]:
    """By entry: the name as it is and with a scale, the whole phrase of both, and whether it has no ties."""
    return {
        f"{key}_name": np.array([one.as_it_is.name for one in matches]),
        f"{key}_said": np.array([one.as_it_is.said() for one in matches]),
        f"{key}_clear": np.array([one.as_it_is.clear for one in matches]),
        f"{key}_steps": np.array([one.as_it_is.best.steps for one in matches]),
        f"{key}_scaled_name": np.array([one.named.name for one in matches]),
        f"{key}_scaled_said": np.array([one.named.said() for one in matches]),
        f"{key}_scaled_clear": np.array([one.named.clear for one in matches]),
        f"{key}_nearest": _stack([one.as_it_is.best.distance for one in matches]),
        f"{key}_scaled_nearest": _stack([one.named.best.distance for one in matches]),
    }


def map_arrays(levels: Map) -> dict[str, np.ndarray]:
    """``map`` (block, k), ``k``, and how many of them are within training."""
    return {
        "map": levels.raw.mean(1).numpy(),
        "map_trained": np.array(levels.trained),
        "map_last": _stack(_each(levels.raw[-1].T)),
        "k": np.arange(levels.raw.shape[-1]),
    }


def descents(levels: Map, blocks: int, found: Candidates) -> dict[str, np.ndarray]:
    """``descent_gd``, ``descent_gdpp``: the error ÷ that of zero after 0, 1, … steps, one a block, at the last trained
    k; each prompt's own fastest rates. Empty where gradient descent is no algorithm of the task.
    """
    if "GD" not in found.names:
        return {}
    within, k = levels.within(), levels.trained - 1
    x, y = within.x.double(), within.y.double()
    spectrum = iterative.Spectrum.of(x, y)
    paths = {
        "descent_gd": iterative.gd_path(x, y, blocks - 1, spectrum=spectrum),
        "descent_gdpp": iterative.gdpp_path(x, y, blocks - 1, spectrum=spectrum),
    }
    whole = y[:, k].square().mean()
    return {name: ((path[:, :, k] - y[:, k]).square().mean(1) / whole).numpy() for name, path in paths.items()}


def _row(part: str, block: int, what: str, interval: Interval, **more: str) -> Row:
    shown = {"value": float(interval.mean), "low": float(interval.low), "high": float(interval.high)}
    return {"part": part, "block": block, "what": what, "setting": "", "k": "", **more, **shown, "n": interval.n}


def _each(values: Float[Tensor, "block batch"], median: bool = False) -> list[Interval]:
    """The mean (or median) over prompts of each block, with its interval."""
    middle = (lambda sample: np.median(sample, axis=0)) if median else None
    return bootstrap(values.T.double().cpu().numpy(), statistic=middle).each()


def _stack(intervals: list[Interval]) -> Float[np.ndarray, "3 entry"]:
    """Means, lower ends, upper ends."""
    return np.array([[one.mean, one.low, one.high] for one in intervals], dtype=float).T
