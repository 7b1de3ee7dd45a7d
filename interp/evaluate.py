"""In-context error of a model: for each prompt and each number k of examples seen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooks.errors import NonFinite
from interp import seeds
from interp.arguments import whole_number
from interp.tasks.base import Batch, Model, Task


def prompts(task: Task, n: int = 1280, seed: int = 0, purpose: str = "evaluate") -> Batch:
    """The ``n`` prompts that ``errors`` uses for this purpose and seed, on the CPU.

    All are drawn in one call, so no number depends on how they are later cut into batches.
    """
    return task.sample(n, seeds.generator(purpose, seed))


def errors(
    model: Model,
    task: Task,
    n: int = 1280,
    seed: int = 0,
    purpose: str = "evaluate",
    batch_size: int = 256,
    *,
    batch: Batch | None = None,
) -> Float[Tensor, "n n_pairs"]:
    """Squared error ÷ ``task.scale`` of each prompt and example, on the CPU; 1 is predicting zero.

    ``batch`` gives prompts instead of drawing them (then n, seed and purpose are not used).
    The model runs without gradients and in eval mode; each submodule's mode is put back, also if it
    raises. Tokens go to the device and the dtype of the model's parameters; a plain function gets
    them as they are. Purposes never share a stream (``seeds``): these are not training data.
    Raises ``NonFinite`` if any prediction is NaN or inf: a mean would hide which.
    """
    whole_number("batch_size", batch_size, least=1)
    batch = prompts(task, n, seed, purpose) if batch is None else batch
    parts = []
    with torch.no_grad(), _evaluating(model):
        for start in range(0, len(batch), batch_size):
            part = _fit(batch.take(slice(start, start + batch_size)), model)
            error = task.loss(task.predict(model, part), part) / task.scale
            _check_finite(error, start)
            parts.append(error.cpu())
    return torch.cat(parts)


def summary(
    model: Model, task: Task, ks: Iterable[int] | None = None, n: int = 1280, seed: int = 0
) -> dict[int, dict[str, float]]:
    """``{k: {"error", "standard_error", "n"}}``: mean over prompts of squared error ÷ scale.

    ``ks`` are numbers of examples seen, d, 2d and 4d unless given (those that the task has).
    JSON turns the keys into text. Raises ``BadArgument`` for a k outside 0 … n_pairs - 1, and for
    fewer than two prompts.
    """
    whole_number("n", n, least=2)
    if ks is None:
        ks = [k for k in (task.d, 2 * task.d, 4 * task.d) if k < task.n_pairs]
    asked = [whole_number("k", k, 0, task.n_pairs - 1) for k in ks]
    error = errors(model, task, n=n, seed=seed).double()
    spread = error.std(dim=0) / math.sqrt(n)
    return {k: {"error": float(error[:, k].mean()), "standard_error": float(spread[k]), "n": n} for k in asked}


@contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    """Eval mode inside; afterwards every submodule has its own mode back.

    ``model.train(before)`` would not do: it puts one mode on all of them, and a model with a part
    held in eval mode would come out changed.
    """
    modes = [(m, m.training) for m in model.modules()] if isinstance(model, nn.Module) else []
    try:
        if isinstance(model, nn.Module):
            model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _fit(batch: Batch, model: Model) -> Batch:
    """The batch on the model's device, its tokens in the model's dtype.

    Labels keep theirs: in a half-precision model they would otherwise be rounded like the
    predictions, and the error would come out too small.
    """
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if first is None:
        return batch
    batch = batch.to(first.device)
    if not batch.tokens.is_floating_point():
        return batch
    return dataclasses.replace(batch, tokens=batch.tokens.to(first.dtype))


def _check_finite(error: Float[Tensor, "batch n_pairs"], start: int) -> None:
    """Nothing, or ``NonFinite`` that names the first prompt and example."""
    bad = (~error.isfinite()).nonzero()
    if len(bad):
        prompt, k = int(bad[0, 0]), int(bad[0, 1])
        raise NonFinite(
            f"the error of prompt {start + prompt}, example {k} is {float(error[prompt, k])}; "
            f"{len(bad)} of {error.numel()} in this batch are not finite: run the model on that "
            f"prompt with hooks.record to see where it starts"
        )
