"""What the card of a trained model says of its training: its task, the errors it was saved with, and the refusals that
follow from both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float
from torch import Tensor

from hooks.errors import BadArgument
from interp import tasks
from interp.tasks import Task, TokenTask


class Carded(Protocol):
    """A trained model: its card, and its config with ``d_in`` and ``d_out``."""

    @property
    def card(self) -> Mapping[str, Any]:
        """What it was trained on and what it measured."""
        ...

    @property
    def cfg(self) -> Any:
        """The fields that it was built from."""
        ...


def trained_task(name: str, model: Carded, asked: str, options: Mapping[str, Any] | None = None) -> Task:
    """The task that ``model`` was trained on, with ``options`` in place of its own.

    Raises ``BadArgument`` where there is no task ``asked``, the card names another, or the tokens are then not those
    that the model reads.
    """
    trained_on = model.card.get("task")
    if trained_on != asked:
        tasks.build(asked)
        raise BadArgument(f'{name} was trained on "{trained_on}", not on "{asked}"')
    own = model.card["task_config"]
    task = tasks.build(asked, **{**own, **(options or {})})
    if (task.d_token, task.d_out) != (model.cfg.d_in, model.cfg.d_out):
        raise BadArgument(
            f"{name} reads tokens of {model.cfg.d_in} numbers and this task has {task.d_token}; it was trained on {own}"
        )
    return task


def common_task(models: Mapping[str, Carded], asked: str, options: Mapping[str, Any] | None = None) -> Task:
    """The one task that all of ``models`` were trained on, with ``options`` in place of its own.

    Raises ``BadArgument`` as ``trained_task`` does, and where one was trained with other options than the first.
    """
    names = list(models)
    found = [trained_task(name, models[name], asked, options) for name in names]
    first = models[names[0]].card["task_config"]
    for name in names:
        own = models[name].card["task_config"]
        differs = differ(first, own)
        if differs:
            raise BadArgument(
                f"{name} was trained on another task than {names[0]}: "
                + ", ".join(f"{key}={own.get(key)} instead of {first.get(key)}" for key in differs)
            )
    return found[0]


def differing(models: Mapping[str, Carded], task: Task) -> list[str]:
    """A line for each model that was trained with other options than ``task`` has, saying which."""
    found = {
        name: (model.card["task_config"], differ(model.card["task_config"], task.config))
        for name, model in models.items()
    }
    return [
        f"{name} was trained with {', '.join(f'{key}={own.get(key)}' for key in keys)}"
        for name, (own, keys) in found.items()
        if keys
    ]


def differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The options of which the two have different values."""
    return sorted(key for key in {*one, *other} if one.get(key) != other.get(key))


def need_vectors(task: Task, what: str) -> None:
    """Nothing, or ``BadArgument``: the tokens of ``task`` are integers, and ``what`` works with pairs (x, y)."""
    if isinstance(task, TokenTask):
        raise BadArgument(
            f'"{task.name}" has integers for tokens, and {what} works with pairs of x and y; '
            "python -m analyses.learning_curves works on both"
        )


def gaps(
    card: Mapping[str, Any], errors: Mapping[int, Float[np.ndarray, " prompt"] | Float[Tensor, " prompt"]]
) -> dict[int, float]:
    """For each number k of examples that the card has, how far the mean of ``errors[k]`` is from it, in standard errors
    of the difference of two independent sets of prompts; 0 where neither set has any error.

    The spread of one prompt is the larger of the two sets': of few prompts with a heavy tail the mean and the spread
    come out small together.
    """
    found = {}
    for k, error in errors.items():
        said = card.get("measured", {}).get("model", {}).get(f"k={k}")
        if said is not None:
            own = np.asarray(error, dtype=np.float64)
            n = card["measured"]["n"]
            variance = max(said["standard_error"] ** 2 * n, float(own.var(ddof=1)))
            spread = (variance / n + variance / len(own)) ** 0.5
            found[k] = abs(float(own.mean()) - said["error"]) / max(spread, 1e-12)
    return found


def alike(models: Mapping[str, Carded], asked: str) -> list[str]:
    """The names of those of ``models`` that were trained on the task ``asked``, with the same options as
    ``mamba-<asked>``, or as the first of them where there is no such.
    """
    own = [name for name, model in models.items() if model.card.get("task") == asked]
    first = f"mamba-{asked}" if f"mamba-{asked}" in own else next(iter(own), "")
    return [name for name in own if models[name].card["task_config"] == models[first].card["task_config"]]
