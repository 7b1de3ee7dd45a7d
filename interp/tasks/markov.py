"""In-context Markov chains: every prompt has a transition table of its own, and each next symbol is to be predicted.

    start 0 1 1 0 1 | 1 …        order 1, two symbols: what follows 1 has to be learned from the prompt

Source: arXiv 2502.10178 §2 (the prior, the Bayes predictor) and its switching variant. Their released sampler stops
``order`` symbols early and leaves zeros there; here every position is drawn from the chain.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks.errors import BadArgument
from interp import estimators, seeds
from interp.arguments import between, whole_number
from interp.estimators.chains import contexts, entropy, tables, with_switch
from interp.tasks.base import Batch, Model, log_probabilities, nats, token_batch

LARGEST_TABLE = 1_000_000


class Markov:
    """Prompts of one Markov chain each, or with ``switch`` of several, one after the other.

    order      number of symbols k on which the next one depends
    n_symbols  S: symbols are 0 … S - 1
    beta       each of the S^k rows of the transition table is drawn from Dirichlet(β, … β), for each chain anew
    switch     at each place, with this probability, a switch token stands instead of a symbol and a new chain begins
    n_pairs    number of predictions

    The token S means "a new chain begins". It opens every prompt, so that example k = 0 has a position at which it is
    read; with ``switch`` it comes again at random places. The first k symbols of a chain are uniform.

    Tokens are S, y_0, … y_{n-2}, read everywhere: example k predicts y_k after k symbols, and y_{n-1} is in no token.
    The prediction is over all S + 1 tokens. The loss is in nats, and so is what is reported: no predictor is right
    always. A switch is a target like any other; what can be known of it is its rate.

    ``truth``: ``table`` (batch, chain, S^k, S), the number of chains being the largest of the batch; the row of a
    context s_1 … s_k (newest last) is Σ s_i S^(k-i). ``chain`` (batch, n_pairs): which one is in force.
    """

    name = "markov"
    d = 1
    d_token = 1
    scale = 1.0
    metric = "nats per symbol"
    kinds = ("symbol", "start")
    query_only = False

    def __init__(
        self, order: int = 1, n_symbols: int = 2, beta: float = 1.0, switch: float = 0.0, n_pairs: int = 256
    ) -> None:
        self.order = whole_number("order", order, least=1)
        self.n_symbols = whole_number("n_symbols", n_symbols, least=2)
        self.beta = between("beta", beta, 1e-3)
        self.switch = between("switch", switch, 0.0, 0.99)
        self.n_pairs = whole_number("n_pairs", n_pairs, least=1)
        if self.n_symbols ** (self.order + 1) > LARGEST_TABLE:
            raise BadArgument(
                f"order={order} over n_symbols={n_symbols} has a table of {self.n_symbols ** (self.order + 1)} "
                f"numbers for each prompt; try a smaller order or fewer symbols, up to {LARGEST_TABLE} numbers"
            )
        self.vocabulary = self.d_out = self.n_symbols + 1

    @property
    def config(self) -> dict[str, Any]:
        """The options: ``Markov(**task.config)`` is an equal task."""
        return {name: getattr(self, name) for name in ("order", "n_symbols", "beta", "switch", "n_pairs")}

    @property
    def report_ks(self) -> tuple[int, ...]:
        """After a sixteenth and a quarter of the symbols, and at the last one."""
        return tuple(sorted({self.n_pairs // 16, self.n_pairs // 4, self.n_pairs - 1}))

    def sample(
        self, n: int, generator: torch.Generator, *, d_active: int | None = None, n_pairs: int | None = None
    ) -> Batch:
        """``n`` prompts with ``n_pairs`` predictions.

        ``d_active`` is checked and has no effect: a symbol has no coordinates.
        Raises ``BadArgument`` if d_active is not 1, or if n or n_pairs is below 1.
        """
        whole_number("n", n, least=1)
        whole_number("d_active", self.d if d_active is None else d_active, 1, self.d)
        length = whole_number("n_pairs", self.n_pairs if n_pairs is None else n_pairs, 1)
        switches = seeds.uniform((n, length), generator) < self.switch
        return self._prompts(switches, generator)

    def corrupt(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Other chains with the switches at the same places: every symbol is drawn anew."""
        return self._prompts(batch.targets.cpu() == self.n_symbols, generator).to(batch.tokens.device)

    def predict(self, model: Model, batch: Batch) -> Float[Tensor, "batch n_pairs vocabulary"]:
        """log p of each token at every example, out of one forward."""
        return log_probabilities(model, batch, self.d_out)

    def training_loss(self, model: Model, batch: Batch, generator: torch.Generator) -> Float[Tensor, "batch n_pairs"]:
        """The loss of every example; ``generator`` is not used."""
        return self.loss(self.predict(model, batch), batch)

    def loss(
        self, prediction: Float[Tensor, "batch n_pairs vocabulary"], batch: Batch
    ) -> Float[Tensor, "batch n_pairs"]:
        """-log p(y_k) in nats."""
        return nats(prediction, batch, self.vocabulary)

    def error(
        self, prediction: Float[Tensor, "batch n_pairs vocabulary"], batch: Batch
    ) -> Float[Tensor, "batch n_pairs"]:
        """The loss, in nats."""
        return self.loss(prediction, batch)

    def variables(self, batch: Batch) -> dict[str, Tensor]:
        """What a predictor could hold; entry k uses the k symbols before example k.

        table    (batch, S^k, S)           the transition table of the last example's chain
        row      (batch, n_pairs, S)       the true distribution of y_k given that it is a symbol
        counts   (batch, n_pairs, S^k, S)  how often each symbol has followed each context since the chain began
        estimate (batch, n_pairs, S^k, S)  the transition table that these counts and the prior lead one to expect
        chain    (batch, n_pairs)          the number of switches so far
        """
        y = batch.targets
        prompt = torch.arange(len(batch), device=y.device)
        counts = torch.stack([table.float() for table in tables(y, self.n_symbols, self.order)], dim=1)
        expected = counts + self.beta
        return {
            "table": batch.truth["table"][prompt, batch.truth["chain"][:, -1]],
            "row": self._rows(batch),
            "counts": counts,
            "estimate": expected / expected.sum(dim=-1, keepdim=True),
            "chain": batch.truth["chain"],
        }

    def baselines(self, batch: Batch) -> dict[str, Float[Tensor, "batch n_pairs"]]:
        """Nats of the rivals; all of them know the rate of switches.

        bayes    the add-β estimator with the task's β: no predictor that sees the context alone is better on average
        uniform  every symbol equally probable
        entropy  the floor: the entropy of y_k for one who knows the transition table, averaged over what y_k may be
        """
        known = {"order": self.order, "beta": self.beta, "n_symbols": self.n_symbols, "switch": self.switch}
        bayes = self.loss(estimators.build("add_beta", **known)(batch), batch)
        symbol = torch.full(batch.targets.shape, 1 / self.n_symbols, dtype=bayes.dtype, device=bayes.device)
        uniform = torch.where(batch.targets == self.n_symbols, self.switch, (1 - self.switch) * symbol)
        floor = with_switch(entropy(self._rows(batch)), self.switch)
        return {"bayes": bayes, "uniform": -uniform.log(), "entropy": floor}

    def _rows(self, batch: Batch) -> Float[Tensor, "batch n_pairs symbol"]:
        """The distribution from which each y_k was drawn, were it no switch."""
        context, whole = contexts(batch.targets, self.n_symbols, self.order)
        prompt = torch.arange(len(batch), device=context.device)[:, None]
        rows = batch.truth["table"][prompt, batch.truth["chain"], context]
        return torch.where(whole[..., None], rows, 1 / self.n_symbols)

    def _prompts(self, switches: Bool[Tensor, "batch n_pairs"], generator: torch.Generator) -> Batch:
        """Chains with switch tokens at these places."""
        n, length = switches.shape
        chain = switches.long().cumsum(dim=1) - switches.long()
        table = self._tables(n, int(chain.max()) + 1, generator)
        lot = seeds.uniform((n, length), generator, torch.float64)
        targets = self._walk(switches, chain, table.double(), lot)
        start = torch.full_like(targets[:, :1], self.n_symbols)
        tokens = torch.cat([start, targets[:, :-1]], dim=1)
        read, kinds = torch.arange(length, device=tokens.device), (tokens == self.n_symbols).long()
        return token_batch(tokens, targets, read, kinds, {"table": table, "chain": chain})

    def _tables(self, n: int, chains: int, generator: torch.Generator) -> Float[Tensor, "batch chain context symbol"]:
        """Rows from Dirichlet(β, … β): numpy's, which stays exact for small β, on a stream of the generator's."""
        stream = np.random.default_rng(int(seeds.integers(0, 2**62, (), generator)))
        rows = stream.dirichlet(np.full(self.n_symbols, self.beta), size=(n, chains, self.n_symbols**self.order))
        return torch.from_numpy(rows).float()

    def _walk(
        self,
        switches: Bool[Tensor, "batch n_pairs"],
        chain: Int[Tensor, "batch n_pairs"],
        table: Float[Tensor, "batch chain context symbol"],
        lot: Float[Tensor, "batch n_pairs"],
    ) -> Int[Tensor, "batch n_pairs"]:
        """The symbols, each where ``lot``, uniform on [0, 1), falls among the cumulative probabilities of its row."""
        n, size = len(lot), self.n_symbols
        steps, prompt = table.cumsum(dim=-1), torch.arange(n, device=table.device)
        even = torch.arange(1, size + 1, dtype=table.dtype, device=table.device) / size
        context, seen = (torch.zeros(n, dtype=torch.long, device=table.device) for _ in range(2))
        out = []
        for k in range(lot.shape[1]):
            row = torch.where((seen >= self.order)[:, None], steps[prompt, chain[:, k], context], even)
            # The last cumulative probability is 1 but for rounding, and no symbol comes after it.
            symbol = (lot[:, k, None] >= row[:, :-1]).sum(dim=-1)
            out.append(torch.where(switches[:, k], size, symbol))
            context = torch.where(switches[:, k], 0, (context * size + symbol) % size**self.order)
            seen = torch.where(switches[:, k], 0, seen + 1)
        return torch.stack(out, dim=1)
