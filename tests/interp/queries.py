"""A class of functions in which the query of a prompt has another prompt's label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from interp.tasks.base import Batch


class OtherQueries:
    """A class of functions whose last label goes to another prompt's query.

    What a class of functions must have stands here by name: since Python 3.12 a protocol does not see what
    ``__getattr__`` would find.
    """

    def __init__(self, functions: Any) -> None:
        self.functions = functions

    def __getattr__(self, name: str) -> Any:
        return getattr(self.functions, name)

    @property
    def scale(self) -> float:
        return self.functions.scale

    def draw(self, n: int, active: int, generator: torch.Generator) -> dict[str, Tensor]:
        return self.functions.draw(n, active, generator)

    def __call__(self, x: Tensor, truth: Mapping[str, Tensor]) -> Tensor:
        y = self.functions(x, truth).clone()
        y[:, -1] = y[:, -1].roll(1)
        return y

    def variables(self, batch: Batch) -> dict[str, Tensor]:
        return self.functions.variables(batch)

    def rivals(self, batch: Batch) -> dict[str, Tensor]:
        return self.functions.rivals(batch)
