"""Markov chains: what is drawn, the Bayes predictor against exact integrals, and a model trained by the command."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import digamma, gammaln
from torch import Tensor
from torch.nn.functional import one_hot

import models
from analyses import train as command
from hooks.errors import BadArgument
from interp import cli, estimators, evaluate, seeds, tasks
from interp.estimators.chains import contexts, entropy, with_switch
from interp.tasks import Batch

MANY = 3000


def draw(n: int = MANY, seed: int = 0, **config: Any) -> tuple[Any, Batch]:
    task = tasks.build("markov", **config)
    return task, task.sample(n, seeds.generator("evaluate", seed))


def near(values: Tensor, expected: float = 0.0) -> bool:
    """Whether the mean of independent values is ``expected`` within 4 standard errors; a constant has to be equal."""
    values = values.double()
    return abs(float(values.mean()) - expected) <= 4 * float(values.std()) / math.sqrt(len(values)) + 1e-12


def marginal(symbols: list[int], order: int, n_symbols: int, beta: float) -> float:
    """log ∫ p(symbols | table) dDirichlet(table): every row's integral is a ratio of gamma functions."""
    counts: dict[tuple[int, ...], list[int]] = {}
    for i in range(order, len(symbols)):
        counts.setdefault(tuple(symbols[i - order : i]), [0] * n_symbols)[symbols[i]] += 1
    total = -min(len(symbols), order) * math.log(n_symbols)
    for row in counts.values():
        total += gammaln(n_symbols * beta) - gammaln(n_symbols * beta + sum(row))
        total += sum(gammaln(beta + n) - gammaln(beta) for n in row)
    return float(total)


def posterior(past: list[int], order: int, n_symbols: int, beta: float) -> list[float]:
    """p(next | past), from the probabilities of the whole sequences; only what follows the last switch counts."""
    while n_symbols in past:
        past = past[past.index(n_symbols) + 1 :]
    whole = marginal(past, order, n_symbols, beta)
    return [math.exp(marginal([*past, j], order, n_symbols, beta) - whole) for j in range(n_symbols)]


@pytest.mark.definition
@pytest.mark.parametrize(
    ("order", "n_symbols", "beta", "switch"),
    [(1, 2, 1.0, 0.0), (1, 3, 0.3, 0.15), (2, 2, 2.5, 0.1), (3, 2, 1.0, 0.0)],
)
def test_add_beta_is_the_posterior_of_the_dirichlet_integral(
    order: int, n_symbols: int, beta: float, switch: float
) -> None:
    known = {"order": order, "n_symbols": n_symbols, "beta": beta, "switch": switch}
    _, batch = draw(n=5, n_pairs=25, **known)
    found = estimators.build("add_beta", **known)(batch).exp()
    for b in range(5):
        y = batch.y[b].tolist()
        for k in range(25):
            expected = [(1 - switch) * p for p in posterior(y[:k], order, n_symbols, beta)] + [switch]
            np.testing.assert_allclose(found[b, k].numpy(), expected, rtol=1e-5)
    assert switch == 0 or (batch.y == n_symbols).any()


