"""The lens on prompts of integers, where a prediction is a probability of each symbol.

After block l a language model would say log p_l = log softmax(z_l), z_l the residual stream at a position through the
model's own final norm and head. In place of the scale and shift of :mod:`interp.layers.lens`, log softmax(a_l z_l +
b_l) is fitted, one scale a and one number b for each symbol, on other prompts and for all prompts together: the labels
of one prompt are too few for a fit of its own. A feature that knows nothing then gets the frequencies of the symbols.

Every position is a query with the context before it, so nothing is forked: one forward reads all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from hooks.brief import brief
from interp import estimators
from interp.estimators.chains import forgetting
from interp.layers import lens
from interp.layers.matching import Candidates
from interp.tasks.base import Batch, Task, guess

Logits = Float[Tensor, "block batch n_pairs vocabulary"]
GROUPS = 8
"""Groups of prompts, each with a fit of its own, that give the scale its interval."""
BETAS = (0.1, 0.3, 1.0, 3.0)
KEPT = (0.99, 0.97, 0.9, 0.8)
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
    order in which what was counted fades by a factor a symbol. ``task`` is a Markov chain's.
    """
    options = {"n_symbols": task.config["n_symbols"], "switch": task.config["switch"]}
    order = task.config["order"]
    rows = [("zero", "", uniform(task, batch))]
    rows += [("frequencies", f"β = {beta:g}", forgetting(0, beta, **options)(batch)) for beta in BETAS]
    for depth in range(1, order + 2):
        family = f"add-β, order {depth}"
        made = ((beta, estimators.build("add_beta", order=depth, beta=beta, **options)(batch)) for beta in BETAS)
        rows += [(family, f"β = {beta:g}", one) for beta, one in made]
    for keep in KEPT:
        made = ((beta, forgetting(order, beta, keep, **options)(batch)) for beta in BETAS)
        rows += [("fading add-β", f"keeps {keep:g}, β = {beta:g}", one) for beta, one in made]
    families, settings, found = zip(*rows, strict=True)
    nothing = uniform(task, batch).double().exp()
    prediction = torch.stack([one.double().exp() - nothing for one in found])
    return Candidates(families, settings, (-1,) * len(rows), prediction)


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
