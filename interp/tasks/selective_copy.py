"""Selective copying: symbols scattered among blanks, to be said again in their order once the markers come.

    . a . . c . b . | ? ? ?        the answers are a, c, b

A time-invariant convolution can copy from a fixed distance; here the distance differs with every prompt and symbol.
Source: arXiv 2312.00752 §3.1 (the task; its settings are not released).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp import seeds
from interp.arguments import whole_number
from interp.tasks.base import Batch, Model, log_probabilities, nats, token_batch, wrong


class SelectiveCopy:
    """Prompts of ``length`` places with n_pairs symbols at random ones of them, then n_pairs markers.

    n_symbols  S: symbols are 0 … S - 1, each uniform; the blank is S and the marker S + 1
    n_pairs    number of symbols to copy
    length     number of places before the markers, at least n_pairs; 4 n_pairs unless given. Prompts of another number
               of symbols are longer or shorter in proportion.

    Example k is the k-th symbol, read at the k-th marker. The markers are the same whatever was answered: no answer is
    in a token after the symbols. The loss is in nats over the whole vocabulary; the error is 0/1.

    ``truth``: ``place`` (batch, n_pairs), the position of each symbol, rising.
    """

    name = "selective_copy"
    d = 1
    d_token = 1
    scale = 1.0
    metric = "share of wrong symbols"
    kinds = ("symbol", "blank", "marker")
    query_only = False

    def __init__(self, n_pairs: int = 8, length: int | None = None, n_symbols: int = 8) -> None:
        self.n_pairs = whole_number("n_pairs", n_pairs, least=1)
        self.length = 4 * self.n_pairs if length is None else whole_number("length", length, self.n_pairs)
        self.n_symbols = whole_number("n_symbols", n_symbols, least=2)
        self.vocabulary = self.d_out = self.n_symbols + 2

    @property
    def config(self) -> dict[str, Any]:
        """The options: ``SelectiveCopy(**task.config)`` is an equal task."""
        return {"n_pairs": self.n_pairs, "length": self.length, "n_symbols": self.n_symbols}

    @property
    def report_ks(self) -> tuple[int, ...]:
        """The first symbol, the middle one and the last."""
        return tuple(sorted({0, self.n_pairs // 2, self.n_pairs - 1}))

    def sample(
        self, n: int, generator: torch.Generator, *, d_active: int | None = None, n_pairs: int | None = None
    ) -> Batch:
        """``n`` prompts with ``n_pairs`` symbols.

        ``d_active`` is checked and has no effect: a token has no coordinates.
        Raises ``BadArgument`` if d_active is not 1, or if n or n_pairs is below 1.
        """
        whole_number("n", n, least=1)
        whole_number("d_active", self.d if d_active is None else d_active, 1, self.d)
        count = whole_number("n_pairs", self.n_pairs if n_pairs is None else n_pairs, 1)
        length = self.length * count // self.n_pairs
        place = seeds.uniform((n, length), generator).argsort(dim=1)[:, :count].sort(dim=1).values
        return self._prompts(seeds.integers(0, self.n_symbols, (n, count), generator), place, length)

    def corrupt(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Another symbol at each of the same places."""
        symbols = batch.targets
        other = seeds.integers(1, self.n_symbols, tuple(symbols.shape), generator).to(symbols)
        length = batch.tokens.shape[1] - symbols.shape[1]
        return self._prompts((symbols + other) % self.n_symbols, batch.truth["place"], length)

    def predict(self, model: Model, batch: Batch) -> Float[Tensor, "batch n_pairs vocabulary"]:
        """log p of each token at every marker, out of one forward."""
        return log_probabilities(model, batch, self.d_out)

    def training_loss(self, model: Model, batch: Batch, generator: torch.Generator) -> Float[Tensor, "batch n_pairs"]:
        """The loss of every marker; ``generator`` is not used."""
        return self.loss(self.predict(model, batch), batch)

    def loss(
        self, prediction: Float[Tensor, "batch n_pairs vocabulary"], batch: Batch
    ) -> Float[Tensor, "batch n_pairs"]:
        """-log p(symbol) in nats."""
        return nats(prediction, batch, self.vocabulary)

    def error(
        self, prediction: Float[Tensor, "batch n_pairs vocabulary"], batch: Batch
    ) -> Float[Tensor, "batch n_pairs"]:
        """0 where the symbol is the most probable token, else 1 (``base.wrong`` for ties)."""
        return wrong(prediction, batch, self.vocabulary)

    def variables(self, batch: Batch) -> dict[str, Tensor]:
        """``symbol`` (batch, n_pairs), its ``place``, and its ``distance`` to the marker at which it is answered."""
        place = batch.truth["place"]
        return {"symbol": batch.targets, "place": place, "distance": batch.read - place}

    def baselines(self, batch: Batch) -> dict[str, Float[Tensor, "batch n_pairs"]]:
        """0/1 errors of the rivals, averaged over their guesses.

        copy       the k-th token that is no blank: 0
        fixed_lag  the token at the middle of the k-th of n_pairs equal stretches; where it is blank, any symbol
        unordered  one of the prompt's symbols, each as likely: what is left without their order
        chance     any symbol
        """
        targets, count = batch.targets, batch.targets.shape[1]
        places = batch.tokens[:, :-count]
        copied = places[places != self.n_symbols].reshape(targets.shape)
        middle = (torch.arange(count, device=places.device) + 0.5) * places.shape[1] / count
        found = places[:, middle.long()]
        blind = 1 - 1 / self.n_symbols
        lagged = torch.where(found == self.n_symbols, blind, (found != targets).float())
        share = (targets[:, None, :] == targets[..., None]).float().mean(dim=-1)
        return {
            "copy": (copied != targets).float(),
            "fixed_lag": lagged,
            "unordered": 1 - share,
            "chance": torch.full_like(share, blind),
        }

    def _prompts(
        self, symbols: Int[Tensor, "batch n_pairs"], place: Int[Tensor, "batch n_pairs"], length: int
    ) -> Batch:
        """The batch with these symbols at these places."""
        n, count = symbols.shape
        tokens = symbols.new_full((n, length + count), self.n_symbols)
        tokens[:, length:] = self.n_symbols + 1
        tokens.scatter_(1, place, symbols)
        read = length + torch.arange(count, device=symbols.device)
        kinds = (tokens - self.n_symbols + 1).clamp(min=0)
        return token_batch(tokens, symbols, read, kinds, {"place": place})
