"""Classical estimators of in-context regression: example k is predicted from the k pairs before it.

``estimators.build("ridge", alpha=0.1)(batch)`` has the axes (batch, example k) of the task's loss.
Everything is computed in fp64 on the CPU and comes back in the dtype and on the device of ``y``:
these are the exact values that a trained model is held against. Those that are fitted anew for
every prompt and k (lasso, tree, boosted_trees, mlp) take ``ks``: then the others are NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from interp.arguments import chosen
from interp.estimators.base import Estimator, Pairs
from interp.estimators.chains import add_beta
from interp.estimators.descent import gd, gdpp, newton, online_gd
from interp.estimators.fitted import boosted_trees, lasso, tree
from interp.estimators.linear import (
    averaging,
    averaging_weights,
    bayes,
    moments,
    ols,
    ols_weights,
    ridge,
    ridge_weights,
)
from interp.estimators.local import kernel_ridge, knn
from interp.estimators.network import mlp
from interp.estimators.pool import dmmse

__all__ = [
    "ESTIMATORS",
    "Estimator",
    "Pairs",
    "averaging",
    "averaging_weights",
    "build",
    "knn",
    "moments",
    "names",
    "ols",
    "ols_weights",
    "ridge",
    "ridge_weights",
]

ESTIMATORS: dict[str, Callable[..., Estimator]] = {
    "ols": ols,
    "ridge": ridge,
    "bayes": bayes,
    "lasso": lasso,
    "knn": knn,
    "averaging": averaging,
    "kernel_ridge": kernel_ridge,
    "gd": gd,
    "gdpp": gdpp,
    "newton": newton,
    "online_gd": online_gd,
    "tree": tree,
    "boosted_trees": boosted_trees,
    "mlp": mlp,
    "dmmse": dmmse,
    "add_beta": add_beta,
}


def names() -> list[str]:
    """The names that ``build`` takes."""
    return list(ESTIMATORS)


def build(name: str, **config: Any) -> Estimator:
    """The estimator called ``name``, a function of a batch that gives its predictions.

    Raises ``BadArgument`` for a name or an option that does not exist, with the nearest that does,
    and for a value that the option cannot have.
    """
    return chosen("estimator", name, ESTIMATORS, config)(**config)
