"""Tasks by name: ``tasks.build("linreg", d=5)``; one file per task, and one line in ``TASKS``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hooks.errors import BadArgument, unknown
from interp.arguments import known_options
from interp.tasks.base import Batch, Task
from interp.tasks.linreg import LinearRegression
from interp.tasks.outlier_linreg import OutlierLinearRegression
from interp.tasks.outliers import Outliers

__all__ = ["TASKS", "Batch", "Task", "build", "names"]

TASKS: dict[str, Callable[..., Task]] = {
    "linreg": LinearRegression,
    "outlier_linreg": OutlierLinearRegression,
    "outliers": Outliers,
}


def names() -> list[str]:
    """The names that ``build`` takes."""
    return list(TASKS)


def build(name: str, **config: Any) -> Task:
    """The task called ``name`` with these options, for example ``build("linreg", d=8)``.

    Raises ``BadArgument`` for a name or an option that does not exist, with the nearest that does,
    and for a value that the task cannot have.
    """
    if name not in TASKS:
        raise BadArgument(unknown("task", name, TASKS))
    known_options(name, TASKS[name], config)
    return TASKS[name](**config)
