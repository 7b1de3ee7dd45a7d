"""What each source token contributes to one scalar through one layer's scan, in O(pos · d_inner · d_state).

    scalar = Σ_t g_t · (y_t + D x_t) = Σ_s (λ_s · write_s) + λ_0 decay_0 h_0 + edits + Σ_t g_t · D x_t

with λ from the adjoint recurrence (``recurrence``). For ``weights`` g, any linear function of that layer's
scan output, this is exact: Δ, B, C and the gate are held, and no token is changed. For a ``scalar`` of the model's
output g is its gradient at the scan's output, all that follows linearised: then the contributions are *first order*
(``exact`` is False), they sum to g · (y + D x) and not to the prediction, and ``finite=True`` sets beside them what
do(write_s := 0) really does, and the gap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

import hooks
from hooks.brief import brief
from hooks.edits import Edit, Index, indices
from hooks.errors import BadArgument, told
from hooks.gradients import refuse_gradients
from hooks.inputs import gradients_can_be, readable
from hooks.onlookers import watched
from interp.attention.inside import Inside, inside_of, taps_of
from interp.attention.recurrence import Inner, Recurrence, edited, mixer_of, observe
from interp.machine.progress import followed

Prompts = Float[Tensor, "batch"]
Scalar = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Finite:
    """The effect of do(write_s := 0) on the scalar, for some tokens: scalar of the run − scalar without that write."""

    pos: Int[Tensor, "token"]
    effect: Float[Tensor, "batch token"]
    gap: Float[Tensor, "batch token"]
    """``effect`` − the first-order contribution of that write: what the linearisation misses."""

    __repr__ = brief


@dataclass(frozen=True)
class Contributions:
    """``total`` split over tokens, h_0, the convolution's bias and past, edits, and D x: they sum to it."""

    by_channel: Inner
    """What the token at ``pos`` contributes through each channel: its write, or with taps its input."""
    state_init: Prompts
    conv_bias: Prompts
    """With taps: of the convolution's bias, at all positions. Else 0."""
    conv_init: Prompts
    """With taps: of the inputs from before the prompt. Else 0."""
    edited: Prompts
    """Of what edits have put into the state or into x; 0 without edits."""
    skip: Float[Tensor, "batch pos"]
    """Of D x at each position; 0 in a layer without D."""
    total: Prompts
    """Σ weights · (y + D x), with the gate inside Σ weights · (y + D x) · gate."""
    exact: bool
    """True for a linear function of the scan's output; False: first order."""
    scalar: Prompts | None
    """The scalar of the model's output that was linearised."""
    finite: Finite | None
    layer: int
    inside: tuple[str, ...]
    error: float
    """The largest |sum of all parts − total|."""
    relative_error: float
    """The largest of that ÷ the sum of the absolute values of all parts, token by token and channel by channel."""

    __repr__ = brief

    @property
    def tokens(self) -> Float[Tensor, "batch pos"]:
        """What each token contributes, summed over channels in double precision."""
        return self.by_channel.sum(-1, dtype=torch.float64).to(self.by_channel.dtype)

    @property
    def order(self) -> str:
        """For titles: "exact" or "first order"."""
        return "exact" if self.exact else "first order"


def contributions(
    model: Any,
    x: Tensor,
    layer: int,
    *,
    scalar: Scalar | None = None,
    weights: Tensor | None = None,
    inside: str | Sequence[str] = "scan",
    edits: Any = None,
    state: Any = None,
    finite: bool | Index = False,
) -> Contributions:
    """What each token of ``x`` contributes through the scan of ``layer`` to one number for each prompt.

    Give one of two. ``weights``, broadcast to (batch, pos, d_inner): the number is Σ weights · (y + D x), with the gate
    inside Σ weights · ``hook_gated``. ``scalar``, a function from the model's output to (batch,): its linearisation;
    with ``finite`` (True, or the positions) also what each do(write_s := 0) changes, one run for each.

    ``inside`` is one or several of "scan", "taps", "gate" (see ``interp/attention/hidden.py``). ``edits`` are those of
    ``hooks.edit``, ``state`` is what went before the prompt. Raises :class:`BadArgument` for a layer that lacks a site
    (named), both or neither of weights and scalar, and a scalar of another shape or that does not depend on the layer.
    """
    chosen = inside_of(inside)
    readable(model, x)
    if (scalar is None) == (weights is None):
        raise BadArgument("contributions are to one number: give weights= (of the scan's output) or scalar=, not both")
    if finite is not False and scalar is None:
        raise BadArgument("finite= is for a scalar of the model's output: with weights the contributions are exact")
    tokens = indices(None if isinstance(finite, bool) else finite, x.shape[1], "finite", "the positions")
    prefix, _ = mixer_of(model, layer, chosen.sites)
    value: Tensor | None = None
    effect: Tensor | None = None
    with edited(model, edits):
        whole = scalar is not None or edits is not None
        need = {"gain": chosen.taps, "others": chosen.sites, "whole": whole, "state": state}
        if scalar is None:
            assert weights is not None
            seen = observe(model, x, layer, **need)
            g = _fitted(weights, seen)
            g = g * seen.sites["hook_gate"].to(g) if chosen.gate else g
        else:
            seen, value, g = _linearised(model, x, layer, scalar, prefix, need)
        if scalar is not None and value is not None and finite is not False:
            effect = _effects(model, x, scalar, value, prefix + "hook_write", tokens, state)
    return _summed(model, layer, seen, g, chosen, value, None if effect is None else (tokens, effect))


