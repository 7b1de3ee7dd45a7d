"""Learning curves as the rows of a table, as arrays and back, and the controls that need them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from analyses.learning_curves.errors import Curve, Setting, interval, other_labels, reach, without_mean
from analyses.learning_curves.published import Published
from hooks.brief import brief
from interp import evaluate
from interp.rivals import Rival, fair
from interp.tasks import Task, TokenTask, inputs
from interp.tasks.regression import Regression

BAYES = "bayes"
"""The rival from which nats are counted: the uncertainty of the answer itself is no error."""
CLEAN = 1280
"""Prompts on which a closed form is checked."""
TINY = 1e-9
"""An error below this is rounding; E[y²] is 1."""


@dataclass(frozen=True)
class Drawn:
    """A setting with its curves, their (mean, low, high), and the published curves of the same setting."""

    setting: Setting
    curves: Sequence[Curve]
    levels: Sequence[Float[np.ndarray, "three _"]]
    published: Sequence[Published]

    __repr__ = brief


@dataclass(frozen=True)
class Line:
    """A curve as it is drawn; ``n`` is the number of prompts, 0 for a published one."""

    who: str
    kind: str
    ks: Float[np.ndarray, " k"]
    levels: Float[np.ndarray, "three k"]
    n: int

    __repr__ = brief


@dataclass(frozen=True)
class Panel:
    """A setting as it is drawn."""

    name: str
    prompts: int
    trained: int | None
    lines: Sequence[Line]


def drawn(setting: Setting, curves: Sequence[Curve], published: Sequence[Published]) -> Drawn:
    """The setting with the intervals of its curves; NaN where a mean error is infinite."""
    levels = []
    for curve in curves:
        line = interval(curve.error)
        line[:, [k in without_mean(setting, curve.who) for k in curve.ks]] = np.nan
        levels.append(line)
    return Drawn(setting, curves, levels, published)


def shown(who: str, kind: str) -> str:
    """The name in table and figure: an oracle says that it is told more."""
    return f"{who} (told)" if kind == "rival" and not fair([who]) and who != "zero" else who


# --- table ------------------------------------------------------------------------------------


def table(found: Sequence[Drawn], levels: Sequence[float]) -> pd.DataFrame:
    """Per setting: from which k on each error is reached, or "never"; then the error at the reported ks.

    ``k`` is NaN in the rows of the former, whose value it is.
    """
    rows: list[dict[str, Any]] = []
    for each in found:
        for curve in each.curves:
            rows += [_reach_row(each, curve, level) for level in levels]
        for curve, line in zip(each.curves, each.levels, strict=True):
            for k in _reported(each.setting, curve):
                at = curve.ks.index(k)
                name, (value, low, high) = f"error at k={k}", line[:, at]
                if k in without_mean(each.setting, curve.who):
                    name = f"median {name} (the mean is infinite)"
                    value, low, high = interval(curve.error[:, [at]], median=True)[:, 0]
                rows.append(_row(each, curve, name, (value, low, high), f"{value:.3g}", float(k)))
        for source in each.published:
            for k in source.points:
                low, high = source.range(k)
                text = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
                head = {"setting": each.setting.name, "who": source.name, "kind": "published"}
                ends = {"value": (low + high) / 2, "low": low, "high": high}
                rows.append({**head, "quantity": f"error at k={k}", "k": float(k), "reads": text, **ends, "n": 0})
    return pd.DataFrame(rows)


def _row(
    each: Drawn, curve: Curve, quantity: str, ends: tuple[float, float, float], text: str, k: float = np.nan
) -> dict[str, Any]:
    value, low, high = (float(end) for end in ends)
    head = {"setting": each.setting.name, "who": shown(curve.who, curve.kind), "kind": curve.kind}
    return {
        **head,
        "quantity": quantity,
        "k": float(k),
        "reads": text,
        "value": value,
        "low": low,
        "high": high,
        "n": len(curve.error),
    }


def _reach_row(each: Drawn, curve: Curve, level: float) -> dict[str, Any]:
    """The k from which on the error stays at or below ``level``; beyond the trained length nothing is asked of it."""
    trained = len(curve.ks) if each.setting.trained is None else sum(k < each.setting.trained for k in curve.ks)
    error, of = curve.error, ""
    bayes = next((one.error for one in each.curves if one.who == BAYES), None)
    if isinstance(each.setting.task, TokenTask) and bayes is not None and bayes.shape == error.shape:
        error, of = error - bayes, f" of {BAYES}"
    found = reach(curve.ks[:trained], interval(error[:, :trained]), level)
    value, early, late = (np.nan if k is None else float(k) for k in found)
    name = f"k to come within {level:g}{of}" if of else f"k to reach {level:g}"
    return _row(each, curve, name, (value, early, late), "never" if np.isnan(value) else f"{value:.0f}")


def _reported(setting: Setting, curve: Curve) -> list[int]:
    reported = [k for k in setting.task.report_ks if k in curve.ks]
    return sorted({*reported, curve.ks[-1]}) if not setting.each else list(curve.ks)


# --- arrays -----------------------------------------------------------------------------------


def arrays(found: Sequence[Drawn]) -> dict[str, np.ndarray]:
    """Everything that the figure needs: for panel i and line j ``line_i_j``, rows k, mean, low and high."""
    out: dict[str, np.ndarray] = {
        "settings": np.array([each.setting.name for each in found]),
        "prompts": np.array([each.setting.prompts for each in found]),
        "trained": np.array([-1 if each.setting.trained is None else each.setting.trained for each in found]),
        "metric": np.array(found[0].setting.task.metric),
    }
    for i, each in enumerate(found):
        last = max(each.setting.ks)
        lines = [
            Line(shown(curve.who, curve.kind), curve.kind, np.array(curve.ks, float), levels, len(curve.error))
            for curve, levels in zip(each.curves, each.levels, strict=True)
        ]
        for source in each.published:
            ks = [k for k in source.points if k <= last]
            ends = np.array([source.range(k) for k in ks]).reshape(-1, 2).T
            lines.append(Line(source.name, "published", np.array(ks, float), np.stack([ends.mean(0), *ends]), 0))
        out[f"who_{i}"] = np.array([line.who for line in lines])
        out[f"kind_{i}"] = np.array([line.kind for line in lines])
        out[f"n_{i}"] = np.array([line.n for line in lines])
        out |= {f"line_{i}_{j}": np.concatenate([line.ks[None], line.levels]) for j, line in enumerate(lines)}
    return out


def panels(stored: Mapping[str, np.ndarray]) -> list[Panel]:
    """The panels that ``arrays`` stored."""
    found = []
    for i, name in enumerate(stored["settings"]):
        rows = zip(stored[f"who_{i}"], stored[f"kind_{i}"], stored[f"n_{i}"], strict=True)
        lines = [
            Line(str(who), str(kind), stored[f"line_{i}_{j}"][0], stored[f"line_{i}_{j}"][1:], int(n))
            for j, (who, kind, n) in enumerate(rows)
        ]
        trained = int(stored["trained"][i])
        found.append(Panel(str(name), int(stored["prompts"][i]), None if trained < 0 else trained, lines))
    return found


def short(found: Sequence[Panel]) -> list[Panel]:
    """The same panels with the models that are paths called by their last part, where that tells them apart."""
    paths = {line.who for panel in found for line in panel.lines if line.kind == "model"}
    names = {path: path.rpartition("/")[2].removesuffix(".safetensors") for path in paths}
    if len(set(names.values())) < len(names):
        return list(found)
    return [
        replace(panel, lines=[replace(line, who=names.get(line.who, line.who)) for line in panel.lines])
        for panel in found
    ]


# --- controls ---------------------------------------------------------------------------------


def closed_gaps(task: Task, rivals: Sequence[Rival], seed: int) -> dict[str, float]:
    """For each rival whose mean error has a closed form on ``task``, its distance from it, in standard errors.

    On prompts of its own, many: of few prompts with a heavy tail the mean and the spread come out small together. The
    distance is that of the mean over k of error ÷ form, and infinite if an error is not 0 where the form is.
    """
    found = {}
    forms = {rival: form for rival in rivals if rival.options is None and (form := _closed(task, rival.name))}
    if forms:
        batch = evaluate.prompts(task, CLEAN, seed, "probe")
        own = task.baselines(batch)
    for rival, form in forms.items():
        error = rival.errors(task, batch, range(task.n_pairs), own).double().numpy()
        expected = np.array([form(k) for k in range(task.n_pairs)])
        some = expected > 0
        relative = (error[:, some] / expected[some]).mean(axis=1)
        gap = float(abs(relative.mean() - 1) / (relative.std(ddof=1) / len(error) ** 0.5))
        found[rival.name] = gap if (error[:, ~some].mean(axis=0) < TINY).all() else np.inf
    return found


def _closed(task: Task, who: str) -> Callable[[int], float] | None:
    """The mean error after k examples of linear regression without noise.

    Least squares, inputs of m dimensions: 1 - k / m for k < m, 0 after. Averaging, isotropic inputs: (d + 1) / k.
    """
    if not isinstance(task, Regression) or task.name != "linreg" or task.noise.size or task.covariance == "skewed":
        return None
    d, m = task.d, inputs.rank(task.covariance, task.d)
    if who == "ols":
        return lambda k: max(1 - k / m, 0.0)
    if who == "averaging" and m == d:
        return lambda k: (d + 1) / k if k else 1.0
    return None


def leaks(
    task: Task, models: Mapping[str, Any], rivals: Sequence[Rival], setting: Setting, seed: int
) -> dict[str, float]:
    """For each model and each estimator, how much a prediction changes by what comes after its query, relative to the
    largest: by its own label and by all later pairs.
    """
    n_pairs = task.n_pairs
    k = n_pairs // 2
    _, batch = setting.batches(seed)[-1]
    batch = batch.take(slice(0, min(32, len(batch))))
    k = min(k, batch.targets.shape[1] - 1)
    other = other_labels(task, batch, k)
    found = {}
    for name, model in models.items():
        found[name] = _change(*(evaluate.predictions(model, task, each)[:, : k + 1] for each in (batch, other)))
    for rival in rivals:
        if rival.options is not None:
            found[rival.name] = _change(*(rival.predict(each, [k])[:, k : k + 1] for each in (batch, other)))
    return found


def _change(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference relative to the largest finite value; -inf of a logarithm equals itself."""
    finite = one.isfinite() & other.isfinite()
    if not bool((one.isfinite() == other.isfinite()).all()):
        return float("inf")
    size = float(one[finite].abs().max()) or 1.0
    return float((one - other)[finite].abs().max()) / size


