"""Selective copying: where the symbols stand, what the markers tell, and who can answer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from interp import evaluate, seeds, tasks
from interp.tasks import Batch

MANY = 3000


def draw(n: int = MANY, seed: int = 0, **config: Any) -> tuple[Any, Batch]:
    task = tasks.build("selective_copy", **config)
    return task, task.sample(n, seeds.generator("evaluate", seed))


def near(values: Tensor, expected: float) -> bool:
    """Whether the mean of independent values is ``expected`` within 4 standard errors."""
    values = values.double()
    return abs(float(values.mean()) - expected) <= 4 * float(values.std()) / math.sqrt(len(values))


@pytest.mark.definition
def test_a_prompt_is_symbols_among_blanks_and_then_markers() -> None:
    _, batch = draw(n=100, n_pairs=4, length=15, n_symbols=6)
    names = {"symbol": 0, "blank": 1, "marker": 2}
    for row, kinds, targets in zip(batch.tokens.tolist(), batch.kinds.tolist(), batch.targets.tolist(), strict=True):
        assert [token for token in row[:15] if token != 6] == targets
        assert row[15:] == [7] * 4 and all(0 <= token < 6 for token in targets)
        assert kinds == [names["marker" if t == 7 else "blank" if t == 6 else "symbol"] for t in row]
    assert batch.read.tolist() == [15, 16, 17, 18]


@pytest.mark.statistics
def test_symbols_and_places_are_uniform_and_each_prompts_own() -> None:
    _, batch = draw(n_pairs=3, length=8, n_symbols=5)
    occupied = (batch.tokens[:, :8] != 5).float()
    assert all(near(occupied[:, place], 3 / 8) for place in range(8))
    assert all(near((batch.targets[:, k] == symbol).float(), 1 / 5) for k in range(3) for symbol in range(5))
    assert near((occupied[::2] == occupied[1::2]).all(dim=1).float(), 1 / math.comb(8, 3))


@pytest.mark.law
def test_an_answer_is_at_its_place_and_in_no_marker() -> None:
    task, batch = draw(n=100)
    other = task.corrupt(batch, seeds.generator("corrupt", 0))
    changed = torch.zeros_like(batch.tokens, dtype=torch.bool).scatter(1, batch.truth["place"], True)
    assert torch.equal(other.tokens != batch.tokens, changed)
    assert (other.targets != batch.targets).all() and not changed[:, 32:].any()


def copy(tokens: Tensor, blank: int = 8) -> Tensor:
    """At the k-th marker everything on the k-th symbol, found by counting in a loop."""
    out = torch.zeros(*tokens.shape, blank + 2)
    for b, row in enumerate(tokens.tolist()):
        symbols = [token for token in row if token < blank]
        for k, symbol in enumerate(symbols):
            out[b, len(row) - len(symbols) + k] = 40 * one_hot(torch.tensor(symbol), blank + 2)
    return out


@pytest.mark.planted
def test_copying_in_order_solves_it_and_backwards_does_not() -> None:
    task, batch = draw(n=200)
    assert not evaluate.errors(copy, task, batch=batch).any()
    assert float(task.loss(task.predict(copy, batch), batch).max()) < 1e-6
    backwards = evaluate.errors(lambda tokens: copy(torch.cat([tokens[:, :32].flip(1), tokens[:, 32:]], 1)), task,
                                batch=batch)  # fmt: skip
    assert near(backwards.mean(dim=1), 7 / 8), "the k-th from behind is another symbol, right by luck"


@pytest.mark.statistics
def test_the_rivals_have_their_closed_forms() -> None:
    task, batch = draw(n_pairs=4, length=12, n_symbols=5)
    rivals = task.baselines(batch)
    assert not rivals["copy"].any()
    assert torch.equal(rivals["chance"], torch.full_like(rivals["chance"], 0.8))
    assert near(rivals["unordered"].mean(dim=1), 1 - (1 / 4 + 3 / 4 / 5))
    # The place with the fixed lag holds symbol k by luck of the order statistics; otherwise it is chance.
    for k, place in enumerate((1, 4, 7, 10)):
        hit = math.comb(place, k) * math.comb(11 - place, 3 - k) / math.comb(12, 4)
        assert near(rivals["fixed_lag"][:, k], 0.8 * (1 - hit)), k
    dense, packed = draw(n_pairs=4, length=4)
    assert not dense.baselines(packed)["fixed_lag"].any()


@pytest.mark.definition
def test_distance_is_from_the_symbol_to_its_marker() -> None:
    task, batch = draw(n=30)
    found = task.variables(batch)
    assert torch.equal(batch.tokens.gather(1, batch.read - found["distance"]), batch.targets)
    assert len(found["distance"].unique()) > 10
