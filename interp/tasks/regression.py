"""Regression in context: what all tasks share in which y_i = f(x_i) + noise and f is drawn for each prompt.

A task is a class of functions (``Functions``, one file each) in a ``Regression``, which draws the inputs, writes the
tokens and measures. A file of a task therefore says how f is drawn, what it makes of x, and what a solver could know.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from hooks.errors import BadArgument, told
from interp import estimators, seeds
from interp.arguments import between, one_of, whole_number
from interp.tasks import inputs
from interp.tasks.base import Batch, Model, same_shape
from interp.tasks.layout import Layout

NOISES = ("gaussian", "sign")

X = Float[Tensor, "batch n_pairs d"]
Y = Float[Tensor, "batch n_pairs"]


def true_or_false(name: str, value: object) -> bool:
    """``value``, if it is a bool; else ``BadArgument``."""
    if not isinstance(value, bool):
        raise BadArgument(f"{name}={told(value)} does not work; give true or false")
    return value


class Functions(Protocol):
    """A distribution of functions f: R^d → R."""

    @property
    def scale(self) -> float:
        """E[f(x)²] over f and the inputs of the task."""
        ...

    def draw(self, n: int, active: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The parameters of ``n`` functions, one a row; only the first ``active`` coordinates of x are in use."""
        ...

    def __call__(self, x: X, truth: Mapping[str, Tensor]) -> Y:
        """f(x) with the parameters in ``truth``."""
        ...

    def variables(self, batch: Batch) -> dict[str, Tensor]:
        """What a probe may look for beside the sums over the pairs."""
        ...

    def rivals(self, batch: Batch) -> dict[str, Y]:
        """Predictions of the classical methods that fit this class."""
        ...


@dataclass(frozen=True)
class Noise:
    """Noise on the labels: y = f(x) + noise, independent for each pair.

    size     0 is none
    form     "gaussian": N(0, size²). "sign": -size or +size, each with probability ½.
    targets  whether a target has the noise of its label. Without it, which is the default of every task, the target
             is f(x_k): the error says how well f is known, and 0 can be reached. With it, as in the released code of
             arXiv 2208.01066 and 2402.03170, no error can fall below size². Tokens hold noisy labels either way.
    """

    size: float = 0.0
    form: str = "gaussian"
    targets: bool = False

    def __post_init__(self) -> None:
        between("noise", self.size, 0.0)
        one_of("noise_form", self.form, NOISES)
        true_or_false("noisy_targets", self.targets)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """The noise of labels of this shape."""
        if self.form == "gaussian":
            return self.size * seeds.normal(shape, generator)
        return self.size * seeds.signs(shape, generator)


