"""Solvers that approach least squares step by step, for every prompt, every k and every step at once.

With A = (1/k) Σ_{i<k} x_i x_iᵀ = V diag(λ) Vᵀ and b = (1/k) Σ_{i<k} y_i x_i, each of them is a filter of A's spectrum,

    w_t = V diag(f_t(λ)) Vᵀ b,        f_t(λ) = (1 - r_t(λ)) / λ,

where r_t is the share of least squares' answer that is still missing along an eigenvector after t steps:

    gradient descent   r_t = (1 - η λ)^t
    GD++, once         r_t = (1 - η λ')^t                 λ' = λ (1 - γ λ)²
    GD++, iterated     r_t = Π_{s<t} (1 - η_s λ_s)        λ_{s+1} = λ_s (1 - γ_s λ_s)²
    Newton             r_t = (1 - λ² / |A²|_F)^(2^t)

So one decomposition for each prompt and k gives all of them. It costs accuracy only along directions whose λ is below
1e-13 of the largest: those are left out, as least squares of minimum norm leaves out what is absent.
With sums in the place of means (A = Σ x_i x_iᵀ, b = Σ y_i x_i) the filters are the same: a rate η or a γ that is the
same for every k is then k times as large in the unit of the means. It is all that an attention without normalisation
can do, and it is how the published constructions write their η and γ for prompts of one length.
Sources: arXiv 2212.07677 (GD++), 2310.17086 (Newton), 2509.23779 §3 (online descent with forgetting), 2402.03170 §3.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from hooks.brief import brief
from hooks.errors import BadArgument, told
from interp.arguments import one_of, whole_number
from interp.estimators.base import in_parts, room_for

ABSENT = 1e-13
"""An eigenvalue smaller than this, relative to the largest, is rounding of the decomposition."""

X = Float[Tensor, "batch n_pairs d"]
Y = Float[Tensor, "batch n_pairs"]
Path = Float[Tensor, "step batch n_pairs"]
Steps = int | Sequence[int]
"""``t``: after 0, 1, … t steps; ``[t, …]``: after these alone, ascending, and nothing is kept of the others."""
Eigen = Float[Tensor, "batch n_pairs d"]


@dataclass(frozen=True)
class Spectrum:
    """What the prediction of example k needs of the k pairs before it, in the eigenbasis of their A.

    values     λ, ascending; 0 where a direction is absent
    products   (v·x_k)(v·b), so that a filter's prediction is Σ_v f(λ_v) products_v

    Of means, A and b as above, or of sums: k times both.
    """

    values: Eigen
    products: Eigen

    __repr__ = brief

    @staticmethod
    def of(x: X, y: Y, over: str = "means") -> Spectrum:
        """The spectrum for every prompt and k, in fp64 on the CPU; all zero at k = 0. ``over``: "means" or "sums"."""
        one_of("over", over, ("means", "sums"))
        inputs, labels = x.detach().cpu().double(), y.detach().double().cpu()
        n, n_pairs, d = inputs.shape
        room_for(4 * n * n_pairs * d, f"the eigenvalues of {n} × {n_pairs} examples of d={d}", "give fewer prompts")
        values, products = in_parts(_eigen, n_pairs * d * d, inputs, labels).unbind(1)
        if over == "sums":
            count = torch.arange(n_pairs, dtype=inputs.dtype, device=inputs.device).clamp(min=1)[:, None]
            values, products = values * count, products * count
        return Spectrum(values, products)

    @property
    def weight(self) -> Eigen:
        """What each direction adds to the prediction of least squares."""
        return self.products / self.values.masked_fill(self.values == 0, 1.0)

    def predict(self, missing: Iterable[Eigen]) -> Path:
        """Predictions of the filters (1 - missing) / λ, one for each step; one step's is held at a time."""
        weight = self.weight
        return torch.stack([einsum(1 - share, weight, "b k v, b k v -> b k") for share in missing])

    def best_rate(self, values: Eigen | None = None) -> Float[Tensor, "batch n_pairs 1"]:
        """2 / (λ_max + λ_min) over the directions that are present: the fastest fixed step. 0 at k = 0.

        And 0 where all ``values`` are below fp64, as those of GD++ are after 900 steps: nothing is missing by then.
        """
        values = self.values if values is None else values
        present = self.values > 0
        low = values.masked_fill(~present, torch.inf).amin(-1, keepdim=True)
        rate = 2 / (values.amax(-1, keepdim=True) + low)
        return torch.where(rate.isfinite(), rate, 0.0)


