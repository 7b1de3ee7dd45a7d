"""Linear probes: what a straight line can read off a model's features, beside the controls that it must beat.

A probe that scores well may have learned the target itself, so each comes with three controls that are fitted and
scored in the same way: *shuffled* (the targets of other prompts), *untrained* (the features of a network with random
weights) and *running_sum* (what adding up the prompt would give). The caller hands over the features of the last two,
or says None in so many words.

The unit is the prompt. Rows of one prompt share its task, so they are on one side of every split: of the test, and of
the folds that choose the penalty.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from hooks.brief import brief
from hooks.errors import BadArgument, NonFinite, told
from interp.arguments import whole_number
from interp.machine.progress import followed, progress
from interp.stats import Interval, bootstrap, ratio

PENALTIES = tuple(10.0**power for power in range(-2, 6))
"""Ridge's α on standardised features. For logistic regression, C = 1 / α of every second of them."""
FOLDS = 4
FEWEST = 32
"""Least prompts that judge a probe: of labels drawn at random the interval then lies above 0 as often as it says."""
Array = NDArray[Any] | Tensor
"""Features (prompt, feature) or (prompt, row, feature); targets with the same first axes."""
Rows = NDArray[np.float64]
"""(prompt, row, column)."""


@dataclass(frozen=True)
class Split:
    """Which prompts fit a probe and which judge it."""

    train: Int[np.ndarray, "n_train"]
    test: Int[np.ndarray, "n_test"]

    __repr__ = brief


def split(n: int, test_share: float = 0.25, seed: int = 0) -> Split:
    """``n`` prompts in two parts at random; ``test_share`` of them judge, but FEWEST at least where half of them are as
    many. With fewer than 2 FEWEST prompts the intervals are too short, and lie above 0 by chance more often than 2.5 %.

    Raises ``BadArgument`` where fewer than 2 · FOLDS prompts could fit or fewer than 2 could judge.
    """
    test = round(n * test_share)
    if n >= 2 * FEWEST and test:
        test = max(test, FEWEST)
    if n - test < 2 * FOLDS or test < 2:
        raise BadArgument(
            f"{n} prompts with a test share of {test_share:g} leave {n - test} to fit and {test} to judge a probe; "
            f"give at least {2 * FOLDS} and 2"
        )
    order = np.random.default_rng(seed).permutation(n)
    return Split(np.sort(order[test:]), np.sort(order[:test]))


@dataclass(frozen=True)
class Probe:
    """How well one target is read, and how well the controls are.

    score      R² (0: no better than the mean of the training prompts; may be negative) or accuracy, on test prompts
    controls   the same score for "shuffled", and for "untrained" and "running_sum" where features were given
    folds      the same score by folds over the training prompts: what a choice between probes may look at
    chance     what knowing nothing scores: 0, or the test share of the training prompts' commonest class
    direction  (output, feature) of the features as they came: the target moves by it for each unit of a feature
    penalty    the α of each output
    """

    metric: str
    score: Interval
    controls: dict[str, Interval]
    folds: float
    chance: float
    direction: NDArray[np.float64]
    penalty: NDArray[np.float64]

    __repr__ = brief


def ridge(
    features: Array,
    targets: Mapping[str, Array],
    *,
    untrained: Array | None,
    running_sum: Array | None,
    split: Split | None = None,
    components: int | None = None,
    shuffles: int = 5,
    seed: int = 0,
) -> dict[str, Probe]:
    """A ridge probe from ``features`` to each of ``targets``, by name; the metric is R².

    ``targets`` are (prompt, output) or (prompt, row, output), or without the last axis for one output. R² pools the
    outputs: 1 − Σ (y − ŷ)² / Σ (y − ȳ)², ȳ of the training prompts. ``components``: see ``reduce``. The penalty is
    chosen for each output by folds over the training prompts. All targets, and ``shuffles`` reshuffled copies of each,
    cost one decomposition of the features.
    """
    whole_number("shuffles", shuffles, least=1)
    x = _rows(features, "the features")
    truth = {name: _target(target, features, name) for name, target in targets.items()}
    if not truth:
        raise BadArgument("there is no target; give at least one as {name: array}")
    parts = _split_of(x, truth, split, seed)
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(x)) for _ in range(shuffles)]
    columns = {name: y.shape[-1] for name, y in truth.items()}
    copies = np.concatenate([y for y in truth.values()] + [y[order] for order in orders for y in truth.values()], -1)
    width = sum(columns.values())
    _judged_by_all(columns, np.square(copies[parts.test] - copies[parts.train].mean((0, 1))).sum(1), shuffles)

    beside = _controls(x, untrained, running_sum)
    reduced, axes = _reduced(x, parts, components)
    with progress(FOLDS * (1 + len(beside)), "probe") as tick:
        fitted = _Ridge(reduced, copies, parts, tick)
        others = {
            control: _Ridge(reduce(given, parts, components), copies[..., :width], parts, tick)
            for control, given in beside.items()
        }
    asked: list[tuple[str, _Ridge, list[slice]]] = []
    start = 0
    for name, count in columns.items():
        own = slice(start, start + count)
        again = [slice(first + start, first + start + count) for first in range(width, width * (shuffles + 1), width)]
        asked += [(name, fitted, [own]), (name, fitted, again), *((name, other, [own]) for other in others.values())]
        start += count
    scores = iter(_r_squared(asked))
    found = {}
    for name, one, (own,) in asked[:: 2 + len(others)]:
        score, controls = next(scores), {control: next(scores) for control in ("shuffled", *others)}
        direction = one.direction(own) if axes is None else one.direction(own) @ axes
        found[name] = Probe("R²", score, controls, one.folds(own), 0.0, direction, one.penalty[own])
    return found


