"""The compiled CPU path: `kernels.py` as operations that autograd and ``torch.func`` know (`operation.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooks.machine.threads import run
from models.scan import pages, reference
from models.scan.operation import Operation

_UNITS = 64  # into how many a short batch is cut: enough for many threads, and partial sums stay small


def selective_scan(
    x: Tensor, delta_decay: Tensor, delta_write: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`reference.selective_scan` for CPU tensors that are all float32 or all float64."""
    y, h_last = _SCAN(x, delta_decay, delta_write, A, B, C, h0)
    return y, h_last


def selective_states(
    x: Tensor, delta_decay: Tensor, delta_write: Tensor, A: Tensor, B: Tensor, h0: Tensor | None
) -> Tensor:
    """`reference.selective_states` for CPU tensors that are all float32 or all float64."""
    states: Tensor = _STATES(x, delta_decay, delta_write, A, B, h0)
    return states


def selective_scan_states(
    x: Tensor, delta_decay: Tensor, delta_write: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`reference.selective_scan_states` for CPU tensors that are all float32 or all float64; no compiled gradients."""
    y, states = _SCAN_STATES(x, delta_decay, delta_write, A, B, C, h0)
    return y, states


def scan(decay: Tensor, write: Tensor, h0: Tensor | None) -> Tensor:
    """`reference.scan` for CPU tensors that are all float32 or all float64."""
    states: Tensor = _MATERIALISED(decay, write, h0)
    return states


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
        self.chunks = -(-self.length // kernels.CHUNK)
        blocks = -(-self.d_inner // kernels.LANES)
        self.groups = min(blocks, -(-_UNITS // self.batch))
        self.like = x
        padded = A.new_zeros(self.d_state, blocks * kernels.LANES)
        padded[:, : self.d_inner] = A.detach().t()
        shared = [_array(tensor, x, 3) for tensor in (x, delta_decay, delta_write)]
        self.operands = (*shared, padded.numpy(), *(_array(tensor, x, 3) for tensor in (B, C, h0)))

    def forward(self, keep: bool, y: Tensor | None = None, states: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Fill ``y`` and ``states`` where given; return the last state and, if ``keep``, those at chunk starts."""
        saved = self.empty(self.batch, self.chunks - 1 if keep else 0, *self.operands[3].shape)
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
        """Gradients of x, delta_decay, delta_write, A (of each sequence), B, C and h0."""
        if saved.shape[1] < self.chunks - 1:  # nobody knew yet that a gradient would be asked for
            _, saved = self.forward(keep=True)
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
        g_A = g_A[:, :, : self.d_inner].transpose(1, 2)
        return g_x, g_decay, g_write, g_A, g_B.sum(0), g_C.sum(0), g_h0

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.like.dtype, device=self.like.device)

    def run(self, kernel: Callable[..., None], *args: Any) -> None:
        work = self.batch * self.length * self.d_inner * self.d_state
        run(kernel, self.batch * self.groups, self.groups, work, args)


def _run_selective(operands: Any, keep: bool) -> tuple[Tensor, ...]:
    """y, the last state, and the states at chunk starts."""
    kernel = _Selective(*operands)
    y = kernel.empty(*kernel.like.shape)
    return y, *kernel.forward(keep=keep, y=y)


def _pull_selective(operands: Any, saved: Any, grads: Any) -> tuple[Tensor, ...]:
    return _Selective(*operands).backward(saved[0], g_y=grads[0], g_last=grads[1])


def _run_states(operands: Any, keep: bool) -> tuple[Tensor, ...]:
    """All states, and those at chunk starts."""
    x, delta_decay, delta_write, A, B, h0 = operands
    kernel = _Selective(x, delta_decay, delta_write, A, B, None, h0)
    states = pages.empty((*kernel.like.shape, kernel.d_state), kernel.like.dtype)
    _, saved = kernel.forward(keep=keep, states=states)
    return states, saved


def _pull_states(operands: Any, saved: Any, grads: Any) -> tuple[Tensor, ...]:
    x, delta_decay, delta_write, A, B, h0 = operands
    found = _Selective(x, delta_decay, delta_write, A, B, None, h0).backward(saved[0], g_states=grads[0])
    return *found[:5], found[6]


def _run_both(operands: Any, keep: bool) -> tuple[Tensor, ...]:
    """y and all states."""
    kernel = _Selective(*operands)
    y = kernel.empty(*kernel.like.shape)
    states = pages.empty((*kernel.like.shape, kernel.d_state), kernel.like.dtype)
    kernel.forward(keep=False, y=y, states=states)
    return y, states


def _run_materialised(operands: Any, keep: bool) -> tuple[Tensor, ...]:
    from models.scan import kernels

    decay, write, h0 = operands
    states = pages.empty(tuple(write.shape), write.dtype)
    arrays = (_lanes(tensor, 2) for tensor in (decay, write))
    _run_scan(kernels.scan_forward, kernels.WIDTH, (*arrays, _lanes(h0, 1, write), _lanes(states, 2)))
    return (states,)


def _pull_materialised(operands: Any, saved: Any, grads: Any) -> tuple[Tensor, ...]:
    from models.scan import kernels

    decay, write, h0 = operands
    g_decay, g_write = (pages.empty(tuple(write.shape), write.dtype) for _ in range(2))
    g_h0 = torch.empty((write.shape[0], *write.shape[2:]), dtype=write.dtype, device=write.device)
    given = (_lanes(decay, 2), _lanes(h0, 1, write), _lanes(saved[0], 2), _lanes(grads[0], 2))
    _run_scan(kernels.scan_backward, kernels.WIDTH, (*given, _lanes(g_decay, 2), _lanes(g_write, 2), _lanes(g_h0, 1)))
    return g_decay, g_write, g_h0


_A = (3,)  # the place of A, which all sequences share
_SCAN = Operation(reference.selective_scan, _run_selective, 2, _pull_selective, (2,), _A)
_STATES = Operation(reference.selective_states, _run_states, 1, _pull_states, (1,), _A)
_SCAN_STATES = Operation(reference.selective_scan_states, _run_both, 2, shared=_A)
_MATERIALISED = Operation(reference.scan, _run_materialised, 1, _pull_materialised, (0,))


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
