"""In-context linear regression: y_i = w·x_i, with w ~ N(0, I_d) for each prompt. One prompt, d = 2, n_pairs = 3:

    w        (0.5, -1.0)                                                   drawn, never shown
    tokens   (2.0, 1.0)  (0.0, 0)  (1.0, -1.0)  (1.5, 0)  (-2.0, 0.5)
    kind      x_0         y_0       x_1          y_1       x_2             after x_2 the model should say y_2 = -1.5

Source: arXiv 2402.03170 §3 and its released samplers; the prompt is of arXiv 2208.01066.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from hooks.errors import BadArgument
from interp import seeds
from interp.arguments import between
from interp.tasks.base import Batch
from interp.tasks.layout import Layout
from interp.tasks.regression import Noise, Regression, classical, pairs_or, true_or_false


@dataclass(frozen=True)
class Linear:
    """f(x) = w·x, w ~ N(0, gain² I_d). ``truth``: w (batch, d)."""

    d: int
    gain: float = 1.0

    @property
    def scale(self) -> float:
        """E[f(x)²] = gain² d, as the inputs have trace d."""
        return self.gain**2 * self.d

    def draw(self, n: int, active: int, generator: torch.Generator) -> dict[str, Tensor]:
        """w for each prompt, in all d coordinates: where x is zero it has no effect."""
        return {"w": self.gain * seeds.normal((n, self.d), generator)}

    def __call__(
        self, x: Float[Tensor, "batch n_pairs d"], truth: Mapping[str, Tensor]
    ) -> Float[Tensor, "batch n_pairs"]:
        """w·x."""
        return einsum(x, truth["w"], "batch n_pairs d, batch d -> batch n_pairs")

    def variables(self, batch: Batch) -> dict[str, Tensor]:
        """w (batch, d): the task."""
        return {"w": batch.truth["w"]}

    def rivals(self, batch: Batch) -> dict[str, Float[Tensor, "batch n_pairs"]]:
        """The classical estimators."""
        return classical(batch)


def linear_regression(
    d: int = 5,
    n_pairs: int | None = None,
    tokens: str = "interleaved",
    covariance: str = "isotropic",
    noise: float = 0.0,
    renormalise: bool = False,
    noisy_targets: bool = False,
) -> Regression:
    """Prompts of linear regression, without noise unless asked for.

    n_pairs        4 d + 1 unless given
    tokens         "interleaved" or "joint" (``Layout``)
    covariance     "isotropic", "skewed" or "half_subspace" (``inputs.draw``)
    noise          σ of Gaussian noise on the labels
    renormalise    labels times sqrt(d / (d + σ²)), so that E[y²] = d again, as in the papers' noisy linear regression;
                   w in ``truth`` is the one after it. The released code divides by the standard deviation of the
                   batch, which makes a prompt depend on the others in its batch; this is its expectation.
    noisy_targets  whether the error is taken to the noisy label (``Noise``), as the papers do, or to w·x

    The last three are in ``config`` only where there is noise: a task without it is called the same as ever.
    """
    layout = Layout(tokens, d)
    sigma = between("noise", noise, 0.0)
    true_or_false("renormalise", renormalise)
    true_or_false("noisy_targets", noisy_targets)
    if not sigma and (renormalise or noisy_targets):
        raise BadArgument("renormalise and noisy_targets are about noise, and noise=0; give noise above 0")
    gain = (d / (d + sigma**2)) ** 0.5 if renormalise else 1.0
    about_noise = {"noise": sigma, "renormalise": renormalise, "noisy_targets": noisy_targets}
    return Regression(
        name="linreg",
        functions=Linear(d, gain),
        layout=layout,
        n_pairs=pairs_or(n_pairs, 4 * d + 1),
        covariance=covariance,
        noise=Noise(gain * sigma, targets=noisy_targets),
        options={"covariance": covariance, **(about_noise if sigma else {})},
    )
