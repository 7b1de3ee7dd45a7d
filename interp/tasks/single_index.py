"""Single-index functions in context: y_i = g(⟨β, x_i⟩) + ζ_i, with another direction β for each prompt. One prompt:

    d = 2, g(z) = z², tau = 0.1, β = (0.6, 0.8)                                      drawn, never shown
    z        ⟨β, x⟩:   2.0             -0.2              -0.8
    tokens   (2.0, 1.0; 3.9)   (1.0, -1.0; 0.14)   (-2.0, 0.5; 0)
    kind      pair              pair                query             the model should say y_2 = 0.64

g and the subspace of β are the same in all prompts, so that they can be learned in training; β has to be found in the
prompt. Source: arXiv 2510.12026, with 2411.02544 for the low-dimensional β.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from hooks.errors import BadArgument, told
from interp import estimators, seeds
from interp.arguments import between, one_of, whole_number
from interp.tasks.base import Batch
from interp.tasks.layout import Layout
from interp.tasks.regression import Noise, Regression, classical, pairs_or

HIGHEST = 12
"""The highest Hermite degree: E[g²] comes from products of degree 2 · 12, exact with ``NODES`` nodes."""
NODES = 100
LINKS: dict[str, Callable[[Tensor], Tensor] | tuple[float, ...]] = {
    "identity": (0.0, 1.0),
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "he2": (0.0, 0.0, 1.0),
    "he3": (0.0, 0.0, 0.0, 1.0),
    "he4": (0.0, 0.0, 0.0, 0.0, 1.0),
    "he5": (0.0, 0.0, 0.0, 0.0, 0.0, 1.0),
}
"""Functions as they are, or coefficients c_0, c_1, … of Σ_k c_k He_k(z) / sqrt(k!)."""

Link = str | tuple[float, ...]


@dataclass(frozen=True)
class SingleIndex:
    """f(x) = g(⟨β, x⟩), β uniform on the unit sphere of the span of ``subspace``, whose rows are orthonormal.

    ``truth``: beta (batch, d); coordinates (batch, r), those of β in the subspace; subspace (batch, r, d), the same in
    every prompt.
    """

    link: Link
    subspace: Float[Tensor, "r d"]

    @property
    def scale(self) -> float:
        """E[g(z)²] for z ~ N(0, 1), which is what ⟨β, x⟩ is if x ~ N(0, I). By Gauss–Hermite quadrature."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
        squares = self.g(torch.from_numpy(nodes)).square().numpy()
        return float((weights * squares).sum() / weights.sum())

    def g(self, z: Tensor) -> Tensor:
        """The link, of any shape."""
        form = LINKS[self.link] if isinstance(self.link, str) else self.link
        return form(z) if callable(form) else hermite_sum(form, z)

    def draw(self, n: int, active: int, generator: torch.Generator) -> dict[str, Tensor]:
        """β for each prompt, in all d coordinates: where x is zero it has no effect."""
        normal = seeds.normal((n, len(self.subspace)), generator)
        coordinates = normal / normal.norm(dim=-1, keepdim=True)
        return {
            "beta": coordinates @ self.subspace,
            "coordinates": coordinates,
            "subspace": self.subspace.expand(n, *self.subspace.shape),
        }

    def __call__(
        self, x: Float[Tensor, "batch n_pairs d"], truth: Mapping[str, Tensor]
    ) -> Float[Tensor, "batch n_pairs"]:
        """g(⟨β, x⟩)."""
        return self.g(index_of(x, truth))

    def variables(self, batch: Batch) -> dict[str, Tensor]:
        """beta (batch, d); coordinates (batch, r) of it; index (batch, n_pairs): ⟨β, x_k⟩.

        An even link gives no sign of β, so of it only products of two coordinates can be found.
        """
        truth = batch.truth
        return {"beta": truth["beta"], "coordinates": truth["coordinates"], "index": index_of(batch.x, truth)}

    def rivals(self, batch: Batch) -> dict[str, Float[Tensor, "batch n_pairs"]]:
        """The classical estimators, and two that are told something: knn_in_subspace sees the r coordinates of x in the
        subspace, knn_on_index sees ⟨β, x⟩.
        """
        inside = einsum(batch.x, batch.truth["subspace"], "b k i, b r i -> b k r")
        index = index_of(batch.x, batch.truth)[..., None]
        nearest = estimators.build("knn")
        return {
            **classical(batch),
            "knn_in_subspace": nearest(_Pairs(inside, batch.y)),
            "knn_on_index": nearest(_Pairs(index, batch.y)),
        }


