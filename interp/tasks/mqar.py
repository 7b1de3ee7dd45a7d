"""Multi-query associative recall: pairs of a key and a value, then some of the keys again; what was their value?

    k3 v7 k1 v2 | . . k1 . . . k3 . . .        at the second k1 the answer is v2, at the second k3 it is v7

Source: arXiv 2312.04927 and its released sampler. That one fills the gaps from an unseeded stream and
from the whole vocabulary, so that filler may be a key; here filler has tokens of its own and comes from the generator.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooks.errors import BadArgument
from interp import seeds
from interp.arguments import between, whole_number
from interp.tasks.base import Batch, Model, log_probabilities, nats, token_batch, wrong


class AssociativeRecall:
    """Prompts k_0 v_0 … k_{m-1} v_{m-1}, m = n_pairs, and then each key once more among filler.

    n_keys, n_values, n_filler   tokens are keys 0 … n_keys - 1, then values, then filler: no token is two of these
    n_pairs   number of pairs, hence of queries; the keys of a prompt are all different, values may repeat
    length    number of tokens, even, at least 4 n_pairs; 8 n_pairs unless given. Prompts of another number of pairs
              are longer or shorter in proportion.
    power     a: of the places for queries (every second token after the pairs) each pair gets its own, the g-th with
              probability ∝ g^(a-1) among those that are left. Small a: most are asked soon, a few late; 1: uniform.
              Pairs draw in the order in which they are told, as in the released sampler, so that for a < 1 those told
              first are asked sooner: with the defaults the first query is for pair 0 with P = 0.269, not 1/8.

    Example k is the k-th query of the prompt: it is read at the key's second token, after all the pairs and k queries.
    No answer is given after a query, so the value is in the prompt once, behind its key. The places differ from prompt
    to prompt. The loss is in nats over the whole vocabulary; the error is 0/1.

    ``truth``: ``keys`` and ``values`` (batch, n_pairs) in the order in which they are told; ``pair`` (batch, n_pairs):
    which of them example k asks for; ``gap``: g of its place, from 1.
    """

    name = "mqar"
    d = 1
    d_token = 1
    scale = 1.0
    metric = "share of wrong values at the queries"
    kinds = ("key", "value", "query", "filler")
    query_only = False

    def __init__(
        self,
        n_pairs: int = 8,
        length: int | None = None,
        n_keys: int = 32,
        n_values: int = 32,
        n_filler: int = 16,
        power: float = 0.01,
    ) -> None:
        self.n_pairs = whole_number("n_pairs", n_pairs, least=1)
        self.length = 8 * self.n_pairs if length is None else whole_number("length", length, 4 * self.n_pairs)
        if self.length % 2:
            raise BadArgument(f"length={length} is odd; a prompt is made of twos: try {self.length + 1}")
        self.n_keys = whole_number("n_keys", n_keys, least=1)
        if self.n_keys < self.n_pairs:
            raise BadArgument(f"n_keys={n_keys} is too few for n_pairs={n_pairs} different keys; try {self.n_pairs}")
        self.n_values = whole_number("n_values", n_values, least=2)
        self.n_filler = whole_number("n_filler", n_filler, least=1)
        self.power = between("power", power, 1e-6, 1.0)
        self.vocabulary = self.d_out = self.n_keys + self.n_values + self.n_filler

    @property
    def config(self) -> dict[str, Any]:
        """The options: ``AssociativeRecall(**task.config)`` is an equal task."""
        names = ("n_pairs", "length", "n_keys", "n_values", "n_filler", "power")
        return {name: getattr(self, name) for name in names}

    @property
    def report_ks(self) -> tuple[int, ...]:
        """The first query, the middle one and the last."""
        return tuple(sorted({0, self.n_pairs // 2, self.n_pairs - 1}))

    def sample(
        self, n: int, generator: torch.Generator, *, d_active: int | None = None, n_pairs: int | None = None
    ) -> Batch:
        """``n`` prompts of ``n_pairs`` pairs.

        ``d_active`` is checked and has no effect: a token has no coordinates.
        Raises ``BadArgument`` if d_active is not 1, if n is below 1, or if n_pairs is outside 1 … n_keys.
        """
        whole_number("n", n, least=1)
        whole_number("d_active", self.d if d_active is None else d_active, 1, self.d)
        pairs = whole_number("n_pairs", self.n_pairs if n_pairs is None else n_pairs, 1, self.n_keys)
        length = 2 * (self.length * pairs // (2 * self.n_pairs))
        keys = seeds.uniform((n, self.n_keys), generator).argsort(dim=1)[:, :pairs]
        values = self.n_keys + seeds.integers(0, self.n_values, (n, pairs), generator)
        filler = self.vocabulary - 1 - seeds.integers(0, self.n_filler, (n, length), generator)
        gap, pair = self._gaps(n, pairs, length // 2 - pairs, generator).sort(dim=1)
        return self._prompts(filler, {"keys": keys, "values": values, "pair": pair, "gap": gap})

    def corrupt(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The same keys, queries and filler with another value behind each key."""
        values = batch.truth["values"]
        other = seeds.integers(1, self.n_values, tuple(values.shape), generator).to(values)
        values = self.n_keys + (values - self.n_keys + other) % self.n_values
        return self._prompts(batch.tokens, {**batch.truth, "values": values})

    def predict(self, model: Model, batch: Batch) -> Float[Tensor, "batch n_pairs vocabulary"]:
        """log p of each token at every query, out of one forward."""
        return log_probabilities(model, batch, self.d_out)

    def training_loss(self, model: Model, batch: Batch, generator: torch.Generator) -> Float[Tensor, "batch n_pairs"]:
        """The loss of every query; ``generator`` is not used."""
        return self.loss(self.predict(model, batch), batch)

    def loss(
        self, prediction: Float[Tensor, "batch n_pairs vocabulary"], batch: Batch
    ) -> Float[Tensor, "batch n_pairs"]:
        """-log p(value) in nats."""
        return nats(prediction, batch, self.vocabulary)

    def error(
        self, prediction: Float[Tensor, "batch n_pairs vocabulary"], batch: Batch
    ) -> Float[Tensor, "batch n_pairs"]:
        """0 where the value is the most probable token, else 1 (``base.wrong`` for ties)."""
        return wrong(prediction, batch, self.vocabulary)

    def variables(self, batch: Batch) -> dict[str, Tensor]:
        """The truth: ``keys`` and ``values`` as told; ``pair``, ``gap`` and ``distance`` of each query.

        distance  (batch, n_pairs)  number of tokens from the key's first place to the query
        """
        told = {name: batch.truth[name] for name in ("keys", "values", "pair", "gap")}
        return {**told, "distance": batch.read - 2 * batch.truth["pair"]}

    def baselines(self, batch: Batch) -> dict[str, Float[Tensor, "batch n_pairs"]]:
        """0/1 errors of the rivals, averaged over their guesses.

        recall   looks the key up among the pairs: 0
        in_context  one of the prompt's values, each pair as likely: what is left without the binding of key to value.
                    Who knows which pairs are asked sooner (``power``) does a little better without it too
        chance   one of all values
        """
        pairs = batch.targets.shape[1]
        told = batch.tokens[:, : 2 * pairs]
        key, value = told[:, None, 0::2], told[:, None, 1::2]
        answer = (value * (key == batch.x)).sum(dim=-1)
        share = (value == batch.targets[..., None]).float().mean(dim=-1)
        return {
            "recall": (answer != batch.targets).float(),
            "in_context": 1 - share,
            "chance": torch.full_like(share, 1 - 1 / self.n_values),
        }

    def _gaps(self, n: int, pairs: int, places: int, generator: torch.Generator) -> Int[Tensor, "n pairs"]:
        """The place g = 1 … places of each pair's query: drawn one after the other without replacement, ∝ g^(a-1).

        The largest of log p + Gumbel noise, in order, are such a draw.
        """
        weight = (self.power - 1) * torch.arange(1, places + 1, dtype=torch.float64, device=generator.device).log()
        lot = seeds.uniform((n, places), generator, torch.float64).clamp(min=1e-300)
        return (weight - (-lot.log()).log()).topk(pairs, dim=1).indices + 1

    def _prompts(self, tokens: Int[Tensor, "batch pos"], truth: dict[str, Tensor]) -> Batch:
        """The batch of these pairs and queries; what stands elsewhere in ``tokens`` stays."""
        keys, values, pair = truth["keys"], truth["values"], truth["pair"]
        pairs = keys.shape[1]
        tokens = tokens.clone()
        tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
        read = 2 * (pairs + truth["gap"] - 1)
        tokens.scatter_(1, read, keys.gather(1, pair))
        kinds = torch.full_like(tokens, self.kinds.index("filler"))
        kinds[:, : 2 * pairs] = torch.arange(2 * pairs, device=tokens.device) % 2
        kinds.scatter_(1, read, self.kinds.index("query"))
        return token_batch(tokens, values.gather(1, pair), read, kinds, truth)
