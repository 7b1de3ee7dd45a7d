"""Predictions w_k · x_k: least squares, ridge, the posterior mean and averaging."""

from __future__ import annotations

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from interp.arguments import between
from interp.estimators.base import Estimator, Pairs
from interp.estimators.iterative import positive, sums_before

DEPENDENT = 1e-10
"""A direction of the inputs smaller than this, relative to the largest, is absent. Repeated
inputs and zero coordinates leave fp64 rounding, 1e-16; what was drawn in fp32 is 1e-7 or more."""


def ols() -> Estimator:
    """Ordinary least squares, of minimum norm where the pairs do not determine it; 0 at k = 0."""
    return lambda pairs: _apply(ols_weights(pairs.x, pairs.y), pairs)


def ridge(alpha: float = 1.0) -> Estimator:
    """Ridge regression without intercept: argmin_w Σ_{i<k} (y_i - w·x_i)² + alpha |w|²; 0 at k = 0.

    With w ~ N(0, I) and label noise of variance alpha this is the Bayes predictor.
    """
    positive("alpha", alpha, ' ("ols" has none)')
    return lambda pairs: _apply(ridge_weights(pairs.x, pairs.y, alpha), pairs)


def bayes(noise: float, prior: float = 1.0) -> Estimator:
    """The posterior mean of y_k if w ~ N(0, prior² I) and labels carry N(0, noise²); 0 at k = 0.

    It is ridge with alpha = noise² / prior². Without noise it is least squares of minimum norm, the
    limit alpha → 0. No estimator has a smaller squared error on such prompts, whatever law x has.
    Labels that are scaled together, noise included, leave alpha as it is.
    """
    between("noise", noise, 0.0)
    positive("prior", prior)
    return ols() if noise == 0 else ridge((noise / prior) ** 2)


def averaging() -> Estimator:
    """w = (1/k) Σ_{i<k} y_i x_i, one gradient step from zero if x ~ N(0, I); 0 at k = 0."""
    return lambda pairs: _apply(averaging_weights(pairs.x, pairs.y), pairs)


def moments(
    x: Float[Tensor, "batch n_pairs d"], y: Float[Tensor, "batch n_pairs"]
) -> tuple[Float[Tensor, "batch n_pairs d d"], Float[Tensor, "batch n_pairs d"]]:
    """(Σ_{i<k} x_i x_iᵀ, Σ_{i<k} y_i x_i) for every k; zero at k = 0. Summed in fp64."""
    inputs, labels = x.double().cpu(), y.double().cpu()
    xtx = sums_before(einsum(inputs, inputs, "b k i, b k j -> b k i j"))
    return xtx.to(y), sums_before(labels[..., None] * inputs).to(y)


def ols_weights(
    x: Float[Tensor, "batch n_pairs d"], y: Float[Tensor, "batch n_pairs"]
) -> Float[Tensor, "batch n_pairs d"]:
    """The minimum-norm least-squares solution from the k pairs before each example k.

    Each k is solved from the inputs themselves, by QR. Solving with Σ x xᵀ would take all k in one
    call, but squares the condition number: at k = d, where square random matrices are often nearly
    singular, the rank is then a matter of rounding, and the noiseless error would not be zero.
    """
    inputs, labels = x.double().cpu(), y.double().cpu()
    weights = torch.zeros_like(inputs)
    for k in range(1, inputs.shape[1]):
        weights[:, k] = _least_squares(inputs[:, :k], labels[:, :k, None])[..., 0]
    return weights.to(y)


def ridge_weights(
    x: Float[Tensor, "batch n_pairs d"], y: Float[Tensor, "batch n_pairs"], alpha: float
) -> Float[Tensor, "batch n_pairs d"]:
    """(Σ_{i<k} x_i x_iᵀ + alpha I)⁻¹ Σ_{i<k} y_i x_i for every k."""
    inputs, labels = x.double().cpu(), y.double().cpu()
    weights = torch.zeros_like(inputs)
    penalised = alpha * torch.eye(x.shape[-1], dtype=inputs.dtype, device=inputs.device).repeat(len(x), 1, 1)
    xty = torch.zeros_like(inputs[:, 0])
    # One k at a time: all of them at once hold n_pairs matrices for each prompt.
    for k in range(1, inputs.shape[1]):
        newest = inputs[:, k - 1]
        penalised = penalised + newest[:, :, None] * newest[:, None, :]
        xty = xty + labels[:, k - 1, None] * newest
        factor = torch.linalg.cholesky(penalised)
        weights[:, k] = torch.cholesky_solve(xty[..., None], factor)[..., 0]
    return weights.to(y)


def averaging_weights(
    x: Float[Tensor, "batch n_pairs d"], y: Float[Tensor, "batch n_pairs"]
) -> Float[Tensor, "batch n_pairs d"]:
    """(1/k) Σ_{i<k} y_i x_i for every k; 0 at k = 0."""
    xty = sums_before(y.double().cpu()[..., None] * x.double().cpu())
    count = torch.arange(xty.shape[1], dtype=xty.dtype, device=xty.device).clamp(min=1)
    return (xty / count[:, None]).to(y)


def _least_squares(x: Float[Tensor, "batch k d"], y: Float[Tensor, "batch k 1"]) -> Float[Tensor, "batch d 1"]:
    """The minimum-norm w that minimises |x w - y|².

    With full rank: w = R⁻¹ Qᵀ y from x = Q R if k ≥ d, and w = Q R⁻ᵀ y from xᵀ = Q R if k < d.
    Prompts whose R has a small diagonal entry (repeated inputs, coordinates that are zero) are
    solved by singular values, which take four times as long. Of torch's rank-revealing drivers,
    gelsy would be the fast one, but it reads pivots that the matrix before it left behind
    (github.com/pytorch/pytorch/issues/187411), so its rank depends on what ran earlier.
    """
    if x.shape[1] < x.shape[2]:
        q, r = torch.linalg.qr(x.mT)
        w = q @ torch.linalg.solve_triangular(r.mT, y, upper=False)
    else:
        q, r = torch.linalg.qr(x)
        w = torch.linalg.solve_triangular(r, q.mT @ y, upper=True)
    pivots = r.diagonal(dim1=-2, dim2=-1).abs().amin(dim=-1)
    doubtful = pivots <= 1e-6 * r.abs().amax(dim=(-2, -1))
    if doubtful.any():
        by_svd = torch.linalg.lstsq(x[doubtful], y[doubtful], rcond=DEPENDENT, driver="gelsd")
        w[doubtful] = by_svd.solution
    return w


def _apply(weights: Float[Tensor, "batch n_pairs d"], pairs: Pairs) -> Tensor:
    """w_k · x_k for each example, summed in fp64."""
    product = einsum(weights.double(), pairs.x.double(), "b k i, b k i -> b k")
    return product.to(pairs.y)
