"""Keeping torch.compile out of code whose hooks come later, without paying for the compiler when nobody compiles."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


def never_compiled(function: F) -> F:
    """``torch.compiler.disable(function)``: a compiled forward would not see hooks that are added to it later.

    torch's own decorator loads the whole compiler (1 to 4 seconds) when the module that uses it is imported. Here it is
    applied at the first call after somebody else has loaded the compiler, which whoever compiles a model has.
    """

    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    return cast(F, call)
