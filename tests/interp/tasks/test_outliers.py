"""The task ``outliers``: what its prompts are made of, and what its rivals can know."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from interp import evaluate, seeds, tasks
from interp.tasks import Batch
from interp.training import fit
from interp.training.recipe import TrainConfig
from tests.interp import tiny

pytestmark = pytest.mark.statistics

MANY = 2000


def draw(n: int = MANY, seed: int = 0, **config: Any) -> Batch:
    return tasks.build("outliers", **config).sample(n, seeds.generator("evaluate", seed))


def near(share: Tensor, expected: float) -> bool:
    """Whether the mean of independent 0/1 values is ``expected`` within 4 standard errors."""
    return abs(float(share.float().mean()) - expected) <= 4 * math.sqrt(expected * (1 - expected) / share.numel())


@pytest.mark.definition
@pytest.mark.parametrize("pattern_seed", [0, 5, None])
def test_the_patterns_are_orthogonal_and_drawn_once(pattern_seed: int | None) -> None:
    task: Any = tasks.build("outliers", pattern_seed=pattern_seed, v_norm=1.5)
    rows = torch.cat([task.mu, task.nu, task.v_star])
    norms = torch.tensor([9.0] * 16 + [2.25] * 3)
    torch.testing.assert_close(rows @ rows.T, norms.diag(), rtol=1e-5, atol=1e-5)
    again: Any = tasks.build("outliers", pattern_seed=pattern_seed, v_norm=1.5, alpha=0.5)
    assert torch.equal(again.mu, task.mu)
    assert torch.equal(task.mu, 3 * torch.eye(30)[:6]) == (pattern_seed is None)


@pytest.mark.definition
def test_an_input_is_its_pattern_and_little_else() -> None:
    task: Any = tasks.build("outliers")
    batch = draw()
    along = {name: batch.x @ rows.T for name, rows in (("mu", task.mu), ("nu", task.nu), ("v", task.v_star))}
    truth = batch.truth
    # In the patterns' own coordinates: β² on μ_j, κ β² on ν_k, κ_a β² on v*_s of the contaminated ones, 0 elsewhere.
    hot = nn.functional.one_hot
    torch.testing.assert_close(along["mu"], 9.0 * hot(truth["pattern"], 6), rtol=0, atol=1e-4)
    expected = 9 * truth["kappa"][..., None] * hot(truth["irrelevant"], 10)
    torch.testing.assert_close(along["nu"], expected, rtol=0, atol=1e-4)
    expected = 18.0 * truth["outlier"][..., None] * hot(truth["kind"].clamp(min=0), 3)
    torch.testing.assert_close(along["v"], expected, rtol=0, atol=1e-4)
    length = batch.x.pow(2).sum(-1)
    torch.testing.assert_close(length, 9 + 9 * truth["kappa"] ** 2 + 36 * truth["outlier"], rtol=1e-4, atol=1e-3)


def test_the_distribution_is_the_papers() -> None:
    batch, truth = draw(), draw().truth
    a, b = truth["pair"].unbind(1)
    assert not (a == b).any() and len(torch.unique(truth["pair"], dim=0)) == 30
    for j in range(6):
        assert near(a == j, 1 / 6) and near(b == j, 1 / 6)
    positive = truth["pattern"] == a[:, None]
    assert torch.equal(positive | (truth["pattern"] == b[:, None]), torch.ones_like(positive))
    assert near(positive, 0.5) and torch.equal(batch.targets, torch.where(positive, 1.0, -1.0))
    context = truth["outlier"][:, :-1]
    assert near(context, 0.6) and not truth["outlier"][:, -1].any()
    # Independently: the number in a prompt is binomial, of variance l p (1 − p).
    spread = context.float().sum(1).var()
    assert abs(float(spread) / (20 * 0.24) - 1) < 4 * math.sqrt(2 / MANY)
    right = batch.y == batch.targets
    assert right[~truth["outlier"]].all() and near(right[truth["outlier"]], 0.5)
    for s in range(3):
        assert near(truth["kind"][truth["outlier"]] == s, 1 / 3)
    kappa = truth["kappa"]
    assert float(kappa.abs().max()) <= 0.5 and abs(float(kappa.mean())) < 4 * math.sqrt(1 / 12 / kappa.numel())
    assert near(kappa.abs() < 0.25, 0.5)
    for k in range(10):
        assert near(truth["irrelevant"] == k, 0.1)


@pytest.mark.definition
@pytest.mark.parametrize("alpha", [0.0, 0.03, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("placement", ["random", "far", "close"])
def test_alpha_is_an_exact_share_of_the_context(alpha: float, placement: str) -> None:
    outlier = draw(50, alpha=alpha, placement=placement).truth["outlier"]
    count = round(alpha * 20)
    assert (outlier.sum(1) == count).all() and not outlier[:, -1].any()
    first = torch.arange(21) < count
    last = (torch.arange(21) >= 20 - count) & (torch.arange(21) < 20)
    if placement == "random":
        assert len(torch.unique(outlier, dim=0)) > (1 if 0 < count < 20 else 0)
    else:
        assert torch.equal(outlier, (first if placement == "far" else last).expand_as(outlier))


@pytest.mark.law
def test_test_tasks_share_their_clean_prompts_and_nest_their_outliers() -> None:
    half, most = draw(50, alpha=0.5), draw(50, alpha=0.8, rule="flip", outside=True, kappa_test=3.0)
    assert torch.equal(half.truth["clean"], most.truth["clean"]) and torch.equal(half.targets, most.targets)
    assert (most.truth["outlier"] | ~half.truth["outlier"]).all()
    assert torch.equal(half.truth["clean"], draw(50).truth["clean"])
    assert not torch.equal(draw(50, k_test=2.0).truth["clean"], half.truth["clean"])


@pytest.mark.parametrize("rule", ["coin", "flip", "one", "keep"])
def test_outliers_are_labelled_by_the_rule(rule: str) -> None:
    batch = draw(1000, alpha=0.5, rule=rule)
    outlier = batch.truth["outlier"]
    agrees, label = (batch.y * batch.targets)[outlier] > 0, batch.y[outlier]
    assert torch.equal(batch.y[~outlier], batch.targets[~outlier])
    if rule == "one":
        assert (label == 1).all() and near(agrees, 0.5)
    elif rule == "coin":
        assert near(label > 0, 0.5) and near(agrees, 0.5)
    else:
        assert bool(agrees.all()) == (rule == "keep") and bool(agrees.any()) == (rule == "keep")


@pytest.mark.definition
def test_test_outliers_are_the_papers_combinations() -> None:
    task: Any = tasks.build("outliers", outside=True)
    lambdas = task.directions @ task.v_star.T / 9
    expected = torch.tensor([[0.7, 0.6, -0.4], [0.4, 0.7, -0.6], [-0.7, 0.5, 0.5]])
    torch.testing.assert_close(lambdas, expected)
    torch.testing.assert_close(lambdas.sum(1), torch.tensor([0.9, 0.5, 0.3]))
    given: Any = tasks.build("outliers", outside=[[-1, 0, 0], [0, 2.0, 0]])
    torch.testing.assert_close(given.directions, torch.stack([-task.v_star[0], 2 * task.v_star[1]]))
    kinds = draw(300, outside=[[-1, 0, 0], [0, 2.0, 0]]).truth["kind"]
    assert set(kinds.unique().tolist()) == {-1, 0, 1}
    # A component aside: of its own length, in no pattern's direction, another for each example.
    task = tasks.build("outliers", alpha=1.0, orthogonal=0.5)
    batch = task.sample(30, seeds.generator("evaluate", 0))
    added = (batch.x - batch.truth["clean"])[:, :-1]
    patterns = torch.cat([task.mu, task.nu])
    torch.testing.assert_close(added @ patterns.T, torch.zeros(30, 20, 16), rtol=0, atol=1e-4)
    torch.testing.assert_close(added.norm(dim=-1), torch.full((30, 20), 2 * 3 * math.sqrt(1.25)))
    aside = added - added @ task.v_star.T @ task.v_star / 9
    torch.testing.assert_close(aside.norm(dim=-1), torch.full((30, 20), 3.0))
    assert torch.linalg.matrix_rank(aside[0]) == 11


@pytest.mark.definition
def test_corrupt_turns_the_task_round() -> None:
    for rule, turned in (("coin", False), ("one", False), ("flip", True), ("keep", True)):
        task = tasks.build("outliers", alpha=0.5, rule=rule)
        batch = task.sample(20, seeds.generator("evaluate", 0))
        other = task.corrupt(batch, seeds.generator("corrupt", 0))
        outlier = batch.truth["outlier"]
        assert torch.equal(other.truth["pair"], batch.truth["pair"].flip(1))
        assert torch.equal(other.targets, -batch.targets) and torch.equal(other.y[~outlier], -batch.y[~outlier])
        assert torch.equal(other.y[outlier], (-1 if turned else 1) * batch.y[outlier])
        back = task.corrupt(other, seeds.generator("corrupt", 1))
        assert torch.equal(back.tokens, batch.tokens)


@pytest.mark.definition
def test_loss_and_error_by_hand() -> None:
    task = tasks.build("outliers", n_pairs=5)
    batch = task.sample(1, seeds.generator("evaluate", 0))
    batch = dataclasses.replace(batch, targets=torch.tensor([[1.0, 1.0, -1.0, -1.0, 1.0]]))
    margin = torch.tensor([[2.0, 0.25, -0.5, 3.0, 0.0]])
    torch.testing.assert_close(task.loss(margin, batch), torch.tensor([[0.0, 0.75, 0.5, 4.0, 1.0]]))
    torch.testing.assert_close(task.error(margin, batch), torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.5]]))


@pytest.mark.definition
def test_every_query_is_the_clean_twin_of_its_example() -> None:
    task: Any = tasks.build("outliers", alpha=1.0, rule="flip")
    batch = task.sample(8, seeds.generator("evaluate", 0))

    def read_query(tokens: Tensor) -> Tensor:
        """Knows the task: μ_a against μ_b in the last token, which must be clean, of label 0."""
        assert not tokens[:, -1, -1].any()
        assert float((tokens[:, -1, :-1] @ task.v_star.T).abs().max()) < 1e-4
        mu = task.mu[batch.truth["pair"]]
        margin = torch.einsum("bi,bi->b", mu[:, 0] - mu[:, 1], tokens[:, -1, :-1]) / 9
        return margin[:, None, None].expand(*tokens.shape[:2], 1)

    torch.testing.assert_close(task.predict(read_query, batch), batch.targets, rtol=1e-4, atol=1e-4)


def test_the_rivals_know_what_they_should() -> None:
    def at_the_query(**config: Any) -> dict[str, Tensor]:
        task = tasks.build("outliers", **config)
        return {name: e[:, -1] for name, e in task.baselines(task.sample(MANY, seeds.generator("evaluate", 0))).items()}

    clean = at_the_query(alpha=0.0)
    # Without outliers a vote errs only where nobody has the query's pattern, 2⁻²⁰, and then by ½.
    assert all(float(clean[name].mean()) < 1e-3 for name in ("vote", "clean_vote", "clean_both", "knn"))
    assert (clean["chance"] == 0.5).all()
    flipped = at_the_query(alpha=0.8, rule="flip")
    assert float(flipped["vote"].mean()) > 0.9 and not flipped["clean_both"].any()
    # 4 clean examples: none has the pattern with probability 2⁻⁴, and the vote is then a coin.
    assert near(flipped["clean_vote"] > 0, 2**-4) and set(flipped["clean_vote"].tolist()) == {0.0, 0.5}
    one = at_the_query(alpha=0.95, rule="coin")
    assert near(one["clean_vote"] > 0, 0.5) and not one["clean_both"].any()
    every = at_the_query(alpha=1.0, rule="flip")
    assert (every["clean_vote"] == 0.5).all() and (every["clean_both"] == 0.5).all()
    # Half of the labels wrong: a vote is right as often as wrong, by symmetry.
    half = at_the_query(alpha=0.5, rule="flip")["vote"]
    assert abs(float(half.mean()) - 0.5) < 4 * float(half.std()) / math.sqrt(MANY)


@pytest.mark.definition
def test_variables_are_what_they_say() -> None:
    task: Any = tasks.build("outliers", n_pairs=6)
    batch = task.sample(40, seeds.generator("evaluate", 0))
    found = task.variables(batch)
    torch.testing.assert_close(
        torch.einsum("bi,bki->bk", found["direction"], batch.truth["clean"]).sign(), batch.targets
    )
    clean = (~batch.truth["outlier"]).float()
    for k in range(6):
        terms = (batch.y[..., None] * batch.x)[:, :k]
        torch.testing.assert_close(found["Xty"][:, k], terms.sum(1))
        torch.testing.assert_close(found["Xty_clean"][:, k], (terms * clean[:, :k, None]).sum(1))
        torch.testing.assert_close(found["n_clean"][:, k], clean[:, :k].sum(1))


# --- measured and trained at the query only ---------------------------------------------------


class Sure(nn.Module):
    """The same margin for every prompt; counts its forwards."""

    def __init__(self, margin: float = 1.0) -> None:
        super().__init__()
        self.margin = nn.Parameter(torch.tensor(margin))
        self.calls = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        return self.margin.expand(*tokens.shape[:2], 1)


@pytest.mark.law
@pytest.mark.parametrize("name", ["outliers", "linreg"])
def test_the_last_example_alone_takes_one_forward(name: str) -> None:
    task = tasks.build(name, **({"tokens": "joint"} if name == "linreg" else {}))
    model = Sure()
    alone = evaluate.errors(model, task, n=40, query_only=True)
    assert model.calls == 1 and alone.shape == (40, 1)
    every = evaluate.errors(model, task, n=40)
    assert every.shape == (40, task.n_pairs) and torch.equal(every[:, -1:], alone)
    if task.query_only:
        model.calls = 0
        found = evaluate.summary(model, task, n=40)
        assert model.calls == 1 and list(found) == [20]
        assert found[20]["error"] == pytest.approx(float(alone.mean()))


def test_a_perfect_model_still_has_its_hinge_beside_its_error(tmp_path: Path) -> None:
    """Both are 0 then, and only the definition tells them apart."""
    task = tasks.build("outliers", alpha=0.0)
    run = fit.Run(Sure, task, TrainConfig(task="outliers", model="sure"), tmp_path, Accelerator(cpu=True))
    right = evaluate.prompts(task, 256, 0, "validation").targets[:, -1:, None]

    class Perfect(Sure):
        def forward(self, tokens: Tensor) -> Tensor:
            return (2 * right).expand(*tokens.shape[:2], 1)

    found = fit.validation(run)(Perfect())
    assert not found.error.any() and not found.loss.any() and not found.alike
    assert fit.validation(dataclasses.replace(run, task=tasks.build("linreg")))(Sure()).alike


def test_training_chooses_by_the_hinge_and_reports_the_error(tmp_path: Path) -> None:
    task = tasks.build("outliers", d=5, M1=2, M2=1, V=1, n_pairs=4)
    config = TrainConfig(
        task="outliers", task_config=task.config, model="tiny", steps=6, batch_size=8, learning_rates=(1e-3, 1e-2, 0.1),
        search_steps=3, save_every=6, eval_every=3,
    )  # fmt: skip
    seen: list[fit.Measured] = []

    class Tiny(tiny.Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.read_in = nn.Linear(6, 8)

    measuring = fit.validation

    def noted(run: Any) -> Any:
        measure = measuring(run)

        def measured(model: nn.Module) -> fit.Measured:
            seen.append(measure(model))
            return seen[-1]

        return measured

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("interp.training.train.validation", noted)
        done = tiny.go(tmp_path, config, task=task, build=Tiny)
    chosen = [cell["validation_error"] for cell in done.card["learning_rates"]]
    assert chosen == [pytest.approx(float(found.loss.mean())) for found in seen]
    assert all(found.ks == (3,) and not found.alike and found.loss.shape == (256, 1) for found in seen)
    measured = done.card["measured"]
    assert set(measured["model"]) == {"k=3", "mean"} and measured["model"]["k=3"] == measured["model"]["mean"]
    assert set(measured["model"]["k=3"]) == {"error", "standard_error", "loss"}
    assert set(measured["vote"]["k=3"]) == {"error", "standard_error"}
    assert 0 < measured["model"]["k=3"]["error"] <= 1 and measured["chance"]["k=3"]["error"] == 0.5
    row = tiny.metrics(tmp_path)[-1]
    assert row["error_k3"] == row["error_mean"] and row["validation_loss"] > 0
    assert "OLS" not in fit._postfix(row) and "loss" in fit._postfix(row)
    assert "vote" in done.summary() and "ols" not in done.summary()
