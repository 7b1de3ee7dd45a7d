"""What a recurrence makes of a label: the label transform of its writes, and that transform's Hermite coefficients.

A layer that adds T(y_i) x_i up holds n c_1 β after n pairs, with c_1 = E[T(g(z)) z] and z = ⟨β, x⟩; where it adds
T(y_i) He_2(x_i) up it is c_2 that counts. Of a link with E[g(z) z] = 0 the label itself has c_1 = 0, and only a T that
is not linear finds β (arXiv 2510.12026; its gate makes y σ(ρ y + b) of y). Here T is measured at a token whose label
says nothing of its own x: the label is g(z) + ζ with z on a grid, and x is drawn apart. Then, of the write's entries,

    t(y) = E[write ⊗ φ(x) | y]        φ: the coordinates of x in β's subspace (order 1), or their He_2 (order 2)
    A_k  = E[t(y) He_k(z) / sqrt(k!)]        what natural tokens, with z = ⟨β, x⟩, would write of degree k

so that the mean write under β has A_1 times β (order 1), or A_2 times ββᵀ (order 2), and nothing else of that order.
What t is without the label, its mean A_0, is taken off. t has one entry for each of the write's: its spectrum
‖A_k‖² / E‖t‖² says how much of it has degree k, and along the entries that carry most of the degree that finds β it is
one curve, with signed coefficients. Those entries are chosen on one half of the prompts, the curve is measured on the
other.

z and ζ are integrated and not drawn, so that only x and the context before the token are random; each x stands with
every label and comes with −x, so that what does not follow the label cancels. Squares are estimated by products between
different prompts, without the noise of x: they may come out below 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

import hooks
from hooks.brief import brief
from hooks.inputs import fed
from interp import seeds
from interp.stats import Interval, bootstrap
from interp.tasks.base import Batch
from interp.tasks.single_index import NODES, hermite_sum

TOP = 5
"""The highest degree that is measured."""
REACH, SPACING = 5.0, 0.25
"""The grid of z. Of E[He_3²] less than 1e-3 lies beyond; for what is smooth on its scale the sum is exact to that."""
BINS = 14
SITES = ("hook_delta_write", "hook_B", "hook_x")
Values = Float[Tensor, "batch sign label entry"]


@dataclass(frozen=True)
class Labels:
    """Labels and their chance: z on a grid, with the noise that each may have."""

    z: Float[Tensor, "label"]
    y: Float[Tensor, "label"]
    weight: Float[Tensor, "label"]

    __repr__ = brief

    @property
    def projection(self) -> Float[Tensor, "label degree"]:
        """What of a function of the label gives its Hermite coefficients."""
        return self.weight[:, None] * hermites(self.z)


def labels(task: Any) -> Labels:
    """The labels of a single-index task; noise of the form "gaussian" by three nodes."""
    z = torch.arange(-REACH, REACH + SPACING / 2, SPACING, dtype=torch.float64, device="cpu")
    nodes = {"sign": ([-1.0, 1.0], [0.5, 0.5]), "gaussian": ([-(3**0.5), 0.0, 3**0.5], [1 / 6, 2 / 3, 1 / 6])}
    noise, chance = (z.new_tensor(part) for part in nodes[task.noise.form])
    y = task.functions.g(z)[:, None] + task.noise.size * noise
    weight = torch.exp(-z.square() / 2)[:, None] * chance
    return Labels(z.repeat_interleave(len(noise)), y.flatten(), (weight / weight.sum()).flatten())


@dataclass(frozen=True)
class Unpaired:
    """Tokens whose label says nothing of their x; axis ``sign``: x and −x.

    tokens  (batch, sign, label, length, d_token): one pair each; length is 2 where x and y are tokens of their own
    inside  coordinates of x in the subspace that β is drawn from
    """

    tokens: Float[Tensor, "batch 2 label length d_token"]
    labels: Labels
    inside: Float[Tensor, "batch 2 label r"]

    __repr__ = brief


def unpaired(task: Any, n: int, generator: torch.Generator) -> Unpaired:
    """Every label of :func:`labels` for each of ``n`` prompts, with one x ~ N(0, I) and its opposite."""
    every = labels(task)
    half = seeds.normal((n, 1, 1, task.d), generator)
    x = torch.cat([half, -half], dim=1).expand(-1, -1, len(every.y), -1)
    y = every.y.to(x).expand(x.shape[:3])
    if task.layout.tokens == "joint":
        tokens = torch.cat([x, y[..., None]], dim=-1)[..., None, :]
    else:
        label = torch.zeros_like(x)
        label[..., 0] = y
        tokens = torch.stack([x, label], dim=-2)
    return Unpaired(tokens, every, (x @ task.functions.subspace.T).double())


def features(inside: Float[Tensor, "*batch r"], order: int) -> Float[Tensor, "*batch feature"]:
    """1, the coordinates, or their orthonormal polynomials of degree 2, for order 0, 1, 2."""
    if order == 0:
        return torch.ones_like(inside[..., :1])
    if order == 1:
        return inside
    squares = (inside.square() - 1) / 2**0.5
    products = [inside[..., i] * inside[..., j] for i, j in combinations(range(inside.shape[-1]), 2)]
    return torch.cat([squares, torch.stack(products, dim=-1)], dim=-1)


@dataclass(frozen=True)
class Writes:
    """Of one layer, at every unpaired token: Δ as it writes, and B and x of the write Δ B x."""

    step: Float[Tensor, "batch sign label d_inner"]
    key: Float[Tensor, "batch sign label d_state"]
    value: Float[Tensor, "batch sign label d_inner"]

    __repr__ = brief

    def write(self, held: bool = False) -> Values:
        """Δ B x in one row; ``held``: with each channel's Δ at its mean over these tokens."""
        step = self.step.mean((0, 1, 2), keepdim=True) if held else self.step
        return ((step * self.value)[..., None] * self.key[..., None, :]).flatten(3)


