"""Settings of an algorithm fitted to predictions: least squares from several starts, for many of them at once.

For every start apart, and for every number of examples apart where the settings have one group for each, what is made
small is Σ (ŷ − p)² over prompts; with a scale and a shift, Σ (ŷ − a p − b)² with the a and b that are best for these
settings. The method is Levenberg and Marquardt's in the logarithm of each fitted setting, so that rates stay positive.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.probe_layers.families import Family, Predictions, Settings, Where

COARSE = 32
"""Prompts on which starts are compared, and the best of them fitted, before all that choose have their say."""
FIRST = 12
"""Prompts for a first fit of one start for each number of steps: which number is right shows only once its rate is."""
MOST = 128
"""Prompts of the last fit: with all their examples, a thousand numbers for each setting."""
KEPT = 4
"""Numbers of steps, or starts where none are counted, that are fitted further."""
ROUNDS = (4, 12, 4)
"""Most rounds of the first fit, of the fit at COARSE prompts, and at all."""
ENOUGH = 1e-9
"""A fit ends where a round takes less than this share off every cost."""
STRIDE = 1e-5
"""Of the finite difference by the logarithm of a setting; a round's error is then 1e-5 of its step."""
LONGEST = 2.0
"""Longest step of a logarithm in one round."""

Own = Float[Tensor, "one_or_start batch k symbol"]
"""What is to be explained by each start, or by all of them."""
Blocks = Float[Tensor, "block prompt k symbol"]
Cost = Float[Tensor, "start group"]


def fewer(where: Where, most: int = COARSE) -> Where:
    """The first ``most`` prompts of ``where``."""
    return Where(slice(where.prompts.start, min(where.prompts.stop, where.prompts.start + most)), where.ks)


def fitted(
    family: Family,
    own: Blocks,
    where: Where,
    groups: int,
    affine: bool,
    begun: Predictions | None = None,
    also: Float[Tensor, "block group setting"] | None = None,
) -> Float[Tensor, "block group setting"]:
    """The settings of ``family`` that fit each block's ``own`` best at the prompts and examples of ``where``.

    ``groups``: 1, or the number of examples k, each of which is then fitted alone. ``begun``: what the starts predict
    at ``fewer(where)``, where it is at hand. ``also``: one more start for each block and group.
    """
    some, blocks = fewer(where), len(own)
    begun = family.predict(family.starts[:, None], some) if begun is None else begun
    first = [_by_count(_cost(_left(one[None, : begun.shape[1]], begun, groups, affine), groups), family) for one in own]
    settings = family.starts[torch.stack(first, dim=1)]  # (start, block, group, setting)

    def fit(settings: Tensor, at: Where, rounds: int) -> tuple[Tensor, Tensor]:
        rows = own[None, :, : at.prompts.stop - at.prompts.start].expand(len(settings), -1, -1, -1, -1).flatten(0, 1)
        found, cost = _fit(family, settings.flatten(0, 1), rows, at, affine, rounds)
        return found.unflatten(0, (-1, blocks)), cost.unflatten(0, (-1, blocks))

    def best(settings: Tensor, cost: Tensor, kept: int) -> Tensor:
        which = cost.topk(min(kept, len(cost)), dim=0, largest=False).indices
        return settings.gather(0, which[..., None].expand(-1, -1, -1, settings.shape[-1]))

    if len(settings) > KEPT:
        settings = best(*fit(settings, fewer(where, FIRST), ROUNDS[0]), KEPT)
    if also is not None and family.fitted:
        settings = torch.cat([settings, also[None]])
    settings, cost = fit(settings, some, ROUNDS[1])
    if family.fitted:
        settings = best(settings, cost, 1)
    settings, cost = fit(settings, fewer(where, MOST), ROUNDS[2])
    return best(settings, cost, 1)[0]


