"""Uncertainty over prompts: bootstrap intervals, paired tests, corrections for many tests.

The first axis of every array is the prompt, the unit that is drawn independently; all other axes
(example k, layer, mode, …) are kept, and one resample of the prompts serves all of them. Nothing
here speaks about another training of the same model: that needs several seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Num
from numpy.typing import NDArray
from scipy.special import ndtr, stdtrit
from torch import Tensor

from hooks.brief import brief
from hooks.errors import BadArgument, NonFinite, told
from interp.arguments import one_of, whole_number

Values = Num[np.ndarray, "..."] | Num[Tensor, "..."]
"""(n, …), the prompt on axis 0. Two of them are compared by ``_pair``, in words and not by name."""
Statistic = Callable[[NDArray[np.float64]], Any]
"""(n, …) → (…), or a number where there is nothing else."""
Alternative = Literal["two-sided", "greater", "less"]

_BLOCK = 2**23
"""Numbers in one block of resampling weights (64 MB), so that memory does not grow with n_boot."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval; ``float(interval.mean)`` works where there is one number.

    mean       the estimate: the mean over prompts, or the statistic that was asked for
    low, high  ends of the interval, the same shape; NaN for a single prompt, which has no spread
    n          number of prompts
    level      nominal coverage
    """

    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    n: int
    level: float = 0.95

    __repr__ = brief

    def each(self) -> list[Interval]:
        """One interval for each entry of the first axis."""
        ends = zip(self.mean, self.low, self.high, strict=True)
        return [
            Interval(np.asarray(mean), np.asarray(low), np.asarray(high), self.n, self.level)
            for mean, low, high in ends
        ]


def bootstrap(
    values: Values,
    n_boot: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    statistic: Statistic | None = None,
) -> Interval:
    """Percentile bootstrap interval, over prompts, of the mean along axis 0.

    A resample is a count of how often it holds each prompt, so the means of all resamples are one
    matrix product, counts (n_boot, n) @ values (n, …) / n. ``statistic`` takes (n, …) and reduces
    axis 0 (``lambda v: np.median(v, axis=0)``); it is called once for each resample, in a loop.
    A percentile interval is short for small n, by the factor sqrt(1 - 1/n) and by a normal's quantiles
    instead of t's; its ends are taken so much further out (Hesterberg 2015, §4.1: "expanded"). For heavy
    tails it is short at any n; n ≥ 200 is a fair rule.
    Raises ``BadArgument`` for no prompt, ``NonFinite`` for NaN or inf in ``values``.
    """
    data = _prompts(values)
    n, flat = len(data), data.reshape(len(data), -1)
    if statistic is None:
        means = [weights @ flat / n for weights in _resamples(n, n_boot, seed)]
        return _interval(np.asarray(data.mean(axis=0)), np.concatenate(means), n, level)
    draws = [
        statistic(np.repeat(data, count, axis=0))
        for weights in _resamples(n, n_boot, seed)
        for count in weights.astype(np.int64)
    ]
    return _interval(np.asarray(statistic(data)), np.stack(draws), n, level)


def paired_difference(
    first: Values, second: Values, n_boot: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Interval of mean(first - second), where entry i of both is the same prompt."""
    one, other = _pair(first, second)
    return bootstrap(one - other, n_boot=n_boot, level=level, seed=seed)


def ratio(first: Values, second: Values, n_boot: int = 1000, level: float = 0.95, seed: int = 0) -> Interval:
    """Interval of mean(first) / mean(second), the prompts of both resampled together.

    The ratio of means, not the mean of ratios: one prompt with an error near zero in the
    denominator would decide the latter.
    Raises ``BadArgument`` if the mean of ``second`` is zero in the data or in a resample.
    """
    one, other = _pair(first, second)
    n = len(one)
    if not other.mean(axis=0).all():
        raise BadArgument("the mean of the second argument is 0, so no ratio exists")
    draws = []
    for weights in _resamples(n, n_boot, seed):
        below = weights @ other.reshape(n, -1)
        if not below.all():
            raise BadArgument(
                "the mean of the second argument is 0 in a resample; too few prompts carry it, "
                "report the difference instead"
            )
        draws.append(weights @ one.reshape(n, -1) / below)
    estimate = np.asarray(one.mean(axis=0) / other.mean(axis=0))
    return _interval(estimate, np.concatenate(draws), n, level)