def writes(model: Any, context: Batch, asked: Unpaired, k: int) -> list[Writes]:
    """Each layer's writes of the unpaired tokens, every one alone after the first ``k`` examples of its prompt."""
    n, signs, count, length, _ = asked.tokens.shape
    state = None
    with torch.no_grad():
        if k:
            _, state = model(fed(model, context.tokens[:, : k * length]), return_state=True)
            state = [type(layer)(*(_repeated(part, signs * count) for part in layer)) for layer in state]
        tokens = fed(model, asked.tokens.flatten(0, 2))
        found = hooks.record(model, tokens, [f"*.{site}" for site in SITES], state=state)
    columns = [
        [
            value[:, -1].unflatten(0, (n, signs, count)).double().cpu()
            for name, value in found.items()
            if name.endswith(site)
        ]
        for site in SITES
    ]
    return [Writes(*layer) for layer in zip(*columns, strict=True)]


@dataclass(frozen=True)
class Transform:
    """A label transform t(y).

    share        ‖A_k‖² / E‖t‖² for k = 0 … TOP, 0 at k = 0; over all k they sum to 1, less what the noise moves
    coefficient  signed A_k along the chosen entries ÷ the root mean square of t along them
    at, curve    t along them ÷ the same, (3, bin): mean, low, high of equally probable labels near ``at``

    Where E‖t‖² is smaller than its own standard error, that takes its place in the shares: t is not told from nothing.
    What noise is in the curve adds to its mean square, and makes the coefficients smaller.
    """

    share: Interval
    coefficient: Interval
    at: Float[np.ndarray, "bin"]
    curve: Float[np.ndarray, "3 bin"]

    __repr__ = brief