def scale_and_shift(own: Own, predicted: Predictions, groups: int) -> tuple[Cost, Cost]:
    """a and b of ŷ ≈ a p + b, (start, group) each; a = 0 where p is the same throughout."""
    centre, middle = _mean(predicted, groups), _mean(own, groups)
    offset = predicted - centre
    spread = _cost(offset, groups)
    scale = _summed(offset * (own - middle), groups) / spread.masked_fill(spread == 0, torch.inf)
    return scale, middle[:, 0, :, 0].expand_as(scale) - scale * centre[:, 0, :, 0]


def _left(own: Own, predicted: Predictions, groups: int, affine: bool) -> Predictions:
    """What the predictions leave of ``own``."""
    if not affine:
        return own - predicted
    scale, shift = (part[:, None, :, None] for part in scale_and_shift(own, predicted, groups))
    return own - scale * predicted - shift


def _fit(
    family: Family, settings: Settings, own: Own, where: Where, affine: bool, rounds: int
) -> tuple[Settings, Cost]:
    """The settings after at most so many rounds from these, and what they cost."""
    groups, columns = settings.shape[1], list(family.fitted)

    def left(at: Settings) -> Predictions:
        return _left(own, family.predict(at, where), groups, affine)

    def moved(at: Settings, by: Tensor) -> Settings:
        new = at.clone()
        new[..., columns] = (at[..., columns].log() + by).exp().clamp(family.low, family.high)
        return new

    now = left(settings)
    cost = _cost(now, groups)
    if not columns:
        return settings, cost
    damping = torch.full_like(cost, 1e-3)
    eye = torch.eye(len(columns), dtype=cost.dtype, device=cost.device)
    for _ in range(rounds):
        # Backwards, so that a setting at its upper bound has a slope too; at its lower one it has none, and stays.
        slopes = [((now - left(moved(settings, -STRIDE * row))) / STRIDE).nan_to_num(0.0, 0.0, 0.0) for row in eye]
        square = torch.stack([torch.stack([_summed(a * b, groups) for b in slopes], -1) for a in slopes], -1)
        down = torch.stack([_summed(a * now, groups) for a in slopes], -1)
        size = square.diagonal(dim1=-2, dim2=-1).clamp(min=1e-200)
        damped = square + torch.diag_embed(damping[..., None] * size + 1e-200)
        by = -torch.linalg.solve(damped, down[..., None])[..., 0]
        new = moved(settings, by.nan_to_num(0.0).clamp(-LONGEST, LONGEST))
        then = left(new)
        found = _cost(then, groups)
        better = found < cost
        settings = torch.where(better[..., None], new, settings)
        now = torch.where(better[:, None, :, None], then, now)
        damping = torch.where(better, damping / 10, damping * 10).clamp(1e-12, 1e12)
        gained = torch.where(better & cost.isfinite(), (cost - found) / cost, 0.0)
        cost = torch.where(better, found, cost)
        if float(gained.max()) < ENOUGH and bool((better | (damping > 1e3)).all()):
            break
    return settings, cost


def _by_count(cost: Cost, family: Family) -> Tensor:
    """The indices of the best start for each number of steps, or of the KEPT best where none are counted."""
    if family.counts is None:
        return cost.topk(min(KEPT, len(cost)), dim=0, largest=False).indices
    counts = family.starts[:, family.counts]
    each = [(counts == count).nonzero()[:, 0] for count in counts.unique()]
    return torch.stack([rows[cost[rows].argmin(0)] for rows in each])


def _summed(values: Predictions, groups: int) -> Cost:
    """Σ over prompts and symbols, and over the numbers of examples where they share their settings."""
    each = values.sum((1, 3))
    return each if groups > 1 else each.sum(1, keepdim=True)


def _cost(left: Predictions, groups: int) -> Cost:
    each = left.square().sum((1, 3))
    return (each if groups > 1 else each.sum(1, keepdim=True)).nan_to_num(torch.inf, torch.inf)


def _mean(values: Predictions, groups: int) -> Float[Tensor, "start 1 k_or_1 1"]:
    return values.mean((1, 3) if groups > 1 else (1, 2, 3), keepdim=True)
