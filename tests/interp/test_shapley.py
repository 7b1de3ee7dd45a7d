"""Shapley values: closed forms, the axioms, and an independent average over all orders."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor

from hooks.errors import BadArgument
from interp.shapley import shapley

pytestmark = pytest.mark.law


def over_orders(values: dict[tuple[bool, ...], Tensor], players: int) -> Tensor:
    """The definition: what each player adds when it joins, averaged over every order."""
    total = torch.zeros(players, *next(iter(values.values())).shape, dtype=torch.float64)
    orders = list(permutations(range(players)))
    for order in orders:
        changed = [False] * players
        for player in order:
            before = values[tuple(changed)]
            changed[player] = True
            total[player] += values[tuple(changed)] - before
    return total / len(orders)


def table(players: int, shape: tuple[int, ...] = (3,)) -> dict[tuple[bool, ...], Tensor]:
    generator = torch.Generator().manual_seed(0)
    subsets = [tuple(bool(s >> i & 1) for i in range(players)) for s in range(2**players)]
    return {subset: torch.randn(*shape, generator=generator, dtype=torch.float64) for subset in subsets}


@pytest.mark.parametrize("players", [1, 2, 5])
def test_equals_the_average_over_all_orders_and_sums_exactly(players: int) -> None:
    values = table(players)
    found = shapley(values.__getitem__, players)
    torch.testing.assert_close(found, over_orders(values, players))
    whole = values[(True,) * players] - values[(False,) * players]
    torch.testing.assert_close(found.sum(0), whole, rtol=1e-12, atol=1e-12)


def test_a_product_of_two_shares_what_only_both_do() -> None:
    """v = a b from (1, 1) to (3, 5): 14 in all; a: ½ (2·1 + 2·5), b: ½ (4·1 + 4·3); the third player does nothing."""
    found = shapley(lambda s: torch.tensor((3.0 if s[0] else 1.0) * (5.0 if s[1] else 1.0)), 3)
    torch.testing.assert_close(found, torch.tensor([6.0, 8.0, 0.0]))


def test_equal_players_get_equal_shares() -> None:
    found = shapley(lambda s: torch.tensor(float(sum(s)) ** 3), 4)
    torch.testing.assert_close(found, torch.full((4,), 16.0))


def test_every_subset_is_asked_once() -> None:
    asked: list[tuple[bool, ...]] = []

    def value(changed: tuple[bool, ...]) -> Tensor:
        asked.append(changed)
        return torch.zeros(2)

    shapley(value, 5)
    assert len(asked) == len(set(asked)) == 32


@pytest.mark.parametrize("players", [0, 13, True])
def test_players_out_of_range_are_refused(players: int) -> None:
    with pytest.raises(BadArgument, match="players"):
        shapley(lambda s: torch.zeros(1), players)


def test_values_of_two_shapes_are_refused() -> None:
    with pytest.raises(BadArgument, match="give one shape"):
        shapley(lambda s: torch.zeros(1 + s[0]), 2)
