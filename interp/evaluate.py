"""In-context error of a model: for each prompt and each number k of examples seen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooks.errors import BadArgument, NonFinite, told
from interp import seeds
from interp.arguments import listed, whole_number
from interp.machine.progress import followed
from interp.tasks.base import Batch, Model, Task, TokenTask, at_the_query


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
    query_only: bool = False,
) -> Float[Tensor, "n n_asked"]:
    """``task.error`` of each prompt and example, on the CPU: squared error ÷ ``task.scale`` in regression, where 1
    is predicting zero; 0/1 in classification; nats where the answer is random.

    ``batch`` gives prompts instead of drawing them (then n, seed and purpose are not used). ``query_only`` asks for
    the last example alone, which is one forward for any task: (n, 1). Otherwise (n, n_pairs).
    See ``predictions`` for how the model is run.
    """
    batch = prompts(task, n, seed, purpose) if batch is None else batch
    if not isinstance(batch, Batch):
        raise BadArgument(f"batch is {told(batch)}: give what task.sample(…) or evaluate.prompts(…) made")
    predicted = predictions(model, task, batch, batch_size, query_only=query_only)
    error = task.error(predicted, batch.last() if query_only else batch)
    _check_finite("error", error, 0, batch)
    return error


def predictions(
    model: Model, task: Task, batch: Batch, batch_size: int = 256, *, query_only: bool = False
) -> Float[Tensor, "n n_asked *out"]:
    """The model's prediction of every example, or with ``query_only`` of the last one, on the CPU.

    The model runs without gradients and in eval mode; each submodule's mode is put back, also if it
    raises. Tokens go to the device and the dtype of the model's parameters; a plain function gets
    them as they are. Purposes never share a stream (``seeds``): these are not training data.
    Raises ``NonFinite`` if any prediction is NaN or inf: a mean would hide which.
    """
    whole_number("batch_size", batch_size, least=1)
    parts = []
    with torch.no_grad(), _evaluating(model):
        for start in followed(range(0, len(batch), batch_size), "evaluate"):
            part = batch.take(slice(start, start + batch_size)).fed(model)
            made = _predict(model, task, part, query_only)
            _check_finite("prediction", made, start, part)
            parts.append(made.detach().cpu())
    return torch.cat(parts)


def _predict(model: Model, task: Task, batch: Batch, query_only: bool) -> Float[Tensor, "n n_asked *out"]:
    """The prediction of every example or of the last; one forward answers all of them where tokens are integers."""
    if query_only and not isinstance(task, TokenTask):
        return at_the_query(model, batch, task.d_out)
    made = task.predict(model, batch)
    return made[:, -1:] if query_only else made


def summary(
    model: Model, task: Task, ks: Iterable[int] | None = None, n: int = 1280, seed: int = 0
) -> dict[int, dict[str, float]]:
    """``{k: {"error", "standard_error", "n"}}``: mean over prompts of ``task.error``.

    ``ks`` are numbers of examples seen, ``task.report_ks`` unless given.
    JSON turns the keys into text. Raises ``BadArgument`` for a k outside 0 … n_pairs - 1, and for
    fewer than two prompts.
    """
    whole_number("n", n, least=2)
    asked = [whole_number("k", k, 0, task.n_pairs - 1) for k in (task.report_ks if ks is None else listed("ks", ks))]
    last = task.n_pairs - 1
    error = errors(model, task, n=n, seed=seed, query_only=set(asked) == {last}).double()
    columns = {k: error[:, k - last - 1] for k in asked}  # from the right: there may be the last one only
    return {
        k: {"error": float(column.mean()), "standard_error": float(column.std() / math.sqrt(n)), "n": n}
        for k, column in columns.items()
    }


@contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    """Eval mode inside; afterwards each submodule that was in training mode is in it again.

    ``model.train(before)`` would not do: it puts one mode on all of them, and a model with a part
    held in eval mode would come out changed.
    """
    training = [m for m in model.modules() if m.training] if isinstance(model, nn.Module) else []
    try:
        if isinstance(model, nn.Module) and training:
            model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def _check_finite(what: str, values: Float[Tensor, "batch n_asked *out"], start: int, batch: Batch) -> None:
    """Nothing, or ``NonFinite`` that names the first prompt and example."""
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        prompt, column = int(bad[0, 0]), int(bad[0, 1])
        k = column + batch.targets.shape[1] - values.shape[1]
        raise NonFinite(
            f"the {what} of prompt {start + prompt}, example {k} is {float(values[tuple(bad[0])])}; "
            f"{len(bad)} of {values.numel()} in this batch are not finite: run the model on that "
            f"prompt with hooks.record to see where it starts"
        )
