"""Linear regression in a context in which pairs are replaced by outliers that have nothing to do with w. One prompt:

    d = 2, interleaved, w = (1, -1)                         drawn, never shown
    tokens   (0.5, 0.2) 0.3   (0.8, 0.8) (-0.8, -0.8)   (-1.0, 0.4)
    kind      x          y     outlier    outlier's      query, clean       the model should say y_2 = -1.4

Source: arXiv 2402.04248 ("orthogonal-outlier" and "many-outlier" regression). Three points in which its
released code departs from its text are options or put right here: outliers are orthogonal to the prompt's own w (there:
to a w drawn for them), of one length (there: heavy-tailed), and drawn for each pair (there: for each prompt).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from hooks.errors import BadArgument, told
from interp import estimators, seeds
from interp.arguments import between, one_of, whole_number
from interp.tasks.base import Batch, Model, at_each_query, outputs, same_shape
from interp.tasks.linreg import linear_regression

OUTLIERS = {"orthogonal": (0.5, 5), "ones": (0.9, 25)}
"""Kind of outlier: the paper's probability of it, and its number of pairs ÷ d (101 and 512 pairs for d = 20)."""
ORTHOGONAL_TO = ("own", "fresh")
PER = ("pair", "prompt")
NEEDED = 3


class OutlierLinearRegression:
    """Linear regression (its d, n_pairs, tokens, covariance) whose pairs are outliers with probability ``p``.

    outlier        "orthogonal": x and the label's token are two draws of r (a u + b v), u and v orthonormal and
                   orthogonal to w, (a, b) uniform on the circle. "ones": both are all ones.
    p              None: 0.5 for "orthogonal" and 0.9 for "ones". The last pair, the query, is always clean.
    orthogonal_to  "own": to the w of the prompt. "fresh": to another, independent w.
    per            "pair": (a, b) for each outlier. "prompt": once for x and once for y, so that all outliers of a
                   prompt are the same pair. u and v are drawn for each prompt either way.
    r              the length of an orthogonal outlier; None: sqrt(d), the root mean square of |x|
    clean_only     whether an outlier pair is left out of loss and error, as in the paper. Otherwise the label in its
                   token is asked for as well.
    n_pairs        None: 5 d + 1, and 25 d + 1 for "ones"

    Interleaved tokens replace the whole label token (y, 0, … 0) by a vector; joint tokens have room for a number only
    and take its first coordinate (for "ones", 1). With ``d_active`` the outliers lie in the active coordinates; two
    leave no room for u and v, so such prompts have no orthogonal outliers.

    With ``clean_only`` and interleaved tokens an example that is an outlier weighs 0 and every other one
    1/(1 − p), so that the mean over prompts is the mean over clean examples. The other layout asks the clean twin
    of example k (``truth["asked"]``), so each weighs 1.

    ``x`` and ``y`` are what the tokens hold. ``truth``: w (batch, d); outlier and weight (batch, n_pairs); asked
    (batch, n_pairs, d), the x that example k asks; clean_x (batch, n_pairs, d), before any was replaced; vector_y
    (batch, n_pairs, d), the outlier of each label token, used or not; span (batch, 2, d): u and v, zero for "ones".
    """

    name = "outlier_linreg"
    d_out = 1
    metric = "squared error / d of clean examples"
    query_only = False

    def __init__(
        self,
        d: int = 5,
        n_pairs: int | None = None,
        tokens: str = "interleaved",
        covariance: str = "isotropic",
        outlier: str = "orthogonal",
        p: float | None = None,
        orthogonal_to: str = "own",
        per: str = "pair",
        r: float | None = None,
        clean_only: bool = True,
    ) -> None:
        self.outlier = one_of("outlier", outlier, OUTLIERS)
        usual, pairs = OUTLIERS[self.outlier]
        whole_number("d", d, least=1)
        self.clean = linear_regression(d, pairs * d + 1 if n_pairs is None else n_pairs, tokens, covariance)
        self.p = between("p", usual if p is None else p, 0.0, 1.0)
        self.orthogonal_to = one_of("orthogonal_to", orthogonal_to, ORTHOGONAL_TO)
        self.per = one_of("per", per, PER)
        if self.outlier == "ones" and (orthogonal_to != "own" or per != "pair" or r is not None):
            raise BadArgument('outlier="ones" is all ones: orthogonal_to, per and r are of outlier="orthogonal"')
        if self.outlier == "orthogonal" and d < NEEDED and self.p > 0:
            raise BadArgument(
                f"d={d} leaves no room for two directions orthogonal to w; give d of at least {NEEDED}, or p=0"
            )
        self.r = None if r is None else between("r", r, 0.0)
        if not isinstance(clean_only, bool):
            raise BadArgument(f"clean_only={told(clean_only)} does not work; give true or false")
        self.clean_only = clean_only
        if not clean_only:
            self.metric = "squared error / d"

    @property
    def config(self) -> dict[str, Any]:
        """The options, resolved: ``OutlierLinearRegression(**task.config)`` is an equal task."""
        own = ("outlier", "p", "orthogonal_to", "per", "r", "clean_only")
        return {**self.clean.config, **{name: getattr(self, name) for name in own}}

    @property
    def d(self) -> int:
        """Number of coordinates of x."""
        return self.clean.d

    @property
    def n_pairs(self) -> int:
        """Number of pairs, outliers and the query included."""
        return self.clean.n_pairs

    @property
    def tokens(self) -> str:
        """The layout of the tokens: interleaved or joint."""
        return self.clean.layout.tokens

    @property
    def d_token(self) -> int:
        """Width of one token."""
        return self.clean.d_token

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of token, those of linear regression."""
        return self.clean.kinds

    @property
    def scale(self) -> float:
        """E[y²] of a clean pair."""
        return self.clean.scale

    @property
    def report_ks(self) -> tuple[int, ...]:
        """k = d, 2d and 4d pairs seen, outliers counted, as far as the prompts go."""
        return self.clean.report_ks

    def sample(
        self,
        n: int,
        generator: torch.Generator,
        *,
        d_active: int | None = None,
        n_pairs: int | None = None,
    ) -> Batch:
        """``n`` prompts; the coordinates of every x from ``d_active`` on are zero. The same generator gives the same
        clean pairs whatever the outliers, and a larger p adds outliers to those of a smaller one.

        Raises ``BadArgument`` if d_active is outside 1 … d, or if n or n_pairs is below 1.
        """
        batch = self.clean.sample(n, generator, d_active=d_active, n_pairs=n_pairs)
        active = self.d if d_active is None else d_active
        shape = batch.y.shape
        lot = seeds.uniform(shape, generator)
        span = lot.new_zeros(n, 2, self.d)
        outlier = lot < self.p
        if self.outlier == "ones":
            vectors = lot.new_zeros(2, *shape, self.d)
            vectors[..., :active] = 1
        else:
            fresh = seeds.normal((n, self.d), generator)
            normal = seeds.normal((n, 2, self.d), generator)
            angle = 2 * torch.pi * seeds.uniform((2, *shape), generator)
            if self.per == "prompt":
                angle = angle[..., :1].expand(2, *shape)
            if active >= NEEDED:
                away = batch.truth["w"] if self.orthogonal_to == "own" else fresh
                span[..., :active] = _across(away[:, :active], normal[..., :active])
            else:
                outlier = torch.zeros_like(outlier)
            length = self.d**0.5 if self.r is None else self.r
            circle = torch.stack([angle.cos(), angle.sin()], dim=-1)
            vectors = length * einsum(circle, span, "part b k two, b two i -> part b k i")
        outlier[:, -1] = False
        truth = {
            "w": batch.truth["w"],
            "outlier": outlier,
            "clean_x": batch.x,
            "vector_y": vectors[1],
            "span": span,
        }
        return self._prompts(batch, torch.where(outlier[..., None], vectors[0], batch.x), truth)

    def corrupt(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The same inputs and outliers under another w, so with other clean labels.

        Where outliers are orthogonal to the prompt's own w the new one is drawn as what they leave open: its direction
        is uniform on what is orthogonal to u and v, its length that of N(0, I_d). Otherwise w ~ N(0, I_d).
        """
        w = seeds.normal((len(batch), self.d), generator).to(batch.x)
        if self.outlier == "orthogonal" and self.orthogonal_to == "own":
            span = batch.truth["span"]
            along = einsum(span, w, "b two i, b i -> b two")
            free = w - einsum(along, span, "b two, b two i -> b i")
            w = free * (w.norm(dim=-1, keepdim=True) / free.norm(dim=-1, keepdim=True))
        return self._prompts(batch, batch.x, {**batch.truth, "w": w})

    def predict(self, model: Model, batch: Batch) -> Float[Tensor, "batch n_pairs"]:
        """The prediction of example k from the k pairs before it and its x (joint: and its clean twin's x)."""
        if self.tokens == "interleaved":
            return self.clean.predict(model, batch)
        return at_each_query(model, batch.tokens[:, :-1], _queries(batch), self.d_out)[..., 0]

    def training_loss(self, model: Model, batch: Batch, generator: torch.Generator) -> Float[Tensor, "batch n_read"]:
        """The loss of every example out of one forward (interleaved), or of one k, uniform, for the batch (joint)."""
        if self.tokens == "interleaved":
            return self.loss(self.predict(model, batch), batch)
        k = int(seeds.integers(0, batch.y.shape[1], (), generator))
        prompt = torch.cat([batch.tokens[:, :k], _queries(batch)[:, k : k + 1]], dim=1)
        return (outputs(model, prompt, self.d_out)[:, -1] - batch.targets[:, k : k + 1]) ** 2

    def loss(self, prediction: Float[Tensor, "batch n_pairs"], batch: Batch) -> Float[Tensor, "batch n_pairs"]:
        """(prediction − target)² of each example times its weight (see the class)."""
        same_shape(prediction, batch)
        weight = batch.truth["weight"][:, -batch.targets.shape[1] :]
        return weight * (prediction - batch.targets) ** 2

    def error(self, prediction: Float[Tensor, "batch n_pairs"], batch: Batch) -> Float[Tensor, "batch n_pairs"]:
        """``loss`` ÷ d: its mean over prompts is 1 for predicting zero."""
        return self.loss(prediction, batch) / self.scale

    def variables(self, batch: Batch) -> dict[str, Tensor]:
        """What a solver could hold; entry k uses the k pairs before example k, and is 0 at k = 0.

        w, XtX, Xty, w_ols, y   as in linear regression, of the pairs in the tokens, outliers and all
        clean_XtX, clean_Xty, clean_ols   the same of the clean ones
        outlier                 (batch, n_pairs), 1 where example k is one, else 0
        """
        every = self.clean.variables(batch)
        kept = self.clean.variables(self._without(batch))
        renamed = {"clean_XtX": kept["XtX"], "clean_Xty": kept["Xty"], "clean_ols": kept["w_ols"]}
        return {**every, **renamed, "outlier": batch.truth["outlier"].to(batch.y)}

    def baselines(self, batch: Batch) -> dict[str, Float[Tensor, "batch n_pairs"]]:
        """Loss of least squares and of ridge on all pairs, of least squares on the clean ones, and of zero.

        ols, ridge   on what the tokens hold; clean_ols   an oracle that knows the outliers
        """
        kept = self._without(batch)
        weights = {
            "ols": estimators.ols_weights(batch.x, batch.y),
            "ridge": estimators.ridge_weights(batch.x, batch.y, 1.0),
            "clean_ols": estimators.ols_weights(kept.x, kept.y),
        }
        asked = batch.truth["asked"]
        errors = {name: self.loss(einsum(w, asked, "b k i, b k i -> b k"), batch) for name, w in weights.items()}
        return {**errors, "zero": self.loss(torch.zeros_like(batch.targets), batch)}

    def _without(self, batch: Batch) -> Batch:
        """The batch with its outliers put at zero, where no least squares sees them."""
        clean: Bool[Tensor, "batch n_pairs"] = ~batch.truth["outlier"]
        return dataclasses.replace(batch, x=batch.x * clean[..., None], y=batch.y * clean)

    def _prompts(self, batch: Batch, x: Float[Tensor, "batch n_pairs d"], truth: dict[str, Tensor]) -> Batch:
        """``batch`` with these inputs and the labels that ``truth`` makes of them."""
        outlier, vector = truth["outlier"], truth["vector_y"]
        right = einsum(truth["clean_x"], truth["w"], "b k i, b i -> b k")
        y = torch.where(outlier, vector[..., 0], right)
        asked, targets, weight = truth["clean_x"], right, torch.ones_like(right)
        if not self.clean_only:
            asked, targets = x, y
        elif self.tokens == "interleaved":
            asked = x
            weight[:, :-1] = (~outlier[:, :-1]).to(weight) / (1 - self.p if self.p < 1 else 1)
        if self.tokens == "interleaved":
            tokens = torch.zeros_like(batch.tokens)
            tokens[:, 0::2] = x
            tokens[:, 1::2, 0] = y[:, :-1]
            tokens[:, 1::2] = torch.where(outlier[:, :-1, None], vector[:, :-1], tokens[:, 1::2])
        else:
            tokens = torch.cat([x, y[..., None]], dim=-1)
            tokens[:, -1, -1] = 0
        truth = {**truth, "asked": asked, "weight": weight}
        return dataclasses.replace(batch, tokens=tokens, targets=targets, x=x, y=y, truth=truth)


def _queries(batch: Batch) -> Float[Tensor, "batch n_pairs d_token"]:
    """Joint tokens (x asked; 0)."""
    asked = batch.truth["asked"].to(batch.tokens)
    return torch.cat([asked, torch.zeros_like(asked[..., :1])], dim=-1)


def _across(w: Float[Tensor, "batch d"], normal: Float[Tensor, "batch 2 d"]) -> Float[Tensor, "batch 2 d"]:
    """Two orthonormal vectors orthogonal to w, uniform among those but for LAPACK's signs, which a circle forgets."""
    q, _ = torch.linalg.qr(torch.cat([w[:, None], normal], dim=1).mT.double())
    return q[..., 1:].mT.to(w)