def gd_path(x: X, y: Y, steps: Steps, rate: float | None = None, *, spectrum: Spectrum | None = None) -> Path:
    """Predictions of gradient descent after 0, 1, … ``steps`` steps from w = 0: entry t is after t steps.

    w ← w - rate (A w - b), the gradient of (1/2k) Σ_{i<k} (y_i - w·x_i)². ``rate=None`` is 2 / (λ_max + λ_min) of each
    prompt and k, λ_min the smallest that is not zero; the path then ends at least squares of minimum norm. A number is
    the same for all; it diverges where it exceeds 2 / λ_max. ``spectrum``: of the same x and y, if it is at hand; with
    that of sums the gradient is of ½ Σ_{i<k} (y_i - w·x_i)², and the rate is for it.
    """
    asked = _asked(steps, y)
    of = spectrum or Spectrum.of(x, y)
    eta = of.best_rate() if rate is None else positive("rate", rate)
    shrink = 1 - eta * of.values
    return of.predict(shrink**t for t in asked).to(y)


def gdpp_path(
    x: X,
    y: Y,
    steps: Steps,
    rate: float | None = None,
    gamma: float | None = None,
    form: str = "iterated",
    *,
    spectrum: Spectrum | None = None,
) -> Path:
    """Predictions of GD++ after 0, 1, … ``steps`` steps: descent on inputs that (I - γ A) has made rounder.

    form="iterated"   every step, of von Oswald et al.: y's residuals take a gradient step on the current inputs, then
                      all inputs, the query too, become (I - γ A) x with the A of the current inputs
    form="once"       the inputs are transformed once, before the first step, as in arXiv 2402.03170

    A has 1/k in it, so a γ for XᵀX is k times smaller; with the ``spectrum`` of sums A is XᵀX. ``rate=None`` is
    2 / (λ_max + λ_min) of the current inputs, ``gamma=None`` is 1 / (3 λ_max), the largest that keeps the eigenvalues
    in order. With both the path ends at least squares.
    """
    asked = _asked(steps, y)
    one_of("form", form, ("iterated", "once"))
    of = spectrum or Spectrum.of(x, y)

    def shares() -> Iterator[Eigen]:
        values = of.values
        missing = torch.ones_like(values)
        if form == "once":
            values = _rounder(values, gamma)
        while True:
            yield missing
            eta = of.best_rate(values) if rate is None else positive("rate", rate)
            missing = missing * (1 - eta * values)
            if form == "iterated":
                values = _rounder(values, gamma)

    return of.predict(_after(asked, shares())).to(y)


def newton_path(x: X, y: Y, steps: Steps, *, spectrum: Spectrum | None = None) -> Path:
    """Predictions of w = M_t b after 0, 1, … ``steps`` steps of M ← M (2 I - A M) from M_0 = A / |A Aᵀ|_F.

    The iteration of Newton and Schulz for A's inverse (its pseudo-inverse where A is singular). Entry 0 is M_0 b and
    not zero; the missing share is squared at each step.
    """
    asked = _asked(steps, y)
    of = spectrum or Spectrum.of(x, y)
    square = of.values.square()
    size = square.square().sum(-1, keepdim=True).sqrt()
    start = 1 - square / size.masked_fill(size == 0, 1.0)

    def shares() -> Iterator[Eigen]:
        missing = start
        while True:
            yield missing
            missing = missing.square()

    return of.predict(_after(asked, shares())).to(y)


