"""Tasks by name: ``tasks.build("linreg", d=5)``; one file per task, and one line in ``TASKS``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from interp.arguments import chosen
from interp.tasks.base import Batch, Task, TokenTask
from interp.tasks.decision_tree import decision_tree
from interp.tasks.linreg import linear_regression
from interp.tasks.markov import Markov
from interp.tasks.mqar import AssociativeRecall
from interp.tasks.outlier_linreg import OutlierLinearRegression
from interp.tasks.outliers import Outliers
from interp.tasks.polynomial import polynomial
from interp.tasks.relu_net import relu_network
from interp.tasks.selective_copy import SelectiveCopy
from interp.tasks.single_index import single_index
from interp.tasks.sparse_linreg import sparse_linear_regression
from interp.tasks.sparse_parity import SparseParity

__all__ = ["TASKS", "Batch", "Task", "TokenTask", "build", "names"]

TASKS: dict[str, Callable[..., Task]] = {
    "linreg": linear_regression,
    "sparse_linreg": sparse_linear_regression,
    "polynomial": polynomial,
    "relu_net": relu_network,
    "decision_tree": decision_tree,
    "single_index": single_index,
    "outliers": Outliers,
    "outlier_linreg": OutlierLinearRegression,
    "markov": Markov,
    "mqar": AssociativeRecall,
    "selective_copy": SelectiveCopy,
    "sparse_parity": SparseParity,
}


def names() -> list[str]:
    """The names that ``build`` takes."""
    return list(TASKS)


def build(name: str, **config: Any) -> Task:
    """The task called ``name`` with these options, for example ``build("linreg", d=8)``.

    Raises ``BadArgument`` for a name or an option that does not exist, with the nearest that does,
    and for a value that the task cannot have.
    """
    return chosen("task", name, TASKS, config)(**config)
