"""A class of functions in which the query of a prompt has another prompt's label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


class OtherQueries:
    """A class of functions whose last label goes to another prompt's query."""

    def __init__(self, functions: Any) -> None:
        self.functions = functions

    def __getattr__(self, name: str) -> Any:
        return getattr(self.functions, name)

    def __call__(self, x: Tensor, truth: Mapping[str, Tensor]) -> Tensor:
        y = self.functions(x, truth).clone()
        y[:, -1] = y[:, -1].roll(1)
        return y
