"""What an estimator is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from interp.arguments import whole_number


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


def exact(pairs: Pairs) -> tuple[Float[Tensor, "batch n_pairs d"], Float[Tensor, "batch n_pairs"]]:
    """(x, y) in fp64 on the CPU, cut off from any gradient."""
    return pairs.x.detach().cpu().double(), pairs.y.detach().cpu().double()


def only(ks: Sequence[int] | None, n_pairs: int) -> list[int]:
    """The numbers of examples to predict after, ascending and each once: ``ks``, or all of 0 … n_pairs - 1.

    Raises ``BadArgument`` for a k that these prompts do not reach.
    """
    return list(range(n_pairs)) if ks is None else sorted({whole_number("ks", k, 0, n_pairs - 1) for k in ks})


def blank(pairs: Pairs, ks: Sequence[int]) -> Float[Tensor, "batch n_pairs"]:
    """Predictions to fill in, in fp64: NaN at every k that was not asked, and 0 elsewhere."""
    found = torch.full(pairs.y.shape, torch.nan, dtype=torch.float64, device="cpu")
    found[:, list(ks)] = 0
    return found
