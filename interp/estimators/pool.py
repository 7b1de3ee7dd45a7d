"""The Bayes predictor where the task is one of a finite pool."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from einops import einsum
from torch import Tensor

from hooks.errors import BadArgument
from interp.estimators.base import Estimator, Pairs, exact, in_parts
from interp.estimators.iterative import positive, sums_before


def dmmse(pool: Tensor | Sequence[Sequence[float]], noise: float) -> Estimator:
    """The posterior mean of y_k if w is one row of ``pool``, each as likely, and labels carry N(0, noise²).

    w_k = Σ_m p_m w_m with p = softmax(-Σ_{i<k} (y_i - w_m·x_i)² / 2 noise²); ``pool`` is (tasks, d).
    At k = 0 it is the mean of the pool. Source: Raventós et al., arXiv 2306.15063.
    """
    tasks = torch.as_tensor(pool, dtype=torch.float64, device="cpu").detach()
    if tasks.ndim != 2 or not tasks.numel() or not tasks.isfinite().all():
        raise BadArgument(f"a pool of shape {tuple(tasks.shape)} does not work; give finite task vectors, (tasks, d)")
    positive("noise", noise)

    def predict(pairs: Pairs) -> Tensor:
        x, y = exact(pairs)
        if x.shape[2] != tasks.shape[1]:
            raise BadArgument(f"the pool has tasks of d={tasks.shape[1]} and x has d={x.shape[2]}; give one pool of it")
        return in_parts(partial(_posterior_mean, tasks, noise), y.shape[1] * len(tasks), x, y).to(pairs.y)

    return predict


def _posterior_mean(tasks: Tensor, noise: float, x: Tensor, y: Tensor) -> Tensor:
    """Predictions of some prompts, (batch, n_pairs)."""
    label = einsum(x, tasks, "batch k d, m d -> batch k m")
    distance = sums_before((y[..., None] - label).square())
    return (torch.softmax(-distance / (2 * noise**2), dim=-1) * label).sum(dim=-1)
