"""The algorithms that a model's predictions are held against, each with the settings that can be fitted to it.

A *family* is an algorithm in one form: a function from settings to predictions. Some settings are counted (a number of
steps or of neighbours), others are fitted (a rate, a penalty): all of these are positive numbers, and are fitted in
their logarithm. Several forms of one algorithm share its name.

``candidates`` has the solvers of linear regression; those of Markov chains are in :mod:`analyses.probe_layers.symbols`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, TypeVar

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from interp import estimators
from interp.arguments import whole_number
from interp.estimators import iterative
from interp.tasks.base import Batch

STEPS = 32
PRECONDITIONED = 16
"""Most steps of GD and Newton, and of GD++, whose later steps are those of least squares."""
NEIGHBOURS = (1, 3, 5)
LARGEST = 1e6
"""A share of least squares' answer that is larger than this has diverged; it is cut off, so that squares are finite."""

Settings = Float[Tensor, "start group setting"]
"""One row of settings for each start, and either one group for all numbers of examples or one group for each."""
Predictions = Float[Tensor, "start batch k symbol"]


@dataclass(frozen=True)
class Where:
    """Which prompts, and after which numbers of examples."""

    prompts: slice
    ks: Int[Tensor, " k"]


@dataclass(frozen=True)
class Family:
    """One form of an algorithm.

    starts    settings to begin with, (start, setting); where nothing is fitted these are all that there are
    fitted    the columns that are fitted
    counts    the column that counts steps; None where there are none
    free      settings that somebody chose, counted ones too: of two that fit alike the one with fewer is named
    words     a row of settings as one says it
    predict   (settings, where) → predictions, fp64; a regression has one "symbol"
    low, high   bounds of the fitted settings. Far out an algorithm can turn into another (ridge of a huge penalty is
                one step of descent, times a tiny number), which should have the name
    """

    name: str
    starts: Float[Tensor, "start setting"]
    fitted: tuple[int, ...]
    counts: int | None
    free: int
    words: Callable[[Sequence[float]], str]
    predict: Callable[[Settings, Where], Predictions]
    low: Float[Tensor, " fitted"] = field(default_factory=lambda: torch.empty(0, dtype=torch.float64, device="cpu"))
    high: Float[Tensor, " fitted"] = field(default_factory=lambda: torch.empty(0, dtype=torch.float64, device="cpu"))


@dataclass(frozen=True)
class Candidates:
    """All families on one batch, in the order in which they are preferred where they fit alike.

    scaled   the same families with a scale as a setting of their own, the last one. Without, the scale is that of
             a p + b, an algorithm's p with a scale and a shift
    """

    families: tuple[Family, ...]
    scaled: tuple[Family, ...] = ()
    _seen: dict[Any, Predictions] = field(default_factory=dict, compare=False)

    def begun(self, family: Family, where: Where) -> Predictions:
        """What the starts of ``family`` predict; computed once."""
        key = (id(family), where.prompts.start, where.prompts.stop, tuple(where.ks.tolist()))
        if key not in self._seen:
            self._seen[key] = family.predict(family.starts[:, None], where)
        return self._seen[key]

    @property
    def names(self) -> list[str]:
        """Each name once, in order."""
        return list(dict.fromkeys(family.name for family in self.families))