def permutation_test(
    first: Values,
    second: Values | float = 0.0,
    n_perm: int = 10_000,
    seed: int = 0,
    alternative: Alternative = "two-sided",
) -> Float[np.ndarray, "*rest"]:
    """p-values of mean(first - second) = 0 by flipping the sign of each prompt's difference.

    Exact under the hypothesis that the differences are symmetric about 0 (two conditions that could
    be exchanged within a prompt); "greater" asks whether first > second. With at most ``n_perm``
    sign patterns all are enumerated; otherwise p = (1 + #{as extreme}) / (1 + n_perm), which is
    valid at any ``n_perm`` and never 0. Costs n_perm · n multiplications for each test.
    """
    one_of("alternative", alternative, ("two-sided", "greater", "less"))
    whole_number("n_perm", n_perm, least=1)
    if isinstance(second, (int, float)):
        difference = _prompts(first, least=2) - second
    else:
        one, other = _pair(first, second, least=2)
        difference = one - other
    n, flat = len(difference), difference.reshape(len(difference), -1)
    turn: Callable[[NDArray[np.float64]], NDArray[np.float64]] = {
        "two-sided": np.abs,
        "greater": np.positive,
        "less": np.negative,
    }[alternative]
    observed = turn(flat.sum(axis=0))
    # Sums that are equal in exact arithmetic must count as equal in any order of summation.
    bound = observed - 1e-12 * np.abs(flat).sum(axis=0)
    exact = n < 63 and 2**n <= n_perm
    extreme = np.zeros(flat.shape[1], dtype=np.int64)
    for signs in _all_signs(n) if exact else _random_signs(n, n_perm, seed):
        extreme += (turn(signs @ flat) >= bound).sum(axis=0)
    p = extreme / 2**n if exact else (1 + extreme) / (1 + n_perm)
    return np.asarray(p).reshape(difference.shape[1:])


def holm(p: Float[np.ndarray, "*tests"]) -> Float[np.ndarray, "*tests"]:
    """p-values adjusted for all tests in ``p`` by Holm's step-down rule.

    Rejecting where the result is ≤ α keeps the chance of any false rejection ≤ α, whatever the
    dependence. With p₍₁₎ ≤ … ≤ p₍ₘ₎: adjusted p₍ᵢ₎ = max_{j≤i} min(1, (m - j + 1) p₍ⱼ₎).
    """
    flat = _p_values(p)
    order = np.argsort(flat, kind="stable")
    steps = flat[order] * np.arange(len(flat), 0, -1)
    adjusted = np.empty_like(flat)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted.reshape(np.shape(p))


def benjamini_hochberg(p: Float[np.ndarray, "*tests"]) -> Float[np.ndarray, "*tests"]:
    """p-values adjusted for all tests in ``p`` by the rule of Benjamini and Hochberg (1995).

    Rejecting where the result is ≤ q keeps the expected share of false rejections ≤ q, for
    independent or positively dependent tests. Adjusted p₍ᵢ₎ = min_{j≥i} min(1, m p₍ⱼ₎ / j).
    """
    flat = _p_values(p)
    order = np.argsort(flat, kind="stable")
    steps = flat[order] * len(flat) / np.arange(1, len(flat) + 1)
    adjusted = np.empty_like(flat)
    adjusted[order] = np.minimum(np.minimum.accumulate(steps[::-1])[::-1], 1)
    return adjusted.reshape(np.shape(p))


def valid(n_boot: int, level: float) -> None:
    """Nothing, if intervals can be drawn so, else ``BadArgument``: for what works long before it draws them."""
    whole_number("n_boot", n_boot, least=1)
    if not isinstance(level, float) or not 0 < level < 1:
        raise BadArgument(f"level={told(level)} does not work; give a coverage between 0 and 1")


