"""How alike two representations of the same prompts are, against chance; and how many directions one of them uses.

A representation is (n, width): row i belongs to prompt i in both, the widths may differ. Three measures, none of which
changes under a rotation, a shift or a rescaling of either side:

    cka         cosine of the centred linear Gram matrices, in [−1, 1]; debiased, so that unrelated
                representations come out at 0 whatever their widths (the plain one tends to 1 as width / n grows)
    svcca       mean canonical correlation of the leading principal components, in [0, 1]; chance is not 0
    procrustes  distance after the best rotation, both centred and of norm 1, in [0, √2]; a metric

The measures weigh directions differently, cka by squared variance, procrustes by its root, svcca all the same: a
statement that holds for one of them only is a statement about those directions. None has a zero that means "unrelated"
for every width, n and spectrum, so :func:`compare` also permutes the rows: the same pair of representations whose
prompts no longer belong together. It needs rows that could be exchanged: one row a prompt, not several positions of
one.

Sources: debiased CKA is the cosine of U-centred Gram matrices (Székely & Rizzo 2014), equal to the ratio of unbiased
HSIC of Song et al. 2012; CKA: Kornblith et al. 2019; SVCCA: Raghu et al. 2017; Procrustes: Williams et al. 2021;
effective rank: Roy & Vetterli 2007.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from hooks.brief import brief
from hooks.errors import BadArgument, NonFinite, told
from interp import seeds
from interp.arguments import one_of, whole_number
from interp.machine.progress import followed

Rows = Float[Tensor, "n width"]
"""Row i is prompt i. The other side's rows are named apart and compared in words, with both numbers in the message."""
MEASURES = ("cka", "svcca", "procrustes")


@dataclass(frozen=True)
class Similarity:
    """A measure for every pair of two lists of representations; all arrays are (x, y).

    value      the measure
    null_mean  its mean over permutations of the rows
    null_edge  95th percentile over permutations; for a distance the 5th
    p          (1 + permutations at least as alike) / (1 + n_perm), pair by pair
    p_family   the same for the most alike pair of each permutation: ≤ α anywhere is wrong with chance α for all pairs
    edge       95th percentile over permutations of the most alike pair; for a distance the 5th
    n, n_perm  rows, permutations
    """

    measure: str
    value: NDArray[np.float64]
    null_mean: NDArray[np.float64]
    null_edge: NDArray[np.float64]
    p: NDArray[np.float64]
    p_family: NDArray[np.float64]
    edge: float
    n: int
    n_perm: int

    __repr__ = brief


def cka(x: Rows, y: Float[Tensor, "same_n other"], debiased: bool = True) -> float:
    """Linear CKA ⟨K, L⟩ / (‖K‖ ‖L‖) of the centred Gram matrices K = x xᵀ, L = y yᵀ.

    Debiased: U-centred, off the diagonal only, so its mean under independence is 0 and it may be negative. Plain:
    double-centred, in [0, 1]. Raises :class:`BadArgument` for fewer than 4 rows or a representation without variance.
    """
    x, y = _pair(x, y)
    return float((_gram(x, debiased) * _gram(y, debiased)).sum())


def svcca(x: Rows, y: Float[Tensor, "same_n other"], components: int | None = None, share: float = 0.99) -> float:
    """Mean canonical correlation between the leading principal components of both.

    ``components``: how many of each; else as many as hold ``share`` of the variance. The mean is over the smaller of
    the two numbers. Two unrelated sets of k components have a mean of about sqrt(k / n) already.
    """
    x, y = _pair(x, y)
    return float(_all_pairs(_whitened(x, components, share)[None], _whitened(y, components, share)[None], mean=True))


def procrustes(x: Rows, y: Float[Tensor, "same_n other"], components: int | None = None) -> float:
    """min over rotations Q of ‖x̂ − ŷ Q‖_F = sqrt(2 − 2 ‖x̂ᵀŷ‖_*), x̂ and ŷ centred and of Frobenius norm 1.

    ``components`` keeps that many principal components of each (before the norms are set to 1).
    """
    x, y = _pair(x, y)
    return float(_distance(_all_pairs(_scaled(x, components)[None], _scaled(y, components)[None])))


