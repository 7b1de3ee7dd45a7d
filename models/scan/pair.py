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

from hooks.machine.threads import run
from hooks.precision import exact
from hooks.transforms import every_order, translated
from models.scan import pages
from models.scan.operation import Operation, batched

Pairs = Float[Tensor, "batch pos d_inner re_im"]
Start = Float[Tensor, "batch d_inner re_im"]


def scan(decay: Pairs, write: Pairs, h0: Start | None) -> Pairs:
    """All states; differentiable, also twice."""
    start = torch.zeros_like(write[:, 0]) if h0 is None else h0
    states: Tensor = _PairScan.apply(decay, write, start, False)
    return states


def constant_states(
    x: Float[Tensor, "batch pos d_inner"],
    decay: Float[Tensor, "d_inner re_im"],
    gain: Float[Tensor, "d_inner re_im"],
    read: Float[Tensor, "d_inner re_im"],
    h0: Start | None,
) -> tuple[Float[Tensor, "batch pos d_inner"], Pairs]:
    """y_t = Σ read h_t and all states of h_t = ā h_{t−1} + gain x_t in one pass; no compiled gradients."""
    if not _is_compiled(x):
        return _constant_by_definition(x, decay, gain, read, h0)
    y, states = _CONSTANT(x, decay, gain, read, h0)
    return y, states


def _constant_by_definition(
    x: Tensor, decay: Tensor, gain: Tensor, read: Tensor, h0: Tensor | None
) -> tuple[Tensor, Tensor]:
    write = gain * x[..., None]
    states = scan(decay.expand_as(write), write, h0)
    return exact(partial(torch.einsum, "bldn,dn->bld"), states, read), states


def _run_constant(operands: Any, keep: bool) -> tuple[Tensor, ...]:
    from models.scan import pair_kernels as kernels

    x, decay, gain, read, h0 = operands
    y, states = torch.empty_like(x), pages.empty((*x.shape, decay.shape[1]), x.dtype)
    start = x.new_empty(0, 0, 0) if h0 is None else h0
    given = [x.detach().contiguous().numpy(), *(_apart(part) for part in (decay, gain, read, start))]
    for guarded in (False, True):
        _run(kernels.constant, states, *given, y.numpy(), _apart(states), guarded)
        if not torch.isnan(states[:, -1]).any():
            break
    return y, states


_CONSTANT = Operation(_constant_by_definition, _run_constant, 2, shared=(1, 2, 3))


class _PairScan(torch.autograd.Function):
    """The complex recurrence over axis 1 and its adjoint, each the derivative of the other.

    ``backwards`` the adjoint, λ_t = w_t + conj(ā_{t+1}) λ_{t+1}, which starts at nothing: the same recurrence run from
    the end with ā conjugated. Turning the phases away first would let the real scan do this one too, but the angle of a
    decay has no gradient where an edit set the decay to 0; autograd through a loop would write full-size gradients at
    every step.
    """

    @staticmethod
    def forward(decay: Tensor, write: Tensor, start: Tensor | None, backwards: bool) -> Tensor:
        if _is_compiled(write):
            return _compiled(decay, write, start, backwards)
        if backwards:
            later = torch.cat([decay[:, 1:], torch.zeros_like(decay[:, :1])], dim=1)
            return _in_torch(_conjugate(later).flip(1), write.flip(1), torch.zeros_like(write[:, 0])).flip(1)
        assert start is not None
        return _in_torch(decay, write, start)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        decay, _, start, ctx.backwards = inputs
        ctx.save_for_backward(decay, start, output)
        ctx.save_for_forward(decay, start, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        decay, start, found = ctx.saved_tensors
        wanted = ctx.needs_input_grad

        def gradients(grad: Tensor) -> tuple[Tensor | None, ...]:
            to_decay = to_start = None
            if ctx.backwards:
                adjoint = _PairScan.apply(decay, grad, torch.zeros_like(grad[:, 0]), False)
                if wanted[0]:
                    to_decay = times(_conjugate(adjoint[:, :-1]), found[:, 1:])
                    to_decay = torch.cat([torch.zeros_like(decay[:, :1]), to_decay], dim=1)
            else:
                adjoint = _PairScan.apply(decay, grad, None, True)
                if wanted[0]:
                    to_decay = times(adjoint, _conjugate(_before(start, found)))
                if wanted[2]:
                    to_start = times(adjoint[:, 0], _conjugate(decay[:, 0]))
            return to_decay, adjoint, to_start

        return *translated(gradients, grad), None

    @staticmethod
    @every_order
    def jvp(
        ctx: Any, saved: Any, decay_change: Tensor, write_change: Tensor, start_change: Tensor | None, _: None
    ) -> Tensor:
        decay, start, found = saved
        if ctx.backwards:
            moved = times(_conjugate(decay_change[:, 1:]), found[:, 1:])
            moved = torch.cat([moved, torch.zeros_like(write_change[:, :1])], dim=1)
        else:
            moved = times(decay_change, _before(start, found))
        result: Tensor = _PairScan.apply(decay, write_change + moved, start_change, ctx.backwards)
        return result

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, decay: Tensor, write: Tensor, start: Tensor | None, backwards: bool
    ) -> tuple[Tensor, int]:
        def call(*given: Tensor | None) -> tuple[Tensor, ...]:
            return (_PairScan.apply(*given, backwards),)

        (states,), _ = batched(info, in_dims[:3], (), (decay, write, start), call)
        return states, 0


def _before(start: Start, states: Pairs) -> Pairs:
    """h_{t−1} of every h_t."""
    return torch.cat([start[:, None], states[:, :-1]], dim=1)


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
    states, past = [], start
    for t in range(write.shape[1]):
        past = times(decay[:, t], past) + write[:, t]
        states.append(past)
    return torch.stack(states, dim=1)


def _is_compiled(values: Tensor) -> bool:
    if values.device.type != "cpu":
        return False
    from hooks.machine import native  # numba: half a second that only those pay who scan

    return native.usable()


def _compiled(decay: Pairs, write: Pairs, start: Start | None, backwards: bool) -> Pairs:
    """The states that ``write`` makes; ``backwards`` the adjoints of those whose gradients it is."""
    from models.scan import pair_kernels as kernels

    found = pages.empty(tuple(write.shape), write.dtype)
    # A decay that is one for the whole batch, or for all tokens, is read where it is.
    row, step = (1 if decay.stride(axis) == 0 else decay.shape[axis] for axis in (0, 1))
    before = write.new_empty(0, 0, 0) if start is None else start
    given = [_apart(part) for part in (decay[:row, :step], write, before, found)]
    for guarded in (False, True):
        _run(kernels.scan, found, *given, backwards, guarded)
        # A NaN stays in all that is computed later: the end tells whether an overflow met a zero on the way.
        if not torch.isnan(found[:, 0 if backwards else -1]).any():
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
