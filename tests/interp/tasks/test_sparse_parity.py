"""Sparse parity: one subset for each prompt, the Bayes vote, and what a linear rival cannot do."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hooks.errors import BadArgument
from interp import evaluate, seeds, tasks
from interp.tasks import Batch

MANY = 1500


def draw(n: int = MANY, seed: int = 0, **config: Any) -> tuple[Any, Batch]:
    task = tasks.build("sparse_parity", **{"n_pairs": 24, **config})
    return task, task.sample(n, seeds.generator("evaluate", seed))


def near(values: Tensor, expected: float) -> bool:
    """Whether the mean of independent values is ``expected`` within 4 standard errors."""
    values = values.double()
    return abs(float(values.mean()) - expected) <= 4 * float(values.std()) / math.sqrt(len(values))


@pytest.mark.definition
def test_the_label_is_the_product_of_the_hidden_coordinates() -> None:
    _, batch = draw(n=20, d=6, k=3)
    assert set(batch.x.unique().tolist()) == {-1.0, 1.0}
    for b in range(20):
        hidden = batch.truth["hidden"][b].nonzero()[:, 0].tolist()
        assert len(hidden) == 3
        for k in range(24):
            assert float(batch.y[b, k]) == math.prod(float(batch.x[b, k, i]) for i in hidden)


@pytest.mark.statistics
def test_every_prompt_draws_its_own_subset_and_all_are_as_likely() -> None:
    """The released sampler draws one for a whole batch."""
    _, batch = draw(d=5, k=2, n_pairs=1)
    index = (batch.truth["hidden"] * 2 ** torch.arange(5)).sum(dim=1)
    subsets = [2**i + 2**j for i, j in itertools.combinations(range(5), 2)]
    assert all(near((index == subset).float(), 1 / 10) for subset in subsets)
    assert near((index[::2] == index[1::2]).float(), 1 / 10)
    assert near(batch.y[:, 0], 0.0) and near(batch.x[:, 0, 0], 0.0)


@pytest.mark.law
def test_fewer_active_coordinates_hold_the_hidden_ones() -> None:
    task = tasks.build("sparse_parity", n_pairs=8)
    batch = task.sample(300, seeds.generator("train", 0), d_active=4)
    hidden = batch.truth["hidden"]
    assert not batch.x[..., 4:].any() and not hidden[:, 4:].any()
    assert (hidden.sum(dim=1) == 2).all() and hidden[:, :4].any(dim=0).all()
    assert set(batch.y.unique().tolist()) == {-1.0, 1.0}
    one = task.sample(5, seeds.generator("train", 0), d_active=1)
    assert torch.equal(one.y, one.x[..., 0])
    with pytest.raises(BadArgument, match="d_active of at least 3"):
        task.corrupt(one, seeds.generator("corrupt", 0))


@pytest.mark.law
def test_the_queries_label_is_in_no_token_before_it_is_asked() -> None:
    """Another subset turns labels: tokens change at the y tokens alone, and the last label has none."""
    task, batch = draw(n=200)
    other = task.corrupt(batch, seeds.generator("corrupt", 0))
    assert torch.equal(other.tokens[:, 0::2], batch.tokens[:, 0::2])
    assert torch.equal(other.tokens[:, 1::2] != batch.tokens[:, 1::2], _first(other.y != batch.y)[:, :-1])
    assert (other.y[:, -1] != batch.y[:, -1]).any() and batch.tokens.shape[1] == 2 * 24 - 1
    assert torch.equal(batch.tokens[:, 1::2, 0], batch.y[:, :-1]) and not batch.tokens[:, 1::2, 1:].any()
    turned = (other.y != batch.y).float().mean(dim=1)
    assert near(turned, 0.5)


def _first(changed: Tensor) -> Tensor:
    """A token of a label has it in its first coordinate."""
    return torch.nn.functional.pad(changed[..., None], (0, 9))


def consistent(x: Tensor, y: Tensor, k: int) -> Tensor:
    """The margins of the vote over all subsets that fit, prompt by prompt and in plain loops."""
    n, n_pairs, d = x.shape
    out = torch.zeros(n, n_pairs)
    for b in range(n):
        rows, labels = x[b].tolist(), y[b].tolist()
        for at in range(n_pairs):
            for subset in itertools.combinations(range(d), k):
                if all(math.prod(rows[i][c] for c in subset) == labels[i] for i in range(at)):
                    out[b, at] += math.prod(rows[at][c] for c in subset)
    return out


@pytest.mark.definition
def test_bayes_is_the_vote_of_the_subsets_that_fit() -> None:
    task, batch = draw(n=12, d=6, k=2, n_pairs=10)
    expected = task.error(consistent(batch.x, batch.y, 2), batch)
    torch.testing.assert_close(task.baselines(batch)["bayes"], expected)
    assert (expected == 0.5).any() and (expected == 0).any()


@pytest.mark.statistics
def test_the_rivals_are_where_they_have_to_be() -> None:
    """Nothing is known before an example, all after 24; a product of two has no linear part, one coordinate is one."""
    task, batch = draw()
    rivals = task.baselines(batch)
    assert (rivals["chance"] == 0.5).all()
    assert near(rivals["bayes"][:, 0], 0.5) and float(rivals["bayes"][:, -1].mean()) < 0.001
    assert near(rivals["ols"][:, 20], 0.5)
    single, easy = draw(k=1)
    assert float(single.baselines(easy)["ols"][:, 20].mean()) == 0
    wide, many = draw(n=2, d=30, k=6, n_pairs=3)
    assert "bayes" not in wide.baselines(many) and "ols" in wide.baselines(many)


@pytest.mark.planted
def test_a_model_that_tries_every_subset_has_the_bayes_error_and_one_that_is_told_has_none() -> None:
    task, batch = draw(n=12, d=5, n_pairs=8)

    def search(tokens: Tensor) -> Tensor:
        x, y = tokens[:, 0::2], torch.nn.functional.pad(tokens[:, 1::2, 0], (0, 1))
        out = tokens.new_zeros(*tokens.shape[:2], 1)
        out[:, 0::2, 0] = consistent(x, y, 2)
        return out

    found = evaluate.errors(search, task, batch=batch)
    torch.testing.assert_close(found, task.baselines(batch)["bayes"])
    told = torch.where(batch.truth["hidden"][:, None], batch.x, 1.0).prod(dim=-1)
    assert not task.error(3 * told, batch).any() and (task.error(-told, batch) == 1).all()
    assert not task.loss(told, batch).any() and (task.loss(-told, batch) == 2).all()
