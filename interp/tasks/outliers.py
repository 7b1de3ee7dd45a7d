"""In-context classification by patterns, with additive outliers in the context and a clean query. One prompt:

    tokens   (μ_a + 0.3 ν_2; +1)   (μ_b - 0.1 ν_1 + v*_3; +1)   (μ_b + 0.4 ν_2; -1)   (μ_a - 0.2 ν_1; 0)
    kind      clean                 outlier                       clean                 query: say +1

A task is an ordered pair of relevant patterns (μ_a, μ_b): examples built on μ_a have the label +1, those on μ_b −1.

    clean input          x = μ_j + κ ν_k                  κ ~ U(−K, K), k uniform on the irrelevant patterns
    contaminated input   x = μ_j + κ ν_k + κ_a v*_s       s uniform on the outlier patterns; its label is arbitrary

Source: arXiv 2510.00399 §3 (the data model), §5 (the constants and the test outliers).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooks.errors import BadArgument, told
from interp import seeds
from interp.arguments import between, one_of, whole_number
from interp.tasks.base import Batch, Model, at_each_query, at_the_query, same_shape

RULES = ("coin", "flip", "one", "keep")
PLACEMENTS = ("random", "far", "close")
PAPER_OUTSIDE = ((0.7, 0.6, -0.4), (0.4, 0.7, -0.6), (-0.7, 0.5, 0.5))
"""The test outliers of the paper as combinations of v*_1, v*_2, v*_3; the coefficients sum to 0.9, 0.5 and 0.3."""
NEIGHBOURS = 3


class Outliers:
    """Prompts of binary classification with outliers: (x_0; y_0), … (x_{l−1}; y_{l−1}), (x_l; 0), l = n_pairs − 1.

    What is drawn for the whole task, once:
      M1, M2, V      numbers of relevant (μ), irrelevant (ν) and outlier (v*) patterns, all orthogonal in R^d
      beta           the norm of μ and ν
      v_norm         the norm of v*; None is beta (the source gives none)
      pattern_seed   the patterns are columns of one random orthogonal matrix of this seed (sign fixed, so that it is
                     the same on every machine), or coordinate axes for None: μ first, then ν, then v*. They are what
                     is learned, so no prompt has a rotation of its own.
    Training:
      K              κ ~ U(−K, K), K ≤ ½
      kappa_a        length of the outlier component, in units of v_norm
      p_a            each context example is contaminated with this probability, independently
    Test (a test task is the training task with these changed; the same generator then gives the same clean prompts,
    and the contaminated examples of a smaller alpha are among those of a larger one):
      alpha          None: p_a. Otherwise exactly round(alpha · l) of the context examples are contaminated.
      rule           the label of a contaminated example: "coin" (fair, as in training), "flip" (the wrong one),
                     "one" (always +1), "keep" (the right one)
      placement      where they stand, given alpha: "random", "far" (the first of the prompt), "close" (to the query)
      kappa_test     κ_a at test; None: kappa_a
      k_test         K at test, may exceed ½; None: K
      outside        False: the v* of training. True: the paper's three combinations of them. Or rows of V
                     coefficients λ, one for each test outlier Σ λ_i v*_i.
      orthogonal     length of a further component of each outlier, orthogonal to every pattern, in units of v_norm
                     (before κ_a), its direction drawn for each example

    Example k is a clean query with the pattern of example k after the first k examples: where example k is itself
    contaminated, its clean twin (``truth["clean"]``) is asked and its right label (``targets``) is expected; ``y`` has
    the label that the token carries. Trained and reported is the last example only (``query_only``).

    ``truth``, (batch, n_pairs) unless noted; the last example is the query:
      outlier  whether it is contaminated      same       whether it carries the query's pattern
      pattern  j of its μ_j                    irrelevant k of its ν_k, and kappa its κ
      kind     s of its outlier, −1 where clean           clean (batch, n_pairs, d): its input without the outlier
      pair (batch, 2): a and b
    """

    name = "outliers"
    d_out = 1
    scale = 1.0
    metric = "share of wrong labels at the clean query"
    kinds = ("example", "query")
    query_only = True

    def __init__(
        self,
        d: int = 30,
        n_pairs: int = 21,
        M1: int = 6,
        M2: int = 10,
        V: int = 3,
        beta: float = 3.0,
        v_norm: float | None = None,
        pattern_seed: int | None = 0,
        K: float = 0.5,
        kappa_a: float = 2.0,
        p_a: float = 0.6,
        alpha: float | None = None,
        rule: str = "coin",
        placement: str = "random",
        kappa_test: float | None = None,
        k_test: float | None = None,
        outside: bool | Sequence[Any] = False,
        orthogonal: float = 0.0,
    ) -> None:
        self.d = whole_number("d", d, least=1)
        self.n_pairs = whole_number("n_pairs", n_pairs, least=1)
        self.M1 = whole_number("M1", M1, least=2)
        self.M2 = whole_number("M2", M2, least=1)
        self.V = whole_number("V", V, least=1)
        n_patterns = self.M1 + self.M2 + self.V
        if n_patterns > self.d:
            raise BadArgument(
                f"M1 + M2 + V is {self.M1} + {self.M2} + {self.V}, and only d={self.d} patterns can be orthogonal in "
                f"R^d; give d of at least {n_patterns}"
            )
        self.beta = between("beta", beta, 1.0)
        self.v_norm = None if v_norm is None else between("v_norm", v_norm, 0.0)
        self.pattern_seed = None if pattern_seed is None else whole_number("pattern_seed", pattern_seed, least=0)
        self.K = between("K", K, 0.0, 0.5, "; a larger one at test is k_test")
        self.kappa_a = between("kappa_a", kappa_a, 0.0)
        self.p_a = between("p_a", p_a, 0.0, 1.0)
        self.alpha = None if alpha is None else between("alpha", alpha, 0.0, 1.0)
        self.rule = one_of("rule", rule, RULES)
        self.placement = one_of("placement", placement, PLACEMENTS)
        if self.alpha is None and self.placement != "random":
            raise BadArgument(
                f'placement="{self.placement}" needs a share alpha of outliers: with alpha=None each example is '
                f"contaminated independently of its place (p_a={self.p_a:g})"
            )
        self.kappa_test = None if kappa_test is None else between("kappa_test", kappa_test, 0.0)
        self.k_test = None if k_test is None else between("k_test", k_test, 0.0)
        self.outside = _combinations(outside, self.V)
        self.orthogonal = between("orthogonal", orthogonal, 0.0)
        if self.orthogonal and n_patterns == self.d:
            raise BadArgument(
                f"orthogonal={self.orthogonal:g} needs a direction that no pattern has, and the {self.d} patterns fill "
                f"R^{self.d}; give d of at least {self.d + 1}"
            )
        self.d_token = self.d + 1
        self.mu, self.nu, self.v_star, self._spare = self._patterns()

    @property
    def config(self) -> dict[str, Any]:
        """The options: ``Outliers(**task.config)`` is an equal task."""
        names = (
            *("d", "n_pairs", "M1", "M2", "V", "beta", "v_norm", "pattern_seed", "K", "kappa_a", "p_a"),
            *("alpha", "rule", "placement", "kappa_test", "k_test", "outside", "orthogonal"),
        )
        return {name: getattr(self, name) for name in names}

    @property
    def report_ks(self) -> tuple[int, ...]:
        """The last example: the only one that is trained."""
        return (self.n_pairs - 1,)

    @property
    def directions(self) -> Float[Tensor, "kind d"]:
        """The outliers in use before κ_a: v*, or Σ λ_i v*_i; without the ``orthogonal`` component."""
        if self.outside is False:
            return self.v_star
        rows = PAPER_OUTSIDE if self.outside is True else self.outside
        return self.v_star.new_tensor(rows) @ self.v_star

    def sample(
        self,
        n: int,
        generator: torch.Generator,
        *,
        d_active: int | None = None,
        n_pairs: int | None = None,
    ) -> Batch:
        """``n`` prompts of ``n_pairs`` − 1 context examples and a clean query.

        ``d_active`` is checked and has no effect: zeroed coordinates would leave the patterns neither orthogonal nor
        of equal norm, which is another task and not an easier one.
        Raises ``BadArgument`` if d_active is outside 1 … d, or if n or n_pairs is below 1.
        """
        whole_number("n", n, least=1)
        whole_number("d_active", self.d if d_active is None else d_active, 1, self.d)
        length = whole_number("n_pairs", self.n_pairs if n_pairs is None else n_pairs, 1)
        shape = (n, length)
        # Everything is drawn whether it is used or not, so that test tasks share their clean prompts.
        a = seeds.integers(0, self.M1, (n,), generator)
        b = (a + seeds.integers(1, self.M1, (n,), generator)) % self.M1
        positive = seeds.uniform(shape, generator) < 0.5
        irrelevant = seeds.integers(0, self.M2, shape, generator)
        unit = 2 * seeds.uniform(shape, generator) - 1
        lot = seeds.uniform(shape, generator)
        directions = self.directions
        kind = (seeds.uniform(shape, generator) * len(directions)).long()
        coin = 2 * seeds.integers(0, 2, shape, generator) - 1
        aside = seeds.normal((*shape, max(1, len(self._spare))), generator)

        pair = torch.stack([a, b], dim=1)
        pattern = torch.where(positive, a[:, None], b[:, None])
        kappa = unit * (self.K if self.k_test is None else self.k_test)
        clean = self.mu[pattern] + kappa[..., None] * self.nu[irrelevant]
        outlier = self._contaminated(lot)
        added = directions[kind]
        if self.orthogonal:
            added = added + self.orthogonal * (aside / aside.norm(dim=-1, keepdim=True)) @ self._spare
        strength = self.kappa_a if self.kappa_test is None else self.kappa_test
        truth = {
            "outlier": outlier,
            "same": pattern == pattern[:, -1:],
            "pattern": pattern,
            "irrelevant": irrelevant,
            "kappa": kappa,
            "kind": torch.where(outlier, kind, -1),
            "clean": clean,
            "pair": pair,
        }
        x = torch.where(outlier[..., None], clean + strength * added, clean)
        return self._prompts(x, coin.float(), truth)

    def corrupt(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The same inputs under the other task: (μ_b, μ_a) for (μ_a, μ_b), the only other one that they admit.

        Every right label turns, and with it the answer to the query. The labels of contaminated examples turn where
        the rule makes them of the right one ("flip", "keep"); those of "coin" and "one" say nothing of the task and
        stay. Nothing is left to draw: ``generator`` is not used.
        """
        return self._prompts(batch.x, batch.y, {**batch.truth, "pair": batch.truth["pair"].flip(1)})

    def predict(self, model: Model, batch: Batch) -> Float[Tensor, "batch n_pairs"]:
        """The margin F of every clean query k after the k examples before it; its sign is the class.

        Walks through the context once and forks at each k (``base.at_each_query``). Where only the last example is
        asked for, ``base.at_the_query`` is one forward.
        """
        clean = batch.truth["clean"].to(batch.tokens)
        queries = torch.cat([clean, torch.zeros_like(clean[..., :1])], dim=-1)
        return at_each_query(model, batch.tokens[:, :-1], queries, self.d_out)[..., 0]

    def training_loss(self, model: Model, batch: Batch, generator: torch.Generator) -> Float[Tensor, "batch n_read"]:
        """The hinge loss of the last example out of one forward; ``generator`` is not used."""
        return self.loss(at_the_query(model, batch, self.d_out), batch.last())

    def loss(self, prediction: Float[Tensor, "batch n_pairs"], batch: Batch) -> Float[Tensor, "batch n_pairs"]:
        """The hinge max(0, 1 − z F) with z the right label; 1 for F = 0."""
        same_shape(prediction, batch)
        return (1 - batch.targets * prediction).clamp(min=0)

    def error(self, prediction: Float[Tensor, "batch n_pairs"], batch: Batch) -> Float[Tensor, "batch n_pairs"]:
        """1 where the sign of F is wrong, 0 where it is right, ½ where F = 0."""
        same_shape(prediction, batch)
        return (1 - torch.sign(batch.targets * prediction)) / 2

    def variables(self, batch: Batch) -> dict[str, Tensor]:
        """What a model could hold; entry k of a sum uses the k examples before example k.

        direction  (batch, d)           μ_a − μ_b: the sign of its product with a query is the label
        pair       (batch, 2)           a and b
        pattern    (batch, n_pairs)     j of μ_j in example k; ``label``: its right label, ±1
        outlier    (batch, n_pairs)     1 where example k is contaminated, else 0; ``kind``: by which, −1 where clean
        Xty        (batch, n_pairs, d)  Σ_{i<k} y_i x_i; ``Xty_clean``: over the clean ones
        n_clean    (batch, n_pairs)     number of clean examples among the k
        """
        truth = batch.truth
        clean = (~truth["outlier"]).to(batch.y)
        terms = batch.y[..., None] * batch.x
        mu = self.mu.to(batch.x)[truth["pair"]]
        return {
            "direction": mu[:, 0] - mu[:, 1],
            "pair": truth["pair"],
            "pattern": truth["pattern"],
            "label": batch.targets,
            "outlier": truth["outlier"].to(batch.y),
            "kind": truth["kind"],
            "Xty": _before(terms),
            "Xty_clean": _before(clean[..., None] * terms),
            "n_clean": _before(clean),
        }

    def baselines(self, batch: Batch) -> dict[str, Float[Tensor, "batch n_pairs"]]:
        """0/1 errors of the classical rivals for the clean query k; a tie, and nothing to vote on, counts ½.

        vote         majority of the labels of the earlier examples with the query's pattern, the patterns known
        clean_vote   the same over the clean ones: an oracle that knows the outliers
        clean_both   the oracle that also reads the other pattern's clean labels, turned round: wrong (½) only where
                     every earlier example is contaminated
        knn          majority of the 3 nearest earlier inputs
        chance       ½
        """
        truth, y = batch.truth, batch.y
        pattern = truth["pattern"]
        earlier = torch.ones(y.shape[1], y.shape[1], dtype=torch.bool, device=y.device).tril(-1)
        same = (pattern[:, :, None] == pattern[:, None, :]) & earlier
        other = (pattern[:, :, None] != pattern[:, None, :]) & earlier
        clean = ~truth["outlier"][:, None, :]
        clean_vote = _votes(same & clean, y)
        margins = {
            "vote": _votes(same, y),
            "clean_vote": clean_vote,
            "clean_both": clean_vote - _votes(other & clean, y),
            "knn": _nearest(truth["clean"], batch.x, y, earlier),
        }
        errors = {name: self.error(margin, batch) for name, margin in margins.items()}
        return {**errors, "chance": torch.full_like(batch.targets, 0.5)}

    def _contaminated(self, lot: Float[Tensor, "batch n_pairs"]) -> Bool[Tensor, "batch n_pairs"]:
        """Which examples are contaminated, never the query; ``lot`` is uniform on [0, 1)."""
        context = lot[:, :-1]
        outlier = torch.zeros_like(lot, dtype=torch.bool)
        length = context.shape[1]
        if self.alpha is None:
            outlier[:, :-1] = context < self.p_a
        else:
            count = round(self.alpha * length)
            place = {
                "random": context.argsort(dim=1).argsort(dim=1),
                "far": torch.arange(length, device=context.device).expand_as(context),
                "close": torch.arange(length, device=context.device).flip(0).expand_as(context),
            }[self.placement]
            outlier[:, :-1] = place < count
        return outlier

    def _prompts(
        self,
        x: Float[Tensor, "batch n_pairs d"],
        arbitrary: Float[Tensor, "batch n_pairs"],
        truth: dict[str, Tensor],
    ) -> Batch:
        """The batch of these inputs; ``arbitrary`` has the labels of contaminated examples under the rule "coin"."""
        right = torch.where(truth["pattern"] == truth["pair"][:, :1], 1.0, -1.0).to(x)
        wrong = {"coin": arbitrary, "flip": -right, "one": torch.ones_like(right), "keep": right}[self.rule]
        y = torch.where(truth["outlier"], wrong, right)
        tokens = torch.cat([x, y[..., None]], dim=-1)
        tokens[:, -1, -1] = 0
        last = x.shape[1] - 1
        read = torch.tensor([last], device=x.device)
        kinds = (torch.arange(last + 1, device=x.device) == last).long()
        return Batch(tokens, targets=right, read=read, kinds=kinds, x=x, y=y, truth=truth)

    def _patterns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """μ (M1, d), ν (M2, d), v* (V, d), and the unit vectors that are left, one a row."""
        if self.pattern_seed is None:
            basis = torch.eye(self.d, dtype=torch.float32, device="cpu")
        else:
            generator = torch.Generator().manual_seed(self.pattern_seed)
            normal = seeds.normal((self.d, self.d), generator, torch.float64)
            q, r = torch.linalg.qr(normal)
            basis = (q * r.diagonal().sign()).mT.float()
        counts = [self.M1, self.M2, self.V, self.d - self.M1 - self.M2 - self.V]
        mu, nu, v, spare = basis.split(counts)
        norm = self.beta if self.v_norm is None else self.v_norm
        return self.beta * mu, self.beta * nu, norm * v, norm * spare


