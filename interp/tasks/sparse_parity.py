"""In-context sparse parity: y is the product of a few hidden coordinates of x ∈ {±1}^d.

    d = 4, coordinates 1 and 3 hidden:   x = (+ - + -) → y = (-)(-) = +        x = (+ + - -) → y = -

Source: arXiv 2402.04248 §3 and its released sampler. That one draws the coordinates once for a batch, so that its
prompts share their task; here each prompt has its own.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooks.errors import BadArgument
from interp import estimators, seeds
from interp.arguments import whole_number
from interp.tasks.base import Batch, Model, same_shape
from interp.tasks.layout import TOKENS, Layout

MOST_SUBSETS = 20_000


class SparseParity:
    """Prompts x_0, y_0, x_1, y_1, … x_{n-1}: 2 n_pairs - 1 tokens of width d, a label written (y, 0, … 0).

    d        number of coordinates of x, each ±1 with probability ½
    k        number of hidden ones; which ones is drawn for each prompt, all subsets as likely
    n_pairs  140 unless given, as in the source

    The prediction F of y is read at x; its sign is the class. The loss is the hinge max(0, 1 - y F), the error 0/1:
    as in ``outliers``. The last label is in no token.

    ``truth``: ``hidden`` (batch, d), which coordinates the label is the product of.
    """

    name = "sparse_parity"
    d_out = 1
    scale = 1.0
    metric = "share of wrong labels"
    kinds = TOKENS["interleaved"]
    query_only = False

    def __init__(self, d: int = 10, k: int = 2, n_pairs: int = 140) -> None:
        self.d = self.d_token = whole_number("d", d, least=2)
        self.k = whole_number("k", k, 1)
        if self.k >= self.d:
            raise BadArgument(f"k={k} of d={d} coordinates leaves nothing to find; give k of at most {self.d - 1}")
        self.n_pairs = whole_number("n_pairs", n_pairs, least=1)
        self.layout = Layout("interleaved", self.d)

    @property
    def config(self) -> dict[str, Any]:
        """The options: ``SparseParity(**task.config)`` is an equal task."""
        return {"d": self.d, "k": self.k, "n_pairs": self.n_pairs}

    @property
    def report_ks(self) -> tuple[int, ...]:
        """k = d, 2d and 4d examples, and the last, as far as the prompts go."""
        return tuple(sorted({k for k in (self.d, 2 * self.d, 4 * self.d) if k < self.n_pairs} | {self.n_pairs - 1}))

    def sample(
        self, n: int, generator: torch.Generator, *, d_active: int | None = None, n_pairs: int | None = None
    ) -> Batch:
        """``n`` prompts of ``n_pairs`` pairs; the coordinates of x from ``d_active`` on are zero.

        The hidden coordinates are among the active ones; there are fewer than k of them if fewer are active.
        Raises ``BadArgument`` if d_active is outside 1 … d, or if n or n_pairs is below 1.
        """
        whole_number("n", n, least=1)
        d_active = whole_number("d_active", self.d if d_active is None else d_active, 1, self.d)
        length = whole_number("n_pairs", self.n_pairs if n_pairs is None else n_pairs, 1)
        x = seeds.signs((n, length, self.d), generator)
        x[..., d_active:] = 0
        return self._prompts(x, self._subsets(n, d_active, generator))

    def corrupt(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The same x with another subset for every prompt, so that each label is kept or turned.

        Raises ``BadArgument`` if there is no other, because no more than k coordinates are active.
        """
        d_active = int(batch.x[0, 0].abs().sum())
        if d_active <= self.k:
            raise BadArgument(
                f"only {d_active} coordinates are active and k={self.k} are hidden, so there is no other subset; "
                f"sample with d_active of at least {self.k + 1}"
            )
        before = batch.truth["hidden"].cpu()
        hidden = before.clone()
        while len(same := (hidden == before).all(dim=1).nonzero()[:, 0]):
            hidden[same] = self._subsets(len(same), d_active, generator)
        return self._prompts(batch.x, hidden.to(batch.x.device))

    def predict(self, model: Model, batch: Batch) -> Float[Tensor, "batch n_pairs"]:
        """The margin F of every example, out of one forward."""
        return self.layout.predict(model, batch)

    def training_loss(self, model: Model, batch: Batch, generator: torch.Generator) -> Float[Tensor, "batch n_pairs"]:
        """The loss of every example; ``generator`` is not used."""
        return self.loss(self.predict(model, batch), batch)

    def loss(self, prediction: Float[Tensor, "batch n_pairs"], batch: Batch) -> Float[Tensor, "batch n_pairs"]:
        """The hinge max(0, 1 - y F); 1 for F = 0."""
        same_shape(prediction, batch)
        return (1 - batch.targets * prediction).clamp(min=0)

    def error(self, prediction: Float[Tensor, "batch n_pairs"], batch: Batch) -> Float[Tensor, "batch n_pairs"]:
        """1 where the sign of F is wrong, 0 where it is right, ½ where F = 0."""
        same_shape(prediction, batch)
        return (1 - torch.sign(batch.targets * prediction)) / 2

    def variables(self, batch: Batch) -> dict[str, Tensor]:
        """``hidden`` (batch, d): 1 for the coordinates that count; ``label`` (batch, n_pairs)."""
        return {"hidden": batch.truth["hidden"].to(batch.y), "label": batch.y}

    def baselines(self, batch: Batch) -> dict[str, Float[Tensor, "batch n_pairs"]]:
        """0/1 errors of the rivals; a tie counts ½.

        bayes   majority of the subsets that fit all the k examples before: no predictor is better. It counts them one
                by one, and is left out where there are more than 20 000.
        ols     the sign of least squares: a parity of two or more coordinates has no linear part
        knn     the sign of the mean label of the 3 nearest earlier inputs
        chance  ½
        """
        margins = {name: estimators.build(name)(batch) for name in ("ols", "knn")}
        if math.comb(self.d, self.k) <= MOST_SUBSETS:
            margins = {"bayes": self._vote(batch), **margins}
        errors = {name: self.error(margin, batch) for name, margin in margins.items()}
        return {**errors, "chance": torch.full_like(batch.targets, 0.5)}

    def _vote(self, batch: Batch) -> Float[Tensor, "batch n_pairs"]:
        """Sum of the labels that the subsets would give which have been right so far."""
        active = int(batch.x[0, 0].abs().sum())
        subsets = torch.tensor(list(itertools.combinations(range(active), min(self.k, active))), device=batch.x.device)
        subsets = subsets.to(batch.x.device)
        alive = torch.ones(len(batch), len(subsets), dtype=torch.bool, device=batch.x.device)
        votes = []
        for k in range(batch.y.shape[1]):
            label = batch.x[:, k][:, subsets].prod(dim=-1)
            votes.append((label * alive).sum(dim=-1))
            alive &= label == batch.y[:, k, None]
        return torch.stack(votes, dim=1)

    def _subsets(self, n: int, d_active: int, generator: torch.Generator) -> Bool[Tensor, "batch d"]:
        """A subset of size min(k, d_active) of the active coordinates for each prompt."""
        rank = seeds.uniform((n, d_active), generator).argsort(dim=1)
        chosen = torch.zeros(n, self.d, dtype=torch.bool, device=rank.device)
        return chosen.scatter(1, rank[:, : self.k], True)

    def _prompts(self, x: Float[Tensor, "batch n_pairs d"], hidden: Bool[Tensor, "batch d"]) -> Batch:
        """The batch of these inputs with the products of these coordinates."""
        y = torch.where(hidden[:, None], x, 1.0).prod(dim=-1)
        return self.layout.batch(x, y, targets=y, truth={"hidden": hidden})