def compare(
    xs: Iterable[Tensor],
    ys: Iterable[Tensor],
    measure: str = "cka",
    *,
    components: int | None = None,
    n_perm: int = 200,
    seed: int = 0,
) -> Similarity:
    """``measure`` between every representation in ``xs`` and in ``ys`` (layers, say), beside its permutation null.

    All rows of all representations are the same prompts in the same order. One permutation serves all pairs of a
    draw. ``components``: principal components that svcca and procrustes keep (svcca: 99 % of the variance if None).
    Costs n_perm · pairs products of (n · n) numbers for cka, singular values of (components · components) otherwise.
    Raises :class:`BadArgument` for an unknown measure, different numbers of rows, or a constant representation.
    """
    one_of("measure", measure, MEASURES)
    whole_number("n_perm", n_perm, least=1)
    left, right = [_centred(x) for x in xs], [_centred(y) for y in ys]
    sizes = {len(x) for x in (*left, *right)}
    if len(sizes) != 1:
        raise BadArgument(f"compare needs rows of the same prompts on both sides; there are {sorted(sizes)} rows")
    n = sizes.pop()
    prepare, permuted, score = _method(measure, components)
    a, b = _stack([prepare(x) for x in left]), _stack([prepare(y) for y in right])
    found = score(a, b)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.stack([score(a, permuted(b, seeds.order(n, generator))) for _ in followed(range(n_perm), measure)])
    # A distance is more alike where it is smaller.
    sign = -1.0 if measure == "procrustes" else 1.0
    alike, chance = sign * found, sign * draws
    slack = 1e-10  # a permutation that changes nothing must count as equal in any rounding
    beyond = (chance >= alike - slack).sum(0)
    best = chance.flatten(1).amax(1)
    anywhere = (best[:, None, None] >= alike - slack).sum(0)
    return Similarity(
        measure,
        value=found.numpy(),
        null_mean=draws.mean(0).numpy(),
        null_edge=(sign * chance.quantile(0.95, dim=0)).numpy(),
        p=((1 + beyond).double() / (1 + n_perm)).numpy(),
        p_family=((1 + anywhere).double() / (1 + n_perm)).numpy(),
        edge=sign * float(best.quantile(0.95)),
        n=n,
        n_perm=n_perm,
    )


def effective_rank(matrices: Float[Tensor, "*many rows columns"]) -> Float[Tensor, "*many"]:
    """exp(−Σ p ln p) with p = σ / Σ σ, the singular values of each matrix as it is given (not centred).

    From 1 to the rank; k equal singular values give k. A matrix of zeros has 0.
    """
    return _entropy_rank(_singular(matrices))


def participation_ratio(matrices: Float[Tensor, "*many rows columns"]) -> Float[Tensor, "*many"]:
    """(Σ σ²)² / Σ σ⁴: like :func:`effective_rank`, but a long tail of small singular values hardly counts."""
    power = _singular(matrices).square()
    total = power.sum(-1)
    return torch.where(total > 0, total.square() / power.square().sum(-1).clamp(min=1e-300), torch.zeros_like(total))


def varies(rows: Rows) -> bool:
    """Whether the rows differ by more than rounding; what is the same for every prompt cannot be compared."""
    rows = rows.double()
    return float((rows - rows.mean(0)).norm()) > 1e-12 * max(float(rows.norm()), 1e-300)


def coordinates(rows: Rows) -> Float[Tensor, "n few"]:
    """The rows in at most n coordinates with the same inner products, in fp64.

    Wide states of few prompts take n · width numbers and every method that only rotations leave alone (principal
    components, ridge, the three measures, ranks across rows) sees no difference.
    """
    rows = rows.double()
    n, width = rows.shape
    if width <= n:
        return rows
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    return vectors * values.clamp(min=0).sqrt()


def leading(rows: Rows, components: int) -> Float[Tensor, "n k"]:
    """The rows on their first principal components: all that svcca and procrustes see of them with ``components``.

    Once for each representation, where :func:`compare` would find them again for each pair of lists.
    """
    left, size = _principal(_centred(rows), components)
    return left * size


Prepare = Callable[[Tensor], Tensor]


