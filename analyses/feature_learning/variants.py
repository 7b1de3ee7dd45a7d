"""A Mamba with one nonlinearity taken out of the way from a label to what it writes: as a config, and as an edit.

    constant-step   Δ is a constant for each channel
    tangent-step    softplus gives way to its tangent at the channel's bias
    linear-gate     SiLU(z) gives way to z

Retrained, a model has learned to do without; only ablated, it is the trained model with the one thing changed. Both
are the same function of their weights (``models/mamba.py``), which the analysis checks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

import hooks
from hooks.errors import BadArgument, unknown

VARIANTS: dict[str, dict[str, str]] = {
    "constant-step": {"selection": "constant_step"},
    "tangent-step": {"step": "tangent"},
    "linear-gate": {"gate": "linear"},
}
"""What each changes in the model's config."""
PUBLISHED = {"selection": "content", "step": "softplus", "gate": "silu"}


def variant_of(cfg: Any) -> str | None:
    """Which of ``VARIANTS`` this config is; None for the published block.

    Raises :class:`BadArgument` for a model that is no Mamba, and for one with several of the changes.
    """
    changed = {name: getattr(cfg, name, None) for name in PUBLISHED if getattr(cfg, name, None) != PUBLISHED[name]}
    if not changed:
        return None
    found = [name for name, change in VARIANTS.items() if change == changed]
    if not found:
        raise BadArgument(f"a model with {changed} is none of {', '.join(VARIANTS)}, nor the published Mamba")
    return found[0]


@contextmanager
def ablated(model: Any, variant: str | None, means: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Inside the block ``model`` runs with one thing changed and its weights as they are; None changes nothing.

    ``means`` are records of ``hook_delta`` on other prompts: "constant-step" takes each channel's mean over them.
    """
    if variant is None:
        yield
        return
    with hooks.edit(model, edits(model, variant, means)):
        yield


def edits(model: Any, variant: str, means: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """``{site: edit}`` that makes ``variant`` of a trained Mamba.

    The tangent needs u and the linear gate z, of which softplus(u) and SiLU(z) are another site. Each is kept when it
    passes its own, in the same run: one recorded in another would not have what an edit of the layers before has made
    of it. The decay's tangent is held at 0, as in the config.
    """
    mixers = [name.rsplit(".", 1)[0] for name in hooks.resolve(model, "*.hook_delta")]
    if variant == "constant-step":
        if means is None:
            raise BadArgument("the constant step is a mean over other prompts: give a record of their hook_delta")
        return {f"{mixer}.hook_delta": hooks.mean(("batch", "pos"), reference=means) for mixer in mixers}
    if variant not in VARIANTS:
        raise BadArgument(unknown("variant", variant, VARIANTS))
    found: dict[str, Any] = {}
    for mixer in mixers:
        kept = _Kept(None if variant == "linear-gate" else model.get_submodule(mixer).dt_proj.bias.detach())
        if variant == "linear-gate":
            found |= {f"{mixer}.hook_gate_pre": kept.keep, f"{mixer}.hook_gate": kept.give}
        else:
            found |= {f"{mixer}.hook_delta_pre": kept.keep, f"{mixer}.hook_delta_decay": kept.held}
            found |= {f"{mixer}.hook_delta_write": kept.tangent}
    return found


class _Kept:
    """What passed one site, for a later one of the same run."""

    def __init__(self, bias: Float[Tensor, "d_inner"] | None) -> None:
        self.bias, self.value = bias, torch.empty(0, device="cpu")

    def keep(self, value: Tensor) -> Tensor:
        self.value = value
        return value

    def give(self, value: Tensor) -> Tensor:
        return self.value.clone()

    def tangent(self, value: Tensor) -> Tensor:
        assert self.bias is not None
        at = self.bias.to(self.value)
        return F.softplus(at) + torch.sigmoid(at) * (self.value - at)

    def held(self, value: Tensor) -> Tensor:
        return self.tangent(value).clamp(min=0)
