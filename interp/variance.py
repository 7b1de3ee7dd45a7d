"""Nested shares of a signal's variance: layer ⊃ channel ⊃ token kind ⊃ position ⊃ content.

For v[l, b, t, c] (layer, prompt, position, channel) each level holds what knowing it adds to the explained variance:
the mean per layer, then per channel in the layer, then per kind of token, then per position; content is what differs
between prompts at the same place. By the law of total variance the shares sum to 1. The first two do not change during
a prompt (the *static* part); shares of the rest alone are given beside them.

A mean over n prompts still holds a part of the content's variance: its own sampling variance, which is estimated from
the prompts' spread at every level and moved back to content. A level without variance of its own therefore comes out
near 0 and may fall slightly below it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooks.brief import brief
from hooks.errors import BadArgument

LEVELS = ("layer", "channel", "kind", "position", "content")
STATIC = ("layer", "channel")


@dataclass(frozen=True)
class Shares:
    """Shares by level (LEVELS), with bootstrap ends over prompts; ``moving`` are those of kind, position and content
    alone.
    """

    share: Float[np.ndarray, "5"]
    low: Float[np.ndarray, "5"]
    high: Float[np.ndarray, "5"]
    moving: Float[np.ndarray, "3"]
    moving_low: Float[np.ndarray, "3"]
    moving_high: Float[np.ndarray, "3"]
    variance: float
    n: int

    __repr__ = brief


def content_variance(values: Float[Tensor, "layer batch pos channel"]) -> Float[Tensor, "layer channel"]:
    """Variance between prompts at the same position, averaged over positions, for each layer and channel."""
    return values.var(dim=1, unbiased=False).mean(dim=1)


def shares(
    values: Float[Tensor, "layer batch pos channel"], kinds: Int[Tensor, "pos"], n_boot: int = 200, seed: int = 0
) -> Shares:
    """The nested shares of the variance of ``values``, with 95 % bootstrap intervals over prompts.

    Repeated prompts in a resample bring the 1/n of content back in, so the resamples are centred on the estimate.
    Raises :class:`BadArgument` for fewer than two prompts or a signal that never varies.
    """
    layers, n, length, channels = values.shape
    if n < 2:
        raise BadArgument(f"variance shares need at least 2 prompts, there is {n}")
    rows = values.double().permute(1, 0, 2, 3).reshape(n, -1)
    square = rows.square().mean(dim=1)
    groups = [(kinds == kind).nonzero().reshape(-1) for kind in kinds.unique()]
    shape = (layers, length, channels)

    rng = np.random.default_rng(seed)
    weights = torch.from_numpy(rng.multinomial(n, np.full(n, 1 / n), size=n_boot) / n)
    whole = rows.new_full((1, n), 1 / n)
    estimate = _levels((whole @ rows).reshape(1, *shape), whole @ square, groups)
    noise = _sampling_variance(rows.reshape(n, *shape), groups)
    estimate[0, :4] -= noise.diff()
    estimate[0, 4] += noise[4] - noise[0]
    draws = _levels((weights @ rows).reshape(n_boot, *shape), weights @ square, groups)
    total = estimate.sum(1)
    if float(total) <= 0:
        raise BadArgument("the signal does not vary at all: there is nothing to share out")
    share, (low, high) = _centred(estimate / total[:, None], draws / draws.sum(1, keepdim=True))
    moving, (moving_low, moving_high) = _centred(_of_sum(estimate[:, 2:]), _of_sum(draws[:, 2:]))
    return Shares(share, low, high, moving, moving_low, moving_high, float(total), n)


def _centred(estimate: Float[Tensor, "1 level"], draws: Float[Tensor, "draw level"]) -> tuple[np.ndarray, np.ndarray]:
    """The estimate, and the 2.5 % and 97.5 % points of the draws shifted so that their mean is the estimate."""
    ends = estimate.new_tensor([0.025, 0.975])
    spread = draws - draws.mean(0) + estimate
    return estimate[0].numpy(), spread.quantile(ends, dim=0).numpy()


def _level_means(mean: Float[Tensor, "draw layer pos channel"], groups: list[Tensor]) -> list[Tensor]:
    """The mean overall, by layer, by channel, by kind of token, and by position."""
    by_kind = torch.empty_like(mean)
    for group in groups:
        by_kind[:, :, group] = mean[:, :, group].mean(dim=2, keepdim=True)
    return [mean.mean((1, 2, 3), True), mean.mean((2, 3), True), mean.mean(2, True), by_kind, mean]


def _levels(
    mean: Float[Tensor, "draw layer pos channel"], square: Float[Tensor, "draw"], groups: list[Tensor]
) -> Tensor:
    """Variance added by each level (draw, 5) from the mean over prompts at each place and the mean square overall."""
    steps = _level_means(mean, groups)
    added = [(b - a).square().mean((1, 2, 3)) for a, b in pairwise(steps)]
    return torch.stack([*added, square - mean.square().mean((1, 2, 3))], dim=1)


def _sampling_variance(rows: Float[Tensor, "prompt layer pos channel"], groups: list[Tensor]) -> Float[Tensor, "5"]:
    """Variance of each level's means over prompts, averaged over the level's cells."""
    return torch.stack([level.var(dim=0).mean() / len(rows) for level in _level_means(rows, groups)])


def _of_sum(parts: Tensor) -> Tensor:
    total = parts.sum(1, keepdim=True)
    return torch.where(total > 0, parts / total.clamp(min=1e-300), torch.zeros_like(parts))
