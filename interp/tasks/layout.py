"""How pairs (x, y) become tokens: the two layouts that every regression task has, and what a model says to them.

    interleaved   x_0  y_0  x_1  y_1 … x_{n-1}          2 n_pairs - 1 tokens of width d, a label written (y, 0, … 0)
    joint         (x_0; y_0) … (x_{n-2}; y_{n-2}) (x_{n-1}; 0)          n_pairs tokens of width d + 1

The last label is in no token. Sources: arXiv 2208.01066 (interleaved), 2509.23779 and 2510.12026 (joint).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from interp import seeds
from interp.arguments import one_of, whole_number
from interp.tasks.base import Batch, Model, at_each_query, outputs

TOKENS = {"interleaved": ("x", "y"), "joint": ("pair", "query")}
"""The kinds of token of each layout."""


@dataclass(frozen=True)
class Layout:
    """One of the two layouts, for inputs of d coordinates.

    tokens="interleaved"  The prediction of y_k is read at x_k, one position before y_k.
    tokens="joint"        Read at the last position. A query looks unlike a pair, so one forward answers one query;
                          ``predict`` answers all of them by forking the state.
    """

    tokens: str
    d: int

    def __post_init__(self) -> None:
        one_of("tokens", self.tokens, TOKENS)
        whole_number("d", self.d, least=1)

    @property
    def d_token(self) -> int:
        """Width of one token."""
        return self.d if self.tokens == "interleaved" else self.d + 1

    @property
    def kinds(self) -> tuple[str, ...]:
        """The names of the kinds of token."""
        return TOKENS[self.tokens]

    def batch(
        self,
        x: Float[Tensor, "batch n_pairs d"],
        y: Float[Tensor, "batch n_pairs"],
        targets: Float[Tensor, "batch n_pairs"],
        truth: Mapping[str, Tensor],
    ) -> Batch:
        """The prompts of these pairs, with ``targets`` to predict; the last y and targets are in no token."""
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
        return Batch(tokens, targets=targets, read=read, kinds=kinds, x=x, y=y, truth=truth)

    def predict(self, model: Model, batch: Batch) -> Float[Tensor, "batch n_pairs"]:
        """The prediction of y_k from the k pairs before it and x_k, for every k.

        Interleaved: one forward, read at the x tokens. Joint: the context is walked through once
        and at each k a copy of the state reads the query (x_k, 0); site positions then count
        within one step, so an edit with ``pos=`` needs interleaved tokens.
        """
        if self.tokens == "interleaved":
            return outputs(model, batch.tokens, 1)[:, batch.read, 0]
        context, queries = batch.tokens[:, :-1], _as_query(batch.tokens)
        return at_each_query(model, context, queries, 1)[..., 0]

    def training_errors(self, model: Model, batch: Batch, generator: torch.Generator) -> Float[Tensor, "batch n_read"]:
        """Squared errors out of one forward: of every example (interleaved), of one k (joint).

        Joint: k is uniform on 0 … n_pairs - 1 and the same for the whole batch, so its mean over
        steps is the mean over examples that interleaved tokens train on, and no padding is needed.
        """
        if self.tokens == "interleaved":
            return (self.predict(model, batch) - batch.targets) ** 2
        k = int(seeds.integers(0, batch.y.shape[1], (), generator))
        prompt = torch.cat([batch.tokens[:, :k], _as_query(batch.tokens[:, k : k + 1])], dim=1)
        return (outputs(model, prompt, 1)[:, -1] - batch.targets[:, k : k + 1]) ** 2


def _as_query(pairs: Float[Tensor, "batch n d_token"]) -> Float[Tensor, "batch n d_token"]:
    """The joint tokens with their labels set to 0."""
    return torch.cat([pairs[..., :-1], torch.zeros_like(pairs[..., -1:])], dim=-1)
