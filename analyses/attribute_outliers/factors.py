"""Why an outlier contributes less: its contribution through one layer's scan, split over the factors it is made of.

Through the scan of one layer the token s contributes to the prediction, to first order,

    c_s = Σ_{t ≥ s} Σ_{c,n} g_t[c] gate_t[c] C_t[n] (∏_{s<r≤t} decay_r[c,n]) write_s[c] B_s[n] x_s[c]

summed over the readers t (the query, and in all but the last layer also the tokens between, since later layers read
them), channels c and states n. g_t is the gradient of the prediction at the gated output of t, held: norms, later
layers and the read-out linearised. Where the model has no output gate, g is the gradient at y.

The comparison is between two runs: the prompt, and the same prompt with its outliers clean (``outlier_prompts``: each
example's own clean twin). All five factors are those that the runs used, at the same readers t and the same source s,
so that they can be exchanged one by one:

    match         B_s with the C_t of its readers
    write         what scales the input: Δ_s under Euler's rule, 1 − exp(−Δ_s) under zero-order hold with A = −1
    value         x_s
    forgetting    the decays after s; they can change because the convolution and the layers below show s to later
                  tokens. What s itself forgets is in no factor: it acts on earlier tokens
    output gate   SiLU(z_t) of the readers. At the query of the first layer of a Mamba it cannot change, since no
                  earlier token reaches z there; at s itself, and in later layers, it can

f(S) has the factors in S from the twin's run and the others from the outlier's; Shapley values over the 32 subsets sum
to f(all) − f(none) exactly, with g held at the mean ḡ of the two runs. What the change of g itself adds is the sixth
number, ``following``: a u − b v = ½(a + b)(u − v) + ½(a − b)(u + v), so the six sum to the whole difference of the two
first-order contributions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.brief import brief
from hooks.errors import BadArgument
from interp.attention.recurrence import observe
from interp.attribute import gradients
from interp.metric import Metric
from interp.shapley import shapley

FACTORS = ("match", "write", "value", "forgetting", "output gate")
CHUNK = 64
"""Prompts at a time."""
PRODUCT = 1e-4
"""Largest deviation of write · B · x from what was written, relative, that is rounding."""
NEEDED = ("hook_B", "hook_C", "hook_x", "hook_decay", "hook_write", "hook_y")

Inner = Float[Tensor, "batch pos d_inner"]
States = Float[Tensor, "batch pos d_inner n"]


@dataclass(frozen=True)
class Factors:
    """What one run's contributions through one layer are made of, in double precision."""

    key: Float[Tensor, "batch pos #d_inner n"]
    """B, with a channel axis of 1 where all channels share it."""
    query: Float[Tensor, "batch pos d_inner n"]
    """C."""
    write: Inner
    value: Inner
    decay: States
    gate: Inner
    gradient: Inner
    """g."""
    error: float
    """The largest |write · B · x − what the run wrote|, relative to the largest of the latter."""

    __repr__ = brief

    def reach(self) -> Float[Tensor, "batch pos d_inner n"]:
        """λ_s = Σ_{t ≥ s} g_t gate_t C_t ∏_{s<r≤t} decay_r: what a unit in the state after s is worth."""
        seeds = (self.gradient * self.gate)[..., None] * self.query
        found = [seeds[:, -1]]
        for t in range(seeds.shape[1] - 2, -1, -1):
            found.append(seeds[:, t] + self.decay[:, t + 1] * found[-1])
        return torch.stack(found[::-1], dim=1)

    def contributions(self) -> Float[Tensor, "batch pos"]:
        """c_s of every token."""
        return ((self.reach() * self.key).sum(-1) * self.write * self.value).sum(-1)


@dataclass(frozen=True)
class Split:
    """The difference twin − outlier of the weighted sum of first-order contributions, each (prompt,)."""

    factors: Float[Tensor, "factor prompt"]
    """Shapley values, in the order of ``FACTORS``, g held at the mean of the two runs."""
    following: Float[Tensor, "prompt"]
    """Of the change of g."""
    outlier: Float[Tensor, "prompt"]
    twin: Float[Tensor, "prompt"]

    __repr__ = brief

    @property
    def gap(self) -> float:
        """The largest |sum of the six − difference|, relative to the largest |contribution|."""
        off = (self.factors.sum(0) + self.following - (self.twin - self.outlier)).abs()
        size = torch.maximum(self.outlier.abs(), self.twin.abs())
        return float(off.max() / size.max().clamp(min=1e-300)) if len(off) else 0.0


