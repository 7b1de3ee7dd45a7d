"""A small transformer for the tests of its function and of its sites, and the bare TransformerLens model beside it."""

from __future__ import annotations

from typing import Any

import torch

import models


def small(dtype: torch.dtype = torch.float64, seed: int = 0, **config: Any) -> Any:
    """A small transformer with noise on every weight, so that norms and biases count too."""
    torch.manual_seed(seed)
    fields = {"d_model": 12, "n_layers": 2, "n_heads": 3, "d_mlp": 20, "d_in": 5, "d_out": 2, "n_ctx": 32, **config}
    model = models.build("transformer", **fields).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def bare_bridge() -> Any:
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge.sources.native import boot as boot_native

    return boot_native(
        TransformerBridgeConfig(
            d_model=12, d_head=4, n_heads=3, n_layers=2, n_ctx=32, d_vocab=1, d_mlp=20, act_fn="gelu", eps=1e-5
        )
    )


def left_on(model: Any) -> list[str]:
    """The parts of ``model`` that carry a hook."""
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "fwd_hooks", "bwd_hooks")
    return [name for name, part in model.named_modules() if any(part.__dict__.get(table) for table in tables)]
