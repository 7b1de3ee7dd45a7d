"""The lens: its identity, its forks, its floor in closed form, the fit, and the words for a profile."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import models
from hooks.errors import BadArgument
from interp import lens, seeds, tasks

D = 3


def small(architecture: str = "mamba", **config: Any) -> models.Stack:
    torch.manual_seed(0)
    return models.build(architecture, d_model=8, n_layers=2, d_in=D, d_out=1, **config).eval()


def prompts(n: int = 6, n_pairs: int = 9, name: str = "linreg", **config: Any) -> tuple[tasks.Task, tasks.Batch]:
    task = tasks.build(name, **{"d": D, "n_pairs": n_pairs, **config})
    return task, task.sample(n, seeds.generator("probe", 0))


def by_hand(model: nn.Module, batch: tasks.Batch, k: int, example: int) -> Tensor:
    """Context and one query as a prompt of its own."""
    prompt = torch.cat([lens.context_tokens(batch, k), lens.query_tokens(batch)[:, [example]]], dim=1)
    with torch.no_grad():
        return model(prompt)[:, -1, 0]


@pytest.mark.law
@pytest.mark.parametrize("k", [0, 1, 5])
@pytest.mark.parametrize("tokens", ["interleaved", "joint"])
@pytest.mark.parametrize("architecture", ["mamba", "s4d", "transformer"])
def test_a_fork_is_a_prompt_of_its_own(architecture: str, tokens: str, k: int) -> None:
    _, batch = prompts(tokens=tokens)
    width = D if tokens == "interleaved" else D + 1
    torch.manual_seed(0)
    model = models.build(architecture, d_model=8, n_layers=2, d_in=width, d_out=1).eval()
    found = lens.forks(model, batch, k, chunk=8)
    assert found.decoded.shape == (3, 6, 9 - k) and found.residual.shape == (3, 6, 9 - k, 8)
    for example in (k, 8):
        expected = by_hand(model, batch, k, example)
        torch.testing.assert_close(found.decoded[-1, :, example - k], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.asked.targets, batch.targets[:, k:])
    assert not torch.allclose(found.decoded[0], found.decoded[-1], atol=1e-2), "blocks do change the answer"


@pytest.mark.law
@pytest.mark.parametrize(("name", "tokens"), [("linreg", "interleaved"), ("linreg", "joint"), ("outliers", None)])
@pytest.mark.parametrize("architecture", ["mamba", "transformer"])
def test_along_ends_in_the_predictions_of_the_task(architecture: str, name: str, tokens: str | None) -> None:
    options = {"tokens": tokens} if tokens else {"d": 8, "M1": 2, "M2": 2, "V": 2}
    task, batch = prompts(name=name, **options)
    torch.manual_seed(0)
    model = models.build(architecture, d_model=8, n_layers=2, d_in=task.d_token, d_out=1).eval()
    decoded = lens.decode(model, lens.along(model, batch, chunk=4))
    with torch.no_grad():
        torch.testing.assert_close(decoded[-1], task.predict(model, batch), rtol=1e-4, atol=1e-5)
    assert decoded.shape == (3, 6, 9)


@pytest.mark.law
def test_queries_do_not_see_each_other_and_contaminated_ones_are_asked_clean() -> None:
    _, batch = prompts()
    model = small()
    before = lens.forks(model, batch, 4).decoded
    changed = batch.tokens.clone()
    changed[:, 9:] += 1  # every token from the first query's label on
    after = lens.forks(model, dataclasses.replace(batch, tokens=changed, x=changed[:, 0::2]), 4).decoded
    assert torch.equal(before[:, :, 0], after[:, :, 0]) and not torch.isclose(before[:, :, 1:], after[:, :, 1:]).any()

    _, batch = prompts(name="outliers", d=8, M1=2, M2=2, V=2, p_a=1.0)
    queries = lens.query_tokens(batch)
    torch.testing.assert_close(queries[..., :-1], batch.truth["clean"])
    assert not queries[..., -1].any() and not torch.allclose(queries[:, 0, :-1], batch.x[:, 0])


@pytest.mark.definition
def test_the_fit_is_least_squares_of_each_prompt_and_a_constant_has_no_scale() -> None:
    rng = torch.Generator().manual_seed(0)
    decoded, labels = torch.randn(2, 4, 12, generator=rng), torch.randn(4, 12, generator=rng)
    decoded[1, 3] = 0.7
    found = lens.affine(decoded, labels, 7)
    for block in range(2):
        for prompt in range(4):
            a, b = found.scale[block, prompt], found.shift[block, prompt]
            if (block, prompt) == (1, 3):
                assert a == 0 and b == pytest.approx(float(labels[3, :7].mean()))
                continue
            expected = np.polyfit(decoded[block, prompt, :7].double(), labels[prompt, :7].double(), 1)
            np.testing.assert_allclose([a, b], expected, rtol=1e-6)
            torch.testing.assert_close(found.corrected[block, prompt], a * decoded[block, prompt, 7:].double() + b)
    with pytest.raises(BadArgument, match="m=5"):
        lens.affine(decoded, labels, 5)
    with pytest.raises(BadArgument, match="m=12"):
        lens.affine(decoded, labels, 12)


@pytest.mark.statistics
@pytest.mark.parametrize("m", [6, 10, 40])
def test_a_feature_that_knows_nothing_has_the_error_of_the_formula(m: int) -> None:
    """At m = 6 the fit's error has a heavy tail, hence the many prompts."""
    rng = torch.Generator().manual_seed(m)
    labels, feature = torch.randn(2, 100_000, m + 4, generator=rng)
    error = (lens.affine(feature[None], labels, m).corrected[0] - labels[:, m:]).square().mean(1)
    assert abs(float(error.mean()) - lens.floor(m)) < 4 * float(error.std()) / len(error) ** 0.5
    assert float(error.std()) / len(error) ** 0.5 < 0.02
    known = (lens.affine(3 * labels[None] - 1, labels, m).corrected[0] - labels[:, m:]).square().mean()
    assert float(known) < 1e-9
    assert lens.floor(10) == pytest.approx(1.257, abs=1e-3)


