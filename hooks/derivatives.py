"""Derivatives of a function by its definition, for operations whose own code has none.

``pull`` is what a backward asks for, ``push`` what forward mode asks for. Both hold for every function that torch can
differentiate, and both can be differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Operands = Sequence[Tensor | None]


def pull(
    function: Callable[..., Any], operands: Operands, needed: Sequence[bool], grads: Operands
) -> tuple[Tensor | None, ...]:
    """Gradients of the ``needed`` operands of ``function``, given those of its outputs; recorded if grad is enabled.

    An operand that nothing depends on, or that is not needed, has None. Each operand is viewed first, so that one
    tensor in two places counts once in each.
    """
    wanted = [k for k in range(len(operands)) if needed[k] and operands[k] is not None]

    def given(*values: Tensor) -> tuple[Tensor, ...]:
        """The outputs that have a gradient, of the wanted operands."""
        here = dict(zip(wanted, values, strict=True))
        outputs = function(*(here.get(k, tensor) for k, tensor in enumerate(operands)))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(out for out, grad in zip(outputs, grads, strict=True) if grad is not None)

    seeds = tuple(grad for grad in grads if grad is not None)
    record = torch.is_grad_enabled()
    found: tuple[Tensor | None, ...]
    with torch.enable_grad():
        views = [tensor.view_as(tensor) for k in wanted if (tensor := operands[k]) is not None]
        if all(view.requires_grad for view in views):
            ends = given(*views)
            reached = [k for k, end in enumerate(ends) if end.requires_grad]
            found = (None,) * len(views)
            if reached:
                of, starts = [ends[k] for k in reached], [seeds[k] for k in reached]
                found = torch.autograd.grad(of, views, starts, create_graph=record, allow_unused=True)
        else:  # below a transform of torch.func, which keeps to itself what requires a gradient
            found = torch.func.vjp(given, *views)[1](seeds)
    place = dict(zip(wanted, found, strict=True))
    return tuple(place.get(k) for k in range(len(operands)))


def push(function: Callable[..., Any], operands: Operands, tangents: Operands) -> Any:
    """The change of ``function``'s outputs as its operands change by ``tangents`` (None: not at all).

    By two pulls: the gradient of the operands is linear in that of the outputs, and the pull of that map is the push.
    """
    moving = [k for k, tangent in enumerate(tangents) if tangent is not None and operands[k] is not None]

    def of_moving(*values: Tensor) -> Any:
        place = dict(zip(moving, values, strict=True))
        return function(*(place.get(k, tensor) for k, tensor in enumerate(operands)))

    vjp: Any = torch.func.vjp  # declared with a third result, which it has on request
    outputs, back = vjp(of_moving, *(operands[k] for k in moving))
    # Any gradient of the outputs would do; one of zeros would meet the rule that a zero wins over inf.
    ones = torch.ones_like(outputs) if isinstance(outputs, Tensor) else tuple(map(torch.ones_like, outputs))
    _, forth = vjp(back, ones)
    (found,) = forth(tuple(tangents[k] for k in moving))
    return found
