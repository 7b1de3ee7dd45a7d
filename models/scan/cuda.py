"""CUDA tensors: mamba_ssm's selective scan where it is installed and applies, the definition otherwise.

This file was written against mamba_ssm's documented interface (2.2 and 2.3) and has not been run on a GPU.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from hooks.derivatives import pull
from hooks.transforms import active, batched, translated
from models.scan import reference


def selective_scan(
    x: Tensor, delta_decay: Tensor, delta_write: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`reference.selective_scan`; by mamba_ssm's kernel for float32, one delta and no ``h0``, which is all it knows.

    Inside a transform it is the definition.
    """
    one_delta = delta_decay is delta_write
    if h0 is not None or not one_delta or x.dtype != torch.float32 or active() or not _installed():
        return reference.selective_scan(x, delta_decay, delta_write, A, B, C, h0)
    return _MambaSsm.apply(x, delta_decay, delta_write, A, B, C)


@cache
def _installed() -> bool:
    return find_spec("mamba_ssm") is not None


class _MambaSsm(torch.autograd.Function):
    """mamba_ssm's scan with what its own autograd lacks: a gradient through the last state, second derivatives."""

    @staticmethod
    def forward(ctx: Any, *operands: Tensor) -> tuple[Tensor, Tensor]:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        leaves = [tensor.detach().requires_grad_() for tensor in operands]
        x, delta, _, A, B, C = leaves
        # one delta is asked of it; the second operand only receives its share of the gradient
        with torch.enable_grad():
            swapped = [tensor.transpose(1, 2).contiguous() for tensor in (x, delta, B, C)]
            y, h_last = selective_scan_fn(swapped[0], swapped[1], A, *swapped[2:], return_last_state=True)
            y = y.transpose(1, 2)
        ctx.inner = leaves, y
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands)
        return y.detach(), h_last.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        g_y, g_last = grads
        if torch.is_grad_enabled() or g_last is not None or batched(g_y):
            operands, needed = ctx.saved_tensors, ctx.needs_input_grad
            return translated(lambda *given: pull(reference.selective_scan, operands, needed, given), *grads)
        (x, delta, _, A, B, C), y = ctx.inner
        g_x, g_delta, g_A, g_B, g_C = torch.autograd.grad(y, (x, delta, A, B, C), g_y, retain_graph=True)
        return g_x, g_delta, None, g_A, g_B, g_C
