"""Classical estimators of in-context regression: example k is predicted from the k pairs before it.

``estimators.build("ridge", alpha=0.1)(batch)`` has the axes (batch, example k) of the task's loss.
Everything is computed in fp64 on the CPU and comes back in the dtype and on the device of ``y``:
these are the exact values that a trained model is held against.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from hooks.errors import BadArgument, unknown
from interp import iterative
from interp.arguments import known_options, whole_number
from interp.iterative import sums_before

DEPENDENT = 1e-10
"""A direction of the inputs smaller than this, relative to the largest, is absent. Repeated
inputs and zero coordinates leave fp64 rounding, 1e-16; what was drawn in fp32 is 1e-7 or more."""


class Pairs(Protocol):
    """What an estimator looks at; a ``Batch`` is one."""

    @property
    def x(self) -> Float[Tensor, "batch n_pairs d"]:
        """The inputs."""
        ...

    @property
    def y(self) -> Float[Tensor, "batch n_pairs"]:
        """The labels; entry k is not used for the prediction of example k or any before it."""
        ...


Estimator = Callable[[Pairs], Tensor]
"""``estimator(pairs) -> (batch, n_pairs)`` predictions."""


def names() -> list[str]:
    """The names that ``build`` takes."""
    return list(ESTIMATORS)


def build(name: str, **config: Any) -> Estimator:
    """The estimator called ``name``, a function of a batch that gives its predictions.

    Raises ``BadArgument`` for a name or an option that does not exist, with the nearest that does.
    """
    if name not in ESTIMATORS:
        raise BadArgument(unknown("estimator", name, ESTIMATORS))
    known_options(name, ESTIMATORS[name], config)
    return ESTIMATORS[name](**config)


def ols() -> Estimator:
    """Ordinary least squares, of minimum norm where the pairs do not determine it; 0 at k = 0."""
    return lambda pairs: _apply(ols_weights(pairs.x, pairs.y), pairs)


def ridge(alpha: float = 1.0) -> Estimator:
    """Ridge regression without intercept: argmin_w Σ_{i<k} (y_i - w·x_i)² + alpha |w|²; 0 at k = 0.

    With w ~ N(0, I) and label noise of variance alpha this is the Bayes predictor.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not alpha > 0:
        raise BadArgument(f'alpha={alpha!r} does not work; give a positive number ("ols" has none)')
    return lambda pairs: _apply(ridge_weights(pairs.x, pairs.y, alpha), pairs)


def averaging() -> Estimator:
    """w = (1/k) Σ_{i<k} y_i x_i, one gradient step from zero if x ~ N(0, I); 0 at k = 0."""
    return lambda pairs: _apply(averaging_weights(pairs.x, pairs.y), pairs)


def knn(neighbours: int = 3) -> Estimator:
    """The plain mean of the labels of the ``neighbours`` nearest inputs; of all k, if k is smaller.

    0 at k = 0.
    """
    whole_number("neighbours", neighbours, least=1)
    return lambda pairs: _nearest(pairs, neighbours)


def gd(steps: int, rate: float | None = None) -> Estimator:
    """``steps`` steps of gradient descent from w = 0 (``iterative.gd_path``); towards ``ols``."""
    return lambda pairs: iterative.gd_path(pairs.x, pairs.y, steps, rate)[-1]


def gdpp(
    steps: int,
    rate: float | None = None,
    gamma: float | None = None,
    form: str = "iterated",
) -> Estimator:
    """``steps`` steps of GD++, preconditioned by I - γ A (``iterative.gdpp_path`` says how); towards ``ols``."""
    return lambda pairs: iterative.gdpp_path(pairs.x, pairs.y, steps, rate, gamma, form)[-1]


def newton(steps: int) -> Estimator:
    """``steps`` steps of Newton's iteration for the inverse (``iterative.newton_path``); towards ``ols``, fast."""
    return lambda pairs: iterative.newton_path(pairs.x, pairs.y, steps)[-1]


def online_gd(rate: float, forgetting: float = 1.0, form: str = "residual") -> Estimator:
    """One pass through the pairs, each a gradient step (``iterative.online_gd_path``); 0 at k = 0."""
    return lambda pairs: iterative.online_gd_path(pairs.x, pairs.y, [(rate, forgetting)], form)[0]


ESTIMATORS: dict[str, Callable[..., Estimator]] = {
    "ols": ols,
    "ridge": ridge,
    "averaging": averaging,
    "knn": knn,
    "gd": gd,
    "gdpp": gdpp,
    "newton": newton,
    "online_gd": online_gd,
}


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
    penalised = alpha * torch.eye(x.shape[-1], dtype=inputs.dtype).repeat(len(x), 1, 1)
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
    count = torch.arange(xty.shape[1], dtype=xty.dtype).clamp(min=1)
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


def _nearest(pairs: Pairs, neighbours: int) -> Tensor:
    """Mean label of the nearest earlier inputs, (batch, n_pairs)."""
    x, y = pairs.x.double().cpu(), pairs.y.double().cpu()
    n_pairs = y.shape[1]
    # The default distance uses a matrix product, whose cancellation can swap close neighbours.
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    later = torch.ones(n_pairs, n_pairs, dtype=torch.bool).triu()
    distance = distance.masked_fill(later, torch.inf)
    nearest, index = distance.topk(min(neighbours, n_pairs), dim=-1, largest=False)
    seen = nearest.isfinite()
    labels = y[:, None, :].expand(-1, n_pairs, -1).gather(-1, index)
    mean = (labels * seen).sum(dim=-1) / seen.sum(dim=-1).clamp(min=1)
    return mean.to(pairs.y)
