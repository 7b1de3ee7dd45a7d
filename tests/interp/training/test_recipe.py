"""Recipes: what makes no sense is refused, and what a schedule says at each step."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from hooks.errors import BadArgument
from interp.training import fit, recipe
from tests.interp.tiny import CONFIG, Tiny

pytestmark = pytest.mark.contract


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("steps", 0, "whole number from 1 up"),
        ("steps", 2.5, "steps|wrong type"),
        ("learning_rates", [1e-3, 1e-2], "at least three"),
        ("learning_rates", [1e-3, 1e-3, 1e-2], "at least three"),
        ("learning_rates", [-1.0], "must be > 0"),
        ("warmup", 2, "from 0 to 1"),
        ("curriculum", float("nan"), "from 0 to 1"),
        ("precision", "fp16", "fp16 skips steps"),
        ("precision", "fp8", "no precision"),
        ("seed", -1, "seed"),
        ("step", 3, 'did you mean "steps"'),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(field: str, value: Any, said: str) -> None:
    good = CONFIG.as_dict()
    assert recipe.from_dict(good) == CONFIG
    with pytest.raises(BadArgument, match=said):
        recipe.from_dict({**good, field: value})
    with pytest.raises(BadArgument, match="does not say which task"):
        recipe.from_dict({"model": "tiny"})


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine() -> None:
    config = dataclasses.replace(CONFIG, warmup=0.1, floor=0.2)
    rates = [recipe.learning_rate(config, step, 100, 1.0) for step in range(100)]
    torch.testing.assert_close(rates[:10], [(step + 1) / 10 for step in range(10)])
    torch.testing.assert_close(rates[10], 1.0)
    torch.testing.assert_close(rates[55], 0.2 + 0.8 / 2)  # half-way down the cosine
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.2 < rates[99] < 0.201
    assert recipe.learning_rate(dataclasses.replace(config, warmup=0.0), 0, 1, 3.0) == 3.0


def test_the_curriculum_is_a_staircase_from_a_quarter_to_all() -> None:
    config = dataclasses.replace(CONFIG, curriculum=0.5)
    stairs = [recipe.curriculum(config, step, 100, 20) for step in range(100)]
    assert stairs[0] == 5
    assert stairs[49] == 20
    assert set(stairs[50:]) == {20}
    assert sorted(set(stairs)) == list(range(5, 21))
    assert stairs == sorted(stairs)
    assert recipe.curriculum(dataclasses.replace(CONFIG, curriculum=0.0), 0, 100, 20) == 20
    assert recipe.curriculum(config, 0, 100, 1, least=2) == 1


def test_decay_leaves_out_biases_and_the_recurrence() -> None:
    model = Tiny()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = fit.adamw(model, CONFIG).param_groups
    decayed = {names[id(p)] for p in groups[0]["params"]}
    assert decayed == {"read_in.weight", "read_out.weight"}
    assert groups[0]["weight_decay"] == CONFIG.weight_decay
    assert {names[id(p)] for p in groups[1]["params"]} == set(names.values()) - decayed
    assert groups[1]["weight_decay"] == 0
    assert groups[0]["betas"] == (0.9, 0.95)
