"""The lens on prompts of integers, where a prediction is a probability of each symbol.

After block l a language model would say log p_l = log softmax(z_l), z_l the residual stream at a position through the
model's own final norm and head. In place of the scale and shift of :mod:`interp.lens`, log softmax(a_l z_l +
b_l) is fitted, one scale a and one number b for each symbol, on other prompts and for all prompts together: the labels
of one prompt are too few for a fit of its own. A feature that knows nothing then gets the frequencies of the symbols.

Every position is a query with the context before it, so nothing is forked: one forward reads all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from analyses.probe_layers.families import Candidates, Family, Predictions, Settings, Where, around, known, rows
from hooks.brief import brief
from interp import lens
from interp.estimators.chains import contexts
from interp.tasks.base import Batch, Task, guess

Logits = Float[Tensor, "block batch n_pairs vocabulary"]
GROUPS = 8
"""Groups of prompts, each with a fit of its own, that give the scale its interval."""
DECAYS = (0.01, 0.05, 0.25)
"""Starts of what a count loses a symbol, as −log of what it keeps."""
DAMPING = 1e-5
"""Weight of (a − 1)² and b² in the fit, against the mean of −log p: a symbol that never comes has no finite b."""


def logits(model: Any, batch: Batch) -> Logits:
    """What the head makes of the residual at every example, after 0, 1, … L blocks."""
    return lens.through_head(model, lens.along(model, batch))


@dataclass(frozen=True)
class Calibration:
    """log p = log softmax(a z + b) for each block."""

    scale: Float[Tensor, " block"]
    shift: Float[Tensor, "block vocabulary"]

    __repr__ = brief

    def __call__(self, given: Logits) -> Logits:
        """log p in fp64."""
        scaled = self.scale[:, None, None, None] * given.double() + self.shift[:, None, None]
        return scaled.log_softmax(dim=-1)


def calibrate(given: Logits, targets: Int[Tensor, "batch n_pairs"]) -> Calibration:
    """The scale and the shifts that make the targets most probable, by block; in fp64."""
    found = [_fit(block.flatten(0, 1).double(), targets.flatten()) for block in given]
    return Calibration(torch.stack([one[0] for one in found]), torch.stack([one[1:] for one in found]))


def scales(given: Logits, targets: Int[Tensor, "batch n_pairs"]) -> Float[Tensor, "block group"]:
    """The scale of each of GROUPS groups of prompts, fitted apart."""
    groups = min(GROUPS, len(targets))
    parts = [calibrate(given[:, first::groups], targets[first::groups]) for first in range(groups)]
    return torch.stack([part.scale for part in parts], dim=1)


def sums(batch: Batch, k: int, vocabulary: int) -> Float[Tensor, "batch feature"]:
    """How often each symbol has come, and which one is read at example ``k``: sums that know no order."""
    at = batch.read.expand(len(batch), -1)[:, k]
    seen = one_hot(batch.tokens, vocabulary).float()
    upto = torch.arange(batch.tokens.shape[1], device=at.device) <= at[:, None]
    return torch.cat([(seen * upto[..., None]).sum(1), seen[torch.arange(len(batch), device=at.device), at]], dim=1)


def candidates(task: Task, batch: Batch) -> Candidates:
    """Estimators of Markov chains on ``batch``: what each makes more probable than knowing nothing does, p − p_0.

    Frequencies of the symbols alone, add-β for chains of orders up to one above the task's, and add-β for the task's
    order in which what was counted fades by a factor a symbol; β and the factor are fitted. A scale is a power of the
    probabilities, as a factor of the logits is. ``task`` is a Markov chain's.
    """
    symbols, switch, order = task.config["n_symbols"], task.config["switch"] or 0.0, task.config["order"]
    nothing = uniform(task, batch).double().exp().cpu()
    counted = {depth: _Counted.of(batch.y, symbols, depth) for depth in range(order + 2)}
    names = {0: "frequencies", **{depth: f"add-β, order {depth}" for depth in range(1, order + 2)}}

    def family(name: str, depth: int, fades: bool, *, power: bool) -> Family:
        def predict(settings: Settings, where: Where) -> Predictions:
            counts = counted[depth].before(where, settings[..., 1] if fades else None) + settings[:, None, :, :1]
            p = (1 - switch) * counts / counts.sum(-1, keepdim=True)
            p = torch.cat([p, torch.full_like(p[..., :1], switch)], dim=-1)
            if power:
                p = p ** settings[:, None, :, -1:]
                p = p / p.sum(-1, keepdim=True)
            return p - nothing[where.prompts][:, where.ks]

        columns = [(0.1, 0.5, 2.0)] + ([DECAYS] if fades else []) + ([(0.5, 1.0, 2.0)] if power else [])
        words = _fading if fades else _added
        fitted = tuple(range(len(columns)))
        return Family(name, rows(*columns), fitted, None, 1 + fades, words, predict, *around(*columns))

    zero = known("zero", [torch.zeros_like(nothing)], [""], free=0)
    asked = [(name, depth, False) for depth, name in names.items()] + [("fading add-β", order, True)]
    own, scaled = ([family(*one, power=power) for one in asked] for power in (False, True))
    return Candidates((zero, *own), tuple(scaled))


@dataclass(frozen=True)
class _Counted:
    """Which earlier examples count at each example, and what they were.

    follows   (prompt, example k, example j): whether j comes before k, in the same chain, after the same context
    symbol    (prompt, example j, symbol)
    total     (prompt, example k, symbol): how often each has come
    """

    follows: Bool[Tensor, "batch k j"]
    symbol: Float[Tensor, "batch j symbol"]
    total: Float[Tensor, "batch k symbol"]

    @staticmethod
    def of(y: Int[Tensor, "batch n_pairs"], n_symbols: int, order: int) -> _Counted:
        y = y.cpu()
        context, whole = contexts(y, n_symbols, order)
        ends = y == n_symbols
        chain = ends.cumsum(1) - ends.long()
        follows = (chain[:, :, None] == chain[:, None]) & (context[:, :, None] == context[:, None])
        follows &= whole[:, :, None] & (whole & ~ends)[:, None]
        follows = follows.tril(-1)
        symbol = one_hot(y, n_symbols + 1)[..., :n_symbols].double()
        total = torch.stack([some.double() @ each for some, each in zip(follows, symbol, strict=True)])
        return _Counted(follows, symbol, total)

    def before(self, where: Where, decay: Float[Tensor, "start group"] | None) -> Predictions:
        """How often each symbol has come at the examples of ``where``; j symbols ago counts e^(−decay (j − 1))."""
        if decay is None:
            return self.total[where.prompts][None, :, where.ks]
        ages = (where.ks[:, None] - 1 - torch.arange(self.symbol.shape[1], device=self.symbol.device)).clamp(min=0)
        follows, symbol = self.follows[where.prompts][:, where.ks].double(), self.symbol[where.prompts]
        weight = torch.exp(-decay[..., None] * ages)
        # One start at a time: together they hold a matrix of examples for each prompt and start.
        return torch.stack([(follows * one) @ symbol for one in weight])


def _added(row: Sequence[float]) -> str:
    return f"β = {row[0]:.3g}"


def _fading(row: Sequence[float]) -> str:
    return f"keeps {math.exp(-row[1]):.3g}, β = {row[0]:.3g}"


def uniform(task: Task, batch: Batch) -> Float[Tensor, "batch n_pairs vocabulary"]:
    """log p of one who knows nothing of the prompt: equal for every symbol; a switch of chains at its known rate."""
    switch = task.config.get("switch")
    if switch is None:
        return guess(task, batch)
    symbols = task.config["n_symbols"]
    p = torch.full((*batch.targets.shape, symbols + 1), (1 - switch) / symbols, dtype=torch.float32, device="cpu")
    p[..., symbols] = switch
    return p.log()


def _fit(z: Float[Tensor, "row symbol"], goal: Int[Tensor, " row"]) -> Float[Tensor, " parameter"]:
    """(a, b_0, … b_{S-1}) by a quasi-Newton method: convex, and no matrix as large as the square of the vocabulary."""
    start = z.new_zeros(1 + z.shape[1])
    start[0] = 1.0
    w = start.clone().requires_grad_()
    search = torch.optim.LBFGS(
        [w], max_iter=500, tolerance_grad=1e-6, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def cost() -> Tensor:
        damped = cross_entropy(w[0] * z + w[1:], goal) + DAMPING * (w - start).square().sum()
        (w.grad,) = torch.autograd.grad(damped, [w])
        return damped.detach()

    with torch.enable_grad():
        search.step(cost)
    return w.detach()
