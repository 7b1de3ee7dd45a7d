"""The one place that says in which precision a recurrence is computed: that of its operands, whatever autocast says.

Under ``torch.autocast`` linear layers and convolutions are in half precision, as they are meant to be. A recurrence
adds up hundreds of terms, and whether a product in it is a matrix product (which autocast would round) or a loop (which
it would not) depends on the path that computes it, so on who looks. So whoever multiplies states, decays or impulse
responses gives operands of at least float32 and calls the product through :func:`exact`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hooks.derivatives import pull, push
from hooks.transforms import every_order


def exact(function: Callable[..., Tensor], *operands: Tensor) -> Tensor:
    """``function(*operands)`` with autocast off in it and in its gradients, also where the backward is under autocast.

    ``function`` depends on nothing that has gradients but its operands. Without autocast it is simply called.
    """
    kind = operands[0].device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return function(*operands)
    result: Tensor = _Exact.apply(function, *operands)
    return result


class _Exact(torch.autograd.Function):
    """A function that torch differentiates, with autocast off; its backward is one too, so it holds for every order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(function: Callable[..., Any], *operands: Tensor) -> Any:
        with torch.autocast(operands[0].device.type, enabled=False):
            return function(*operands)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.function, *operands = inputs
        ctx.save_for_backward(*operands)
        ctx.save_for_forward(*operands)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        operands, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        count = len(operands)

        def gradients(*given: Tensor) -> tuple[Tensor, ...]:
            found = pull(ctx.function, given[:count], needed, given[count:])
            return tuple(torch.zeros_like(o) if g is None else g for o, g in zip(given[:count], found, strict=True))

        return None, *_Exact.apply(gradients, *operands, *grads)

    @staticmethod
    @every_order
    def jvp(ctx: Any, saved: Any, _: None, *tangents: Tensor | None) -> Any:
        operands = saved
        with torch.autocast(operands[0].device.type, enabled=False):
            return push(ctx.function, operands, tangents)
