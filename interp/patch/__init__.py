"""Patching: a run is given something of another run, and we see how much of the other's answer comes along.

    activations(model, clean, corrupted, sites, metric)    a site, at a position, takes its value of the clean run
    swap_states(model, first, second, at)                  a prompt goes on from the state of another
    knock_out(model, pairs)                                one token no longer reaches another
    recovery(f_patch, f_1, f_2)                            the share of the difference that comes along

A patch that recovers much shows that the site holds enough for the answer there, not that the model uses no other way;
and a patched run is one that no prompt would give.
"""

from interp.metric import recovery
from interp.patch.knockout import between, knock_out, left
from interp.patch.patching import Patched, activations, patched
from interp.patch.swap import Swap, swap_states, swap_table

__all__ = [
    "Patched",
    "Swap",
    "activations",
    "between",
    "knock_out",
    "left",
    "patched",
    "recovery",
    "swap_states",
    "swap_table",
]