def candidates(batch: Batch, steps: int | None = None) -> Candidates:
    """The solvers of linear regression on ``batch``.

    zero; averaging; k nearest neighbours; least squares; ridge; gradient descent over means and over sums; online
    descent, of residuals and of labels; Newton; GD++. Gradient descent has a rate that is the same for every prompt and
    k, or each prompt's own fastest; GD++ the same, with γ, in both forms and over means or sums. Sums with one rate for
    all k are what a linear attention without normalisation can compute. Online descent of labels is the solution of
    arXiv 2509.23779: the decay of its query is a factor α, which the rate takes in.
    """
    steps = whole_number("steps", STEPS if steps is None else steps, least=1)
    x, y = batch.x.detach().double().cpu(), batch.y.detach().double().cpu()
    pairs = _Pairs(x, y)
    means, sums = (iterative.Spectrum.of(x, y, over) for over in ("means", "sums"))
    size = float(x.square().sum(-1).mean())
    unit = x.shape[-1] / size  # 1 ÷ the mean eigenvalue of E[x xᵀ]
    several = tuple(range(1, steps + 1))
    few = tuple(range(2, min(steps, PRECONDITIONED) + 1))
    rates = tuple(unit * rate for rate in (0.03, 0.1, 0.3, 0.6))
    summed = tuple(rate * 2 / x.shape[1] for rate in rates)
    alphas = tuple(size * alpha for alpha in (1e-4, 1e-3, 0.01, 0.1, 1.0))
    decays = (0.5, 1 / 10, 1 / 40, 1 / 200)
    found = [
        known("zero", [torch.zeros_like(y)], [""], free=0),
        known("averaging", [estimators.averaging()(pairs)], [""], free=0),
        known("least squares", [estimators.ols()(pairs)], [""], free=0),
        known("k-NN", [estimators.knn(n)(pairs) for n in NEIGHBOURS], [f"{n} nearest" for n in NEIGHBOURS], free=1),
        Family("ridge", rows(alphas), (0,), None, 1, _ridge, _ridged(sums), *around(alphas)),
        Family("GD", rows(several), (), 0, 1, lambda s: f"fastest rate, {_steps(s[0])}", _descent(means)),
        Family("GD", rows(several, rates), (1,), 0, 2, _with_rate, _descent(means), *around(rates)),
        Family("GD on sums", rows(several, summed), (1,), 0, 2, _with_rate, _descent(sums), *around(summed)),
        _known_steps("Newton", iterative.newton_path(x, y, steps, spectrum=means)),
        *_online(x, y, tuple(rate / size for rate in (0.05, 0.2, 0.5, 1.0)), decays),
    ]
    for form in ("iterated", "once"):
        counts = few if form == "iterated" else (1, *few)  # one iterated step is one of GD
        path = iterative.gdpp_path(x, y, counts[-1], form=form, spectrum=means) if counts else None
        if path is None:
            continue
        found.append(_known_steps("GD++", path, counts, f"{form}, each prompt's own η and γ, "))
        for over, spectrum, etas in (("", means, rates[1:]), (" on sums", sums, summed[1:])):
            gammas = tuple(eta / 4 for eta in etas)
            words = _rounding(f"{form}{over}")
            ends, predict = around(etas, gammas), _rounder(spectrum, form)
            found.append(Family("GD++", rows(counts, etas, gammas), (1, 2), 0, 3, words, predict, *ends))
    return Candidates(tuple(found))


def _descent(of: iterative.Spectrum) -> Callable[[Settings, Where], Predictions]:
    """Gradient descent: settings (steps, rate), or (steps) with each prompt's fastest rate."""
    fastest = of.best_rate()

    def predict(settings: Settings, where: Where) -> Predictions:
        part = _part(of, where)
        count, *rate = _columns(settings)
        eta = rate[0] if rate else fastest[where.prompts][:, where.ks][None]
        return _filtered(part, (1 - eta * part.values) ** count)

    return predict


def _rounder(of: iterative.Spectrum, form: str) -> Callable[[Settings, Where], Predictions]:
    """GD++ with one η and γ for all: settings (steps, η, γ). See ``iterative.gdpp_path``."""

    def predict(settings: Settings, where: Where) -> Predictions:
        part = _part(of, where)
        count, eta, gamma = _columns(settings)
        if form == "once":
            return _filtered(part, (1 - eta * part.values * (1 - gamma * part.values).square()) ** count)
        values, missing = part.values[None], torch.ones_like(part.values)[None]
        for step in range(int(count.max())):
            factor = (1 - eta * values).where(step < count, values.new_ones(()))
            missing = (missing * factor).clamp(-LARGEST, LARGEST)
            values = (values * (1 - gamma * values).square()).clamp(max=LARGEST)
        return _filtered(part, missing)

    return predict


def _ridged(sums: iterative.Spectrum) -> Callable[[Settings, Where], Predictions]:
    """Ridge: setting α. What is missing of least squares' answer is α ÷ (λ + α)."""

    def predict(settings: Settings, where: Where) -> Predictions:
        part = _part(sums, where)
        (alpha,) = _columns(settings)
        return _filtered(part, alpha / (part.values + alpha))

    return predict


