"""Sparse linear regression in context: y_i = w·x_i, and w has few coordinates. One prompt, d = 3, sparsity = 1:

    w        (0, -1.5, 0)                                                       drawn, never shown
    tokens   (2.0, 1.0, 0.3)  (-1.5, 0, 0)  (0.7, -2.0, 1.1)  (3.0, 0, 0)  (0.1, 0.2, -0.4)
    kind      x_0              y_0           x_1               y_1          x_2       the model should say y_2 = -0.3

Least squares needs d pairs; a solver that knows of the sparsity needs of the order of sparsity · log d.
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
from interp.tasks.regression import Regression, classical, ols_on, pairs_or


@dataclass(frozen=True)
class SparseLinear:
    """f(x) = w·x, w ~ N(0, I_d) with all but ``sparsity`` coordinates, uniform for each prompt, put at zero.

    ``truth``: w (batch, d) and support (batch, d), True where w is not zero.
    """

    d: int
    sparsity: int

    @property
    def scale(self) -> float:
        """E[f(x)²] = sparsity, as a coordinate of x has mean square 1."""
        return float(self.sparsity)

    def draw(self, n: int, active: int, generator: torch.Generator) -> dict[str, Tensor]:
        """w for each prompt; its support lies in the active coordinates, all of them if they are fewer."""
        w = seeds.normal((n, self.d), generator)
        lot = seeds.uniform((n, self.d), generator)
        lot[:, active:] = torch.inf
        support = lot.argsort(dim=1).argsort(dim=1) < min(self.sparsity, active)
        return {"w": w * support, "support": support}

    def __call__(
        self, x: Float[Tensor, "batch n_pairs d"], truth: Mapping[str, Tensor]
    ) -> Float[Tensor, "batch n_pairs"]:
        """w·x."""
        return einsum(x, truth["w"], "b k i, b i -> b k")

    def variables(self, batch: Batch) -> dict[str, Tensor]:
        """w (batch, d), and support (batch, d): 1 where w is not zero, else 0."""
        return {"w": batch.truth["w"], "support": batch.truth["support"].to(batch.y)}

    def rivals(self, batch: Batch) -> dict[str, Float[Tensor, "batch n_pairs"]]:
        """The classical estimators, and ols_on_support: least squares told which coordinates count."""
        told = batch.x * batch.truth["support"][:, None]
        return {**classical(batch), "ols_on_support": ols_on(told, batch.y)}


def sparse_linear_regression(
    d: int = 10,
    n_pairs: int | None = None,
    tokens: str = "interleaved",
    covariance: str = "isotropic",
    sparsity: int = 3,
) -> Regression:
    """Prompts of sparse linear regression.

    sparsity    number of coordinates of w that are not zero
    n_pairs     4 d + 1 unless given
    tokens      "interleaved" or "joint" (``Layout``)
    covariance  "isotropic", "skewed" or "half_subspace" (``inputs.draw``)
    """
    layout = Layout(tokens, d)
    whole_number("sparsity", sparsity, 1, d)
    return Regression(
        name="sparse_linreg",
        functions=SparseLinear(d, sparsity),
        layout=layout,
        n_pairs=pairs_or(n_pairs, 4 * d + 1),
        covariance=covariance,
        options={"covariance": covariance, "sparsity": sparsity},
    )