def transform(
    values: Values, asked: Unpaired, order: int, degree: int, n_boot: int = 400, seed: int = 0
) -> Transform | None:
    """The label transform of ``values``, of this order in x; the curve is along the entries that carry most of
    ``degree``. None where nothing moves with the token.

    Intervals: bootstrap over prompts; a resample leaves out the products of a prompt with itself.
    """
    moved = _Moved(values, features(asked.inside, order), asked.labels)
    weight, project = asked.labels.weight, asked.labels.projection
    n = len(values)
    sums, whole = weight.new_zeros(n, TOP + 1, moved.width), weight.new_zeros(n, n)
    for j, w in enumerate(weight):
        part = moved.at(j)
        whole += w * (part @ part.T)
        sums += project[j][:, None] * part[:, None]
    if float(whole.trace()) <= 1e-18 * moved.size:
        return None
    share = _share(torch.einsum("pke,qke->kpq", sums, sums).numpy(), whole.numpy(), n_boot, seed)

    fitting, judging = slice(0, n // 2), slice(n // 2, n)
    along = sums[fitting, degree].mean(0)
    along = along / along.norm().clamp(min=1e-300)
    t = torch.stack([moved.at(j)[judging] @ along for j in range(len(weight))], dim=1).numpy()
    at, near = _near(asked.labels)
    scaled = _scaled(t, weight.numpy(), np.concatenate([project.numpy(), near], axis=1), n_boot, seed)
    ends = np.stack([scaled.mean, scaled.low, scaled.high])
    mean, low, high = ends[:, : TOP + 1]
    coefficient = Interval(mean, low, high, scaled.n)
    return Transform(share, coefficient, at, ends[:, TOP + 1 :])


class _Moved:
    """write ⊗ φ(x) less its mean over labels, the mean of x and −x, label by label: all would not fit into memory."""

    def __init__(self, values: Values, phi: Float[Tensor, "batch 2 label feature"], every: Labels) -> None:
        values = values.double()
        self.values = values - torch.einsum("bsle,l->bse", values, every.weight)[:, :, None]
        self.phi = phi
        self.width = values.shape[-1] * phi.shape[-1]
        self.size = float(torch.einsum("bsle,bslf,l->", values.square(), phi.square(), every.weight))

    def at(self, label: int) -> Float[Tensor, "batch width"]:
        return torch.einsum("bse,bsf->bef", self.values[:, :, label], self.phi[:, :, label]).flatten(1) / 2


def hermites(z: Tensor) -> Float[Tensor, "*batch degree"]:
    """He_k(z) / sqrt(k!) for k = 0 … TOP on a last axis."""
    return torch.stack([hermite_sum([0.0] * k + [1.0], z) for k in range(TOP + 1)], dim=-1)


def exact(task: Any, label: Callable[[Tensor], Tensor]) -> Float[np.ndarray, "degree"]:
    """The coefficients of t = ``label`` less its mean, ÷ the root mean square, by Gauss–Hermite quadrature.

    Noise of the form "sign" has two values; a Gaussian one is integrated as well.
    """
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(NODES))
    weights = weights / weights.sum()
    if task.noise.form == "sign":
        noise, chance = nodes.new_tensor([-1.0, 1.0]), nodes.new_tensor([0.5, 0.5])
    else:
        noise, chance = nodes, weights
    t = label(task.functions.g(nodes)[:, None] + task.noise.size * noise)
    t = t - weights @ t @ chance
    root = float((weights @ t.square() @ chance) ** 0.5)
    found: NDArray[np.float64] = (hermites(nodes).mT * weights @ (t @ chance)).numpy() / root
    return found


def even(task: Any) -> bool:
    """Whether the link is even, so that the sign of β cannot be found and degree 2 is the lowest that says anything."""
    z = torch.linspace(0.1, 3.0, 30, dtype=torch.float64, device="cpu")
    g = task.functions.g
    return bool(torch.allclose(g(z), g(-z), rtol=1e-9, atol=1e-9))


def _share(degrees: NDArray[np.float64], whole: NDArray[np.float64], n_boot: int, seed: int) -> Interval:
    """Products between prompts of each degree over those of the whole."""
    products = np.concatenate([degrees, whole[None]])
    own = np.diagonal(products, axis1=1, axis2=2)

    def squares(chosen: NDArray[np.float64]) -> NDArray[np.float64]:
        count = _count(chosen, len(whole))
        return np.asarray(((products @ count) @ count - own @ count**2) / (count.sum() ** 2 - (count**2).sum()))

    def last(chosen: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(squares(chosen)[-1])

    prompts = np.arange(len(whole))
    below = bootstrap(prompts, n_boot=n_boot, seed=seed, statistic=last)
    least = max(float(below.high - below.low) / 3.92, 1e-300)

    def shares(chosen: NDArray[np.float64]) -> NDArray[np.float64]:
        found = squares(chosen)
        return np.asarray(found[:-1] / max(float(found[-1]), least))

    return bootstrap(prompts, n_boot=n_boot, seed=seed, statistic=shares)


def _scaled(
    t: NDArray[np.float64], weight: NDArray[np.float64], project: NDArray[np.float64], n_boot: int, seed: int
) -> Interval:
    """The mean of t (prompt, label) over prompts, times ``project``, ÷ its root mean square over labels."""

    def scaled(some: NDArray[np.float64]) -> NDArray[np.float64]:
        mean = some.mean(0)
        return np.asarray(mean @ project / max(float(mean**2 @ weight), 1e-300) ** 0.5)

    return bootstrap(t, n_boot=n_boot, seed=seed, statistic=scaled)


def _count(chosen: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    return np.bincount(chosen.astype(np.int64), minlength=n).astype(float)


def _near(every: Labels) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean labels of ``BINS`` groups of about equal probability, neighbours together, and what averages over each."""
    y, weight = every.y.numpy(), every.weight.numpy()
    order = np.argsort(y, kind="stable")
    below = np.cumsum(weight[order]) - weight[order] / 2
    groups = np.empty(len(y), np.int64)
    groups[order] = np.minimum((below * BINS).astype(np.int64), BINS - 1)
    near = weight[:, None] * (groups[:, None] == np.unique(groups))
    near = near / near.sum(0)
    return y @ near, near


def _repeated(part: Tensor | None, times: int) -> Tensor | None:
    return None if part is None else part.repeat_interleave(times, 0)
