"""Rivals by name: what a task compares itself with, and any estimator, each on the prompts that a model saw.

rivals.build(task, ["ols", "lasso:alpha=0.1", "gd:steps=5,rate=0.1"])
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.errors import BadArgument, unknown
from interp import estimators
from interp.arguments import known_options, listed, name_and_options
from interp.tasks import Batch, Task, TokenTask

EXTRA = {
    "sparse_linreg": ("lasso",),
    "decision_tree": ("tree:depth={depth}", "kernel_ridge"),
    "relu_net": ("mlp", "kernel_ridge"),
    "polynomial": ("kernel_ridge",),
    "single_index": ("kernel_ridge",),
}
"""Estimators that fit a task, with options from its config; its baselines leave them out, since most of them fit anew
for each prompt and k and would slow the evaluations of a training."""
ORACLES = {
    *("clean_ols", "clean_both", "clean_vote", "ols_on_support", "mean_in_leaf", "entropy"),
    *("knn_in_subspace", "knn_on_index"),
}
"""Baselines that are told more than the context holds; so is an estimator on inputs that are projected on the truth."""
TABLES = ("pool",)
"""Options that are arrays and cannot be written on a command line."""


@dataclass(frozen=True)
class Rival:
    """One rival. ``options`` is None for a baseline of the task, which gives its errors itself."""

    name: str
    estimator: str
    options: Mapping[str, Any] | None

    @property
    def fitted(self) -> bool:
        """Whether each prompt and k costs a fit of its own."""
        return self.options is not None and "ks" in inspect.signature(estimators.ESTIMATORS[self.estimator]).parameters

    def predict(self, batch: Batch, ks: Sequence[int]) -> Tensor:
        """An estimator's predictions of the examples ``ks``; those of the others are NaN where it is ``fitted``."""
        assert self.options is not None
        more = {"ks": list(ks)} if self.fitted else {}
        return estimators.build(self.estimator, **self.options, **more)(batch)

    def errors(
        self, task: Task, batch: Batch, ks: Sequence[int], own: Mapping[str, Tensor]
    ) -> Float[Tensor, "prompt k"]:
        """``task.error`` at the examples ``ks`` of each prompt; ``own`` is what ``task.baselines(batch)`` gave."""
        if self.options is None:
            return own[self.name][:, list(ks)] / task.scale
        # The error of all examples needs finite predictions of all: those not asked are never read.
        predicted = self.predict(batch, ks)
        if self.fitted:
            predicted = predicted.nan_to_num()
        return task.error(predicted, batch)[:, list(ks)]


def baselines(task: Task) -> list[str]:
    """The names of the task's own baselines."""
    return list(task.baselines(task.sample(2, torch.Generator().manual_seed(0))))


def extra(task: Task) -> list[str]:
    """The estimators that fit the task and that are not among its baselines."""
    return [text.format(**task.config) for text in EXTRA.get(task.name, ())]


def usual(task: Task) -> list[str]:
    """The task's baselines, and the estimators that fit it."""
    return [*baselines(task), *extra(task)]


def build(task: Task, asked: Sequence[str]) -> list[Rival]:
    """The rivals that these texts name: ``name``, or ``name:option=value,option=value`` of an estimator.

    A baseline of the task goes before an estimator of the same name.
    Raises ``BadArgument`` for a name, an option or a value that does not work, and for an estimator that cannot
    answer this task.
    """
    own, asked = baselines(task), listed("rivals", asked)
    doubled = sorted({text for text in asked if asked.count(text) > 1})
    if doubled:
        raise BadArgument(f"the rival {doubled[0]} is given twice; give each once")
    return [Rival(text, text, None) if text in own else _estimator(task, text, own) for text in asked]


def _estimator(task: Task, text: str, own: Sequence[str]) -> Rival:
    name = text.partition(":")[0]
    if name not in estimators.names():
        have = list(dict.fromkeys([*own, *estimators.names()]))
        raise BadArgument(f"{unknown('rival', name, have)}; there is: {', '.join(have)}")
    _suits(task, name)
    _, options = name_and_options("rivals", text)
    if name == "add_beta":
        known = {key: task.config[key] for key in ("order", "n_symbols", "beta", "switch")}
        options = {**known, **options}
    known_options(name, estimators.ESTIMATORS[name], options)
    needed = inspect.signature(estimators.ESTIMATORS[name]).parameters
    absent = [key for key, option in needed.items() if option.default is option.empty and key not in options]
    if absent:
        raise BadArgument(f"the rival {name} needs {' and '.join(absent)}: write {name}:{absent[0]}=…")
    estimators.build(name, **options)
    return Rival(text, name, options)


def _suits(task: Task, name: str) -> None:
    """Nothing, or ``BadArgument``: the estimator would answer another question than the task asks."""
    needed = inspect.signature(estimators.ESTIMATORS[name]).parameters
    tables = [key for key in TABLES if key in needed]
    if tables:
        raise BadArgument(f"the rival {name} needs a table ({tables[0]}) that no command line holds: use it in Python")
    if (name == "add_beta") != (task.name == "markov"):
        what = "counts the symbols of a Markov chain" if name == "add_beta" else "predicts a number from pairs of x, y"
        raise BadArgument(f'the rival {name} {what}, which "{task.name}" is not; its own are: {_own(task)}')
    if isinstance(task, TokenTask):
        return
    if task.name == "outlier_linreg" and task.config["tokens"] == "joint" and task.config["clean_only"]:
        raise BadArgument(
            f'in joint tokens "{task.name}" asks for the clean twin of an outlier, which {name} would not be told; '
            f"its own rivals are: {_own(task)}"
        )


def _own(task: Task) -> str:
    return ", ".join(baselines(task))


def fair(names: Sequence[str]) -> list[str]:
    """Those of the names that are told nothing but the context, and do something with it."""
    return [name for name in names if name not in ORACLES and "project=" not in name and name != "zero"]
