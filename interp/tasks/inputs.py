"""Gaussian inputs of a prompt: isotropic, skewed, or in half of the dimensions; trace d in each case.

Source: arXiv 2208.01066 and 2402.03170 §3, and their released samplers.
"""

from __future__ import annotations

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from hooks.errors import BadArgument
from interp import seeds
from interp.arguments import one_of

COVARIANCES = ("isotropic", "skewed", "half_subspace")

X = Float[Tensor, "batch n_pairs d"]


def covariance_of(name: object, d: int) -> str:
    """``name``, if inputs of d coordinates can have that covariance; else ``BadArgument``."""
    covariance = one_of("covariance", name, COVARIANCES)
    if covariance == "half_subspace" and d < 2:
        raise BadArgument(f'covariance="half_subspace" needs a half of d={d} coordinates; give d of at least 2')
    return covariance


def rank(covariance: str, d: int) -> int:
    """The number of dimensions that the inputs of a prompt fill."""
    return d // 2 if covariance == "half_subspace" else d


def draw(n: int, n_pairs: int, d: int, covariance: str, generator: torch.Generator) -> X:
    """x of this covariance, for each prompt along axes of its own.

    isotropic      x ~ N(0, I)
    skewed         x = z T, z ~ N(0, I), T = U diag(1, 1/2, … 1/d) Uᵀ sqrt(d / Σ i⁻²): eigenvalues ∝ i⁻²
    half_subspace  x = z U diag(1, … 1, 0, … 0) Uᵀ sqrt(d / m), with m = d // 2 ones

    U is random and orthogonal, drawn for each prompt. The released code draws one for each batch, or one for a whole
    evaluation: then prompts share their covariance and so part of their error, an interval over prompts that takes
    them as independent is too narrow, and the result depends on the batch size. The distribution of one prompt is the
    same either way.
    """
    x = seeds.normal((n, n_pairs, d), generator)
    return x if covariance == "isotropic" else stretch(x, covariance, generator)


def stretch(z: X, covariance: str, generator: torch.Generator) -> X:
    """z U diag(·) Uᵀ, one U for each prompt, with the diagonal that ``draw`` states for this covariance.

    U is the Q of a Gaussian matrix's QR decomposition. Its columns carry LAPACK's signs and so are
    not Haar distributed, but a sign cancels in U diag(·) Uᵀ.
    """
    n, _, d = z.shape
    count = torch.arange(1, d + 1, dtype=z.dtype, device=z.device)
    spread = 1 / count if covariance == "skewed" else (count <= d // 2).to(z)
    spread = spread * (d / spread.square().sum()).sqrt()
    rotation, _ = torch.linalg.qr(seeds.normal((n, d, d), generator))
    along = einsum(z, rotation, "b k i, b i j -> b k j") * spread
    return einsum(along, rotation, "b k j, b i j -> b k i")
