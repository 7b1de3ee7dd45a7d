"""Predictions from likeness to earlier inputs: nearest neighbours and kernel ridge."""

from __future__ import annotations

from functools import partial

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from hooks.errors import BadArgument, told, unknown
from interp.arguments import one_of, whole_number
from interp.estimators.base import Estimator, Pairs, exact, in_parts
from interp.estimators.iterative import positive


def knn(neighbours: int = 3, weights: str = "uniform") -> Estimator:
    """The mean of the labels of the ``neighbours`` nearest inputs; of all k, if k is smaller. 0 at k = 0.

    weights="uniform"   the plain mean
    weights="distance"  each label counts 1 / distance. Where one of these inputs is the query
                        itself, only the labels of such inputs count.
    """
    whole_number("neighbours", neighbours, least=1)
    one_of("weights", weights, ("uniform", "distance"))

    def predict(pairs: Pairs) -> Tensor:
        x, y = exact(pairs)
        return in_parts(partial(_nearest, neighbours, weights), y.shape[1] ** 2, x, y).to(pairs.y)

    return predict


def kernel_ridge(
    kernel: str = "rbf",
    alpha: float = 1.0,
    bandwidth: float | None = None,
    degree: int = 3,
    project: str | None = None,
) -> Estimator:
    """Kernel ridge regression: κ(x_k)ᵀ (K + alpha I)⁻¹ y over the k pairs before, without intercept; 0 at k = 0.

    kernel="rbf"         K(x, z) = exp(-|x - z|² / 2 bandwidth²)
    kernel="polynomial"  K(x, z) = (1 + x·z / bandwidth²)^degree
    bandwidth            sqrt(d) unless given; sqrt(r) of projected inputs
    project              the name of an entry of ``batch.truth``, "subspace" (batch, r, d) or "beta" (batch, d): the
                         products of x with its r rows are the input in place of x. It is the truth: this rival is
                         given more than the context, and shows what is left to learn once the directions are known.

    alpha is the variance of the label noise if y is a Gaussian process with covariance K: then this is the posterior
    mean. Raises ``BadArgument`` where K + alpha I is not positive definite in fp64 (alpha too small for repeated
    inputs), and where the batch has no such subspace.
    """
    one_of("kernel", kernel, ("rbf", "polynomial"))
    positive("alpha", alpha)
    whole_number("degree", degree, least=1)
    if bandwidth is not None:
        positive("bandwidth", bandwidth)

    def predict(pairs: Pairs) -> Tensor:
        x = _coordinates(pairs, project)
        width = x.shape[-1] ** 0.5 if bandwidth is None else bandwidth

        def part(x: Tensor, y: Tensor) -> Tensor:
            if kernel == "rbf":
                similarity = torch.exp(-_distances(x).square() / (2 * width**2))
            else:
                similarity = (1 + einsum(x, x, "b k i, b l i -> b k l") / width**2) ** degree
            return _regress(similarity, y, alpha)

        return in_parts(part, x.shape[1] ** 2, x, exact(pairs)[1]).to(pairs.y)

    return predict


def _regress(
    similarity: Float[Tensor, "batch n_pairs n_pairs"], y: Float[Tensor, "batch n_pairs"], alpha: float
) -> Float[Tensor, "batch n_pairs"]:
    """κ_kᵀ (K_k + alpha I)⁻¹ y_{<k} for every k, out of one factor L Lᵀ = K + alpha I for each prompt.

    The leading k rows of L are the factor L_k of the first k pairs, and row k begins with L_k⁻¹ κ_k. So with
    z = L⁻¹ y, whose entry i depends on y_0 … y_i only, the prediction of example k is Σ_{i<k} L_ki z_i.
    """
    penalised = similarity + alpha * torch.eye(y.shape[1], dtype=y.dtype, device=y.device)
    factor, failed = torch.linalg.cholesky_ex(penalised)
    if failed.any():
        raise BadArgument(f"alpha={told(alpha)} does not work: K + alpha I is singular in fp64; give a larger alpha")
    z = torch.linalg.solve_triangular(factor, y[..., None], upper=False)[..., 0]
    return einsum(factor.tril(-1), z, "b k i, b i -> b k")


def _coordinates(pairs: Pairs, project: str | None) -> Float[Tensor, "batch n_pairs r"]:
    """x itself, or its coordinates in the subspace that the batch's truth calls ``project``."""
    x = exact(pairs)[0]
    if project is None:
        return x
    truth = getattr(pairs, "truth", {})
    if project not in truth:
        raise BadArgument(unknown("truth of this batch", project, truth))
    rows = truth[project].detach().cpu().double()
    rows = rows[:, None] if rows.ndim == 2 else rows
    if rows.ndim != 3 or rows.shape[::2] != x.shape[::2]:
        n, _, d = x.shape
        raise BadArgument(
            f'truth "{project}" is {tuple(truth[project].shape)}; a subspace is ({n}, r, {d}) or ({n}, {d}) here: '
            f"(batch, r, d) or (batch, d)"
        )
    return einsum(x, rows, "b k i, b r i -> b k r")


def _distances(x: Float[Tensor, "batch n_pairs r"]) -> Float[Tensor, "batch n_pairs n_pairs"]:
    # The default uses a matrix product, whose cancellation can swap close neighbours.
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")


def _nearest(neighbours: int, weights: str, x: Tensor, y: Tensor) -> Float[Tensor, "batch n_pairs"]:
    """Mean label of the nearest earlier inputs."""
    n_pairs = y.shape[1]
    later = torch.ones(n_pairs, n_pairs, dtype=torch.bool, device=y.device).triu()
    distance = _distances(x).masked_fill(later, torch.inf)
    nearest, index = distance.topk(min(neighbours, n_pairs), dim=-1, largest=False)
    weight = nearest.isfinite().double()
    if weights == "distance":
        same = nearest == 0
        weight = torch.where(same.any(dim=-1, keepdim=True), same.double(), weight / nearest)
    labels = y[:, None, :].expand(-1, n_pairs, -1).gather(-1, index)
    # Before the first pair no weight is above zero; the mean is then 0 and not 0 / 0.
    total = weight.sum(dim=-1)
    return (labels * weight).sum(dim=-1) / total.masked_fill(total == 0, 1.0)
