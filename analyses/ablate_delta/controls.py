"""Controls of an ablation of Δ: edits that should do nothing, that remove as much at random, or that add as much
noise.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

import hooks
from analyses.ablate_delta.effects import Ablation, Cell, edits
from hooks.errors import BadArgument
from hooks.inputs import fed
from interp import seeds
from interp.patch.knockout import CutTaps, through_taps
from interp.stats import Interval, ratio
from interp.variance import content_variance


def identity(model: Any) -> dict[str, Any]:
    """Edits that return what they are given, at every site that an ablation touches."""
    names = hooks.resolve(model, lambda name: name.rsplit(".", 1)[-1] in _TOUCHED)
    return {name: torch.clone for name in names}


_TOUCHED = ("hook_delta", "hook_delta_decay", "hook_delta_write", "hook_B", "hook_C", "hook_gate")


def freeze_and_cut_taps(runs: Ablation, kind: str) -> dict[str, Any]:
    """Freezing the tokens of one kind, and cutting their share through later tokens' convolution taps as well.

    A frozen token is neither written nor forgotten in its own scan step, but the d_conv − 1 tokens after it still hold
    it in their own input. Here that part is subtracted from their ``hook_x_pre``.
    """
    at = runs.reference.of_kind(kind)
    made: dict[str, Any] = {}
    for layer, block in enumerate(runs.model.blocks):
        stem = f"blocks.{layer}.mixer"
        cut = CutTaps(block.mixer.conv1d.weight, lambda batch, length: _reached(at, length, own=False))
        made[f"{stem}.hook_x_in"] = cut.see
        made[f"{stem}.hook_x_pre"] = cut.subtract
        made[f"{stem}.hook_delta"] = hooks.zero(pos=at)
    return made


def tap_share(runs: Ablation, kind: str) -> Interval:
    """For each layer (layers,): the share of tokens of ``kind`` in the convolution's output at the other tokens, in the
    run in which those of ``kind`` are frozen in every layer.

    With p = Σ taps that reach such a token and r = Σ the other taps (without the bias): ‖p‖² ÷ (‖p‖² + ‖r‖²), each
    summed over the other tokens, the channels and the evaluated prompts; between 0 and 1, though p and r may cancel.
    The interval is over prompts.
    """
    at = runs.reference.of_kind(kind)
    tokens = fed(runs.model, runs.batch.tokens)
    with hooks.edit(runs.model, edits(Cell(f"freeze:{kind}"), runs.model, runs.reference)):
        record = hooks.record(runs.model, tokens, "*.hook_x_in")
    parts, both = [], []
    for layer, block in enumerate(runs.model.blocks):
        x_in, weight = record[f"blocks.{layer}.mixer.hook_x_in"], block.mixer.conv1d.weight.detach()
        length = x_in.shape[1]
        others = torch.ones(length, dtype=torch.bool, device=x_in.device)
        others[at] = False
        mask = _reached(at, length, own=False)
        rest = _reached(torch.arange(length, device="cpu"), length, own=True) & ~mask
        part, other = (
            through_taps(x_in, weight, pairs.to(x_in.device))[:, others].square().sum((1, 2)) for pairs in (mask, rest)
        )
        parts.append(part)
        both.append(part + other)
    of_kind, of_both = (torch.stack(found, dim=1).double().cpu().numpy() for found in (parts, both))
    return ratio(of_kind, of_both)


def _reached(at: Tensor, length: int, *, own: bool) -> Bool[Tensor, "1 source target"]:
    """The pairs of the tokens ``at`` with every later one, and with ``own`` with themselves."""
    mask = torch.zeros(1, length, length, dtype=torch.bool, device="cpu")
    mask[:, at] = True
    return mask.triu(diagonal=0 if own else 1)


def noise(runs: Ablation, seed: int) -> dict[str, Any]:
    """Δ times e^ε, where ε has the size that content has in log Δ of that channel and kind of token.

    The same amount of variation that ``position-mean`` takes away, added on top, and without any meaning; multiplying
    keeps Δ > 0.
    """
    made: dict[str, Any] = {}
    for name in hooks.resolve(runs.model, "*.hook_delta"):
        log_delta = runs.reference.record[name].log()
        content = log_delta.var(dim=0, unbiased=False)
        spread = torch.empty_like(content)
        for kind in runs.reference.kinds.unique():
            here = runs.reference.kinds == kind
            spread[here] = content[here].mean(dim=0).sqrt()
        made[name] = _Noise(spread, seed, int(name.split(".")[1]))
    return made


class _Noise:
    """Multiplies by lognormal noise; every chunk of prompts gets its own draw, the same in every run."""

    def __init__(self, spread: Tensor, seed: int, layer: int) -> None:
        self.spread = spread
        self.generator = seeds.generator("noise", seed, layer)

    def __call__(self, delta: Tensor) -> Tensor:
        draw = seeds.normal(delta.shape, self.generator).to(delta)
        return delta * (draw * self.spread).exp()


def channel_sets(runs: Ablation, share: float, seed: int, draws: int = 5) -> dict[str, dict[str, Any]]:
    """Mean-ablation of ``share`` of each layer's channels: those whose log Δ has most content variance, and random
    ones.

    ``{"most content": edits, "random 1": edits, …}``; the random sets are as large and may overlap the first.
    Raises :class:`BadArgument` for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise BadArgument(f"channel_share is {share}: give a share in (0, 1]")
    names = hooks.resolve(runs.model, "*.hook_delta")
    content = content_variance(runs.reference.record.stack("*.hook_delta").log())
    count = math.ceil(share * content.shape[1])
    generator = seeds.generator("channels", seed)
    picks = {"most content": [row.topk(count).indices for row in content]}
    for draw in range(draws):
        picks[f"random {draw + 1}"] = [seeds.order(len(row), generator)[:count] for row in content]
    return {
        which: {
            name: hooks.set_to(runs.reference.mean("mean", name)[..., chosen], channels=chosen)
            for name, chosen in zip(names, channels, strict=True)
        }
        for which, channels in picks.items()
    }