def logistic(
    features: Array,
    target: Array,
    *,
    untrained: Array | None,
    running_sum: Array | None,
    split: Split | None = None,
    components: int | None = None,
    shuffles: int = 3,
    seed: int = 0,
) -> Probe:
    """A logistic probe from ``features`` to the classes in ``target``, (prompt) or (prompt, row); accuracy.

    Penalty, folds, controls and ``components`` as in ``ridge``. ``direction`` has one row for two classes, and one for
    each of more.
    """
    whole_number("shuffles", shuffles, least=1)
    x, y = _rows(features, "the features"), _target(target, features, "the target")
    parts = _split_of(x, {"the target": y}, split, seed)
    reduced, axes = _reduced(x, parts, components)
    classes, counts = np.unique(y[parts.train], return_counts=True)
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(y)) for _ in range(shuffles)]
    for which, order in (("", np.arange(len(y))), *((", when reshuffled,", order) for order in orders)):
        if len(np.unique(y[order][parts.train])) < 2:
            raise BadArgument(f"all training prompts{which} have the class {classes[0]:g}; a probe needs two")
    beside = _controls(x, untrained, running_sum)
    pipeline, right, penalty, folds = _fit_classes(reduced, y, parts)
    blind = [_fit_classes(reduced, y[order], parts)[1] for order in followed(orders, "probe, shuffled")]
    controls = {"shuffled": bootstrap(np.mean(blind, axis=0))}
    for control, given in beside.items():
        controls[control] = bootstrap(_fit_classes(reduce(given, parts, components), y, parts)[1])
    chance = float((y[parts.test] == classes[counts.argmax()]).mean())
    line = pipeline[-1].coef_ / pipeline[0].scale_
    if axes is not None:
        line = line @ axes
    return Probe("accuracy", bootstrap(right), controls, folds, chance, line, np.array([penalty]))


def reduce(features: Array, parts: Split, components: int | None) -> Rows:
    """``features`` (prompt, row, component) on the first principal components of the training prompts.

    Features that already have no more than ``components`` columns, or None, are returned as they are: sets of features
    of different size are compared on equal numbers of components.
    """
    return _reduced(_rows(features, "the features"), parts, components)[0]


def _reduced(x: Rows, parts: Split, components: int | None) -> tuple[Rows, NDArray[np.float64] | None]:
    """``reduce`` of ``x``, and the axes (component, feature), None where nothing was reduced."""
    if components is None or x.shape[-1] <= whole_number("components", components, least=1):
        return x, None
    axes = _axes(x, parts, components)
    return np.asarray((x - x[parts.train].mean((0, 1))) @ axes.T), axes


def lucky(target: Array, parts: Split, copies: int = 1, z: float = 4.0) -> float:
    """The R² on test prompts that a guess which knows nothing of ``target`` exceeds only beyond ``z`` standard errors.

    With s the guess's variance over the target's, its R² has mean −s and standard deviation at most 2 sqrt(s / N), so
    that −s + 2 z sqrt(s / N) is at most z² / N, whatever s is. N = n_test · copies · Σ λ / λ_max counts the target's
    outputs by the eigenvalues λ of their covariance; ``copies`` are independent reshuffles that were pooled.
    """
    y = _rows(target, "the target")[parts.test]
    values = np.linalg.eigvalsh(np.atleast_2d(np.cov(y.reshape(-1, y.shape[-1]), rowvar=False)))
    return float(z**2 * values.max() / max(values.sum(), 1e-300) / (len(parts.test) * copies))