def without_spread(estimate: Any, n: int, level: float = 0.95) -> Interval:
    """``estimate`` with an empty interval: NaN at both ends."""
    mean = np.asarray(estimate, dtype=np.float64)
    return Interval(mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan), n=n, level=level)


def _prompts(values: Any, least: int = 1) -> NDArray[np.float64]:
    """The values as fp64, if they have at least so many prompts and are all finite."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    try:
        data = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise BadArgument(f"the values are {told(values)}: give a tensor or an array of numbers") from None
    if data.ndim == 0 or len(data) < least:
        what, more = ("no prompts", "one") if least == 1 else ("no spread over prompts", "two")
        raise BadArgument(f"values of shape {data.shape} have {what}; give {more} or more on axis 0")
    bad = data.size - int(np.isfinite(data).sum())
    if bad:
        raise NonFinite(f"{bad} of {data.size} values are NaN or inf; find them before averaging")
    return data


def _pair(first: Values, second: Values, least: int = 1) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both as fp64, if their shapes are equal: broadcasting would pair what does not belong."""
    one, other = _prompts(first, least), _prompts(second, least)
    if one.shape != other.shape:
        raise BadArgument(f"paired values have one shape; these have {one.shape} and {other.shape}")
    return one, other


def _p_values(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """The p-values in one row, if each is in [0, 1]; NaN is not."""
    flat = np.asarray(p, dtype=np.float64).reshape(-1)
    if not np.all((flat >= 0) & (flat <= 1)):
        raise BadArgument("a p-value is outside 0 … 1 or NaN; leave out the tests that did not run")
    return flat


def _resamples(n: int, n_boot: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Blocks of counts (some, n), n_boot rows in all: draws from Multinomial(n, 1/n).

    Counting uniform indices gives the same distribution as numpy's own multinomial, whose n
    binomial draws in a row take several times as long.
    """
    whole_number("n_boot", n_boot, least=1)
    rng = np.random.default_rng(seed)
    rows = max(1, _BLOCK // n)
    for start in range(0, n_boot, rows):
        some = min(rows, n_boot - start)
        index = rng.integers(n, size=(some, n)) + n * np.arange(some)[:, None]
        counts = np.bincount(index.reshape(-1), minlength=some * n).reshape(some, n)
        yield counts.astype(np.float64)


def _random_signs(n: int, n_perm: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Blocks of signs (some, n), n_perm rows in all."""
    rng = np.random.default_rng(seed)
    rows = max(1, _BLOCK // n)
    for start in range(0, n_perm, rows):
        some = min(rows, n_perm - start)
        yield (2 * rng.integers(2, size=(some, n)) - 1).astype(np.float64)


def _all_signs(n: int) -> Iterator[NDArray[np.float64]]:
    """Blocks of all 2**n rows of n signs."""
    rows = max(1, _BLOCK // n)
    for start in range(0, 2**n, rows):
        pattern = np.arange(start, min(start + rows, 2**n))[:, None]
        yield (2 * ((pattern >> np.arange(n)) & 1) - 1).astype(np.float64)


def _interval(estimate: NDArray[np.float64], draws: NDArray[np.float64], n: int, level: float) -> Interval:
    """The central ``level`` of the draws, expanded for small n, in the shape of the estimate."""
    valid(len(draws), level)
    if n == 1:
        return without_spread(estimate, n, level)
    outside = _expanded((1 - level) / 2, n)
    ends = np.quantile(draws, [outside, 1 - outside], axis=0)
    low, high = ends.reshape(2, *estimate.shape)
    return Interval(estimate, np.asarray(low), np.asarray(high), n=n, level=level)


def _expanded(tail: float, n: int) -> float:
    """The share of the draws to leave out on either side: Φ(sqrt(n / (n − 1)) t), t the quantile of Student's law."""
    return float(ndtr((n / (n - 1)) ** 0.5 * stdtrit(n - 1, tail)))
