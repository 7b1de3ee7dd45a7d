"""The recurrence by definition: a plain torch loop, for any dtype and device, differentiable twice.

    h_t = decay_t ⊙ h_{t−1} + write_t,     y_t[d] = Σ_n C_t[n] h_t[d, n]

It is what the compiled paths are tested against, what they differentiate when second derivatives are asked
for, and what runs wherever no faster path exists. It builds the 4-D tensors; the compiled paths do not.

**A zero wins.** Where a decay is exactly 0 the past is cut: nothing of it arrives and no gradient returns to it,
not even the NaN that IEEE arithmetic makes of 0 · inf. By the same rule an overflowed decay leaves an empty past
empty, so that ``h0=None`` and a zero ``h0`` are one thing, and what has gradient 0 passes 0 on whatever it is
multiplied with. A NaN decay is not hidden by an empty past, and no rule but IEEE's touches a forward product
other than decay ⊙ past.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from hooks.transforms import every_order


def selective_scan(
    x: Float[Tensor, "batch pos d_inner"],
    delta_decay: Float[Tensor, "batch pos d_inner"],
    delta_write: Float[Tensor, "batch pos d_inner"],
    A: Float[Tensor, "*rows d_inner d_state"],
    B: Float[Tensor, "batch pos d_state"],
    C: Float[Tensor, "batch pos d_state"],
    h0: Float[Tensor, "batch d_inner d_state"] | None = None,
) -> tuple[Float[Tensor, "batch pos d_inner"], Float[Tensor, "batch d_inner d_state"]]:
    """Read-out y_t = Σ_n C_t[n] h_t[:, n] (without the skip D x) and the last state; see ``selective_states``."""
    y, states = selective_scan_states(x, delta_decay, delta_write, A, B, C, h0)
    return y, states[:, -1]


def selective_scan_states(
    x: Float[Tensor, "batch pos d_inner"],
    delta_decay: Float[Tensor, "batch pos d_inner"],
    delta_write: Float[Tensor, "batch pos d_inner"],
    A: Float[Tensor, "*rows d_inner d_state"],
    B: Float[Tensor, "batch pos d_state"],
    C: Float[Tensor, "batch pos d_state"],
    h0: Float[Tensor, "batch d_inner d_state"] | None = None,
) -> tuple[Float[Tensor, "batch pos d_inner"], Float[Tensor, "batch pos d_inner d_state"]]:
    """Read-out and all states."""
    states = selective_states(x, delta_decay, delta_write, A, B, h0)
    return _Product.apply(states, C[:, :, None, :]).sum(-1), states


def selective_states(
    x: Float[Tensor, "batch pos d_inner"],
    delta_decay: Float[Tensor, "batch pos d_inner"],
    delta_write: Float[Tensor, "batch pos d_inner"],
    A: Float[Tensor, "*rows d_inner d_state"],
    B: Float[Tensor, "batch pos d_state"],
    h0: Float[Tensor, "batch d_inner d_state"] | None = None,
) -> Float[Tensor, "batch pos d_inner d_state"]:
    """All states of the selective recurrence: decay = exp(Δ_decay A), write = Δ_write B x (Euler).

    ``A`` may differ between sequences: what each of them asks of it is then told apart.
    """
    decay = _Exp.apply(_Product.apply(delta_decay[..., None], A if A.ndim == 2 else A[:, None]))
    write = _Product.apply(_Product.apply(delta_write, x)[..., None], B[:, :, None, :])
    return scan(decay, write, h0)


def scan(
    decay: Inexact[Tensor, "batch pos *rest"],
    write: Inexact[Tensor, "batch pos *rest"],
    h0: Inexact[Tensor, "batch *rest"] | None = None,
) -> Inexact[Tensor, "batch pos *rest"]:
    """All states h_t = decay_t ⊙ h_{t−1} + write_t from ``h0`` (zero unless given); real or complex."""
    past = torch.zeros_like(write[:, 0]) if h0 is None else h0
    states = []
    for t in range(write.shape[1]):
        past = _Carry.apply(decay[:, t], past) + write[:, t]
        states.append(past)
    return torch.stack(states, dim=1)


def rates(A_log: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """A = −exp(A_log). Where that overflows it is −inf, its decay is 0, and the gradient 0 of that decay stays 0."""
    return -_Exp.apply(A_log)


def decays(
    delta: Float[Tensor, "batch pos d_inner"], A: Float[Tensor, "d_inner d_state"]
) -> Float[Tensor, "batch pos d_inner d_state"]:
    """exp(Δ A) of the materialised recurrence, whose gradient is 0 where A is −inf: no step changes that decay of 0."""
    return torch.exp(_Rate.apply(delta, A))


class _Rate(torch.autograd.Function):
    """Δ A, with the slope by Δ of a finite A; 0 · inf would make a NaN of the gradient 0 that reaches it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(delta: Tensor, A: Tensor) -> Tensor:
        return delta[..., None] * A

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (delta, A), wanted = ctx.saved_tensors, ctx.needs_input_grad
        to_delta = (grad * _finite(A)).sum(-1) if wanted[0] else None
        return to_delta, (grad * delta[..., None]).sum((0, 1)) if wanted[1] else None

    @staticmethod
    @every_order
    def jvp(ctx: Any, saved: Any, delta_change: Tensor, A_change: Tensor) -> Tensor:
        delta, A = saved
        return delta_change[..., None] * _finite(A) + delta[..., None] * A_change


