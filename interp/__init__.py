"""Questions about anything that has sites: what to ask them on, and how sure the answer is.

tasks       what a model is asked to learn in context       tasks.build("linreg", d=5)
estimators  what a classical method would predict           estimators.build("ols")(batch)
shifts      what changes about a task at test time           shifts.apply(task, "skewed_inputs")
evaluate    error of each prompt and number of examples     evaluate.errors(model, task)
stats       intervals, paired tests, multiple comparisons   stats.bootstrap(errors)
seeds       named random streams                            seeds.generator("probe", 0)
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["estimators", "evaluate", "seeds", "shifts", "stats", "tasks"]


def __getattr__(name: str) -> Any:
    """A part on first use: a command prints its help without loading torch."""
    if name in __all__:
        return importlib.import_module("interp.tasks.shifts" if name == "shifts" else f"interp.{name}")
    raise AttributeError(f"interp has no part called {name}")
