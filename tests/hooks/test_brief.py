"""Reprs: names, axes and sizes in ten lines at most, and no wall of numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor

import hooks
import models
from hooks.brief import COLUMNS, LINES, brief, lines, written
from interp import attention, patch, probe, similarity, stats, tasks
from interp.attention.tokens import contributions
from interp.patch.swap import Swap
from interp.result import Check, Result
from interp.training.train import Trained
from tests.hooks.conftest import build
from tests.interp.planted import last

pytestmark = pytest.mark.contract

Alias = Float[Tensor, "row column"]


@dataclass(frozen=True)
class Example:
    plain: Float[Tensor, "batch pos"]
    alias: Alias
    open: Int[Tensor, "... n_read"]
    rest: Float[Tensor, "batch *rest"]
    maybe: Float[Tensor, " batch"] | None
    number: Float[np.ndarray, ""]
    unnamed: Any
    hidden: Any = field(default=None, repr=False)

    __repr__ = brief


def test_axes_are_named_as_the_annotation_has_them() -> None:
    made = Example(
        torch.zeros(2, 3), torch.zeros(4, 5), torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 7, 8),
        torch.zeros(9), np.array(0.25), np.zeros((2, 2), np.float32), "not shown",
    )  # fmt: skip
    assert repr(made).splitlines() == [
        "Example",
        "  plain    batch=2 pos=3  float32",
        "  alias    row=4 column=5  float32",
        "  open     2 n_read=6  int64",
        "  rest     batch=2 7 8  float32",
        "  maybe    batch=9  float32",
        "  number   0.25",
        "  unnamed  (2, 2)  float32",
    ]
    with_one = Example(*[torch.zeros(3, 4)] * 3, torch.zeros(3, 4), None, torch.tensor(2.0), [1, 2])
    assert "rest     batch=3 rest=4  float32" in repr(with_one) and "maybe    None" in repr(with_one)


def test_many_fields_and_long_ones_are_cut_to_ten_lines() -> None:
    for parts in ({f"name_{i}": "x" * 40 for i in range(30)}, {f"name_{i}": "word " * 90 for i in range(5)}):
        shown = lines("Thing", parts).splitlines()
        assert shown[0] == "Thing" and len(shown) <= LINES and max(map(len, shown)) <= COLUMNS
    assert lines("Thing", {f"n{i}": "1" for i in range(12)}).count("\n") == 1, "short ones share a line"
    assert written({"a": np.zeros((3, 4)), "b": 2, "c": [1]}) == "3: a (3, 4), b=2, c"
    assert written(pd.DataFrame({"k": [1], "error": [0.5]})) == "1 rows of k, error"


def everything() -> list[Any]:
    task = tasks.build("linreg", d=5, n_pairs=300)
    batch = task.sample(64, torch.Generator().manual_seed(0))
    short = task.sample(12, torch.Generator().manual_seed(0), n_pairs=4)
    model = build("mamba")
    x = torch.randn(12, 7, 5, dtype=torch.float64)
    rows = torch.randn(40, 6)
    card = models.load("mamba-linreg").card
    table = pd.DataFrame({"k": np.arange(500.0), "value": np.arange(500.0)})
    result = Result({"task": "linreg"}, table, {"a": np.zeros((40, 40))}, [Check.at_most("x", 0.0, 1.0)], {"seed": 0})
    return [
        batch,
        short,
        patch.patched(model, x, x.roll(1, 0), "*.hook_y", last),
        attention.matrix(model, x, 0),
        contributions(model, x, 0, scalar=last),
        result,
        card,
        Trained(Path("out/run"), dict(card)),
        hooks.record(model, x),
        similarity.compare([rows], [rows], n_perm=5),
        probe.ridge(rows.numpy(), {"w": rows[:, :1].numpy()}, untrained=None, running_sum=None)["w"],
        stats.bootstrap(rows),
        hooks.set_to(x, pos=[7]),
        model(x, return_state=True)[1],
        Swap(model, x, x.roll(1, 0), 3),
    ]


def test_what_people_look_at_fits_ten_lines_and_holds_no_numbers() -> None:
    for one in everything():
        shown = repr(one)
        assert shown.count("\n") < LINES and max(map(len, shown.splitlines())) <= COLUMNS, shown
        assert "tensor(" not in shown and "array(" not in shown and "[[" not in shown, shown
    batch, _, patched, attended, *_ = everything()
    assert "tokens   batch=64 pos=599 d_token=5  float32" in repr(batch)
    assert "cells=14 n=12" in repr(patched)
    assert "batch=12 channel=16 query=7 pos=7" in repr(attended)
    *_, state, swapped = everything()
    assert repr(state).startswith("Carried after 7 tokens\n  layer 0  LayerState(conv batch=12 d_inner=16 taps=3")
    assert repr(swapped) == "Swap: 12 pairs of prompts, swapped at 3, 4 tokens after; h, conv"


def test_an_edit_is_written_as_it_is_called() -> None:
    assert repr(hooks.zero()) == "zero()"
    assert repr(hooks.scale(0.5, channels=[1])) == "scale(0.5, channels=[1])"
    assert repr(hooks.set_to(torch.zeros(8, 1, 16), pos=[7])) == (
        "set_to(a Tensor of shape (8, 1, 16) and float32, pos=[7])"
    )
    assert (
        repr(hooks.resample(source={})) == "resample(source=…)" and repr(hooks.resample(seed=3)) == "resample(seed=3)"
    )
    assert repr(hooks.mean(over="batch")) == "mean(over=('batch',))"
    assert repr(hooks.freeze(pos=[3])) == "freeze(pos=[3])"
    assert repr(hooks.do_state(layer=2, pos=[7], value=0.0)) == "do_state(layer=2, set_to(0.0, pos=[7]))"


def test_a_card_is_a_dict_all_the_same() -> None:
    card = models.load("mamba-linreg").card
    assert isinstance(card, dict) and card["task"] == "linreg"
    assert repr(card).startswith("card\n") and "measured" in repr(card)
