"""Exact Shapley values: the difference between two states of a few players, split over the players.

v(S) is the value when the players in S have changed and the others have not. The share of player i is the mean, over
all orders in which they could change one after the other, of what is added at the moment when i does:

    φ_i = Σ_{S ∌ i} |S|! (n − |S| − 1)! / n! · (v(S ∪ {i}) − v(S)),     Σ_i φ_i = v(all) − v(none), exactly

It is the only split that sums, treats equals alike, gives nothing to a player that changes nothing, and is linear in v
(Shapley 1953). All 2ⁿ values are used; nothing is sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from math import factorial

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.errors import BadArgument
from interp.arguments import whole_number
from interp.machine.progress import followed

MOST_PLAYERS = 12


def shapley(value: Callable[[tuple[bool, ...]], Tensor], players: int) -> Float[Tensor, "player *shape"]:
    """φ of each player, from ``value(changed)``, which is called once for each of the 2^players subsets.

    ``changed[i]`` says whether player i has changed. All values have one shape, and every entry is split by itself.
    Raises :class:`BadArgument` for more players than 2ⁿ calls can serve, and for values of several shapes.
    """
    whole_number("players", players, 1, MOST_PLAYERS)
    values = [value(_changed(subset, players)) for subset in followed(range(2**players), "shapley")]
    for found in values:
        if found.shape != values[0].shape:
            raise BadArgument(f"values of shape {tuple(values[0].shape)} and {tuple(found.shape)}: give one shape")
    shares = []
    for player in range(players):
        bit = 1 << player
        share = torch.zeros_like(values[0])
        for subset in range(2**players):
            if not subset & bit:
                share = share + _weight(subset.bit_count(), players) * (values[subset | bit] - values[subset])
        shares.append(share)
    return torch.stack(shares)


def _changed(subset: int, players: int) -> tuple[bool, ...]:
    return tuple(bool(subset >> i & 1) for i in range(players))


def _weight(size: int, players: int) -> float:
    """The share of orders in which exactly ``size`` given players come before a given one."""
    return factorial(size) * factorial(players - size - 1) / factorial(players)