@dataclass(frozen=True)
class Regression:
    """Prompts of functions of one class. ``options`` are those in ``config`` beside d, n_pairs and tokens.

    ``truth`` holds the parameters of f, and ``noise`` (batch, n_pairs) if labels have any. ``scale`` is the mean square
    of a target, so that predicting zero has error 1.
    """

    name: str
    functions: Functions
    layout: Layout
    n_pairs: int
    covariance: str = "isotropic"
    noise: Noise = Noise()
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        whole_number("n_pairs", self.n_pairs, least=1)
        inputs.covariance_of(self.covariance, self.d)

    @property
    def config(self) -> dict[str, Any]:
        """The options, resolved: ``tasks.build(task.name, **task.config)`` is an equal task."""
        return {"d": self.d, "n_pairs": self.n_pairs, "tokens": self.layout.tokens, **self.options}

    @property
    def d(self) -> int:
        """Number of coordinates of x."""
        return self.layout.d

    @property
    def d_token(self) -> int:
        """Width of one token."""
        return self.layout.d_token

    @property
    def d_out(self) -> int:
        """One number is predicted."""
        return 1

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of token of the layout."""
        return self.layout.kinds

    @property
    def scale(self) -> float:
        """E[target²]: of f(x), and of its noise where targets have it."""
        return self.functions.scale + (self.noise.size**2 if self.noise.targets else 0.0)

    @property
    def metric(self) -> str:
        """The axis of ``error``; E[y²] stands for ``scale``."""
        return "squared error / d" if math.isclose(self.scale, self.d) else "squared error / E[y²]"

    @property
    def query_only(self) -> bool:
        """Every example is trained and reported."""
        return False

    @property
    def report_ks(self) -> tuple[int, ...]:
        """k = d, 2d and 4d, as far as the prompts go."""
        return tuple(k for k in (self.d, 2 * self.d, 4 * self.d) if k < self.n_pairs)

    def sample(
        self,
        n: int,
        generator: torch.Generator,
        *,
        d_active: int | None = None,
        n_pairs: int | None = None,
    ) -> Batch:
        """``n`` prompts of ``n_pairs`` pairs; the coordinates of x from ``d_active`` on are zero.

        Zeroing comes after the rotation, as in the paper's curriculum; ``scale`` stays that of all coordinates.
        Raises ``BadArgument`` if d_active is outside 1 … d, or if n or n_pairs is below 1.
        """
        whole_number("n", n, least=1)
        d_active = whole_number("d_active", self.d if d_active is None else d_active, 1, self.d)
        n_pairs = whole_number("n_pairs", self.n_pairs if n_pairs is None else n_pairs, 1)
        truth = self.functions.draw(n, d_active, generator)
        x = inputs.draw(n, n_pairs, self.d, self.covariance, generator)
        x[..., d_active:] = 0
        if self.noise.size:
            truth["noise"] = self.noise.draw((n, n_pairs), generator)
        return self._prompts(x, truth)

    def corrupt(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The same x and noise under another f: new labels, and new tokens wherever they stand."""
        return self._prompts(batch.x, self.redraw(batch, generator))

    def redraw(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The truth of ``batch`` with another f for each prompt.

        The draw is made on the generator's device (the CPU) and moved, so that a GPU run corrupts into the same
        prompts.
        """
        active = int(batch.x.flatten(0, -2).any(dim=0).nonzero().max()) + 1
        drawn = self.functions.draw(len(batch), active, generator)
        return {**batch.truth, **{name: value.to(batch.truth[name]) for name, value in drawn.items()}}

    def labels(self, x: X, truth: Mapping[str, Tensor]) -> tuple[Y, Y]:
        """(y, targets) of these inputs."""
        clean = self.functions(x, truth)
        y = clean + truth["noise"] if self.noise.size else clean
        return y, y if self.noise.targets else clean

    def predict(self, model: Model, batch: Batch) -> Y:
        """The prediction of every example (``Layout.predict``)."""
        return self.layout.predict(model, batch)

    def training_loss(self, model: Model, batch: Batch, generator: torch.Generator) -> Float[Tensor, "batch n_read"]:
        """Squared errors out of one forward (``Layout.training_errors``)."""
        return self.layout.training_errors(model, batch, generator)

    def loss(self, prediction: Y, batch: Batch) -> Y:
        """(prediction - target)² of each example."""
        same_shape(prediction, batch)
        return (prediction - batch.targets) ** 2

    def error(self, prediction: Y, batch: Batch) -> Y:
        """``loss`` ÷ ``scale``: 1 is predicting zero."""
        return self.loss(prediction, batch) / self.scale

    def variables(self, batch: Batch) -> dict[str, Tensor]:
        """What a solver could hold; entry k uses the k pairs before example k, and is 0 at k = 0.

        XtX    (batch, n_pairs, d, d)  Σ_{i<k} x_i x_iᵀ
        Xty    (batch, n_pairs, d)     Σ_{i<k} y_i x_i
        w_ols  (batch, n_pairs, d)     the minimum-norm least-squares solution
        y      (batch, n_pairs)        the label of example k
        and what the class of functions adds (its ``variables``).
        """
        xtx, xty = estimators.moments(batch.x, batch.y)
        w_ols = estimators.ols_weights(batch.x, batch.y)
        return {**self.functions.variables(batch), "XtX": xtx, "Xty": xty, "w_ols": w_ols, "y": batch.y}

    def baselines(self, batch: Batch) -> dict[str, Y]:
        """Squared errors of the class's classical rivals, of predicting zero, and of ``bayes`` where it is known: for
        linear functions under Gaussian noise it is ridge with the noise's own variance.
        """
        errors = {name: self.loss(predicted, batch) for name, predicted in self.functions.rivals(batch).items()}
        prior = getattr(self.functions, "gain", None)
        if prior is not None and self.noise.size and self.noise.form == "gaussian":
            predicted = estimators.build("bayes", noise=self.noise.size, prior=prior)(batch)
            errors = {"bayes": self.loss(predicted, batch), **errors}
        return {**errors, "zero": self.loss(torch.zeros_like(batch.targets), batch)}

    def _prompts(self, x: X, truth: Mapping[str, Tensor]) -> Batch:
        """The batch for these inputs and this truth."""
        return self.layout.batch(x, *self.labels(x, truth), truth)


def pairs_or(n_pairs: int | None, usual: int) -> int:
    """``n_pairs``, or what is usual where it is None."""
    return usual if n_pairs is None else whole_number("n_pairs", n_pairs, 1)


def classical(batch: Batch) -> dict[str, Y]:
    """Predictions of least squares, ridge, averaging and 3 nearest neighbours at their defaults."""
    return {name: estimators.build(name)(batch) for name in ("ols", "ridge", "averaging", "knn")}


def ols_on(features: Float[Tensor, "batch n_pairs d_feature"], y: Y) -> Y:
    """Predictions of least squares on features of x instead of x."""
    return einsum(estimators.ols_weights(features, y), features, "b k i, b k i -> b k")