def factors(model: Any, x: Float[Tensor, "batch pos d_token"], layer: int, scalar: Metric) -> Factors:
    """The five factors and g of ``layer`` in the run on ``x``; ``scalar`` is the prediction, output → (batch,).

    Raises :class:`BadArgument` where the layer lacks a site, naming it, and where what it writes is not the product of
    a factor for each channel, B and x.
    """
    stem = f"blocks.{layer}.mixer."
    lacking = [kind for kind in NEEDED if stem + kind not in model.hook_dict]
    if lacking:
        name = getattr(model, "architecture", type(model).__name__)
        raise BadArgument(f"layer {layer} of this {name} has no {', '.join(lacking)}, which the factors are made of")
    seen = observe(model, x, layer)
    gated = "hook_gated" if stem + "hook_gated" in model.hook_dict else "hook_y"
    _, slopes = gradients(model, x, stem + gated, scalar)
    query = seen.rows(torch.ones_like(seen.x)).double()
    if query.is_complex():
        raise BadArgument(f"layer {layer} has complex states, whose phases are no factor of their own")
    key = _by_channel(seen.sites["hook_B"].double(), seen.x.shape[-1])
    value = seen.x.double()
    write, error = _write(seen.write.double(), key, value, seen.sites)
    if error > PRODUCT:
        raise BadArgument(
            f"what layer {layer} writes is not (Δ, 1 − exp(−Δ) or 1) · B · x: its largest deviation is {error:.1g}"
        )
    gate = seen.sites["hook_gate"].double() if gated == "hook_gated" else torch.ones_like(value)
    return Factors(key, query, write, value, seen.decay.double(), gate, slopes[stem + gated].double(), error)


def split(
    model: Any,
    outlier: Float[Tensor, "batch pos d_token"],
    twin: Float[Tensor, "batch pos d_token"],
    weight: Float[Tensor, "batch pos"],
    layer: int,
    scalar: Metric,
) -> Split:
    """The difference of Σ_s weight_s c_s between the two prompts, split over the factors.

    ``weight`` picks the tokens and gives them a sign, 0 for the others. Raises as :func:`factors`.
    """
    parts = []
    for start in range(0, len(outlier), CHUNK):
        part = slice(start, start + CHUNK)
        ours, theirs = (factors(model, prompts[part], layer, scalar) for prompts in (outlier, twin))
        parts.append(split_factors(ours, theirs, weight[part]))
    if not parts:
        raise BadArgument("there is no prompt to split a contribution of")
    joined = (torch.cat([getattr(p, name) for p in parts], dim=-1) for name in _FIELDS)
    return Split(**dict(zip(_FIELDS, joined, strict=True)))


_FIELDS = ("factors", "following", "outlier", "twin")


def split_factors(outlier: Factors, twin: Factors, weight: Float[Tensor, "batch pos"]) -> Split:
    """The split from the factors of the two runs."""
    mean = (outlier.gradient + twin.gradient) / 2
    held = [replace(side, gradient=mean) for side in (outlier, twin)]
    worth: dict[tuple[bool, ...], Inner] = {}

    def value(changed: tuple[bool, ...]) -> Float[Tensor, "prompt"]:
        match, write, x, forgetting, gate = changed
        if (match, forgetting, gate) not in worth:
            mixed = replace(held[match], decay=held[forgetting].decay, gate=held[gate].gate)
            worth[match, forgetting, gate] = (mixed.reach() * mixed.key).sum(-1)
        return _summed(worth[match, forgetting, gate] * held[write].write * held[x].value, weight)

    shares = shapley(value, len(FACTORS))
    ours, theirs = (_summed(side.contributions()[..., None], weight) for side in (outlier, twin))
    following = (theirs - ours) - (value((True,) * 5) - value((False,) * 5))
    return Split(shares, following, ours, theirs)


def _summed(values: Inner, weight: Float[Tensor, "batch pos"]) -> Float[Tensor, "prompt"]:
    return (values.sum(-1) * weight).sum(-1)


def _by_channel(key: Tensor, channels: int) -> Float[Tensor, "batch pos channel n"]:
    """``key`` (batch, pos, n), or (batch, pos, head, n) with the heads' channels one head after the other."""
    if key.ndim == 3:
        return key[:, :, None]
    return key.repeat_interleave(channels // key.shape[2], dim=2)


def _write(written: States, key: Tensor, value: Inner, sites: Mapping[str, Tensor]) -> tuple[Inner, float]:
    """What the layer writes for each unit of B and x, by the rule that gives back what it wrote, and how well it does.

    Euler's Δ, the zero-order hold's 1 − exp(−Δ) for A = −1, or 1 where there is no Δ.
    """
    delta = sites.get("hook_delta_write")
    rules = [torch.ones_like(value)] if delta is None else [delta.double(), -torch.expm1(-delta.double())]
    size = float(written.abs().max())
    errors = [float(((rule * value)[..., None] * key - written).abs().max()) / (size or 1.0) for rule in rules]
    best = min(range(len(rules)), key=errors.__getitem__)
    return rules[best], errors[best]
