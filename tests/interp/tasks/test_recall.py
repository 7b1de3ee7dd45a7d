"""Associative recall: keys, values, filler and gaps; what can be known of an answer and what cannot."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from interp import evaluate, seeds, tasks
from interp.tasks import Batch

MANY = 3000


def draw(n: int = MANY, seed: int = 0, **config: Any) -> tuple[Any, Batch]:
    task = tasks.build("mqar", **config)
    return task, task.sample(n, seeds.generator("evaluate", seed))


def near(values: Tensor, expected: float) -> bool:
    """Whether the mean of independent values is ``expected`` within 4 standard errors."""
    values = values.double()
    return abs(float(values.mean()) - expected) <= 4 * float(values.std()) / math.sqrt(len(values))


@pytest.mark.definition
def test_a_prompt_is_pairs_then_each_key_once_among_filler() -> None:
    _, batch = draw(n=200, n_pairs=5, length=40, n_keys=9, n_values=7, n_filler=3)
    for row, kinds, targets in zip(batch.tokens.tolist(), batch.kinds.tolist(), batch.targets.tolist(), strict=True):
        keys, values, rest = row[0:10:2], row[1:10:2], row[10:]
        assert len(set(keys)) == 5 and all(0 <= key < 9 for key in keys)
        assert all(9 <= value < 16 for value in values)
        asked = [token for token in rest if token < 9]
        assert sorted(asked) == sorted(keys)
        assert targets == [values[keys.index(key)] for key in asked]
        assert all(16 <= token < 19 for token in rest if token >= 9)
        assert [i for i, token in enumerate(rest) if token < 9] == [i - 10 for i, kind in enumerate(kinds) if kind == 2]
        assert kinds[:10] == [0, 1] * 5


@pytest.mark.law
def test_filler_is_of_the_generator_and_never_a_key_or_a_value() -> None:
    """The released sampler draws it from an unseeded stream and from the whole vocabulary."""
    _, batch = draw(n=500)
    filler = batch.tokens[batch.kinds == 3]
    assert int(filler.min()) >= 64 and int(filler.max()) < 80 and len(filler.unique()) == 16
    torch.manual_seed(1)
    assert torch.equal(draw(n=500)[1].tokens, batch.tokens)
    assert not torch.equal(draw(n=500, seed=1)[1].tokens, batch.tokens)


@pytest.mark.statistics
@pytest.mark.parametrize("power", [0.01, 0.5, 1.0])
def test_a_pairs_gap_follows_the_power_law(power: float) -> None:
    """The first pair draws from all places; the later ones from what is left."""
    _, batch = draw(n_pairs=3, length=24, power=power)
    first = batch.truth["gap"][batch.truth["pair"] == 0]
    weight = torch.arange(1, 10) ** (power - 1.0)
    for g in range(1, 10):
        assert near((first == g).float(), float(weight[g - 1] / weight.sum())), g
    assert (batch.truth["gap"].diff(dim=1) > 0).all()
    soonest = batch.truth["pair"][:, 0].float()
    if power == 1.0:
        assert near(soonest, 1.0)
    if power == 0.01:
        assert not near(soonest, 1.0) and float(soonest.mean()) < 1, "an early pair has the choice of early places"


@pytest.mark.statistics
@pytest.mark.parametrize("power", [0.01, 1.0])
def test_pairs_told_first_are_asked_sooner_as_often_as_a_sum_over_all_orders_says(power: float) -> None:
    """P(query is for pair) of three pairs on six places, summed over the 120 orders in which places can be drawn."""
    p = np.arange(1, 7) ** (power - 1.0)
    p /= p.sum()
    expected = np.zeros((3, 3))
    for places in permutations(range(6), 3):
        first, second, third = places
        chance = p[first] * p[second] / (1 - p[first]) * p[third] / (1 - p[first] - p[second])
        expected[range(3), np.argsort(places)] += chance
    n = 20_000
    batch = tasks.build("mqar", n_pairs=3, length=18, power=power).sample(n, seeds.generator("probe", 0))
    seen = torch.nn.functional.one_hot(batch.truth["pair"], 3).double().mean(0).numpy()
    assert np.abs(seen - expected).max() < 4.5 * (0.25 / n) ** 0.5
    assert expected[0, 0] == pytest.approx(1 / 3 if power == 1 else 0.457, abs=1e-3)


@pytest.mark.statistics
def test_the_first_query_is_for_the_first_pair_as_often_as_the_docstring_says() -> None:
    """Each place a clock of rate p_g: the first pair has the first that rings. That place g is the smallest of all m
    means that the next m − 1 to ring are behind it: ∫ L e^(−L t) P(m − 1 of those have rung by t) dt, L = Σ_{h<g} p_h.
    """
    m, p = 8, np.arange(1, 25) ** -0.99
    p /= p.sum()
    t = np.logspace(-6, 7, 8001)
    found = float(p[0])
    for g in range(1, 24 - m + 1):
        rung = np.eye(1, m).T * np.ones_like(t)
        for rate in p[g + 1 :]:
            now = -np.expm1(-rate * t)
            rung = rung * (1 - now) + np.vstack([0 * t, rung[:-1] * now]) + np.eye(1, m, m - 1).T * rung[-1] * now
        before = p[:g].sum()
        found += float(p[g] * np.trapezoid(before * np.exp(-before * t) * rung[-1], t))
    assert found == pytest.approx(0.269, abs=5e-4) and "P = 0.269" in (type(tasks.build("mqar")).__doc__ or "")
    n = 30_000
    batch = tasks.build("mqar").sample(n, seeds.generator("probe", 1))
    share = float((batch.truth["pair"][:, 0] == 0).double().mean())
    assert abs(share - found) < 4 * (found * (1 - found) / n) ** 0.5


@pytest.mark.statistics
def test_keys_and_values_are_uniform() -> None:
    _, batch = draw(n_pairs=4, n_keys=6, n_values=5)
    for i in range(4):
        assert all(near((batch.truth["keys"][:, i] == key).float(), 1 / 6) for key in range(6))
        assert all(near((batch.truth["values"][:, i] == 6 + value).float(), 1 / 5) for value in range(5))


@pytest.mark.law
def test_an_answer_is_in_its_pair_and_nowhere_else() -> None:
    """Drawing the values anew changes the n_pairs tokens that tell them and no other."""
    task, batch = draw(n=100)
    other = task.corrupt(batch, seeds.generator("corrupt", 0))
    changed = other.tokens != batch.tokens
    expected = torch.zeros(64, dtype=torch.bool)
    expected[1:16:2] = True
    assert torch.equal(changed, expected.expand_as(changed))
    assert (other.targets != batch.targets).all()


def look_up(tokens: Tensor, m: int = 8, size: int = 80) -> Tensor:
    """Logits that put everything on the value behind the first place of the current token."""
    key, value = tokens[:, 0 : 2 * m : 2], tokens[:, 1 : 2 * m : 2]
    found = (tokens[:, :, None] == key[:, None, :]).float()
    return 40 * found @ one_hot(value, size).float()


@pytest.mark.planted
def test_looking_the_key_up_solves_it_and_a_wrong_table_does_not() -> None:
    task, batch = draw(n=300)
    assert not evaluate.errors(look_up, task, batch=batch).any()
    assert float(task.loss(task.predict(look_up, batch), batch).max()) < 1e-6

    def shifted(tokens: Tensor) -> Tensor:
        return look_up(torch.cat([tokens[:, :16].roll(2, dims=1), tokens[:, 16:]], dim=1))

    def misbound(tokens: Tensor) -> Tensor:
        told = tokens[:, :16].clone()
        told[:, 1::2] = told[:, 1::2].roll(1, dims=1)
        return look_up(torch.cat([told, tokens[:, 16:]], dim=1))

    assert not evaluate.errors(shifted, task, batch=batch).any(), "the order of the pairs does not matter"
    assert float(evaluate.errors(misbound, task, batch=batch).mean()) > 0.9


@pytest.mark.statistics
def test_the_rivals_have_their_closed_forms() -> None:
    """A pair at random is right in one of m cases, and by luck in 1/n_values of the others."""
    task, batch = draw(n_pairs=4, n_values=5)
    rivals = task.baselines(batch)
    assert not rivals["recall"].any()
    assert (rivals["chance"] == 0.8).all()
    assert near(rivals["in_context"].mean(dim=1), 1 - (1 / 4 + 3 / 4 / 5))


@pytest.mark.definition
def test_guessing_among_the_values_has_the_error_of_chance() -> None:
    task, batch = draw(n=50)
    values = torch.full((*batch.tokens.shape, 80), -40.0)
    values[..., 32:64] = 0
    found = evaluate.errors(lambda tokens: values[: len(tokens)], task, batch=batch)
    torch.testing.assert_close(found, task.baselines(batch)["chance"])


@pytest.mark.definition
def test_distance_is_from_the_pair_to_its_query() -> None:
    task, batch = draw(n=30)
    distance = task.variables(batch)["distance"]
    at = batch.tokens.gather(1, batch.read - distance)
    assert torch.equal(at, batch.x[..., 0]) and torch.equal(batch.tokens.gather(1, batch.read - distance + 1), batch.y)