# --- title ------------------------------------------------------------------------------------


def sentence(config: Mapping[str, Any], found: Sequence[Panel]) -> str:
    """What the figure shows, in one sentence of its numbers."""
    own = found[0]
    last = max((k for line in own.lines for k in line.ks if line.kind != "published"), default=0)
    k = float(sorted(own.lines[0].ks)[len(own.lines[0].ks) // 2])
    models = [line for line in own.lines if line.kind == "model" and k in line.ks]
    rivals = [line for line in own.lines if line.kind == "rival" and k in line.ks and not line.who.endswith(" (told)")]
    rivals = [line for line in rivals if line.who in fair([line.who]) and np.isfinite(_at(line, k)[0])]
    best, rival = (min(some, key=lambda line: _at(line, k)[0], default=None) for some in (models, rivals))
    parts = []
    if best is not None:
        name = f"the best of {len(models)}, {best.who}," if len(models) > 1 else best.who
        parts.append(f"{name} has error {_said(best, k)}")
    if rival is not None:
        verb = "and the best rival" if best is not None else "the best rival"
        parts.append(
            f"{verb}, {rival.who}, {_said(rival, k)}"
            if best is not None
            else f"{verb}, {rival.who}, has error {_said(rival, k)}"
        )
    text = f"{config['task']}: after {k:.0f} of {last:.0f} examples " + " ".join(parts)
    if best is None:
        return text
    shifted = []
    for panel in found[1:]:
        line = next((line for line in panel.lines if line.who == best.who), None)
        if line is not None:
            at = float(line.ks[-1]) if panel.trained is not None else min(line.ks, key=lambda other: abs(other - k))
            shifted.append(f"{_at(line, at)[0]:.2g} ({panel.name}, k = {at:.0f})")
    return text + (f"; {best.who}'s is {', '.join(shifted)}" if shifted else "")


def _at(line: Line, k: float) -> Float[np.ndarray, " three"]:
    found: Float[np.ndarray, " three"] = line.levels[:, list(line.ks).index(k)]
    return found


def _said(line: Line, k: float) -> str:
    value, low, high = _at(line, k)
    return "0" if high < TINY else f"{value:.2g} [{low:.2g}, {high:.2g}]"