def online_gd_path(x: X, y: Y, settings: Sequence[tuple[float, float]], form: str = "residual") -> Path:
    """Predictions of one pass through the pairs, for each ``(rate, forgetting)`` of ``settings``.

        w_{k+1} = a w_k + rate e_k x_k,        w_0 = 0,    a = forgetting in (0, 1]

    form="residual"   e_k = y_k - a w_k·x_k: stochastic gradient descent (Widrow and Hoff), each pair once
    form="label"      e_k = y_k: gradients taken at w = 0. The recursion of arXiv 2509.23779 with rate = (1 - a) β;
                      its query decays the state once more, so its prediction is a times this one
    """
    one_of("form", form, ("residual", "label"))
    for rate, forgetting in settings:
        positive("rate", rate)
        if not 0 < forgetting <= 1:
            raise BadArgument(f"forgetting={told(forgetting)} does not work; give a number in (0, 1], 1 for nothing")
    given = torch.tensor(settings, dtype=torch.float64, device="cpu")
    return online_pass(x.detach().cpu().double(), y.detach().cpu().double(), given, form).to(y)


def online_pass(x: X, y: Y, settings: Float[Tensor, "setting 2"], form: str = "residual") -> Path:
    """``online_gd_path`` in the dtype of ``x``, for settings that need no check."""
    rates, keep = settings.reshape(-1, 2).to(x).T[:, :, None]
    w = x.new_zeros(len(rates), len(x), x.shape[-1])
    path = []
    for k in range(x.shape[1]):
        newest = x[:, k]
        predicted = einsum(w, newest, "s b i, b i -> s b")
        path.append(predicted)
        error = y[:, k] - (keep * predicted if form == "residual" else 0)
        w = keep[..., None] * w + (rates * error)[..., None] * newest
    return torch.stack(path, dim=2)


def sums_before(terms: Float[Tensor, "batch n_pairs *rest"]) -> Float[Tensor, "batch n_pairs *rest"]:
    """Σ_{i<k} terms_i for every k along axis 1.

    By shifting, not by subtracting term k from the sum up to k: at k = 0 it is then exactly zero.
    """
    sums = torch.zeros_like(terms)
    sums[:, 1:] = terms[:, :-1].cumsum(dim=1)
    return sums


def _asked(steps: Steps, y: Y) -> list[int]:
    """The steps whose predictions are kept, if there is room for them."""
    if isinstance(steps, int) or not isinstance(steps, Sequence):
        asked = list(range(whole_number("steps", steps, least=0) + 1))
    else:
        asked = sorted({whole_number("steps", t, least=0) for t in steps})
    # Twice: in fp64, and in the dtype of y.
    shape = " × ".join(map(str, (len(asked), *y.shape)))
    room_for(2 * len(asked) * y.numel(), f"{shape} predictions", f"keep fewer steps, as steps=[{asked[-1]}]")
    return asked


def _after(asked: Sequence[int], shares: Iterable[Eigen]) -> Iterator[Eigen]:
    """Of ``shares``, one for each step from 0 on, those after the steps ``asked``, which ascend."""
    wanted = set(asked)
    return (share for t, share in enumerate(islice(shares, asked[-1] + 1)) if t in wanted)


def _eigen(x: X, y: Y) -> Float[Tensor, "batch two n_pairs d"]:
    """The values and the products of a ``Spectrum``, side by side."""
    count = torch.arange(x.shape[1], dtype=x.dtype, device=x.device).clamp(min=1)
    covariance = sums_before(einsum(x, x, "b k i, b k j -> b k i j")) / count[:, None, None]
    moment = sums_before(y[..., None] * x) / count[:, None]
    values, vectors = torch.linalg.eigh(covariance)
    present = values > ABSENT * values[..., -1:].clamp(min=0)
    along = einsum(vectors, x, "b k i v, b k i -> b k v")
    products = along * einsum(vectors, moment, "b k i v, b k i -> b k v")
    return torch.stack([values * present, products * present], dim=1)


def _rounder(values: Eigen, gamma: float | None) -> Eigen:
    """The eigenvalues of A after x ← (I - γ A) x."""
    top = values.amax(-1, keepdim=True)
    contraction = values / (3 * top.masked_fill(top == 0, 1.0)) if gamma is None else positive("gamma", gamma) * values
    return values * (1 - contraction).square()


def positive(name: str, value: object, hint: str = "") -> float:
    """``value`` as a float, if it is a finite number above 0; else ``BadArgument``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise BadArgument(f"{name}={told(value)} does not work; give a positive number{hint}")
    return float(value)
