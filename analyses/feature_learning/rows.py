"""What ``feature_learning`` found, as the rows of its table and the arrays of its figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from analyses.feature_learning.rivals import grouped, windows
from analyses.feature_learning.study import BENT, HELD, LINEAR, WRITE, Found, Plan
from analyses.feature_learning.transform import TOP, exact
from interp.probe import Probe
from interp.result import numbers
from interp.stats import Interval, paired_difference, ratio

COLUMNS = ("model", "part", "who", "how", "what", "layer", "at", "k", "value", "low", "high", "n")
Row = dict[str, Any]


@dataclass(frozen=True)
class All:
    """Everything that was measured: models (the trained one first, then the untrained), rivals, running sums."""

    asked: Plan
    found: Sequence[Found]
    rivals: Mapping[str, Float[Tensor, "batch n_pairs"]]
    settings: Mapping[str, tuple[str, ...]]
    sums: Mapping[tuple[str, int], Probe]

    @property
    def trained(self) -> Found:
        return self.found[0]

    @property
    def untrained(self) -> Found:
        return self.found[1]

    @property
    def changed(self) -> Sequence[Found]:
        """The variants, ablated and retrained."""
        return self.found[2:]


def levels(every: All) -> dict[tuple[str, str], Interval]:
    """(who, how) → error ÷ that of predicting 0 for the same queries, by window of k."""
    groups = windows(every.asked.task.n_pairs)
    zero = grouped(every.asked.task.error(torch.zeros_like(every.asked.batch.targets), every.asked.batch), groups)
    errors = {(_who(one), one.subject.how): one.error for one in every.found}
    errors |= {(name, "rival"): error for name, error in every.rivals.items()}
    return {key: ratio(grouped(error, groups), zero) for key, error in errors.items()}


def differences(every: All) -> dict[tuple[str, str], Interval]:
    """(who, how) → error of the last window less that of the trained model; for the subspace, less the best of the
    kernels that are not told it. In the task's own unit.
    """
    groups = windows(every.asked.task.n_pairs)[-1:]

    def last(error: Tensor) -> NDArray[np.float64]:
        return np.asarray(grouped(error, groups)[:, 0].numpy())

    base = last(every.trained.error)
    found = {(_who(one), one.subject.how): paired_difference(last(one.error), base) for one in every.changed}
    blind = [last(error) for name, error in every.rivals.items() if name in BLIND]
    told = last(every.rivals[SUBSPACE])
    found[SUBSPACE, "less the better kernel ridge that is not told"] = paired_difference(
        told, min(blind, key=lambda error: float(error.mean()))
    )
    return found


BLIND = ("kernel ridge, RBF", "kernel ridge, polynomial")
SUBSPACE = "kernel ridge, told the subspace"


def table(every: All, model: str) -> pd.DataFrame:
    """One row for each number: part (error, difference, reading, transform), who, how, what, layer, at.

    ``layer`` and ``k`` are numbers; NaN where a row is of no one layer or of no one number of examples.
    """
    found = levels(every)
    rows = [
        _row("error", who, how, "error ÷ that of 0", one, at=at, i=i)
        for i, at in reversed(list(enumerate(_spans(every))))
        for (who, how), one in found.items()
    ]
    rows += [
        _row("difference", who, how, "error", one, at=_spans(every)[-1])
        for (who, how), one in differences(every).items()
    ]
    target = f"R² of {every.asked.target}"
    for one in every.found:
        for (layer, k), probe in one.reading.items():
            rows.append(_row("reading", _who(one), one.subject.how, target, probe.score, layer=layer, at=f"k={k}"))
            if one is every.trained:
                shuffled = probe.controls["shuffled"]
                rows.append(_row("reading", _who(one), "shuffled", target, shuffled, layer=layer, at=f"k={k}"))
    for (name, k), probe in every.sums.items():
        rows.append(_row("reading", name, "running sum", target, probe.score, at=f"k={k}"))
    for one in every.found:
        for (what, layer), made in one.transforms.items():
            for words, interval in (("share", made.share), ("coefficient", made.coefficient)):
                for degree in range(1, TOP + 1):
                    name = f"{what}: {words}"
                    rows.append(
                        _row("transform", _who(one), one.subject.how, name, interval, layer, f"degree {degree}", degree)
                    )
    made = pd.DataFrame([{"model": model, **row} for row in rows])
    return made.assign(layer=numbers(made["layer"]), k=numbers(made["at"], "k="))[list(COLUMNS)]


def arrays(every: All) -> dict[str, np.ndarray]:
    """What the figure needs: ``error`` (line, 3, window) with ``who`` and ``how``; ``read_…`` (3, k) at the best layer;
    ``change_…`` (variant, how, 3); ``curve_…`` and ``coefficient_…`` of the first layer.
    """
    found = levels(every)
    asked, ks, last = every.asked, every.asked.ks, every.asked.ks[-1]
    spans = windows(asked.task.n_pairs)
    values: dict[str, np.ndarray] = {
        "who": np.array([who for who, _ in found]),
        "how": np.array([how for _, how in found]),
        "error": np.stack([_ends(one) for one in found.values()]),
        "window": np.array([np.mean(span) for span in spans]),
        "last_window": np.array([spans[-1][0], spans[-1][-1]]),
        "ks": np.array(ks),
        "target": np.array(asked.target),
        "order": np.array(asked.order),
        "layers": np.array([every.trained.best(k) for k in ks]),
    }
    for one in (every.trained, every.untrained):
        values[f"read_{one.subject.how}"] = _lines([one.reading[one.best(k), k].score for k in ks])
    shuffled = [every.trained.reading[every.trained.best(k), k].controls["shuffled"] for k in ks]
    values["read_shuffled"] = _lines(shuffled)
    for key, name in (("linear", LINEAR), ("bent", BENT)):
        values[f"read_{key}"] = _lines([every.sums[name, k].score for k in ks])
    variants = list(dict.fromkeys(_who(one) for one in every.changed))
    values["variants"] = np.array(variants)
    nothing = np.full((len(variants), 2, 3), np.nan)
    values["change_error"], values["change_read"] = nothing.copy(), nothing.copy()
    for one in every.changed:
        place = variants.index(_who(one)), ("ablated", "retrained").index(one.subject.how)
        values["change_error"][place] = _ends(found[_who(one), one.subject.how])[:, -1]
        values["change_read"][place] = _ends(one.reading[one.best(last), last].score)
    for key, one, what in _shown(every):
        if (what, 0) in one.transforms:
            made = one.transforms[what, 0]
            values[f"curve_{key}"], values[f"coefficient_{key}"] = made.curve, _ends(made.coefficient)
            values["label"] = made.at
    values["coefficient_label"] = exact(asked.task, lambda y: y)
    labels = asked.asked.labels
    middle = labels.weight @ labels.y
    values["label_line"] = np.array([float(middle), float((labels.weight @ (labels.y - middle).square()) ** 0.5)])
    return values


def _shown(every: All) -> list[tuple[str, Found, str]]:
    return [
        ("write", every.trained, WRITE),
        ("held", every.trained, HELD),
        ("untrained", every.untrained, WRITE),
    ]


def _who(one: Found) -> str:
    return one.subject.variant or "published block"


def _spans(every: All) -> list[str]:
    spans = windows(every.asked.task.n_pairs)
    return [f"k={one[0]}" if len(one) == 1 else f"k={one[0]}…{one[-1]}" for one in spans]


def _row(
    part: str,
    who: str,
    how: str,
    what: str,
    interval: Interval,
    layer: int | str = "",
    at: str = "",
    i: int | None = None,
) -> Row:
    one = interval if i is None else _entry(interval, i)
    ends = {"value": float(one.mean), "low": float(one.low), "high": float(one.high), "n": one.n}
    return {"part": part, "who": who, "how": how, "what": what, "layer": str(layer), "at": at, **ends}


def _entry(interval: Interval, i: int) -> Interval:
    mean, low, high = (np.asarray(part[i]) for part in (interval.mean, interval.low, interval.high))
    return Interval(mean, low, high, interval.n)


def _ends(interval: Interval) -> NDArray[np.float64]:
    return np.stack([interval.mean, interval.low, interval.high]).astype(float)


def _lines(intervals: Sequence[Interval]) -> NDArray[np.float64]:
    return np.stack([_ends(one) for one in intervals], axis=-1)
