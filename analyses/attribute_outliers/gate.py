"""The selection gate G of a recurrence: how much of a token's write is still there when the query reads.

    G_s[c, n] = write_s[c] · ∏_{s<r≤query} decay_r[c, n]

is one number for each token in the model of arXiv 2510.00399, whose decay is one for all. Elsewhere each channel and
state has its own, and G_s is their mean, weighted by what each carries from the clean examples to the prediction apart
from the gate: ω[c, n] = mean |g gate C B x|, the same for every token, so that tokens differ in G only by their gates.

    clock     log G_s = a + b · (clean examples between s and the query) + o · (outliers between them) + δ · [s outlier]

over the context examples s. In the paper's model, gate and all, this line is exact; its theorem has b = −log 2 (a clean
example halves what was there), o = 0 (an outlier does not advance the clock) and δ far below 0 (it is not written).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from analyses.attribute_outliers.factors import CHUNK, Factors, factors
from hooks.brief import brief
from interp.metric import Metric
from interp.stats import Interval, bootstrap

Examples = Bool[Tensor, "batch example"]


@dataclass(frozen=True)
class Clock:
    """The line of log G (natural logarithm) with intervals over prompts; None for what these prompts do not show."""

    clean: Interval | None
    """b, for each clean example that stands between."""
    outlier: Interval | None
    """o, for each outlier that stands between."""
    suppressed: Interval | None
    """δ, of an outlier against a clean example at the same place."""

    __repr__ = brief


def selection_gate(
    model: Any, x: Float[Tensor, "batch pos d_token"], layer: int, scalar: Metric, weighed: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos"]:
    """G of every token in one layer; ``weighed`` picks the tokens whose contributions give ω.

    Raises :class:`hooks.errors.BadArgument` where the layer lacks a site, naming it.
    """
    weight: Tensor | float = 0.0
    left = []
    for start in range(0, len(x), CHUNK):
        part = slice(start, start + CHUNK)
        one = factors(model, x[part], layer, scalar)
        weight = weight + _weight(one, weighed[part])
        left.append((_kept(one) * one.write[..., None]).float())
    assert isinstance(weight, Tensor)  # x has at least one prompt
    shares = weight / weight.sum().clamp(min=1e-300)
    return torch.cat([(part * shares).sum((-2, -1)) for part in left])


def by_rank(values: Float[Tensor, "batch example"], chosen: Examples) -> Float[np.ndarray, "batch rank"]:
    """``values`` of the ``chosen`` examples from the closest to the query on; NaN beyond a prompt's last."""
    turned, picked = values.flip(1), chosen.flip(1)
    found = torch.full_like(turned, torch.nan)
    rank = picked.cumsum(1) - 1
    rows = torch.arange(len(turned), device=turned.device)[:, None].expand_as(rank)
    found[rows[picked], rank[picked]] = turned[picked]
    return found[:, : int(picked.sum(1).max())].cpu().double().numpy()


def clock(
    gate: Float[Tensor, "batch example"], clean: Examples, outlier: Examples, n_boot: int = 1000, seed: int = 0
) -> Clock:
    """The line by least squares over all ``clean`` and ``outlier`` examples, bootstrap over prompts.

    A term that does not vary among them is left out and comes back as None.
    """
    context = clean | outlier
    terms = [_after(clean.double()), _after(outlier.double()), outlier.double()]
    use = [0, *(i + 1 for i, term in enumerate(terms) if _varies(term, context))]
    log = gate.double().clamp(min=1e-300).log()
    rows = torch.stack([torch.ones_like(log), *terms, log], dim=-1) * context[..., None]
    moments = (rows.mT @ rows).flatten(1).cpu().numpy()  # all that least squares needs of a prompt
    if len(use) == 1:
        return Clock(None, None, None)

    def slopes(some: np.ndarray) -> np.ndarray:
        total = some.mean(axis=0).reshape(5, 5)
        solution: np.ndarray = np.linalg.pinv(total[np.ix_(use, use)]) @ total[use, 4]
        return solution[1:]

    found = bootstrap(moments, n_boot=n_boot, seed=seed, statistic=slopes)
    slopes_of = zip(use[1:], np.stack([found.mean, found.low, found.high], axis=1), strict=True)
    ends = {term: Interval(one[0, ...], one[1, ...], one[2, ...], found.n) for term, one in slopes_of}
    return Clock(ends.get(1), ends.get(2), ends.get(3))


def _kept(one: Factors) -> Tensor:
    """∏_{s<r≤query} decay_r for every s."""
    found = [torch.ones_like(one.decay[:, -1])]
    for t in range(one.decay.shape[1] - 1, 0, -1):
        found.append(found[-1] * one.decay[:, t])
    return torch.stack(found[::-1], dim=1)


def _weight(one: Factors, weighed: Bool[Tensor, "batch pos"]) -> Float[Tensor, "channel n"]:
    read = ((one.gradient * one.gate)[:, -1:, :, None] * one.query[:, -1:]).abs()
    carried = (one.key.abs() * one.value.abs()[..., None] * weighed[..., None, None]).sum(1, keepdim=True)
    return (read * carried).sum((0, 1))


def _after(values: Float[Tensor, "batch example"]) -> Float[Tensor, "batch example"]:
    """Σ over later examples, the last example (the query) never counted."""
    context = torch.cat([values[:, :-1], torch.zeros_like(values[:, :1])], dim=1)
    return context.flip(1).cumsum(1).flip(1) - context


def _varies(values: Float[Tensor, "batch example"], chosen: Examples) -> bool:
    picked = values[chosen]
    return len(picked) > 1 and bool(picked.max() > picked.min())