def _judged_by_all(columns: Mapping[str, int], spread: NDArray[np.float64], shuffles: int) -> None:
    """Nothing, if each target and its reshuffles have a share of a spread (prompt, column) among the test prompts, and
    among each resample of them; else ``BadArgument``, before anything is fitted. Columns as in ``ridge``.
    """
    blocks = spread.reshape(len(spread), shuffles + 1, -1)
    start = 0
    for name, count in columns.items():
        part = blocks[:, :, start : start + count].sum(2)
        start += count
        for squares in (part[:, 0], part[:, 1:].sum(1)):
            if not squares.any():
                raise BadArgument(f'the target "{name}" is the same for all test prompts; there is nothing to read')
            if not squares.all():
                ratio(squares, squares)


class _Ridge:
    """Standardised ridge of all columns of ``y`` at once, each with its own penalty; squares on the test prompts.

    Equal to scikit-learn's ``Ridge`` at each penalty (a test). One decomposition for each fold serves every column at
    every penalty: hundreds of probes, one for each block and target, take a second and not a minute.
    """

    def __init__(self, x: Rows, y: Rows, parts: Split, tick: Callable[[], object] = lambda: None) -> None:
        flat, goal = _flat(x, parts.train), _flat(y, parts.train)
        centre, size = flat.mean(0), flat.std(0)
        self.size = np.where(size > 1e-12 * np.abs(centre), size, 1.0)
        self.size[self.size == 0] = 1.0
        scaled = (flat - centre) / self.size
        groups = np.repeat(np.arange(len(parts.train)) % FOLDS, x.shape[1])
        missed = np.zeros((len(PENALTIES), y.shape[-1]))
        for fold in range(FOLDS):
            inside, outside = groups != fold, groups == fold
            part = _Decomposed(scaled[inside], goal[inside])
            for i, penalty in enumerate(PENALTIES):
                weights, shift = part.solve(penalty)
                missed[i] += np.square(scaled[outside] @ weights + shift - goal[outside]).sum(0)
            tick()
        self.penalty = np.asarray(PENALTIES)[missed.argmin(0)]
        self.inside = missed.min(0), np.square(goal - goal.mean(0)).sum(0)
        self.weights, shift = _Decomposed(scaled, goal).solve(self.penalty)
        guess = (_flat(x, parts.test) - centre) / self.size @ self.weights + shift
        truth = y[parts.test]
        self.missed = np.square(truth - guess.reshape(truth.shape)).sum(1)
        self.spread = np.square(truth - goal.mean(0)).sum(1)

    def folds(self, own: slice) -> float:
        """R² by folds over the training prompts; 0 where a target is the same in all of them."""
        missed, spread = (float(part[own].sum()) for part in self.inside)
        return 1 - missed / spread if spread > 0 else 0.0

    def direction(self, own: slice) -> NDArray[np.float64]:
        """(output, feature) in units of the unscaled features."""
        return np.asarray(self.weights[:, own].T / self.size)


class _Decomposed:
    """Eigenvectors of xᵀx of the centred rows: ridge at any penalty is V diag(1 / (λ + α)) Vᵀ xᵀ y."""

    def __init__(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> None:
        self.centre, self.middle = x.mean(0), y.mean(0)
        x, y = x - self.centre, y - self.middle
        if x.shape[1] <= x.shape[0]:
            values, self.vectors = np.linalg.eigh(x.T @ x)
            self.values = np.maximum(values, 0)
            self.along = self.vectors.T @ (x.T @ y)
        else:
            u, s, v = np.linalg.svd(x, full_matrices=False)
            self.values, self.vectors, self.along = s**2, v.T, s[:, None] * (u.T @ y)

    def solve(self, penalty: float | NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Weights (feature, column) and intercepts (column); one penalty, or one for each column."""
        weights = self.vectors @ (self.along / (self.values[:, None] + penalty))
        return weights, self.middle - self.centre @ weights


def _r_squared(asked: Sequence[tuple[str, _Ridge, Sequence[slice]]]) -> list[Interval]:
    """1 − Σ missed / Σ spread over the test prompts with its interval, each pooled over its columns.

    All at once, because what takes the time is to draw the resamples, which are the same for all.
    """

    def pooled(squares: Callable[[_Ridge], NDArray[np.float64]]) -> NDArray[np.float64]:
        each = [np.sum([squares(fit)[:, own].sum(-1) for own in columns], axis=0) for _, fit, columns in asked]
        return np.stack(each, axis=-1)

    share = ratio(pooled(lambda fit: fit.missed), pooled(lambda fit: fit.spread))
    ends = zip(1 - share.mean, 1 - share.high, 1 - share.low, strict=True)
    return [Interval(np.asarray(r), np.asarray(low), np.asarray(high), share.n, share.level) for r, low, high in ends]


def _fit_classes(x: Rows, y: Rows, parts: Split) -> tuple[Any, NDArray[np.float64], float, float]:
    """The fitted pipeline, the share of right rows of each test prompt, the chosen penalty, its accuracy by folds."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, PredefinedSplit
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    groups = np.repeat(np.arange(len(parts.train)) % FOLDS, x.shape[1])
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(solver="newton-cholesky")),
        {"logisticregression__C": [1 / penalty for penalty in PENALTIES[1::2]]},
        cv=PredefinedSplit(groups),
    )
    search.fit(_flat(x, parts.train), _flat(y, parts.train)[:, 0])
    guess = search.predict(_flat(x, parts.test))
    right = (guess == _flat(y, parts.test)[:, 0]).reshape(len(parts.test), -1).mean(1)
    return search.best_estimator_, right, 1 / search.best_params_["logisticregression__C"], float(search.best_score_)


