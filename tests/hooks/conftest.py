"""Tiny models whose sites matter, and a look at what each test left on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", {}),
    "lti": ("mamba", {"selective": False}),
    "s4d": ("s4d", {}),
    "s4": ("s4", {}),
    "linear": ("linear_attention", {"n_heads": 2, "d_mlp": 16}),
}
TABLES = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    *("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"),
)


def build(variant: str = "mamba", dtype: torch.dtype = torch.float64, **config: Any) -> Any:
    """A model of 2 layers, width 8, 4 states, whose weights are noisy enough for every site to change the output."""
    import models  # not above: this file is loaded before the import hook that checks shapes is in place

    name, given = VARIANTS[variant]
    shape = {"d_model": 8, "n_layers": 2, "d_in": 5, "d_out": 2, **given, **config}
    if name != "linear_attention":
        shape = {"d_state": 4, **shape}
    model = models.build(name, **shape).to(dtype)
    with torch.no_grad():
        for weight, parameter in model.named_parameters():
            parameter += 0.3 * torch.randn_like(parameter)
            if weight.endswith(("dt_proj.bias", "dt_bias", "log_dt")):
                parameter += 2  # steps around 0.1 … 1, so that a state is both kept and forgotten
    return model.eval()


def left_on(model: nn.Module) -> list[str]:
    """One line for each hook, edit or switch that is on ``model``."""
    found = []
    for name, module in model.named_modules():
        own = module.__dict__
        found += [f"{name}.{table}" for table in TABLES if own.get(table)]
        if isinstance(module, HookPoint):
            found += [f"{name}.{kind}" for kind in ("fwd_hooks", "bwd_hooks", "interrupts", "exposed") if own.get(kind)]
    if getattr(model, "context_level", 0):
        found.append(f"context_level {model.context_level}")
    return found


@pytest.fixture
def make() -> Iterator[Callable[..., Any]]:
    """``build``; every model that it made must be bare again when the test ends."""
    made: list[Any] = []

    def build_and_note(*args: Any, **kwargs: Any) -> Any:
        made.append(build(*args, **kwargs))
        return made[-1]

    yield build_and_note
    leftovers = [line for model in made for line in left_on(model)]
    assert not leftovers, f"left behind: {leftovers}"


@pytest.fixture
def leftovers() -> Callable[[nn.Module], list[str]]:
    """The function that lists what is on a model."""
    return left_on


@pytest.fixture
def x() -> Tensor:
    """Four prompts of 11 tokens, fp64."""
    return torch.randn(4, 11, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def count_fused(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often the fused path of the mixers has run since the last time this was asked."""
    from models import mamba, s4

    calls = [0]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(mamba, "selective_scan", counted(mamba.selective_scan))
    monkeypatch.setattr(mamba, "convolution", counted(mamba.convolution))
    monkeypatch.setattr(s4, "convolution", counted(s4.convolution))

    def since() -> int:
        count, calls[0] = calls[0], 0
        return count

    return since
