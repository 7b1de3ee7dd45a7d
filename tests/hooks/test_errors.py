"""A message has one line, whatever it speaks of."""

from __future__ import annotations

import collections

import numpy as np
import pytest
import torch

from hooks.errors import told, unknown

pytestmark = pytest.mark.contract


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "None"),
        (3, "3"),
        (0.5, "0.5"),
        (float("nan"), "nan"),
        ("linreg", "'linreg'"),
        ("x" * 500, "'" + "x" * 57 + " …"),
        ([1, 2], "[1, 2]"),
        ((0, 3), "(0, 3)"),
        (list(range(1000)), "a list of 1000"),
        ([torch.rand(300)], "a list of 1"),
        ({"a": torch.rand(3)}, "a dict of 1"),
        (collections.OrderedDict(a=1, b=2), "a OrderedDict of 2"),
        (torch.rand(300), "a Tensor of shape (300,) and float32"),
        (torch.ones(2, 3, dtype=torch.bool), "a Tensor of shape (2, 3) and bool"),
        (np.zeros((4, 0)), "a ndarray of shape (4, 0) and float64"),
        (np.float64(2.5), "np.float64(2.5)"),
        (torch.nn.Linear(300, 300), "a Linear"),
        (torch.nn.Linear, "the class Linear"),
    ],
)
def test_a_value_is_told_in_a_few_words(value: object, words: str) -> None:
    assert told(value) == words


def test_a_long_name_is_cut_in_the_message_that_does_not_know_it() -> None:
    message = unknown("task", "x" * 5000 + "\n", ["linreg"])
    assert len(message) < 150 and "\n" not in message
