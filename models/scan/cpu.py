"""The compiled CPU path: autograd around `kernels.py`.

**Second derivatives.** Under ``create_graph=True`` the backward differentiates the definition: compiled code has
no derivative of its own, and a gradient that came out of it would count as a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooks.threads import run
from models.scan import pages, reference

_UNITS = 64  # into how many a short batch is cut: enough for many threads, and partial sums stay small


def selective_scan(
    x: Tensor, delta_decay: Tensor, delta_write: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`reference.selective_scan` for CPU tensors that are all float32 or all float64."""
    operands = (x, delta_decay, delta_write, A, B, C, h0)
    y, h_last, _ = _SelectiveScan.apply(*operands, _wants_grad(operands))
    return y, h_last


def selective_states(
    x: Tensor, delta_decay: Tensor, delta_write: Tensor, A: Tensor, B: Tensor, h0: Tensor | None
) -> Tensor:
    """`reference.selective_states` for CPU tensors that are all float32 or all float64."""
    operands = (x, delta_decay, delta_write, A, B, h0)
    states, _ = _SelectiveStates.apply(*operands, _wants_grad(operands))
    return states


def selective_scan_states(
    x: Tensor, delta_decay: Tensor, delta_write: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`reference.selective_scan_states` for CPU tensors that are all float32 or all float64; no gradients."""
    y, states = torch.empty(x.shape, dtype=x.dtype, device=x.device), pages.empty((*x.shape, A.shape[1]), x.dtype)
    _Selective(x, delta_decay, delta_write, A, B, C, h0).forward(keep=False, y=y, states=states)
    return y, states


def scan(decay: Tensor, write: Tensor, h0: Tensor | None) -> Tensor:
    """`reference.scan` for CPU tensors that are all float32 or all float64."""
    return _Scan.apply(decay, write, h0)


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(x, delta_decay, delta_write, A, B, C, h0, keep):  # type: ignore[no-untyped-def]
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        kernel = _Selective(x, delta_decay, delta_write, A, B, C, h0)
        return y, *kernel.forward(keep=keep, y=y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:-1], output[2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        *operands, saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_by_definition(ctx, reference.selective_scan, operands, grads[:2]), None
        g_x, g_decay, g_write, g_A, g_B, g_C, g_h0 = _Selective(*operands).backward(
            saved, g_y=grads[0], g_last=grads[1]
        )
        return g_x, g_decay, g_write, g_A, g_B, g_C, None if operands[-1] is None else g_h0, None


class _SelectiveStates(torch.autograd.Function):
    @staticmethod
    def forward(x, delta_decay, delta_write, A, B, h0, keep):  # type: ignore[no-untyped-def]
        states = pages.empty((*x.shape, A.shape[1]), x.dtype)
        kernel = _Selective(x, delta_decay, delta_write, A, B, None, h0)
        _, saved = kernel.forward(keep=keep, states=states)
        return states, saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:-1], output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        *operands, saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_by_definition(ctx, reference.selective_states, operands, grads[:1]), None
        x, delta_decay, delta_write, A, B, h0 = operands
        kernel = _Selective(x, delta_decay, delta_write, A, B, None, h0)
        g_x, g_decay, g_write, g_A, g_B, _, g_h0 = kernel.backward(saved, g_states=grads[0])
        return g_x, g_decay, g_write, g_A, g_B, None if h0 is None else g_h0, None


class _Selective:
    """The operands of the selective scan as the kernels want them: contiguous arrays, A transposed and padded."""

    def __init__(
        self,
        x: Tensor,
        delta_decay: Tensor,
        delta_write: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor | None = None,
        h0: Tensor | None = None,
    ) -> None:
        from models.scan import kernels  # numba: half a second that only those pay who scan

        self.kernels = kernels
        self.batch, self.length, self.d_inner = x.shape
        self.d_state = A.shape[1]
        blocks = -(-self.d_inner // kernels.LANES)
        self.groups = min(blocks, -(-_UNITS // self.batch))
        self.like = x
        padded = A.new_zeros(self.d_state, blocks * kernels.LANES)
        padded[:, : self.d_inner] = A.detach().t()
        shared = [_array(tensor, x, 3) for tensor in (x, delta_decay, delta_write)]
        self.operands = (*shared, padded.numpy(), *(_array(tensor, x, 3) for tensor in (B, C, h0)))

    def forward(self, keep: bool, y: Tensor | None = None, states: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Fill ``y`` and ``states`` where given; return the last state and, if ``keep``, those at chunk starts."""
        chunks = -(-self.length // self.kernels.CHUNK) if keep else 1
        saved = self.empty(self.batch, chunks - 1, *self.operands[3].shape)
        h_last = self.empty(self.batch, self.d_inner, self.d_state)
        streamed = (
            states is not None and self.d_state <= self.kernels.STATES and pages.worth_streaming(states, self.d_state)
        )
        results = (
            _array(y, self.like, 3), h_last.numpy(), saved.numpy(), _array(states, self.like, 4), streamed
        )  # fmt: skip
        self.run(self.kernels.forward, *self.operands, *results, False)
        if torch.isnan(h_last).any():
            self.run(self.kernels.forward, *self.operands, *results, True)
        return h_last, saved

    def backward(
        self,
        saved: Tensor,
        g_y: Tensor | None = None,
        g_last: Tensor | None = None,
        g_states: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Gradients of x, delta_decay, delta_write, A, B, C and h0."""
        grads = tuple(_array(g, self.like, dim) for g, dim in ((g_y, 3), (g_last, 3), (g_states, 4)))
        for guarded in (False, True):
            out = (
                *(self.empty(self.batch, self.length, self.d_inner) for _ in range(3)),
                self.empty(self.batch, *self.operands[3].shape),
                *(self.like.new_zeros(self.groups, self.batch, self.length, self.d_state) for _ in "BC"),
                self.empty(self.batch, self.d_inner, self.d_state),
            )
            self.run(self.kernels.backward, *self.operands, saved.numpy(), *grads, *(o.numpy() for o in out), guarded)
            if not any(torch.isnan(o.sum()) for o in out):
                break
        g_x, g_decay, g_write, g_A, g_B, g_C, g_h0 = out
        g_A = g_A.sum(0)[:, : self.d_inner].t()
        return g_x, g_decay, g_write, g_A, g_B.sum(0), g_C.sum(0), g_h0

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.like.dtype, device=self.like.device)

    def run(self, kernel: Callable[..., None], *args: Any) -> None:
        work = self.batch * self.length * self.d_inner * self.d_state
        run(kernel, self.batch * self.groups, self.groups, work, args)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(decay: Tensor, write: Tensor, h0: Tensor | None) -> Tensor:
        from models.scan import kernels

        states = pages.empty(tuple(write.shape), write.dtype)
        arrays = (_lanes(tensor, 2) for tensor in (decay, write))
        _run_scan(kernels.scan_forward, kernels.WIDTH, (*arrays, _lanes(h0, 1, write), _lanes(states, 2)))
        return states

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        from models.scan import kernels

        decay, write, h0, states = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _by_definition(ctx, reference.scan, (decay, write, h0), (grad,))
        g_decay, g_write = (pages.empty(tuple(write.shape), write.dtype) for _ in range(2))
        g_h0 = torch.empty((write.shape[0], *write.shape[2:]), dtype=write.dtype, device=write.device)
        given = (_lanes(decay, 2), _lanes(h0, 1, write), _lanes(states, 2), _lanes(grad, 2))
        _run_scan(
            kernels.scan_backward, kernels.WIDTH, (*given, _lanes(g_decay, 2), _lanes(g_write, 2), _lanes(g_h0, 1))
        )
        return g_decay, g_write, None if h0 is None else g_h0


def _by_definition(ctx: Any, function: Any, operands: Any, grads: Any) -> tuple[Tensor | None, ...]:
    return reference.backward(function, operands, ctx.needs_input_grad, grads)


def _wants_grad(operands: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(o is not None and o.requires_grad for o in operands)


def _array(tensor: Tensor | None, like: Tensor, dim: int) -> np.ndarray:
    """The tensor's memory, or a copy if it is not contiguous; an empty array where there is no tensor."""
    if tensor is None:
        return torch.empty((0,) * dim, dtype=like.dtype, device="cpu").numpy()
    return tensor.detach().contiguous().numpy()


def _lanes(tensor: Tensor | None, leading: int, like: Tensor | None = None) -> np.ndarray:
    """The array with all axes after the leading ones flattened."""
    if tensor is None:
        assert like is not None
        return _array(None, like, leading + 1)
    shape = (*tensor.shape[:leading], -1)
    return tensor.detach().contiguous().reshape(shape).numpy()


def _run_scan(kernel: Callable[..., None], width: int, arrays: tuple[np.ndarray, ...]) -> None:
    batch, length, lanes = arrays[0].shape
    groups = -(-lanes // width)
    run(kernel, batch * groups, groups, batch * length * lanes, arrays)
