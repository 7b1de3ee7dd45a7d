"""What a look at numbers has to know about the transforms of ``torch.func`` and forward-mode derivatives.

Inside ``vmap`` a tensor stands for many, and a question about its numbers ("is there a NaN?") has many answers. Here it
is asked of all of them together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def active() -> bool:
    """Whether a transform of ``torch.func`` or a forward-mode derivative is at work, so that tensors hold more than
    their numbers.
    """
    # torch asks itself by the same two, and has no public name for either.
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def plain(tensor: Tensor) -> Tensor:
    """The numbers of ``tensor``; those of all that it stands for, with the axes of ``vmap`` somewhere in front."""
    if not active():
        return tensor.detach()
    found: list[Tensor] = []
    _Reached.apply(tensor.detach(), found.append)
    return found[0]


def everywhere(condition: Tensor) -> bool:
    """Whether all of ``condition`` holds, in each of the tensors that it stands for."""
    return bool(plain(condition).all())


def every_order(jvp: Callable[..., Any]) -> Callable[..., Any]:
    """A custom function's ``jvp`` that can itself be pushed forward: ``(ctx, saved tensors, *tangents)``.

    torch calls a ``jvp`` with forward mode off, and so loses what it would be pushed by: the derivative of the second
    order is wrong without a word. Here the mode is on, and what was saved comes without its own tangent. Tangents may
    also stand for many (:func:`translated`).
    """

    @functools.wraps(jvp)
    def call(ctx: Any, *tangents: Tensor | None) -> Any:
        def pushed(*given: Tensor | None) -> tuple[Tensor | None, ...]:
            found = jvp(ctx, saved, *given)
            return found if isinstance(found, tuple) else (found,)

        saved = tuple(None if t is None else forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors)
        with forward_ad._set_fwd_grad_enabled(True):
            found = translated(pushed, *tangents)
        return found if len(found) > 1 else found[0]

    return call


def batched(tensor: Tensor | None) -> bool:
    """Whether ``tensor`` is the gradients of many in one, by the mechanism that :func:`translated` is about."""
    return tensor is not None and torch._C._functorch.is_legacy_batchedtensor(tensor)


def translated(function: Callable[..., Any], *tensors: Tensor | None) -> Any:
    """``function(*tensors)``, a tuple of tensors and None, by ``torch.vmap`` where a tensor stands for many.

    ``torch.autograd.grad(is_grads_batched=True)``, and so ``torch.autograd.functional.jacobian(vectorize=True)``, has a
    mechanism of its own, older than ``torch.vmap``, that knows no rule of a custom function: here it is translated.
    """
    many = [batched(tensor) for tensor in tensors]
    if not any(many):
        return function(*tensors)
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    # The size would be that of a tensor that is not one of many; there is none here.
    whole = [torch._remove_batch_dim(t, level, 0, 0) if t is not None and batched(t) else t for t in tensors]
    dims = tuple(0 if of_many else None for of_many in many)
    absent: list[int] = []

    def present(*given: Tensor | None) -> tuple[Tensor, ...]:
        found = function(*given)
        absent[:] = [k for k, one in enumerate(found) if one is None]
        return tuple(one for one in found if one is not None)

    found: list[Tensor | None] = [torch._add_batch_dim(one, 0, level) for one in torch.vmap(present, dims)(*whole)]
    for k in absent:
        found.insert(k, None)
    return tuple(found)


class _Reached(torch.autograd.Function):
    """torch takes every transform off what it hands to a forward; there the numbers are."""

    @staticmethod
    def forward(tensor: Tensor, keep: Callable[[Tensor], None]) -> Tensor:
        keep(tensor)
        return tensor.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, None], tensor: Tensor, keep: Any) -> tuple[Tensor, None]:
        axis = in_dims[0]
        return _Reached.apply(tensor if axis is None else tensor.movedim(axis, 0), keep), None
