"""Associative recall: keys, values, filler and gaps; what can be known of an answer and what cannot."""

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