def _combinations(outside: Any, count: int) -> bool | list[list[float]]:
    """The option ``outside`` as JSON keeps it, or ``BadArgument``."""
    if outside is False:
        return False
    if outside is True:
        if count != len(PAPER_OUTSIDE[0]):
            raise BadArgument(
                f"outside=True means the paper's combinations of 3 outlier patterns, and V={count}; "
                f"give rows of {count} coefficients instead"
            )
        return True
    rows = list(outside) if isinstance(outside, (list, tuple)) else []
    numbers = [[float(value) for value in row] for row in rows if _is_row(row, count)]
    if not rows or len(numbers) != len(rows):
        raise BadArgument(
            f"outside={told(outside)} does not work; give true, false, or a list of rows of V={count} coefficients each"
        )
    return numbers


def _is_row(row: Any, count: int) -> bool:
    if not isinstance(row, (list, tuple)) or len(row) != count:
        return False
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < float("inf") for v in row)


def _before(terms: Tensor) -> Tensor:
    """Σ_{i<k} terms_i along axis 1, exactly zero at k = 0."""
    sums = torch.zeros_like(terms)
    sums[:, 1:] = terms[:, :-1].cumsum(dim=1)
    return sums


def _votes(counted: Bool[Tensor, "batch k i"], y: Float[Tensor, "batch i"]) -> Float[Tensor, "batch k"]:
    """Sum of the labels that count for each k."""
    return (counted * y[:, None, :]).sum(dim=-1)


def _nearest(
    queries: Float[Tensor, "batch k d"],
    x: Float[Tensor, "batch i d"],
    y: Float[Tensor, "batch i"],
    earlier: Bool[Tensor, "k i"],
) -> Float[Tensor, "batch k"]:
    """Sum of the labels of the nearest earlier inputs, of all of them where there are fewer."""
    distance = torch.cdist(queries, x, compute_mode="donot_use_mm_for_euclid_dist").masked_fill(~earlier, torch.inf)
    near, index = distance.topk(min(NEIGHBOURS, x.shape[1]), dim=-1, largest=False)
    labels = y[:, None, :].expand(-1, queries.shape[1], -1).gather(-1, index)
    return (labels * near.isfinite()).sum(dim=-1)
