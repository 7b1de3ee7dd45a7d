"""Early stop, mixed tasks and default learning rates: what they do, and that without them nothing changes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hooks.errors import BadArgument
from interp import seeds, tasks
from interp.training import fit, recipe, resume
from interp.training.recipe import TrainConfig
from tests.interp.tiny import CONFIG, SEARCH, TASK, Tiny, go, kill_at_call, killed, metrics, same, steps_of, weights

pytestmark = [pytest.mark.contract, pytest.mark.usefixtures("quick_disk")]


# --- early stop -------------------------------------------------------------------------------


LEVELS = [9.0, 5.0, 6.0, 5.5, 4.0, 7.0, 4.0, 8.0, 3.0]
"""Validation losses of a run; the best so far are the 1st, 2nd, 5th and 9th."""
WAITING = dataclasses.replace(CONFIG, steps=27, curriculum=0.0, warmup=0.0)


@pytest.fixture
def levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluation after step 3 i has the loss ``LEVELS[i - 1]``, whatever the model, in a resumed run too."""
    original = fit.validation

    def planted(run: fit.Run) -> Any:
        measure = original(run)

        def found(model: Tiny) -> fit.Measured:
            measured = measure(model)
            level = LEVELS[int(model.calls) // 3 - 1]
            return dataclasses.replace(measured, loss=torch.full_like(measured.loss, level))

        return found

    monkeypatch.setattr(fit, "validation", planted)


@pytest.mark.parametrize(("patience", "steps"), [(0, 27), (1, 9), (2, 12), (3, 24), (4, 27)])
@pytest.mark.usefixtures("levels")
def test_it_stops_after_so_many_evaluations_without_a_lower_loss(patience: int, steps: int, tmp_path: Path) -> None:
    """By hand from ``LEVELS``: two in a row without a record end with the 4th evaluation, three with the 8th."""
    done = go(tmp_path, dataclasses.replace(WAITING, patience=patience))
    assert done.card["steps"] == steps
    assert [row["step"] for row in metrics(tmp_path)] == list(range(3, steps + 1, 3))
    assert done.card["recipe"].get("patience", 0) == patience
    assert go(tmp_path, dataclasses.replace(WAITING, patience=patience)).already


@pytest.mark.usefixtures("levels")
def test_what_is_trained_until_the_stop_is_what_would_have_been_trained(tmp_path: Path) -> None:
    def body() -> None:
        kill_at_call(fit, "training_batch", 10, before=True)
        go(tmp_path / "long", dataclasses.replace(WAITING, save_every=3))

    killed(body)
    state = resume.read(tmp_path / "long" / "resume" / "state.safetensors")
    assert state.progress["step"] == 9
    go(tmp_path / "short", dataclasses.replace(WAITING, patience=1))
    found = weights(tmp_path / "short")
    assert same(found, {name: state.tensors[f"model/{name}"] for name in found})


@pytest.mark.usefixtures("levels")
def test_evaluations_before_the_end_of_the_curriculum_do_not_count(tmp_path: Path) -> None:
    """From step 14.85 on the losses are 4, 7, 4, 8, 3: two without a record end at step 21 instead of 12."""
    late = dataclasses.replace(WAITING, patience=2, curriculum=0.55)
    assert go(tmp_path / "curriculum", late).card["steps"] == 21
    warm = dataclasses.replace(WAITING, patience=2, warmup=0.55)
    assert go(tmp_path / "warmup", warm).card["steps"] == 21


KILLS = {
    "between two evaluations": (fit, "training_batch", 11, True),
    "at the last evaluation, not yet saved": (resume, "keep", 3, True),
    "after the last checkpoint": (resume, "keep", 3, False),
}


@pytest.mark.parametrize("moment", KILLS)
@pytest.mark.usefixtures("levels")
def test_a_resumed_run_stops_at_the_same_step(moment: str, tmp_path: Path) -> None:
    config = dataclasses.replace(WAITING, patience=2)
    owner, name, call, before = KILLS[moment]

    def body() -> None:
        kill_at_call(owner, name, call, before=before)
        go(tmp_path / "broken", config)

    assert killed(body) == -signal.SIGKILL
    again = steps_of(lambda: go(tmp_path / "broken", config))
    assert again == ([] if moment == "after the last checkpoint" else [8, 9, 10, 11])
    whole = go(tmp_path / "whole", config)
    assert whole.card["steps"] == go(tmp_path / "broken", config).card["steps"] == 12
    assert same(weights(tmp_path / "broken"), weights(tmp_path / "whole"))
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")


def test_a_search_is_not_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []
    original = fit.fit

    def noted(run: fit.Run, peak: float, steps: int, name: str, **options: Any) -> Any:
        asked.append((name, options.get("patience", 0)))
        return original(run, peak, steps, name, **options)

    monkeypatch.setattr("interp.training.train.fit", noted)
    go(tmp_path, dataclasses.replace(SEARCH, patience=7))
    assert asked == [("search-0", 0), ("search-1", 0), ("search-2", 0), ("state", 7)]


# --- mixed tasks ------------------------------------------------------------------------------


SKEWED = {"task_config": {"d": 2, "n_pairs": 5, "covariance": "skewed"}}
SPARSE = {"task": "sparse_linreg", "task_config": {"d": 2, "n_pairs": 5, "sparsity": 1}}
MIXED = dataclasses.replace(CONFIG, mix=(SKEWED, SPARSE))


def sampled(config: TrainConfig, out: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[Tensor]]:
    """Which task each step took, and its tokens."""
    which: list[int] = []
    tokens: list[Tensor] = []
    original = fit.training_batch

    def noted(*args: Any) -> Any:
        batch, generator, index = original(*args)
        which.append(index)
        tokens.append(batch.tokens)
        return batch, generator, index

    with monkeypatch.context() as patch:
        patch.setattr(fit, "training_batch", noted)
        go(out, config)
    return which, tokens


def test_every_step_is_of_one_of_the_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    which, tokens = sampled(dataclasses.replace(MIXED, curriculum=0.0), tmp_path / "mixed", monkeypatch)
    assert set(which) == {0, 1, 2}
    family = [
        TASK,
        tasks.build("linreg", **SKEWED["task_config"]),
        tasks.build("sparse_linreg", **SPARSE["task_config"]),
    ]  # type: ignore[arg-type]
    for step, (index, found) in enumerate(zip(which, tokens, strict=True)):
        expected = family[index].sample(8, seeds.generator("train", 0, step, 0))
        assert torch.equal(found, expected.tokens), step
    card = go(tmp_path / "mixed", dataclasses.replace(MIXED, curriculum=0.0)).card
    assert card["recipe"]["mix"] == [{"task": "linreg", **SKEWED}, SPARSE]
    assert card["task_config"] == TASK.config  # what is measured is the recipe's own task


@pytest.mark.statistics
def test_the_tasks_have_equal_chances() -> None:
    """500 steps: each share within 4 standard errors of 1/3."""
    run = fit.Run(Tiny, TASK, dataclasses.replace(MIXED, batch_size=1), Path(), Accelerator(cpu=True), mix=(TASK, TASK))
    counts = torch.zeros(3)
    for step in range(500):
        counts[fit.training_batch(run, step, 500)[2]] += 1
    error = (1 / 3 * 2 / 3 / 500) ** 0.5
    assert ((counts / 500 - 1 / 3).abs() < 4 * error).all()


def test_a_mixed_run_that_was_killed_ends_in_the_same_weights(tmp_path: Path) -> None:
    def body() -> None:
        kill_at_call(fit, "training_batch", 7, before=True)
        go(tmp_path / "broken", MIXED)

    assert killed(body) == -signal.SIGKILL
    for name in ("broken", "whole"):
        go(tmp_path / name, MIXED)
    assert same(weights(tmp_path / "broken"), weights(tmp_path / "whole"))


def test_no_task_counts_more_by_the_scale_of_its_labels() -> None:
    """Zero predicts with a loss of E[y²], so in the first task's unit every task's is the first's E[y²]."""
    wide = tasks.build("sparse_linreg", d=2, n_pairs=5, sparsity=1)
    zero = nn.Linear(2, 1)
    nn.init.zeros_(zero.weight), nn.init.zeros_(zero.bias)
    objective = fit.Objective(zero, (TASK, wide))
    losses = []
    for which, task in enumerate((TASK, wide)):
        generator = torch.Generator().manual_seed(1)
        losses.append(float(objective(task.sample(20_000, generator), generator, which).detach()))
    assert wide.scale == TASK.scale / 2
    torch.testing.assert_close(losses[1], losses[0], rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"task_config": {"d": 3, "n_pairs": 5}}, "another layout"),
        ({"task_config": {"d": 2, "tokens": "joint"}}, "another layout"),
        ({"task": "markov", "task_config": {}}, "another layout"),
        ({"task": "linrge"}, 'did you mean "linreg"'),
        ({"tsak": "linreg"}, 'did you mean "task"'),
        ("linreg", "each entry is {task, task_config}"),
    ],
)
def test_tasks_that_cannot_be_mixed_are_refused(entry: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(BadArgument) as refused:
        go(tmp_path / "run", recipe.from_dict({**CONFIG.as_dict(), "mix": [entry]}))
    assert said in str(refused.value)
    assert not (tmp_path / "run").exists()


# --- default rates, and recipes from before ---------------------------------------------------


@pytest.mark.parametrize("model", [*recipe.RATES, "another"])
def test_the_rates_of_an_architecture_stand_in_where_none_are_given(model: str) -> None:
    chosen = TrainConfig(task="linreg", model=model).learning_rates
    assert chosen == recipe.RATES.get(model, recipe.OTHER_RATES)
    assert len(chosen) >= 3 and list(chosen) == sorted(chosen)
    assert TrainConfig(task="linreg", model=model, learning_rates=(0.5,)).learning_rates == (0.5,)


def test_a_recipe_from_before_is_written_as_before() -> None:
    """The name of a run's folder is a digest of this text: it must not change with every new option."""
    text = json.dumps(CONFIG.as_dict(), sort_keys=True)
    assert "patience" not in text and "mix" not in text
    assert hashlib.sha256(text.encode()).hexdigest()[:8] == "adffc78e"
    later = dataclasses.replace(MIXED, patience=3)
    assert recipe.from_dict(later.as_dict()) == later
    assert recipe.difference(CONFIG, dataclasses.replace(CONFIG, patience=3)) == "patience: asked 0, found 3"
    assert str(recipe.difference(MIXED, CONFIG)).startswith("mix: asked [{")
    assert recipe.difference(CONFIG, CONFIG) is None


def test_a_checkpoint_from_before_is_gone_on_with(unbroken: Path, tmp_path: Path) -> None:
    def body() -> None:
        kill_at_call(fit, "training_batch", 7, before=True)
        go(tmp_path)

    killed(body)
    path = tmp_path / "resume" / "state.safetensors"
    state = resume.read(path)
    old = {name: value for name, value in state.progress.items() if name not in ("best", "stale")}
    assert len(old) == len(state.progress) - 2
    resume.write(path, resume.State(state.tensors, old))
    go(tmp_path)
    assert same(weights(tmp_path), weights(unbroken))
