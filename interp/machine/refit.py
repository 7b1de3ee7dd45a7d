"""One regressor fitted anew on the first pairs of a prompt, for every prompt and every number of pairs.

This is all that a worker process imports: it has no torch, which would take a worker seconds and 400 MB.
"""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import numpy as np


class Regressor(Protocol):
    """What scikit-learn and xgboost have in common."""

    def fit(self, x: np.ndarray, y: np.ndarray) -> Any:
        """The regressor itself, fitted; nothing is left of an earlier fit."""
        ...

    def predict(self, x: np.ndarray) -> np.ndarray:
        """One number for each row of x."""
        ...


class ExactLasso:
    """The minimum of (1/2k) Σ (y_i - w·x_i)² + alpha |w|₁: where its path (LARS) ends, once that is checked.

    scikit-learn's path is exact and does not slow down for small alpha, but in about one of a
    hundred problems with k near d it takes a wrong turn and says nothing. So its answer is held
    against the conditions of the minimum; where they fail, coordinate descent has the word.
    """

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def fit(self, x: np.ndarray, y: np.ndarray) -> ExactLasso:
        """This regressor with ``w``, the minimum."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import Lasso, LassoLars

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # of the path, which is checked
            self.w = LassoLars(alpha=self.alpha, fit_intercept=False).fit(x, y).coef_
        if not self.is_minimum(x, y):
            descent = Lasso(alpha=self.alpha, fit_intercept=False, tol=1e-8, max_iter=200_000)
            self.w = descent.fit(x, y).coef_
        return self

    def predict(self, x: np.ndarray) -> np.ndarray:
        """w·x of each row."""
        return x @ self.w

    def is_minimum(self, x: np.ndarray, y: np.ndarray) -> bool:
        """Whether c = xᵀ(y - x w) / k is alpha sign(w) where w ≠ 0, and in [-alpha, alpha] where w = 0."""
        c = x.T @ (y - x @ self.w) / len(y)
        off = np.where(self.w == 0, np.maximum(np.abs(c) - self.alpha, 0), c - self.alpha * np.sign(self.w))
        return bool(np.abs(off).max() <= 1e-8 * np.abs(x.T @ y).max() / len(y))


def each_prefix(regressor: Regressor, x: np.ndarray, y: np.ndarray, ks: list[int]) -> np.ndarray:
    """The prediction of example k by a fit to the k pairs before it: (prompt, one of ``ks``), each k at least 1.

    x is (prompt, n_pairs, d) and y (prompt, n_pairs).
    """
    import sklearn

    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
        return np.array(
            [
                [regressor.fit(inputs[:k], labels[:k]).predict(inputs[k : k + 1]).item() for k in ks]
                for inputs, labels in zip(x, y, strict=True)
            ]
        )
