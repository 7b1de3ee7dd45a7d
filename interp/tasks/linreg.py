"""In-context linear regression without noise: y_i = w·x_i, with w ~ N(0, I_d) for each prompt.

Source: arXiv 2402.03170 §3 and its released samplers; the prompt is of arXiv 2208.01066.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from interp import estimators
from interp.arguments import one_of, whole_number
from interp.tasks.base import Batch, Model, at_each_query, outputs, same_shape

TOKENS = {"interleaved": ("x", "y"), "joint": ("pair", "query")}
COVARIANCES = ("isotropic", "skewed")


class LinearRegression:
    """Prompts of linear regression.

    tokens="interleaved"  x_0, y_0, x_1, y_1, … x_{n-1}: 2 n_pairs - 1 tokens of width d, a label
                          written (y, 0, … 0). The prediction of y_k is read at x_k, one position
                          before y_k; the last label is in no token.
    tokens="joint"        (x_0, y_0), … (x_{n-2}, y_{n-2}), (x_{n-1}, 0): n_pairs tokens of width
                          d + 1, read at the last. A query looks unlike a pair, so one forward
                          answers one query; ``predict`` answers all of them by forking the state.
    covariance            "isotropic": x ~ N(0, I). "skewed": x = z T, z ~ N(0, I),
                          T = U diag(1, 1/2, … 1/d) Uᵀ sqrt(d / Σ i⁻²), U random orthogonal: the
                          covariance has eigenvalues ∝ i⁻² and trace d.
    n_pairs               4 d + 1 unless given.

    U is drawn for each prompt. The released code of the paper draws one for each batch: then the
    prompts of a batch share their covariance and so part of their error, an interval over prompts
    that takes them as independent is too narrow, and the result depends on the batch size. The
    distribution of one prompt is the same either way.
    """

    name = "linreg"
    d_out = 1
    metric = "squared error / d"
    query_only = False

    def __init__(
        self,
        d: int = 5,
        n_pairs: int | None = None,
        tokens: str = "interleaved",
        covariance: str = "isotropic",
    ) -> None:
        self.d = whole_number("d", d, least=1)
        self.n_pairs = 4 * self.d + 1 if n_pairs is None else whole_number("n_pairs", n_pairs, 1)
        self.tokens = one_of("tokens", tokens, TOKENS)
        self.covariance = one_of("covariance", covariance, COVARIANCES)
        self.d_token = self.d if self.tokens == "interleaved" else self.d + 1
        self.kinds = TOKENS[self.tokens]
        self.scale = float(self.d)

    @property
    def config(self) -> dict[str, Any]:
        """The options, resolved: ``LinearRegression(**task.config)`` is an equal task."""
        return {
            "d": self.d,
            "n_pairs": self.n_pairs,
            "tokens": self.tokens,
            "covariance": self.covariance,
        }

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

        E[y²] is then d_active for isotropic inputs, while ``scale`` stays d. Zeroing comes after
        the rotation, as in the paper's curriculum. ``truth`` holds ``w`` (batch, d).
        Raises ``BadArgument`` if d_active is outside 1 … d, or if n or n_pairs is below 1.
        """
        whole_number("n", n, least=1)
        d_active = whole_number("d_active", self.d if d_active is None else d_active, 1, self.d)
        n_pairs = whole_number("n_pairs", self.n_pairs if n_pairs is None else n_pairs, 1)
        w = torch.randn(n, self.d, generator=generator)
        x = torch.randn(n, n_pairs, self.d, generator=generator)
        if self.covariance == "skewed":
            x = _skew(x, generator)
        x[..., d_active:] = 0
        return self._prompts(x, w)

    def corrupt(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The same x under another w ~ N(0, I_d): new labels, and new tokens wherever they stand.

        The draw is made on the generator's device (the CPU) and moved, so that a GPU run corrupts
        into the same prompts.
        """
        w = torch.randn(len(batch), self.d, generator=generator)
        return self._prompts(batch.x, w.to(batch.x))

    def predict(self, model: Model, batch: Batch) -> Float[Tensor, "batch n_pairs"]:
        """The prediction of y_k from the k pairs before it and x_k, for every k.

        Interleaved: one forward, read at the x tokens. Joint: the context is walked through once
        and at each k a copy of the state reads the query (x_k, 0); site positions then count
        within one step, so an edit with ``pos=`` needs interleaved tokens.
        """
        if self.tokens == "interleaved":
            return outputs(model, batch.tokens, self.d_out)[:, batch.read, 0]
        context, queries = batch.tokens[:, :-1], _as_query(batch.tokens)
        return at_each_query(model, context, queries, self.d_out)[..., 0]

    def training_loss(self, model: Model, batch: Batch, generator: torch.Generator) -> Float[Tensor, "batch n_read"]:
        """Squared errors out of one forward: of every example (interleaved), of one k (joint).

        Joint: k is uniform on 0 … n_pairs - 1 and the same for the whole batch, so its mean over
        steps is the mean over examples that interleaved tokens train on, and no padding is needed.
        """
        if self.tokens == "interleaved":
            return self.loss(self.predict(model, batch), batch)
        k = int(torch.randint(batch.y.shape[1], (), generator=generator))
        prompt = torch.cat([batch.tokens[:, :k], _as_query(batch.tokens[:, k : k + 1])], dim=1)
        return (outputs(model, prompt, self.d_out)[:, -1] - batch.targets[:, k : k + 1]) ** 2

    def loss(self, prediction: Float[Tensor, "batch n_pairs"], batch: Batch) -> Float[Tensor, "batch n_pairs"]:
        """(prediction - y)² of each example; divided by ``scale`` it is the paper's axis."""
        same_shape(prediction, batch)
        return (prediction - batch.targets) ** 2

    def error(self, prediction: Float[Tensor, "batch n_pairs"], batch: Batch) -> Float[Tensor, "batch n_pairs"]:
        """(prediction - y)² ÷ d of each example: the paper's axis, on which predicting zero is 1."""
        return self.loss(prediction, batch) / self.scale

    def variables(self, batch: Batch) -> dict[str, Tensor]:
        """What a solver could hold; entry k uses the k pairs before example k, and is 0 at k = 0.

        w      (batch, d)              the task
        XtX    (batch, n_pairs, d, d)  Σ_{i<k} x_i x_iᵀ
        Xty    (batch, n_pairs, d)     Σ_{i<k} y_i x_i
        w_ols  (batch, n_pairs, d)     the minimum-norm least-squares solution
        y      (batch, n_pairs)        the label of example k
        """
        xtx, xty = estimators.moments(batch.x, batch.y)
        w_ols = estimators.ols_weights(batch.x, batch.y)
        return {"w": batch.truth["w"], "XtX": xtx, "Xty": xty, "w_ols": w_ols, "y": batch.y}

    def baselines(self, batch: Batch) -> dict[str, Float[Tensor, "batch n_pairs"]]:
        """Squared errors of the classical estimators at their defaults, and of predicting zero."""
        errors = {
            name: self.loss(estimators.build(name)(batch), batch) for name in ("ols", "ridge", "averaging", "knn")
        }
        return {**errors, "zero": self.loss(torch.zeros_like(batch.targets), batch)}

    def _prompts(self, x: Float[Tensor, "batch n_pairs d"], w: Float[Tensor, "batch d"]) -> Batch:
        """The batch for these inputs and weights."""
        y = einsum(x, w, "batch n_pairs d, batch d -> batch n_pairs")
        n, n_pairs = y.shape
        if self.tokens == "interleaved":
            tokens = x.new_zeros(n, 2 * n_pairs - 1, self.d)
            tokens[:, 0::2] = x
            tokens[:, 1::2, 0] = y[:, :-1]
            read = torch.arange(0, 2 * n_pairs - 1, 2, device=x.device)
            kinds = torch.arange(2 * n_pairs - 1, device=x.device) % 2
        else:
            tokens = torch.cat([x, y[..., None]], dim=-1)
            tokens[:, -1, -1] = 0
            read = torch.tensor([n_pairs - 1], device=x.device)
            kinds = (torch.arange(n_pairs, device=x.device) == n_pairs - 1).long()
        return Batch(tokens, targets=y, read=read, kinds=kinds, x=x, y=y, truth={"w": w})


def _as_query(pairs: Float[Tensor, "batch n d_token"]) -> Float[Tensor, "batch n d_token"]:
    """The joint tokens with their labels set to 0."""
    return torch.cat([pairs[..., :-1], torch.zeros_like(pairs[..., -1:])], dim=-1)


def _skew(z: Float[Tensor, "batch n_pairs d"], generator: torch.Generator) -> Float[Tensor, "batch n_pairs d"]:
    """z T with T = U diag(1/i) Uᵀ sqrt(d / Σ i⁻²), one U for each prompt.

    U is the Q of a Gaussian matrix's QR decomposition. Its columns carry LAPACK's signs and so are
    not Haar distributed, but a sign cancels in U diag(·) Uᵀ.
    """
    n, _, d = z.shape
    spread = 1 / torch.arange(1, d + 1, dtype=z.dtype)
    spread = spread * (d / spread.square().sum()).sqrt()
    rotation, _ = torch.linalg.qr(torch.randn(n, d, d, generator=generator))
    along = einsum(z, rotation, "b k i, b i j -> b k j") * spread
    return einsum(along, rotation, "b k j, b i j -> b k i")
