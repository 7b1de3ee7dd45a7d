"""The rivals of single-index regression, from one that knows nothing to one that knows everything but β.

Kernel ridge is tuned on prompts of its own, for every window of k by itself: what is reported is the best that these
kernels can do, not the best of one setting.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.brief import brief
from interp import estimators, seeds
from interp.tasks.base import Batch

ALPHAS = (1e-3, 1e-2, 1e-1, 1.0)
WIDTHS = (0.5, 1.0, 2.0, 4.0)
"""Bandwidths of the RBF kernel in units of sqrt(number of coordinates)."""
DEGREES = (2, 3, 4)
FLAT = (1.0, 2.0)
"""Bandwidths of the polynomial kernel, in the same units."""
FAMILIES: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "kernel ridge, RBF": (None, ("rbf",)),
    "kernel ridge, polynomial": (None, ("polynomial",)),
    "kernel ridge, told the subspace": ("subspace", ("rbf", "polynomial")),
    "kernel ridge, told β": ("beta", ("rbf", "polynomial")),
}
"""Name: what its inputs are projected on, and its kernels."""
TOLD_ALL = "told subspace and link"
ANGLES, DRAWS, CHUNK = 1024, 8192, 2**23


Windows = list[range]


def windows(n_pairs: int, growth: float = 1.35) -> Windows:
    """k = 0 … n_pairs − 1 in groups that grow with k.

    Labels such as He_3(z) have a fourth moment of some 100: at one k, hundreds of prompts leave a third of uncertainty.
    """
    found, start = [range(1)], 1
    while start < n_pairs:
        stop = min(n_pairs, max(start + 1, round(growth * start)))
        found.append(range(start, n_pairs if n_pairs - stop < (stop - start) / 2 else stop))
        start = found[-1].stop
    return found


def grouped(error: Float[Tensor, "batch n_pairs"], groups: Windows) -> Float[Tensor, "batch window"]:
    """The mean over each window."""
    return torch.stack([error[:, group.start : group.stop].double().mean(1) for group in groups], dim=1)


@dataclass(frozen=True)
class Tuned:
    """Errors on the judging prompts, and the setting that was chosen for each window of k."""

    error: Float[Tensor, "batch n_pairs"]
    settings: tuple[str, ...]

    __repr__ = brief


def kernel_ridge(task: Any, tune: Batch, judge: Batch, family: str) -> Tuned:
    """The family's errors on ``judge``, each window of k with the setting of the smallest mean error on ``tune``."""
    project, kernels = FAMILIES[family]
    grid = [setting for kernel in kernels for setting in _grid(kernel, _coordinates(tune, project), project)]
    groups = windows(task.n_pairs)
    levels = [grouped(task.error(estimators.build("kernel_ridge", **one)(tune), tune), groups).mean(0) for one in grid]
    best = torch.stack(levels).argmin(0).tolist()
    predicted = {i: estimators.build("kernel_ridge", **grid[i])(judge) for i in sorted(set(best))}
    chosen = torch.cat([predicted[i][:, one.start : one.stop] for i, one in zip(best, groups, strict=True)], dim=1)
    return Tuned(task.error(chosen, judge), tuple(_words(grid[i]) for i in best))


def posterior(task: Any, batch: Batch, seed: int = 0) -> Float[Tensor, "batch n_pairs"]:
    """Errors of the mean of g(⟨b, x⟩) over b with weight exp(−Σ_{i<k} (y_i − g(⟨b, x_i⟩))² / 2 τ²).

    It knows link, subspace and the size of the noise, and β is all that it has to find: with Gaussian noise it is the
    best that can be done. Of noise that is ±τ it knows the size only. b runs over a grid of angles in a plane, else
    over draws. τ is taken as at least 0.05 of the labels' size, which keeps the grid finer than the posterior.
    """
    truth = batch.truth["subspace"][0].double().cpu()
    if len(truth) == 2:
        angle = torch.arange(ANGLES, dtype=torch.float64, device="cpu") * (2 * torch.pi / ANGLES)
        every = torch.stack([angle.cos(), angle.sin()], dim=1)
    else:
        every = seeds.normal((DRAWS, len(truth)), seeds.generator("posterior", seed), torch.float64)
        every = every / every.norm(dim=1, keepdim=True)
    tau = max(task.noise.size, 0.05 * task.functions.scale**0.5)
    inside = batch.x.double().cpu() @ truth.T
    size = max(1, CHUNK // (inside.shape[1] * len(every)))
    guesses = []
    for x, y in zip(inside.split(size), batch.y.double().cpu().split(size), strict=True):
        g = task.functions.g(x @ every.T)
        missed = (y[..., None] - g).square()
        before = torch.cat([torch.zeros_like(missed[:, :1]), missed.cumsum(1)[:, :-1]], dim=1)
        guesses.append((torch.softmax(-before / (2 * tau**2), dim=-1) * g).sum(-1))
    return task.error(torch.cat(guesses).to(batch.targets), batch)


def _coordinates(batch: Batch, project: str | None) -> int:
    return {None: batch.x.shape[-1], "subspace": batch.truth["subspace"].shape[1], "beta": 1}[project]


def _grid(kernel: str, coordinates: int, project: str | None) -> list[dict[str, Any]]:
    root = coordinates**0.5
    widths = WIDTHS if kernel == "rbf" else FLAT
    degrees: tuple[int | None, ...] = (None,) if kernel == "rbf" else DEGREES
    return [
        {"kernel": kernel, "alpha": alpha, "bandwidth": width * root, "project": project}
        | ({} if degree is None else {"degree": degree})
        for alpha, width, degree in itertools.product(ALPHAS, widths, degrees)
    ]


def _words(setting: dict[str, Any]) -> str:
    power = f" degree {setting['degree']}," if "degree" in setting else ""
    return f"{setting['kernel']},{power} alpha {setting['alpha']:g}, bandwidth {setting['bandwidth']:.3g}"