@pytest.mark.planted
@pytest.mark.parametrize(
    ("levels", "words", "log_words"),
    [
        ([1.0, 0.75, 0.5, 0.25, 0.01], "steady", "neither steady nor stepwise"),
        ([1.0, 0.5, 0.25, 0.125, 0.0625], "neither steady nor stepwise", "steady"),
        ([1.0, 1.0, 1.0, 0.2, 0.2], "stepwise", "stepwise"),
        ([1.0, 1.0, 1.0, 1.0, 1.0], "flat", "flat"),
        ([0.5, 0.6, 0.7, 0.8, 0.9], "rising", "rising"),
        ([1.0, 0.5, 0.1], "too few blocks (2) to say", "too few blocks (2) to say"),
    ],
)
def test_the_words_for_a_profile_are_those_of_its_shape(levels: list[float], words: str, log_words: str) -> None:
    noise = 1 + 0.02 * torch.randn(len(levels), 200, generator=torch.Generator().manual_seed(0))
    found = lens.profile(torch.tensor(levels)[:, None] * noise, n_boot=200)
    assert (found.words, found.log_words) == (words, log_words)
    assert found.share.mean.sum() == pytest.approx(1) and found.factor.mean.sum() == pytest.approx(1)


@pytest.mark.planted
def test_few_prompts_do_not_allow_a_word() -> None:
    """The same even profile, with noise that leaves the shares open."""
    noise = 1 + 0.8 * torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    level = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2])[:, None]
    assert lens.profile(level * noise, n_boot=200).words in ("flat", "neither steady nor stepwise")
    assert lens.profile(level * (1 + (noise - 1) / 100), n_boot=200).words == "steady"


@pytest.mark.definition
def test_an_error_of_zero_has_shares_and_no_logarithm() -> None:
    wrong = (torch.rand(5, 60, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    wrong[4] = 0
    found = lens.profile(wrong, n_boot=100)
    assert found.share.mean.sum() == pytest.approx(1) and np.isnan(found.factor.mean).all()
    assert found.log_words == "an error of 0 has no logarithm"