def _online(
    x: Float[Tensor, "batch n_pairs d"],
    y: Float[Tensor, "batch n_pairs"],
    rates: tuple[float, ...],
    decays: tuple[float, ...],
) -> list[Family]:
    """One pass through the pairs: settings (rate) and (rate, decay), forgetting = e^(−decay)."""

    def residuals(settings: Settings, where: Where) -> Predictions:
        start, group, width = settings.shape
        flat = settings.flatten(0, 1)
        keep = torch.exp(-flat[:, 1]) if width > 1 else torch.ones_like(flat[:, 0])
        both = torch.stack([flat[:, 0], keep], dim=1)
        path = iterative.online_pass(x[where.prompts], y[where.prompts], both).unflatten(0, (start, group))
        each = torch.arange(len(where.ks), device=where.ks.device) if group > 1 else torch.zeros_like(where.ks)
        return path[:, each, :, where.ks].permute(1, 2, 0)[..., None]

    def labels(settings: Settings, where: Where) -> Predictions:
        inputs, given = x[where.prompts], y[where.prompts]
        rate, decay = settings[..., 0], settings[..., 1]
        ages = where.ks[:, None] - 1 - torch.arange(x.shape[1], device=x.device)
        seen = (ages >= 0).to(x.dtype)
        kernel = einsum(inputs[:, where.ks], inputs, "b k i, b j i -> b k j") * given[:, None]
        weight = torch.exp(-decay[..., None] * ages.clamp(min=0)) * seen  # (start, k, j) or (start, 1 → k, j)
        return (einsum(kernel, weight, "b k j, s k j -> s b k") * rate[:, None])[..., None]

    def with_decay(row: Sequence[float]) -> str:
        return f"rate {row[0]:.3g}, forgetting {math.exp(-row[1]):.3g}"

    def without(row: Sequence[float]) -> str:
        return f"rate {row[0]:.3g}, forgetting 1"

    ends = around(rates, decays)

    return [
        Family("online GD", rows(rates), (0,), None, 1, without, residuals, *around(rates)),
        Family("online GD", rows(rates, decays), (0, 1), None, 2, with_decay, residuals, *ends),
        Family("online GD of labels", rows(rates, decays), (0, 1), None, 2, with_decay, labels, *ends),
    ]


def known(
    name: str,
    predictions: Sequence[Float[Tensor, "batch n_pairs *symbol"]],
    words: Sequence[str],
    free: int,
    counts: Sequence[int] | None = None,
) -> Family:
    """A family of predictions that are there already: its one setting is which of them."""
    table = torch.stack(list(predictions))
    table = table if table.ndim > 3 else table[..., None]
    taken = torch.tensor(list(range(len(table)) if counts is None else counts), device="cpu")
    index = {int(row): i for i, row in enumerate(taken)}

    def predict(settings: Settings, where: Where) -> Predictions:
        which = settings[..., 0].long().apply_(lambda row: index[row])
        chosen = table[:, where.prompts][:, :, where.ks]
        return chosen[which.expand(-1, len(where.ks)), :, torch.arange(len(where.ks), device="cpu")].transpose(1, 2)

    column = None if counts is None else 0
    return Family(name, taken.double()[:, None], (), column, free, lambda row: words[index[int(row[0])]], predict)


def _known_steps(
    name: str, path: Float[Tensor, "step batch n_pairs"], counts: Sequence[int] = (), before: str = ""
) -> Family:
    """The steps 1, 2, … of ``path``, or those of ``counts``."""
    counts = counts or range(1, len(path))
    return known(name, [path[t] for t in counts], [before + _steps(t) for t in counts], 1, counts)


def _part(of: iterative.Spectrum, where: Where) -> iterative.Spectrum:
    return iterative.Spectrum(of.values[where.prompts][:, where.ks], of.products[where.prompts][:, where.ks])


def _columns(settings: Settings) -> list[Float[Tensor, "start 1 group 1"]]:
    """Each setting, to be multiplied with eigenvalues (batch, k, d)."""
    return [column[:, None, :, None] for column in settings.unbind(-1)]


def _filtered(part: iterative.Spectrum, missing: Float[Tensor, "start batch k d"]) -> Predictions:
    bounded = missing.nan_to_num(LARGEST, LARGEST, -LARGEST).clamp(-LARGEST, LARGEST)
    return einsum(1 - bounded, part.weight, "s b k v, b k v -> s b k")[..., None]


T = TypeVar("T", int, float)


def rows(*columns: Sequence[T]) -> Float[Tensor, "start setting"]:
    """Every combination, the first column slowest."""
    return torch.tensor(list(product(*columns)), dtype=torch.float64, device="cpu")


def around(*columns: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Bounds of each column: a tenth of its smallest start, ten times its largest."""
    return tuple(  # type: ignore[return-value]
        torch.tensor([factor * end(column) for column in columns], dtype=torch.float64, device="cpu")
        for factor, end in ((0.1, min), (10.0, max))
    )


def _steps(count: int | float) -> str:
    return f"{count:.0f} step" if round(count) == 1 else f"{count:.0f} steps"


def _ridge(row: Sequence[float]) -> str:
    return f"α = {row[0]:.3g}"


def _with_rate(row: Sequence[float]) -> str:
    return f"rate {row[1]:.3g}, {_steps(row[0])}"


def _rounding(form: str) -> Callable[[Sequence[float]], str]:
    return lambda row: f"{form}, η {row[1]:.3g}, γ {row[2]:.3g}, {_steps(row[0])}"


@dataclass(frozen=True)
class _Pairs:
    x: Float[Tensor, "batch n_pairs d"]
    y: Float[Tensor, "batch n_pairs"]
