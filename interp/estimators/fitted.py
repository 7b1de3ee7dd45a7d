"""Rivals that scikit-learn or xgboost fits anew for every prompt and every k, on every core.

A fit is one regressor on the k pairs before example k. It depends on those pairs alone: not on the
other prompts, nor on how many processes share the work, so the numbers are the same for any
``workers``. All of them predict 0 at k = 0, and take

ks        only these numbers of examples; the other predictions are NaN. All unless given.
workers   processes; None is one for each core, or none beside this one where the work is small.

scikit-learn is imported where it is used: it takes a second, and every task imports this package.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.errors import BadArgument
from interp.arguments import one_of, whole_number
from interp.estimators.base import Estimator, Pairs, blank, exact, only
from interp.estimators.iterative import positive
from interp.machine.progress import progress
from interp.machine.refit import ExactLasso, Regressor, each_prefix

FITS = 64
"""Fits of one piece of work: 0.1 s of Lasso, 3 s of boosted trees."""
SMALL = 8
"""Up to so many pieces are done before other processes have started."""


def lasso(alpha: float = 0.01, ks: Sequence[int] | None = None, workers: int | None = None) -> Estimator:
    """argmin_w (1/2k) Σ_{i<k} (y_i - w·x_i)² + alpha |w|₁, without intercept; see the top of the file.

    The released baselines of arXiv 2208.01066 have alpha = 1, .1, … 1e-4, solved by scikit-learn's
    coordinate descent as it comes. That stops short where k < d and alpha is small: with w ~ N(0, I_20)
    and alpha = 1e-4, |ŵ - w|² / d after two pairs is 4.3 and not 1.2. Here it is the minimum itself.
    """
    positive("alpha", alpha, ' ("ols" has none)')
    return _each_fit("lasso", ExactLasso(alpha), ks, workers)


def tree(depth: int | None = 4, ks: Sequence[int] | None = None, workers: int | None = None) -> Estimator:
    """A greedy regression tree (CART) of at most ``depth`` splits on a path, None without bound.

    Leaves are means of labels. Splits that are equally good, which a few pairs always have, are
    settled by scikit-learn's shuffle of the coordinates from a fixed seed. It holds x in fp32.
    """
    if depth is not None:
        whole_number("depth", depth, least=1)
    from sklearn.tree import DecisionTreeRegressor

    return _each_fit("tree", DecisionTreeRegressor(max_depth=depth, random_state=0), ks, workers)


def boosted_trees(
    trees: int = 50,
    depth: int = 4,
    rate: float = 0.1,
    library: str = "scikit-learn",
    ks: Sequence[int] | None = None,
    workers: int | None = None,
) -> Estimator:
    """``trees`` trees of ``depth`` splits on a path, each fitted to ``rate`` less of the error left; squared error.

    The defaults are the settings of arXiv 2402.03170. ``library="xgboost"`` is what that paper used,
    an extra here: it also shrinks leaves (its L2 penalty of 1). Of scikit-learn's two kinds this is
    the exact one: the histogram one splits no node of fewer than 40 pairs unless told otherwise.
    """
    whole_number("trees", trees, least=1)
    whole_number("depth", depth, least=1)
    positive("rate", rate)
    options: dict[str, Any] = {"n_estimators": trees, "max_depth": depth, "learning_rate": rate, "random_state": 0}
    if one_of("library", library, ("scikit-learn", "xgboost")) == "scikit-learn":
        from sklearn.ensemble import GradientBoostingRegressor

        return _each_fit("boosted trees", GradientBoostingRegressor(**options), ks, workers)
    try:
        xgboost = importlib.import_module("xgboost")
    except ImportError:
        raise BadArgument(
            'library="xgboost" is not installed; pip install "mambascope[boosted]", or take "scikit-learn"'
        ) from None
    return _each_fit("boosted trees", xgboost.XGBRegressor(**options, n_jobs=1), ks, workers)


def _each_fit(name: str, regressor: Regressor, ks: Sequence[int] | None, workers: int | None) -> Estimator:
    """The estimator that fits ``regressor`` anew for every prompt and every k of ``ks``."""
    if workers is not None:
        whole_number("workers", workers, least=1)

    def predict(pairs: Pairs) -> Float[Tensor, "batch n_pairs"]:
        from sklearn.utils.parallel import Parallel, delayed

        x, y = (tensor.numpy() for tensor in exact(pairs))
        chosen = only(ks, y.shape[1])
        found = blank(pairs, chosen)
        fits = [k for k in chosen if k > 0]
        if not fits:
            return found.to(pairs.y)
        step = max(1, FITS // len(fits))
        pieces = [slice(start, start + step) for start in range(0, len(y), step)]
        jobs = workers or (1 if len(pieces) <= SMALL else -1)
        # Sent one by one and read in order; max_nbytes=None: the pieces are small, so nothing is put on disk.
        parallel = Parallel(n_jobs=jobs, return_as="generator", max_nbytes=None)
        predicted = parallel(delayed(each_prefix)(regressor, x[piece], y[piece], fits) for piece in pieces)
        with progress(len(pieces), name) as done:
            for piece, values in zip(pieces, predicted, strict=True):
                found[piece, fits] = torch.from_numpy(values)
                done()
        return found.to(pairs.y)

    return predict