def single_index(
    d: int = 16,
    n_pairs: int | None = None,
    tokens: str = "joint",
    r: int = 4,
    link: str | Sequence[float] = "he3",
    tau: float = 0.1,
    noise_form: str = "sign",
    noisy_targets: bool = False,
    subspace_seed: int | None = 0,
) -> Regression:
    """Prompts of a single-index model, x ~ N(0, I).

    n_pairs        4 d + 1 unless given
    tokens         "joint" as in the paper, or "interleaved" (``Layout``)
    r              dimension of the subspace that β comes from, 2 … d; of 1 there would be two functions in all
    link           "identity", "relu", "tanh", "sigmoid", as they are; "he2" … "he5", He_k(z) / sqrt(k!); or the list
                   of coefficients c_0, c_1, … of Σ_k c_k He_k(z) / sqrt(k!), whose squares sum to E[g²]
    tau            size of the noise ζ on the labels
    noise_form     "sign": ζ = ±tau. "gaussian": ζ ~ N(0, tau²).
    noisy_targets  whether the error is taken to the noisy label (``Noise``) or to g(⟨β, x⟩)
    subspace_seed  the subspace is drawn once for the task with this seed; None: the first r coordinates
    """
    layout = Layout(tokens, d)
    whole_number("r", r, 2, d)
    if subspace_seed is not None:
        whole_number("subspace_seed", subspace_seed, least=0)
    form = _link(link)
    noise = Noise(between("tau", tau, 0.0), noise_form, noisy_targets)
    return Regression(
        name="single_index",
        functions=SingleIndex(form, _subspace(r, d, subspace_seed)),
        layout=layout,
        n_pairs=pairs_or(n_pairs, 4 * d + 1),
        noise=noise,
        options={
            "r": r,
            "link": form if isinstance(form, str) else list(form),
            "tau": noise.size,
            "noise_form": noise_form,
            "noisy_targets": noisy_targets,
            "subspace_seed": subspace_seed,
        },
    )


def hermite_sum(coefficients: Sequence[float], z: Tensor) -> Tensor:
    """Σ_k c_k He_k(z) / sqrt(k!), probabilists' polynomials: He_{k+1} = z He_k - k He_{k-1}."""
    before, now, total = torch.zeros_like(z), torch.ones_like(z), torch.zeros_like(z)
    for k, c in enumerate(coefficients):
        total = total + c / math.sqrt(math.factorial(k)) * now
        before, now = now, z * now - k * before
    return total


def index_of(x: Float[Tensor, "batch n_pairs d"], truth: Mapping[str, Tensor]) -> Float[Tensor, "batch n_pairs"]:
    """⟨β, x⟩."""
    return einsum(x, truth["beta"], "b k i, b i -> b k")


@dataclass(frozen=True)
class _Pairs:
    """Other inputs with the labels of a batch."""

    x: Float[Tensor, "batch n_pairs d"]
    y: Float[Tensor, "batch n_pairs"]


def _link(link: Any) -> Link:
    """A name of ``LINKS``, or coefficients, the highest not zero; a function that is constant has no index."""
    if isinstance(link, str):
        return one_of("link", link, LINKS)
    if not isinstance(link, Sequence) or not 2 <= len(link) <= HIGHEST + 1:
        raise BadArgument(
            f"link={told(link)} does not work; give one of {', '.join(LINKS)}, or Hermite coefficients c_0, c_1, … c_n "
            f"with n from 1 to {HIGHEST}"
        )
    coefficients = tuple(between("a coefficient of link", c, -math.inf) for c in link)
    if not any(coefficients[1:]):
        raise BadArgument(f"link={told(link)} is constant and says nothing of β; give a coefficient above c_0")
    return coefficients


def _subspace(r: int, d: int, seed: int | None) -> Float[Tensor, "r d"]:
    """r orthonormal rows: coordinate axes for None, else of a Gaussian matrix with this seed, signs fixed."""
    if seed is None:
        return torch.eye(d, dtype=torch.float32, device="cpu")[:r]
    normal = seeds.normal((d, r), torch.Generator().manual_seed(seed), torch.float64)
    q, triangle = torch.linalg.qr(normal)
    return (q * triangle.diagonal().sign()).mT.float().contiguous()
