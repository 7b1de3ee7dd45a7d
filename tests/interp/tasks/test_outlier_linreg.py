"""The task ``outlier_linreg``: outliers that say nothing of w, and a loss that leaves them out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from interp import evaluate, seeds, tasks
from interp.tasks import Batch

pytestmark = pytest.mark.statistics


def draw(n: int = 500, seed: int = 0, **config: Any) -> tuple[Any, Batch]:
    task = tasks.build("outlier_linreg", **config)
    return task, task.sample(n, seeds.generator("evaluate", seed))


def cosine_with_w(batch: Batch, vectors: Tensor) -> Tensor:
    return torch.cosine_similarity(vectors, batch.truth["w"][:, None].expand_as(vectors), dim=-1)


@pytest.mark.definition
@pytest.mark.parametrize("tokens", ["interleaved", "joint"])
def test_without_outliers_it_is_linear_regression(tokens: str) -> None:
    task, batch = draw(20, p=0.0, tokens=tokens)
    plain = tasks.build("linreg", n_pairs=task.n_pairs, tokens=tokens)
    expected = plain.sample(20, seeds.generator("evaluate", 0))
    for name in ("tokens", "targets", "x", "y", "read", "kinds"):
        torch.testing.assert_close(getattr(batch, name), getattr(expected, name))
    prediction = torch.randn_like(batch.targets)
    torch.testing.assert_close(task.loss(prediction, batch), plain.loss(prediction, expected))
    torch.testing.assert_close(task.baselines(batch)["clean_ols"], plain.baselines(expected)["ols"])


@pytest.mark.definition
@pytest.mark.parametrize("p", [0.5, 1.0])
def test_outliers_are_orthogonal_to_the_prompts_own_w(p: float) -> None:
    _, batch = draw(p=p)
    outlier = batch.truth["outlier"]
    share = float(outlier[:, :-1].float().mean())
    assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / outlier[:, :-1].numel()) and not outlier[:, -1].any()
    x, vector = batch.tokens[:, 0::2][outlier], batch.tokens[:, 1::2][outlier[:, :-1]]
    for part, kind in ((x, batch.x), (vector, batch.truth["vector_y"])):
        torch.testing.assert_close(part.norm(dim=-1), torch.full((len(part),), math.sqrt(5)))
        assert float(cosine_with_w(batch, kind)[outlier].abs().max()) < 1e-5
    # Two draws, not one: x and its label token are unrelated, and so are the outliers of a prompt.
    pairs = torch.cosine_similarity(x, vector, dim=-1)
    assert abs(float(pairs.mean())) < 4 * math.sqrt(0.5 / len(pairs)) and float(pairs.std()) > 0.6
    span = batch.truth["span"]
    torch.testing.assert_close(span @ span.mT, torch.eye(2).expand(500, 2, 2), rtol=0, atol=1e-5)
    assert all(torch.linalg.matrix_rank(batch.x[i][outlier[i]]) == 2 for i in range(5))


@pytest.mark.definition
def test_a_fresh_w_leaves_outliers_that_are_not_orthogonal() -> None:
    _, batch = draw(orthogonal_to="fresh")
    cosine = cosine_with_w(batch, batch.x)[batch.truth["outlier"]]
    # A direction uniform in R⁵ has E[cos²] = 1/5.
    assert abs(float(cosine.pow(2).mean()) - 0.2) < 0.03


@pytest.mark.definition
def test_one_outlier_for_a_prompt_is_one_pair() -> None:
    _, batch = draw(50, per="prompt")
    for i in range(50):
        assert len(torch.unique(batch.x[i][batch.truth["outlier"][i]], dim=0)) == 1
    _, batch = draw(50)
    assert len(torch.unique(batch.x[0][batch.truth["outlier"][0]], dim=0)) == int(batch.truth["outlier"][0].sum())


@pytest.mark.definition
@pytest.mark.parametrize("tokens", ["interleaved", "joint"])
def test_ones_are_ones_and_the_usual_numbers_are_the_papers(tokens: str) -> None:
    task, batch = draw(300, outlier="ones", d=4, tokens=tokens)
    assert (task.p, task.n_pairs) == (0.9, 101)
    outlier = batch.truth["outlier"]
    assert abs(float(outlier[:, :-1].float().mean()) - 0.9) < 4 * math.sqrt(0.09 / outlier[:, :-1].numel())
    if tokens == "interleaved":
        assert (batch.tokens[:, 0::2][outlier] == 1).all() and (batch.tokens[:, 1::2][outlier[:, :-1]] == 1).all()
    else:
        assert (batch.tokens[outlier] == 1).all()
    usual: Any = tasks.build("outlier_linreg", d=20)
    assert (usual.p, usual.n_pairs) == (0.5, 101)


@pytest.mark.law
def test_the_curriculum_keeps_them_orthogonal_and_inactive_coordinates_zero() -> None:
    task, _ = draw(2)
    for active in (1, 2, 3, 5):
        batch = task.sample(40, seeds.generator("evaluate", 0), d_active=active)
        assert not batch.x[..., active:].any() and not batch.tokens[:, 1::2, max(active, 1) :].any()
        outlier = batch.truth["outlier"]
        assert bool(outlier.any()) == (active >= 3)
        if active >= 3:
            assert float(cosine_with_w(batch, batch.x)[outlier].abs().max()) < 1e-5


@pytest.mark.law
def test_a_larger_p_adds_outliers_to_the_same_prompts() -> None:
    (_, few), (_, many) = draw(30, p=0.2), draw(30, p=0.7)
    assert torch.equal(few.truth["clean_x"], many.truth["clean_x"]) and torch.equal(few.truth["w"], many.truth["w"])
    assert (many.truth["outlier"] | ~few.truth["outlier"]).all()


@pytest.mark.parametrize("tokens", ["interleaved", "joint"])
def test_the_loss_is_that_of_clean_examples(tokens: str) -> None:
    task, batch = draw(4000, p=0.8, d=3, n_pairs=6, tokens=tokens)
    outlier = batch.truth["outlier"]
    assert torch.equal(batch.targets, torch.einsum("bki,bi->bk", batch.truth["clean_x"], batch.truth["w"]))
    zero = task.error(torch.zeros_like(batch.targets), batch)
    assert bool(zero[outlier].any()) == (tokens == "joint")
    for k in range(6):  # E[y²]/d = 1 at every k, whatever share of the examples counts
        assert abs(float(zero[:, k].mean()) - 1) < 4 * float(zero[:, k].std()) / math.sqrt(4000)
    task, batch = draw(100, p=0.8, d=3, n_pairs=6, tokens=tokens, clean_only=False)
    torch.testing.assert_close(task.loss(torch.zeros_like(batch.y), batch), batch.y**2)
    assert not torch.equal(batch.targets, draw(100, p=0.8, d=3, n_pairs=6, tokens=tokens)[1].targets)


def test_the_oracle_solves_it_and_least_squares_does_not() -> None:
    for config in ({}, {"tokens": "joint"}, {"outlier": "ones", "d": 3}):
        task, batch = draw(200, **config)
        errors = {name: float((loss / task.scale)[:, -1].mean()) for name, loss in task.baselines(batch).items()}
        assert errors["clean_ols"] < 1e-2 < errors["zero"]
        assert errors["ols"] > 10 * errors["clean_ols"]


@pytest.mark.definition
def test_corrupt_draws_a_w_that_the_outliers_allow() -> None:
    task, batch = draw(2000)
    other = task.corrupt(batch, seeds.generator("corrupt", 0))
    assert torch.equal(other.x, batch.x)
    assert float(cosine_with_w(other, batch.x)[batch.truth["outlier"]].abs().max()) < 1e-5
    assert abs(float(torch.cosine_similarity(other.truth["w"], batch.truth["w"]).mean())) < 4 / math.sqrt(2000)
    length = other.truth["w"].pow(2).sum(-1)
    assert abs(float(length.mean()) - 5) < 4 * float(length.std()) / math.sqrt(2000)
    assert torch.equal(other.y[batch.truth["outlier"]], batch.y[batch.truth["outlier"]])


@pytest.mark.definition
def test_a_joint_query_asks_the_clean_twin() -> None:
    task, batch = draw(10, tokens="joint", n_pairs=6)

    def solve(tokens: Tensor) -> Tensor:
        answer = torch.einsum("bi,bi->b", tokens[:, -1, :-1], batch.truth["w"])
        assert not tokens[:, -1, -1].any()
        return answer[:, None, None].expand(*tokens.shape[:2], 1)

    torch.testing.assert_close(task.predict(solve, batch), batch.targets)
    alone = evaluate.errors(solve, task, batch=batch, query_only=True)
    torch.testing.assert_close(alone, torch.zeros(10, 1), rtol=0, atol=1e-10)


@pytest.mark.law
@pytest.mark.parametrize("outlier", ["orthogonal", "ones"])
def test_no_label_of_an_interleaved_query_is_in_what_it_is_read_from(outlier: str) -> None:
    """Example k is read at its x, before its label's token, and another w changes the tokens of labels only."""
    task, batch = draw(20, outlier=outlier, p=0.5, n_pairs=8)
    assert torch.equal(batch.read.reshape(-1, 8)[0], torch.arange(0, 16, 2))
    other = task.corrupt(batch, seeds.generator("corrupt", 1))
    changed = (other.tokens != batch.tokens).any(-1)
    assert not changed[:, 0::2].any() and not torch.equal(other.targets, batch.targets)
    clean = ~batch.truth["outlier"][:, :-1]
    assert changed[:, 1::2][clean].all() and not changed[:, 1::2][~clean].any()