def _axes(x: Rows, parts: Split, components: int) -> NDArray[np.float64]:
    """(component, feature): the training prompts' first principal axes, of unit length.

    By the smaller of the two products of the centred features with themselves: a state has many more entries than
    there are prompts, and its singular value decomposition would take most of a probe's time.
    """
    from scipy.linalg import eigh

    flat = _flat(x, parts.train)
    flat = flat - flat.mean(0)
    rows, width = flat.shape
    count = min(components, rows - 1, width)
    if width <= rows:
        axes = eigh(flat.T @ flat, subset_by_index=(width - count, width - 1))[1]
        return np.asarray(axes[:, ::-1].T)
    vectors = eigh(flat @ flat.T, subset_by_index=(rows - count, rows - 1))[1]
    axes = vectors[:, ::-1].T @ flat
    length = np.linalg.norm(axes, axis=1, keepdims=True)
    # Fewer independent prompts than components: what is left is rounding, and becomes a constant feature.
    kept = length > 1e-7 * length.max()
    return np.asarray(np.where(kept, axes / np.where(kept, length, 1.0), 0.0))


def _flat(values: Rows, prompts: NDArray[np.int64]) -> NDArray[np.float64]:
    return values[prompts].reshape(-1, values.shape[-1])


def _rows(values: Array, what: str) -> Rows:
    """As fp64 (prompt, row, column); one row a prompt where there are two axes."""
    data = _numbers(values, what)
    if data.ndim == 2:
        data = data[:, None]
    if data.ndim != 3 or 0 in data.shape:
        raise BadArgument(f"{what} has shape {data.shape}; give (prompt, column) or (prompt, row, column)")
    return data


def _target(values: Array, features: Array, name: str) -> Rows:
    """A target as (prompt, row, output): it has the axes of the features, save that the last may be left out."""
    data = _numbers(values, name)
    return _rows(data[..., None] if data.ndim == np.ndim(features) - 1 else data, name)


def _numbers(values: Array, what: str) -> NDArray[np.float64]:
    try:
        data = np.asarray(values.detach().cpu().double().numpy() if isinstance(values, Tensor) else values, np.float64)
    except (TypeError, ValueError):
        raise BadArgument(f"{what} is {told(values)}: give a tensor or an array of numbers") from None
    if not np.isfinite(data).all():
        raise NonFinite(f"{what} holds NaN or inf; find where it starts before probing")
    return data


def _controls(x: Rows, untrained: Array | None, running_sum: Array | None) -> dict[str, Rows]:
    """The features of the controls that are given, with the prompts and rows of ``x``."""
    given = {"untrained": untrained, "running_sum": running_sum}
    found = {name: _rows(values, "a control's features") for name, values in given.items() if values is not None}
    for data in found.values():
        if data.shape[:2] != x.shape[:2]:
            raise BadArgument(f"a control has {data.shape[:2]} prompts and rows, the features have {x.shape[:2]}")
    return found


def _split_of(x: Rows, targets: Mapping[str, Rows], given: Split | None, seed: int) -> Split:
    """The split, once every target has the prompts and rows of ``x``."""
    for name, y in targets.items():
        if y.shape[:2] != x.shape[:2]:
            raise BadArgument(f'"{name}" has {y.shape[:2]} prompts and rows, the features have {x.shape[:2]}')
    parts = split(len(x), seed=seed) if given is None else given
    shared = np.intersect1d(parts.train, parts.test)
    if len(shared):
        raise BadArgument(
            f"{len(shared)} prompts are in both parts of the split; a probe would be judged on what it saw"
        )
    if max(parts.train.max(), parts.test.max()) >= len(x):
        raise BadArgument(f"the split names prompts beyond the {len(x)} that there are")
    return parts