def _method(
    measure: str, components: int | None
) -> tuple[Prepare, Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """What is computed once from each side, how its rows are permuted, and the measure for all pairs."""
    if measure == "cka":
        return _above, _reordered, lambda a, b: 2 * a @ b.T

    def rows(features: Tensor, order: Tensor) -> Tensor:
        return features[:, order]

    if measure == "svcca":
        return (lambda x: _whitened(x, components, 0.99)), rows, lambda a, b: _all_pairs(a, b, mean=True)
    return (lambda x: _scaled(x, components)), rows, lambda a, b: _distance(_all_pairs(a, b))


def _above(x: Tensor) -> Float[Tensor, "pairs"]:
    """The debiased Gram matrix above its diagonal, which is 0: half of it is all of it."""
    gram = _gram(x)
    i, j = torch.triu_indices(len(x), len(x), 1, device=x.device)
    return gram[i, j]


def _reordered(halves: Float[Tensor, "y pairs"], order: Int[Tensor, "n"]) -> Float[Tensor, "y pairs"]:
    """:func:`_above` of the same rows in this order: entry (i, j) is that of (order[i], order[j])."""
    n = len(order)
    i, j = order[torch.triu_indices(n, n, 1, device=order.device)]
    low, high = torch.minimum(i, j), torch.maximum(i, j)
    return halves[:, low * (2 * n - low - 1) // 2 + high - low - 1]


def _all_pairs(a: Float[Tensor, "x n k"], b: Float[Tensor, "y n m"], mean: bool = False) -> Float[Tensor, "x y"]:
    """‖aᵀb‖_*, the sum of the singular values; with ``mean`` divided by the smaller number of columns in use."""
    # One product of two matrices: many small ones take three times as long.
    joined = rearrange(a, "x n k -> (x k) n") @ rearrange(b, "y n m -> n (y m)")
    products = rearrange(joined, "(x k) (y m) -> x y k m", x=len(a), y=len(b))
    total = torch.linalg.svdvals(products).sum(-1)
    return total / torch.minimum(_used(a)[:, None], _used(b)[None]) if mean else total


def _used(a: Float[Tensor, "*x n k"]) -> Int[Tensor, "*x"]:
    """Columns that are not filled up with zeros."""
    return (a.abs().sum(-2) > 0).sum(-1)


def _distance(overlap: Tensor) -> Tensor:
    return (2 - 2 * overlap).clamp(min=0).sqrt()


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """The parts on a new first axis; columns of zeros fill up the narrower ones, which changes no product."""
    width = max(part.shape[-1] for part in parts)
    return torch.stack([torch.nn.functional.pad(part, (0, width - part.shape[-1])) for part in parts])


def _gram(x: Tensor, debiased: bool = True) -> Float[Tensor, "n n"]:
    """The centred Gram matrix of norm 1; U-centred with a diagonal of zeros if ``debiased``."""
    n = len(x)
    gram = x @ x.T
    if debiased:
        gram.fill_diagonal_(0)
        row = gram.sum(0) / (n - 2)
        gram = gram - row - row[:, None] + gram.sum() / ((n - 1) * (n - 2))
        gram.fill_diagonal_(0)
    return gram / gram.norm()


def _principal(x: Tensor, components: int | None) -> tuple[Tensor, Tensor]:
    """Left singular vectors (n, k) and singular values (k,) of ``x``, without those that are rounding."""
    if components is not None:
        whole_number("components", components, least=1)
    left, size, _ = torch.linalg.svd(x, full_matrices=False)
    keep = int((size > size[0] * max(x.shape) * torch.finfo(x.dtype).eps).sum())
    keep = keep if components is None else min(keep, components)
    return left[:, :keep], size[:keep]


def _whitened(x: Tensor, components: int | None, share: float) -> Tensor:
    left, size = _principal(x, components)
    if components is None:
        held = size.square().cumsum(0) / size.square().sum()
        left = left[:, : int((held < share).sum()) + 1]
    return left


def _scaled(x: Tensor, components: int | None) -> Tensor:
    left, size = _principal(x, components)
    return left * (size / size.norm())


def _singular(matrices: Tensor) -> Tensor:
    if not bool(matrices.isfinite().all()):
        raise NonFinite("a matrix with NaN or inf has no rank; find it before asking")
    return torch.linalg.svdvals(matrices.double())


def _entropy_rank(size: Float[Tensor, "*many k"]) -> Float[Tensor, "*many"]:
    total = size.sum(-1, keepdim=True)
    share = size / total.clamp(min=1e-300)
    return torch.where(total[..., 0] > 0, torch.special.entr(share).sum(-1).exp(), torch.zeros_like(total[..., 0]))


def _pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if len(x) != len(y):
        raise BadArgument(
            f"two representations of the same prompts have as many rows; these have {len(x)} and {len(y)}"
        )
    return _centred(x), _centred(y)


def _centred(x: Tensor) -> Tensor:
    """``x`` in fp64, its mean over rows taken off; refused where nothing would be left."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise BadArgument(f"a representation is {told(x)}: give a real tensor (n, width)")
    if x.ndim != 2 or len(x) < 4:
        raise BadArgument(f"a representation is (n, width) with n of at least 4; this one is {tuple(x.shape)}")
    if not bool(x.isfinite().all()):
        raise NonFinite("a representation holds NaN or inf; find it before comparing")
    if not varies(x):
        raise BadArgument("a representation is the same for every prompt: it has no variance to compare")
    x = x.double()
    return x - x.mean(0)
