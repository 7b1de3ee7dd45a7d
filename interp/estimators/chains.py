"""Counting in context: the estimator of Markov chains, out of the symbols before each example and nothing else.

Symbols are 0 … n_symbols - 1. The token ``n_symbols`` is no symbol: a new chain begins after it, so nothing that stands
before it counts. The context of an example is its last ``order`` symbols; it is *whole* once the chain has so many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks.errors import BadArgument
from interp.arguments import between, whole_number
from interp.estimators.base import room_for


def add_beta(
    order: int = 1, beta: float = 1.0, n_symbols: int = 2, switch: float = 0.0
) -> Callable[[Any], Float[Tensor, "batch n_pairs vocabulary"]]:
    """The add-β (Laplace) estimator, a function of a batch: log p of the n_symbols symbols and of the switch token.

    p(j) = (1 - switch) (n_cj + β) / (n_c + β n_symbols), n_cj the number of times that j has followed the current
    context c since the chain began; (1 - switch) / n_symbols while the context is not whole; p(switch token) = switch,
    so that its logarithm is -inf for switch=0. It reads ``batch.y`` alone, of which entry k is not used for example k
    or any before it. With rows of the transition table drawn from Dirichlet(β, … β), first symbols uniform and switches
    independent of all else, this is the Bayes predictor (arXiv 2502.10178 §2).
    """
    return forgetting(whole_number("order", order, least=1), beta, 1.0, n_symbols, switch)


def forgetting(
    order: int, beta: float = 1.0, keep: float = 1.0, n_symbols: int = 2, switch: float = 0.0
) -> Callable[[Any], Float[Tensor, "batch n_pairs vocabulary"]]:
    """``add_beta`` in which all that was counted is multiplied by ``keep`` at each symbol, and ``order`` may be 0: the
    frequencies of the symbols, whatever came before.
    """
    order = whole_number("order", order, least=0)
    beta = between("beta", beta, 1e-6)
    keep = between("keep", keep, 0.0, 1.0)
    n_symbols = whole_number("n_symbols", n_symbols, least=2)
    switch = between("switch", switch, 0.0, 0.99)

    def estimate(batch: Any) -> Float[Tensor, "batch n_pairs vocabulary"]:
        y = _symbols(batch.y, n_symbols)
        context, whole = contexts(y, n_symbols, order)
        prompt = torch.arange(len(y), device=y.device)
        # A context that is not whole reads row 0; it is replaced by nothing counted.
        rows = [table[prompt, context[:, k]] for k, table in enumerate(tables(y, n_symbols, order, keep))]
        counts = torch.stack(rows, dim=1) * whole[..., None] + beta
        symbols = (1 - switch) * counts / counts.sum(dim=-1, keepdim=True)
        other = torch.full_like(symbols[..., :1], switch)
        return torch.cat([symbols, other], dim=-1).log().float().to(batch.y.device)

    return estimate


def _symbols(y: Tensor, n_symbols: int) -> Int[Tensor, "batch n_pairs"]:
    """``y`` on the CPU, or ``BadArgument`` if it holds anything but symbols and the switch token."""
    if y.is_floating_point() or int(y.min()) < 0 or int(y.max()) > n_symbols:
        raise BadArgument(
            f"add_beta counts integers from 0 to n_symbols={n_symbols}; the labels are {y.dtype} from {y.min()} to "
            f"{y.max()}: give it prompts of the task markov, and the task's n_symbols"
        )
    return y.cpu()


def contexts(
    y: Int[Tensor, "batch n_pairs"], n_symbols: int, order: int
) -> tuple[Int[Tensor, "batch n_pairs"], Bool[Tensor, "batch n_pairs"]]:
    """The context before each example, as a number in base ``n_symbols`` (newest symbol last), and whether it is whole.

    The number is 0 where the context is not whole. Raises ``TooLarge`` where a table of all contexts would not fit.
    """
    room_for(len(y) * n_symbols ** (order + 1), f"counts in {n_symbols}^{order} contexts", "give a smaller order")
    count = torch.arange(y.shape[1], device=y.device)
    begins = torch.zeros_like(y)
    begins[:, 1:] = torch.where(y == n_symbols, count + 1, 0)[:, :-1]
    whole = count - begins.cummax(dim=1).values >= order
    context = torch.zeros_like(y)
    for back in range(1, min(order, y.shape[1] - 1) + 1):
        context[:, back:] += y[:, :-back] * n_symbols ** (back - 1)
    return torch.where(whole, context, 0), whole


def tables(
    y: Int[Tensor, "batch n_pairs"], n_symbols: int, order: int, keep: float = 1.0
) -> Iterator[Float[Tensor, "batch context symbol"]]:
    """For each example k in turn, how often each symbol has followed each context in the chain that is under way.

    What was counted j symbols ago counts keep^(j - 1). It is one tensor, in fp64, that goes on being counted in: copy
    what is to be kept.
    """
    context, whole = contexts(y, n_symbols, order)
    table = torch.zeros(len(y), n_symbols**order, n_symbols, dtype=torch.float64, device=y.device)
    for k in range(y.shape[1]):
        yield table
        table *= keep
        ends = y[:, k] == n_symbols
        table[ends] = 0
        counted = (whole[:, k] & ~ends).nonzero()[:, 0]
        table[counted, context[counted, k], y[counted, k]] += 1


def entropy(p: Float[Tensor, "*axes symbol"]) -> Float[Tensor, "*axes"]:
    """-Σ p log p over the last axis, in nats."""
    return torch.special.entr(p).sum(dim=-1)


def with_switch(nats: Float[Tensor, "*axes"], switch: float) -> Float[Tensor, "*axes"]:
    """The entropy of a symbol of entropy ``nats`` that is a switch token instead with probability ``switch``."""
    coin = -sum(p * math.log(p) for p in (switch, 1 - switch) if p > 0)
    return coin + (1 - switch) * nats
