"""What one model is asked: errors of all queries at once, targets that are known, states and sums at their places."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import hooks
import models
from analyses.feature_learning.study import BENT, LINEAR, WRITE, Subject, errors, mean_steps, plan, running_sums, study
from analyses.feature_learning.variants import VARIANTS, ablated
from hooks.errors import BadArgument
from interp import evaluate, tasks


def task_of(**config: Any) -> Any:
    return tasks.build("single_index", **{"d": 3, "r": 2, "n_pairs": 9, **config})


def model_of(task: Any, **config: Any) -> Any:
    shape = {"d_model": 8, "n_layers": 2, "d_state": 3, "d_in": task.d_token, "d_out": 1}
    model = models.build("mamba", **{**shape, **config}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.definition
@pytest.mark.parametrize("variant", [None, *VARIANTS])
@pytest.mark.parametrize(
    "config", [{}, {"n_pairs": 1}, pytest.param({"tokens": "interleaved"}, marks=pytest.mark.slow)]
)
def test_all_queries_at_once_are_the_walk_from_query_to_query(variant: str | None, config: dict[str, Any]) -> None:
    task = task_of(**config)
    model, batch = model_of(task, d_conv=3), evaluate.prompts(task, 40)
    means = hooks.record(model, batch.tokens, "*.hook_delta")
    with ablated(model, variant, means):
        found, expected = errors(model, task, batch), evaluate.errors(model, task, batch=batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if variant is not None and task.n_pairs > 1:
        assert not torch.allclose(found, evaluate.errors(model, task, batch=batch), rtol=1e-4, atol=1e-5)


@pytest.mark.definition
def test_the_target_is_what_can_be_found() -> None:
    """Of an even link ββᵀ, and nothing that turns with β's sign."""
    odd, even = plan(task_of(), 32, 8, 0), plan(task_of(link="he2"), 32, 8, 0)
    assert (odd.target, odd.order) == ("β", 1) and (even.target, even.order) == ("ββᵀ", 2)
    assert torch.equal(odd.truth, odd.probed.truth["coordinates"].double())
    c = even.probed.truth["coordinates"].double().numpy()
    expected = np.stack([(2 * c[:, 0] ** 2 - 1) / 2**0.5, (2 * c[:, 1] ** 2 - 1) / 2**0.5, 2 * c[:, 0] * c[:, 1]], 1)
    np.testing.assert_allclose(even.truth, expected, atol=1e-6)


@pytest.mark.planted
@pytest.mark.parametrize(("link", "linear", "bent"), [("identity", 0.8, 0.8), ("he3", None, 0.3), ("he2", 0.5, 0.5)])
def test_running_sums_read_what_their_labels_carry(link: str, linear: float | None, bent: float) -> None:
    """Σ y x has β in its mean for He_1 and not for He_3, where a bend brings it; Σ y He_2(x) has ββᵀ for He_2."""
    asked = plan(task_of(link=link, n_pairs=41), 200, 8, 0)
    found = running_sums(asked)
    last = asked.ks[-1]
    level = float(found[LINEAR, last].score.mean)
    assert level < 0.1 if linear is None else level > linear
    assert float(found[BENT, last].score.mean) > bent


@pytest.mark.definition
def test_states_are_read_after_k_pairs_and_before_the_query() -> None:
    task = task_of()
    model, asked = model_of(task), plan(task_of(), 32, 8, 0)
    found = study(Subject("small", "trained", model), asked, asked.ks, (WRITE,))
    assert set(found.reading) == {(layer, k) for layer in (0, 1) for k in asked.ks}
    assert found.best(asked.ks[-1]) in (0, 1) and found.error.shape == (32, 9)
    from analyses.feature_learning.study import _held

    held = _held(model, asked, asked.ks)
    _, state = model(asked.probed.tokens[:, : asked.ks[1]], return_state=True)
    torch.testing.assert_close(held[1][:, 1], state[1].h, rtol=1e-4, atol=1e-6)


@pytest.mark.contract
def test_the_mean_step_is_of_other_prompts_and_a_model_without_steps_is_refused() -> None:
    asked = plan(task_of(), 32, 8, 0)
    model = model_of(task_of())
    assert mean_steps(model, asked)["blocks.1.mixer.hook_delta"].shape == (64, 9, 16)
    assert not torch.equal(asked.means.x[:32], asked.batch.x) and not torch.equal(asked.probed.x[:32], asked.batch.x)
    transformer = models.build("transformer", d_model=8, n_layers=1, n_heads=2, d_in=4, d_out=1).eval()
    with pytest.raises(BadArgument, match=r"hook_state.*the label transform"):
        study(Subject("t", "trained", transformer), asked, asked.ks, (WRITE,))
