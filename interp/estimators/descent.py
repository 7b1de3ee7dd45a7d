"""The last step of each solver of ``interp.estimators.iterative``, which has the others too; those are not kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from interp.estimators import iterative
from interp.estimators.base import Estimator, Pairs


def gd(steps: int, rate: float | None = None, over: str = "means") -> Estimator:
    """``steps`` steps of gradient descent from w = 0 (``iterative.gd_path``); towards ``ols``.

    ``over``: the gradient of the mean of the k squares, or of their sum ("sums"), which makes the same ``rate`` k times
    as large.
    """
    return _tried(lambda pairs: iterative.gd_path(pairs.x, pairs.y, [steps], rate, spectrum=_of(pairs, over))[-1])


def gdpp(
    steps: int,
    rate: float | None = None,
    gamma: float | None = None,
    form: str = "iterated",
    over: str = "means",
) -> Estimator:
    """``steps`` steps of GD++, preconditioned by I - γ A (``iterative.gdpp_path`` says how); towards ``ols``.

    ``over``: whether A, ``rate`` and ``gamma`` are for means over the k pairs or for "sums".
    """

    def predict(pairs: Pairs) -> Tensor:
        of = _of(pairs, over)
        return iterative.gdpp_path(pairs.x, pairs.y, [steps], rate, gamma, form, spectrum=of)[-1]

    return _tried(predict)


def newton(steps: int) -> Estimator:
    """``steps`` steps of Newton's iteration for the inverse (``iterative.newton_path``); towards ``ols``, fast."""
    return _tried(lambda pairs: iterative.newton_path(pairs.x, pairs.y, [steps])[-1])


def online_gd(rate: float, forgetting: float = 1.0, form: str = "residual") -> Estimator:
    """One pass through the pairs, each a gradient step (``iterative.online_gd_path``); 0 at k = 0."""
    return _tried(lambda pairs: iterative.online_gd_path(pairs.x, pairs.y, [(rate, forgetting)], form)[0])


def _of(pairs: Pairs, over: str) -> iterative.Spectrum:
    return iterative.Spectrum.of(pairs.x, pairs.y, over)


def _tried(predict: Estimator) -> Estimator:
    """``predict``, after it has answered one small prompt: an option that does not work is refused here."""
    predict(_Small(torch.ones(1, 2, 1, device="cpu"), torch.ones(1, 2, device="cpu")))
    return predict


@dataclass(frozen=True)
class _Small:
    x: Float[Tensor, "batch n_pairs d"]
    y: Float[Tensor, "batch n_pairs"]
