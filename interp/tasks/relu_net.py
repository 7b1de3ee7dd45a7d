"""Two-layer ReLU networks in context, another for each prompt. One prompt, d = 2, hidden = 2:

    W1       rows (1.0, 0.0), (0.0, 1.0);  W2 = (2.0, -1.0)                       drawn, never shown
    y        sqrt(2/2) · (2 relu(x[0]) - relu(x[1]))
    tokens   (2.0, 1.0)  (3.0, 0)  (1.0, -1.0)  (2.0, 0)  (-2.0, 0.5)
    kind      x_0         y_0       x_1          y_1       x_2                    the model should say y_2 = -0.5

Source: arXiv 2208.01066 §4 and 2402.03170 §3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from interp import seeds
from interp.arguments import whole_number
from interp.tasks.base import Batch
from interp.tasks.layout import Layout
from interp.tasks.regression import Regression, classical, pairs_or


@dataclass(frozen=True)
class ReluNet:
    """f(x) = sqrt(2/H) relu(x W1) W2, entries of both ~ N(0, 1). ``truth``: W1 (batch, d, H), W2 (batch, H)."""

    d: int
    hidden: int

    @property
    def scale(self) -> float:
        """E[f(x)²] = (2/H) Σ_h E[relu(w_h·x)²] = E|x|² = d, as w_h·x has mean 0 and variance |x|² given x."""
        return float(self.d)

    def draw(self, n: int, active: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The weights of a network for each prompt, of all d coordinates: where x is zero they have no effect."""
        return {
            "W1": seeds.normal((n, self.d, self.hidden), generator),
            "W2": seeds.normal((n, self.hidden), generator),
        }

    def __call__(
        self, x: Float[Tensor, "batch n_pairs d"], truth: Mapping[str, Tensor]
    ) -> Float[Tensor, "batch n_pairs"]:
        """The network's output."""
        hidden = einsum(x, truth["W1"], "b k i, b i h -> b k h").relu()
        return (2 / self.hidden) ** 0.5 * einsum(hidden, truth["W2"], "b k h, b h -> b k")

    def variables(self, batch: Batch) -> dict[str, Tensor]:
        """linear (batch, d): the best linear approximation of f for x ~ N(0, I), E[y x] = W1 W2 / sqrt(2 H)."""
        product = einsum(batch.truth["W1"], batch.truth["W2"], "b i h, b h -> b i")
        return {"linear": product / (2 * self.hidden) ** 0.5}

    def rivals(self, batch: Batch) -> dict[str, Float[Tensor, "batch n_pairs"]]:
        """The classical estimators."""
        return classical(batch)


def relu_network(
    d: int = 5,
    n_pairs: int | None = None,
    tokens: str = "interleaved",
    covariance: str = "isotropic",
    hidden: int = 100,
) -> Regression:
    """Prompts of two-layer ReLU networks.

    hidden      number of hidden units H
    n_pairs     5 d + 1 unless given, as in the papers (101 for d = 20)
    tokens      "interleaved" or "joint" (``Layout``)
    covariance  "isotropic", "skewed" or "half_subspace" (``inputs.draw``)
    """
    layout = Layout(tokens, d)
    whole_number("hidden", hidden, least=1)
    return Regression(
        name="relu_net",
        functions=ReluNet(d, hidden),
        layout=layout,
        n_pairs=pairs_or(n_pairs, 5 * d + 1),
        covariance=covariance,
        options={"covariance": covariance, "hidden": hidden},
    )
