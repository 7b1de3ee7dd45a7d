"""Error against the number k of examples: of models and rivals, on a task, its shifts and longer prompts.

Where a prompt has one query of its own, its last, each k needs prompts of its own: then a handful of ks is measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooks.brief import brief
from hooks.errors import BadArgument, MambascopeError
from interp import evaluate, seeds, stats
from interp.arguments import listed, name_and_options
from interp.rivals import Rival
from interp.tasks import Batch, Task, TokenTask, inputs, shifts
from interp.tasks.regression import Regression

USUAL = ("skewed_inputs", "label_noise", "random_quadrants", "orthogonal_query")
"""Shifts that are drawn if none is asked for, as far as a task admits them."""
HANDFUL = 4
"""Numbers of examples where each needs prompts of its own."""
FITS = 5
"""Numbers of examples at which a rival is fitted anew for each prompt."""


LINEAR = ("linreg", "sparse_linreg")
"""Tasks whose labels, without noise, are linear in x."""


@dataclass(frozen=True)
class Setting:
    """Prompts of one kind.

    ks       numbers of examples at which errors are measured
    each     whether each k needs prompts of its own, with one query
    trained  the number of pairs of a prompt in training; None where no k is beyond it
    """

    name: str
    task: Task
    n_pairs: int
    ks: tuple[int, ...]
    each: bool
    prompts: int
    trained: int | None = None

    def batches(self, seed: int) -> list[tuple[tuple[int, ...], Batch]]:
        """The prompts, with the ks that they answer."""
        if not self.each:
            return [(self.ks, self._draw(seed, self.n_pairs))]
        return [((k,), self._draw(seed, k + 1)) for k in self.ks]

    def _draw(self, seed: int, n_pairs: int) -> Batch:
        return self.task.sample(self.prompts, seeds.generator("probe", seed), n_pairs=n_pairs)

    @property
    def fits(self) -> tuple[int, ...]:
        """Those of ``ks`` at which a rival is fitted: the reported ones, and others spread between."""
        return _spread(self.ks, FITS, [k for k in self.task.report_ks if k in self.ks])


@dataclass(frozen=True)
class Curve:
    """The error of each prompt at each of ``ks``, of ``who`` in a setting."""

    who: str
    kind: str
    ks: tuple[int, ...]
    error: Float[np.ndarray, "prompt k"]

    __repr__ = brief


def settings(task: Task, asked: Sequence[str], longer: int, prompts: int) -> tuple[list[Setting], list[str]]:
    """The task itself, ``longer`` times as long, and each shift; and a line for each that is left out.

    ``asked`` are shifts, ``name``, ``name:option=value,…`` or several joined by ``+``; none is the usual ones that the
    task admits, ``("none",)`` is none. Raises ``BadArgument`` for one that was asked for and does not work.
    """
    own = setting("as trained", task, prompts)
    found, left = [own], []
    if longer > 1:
        try:
            n_pairs = longer * task.n_pairs
            task.sample(1, torch.Generator().manual_seed(0), n_pairs=n_pairs)
            found.append(setting(f"{longer} times as long", task, max(prompts // 2, 2), n_pairs))
        except BadArgument as reason:
            left.append(f"no longer prompts: {reason}")
    asked = listed("shifts", asked)
    chosen = [] if asked == ["none"] else asked
    for text in chosen or (() if asked or isinstance(task, TokenTask) else USUAL):
        try:
            found.append(setting(text, shifts.apply(task, [_shift(one) for one in text.split("+")]), prompts))
        except BadArgument as reason:
            if chosen:
                raise
            left.append(f"no {text}: {reason}")
    return found, left


def setting(name: str, task: Task, prompts: int, n_pairs: int | None = None) -> Setting:
    """Prompts of ``task``, of its own length or of ``n_pairs`` pairs, at every k or at a handful."""
    length = n_pairs or task.n_pairs
    trained = task.n_pairs if n_pairs else None
    base = getattr(task, "base", task)
    trained = base.n_pairs if length > base.n_pairs else trained
    ks: tuple[int, ...] = tuple(range(length))
    if task.query_only:
        least = 1 if "overlapping_query" in str(task.config.get("shifts")) else 0
        reported = [k for k in (*base.report_ks, length - 1) if least <= k < length]
        ks = _spread(ks[max(least, 1) :] or ks[least:], HANDFUL, reported)
    return Setting(name, task, length, ks, task.query_only, prompts, trained)


def every(name: str, model: Any, found: Sequence[Setting], seed: int) -> list[Curve | None]:
    """:func:`errors` in every setting."""
    return [errors(name, model, setting, seed) for setting in found]


def errors(name: str, model: Any, setting: Setting, seed: int) -> Curve | None:
    """The curve of a model; None where its longest input is shorter than the prompts."""
    limit = getattr(getattr(model, "cfg", None), "n_ctx", None)
    parts = []
    for ks, batch in setting.batches(seed):
        if limit is not None and batch.tokens.shape[1] > limit:
            return None
        error = evaluate.errors(model, setting.task, batch=batch, query_only=setting.each)
        parts.append(error if setting.each else error[:, list(ks)])
    return Curve(name, "model", setting.ks, torch.cat(parts, dim=1).double().numpy())


def rival_errors(
    rivals: Sequence[Rival], setting: Setting, seed: int, fitted: int
) -> tuple[list[Curve], dict[str, str]]:
    """The curves of the rivals; one that is fitted anew for each prompt has the first ``fitted`` prompts and few ks.

    And why there is none, by name, for a rival that refuses these prompts or whose errors on them are not finite: it
    does not take the others with it.
    """
    parts: dict[str, list[Tensor]] = {rival.name: [] for rival in rivals}
    failed: dict[str, str] = {}
    for ks, batch in setting.batches(seed):
        own = setting.task.baselines(batch)
        for rival in rivals:
            seen = batch.take(slice(0, fitted)) if rival.fitted else batch
            asked = [k for k in ks if not rival.fitted or k in setting.fits]
            if asked and rival.name not in failed:
                try:
                    error = rival.errors(setting.task, seen, asked, own)
                except MambascopeError as reason:
                    failed[rival.name] = str(reason)
                    continue
                if not bool(error.isfinite().all()):
                    failed[rival.name] = "its errors are not finite"
                parts[rival.name].append(error)
    curves = [
        Curve(
            rival.name,
            "rival",
            setting.fits if rival.fitted else setting.ks,
            torch.cat(parts[rival.name], dim=1).double().numpy(),
        )
        for rival in rivals
        if rival.name not in failed
    ]
    return curves, failed


def without_mean(setting: Setting, who: str) -> tuple[int, ...]:
    """The ks at which the mean error of ``who`` is infinite, so that no number of prompts estimates it.

    Least squares, where the labels are not exactly linear in x: within one example of the rank of the inputs, the
    smallest singular value of the k inputs is near 0 too often (E[1 / s²] diverges for Gaussian x).
    """
    base = getattr(setting.task, "base", setting.task)
    if who != "ols" or not isinstance(base, Regression):
        return ()
    noisy = base.noise.size or "label_noise" in str(setting.task.config.get("shifts"))
    if base.name in LINEAR and not noisy:
        return ()
    rank = inputs.rank(base.covariance, base.d)
    return tuple(k for k in setting.ks if abs(k - rank) <= 1)


def reach(
    ks: Sequence[int], levels: Float[np.ndarray, "three k"], level: float
) -> tuple[int | None, int | None, int | None]:
    """The first of ``ks`` from which on an error stays at or below ``level``; None if there is none.

    ``levels`` are mean, low and high; of the mean, and of the ends of its interval: with the low ends it comes at the
    earliest, with the high ends at the latest.
    """
    first = []
    for row in levels:
        above = np.flatnonzero(~(row <= level))
        start = 0 if not len(above) else int(above[-1]) + 1
        first.append(ks[start] if start < len(ks) else None)
    return first[0], first[1], first[2]


def interval(
    error: Float[np.ndarray, "prompt k"], seed: int = 0, *, median: bool = False
) -> Float[np.ndarray, "three k"]:
    """Mean (or median) over prompts, and the ends of its 95 % bootstrap interval."""
    statistic = (lambda values: np.median(values, axis=0)) if median else None
    found = stats.bootstrap(error, seed=seed, statistic=statistic)
    return np.stack([found.mean, found.low, found.high])


def other_labels(task: Task, batch: Batch, k: int) -> Batch:
    """The same prompts up to the query of example k; its label, and all that comes after, are another prompt's.

    Whatever predicts example k from the k pairs before it and x_k says the same to both.
    """
    y, targets = batch.y.clone(), batch.targets.clone()
    y[:, k:], targets[:, k:] = y.roll(1, 0)[:, k:], targets.roll(1, 0)[:, k:]
    tokens, other = batch.tokens.clone(), batch.tokens.roll(1, 0)
    if batch.read.shape[-1] == 1 and batch.targets.shape[1] > 1:
        tokens[:, k:-1, -1] = other[:, k:-1, -1]  # one token a pair, its label last; the query has none
    else:
        later = torch.arange(tokens.shape[1], device=tokens.device) > batch.read[..., k : k + 1].expand(len(batch), 1)
        tokens[later] = other[later]
    return dataclasses.replace(batch, tokens=tokens, y=y, targets=targets)


def _shift(text: str) -> shifts.Asked:
    name, options = name_and_options("shifts", text)
    return (name, options) if options else name


def _spread(ks: Sequence[int], count: int, wanted: Sequence[int]) -> tuple[int, ...]:
    """``wanted``, and others of ``ks`` until there are ``count``, each time the middle of the widest gap."""
    have = sorted(set(wanted)) or [ks[-1]]
    while len(have) < min(count, len(ks)):
        left = [k for k in ks if k not in have]
        have = sorted([*have, max(left, key=lambda k: (min(abs(k - other) for other in have), -k))])
    return tuple(have)