@pytest.mark.definition
def test_add_beta_of_a_beta_is_the_integral_by_quadrature() -> None:
    """After 0 1 0 0 in an order-1 chain: row 0 was left by a 1 and a 0, so ∫ p · p (1 - p) over p (1 - p), β = 1."""
    p = np.linspace(0, 1, 200_001)
    weight = p * (1 - p)
    expected = np.trapezoid(weight * p, p) / np.trapezoid(weight, p)
    y = torch.tensor([[0, 1, 0, 0, 1]])
    found = estimators.build("add_beta")(dataclasses.replace(draw(n=1, n_pairs=5)[1], y=y))
    assert float(found[0, 4, 0].exp()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.law
def test_add_beta_sees_the_context_alone() -> None:
    _, batch = draw(n=20, n_pairs=30, order=2)
    estimator = estimators.build("add_beta", order=2)
    before, y = estimator(batch), batch.y.clone()
    y[:, 14] = 1 - y[:, 14]
    changed = (estimator(dataclasses.replace(batch, y=y)) != before).any(dim=0).any(dim=-1)
    assert not changed[:15].any() and changed[15]
    blind = dataclasses.replace(batch, x=batch.x * 0, targets=batch.targets * 0, tokens=batch.tokens * 0, truth={})
    assert torch.equal(estimator(blind), before)


@pytest.mark.law
def test_a_switch_makes_the_estimator_begin_again() -> None:
    first, second = [0, 1, 1, 0], [1, 1, 0, 1]
    read = estimators.build("add_beta", switch=0.5)

    def predicted(y: list[int]) -> Tensor:
        return read(SimpleNamespace(y=torch.tensor([y])))[0]

    torch.testing.assert_close(predicted([*first, 2, *second])[5:], predicted(second))
    without = predicted([*first, *second])[4:]
    assert not torch.allclose(without, predicted(second))


@pytest.mark.contract
@pytest.mark.parametrize("wrong", [{"order": 0}, {"beta": 0.0}, {"n_symbols": 1}, {"switch": 1.0}])
def test_add_beta_refuses_what_is_no_prior(wrong: dict[str, float]) -> None:
    name, value = next(iter(wrong.items()))
    with pytest.raises(BadArgument, match=f"{name}={value}"):
        estimators.build("add_beta", **wrong)


@pytest.mark.contract
def test_add_beta_refuses_what_are_no_symbols() -> None:
    _, batch = draw(n=2, n_pairs=30, n_symbols=3)
    with pytest.raises(BadArgument, match=r"from 0 to n_symbols=2.*the task's n_symbols"):
        estimators.build("add_beta", n_symbols=2)(dataclasses.replace(batch, y=batch.y.clamp(min=1) + 1))
    linreg = tasks.build("linreg").sample(2, seeds.generator("evaluate", 0))
    with pytest.raises(BadArgument, match="float32"):
        estimators.build("add_beta")(linreg)


@pytest.mark.statistics
@pytest.mark.parametrize("beta", [0.05, 1.0, 4.0])
def test_rows_have_the_moments_of_their_dirichlet(beta: float) -> None:
    _, batch = draw(n_pairs=1, n_symbols=3, beta=beta)
    rows = batch.truth["table"][:, 0]
    torch.testing.assert_close(rows.sum(-1), torch.ones(MANY, 3))
    assert all(near(rows[:, c, j], 1 / 3) for c in range(3) for j in range(3))
    variance = (1 / 3) * (2 / 3) / (3 * beta + 1)
    assert all(near((rows[:, c, 0] - 1 / 3) ** 2, variance) for c in range(3))
    assert near((rows[:, 0, 0] - 1 / 3) * (rows[:, 1, 0] - 1 / 3))
    assert len(torch.unique(rows.reshape(MANY, -1), dim=0)) == MANY


@pytest.mark.statistics
@pytest.mark.parametrize("config", [{"order": 1}, {"order": 3}, {"order": 2, "switch": 0.1}])
def test_every_symbol_comes_from_its_row_and_the_last_ones_too(config: dict[str, Any]) -> None:
    """The released sampler leaves the last ``order`` symbols of every sequence at 0."""
    task, batch = draw(n_pairs=12, **config)
    row, y = task.variables(batch)["row"], batch.y
    for k in range(12):
        symbol = y[:, k] < 2
        drawn = (y[:, k] == 1).float() - row[:, k, 1]
        assert near(drawn[symbol]), k
    last = y[:, -1] == 1
    assert near(last.float(), (1 - task.switch) / 2)
    begins = torch.cat([torch.ones_like(y[:, :1]), (y[:, :-1] == 2).long()], dim=1).bool()
    assert (row[begins] == 0.5).all() and not (row[:, -1] == 0.5).all()


@pytest.mark.definition
def test_the_row_is_the_tables_row_of_the_last_symbols() -> None:
    task, batch = draw(n=4, n_pairs=20, order=2, n_symbols=3, switch=0.15)
    row, table, chain = task.variables(batch)["row"], batch.truth["table"], batch.truth["chain"]
    checked = 0
    for b in range(4):
        y, seen, count = batch.y[b].tolist(), 0, 0
        for k in range(20):
            assert int(chain[b, k]) == count
            if seen >= 2:
                torch.testing.assert_close(row[b, k], table[b, count, 3 * y[k - 2] + y[k - 1]])
                checked += 1
            seen, count = (0, count + 1) if y[k] == 3 else (seen + 1, count)
    assert checked > 20 and int(chain.max()) > 1
    last = task.variables(batch)["table"]
    assert all(torch.equal(last[b], table[b, int(chain[b, -1])]) for b in range(4))


@pytest.mark.statistics
def test_switches_have_their_rate_and_new_tables() -> None:
    task, batch = draw(n_pairs=40, switch=0.1)
    switches = (batch.y == 2).float()
    assert near(switches.mean(dim=1), 0.1)
    assert near(switches[:, 0], 0.1) and near(switches[:, -1], 0.1)
    table = batch.truth["table"]
    assert not (table[:, 0] == table[:, 1]).any()
    counts = task.variables(batch)["counts"]
    after = switches[:, :-1].bool()
    assert not counts[:, 1:][after].any() and counts[:, 1:][~after].any()
    assert not (draw(n_pairs=40)[1].y == 2).any()


@pytest.mark.definition
def test_counts_are_what_has_followed_each_context() -> None:
    task, batch = draw(n=3, n_pairs=15, order=2)
    counts = task.variables(batch)["counts"]
    for b in range(3):
        y = batch.y[b].tolist()
        for k in range(15):
            expected = torch.zeros(4, 2)
            for i in range(2, k):
                expected[2 * y[i - 2] + y[i - 1], y[i]] += 1
            assert torch.equal(counts[b, k], expected)


@pytest.mark.statistics
@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_the_entropy_floor_has_its_closed_form(beta: float) -> None:
    """E H(Dirichlet(β, … β)) = ψ(Sβ + 1) - ψ(β + 1); at k = 1 the context does not yet depend on the table."""
    task, batch = draw(n_pairs=2, n_symbols=3, beta=beta)
    floor = task.baselines(batch)["entropy"]
    assert near(floor[:, 1], float(digamma(3 * beta + 1) - digamma(beta + 1)))
    torch.testing.assert_close(floor[:, 0], torch.full((MANY,), math.log(3)))


@pytest.mark.statistics
@pytest.mark.parametrize("switch", [0.0, 0.05])
def test_the_floor_is_the_loss_of_knowing_the_table_and_no_rival_is_below(switch: float) -> None:
    task, batch = draw(n_pairs=60, switch=switch)
    row = task.variables(batch)["row"] * (1 - switch)
    known = torch.cat([row, torch.full_like(row[..., :1], switch)], dim=-1).log()
    loss, rivals = task.loss(known, batch), task.baselines(batch)
    assert near((loss - rivals["entropy"]).mean(dim=1))
    gap = (rivals["bayes"] - loss).mean(dim=1)
    assert float(gap.mean()) > 4 * float(gap.std()) / math.sqrt(MANY)
    for other in (0.3, 3.0):
        estimated = task.loss(estimators.build("add_beta", beta=other, switch=switch)(batch), batch)
        excess = (estimated - rivals["bayes"]).mean(dim=1)
        assert float(excess.mean()) > 4 * float(excess.std()) / math.sqrt(MANY), other
    symbol = batch.y < 2
    torch.testing.assert_close(rivals["uniform"][symbol], torch.full((int(symbol.sum()),), -math.log((1 - switch) / 2)))
    torch.testing.assert_close(rivals["bayes"][:, 0], rivals["uniform"][:, 0])


@pytest.mark.definition
def test_entropies() -> None:
    assert float(entropy(torch.tensor([0.5, 0.5, 0.0]))) == pytest.approx(math.log(2))
    mixed = torch.tensor([0.9 * 0.25, 0.9 * 0.75, 0.1])
    told = with_switch(entropy(torch.tensor([[0.25, 0.75]])), 0.1)
    torch.testing.assert_close(told[0], entropy(mixed))
    assert float(with_switch(torch.tensor(0.3), 0.0)) == pytest.approx(0.3)


@pytest.mark.law
@pytest.mark.parametrize("switch", [0.0, 0.2])
def test_a_symbol_is_in_no_token_before_it_is_asked(switch: float) -> None:
    """Token k + 1 is target k and token 0 is the start: the last target is nowhere."""
    _, batch = draw(n=50, n_pairs=30, switch=switch)
    assert (batch.tokens[:, 0] == 2).all()
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert torch.equal(batch.read, torch.arange(30))
    assert torch.equal(batch.kinds, (batch.tokens == 2).long())


@pytest.mark.planted
def test_a_model_that_counts_has_the_loss_of_the_bayes_predictor() -> None:
    """Counting by products of one-hot tokens, reset by nothing: order 1 without switches."""

    def count(tokens: Tensor) -> Tensor:
        hot = one_hot(tokens, 3).double()
        followed = hot[:, :-1, :, None] * hot[:, 1:, None, :]
        table = torch.cat([torch.zeros_like(followed[:, :1]), followed.cumsum(dim=1)], dim=1)
        seen = torch.einsum("blc,blcj->blj", hot, table)
        seen[:, 0] = 0
        out = (seen + 1).log()
        out[..., 2] = -1e3
        return out.float()

    task, batch = draw(n=200, n_pairs=64)
    found = evaluate.errors(count, task, batch=batch)
    torch.testing.assert_close(found, task.baselines(batch)["bayes"], rtol=1e-4, atol=1e-5)
    other = evaluate.errors(count, task, batch=draw(n=200, n_pairs=64, seed=1)[1])
    assert not torch.allclose(other, found)


@pytest.mark.planted
def test_a_model_that_knows_a_nearly_certain_chain_is_nearly_always_right() -> None:
    task, batch = draw(n=200, n_pairs=64, beta=0.001)
    row = task.variables(batch)["row"].clamp(min=1e-30)
    loss = task.loss(torch.cat([row, row[..., :1] * 0 + 1e-30], dim=-1).log(), batch)
    assert float(loss[:, 1:].mean()) < 0.02 and float(loss[:, 0].mean()) == pytest.approx(math.log(2))


@pytest.mark.definition
def test_contexts_are_numbers_in_base_s() -> None:
    context, whole = contexts(torch.tensor([[2, 1, 0, 3, 1, 2, 2]]), 3, 2)
    assert context.tolist() == [[0, 0, 7, 3, 0, 0, 5]]
    assert whole.tolist() == [[False, False, True, True, False, False, True]]


@pytest.mark.end_to_end
def test_the_command_trains_it_and_the_summary_is_in_nats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "--task", "markov", "--task-config", "n_pairs=32", "--model", "mamba", "--steps", "30", "--batch-size", "16",
        "--model-config", "d_model=8", "n_layers=1", "d_state=4", "--learning-rates", "0.02", "--threads", "1",
        "--curriculum", "0", "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    assert cli.main(command, argv) == 0  # type: ignore[arg-type]
    assert "bayes" in capsys.readouterr().out
    model = models.load(tmp_path / "run")
    assert (model.cfg.head, model.cfg.d_out, model.card["task"]) == ("lm", 3, "markov")
    task = tasks.build(model.card["task"], **model.card["task_config"])
    summary = evaluate.summary(model, task)
    assert list(summary) == list(task.report_ks) == [2, 8, 31]
    measured = model.card["measured"]
    for k, cell in summary.items():
        assert cell["error"] == pytest.approx(measured["model"][f"k={k}"]["error"], rel=1e-4)
    assert "loss" not in measured["model"]["k=8"], "the loss is what is reported"
    # It has begun to learn that the start token does not come again: log 3 before, log 2 after.
    assert measured["bayes"]["mean"]["error"] < measured["model"]["mean"]["error"] < math.log(3) - 0.1
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"error_k8", "bayes_k8"} <= set(row)
