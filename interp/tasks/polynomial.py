"""Quadratic and cubic functions in context: y_i = w·x_i^p / c, the power taken coordinate by coordinate. One prompt:

    d = 2, degree = 2, w = (1.0, -2.0), c = sqrt 3                                drawn, never shown
    tokens   (2.0, 1.0)  (1.15, 0)  (1.0, -1.0)  (-0.58, 0)  (0.0, 2.0)
    kind      x_0         y_0        x_1          y_1         x_2            the model should say y_2 = -4.62

A solver that knows the power does least squares on x^p and is exact from k = d on.
Source: the quadratic is in the released code of arXiv 2208.01066; whether models learn such functions is an open
question of arXiv 2402.03170. The cubic is its like.
"""

from __future__ import annotations

import math
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
from interp.tasks.regression import Regression, classical, ols_on, pairs_or


@dataclass(frozen=True)
class Polynomial:
    """f(x) = Σ_i w_i x_i^p / sqrt((2p - 1)!!), w ~ N(0, I_d). ``truth``: w (batch, d).

    (2p - 1)!! = E[z^2p] of a standard normal z: 3 for the quadratic, 15 for the cubic.
    """

    d: int
    degree: int

    @property
    def scale(self) -> float:
        """E[f(x)²] = d, for x ~ N(0, I)."""
        return float(self.d)

    def draw(self, n: int, active: int, generator: torch.Generator) -> dict[str, Tensor]:
        """w for each prompt, in all d coordinates: where x is zero it has no effect."""
        return {"w": seeds.normal((n, self.d), generator)}

    def __call__(
        self, x: Float[Tensor, "batch n_pairs d"], truth: Mapping[str, Tensor]
    ) -> Float[Tensor, "batch n_pairs"]:
        """w · features(x)."""
        return einsum(self.features(x), truth["w"], "b k i, b i -> b k")

    def features(self, x: Float[Tensor, "batch n_pairs d"]) -> Float[Tensor, "batch n_pairs d"]:
        """x^p / sqrt((2p - 1)!!): of mean square 1."""
        return x**self.degree / math.prod(range(1, 2 * self.degree, 2)) ** 0.5

    def variables(self, batch: Batch) -> dict[str, Tensor]:
        """w (batch, d), and the features of example k (batch, n_pairs, d), of which y is linear."""
        return {"w": batch.truth["w"], "features": self.features(batch.x)}

    def rivals(self, batch: Batch) -> dict[str, Float[Tensor, "batch n_pairs"]]:
        """The classical estimators on x, and ols_on_powers: least squares that knows the power."""
        return {**classical(batch), "ols_on_powers": ols_on(self.features(batch.x), batch.y)}


def polynomial(
    d: int = 5,
    n_pairs: int | None = None,
    tokens: str = "interleaved",
    degree: int = 2,
) -> Regression:
    """Prompts of quadratic or cubic functions of x ~ N(0, I).

    degree   2 or 3
    n_pairs  4 d + 1 unless given
    tokens   "interleaved" or "joint" (``Layout``)
    """
    layout = Layout(tokens, d)
    whole_number("degree", degree, 2, 3)
    return Regression(
        name="polynomial",
        functions=Polynomial(d, degree),
        layout=layout,
        n_pairs=pairs_or(n_pairs, 4 * d + 1),
        options={"degree": degree},
    )
