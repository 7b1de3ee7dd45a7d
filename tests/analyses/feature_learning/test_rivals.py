"""The rivals of single-index regression: tuned on other prompts, against scikit-learn and closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge

from analyses.feature_learning.rivals import FAMILIES, grouped, kernel_ridge, posterior, windows
from interp import evaluate, tasks
from interp.tasks import Batch


def sample(n: int = 48, purpose: str = "evaluate", **config: Any) -> tuple[Any, Batch]:
    task = tasks.build("single_index", **{"d": 4, "r": 2, "n_pairs": 17, **config})
    return task, evaluate.prompts(task, n, 0, purpose)


@pytest.mark.law
@pytest.mark.parametrize("n_pairs", [1, 2, 5, 17, 65, 200])
def test_windows_hold_every_k_once_in_order(n_pairs: int) -> None:
    groups = windows(n_pairs)
    assert [k for group in groups for k in group] == list(range(n_pairs))
    error = torch.randn(3, n_pairs)
    means = torch.stack([error[:, list(group)].double().mean(1) for group in groups], 1)
    torch.testing.assert_close(grouped(error, groups), means)


@pytest.mark.definition
@pytest.mark.parametrize("family", FAMILIES)
def test_the_chosen_setting_is_scikit_learns_kernel_ridge(family: str) -> None:
    task, judge = sample()
    tune = evaluate.prompts(task, 32, 0, "validation")
    found = kernel_ridge(task, tune, judge, family)
    k, prompt = 12, 5
    at = next(i for i, group in enumerate(windows(17)) if k in group)
    kind, *parts = found.settings[at].replace(" degree", ",degree").split(",")
    said = dict(part.split() for part in parts if part.strip())
    width, alpha = float(said["bandwidth"]), float(said["alpha"])
    project = {
        None: torch.eye(4),
        "subspace": judge.truth["subspace"][prompt],
        "beta": judge.truth["beta"][prompt][None],
    }
    x = (judge.x[prompt] @ project[FAMILIES[family][0]].T).double().numpy()
    options: dict[str, Any] = {"kernel": "rbf", "gamma": 1 / (2 * width**2)}
    if kind == "polynomial":
        options = {"kernel": "poly", "gamma": 1 / width**2, "coef0": 1, "degree": int(said["degree"])}
    fitted = KernelRidge(alpha=alpha, **options).fit(x[:k], judge.y[prompt, :k].double().numpy())
    expected = (float(fitted.predict(x[k : k + 1])[0]) - float(judge.targets[prompt, k])) ** 2 / task.scale
    assert float(found.error[prompt, k]) == pytest.approx(expected, rel=2e-2, abs=1e-5)


@pytest.mark.law
def test_the_judging_prompts_choose_nothing() -> None:
    task, judge = sample()
    tune = evaluate.prompts(task, 32, 0, "validation")
    whole, part = (kernel_ridge(task, tune, each, "kernel ridge, RBF") for each in (judge, judge.take(slice(0, 9))))
    assert whole.settings == part.settings
    torch.testing.assert_close(whole.error[:9], part.error)
    other = kernel_ridge(task, judge, judge, "kernel ridge, RBF")
    assert other.error.mean() <= whole.error.mean() + 1e-6 and other.settings != whole.settings


@pytest.mark.statistics
@pytest.mark.slow
def test_what_is_told_more_errs_less() -> None:
    task, judge = sample(192, n_pairs=33, d=8)
    tune = evaluate.prompts(task, 96, 0, "validation")
    told = [kernel_ridge(task, tune, judge, name).error for name in list(FAMILIES)[1:]] + [posterior(task, judge)]
    late = [float(error[:, -8:].mean()) for error in told]
    assert late == sorted(late, reverse=True) and late[-1] < 0.01


@pytest.mark.definition
def test_before_the_first_pair_the_posterior_is_the_mean_over_directions() -> None:
    """Of He_2 in a plane: E over angles of ⟨b, s⟩² is |s|² / 2. From the first pair on it is Bayes' rule, by sums."""
    task, batch = sample(link="he2", tau=0.3)
    found = posterior(task, batch)
    s = (batch.x @ batch.truth["subspace"][0].T).double().numpy()
    first = ((s[:, 0] ** 2).sum(1) / 2 - 1) / 2**0.5
    np.testing.assert_allclose(found[:, 0], (first - batch.targets[:, 0].numpy()) ** 2, rtol=1e-4, atol=1e-5)
    angle = np.linspace(0, 2 * np.pi, 5000, endpoint=False)
    every = np.stack([np.cos(angle), np.sin(angle)])
    for prompt in range(3):
        g = ((s[prompt] @ every) ** 2 - 1) / 2**0.5
        weight = np.exp(-((batch.y[prompt, :3, None].numpy() - g[:3]) ** 2).sum(0) / (2 * 0.3**2))
        guess = (weight * g[3]).sum() / weight.sum()
        assert float(found[prompt, 3]) == pytest.approx(
            (guess - float(batch.targets[prompt, 3])) ** 2, rel=1e-3, abs=1e-5
        )


@pytest.mark.statistics
def test_draws_serve_where_the_subspace_is_no_plane() -> None:
    task, batch = sample(64, r=3, n_pairs=25, tau=0.1, link="identity")
    late = float(posterior(task, batch)[:, -6:].mean())
    assert late < 0.05 * float(task.error(torch.zeros_like(batch.targets), batch).mean())