def _finite(A: Tensor) -> Tensor:
    return torch.where(torch.isinf(A), 0, A)


class _Product(torch.autograd.Function):
    """a · b (broadcast) that returns gradient 0 to a factor wherever nothing downstream depends on it.

    torch's own product returns 0 · inf = NaN there once the other factor has overflowed. The backward consists
    of ordinary torch operations, so it can be differentiated again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return a * b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return (
            _zero_wins(grad, b.conj()).sum_to_size(a.shape),
            _zero_wins(grad, a.conj()).sum_to_size(b.shape),
        )

    @staticmethod
    @every_order
    def jvp(ctx: Any, saved: Any, change_a: Tensor, change_b: Tensor) -> Tensor:
        a, b = saved
        return _zero_wins(change_a, b) + _zero_wins(change_b, a)


class _Carry(_Product):
    """decay ⊙ past where a zero wins: what of the past arrives at this position."""

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        empty = (a == 0) | ((b == 0) & ~torch.isnan(a))
        return torch.where(empty, 0, a * b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return _zero_wins(grad, _past(a, b).conj()), _zero_wins(grad, a.conj())

    @staticmethod
    @every_order
    def jvp(ctx: Any, saved: Any, change_a: Tensor, change_b: Tensor) -> Tensor:
        a, b = saved
        return _zero_wins(change_a, _past(a, b)) + _zero_wins(change_b, a)


def _past(a: Tensor, b: Tensor) -> Tensor:
    """b, and 0 where it is cut and not finite: grad · inf would come back as NaN from what multiplied by 0 to cut."""
    return torch.where((a == 0) & ~torch.isfinite(b), 0, b)


class _Exp(torch.autograd.Function):
    """exp, whose gradient is 0 where nothing depends on it, also after an overflow."""

    generate_vmap_rule = True

    @staticmethod
    def forward(exponent: Tensor) -> Tensor:
        return torch.exp(exponent)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (value,) = ctx.saved_tensors
        return _zero_wins(grad, value.conj())

    @staticmethod
    @every_order
    def jvp(ctx: Any, saved: Any, change: Tensor) -> Tensor:
        (value,) = saved
        return _zero_wins(change, value)


def _zero_wins(grad: Tensor, factor: Tensor) -> Tensor:
    """grad · factor, and 0 where a zero met inf or NaN; elsewhere an ordinary, differentiable product."""
    met = ((grad == 0) & ~torch.isfinite(factor)) | ((factor == 0) & ~torch.isfinite(grad))
    return torch.where(met, 0, grad) * torch.where(met, 0, factor)
