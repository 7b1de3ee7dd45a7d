"""Prompts and their twins: who is exchanged for what, and that nothing else is."""

from __future__ import annotations

import pytest
import torch

from analyses.attribute_outliers.prompts import Prompts, as_many, by_example, draw, shuffled, tokens_of
from hooks.errors import BadArgument
from interp import tasks
from interp.tasks.outliers import Outliers

pytestmark = pytest.mark.law

SMALL = {"d": 8, "n_pairs": 9, "M1": 2, "M2": 2, "V": 3}


def outliers(alpha: float = 0.5, rule: str = "flip", n: int = 16, **changes: object) -> Prompts:
    return draw(tasks.build("outliers", **SMALL), n, 0, "ablate", alpha, rule=rule, **changes)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_groups_part_the_context(alpha: float) -> None:
    prompts = outliers(alpha)
    masks = torch.stack(list(prompts.groups.values()))
    assert torch.equal(masks.sum(0), prompts.context.long())
    assert not prompts.context[:, -1].any() and prompts.context[:, :-1].all()
    assert int(prompts.outlier.sum()) == 16 * round(alpha * 8)
    same = prompts.groups["outlier, same pattern"] | prompts.groups["clean, same pattern"]
    pattern = prompts.batch.truth["pattern"]
    assert torch.equal(same, (pattern == pattern[:, -1:]) & prompts.context)


def test_a_twin_is_the_example_without_its_outlier_and_keeps_its_label() -> None:
    prompts = outliers()
    chosen = prompts.groups["outlier, same pattern"]
    found = prompts.cleaned(chosen).tokens
    assert torch.equal(found[..., -1], prompts.batch.tokens[..., -1])
    assert torch.equal(found[~chosen], prompts.batch.tokens[~chosen])
    assert torch.equal(found[chosen][:, :-1], prompts.batch.truth["clean"][chosen])
    removed = prompts.batch.tokens[chosen][:, :-1] - found[chosen][:, :-1]
    task = prompts.task
    assert isinstance(task, Outliers)
    along = removed @ task.v_star.T / task.v_star.square().sum(1)  # κ_a times one of the three, whatever they ride on
    torch.testing.assert_close(
        along.sort(dim=1).values, torch.tensor([[0.0, 0.0, 2.0]]).expand(len(along), 3), atol=1e-5, rtol=0
    )
    assert (removed @ task.mu.T).abs().max() < 1e-4


def test_contaminated_examples_are_those_of_a_larger_share() -> None:
    prompts = outliers()
    clean = prompts.context & ~prompts.outlier
    everything = outliers(1.0)
    found = prompts.contaminated(clean).tokens
    assert torch.equal(found[..., :-1], everything.batch.tokens[..., :-1])
    assert torch.equal(found[..., -1], prompts.batch.tokens[..., -1])


def test_leaving_out_keeps_the_order_and_the_query() -> None:
    prompts = outliers()
    short = prompts.without(prompts.outlier)
    assert short.tokens.shape[1] == 5 and short.targets.shape == (16, 1)
    for row in range(16):
        assert torch.equal(short.tokens[row], prompts.batch.tokens[row][~prompts.outlier[row]])
    uneven = prompts.outlier.clone()
    uneven[0] = False
    uneven[1, :-1] = True
    short = prompts.without(uneven)
    assert short.tokens.shape[1] == 9 and short.read[:3].tolist() == [[8], [0], [4]]
    for row in range(16):
        kept = prompts.batch.tokens[row][~uneven[row]]
        assert torch.equal(short.tokens[row, : len(kept)], kept) and not short.tokens[row, len(kept) :].any()
        assert short.kinds[row, short.read[row]] == 1  # the query
    with pytest.raises(BadArgument, match="never left out"):
        prompts.without(torch.ones_like(prompts.outlier))


def test_two_tokens_an_example() -> None:
    task = tasks.build("outlier_linreg", d=3, n_pairs=6)
    prompts = draw(task, 12, 0, "ablate", 0.5)
    at = tokens_of(prompts.batch, prompts.outlier)
    assert at.shape == (12, 11) and torch.equal(at[:, 0:10:2], at[:, 1:11:2])
    assert torch.equal(prompts.cleaned(prompts.outlier).tokens, prompts.clean.tokens)
    assert set(prompts.groups) == {"outlier", "clean"}
    values = torch.arange(11.0).expand(12, 11)
    assert torch.equal(by_example(values, 6)[0, -1], torch.tensor([10.0, 0.0]))
    one = torch.zeros_like(prompts.outlier)
    one[:, 2] = True
    short = prompts.without(one).tokens
    assert torch.equal(short, torch.cat([prompts.batch.tokens[:, :4], prompts.batch.tokens[:, 6:]], dim=1))
    sign = torch.sign(prompts.batch.y * (prompts.batch.x * prompts.batch.x[:, -1:]).sum(-1))
    assert torch.equal(prompts.votes(), sign)
    assert not torch.equal(prompts.votes(clean=True), sign)


def test_random_controls_are_as_many_and_shuffled_flags_mean_nothing() -> None:
    prompts = outliers(0.75, n=400)
    clean = prompts.context & ~prompts.outlier
    some = as_many(clean, prompts.outlier, torch.Generator().manual_seed(0))
    assert torch.equal(some, clean)  # only two are clean, six are not
    dealt = shuffled(prompts, torch.Generator().manual_seed(0))
    assert torch.equal(dealt.sum(1), prompts.outlier.sum(1)) and not dealt[:, -1].any()
    both = (dealt & prompts.outlier)[:, :-1].double().mean()
    assert abs(float(both) - 0.75**2) < 0.02
    few = as_many(prompts.outlier, clean, torch.Generator().manual_seed(1))
    assert (few.sum(1) == 2).all() and not (few & ~prompts.outlier).any()


def test_a_task_without_outliers_or_without_twins_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadArgument, match="no share of outliers"):
        draw(tasks.build("linreg", d=2), 4, 0, "ablate", 0.5)
    from interp import evaluate

    right = evaluate.prompts

    def unlike(task: tasks.Task, n: int, seed: int, purpose: str) -> tasks.Batch:
        return right(task, n, seed + int(10 * task.config["alpha"]), purpose)

    monkeypatch.setattr(evaluate, "prompts", unlike)
    with pytest.raises(BadArgument, match="there are no twins"):
        outliers()
