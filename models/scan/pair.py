"""The recurrence h_t = ā_t h_{t−1} + w_t of complex states, written as pairs: real parts, then imaginary parts, on the
last axis. On a CPU in compiled loops (`pair_kernels.py`), elsewhere by definition.

In real arithmetic all through: complex tensors are a scalar loop in much of torch, and the sites of complex states show
pairs. Where a decay is 0 nothing of the past arrives, not even the NaN of 0 · inf; see `reference.py`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooks.precision import exact
from hooks.threads import run
from models.scan import pages

Pairs = Float[Tensor, "batch pos d_inner re_im"]
Start = Float[Tensor, "batch d_inner re_im"]


def scan(decay: Pairs, write: Pairs, h0: Start | None) -> Pairs:
    """All states; differentiable, also twice."""
    states: Tensor = _PairScan.apply(decay, write, torch.zeros_like(write[:, 0]) if h0 is None else h0)
    return states


def constant_states(
    x: Float[Tensor, "batch pos d_inner"],
    decay: Float[Tensor, "d_inner re_im"],
    gain: Float[Tensor, "d_inner re_im"],
    read: Float[Tensor, "d_inner re_im"],
    h0: Start | None,
) -> tuple[Float[Tensor, "batch pos d_inner"], Pairs]:
    """y_t = Σ read h_t and all states of h_t = ā h_{t−1} + gain x_t in one pass, without gradients."""
    if x.device.type != "cpu":
        write = gain * x[..., None]
        start = torch.zeros_like(write[:, 0]) if h0 is None else h0
        states = _in_torch(decay.expand_as(write), write, start)
        return exact(partial(torch.einsum, "bldn,dn->bld"), states, read), states
    from models.scan import pair_kernels as kernels  # numba: half a second that only those pay who scan

    y, states = torch.empty_like(x), pages.empty((*x.shape, decay.shape[1]), x.dtype)
    start = x.new_empty(0, 0, 0) if h0 is None else h0
    given = [x.detach().contiguous().numpy(), *(_apart(part) for part in (decay, gain, read, start))]
    for guarded in (False, True):
        _run(kernels.constant, states, *given, y.numpy(), _apart(states), guarded)
        if not torch.isnan(states[:, -1]).any():
            break
    return y, states


class _PairScan(torch.autograd.Function):
    """The complex recurrence over axis 1 with its own adjoint.

    Turning the phases away first would let the real scan do this one too, but the angle of a decay has no gradient
    where an edit set the decay to 0. The adjoint is the same recurrence run from the end with ā conjugated,
    λ_t = g_t + conj(ā_{t+1}) λ_{t+1}; autograd through a loop would write full-size gradients at every step.
    """

    @staticmethod
    def forward(decay: Tensor, write: Tensor, start: Tensor) -> Tensor:
        return _compiled(decay, write, start) if write.device.type == "cpu" else _in_torch(decay, write, start)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[2], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        decay, start, states = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if grad.device.type == "cpu" and not torch.is_grad_enabled():
            adjoint = _compiled(decay, grad, None)
        else:  # the same by the recurrence itself, which has a gradient of its own
            later = torch.cat([decay[:, 1:], torch.zeros_like(decay[:, :1])], dim=1)
            adjoint = _PairScan.apply(_conjugate(later).flip(1), grad.flip(1), torch.zeros_like(start)).flip(1)
        to_decay = None
        if wanted[0]:
            to_decay = times(adjoint, _conjugate(torch.cat([start[:, None], states[:, :-1]], dim=1)))
        to_start = times(adjoint[:, 0], _conjugate(decay[:, 0])) if wanted[2] else None
        return to_decay, adjoint, to_start


def _in_torch(decay: Pairs, write: Pairs, start: Start) -> Pairs:
    """On any device: real arithmetic on views, so that nothing is copied or allocated on the way."""
    states = torch.empty_like(write, memory_format=torch.contiguous_format)
    (a, b), (u, v), (real, imag) = (tensor.chunk(2, dim=-1) for tensor in (decay, write, states))
    p, q = start.chunk(2, dim=-1)
    for t in range(write.shape[1]):
        torch.addcmul(u[:, t], a[:, t], p, out=real[:, t]).addcmul_(b[:, t], q, value=-1)
        torch.addcmul(v[:, t], a[:, t], q, out=imag[:, t]).addcmul_(b[:, t], p)
        p, q = real[:, t], imag[:, t]
    # A NaN stays in every later state, so the last one tells whether an overflow met a zero on the way.
    return by_definition(decay, write, start) if bool(torch.isnan(states[:, -1]).any()) else states


def by_definition(decay: Pairs, write: Pairs, start: Start) -> Pairs:
    """Token by token, a zero winning; what everything else here is tested against."""
    states = torch.empty_like(write, memory_format=torch.contiguous_format)
    past = start
    for t in range(write.shape[1]):
        past = times(decay[:, t], past) + write[:, t]
        states[:, t] = past
    return states


def _compiled(decay: Pairs, write: Pairs, start: Start | None) -> Pairs:
    """The states that ``write`` makes; without a start the adjoints of those whose gradients it is."""
    from models.scan import pair_kernels as kernels

    found = pages.empty(tuple(write.shape), write.dtype)
    # A decay that is one for the whole batch, or for all tokens, is read where it is.
    row, step = (1 if decay.stride(axis) == 0 else decay.shape[axis] for axis in (0, 1))
    before = write.new_empty(0, 0, 0) if start is None else start
    given = [_apart(part) for part in (decay[:row, :step], write, before, found)]
    for guarded in (False, True):
        _run(kernels.scan, found, *given, start is None, guarded)
        # A NaN stays in all that is computed later: the end tells whether an overflow met a zero on the way.
        if not torch.isnan(found[:, 0 if start is None else -1]).any():
            break
    return found


def _apart(values: Float[Tensor, "*shape re_im"]) -> np.ndarray:
    """The tensor's memory (or a copy if it is not contiguous) with real and imaginary parts on an axis of their own."""
    array: np.ndarray = values.detach().contiguous().numpy()
    return array.reshape(*array.shape[:-1], 2, array.shape[-1] // 2)


def _run(kernel: Any, states: Pairs, *args: Any) -> None:
    from models.scan.pair_kernels import TOGETHER

    groups = -(-states.shape[2] // TOGETHER)
    run(kernel, states.shape[0] * groups, groups, states.numel(), args)


def _conjugate(z: Tensor) -> Tensor:
    real, imag = z.chunk(2, dim=-1)
    return torch.cat([real, -imag], dim=-1)


def times(z: Tensor, w: Tensor) -> Tensor:
    """The complex product of two pairs; 0 where z is 0, whatever w is, or w is 0 and z no NaN."""
    (a, b), (p, q) = z.chunk(2, dim=-1), w.chunk(2, dim=-1)
    zero = ((a == 0) & (b == 0)) | ((p == 0) & (q == 0) & ~(a.isnan() | b.isnan()))
    real, imag = a * p - b * q, a * q + b * p
    return torch.cat([torch.where(zero, 0, real), torch.where(zero, 0, imag)], dim=-1)
