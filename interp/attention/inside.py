"""What is inside an attribution through a scan: the scan alone, the convolution in front of it, the output gate.

In a Mamba block x_t = SiLU(u_t) with u_t = Σ_k w_k x_in_{t−K+1+k} + b, so a token acts on the scan through the K writes
after it as well. With σ(u) held, SiLU(u) = σ(u) u is linear, and each x_t splits exactly over K tokens, the bias, and
the inputs from before the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

import hooks
from hooks.errors import BadArgument, unknown
from interp.arguments import listed
from interp.attention.recurrence import Recurrence

INSIDE = ("scan", "taps", "gate")
_TAPS = ("hook_x_in", "hook_x_pre", "hook_conv_init")
_GATE = ("hook_gate",)


@dataclass(frozen=True)
class Inside:
    """What was asked for."""

    taps: bool
    gate: bool

    @property
    def names(self) -> tuple[str, ...]:
        """In words, the scan first."""
        return ("scan", *(name for name in INSIDE[1:] if getattr(self, name)))

    @property
    def sites(self) -> tuple[str, ...]:
        """The kinds of site that this needs beyond those of the scan."""
        return (*(_TAPS if self.taps else ()), *(_GATE if self.gate else ()))


def inside_of(asked: str | Sequence[str]) -> Inside:
    """``asked`` read: one of ``INSIDE`` or several; the scan is always inside. Raises :class:`BadArgument`."""
    names = listed("inside", asked)
    for name in names:
        if not isinstance(name, str) or name not in INSIDE:
            raise BadArgument(unknown("part to have inside", name, INSIDE))
    return Inside("taps" in names, "gate" in names)


@dataclass(frozen=True)
class Shares:
    """Something that was split over x_s (last axis), split over the inputs of the convolution instead."""

    values: Float[Tensor, "batch d_inner query pos"]
    """For each unit of ``hook_x_in``."""
    conv_bias: Float[Tensor, "batch d_inner query"]
    conv_init: Float[Tensor, "batch d_inner query"]
    edited: Float[Tensor, "batch d_inner query"]
    """What an edit of ``hook_x`` or ``hook_x_pre`` put there and the convolution did not; 0 without one."""


@dataclass(frozen=True)
class Taps:
    """x_s = Σ_k gain_k · source_{s−K+1+k} + bias + edited, with K taps; all (batch, d_inner, pos)."""

    gain: Float[Tensor, "taps batch d_inner pos"]
    source: Float[Tensor, "batch d_inner pos"]
    before: Float[Tensor, "batch d_inner past"]
    bias: Float[Tensor, "batch d_inner pos"]
    edited: Float[Tensor, "batch d_inner pos"] | None

    def of_channels(self, channels: Int[Tensor, "channel"]) -> Taps:
        """The same for some channels."""
        edited = None if self.edited is None else self.edited[:, channels]
        return Taps(
            self.gain[:, :, channels],
            self.source[:, channels],
            self.before[:, channels],
            self.bias[:, channels],
            edited,
        )

    def split(self, values: Float[Tensor, "batch d_inner query pos"]) -> Shares:
        """``values`` for each unit of x, as shares of what x is made of."""
        length, count = values.shape[-1], self.gain.shape[0]
        tokens, first = torch.zeros_like(values), torch.zeros_like(values[..., 0])
        for k in range(count):
            back = min(count - 1 - k, length)  # how far before the write its source lies
            reached = values * self.gain[k, :, :, None]
            tokens[..., : length - back] += reached[..., back:]
            first += (reached[..., :back] * self.before[:, :, None, k : k + back]).sum(-1)
        nothing = torch.zeros_like(first)
        rest = nothing if self.edited is None else (values * self.edited[:, :, None]).sum(-1)
        return Shares(tokens, (values * self.bias[:, :, None]).sum(-1), first, rest)


def taps_of(model: Any, layer: int, seen: Recurrence) -> Taps:
    """The taps of the layer that was observed; raises :class:`BadArgument` where x is not SiLU of a depthwise
    convolution, channel for channel.
    """
    mixer = model.blocks[layer].mixer
    axes = {site.name: site.axes for site in hooks.sites(model)}
    if axes[f"blocks.{layer}.mixer.hook_x_pre"] != axes[f"blocks.{layer}.mixer.hook_x"]:
        raise BadArgument(f"the convolution of layer {layer} has other channels than its x: leave the taps out")
    x_in, x_pre, before = (seen.sites[kind].to(seen.x.dtype).transpose(1, 2) for kind in _TAPS)
    before = before.transpose(1, 2)
    weight = mixer.conv1d.weight.detach().to(x_in)[:, 0]
    slope = torch.sigmoid(x_pre)
    gain = slope * weight.T[:, None, :, None]
    bias = (
        torch.zeros_like(slope) if mixer.conv1d.bias is None else slope * mixer.conv1d.bias.detach().to(x_in)[:, None]
    )
    edited = None
    if {"hook_x", "hook_x_pre"} & seen.changed:
        padded = torch.cat([before, x_in], dim=-1).unfold(-1, weight.shape[1], 1)
        edited = seen.x.transpose(1, 2) - slope * (padded * weight[:, None]).sum(-1) - bias
    return Taps(gain, x_in, before, bias, edited)
