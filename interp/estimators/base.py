"""What an estimator is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.errors import TooLarge
from hooks.memory import free_memory
from interp.arguments import whole_number

ENTRIES = 2**20
"""Numbers of one temporary of ``in_parts``: 8 MB, which a cache holds."""


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


def in_parts(function: Callable[..., Tensor], per_prompt: int, *tensors: Tensor) -> Tensor:
    """``function`` of some prompts at a time, along axis 0, where each needs a temporary of ``per_prompt`` numbers."""
    size = max(1, ENTRIES // max(1, per_prompt))
    return torch.cat([function(*part) for part in zip(*(tensor.split(size) for tensor in tensors), strict=True)])


def room_for(numbers: int, what: str, hint: str) -> None:
    """Nothing, if so many fp64 numbers fit in half of the free memory; else ``TooLarge``, before they are made."""
    limit = free_memory(torch.device("cpu")) // 2
    if 8 * numbers > limit:
        raise TooLarge(
            f"{what} take {8 * numbers / 1e9:.3g} GB, allowed are {limit / 1e9:.3g}, half of what is free: {hint}"
        )


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