def _linearised(
    model: Any, x: Tensor, layer: int, scalar: Scalar, prefix: str, need: dict[str, Any]
) -> tuple[Recurrence, Prompts, Inner]:
    """The recurrence, the scalar, and its gradient at the scan's output, from one run."""
    gradients_can_be("contributions to a scalar of the output")
    if not callable(scalar):
        raise BadArgument(f"scalar is {told(scalar)}: give a function of the output, lambda out: out[:, -1, 0]")
    leaves: list[Tensor] = []

    def start_graph(region: Tensor, whole: Tensor, name: str) -> Tensor:
        if leaves:
            return region
        # The run is recorded without gradients; from here on they are wanted, and what came before needs no graph. The
        # mode is put back where hooks.record leaves its own.
        torch.set_grad_enabled(True)
        leaves.append(region.detach().clone().requires_grad_())
        return leaves[0]

    with torch.enable_grad():
        with hooks.edit(model, {prefix + "hook_y": Edit("the gradient of the scalar", start_graph)}):
            seen = observe(model, x, layer, **need)
        value = scalar(seen.output)
        if not isinstance(value, Tensor) or value.shape != x.shape[:1]:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise BadArgument(f"scalar returned {found}: one number for each prompt is {tuple(x.shape[:1])}")
        gradient = None
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value.sum(), leaves[0], allow_unused=True)
    if gradient is None:
        raise BadArgument(f"the scalar does not depend on the scan of layer {layer}: is it made of the model's output?")
    keywords = {} if need["state"] is None else {"state": need["state"]}
    refuse_gradients({prefix + "hook_y": gradient}, model, x, lambda out: scalar(out).sum(), **keywords)
    return seen, value.detach(), gradient


def _effects(
    model: Any, x: Tensor, scalar: Scalar, value: Prompts, site: str, tokens: Tensor, state: Any
) -> Float[Tensor, "batch token"]:
    """scalar − scalar without the write, for each of ``tokens``; runs from that layer on where nothing is edited."""
    keywords: dict[str, Any] = {} if state is None else {"state": state}
    found = []
    with torch.no_grad():
        if not watched(*model.hook_dict.values()):
            layer = int(site.split(".")[1])
            x = model(x, stop_at_layer=layer, **keywords)
            keywords["start_at_layer"] = layer
        for token in followed(tokens.tolist(), "contributions"):
            with hooks.edit(model, {site: hooks.zero(pos=token)}):
                found.append(value - scalar(model(x, **keywords)))
    return torch.stack(found, dim=-1)


def _fitted(weights: Tensor, seen: Recurrence) -> Inner:
    if not isinstance(weights, Tensor):
        raise BadArgument(f"weights is {told(weights)}: give a tensor that broadcasts to {tuple(seen.x.shape)}")
    try:
        return weights.detach().to(seen.x).broadcast_to(seen.x.shape)
    except RuntimeError as error:
        raise BadArgument(
            f"weights of shape {tuple(weights.shape)} do not fit the scan's output {tuple(seen.x.shape)}"
        ) from error


def _summed(
    model: Any,
    layer: int,
    seen: Recurrence,
    g: Inner,
    inside: Inside,
    value: Prompts | None,
    knocked_out: tuple[Tensor, Tensor] | None,
) -> Contributions:
    g = g.to(seen.x.dtype)
    (reached, put), init = seen.pull_back(g, [seen.gain if inside.taps else seen.write, seen.edited])
    by_write = reached * seen.x if inside.taps else reached
    by_channel, edit = by_write, _sum(put)
    conv_bias = conv_init = torch.zeros_like(edit)
    if inside.taps:
        taps = taps_of(model, layer, seen)
        split = taps.split(reached.transpose(1, 2)[:, :, None])
        by_channel = (split.values[:, :, 0] * taps.source).transpose(1, 2)
        conv_bias, conv_init, edit = _sum(split.conv_bias), _sum(split.conv_init), edit + _sum(split.edited)
    skips = g * seen.sites["hook_skip"].to(g) if "hook_skip" in seen.sites else torch.zeros_like(g)
    beside = torch.stack([_sum(init), conv_bias, conv_init, edit])
    total = _sum(g * seen.y.to(g)) + _sum(skips)
    error = (_sum(by_channel) + beside.sum(0) + _sum(skips) - total).abs()
    size = _sum(by_channel.abs()) + beside.abs().sum(0) + _sum(skips.abs())
    relative = torch.where(error == 0, 0.0, error / size)
    finite = None
    if knocked_out is not None:
        tokens, effect = knocked_out
        first_order = by_write.sum(-1, dtype=torch.float64)[:, tokens]
        finite = Finite(tokens, effect, effect - first_order.to(effect.dtype))
    kind = by_channel.dtype
    return Contributions(
        by_channel=by_channel,
        state_init=beside[0].to(kind),
        conv_bias=beside[1].to(kind),
        conv_init=beside[2].to(kind),
        edited=beside[3].to(kind),
        skip=skips.sum(-1, dtype=torch.float64).to(kind),
        total=total.to(kind),
        exact=value is None,
        scalar=value,
        finite=finite,
        layer=layer,
        inside=inside.names,
        error=float(error.max()),
        relative_error=float(relative.max()),
    )


def _sum(values: Float[Tensor, "batch *rest"]) -> Float[Tensor, "batch"]:
    """Over all but the prompts, in double precision."""
    return values.flatten(1).sum(1, dtype=torch.float64)
