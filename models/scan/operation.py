"""An operation that torch cannot look into, under autograd and under the transforms of ``torch.func``.

Compiled code reads memory: it knows neither gradients nor the extra axes of ``vmap``. What it lacks is made here, once
for all of it:

* the gradient is an operation of its own, which a backward calls and ``vmap`` can batch. Where that gradient is to be
  differentiated again, the definition is: a number that came out of compiled code would count as a constant;
* ``vmap`` folds its axis into the batch of the operands, since the operation does every sequence by itself. Where it
  runs over a weight, which all sequences share, the operation is called once for each;
* forward mode is that of the definition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hooks.derivatives import Operands, pull, push
from hooks.transforms import every_order, translated


@dataclass(frozen=True, eq=False)
class Operation:
    """Operands have their sequences on axis 0, but for the weights at the places ``shared``; so have all results."""

    definition: Callable[..., Any]
    """The same in torch: its outputs, differentiable any number of times. Shared operands may have axis 0 as well."""
    forward: Callable[..., tuple[Tensor, ...]]
    """Of ``(operands, keep)``: the outputs, then whatever else ``backward`` may want, complete only if ``keep``."""
    outputs: int
    backward: Callable[..., Sequence[Tensor]] | None = None
    """Of ``(operands, results, grads)``: gradients, with axis 0 for shared operands too; None: by the definition."""
    saved: tuple[int, ...] = ()
    """The places of the results that ``backward`` wants."""
    shared: tuple[int, ...] = ()

    def __call__(self, *operands: Tensor | None) -> Any:
        """The outputs; one of them alone, several as a tuple."""
        keep = torch.is_grad_enabled() and any(o is not None and o.requires_grad for o in operands)
        results = _Run.apply(self, keep, *operands)
        return results[0] if self.outputs == 1 else results[: self.outputs]


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(operation: Operation, keep: bool, *operands: Tensor | None) -> tuple[Tensor, ...]:
        return operation.forward(operands, keep)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.operation, _, *operands = inputs
        ctx.others = len(output) - ctx.operation.outputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[ctx.operation.outputs :])
        ctx.save_for_backward(*operands, *(output[k] for k in ctx.operation.saved))
        ctx.save_for_forward(*operands)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        operation, needed = ctx.operation, ctx.needs_input_grad[2:]
        kept = ctx.saved_tensors  # once: activation checkpointing gives each out a single time
        operands, saved = kept[: len(needed)], kept[len(needed) :]
        if all(grad is None for grad in grads[: operation.outputs]):
            return (None,) * (2 + len(needed))

        def gradients(*grads: Tensor | None) -> tuple[Tensor | None, ...]:
            if operation.backward is None:
                return pull(operation.definition, operands, needed, grads)
            found = _Gradient.apply(operation, needed, *operands, *grads, *saved)
            place = dict(zip(_places(operands, needed), found, strict=True))
            place |= {k: place[k].sum(0) for k in operation.shared if k in place}
            return tuple(place.get(k) for k in range(len(needed)))

        return None, None, *translated(gradients, *grads[: operation.outputs])

    @staticmethod
    @every_order
    def jvp(ctx: Any, saved: Any, *tangents: Tensor | None) -> Any:
        operation, tangents = ctx.operation, tangents[2:]
        found = push(operation.definition, saved[: len(tangents)], tangents)
        return *(found if isinstance(found, tuple) else (found,)), *(None,) * ctx.others

    @staticmethod
    def vmap(info: Any, in_dims: Any, operation: Operation, keep: bool, *operands: Tensor | None) -> Any:
        return batched(
            info, in_dims[2:], operation.shared, operands, lambda *given: _Run.apply(operation, keep, *given)
        )


class _Gradient(torch.autograd.Function):
    """Gradients of the operands that need one, each with the sequences on axis 0."""

    @staticmethod
    def forward(operation: Operation, needed: Sequence[bool], *given: Tensor | None) -> tuple[Tensor, ...]:
        assert operation.backward is not None
        operands, grads, saved = _split(operation, len(needed), given)
        found = operation.backward(operands, saved, grads)
        return tuple(found[k] for k in _places(operands, needed))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.operation, ctx.needed, *given = inputs
        ctx.set_materialize_grads(False)
        kept = given[: len(ctx.needed) + ctx.operation.outputs]
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)
        ctx.others = len(given) - len(kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        needed = ctx.needs_input_grad[2 : 2 + len(given)]
        function = _gradient_of(ctx.operation, ctx.needed)
        found = translated(lambda *each: pull(function, given, needed, each), *grads)
        return None, None, *found, *(None,) * ctx.others

    @staticmethod
    @every_order
    def jvp(ctx: Any, saved: Any, *tangents: Tensor | None) -> Any:
        return push(_gradient_of(ctx.operation, ctx.needed), saved, tangents[2 : 2 + len(saved)])

    @staticmethod
    def vmap(info: Any, in_dims: Any, operation: Operation, needed: Sequence[bool], *given: Tensor | None) -> Any:
        return batched(
            info, in_dims[2:], operation.shared, given, lambda *each: _Gradient.apply(operation, needed, *each)
        )


def _gradient_of(operation: Operation, needed: Sequence[bool]) -> Callable[..., tuple[Tensor, ...]]:
    """What ``_Gradient`` computes, by the definition: a function of operands and gradients."""

    def function(*given: Tensor | None) -> tuple[Tensor, ...]:
        operands, grads, _ = _split(operation, len(needed), given)
        batch = next(o for k, o in enumerate(operands) if o is not None and k not in operation.shared).shape[0]
        # A weight for each sequence, so that each has its gradient.
        rows = [
            o.expand(batch, *o.shape) if o is not None and k in operation.shared else o for k, o in enumerate(operands)
        ]
        found = pull(operation.definition, rows, needed, grads)
        places = _places(operands, needed)
        return tuple(torch.zeros_like(rows[k]) if found[k] is None else found[k] for k in places)  # type: ignore[arg-type,misc]

    return function


def _places(operands: Operands, needed: Sequence[bool]) -> list[int]:
    return [k for k, operand in enumerate(operands) if needed[k] and operand is not None]


def _split(operation: Operation, count: int, given: Operands) -> tuple[Operands, Operands, Operands]:
    """Operands, gradients of the outputs, and saved results."""
    end = count + operation.outputs
    return given[:count], given[count:end], given[end:]


def batched(
    info: Any,
    dims: Sequence[int | None],
    shared: Sequence[int],
    given: Operands,
    call: Callable[..., tuple[Tensor, ...]],
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """``call`` with the axis of a ``vmap`` folded into axis 0, or once for each place on it; it returns as axis 0."""
    size = info.batch_size
    first = [None if t is None or dim is None else t.movedim(dim, 0) for t, dim in zip(given, dims, strict=True)]
    if any(first[k] is not None for k in shared):
        each = [call(*(t if f is None else f[i] for t, f in zip(given, first, strict=True))) for i in range(size)]
        results = tuple(torch.stack(parts) for parts in zip(*each, strict=True))
        return results, (0,) * len(results)
    folded = []
    for k, (tensor, moved) in enumerate(zip(given, first, strict=True)):
        if tensor is None or k in shared:
            folded.append(tensor)
            continue
        whole = tensor.expand(size, *tensor.shape) if moved is None else moved
        folded.append(whole.flatten(0, 1))
    results = tuple(result.unflatten(0, (size, -1)) for result in call(*folded))
    return results, (0,) * len(results)
