"""The search over learning rates: fair, kept when killed, and honest about what blew up."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hooks.errors import BadArgument, RunFailed
from interp.training import ahead, fit, train
from interp.training.train import compared
from tests.interp.tiny import (
    SEARCH,
    go,
    kill_at_call,
    killed,
    metrics,
    same,
    steps_of,
    weights,
)

pytestmark = [pytest.mark.contract, pytest.mark.usefixtures("quick_disk")]


def test_the_search_takes_the_best_rate_on_validation_prompts(tmp_path: Path) -> None:
    card = go(tmp_path / "searched", SEARCH).card
    tried = card["learning_rates"]
    assert [cell["lr"] for cell in tried] == list(SEARCH.learning_rates)
    best = min(tried, key=lambda cell: cell["validation_error"])["lr"]
    assert card["learning_rate"] == best
    assert [cell["lr"] for cell in tried if "behind" not in cell] == [best]
    for cell in tried:
        if "behind" in cell:
            low, high = cell["behind"]
            assert low <= cell["validation_error"] - min(one["validation_error"] for one in tried) <= high
    go(tmp_path / "alone", dataclasses.replace(SEARCH, learning_rates=(best,)))
    assert same(weights(tmp_path / "searched"), weights(tmp_path / "alone"))


def test_every_candidate_sees_the_same_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    original = fit.training_batch

    def noted(*args: Any) -> Any:
        batch = original(*args)
        seen.append(batch[0].tokens)
        return batch

    monkeypatch.setattr(fit, "training_batch", noted)
    go(tmp_path, SEARCH)
    assert len(seen) == 3 * 6 + 18
    for i in range(6):
        torch.testing.assert_close(seen[i], seen[6 + i], rtol=0, atol=0)
        torch.testing.assert_close(seen[i], seen[12 + i], rtol=0, atol=0)
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("step", [2, 11, 20])
def test_a_killed_search_goes_on(tmp_path: Path, step: int) -> None:
    def body() -> None:
        kill_at_call(fit, "training_batch", step, before=True)
        go(tmp_path / "broken", SEARCH)

    assert killed(body) == -signal.SIGKILL
    finished = (step - 1) // 6
    search = tmp_path / "broken" / "resume" / "search.json"
    assert (len(json.loads(search.read_text())["done"]) if search.exists() else 0) == finished
    saved = (step - 1) % 6 // 4 * 4 if finished < 3 else 0
    steps = steps_of(lambda: go(tmp_path / "broken", SEARCH))
    assert len(steps) == 3 * 6 + 18 - finished * 6 - saved
    broken = go(tmp_path / "broken", SEARCH)
    whole = go(tmp_path / "whole", SEARCH)
    assert broken.card["learning_rates"] == whole.card["learning_rates"]
    assert same(weights(tmp_path / "broken"), weights(tmp_path / "whole"))
    assert [row["step"] for row in metrics(tmp_path / "broken")] == [3, 6, 9, 12, 15, 18]


def test_a_search_of_before_there_were_checksums_is_refused_in_words(tmp_path: Path) -> None:
    whole = go(tmp_path / "whole", SEARCH).card
    file = tmp_path / "older" / "resume" / "search.json"
    file.parent.mkdir(parents=True)
    kept = [{key: cell[key] for key in ("lr", "validation_error")} for cell in whole["learning_rates"]]
    file.write_text(json.dumps(kept))
    with pytest.raises(BadArgument, match=r"an earlier version wrote it.*delete it to search again"):
        go(tmp_path / "older", SEARCH)
    file.unlink()
    assert go(tmp_path / "older", SEARCH).card["learning_rates"] == whole["learning_rates"]


def test_a_rate_that_blows_up_is_listed_as_null_and_lost(tmp_path: Path) -> None:
    config = dataclasses.replace(SEARCH, learning_rates=(1e-2, 1e-3, 1e38), weight_decay=1.0)
    card = go(tmp_path, config).card
    assert card["learning_rates"][2] == {"lr": 1e38, "validation_error": None}
    assert card["learning_rate"] < 1
    hopeless = dataclasses.replace(SEARCH, learning_rates=(1e36, 1e37, 1e38), weight_decay=1.0)
    with pytest.raises(RunFailed, match="much lower --learning-rates"):
        go(tmp_path / "hopeless", hopeless)


def test_rates_that_chance_tells_apart_are_said(tmp_path: Path) -> None:
    """Planted: one candidate a little better for every prompt, one better on average only, by what prompts differ."""
    rng = np.random.default_rng(0)
    losses = 1 + rng.random(256)
    tried = [
        {"lr": rate, "validation_error": float(values.mean()), "losses": values.tolist()}
        for rate, values in ((0.1, losses), (0.2, losses + 0.01), (0.4, rng.permutation(losses) + 0.001))
    ]
    chosen, worse, by_chance = compared([*tried, {"lr": 0.8, "validation_error": None, "losses": None}], 0.1)[:3]
    assert "behind" not in chosen
    assert worse["behind"] == pytest.approx([0.01, 0.01])
    assert by_chance["behind"][0] < 0 < by_chance["behind"][1]

    done = go(tmp_path, SEARCH)
    card = {**done.card, "learning_rate": 0.1, "learning_rates": [chosen, worse, by_chance]}
    said = [line for line in dataclasses.replace(done, card=card).summary().splitlines() if line.startswith("note:")]
    assert len(said) == 1 and "could not tell 0.4 from 0.1: after 6 steps" in said[0]
    card["learning_rates"] = [chosen, worse]
    assert "note:" not in dataclasses.replace(done, card=card).summary()


@pytest.mark.parametrize(("steps", "each"), [(120, 40), (19, 6), (3, 1), (2, 0)])
def test_a_search_is_never_longer_than_its_training(steps: int, each: int, tmp_path: Path) -> None:
    """Three rates of a thousand steps each are asked for; the middle one is taken where there is no room to try."""
    config = dataclasses.replace(SEARCH, steps=steps, search_steps=1000, eval_every=1000, save_every=1000)
    assert config.search_each == each and dataclasses.replace(config, learning_rates=(1e-2,)).search_each == 0
    if steps > 19:
        return
    said: list[str] = []
    taken = steps_of(lambda: go(tmp_path, config))
    assert len(taken) == 3 * each + steps
    done = go(tmp_path, config, say=said.append)
    assert said == [], "finished already: nothing is to be told"
    assert len(done.card["learning_rates"]) == (3 if each else 1)
    (note,) = [line for line in done.summary().splitlines() if line.startswith("note: search") or "no search" in line]
    assert (f"{each} steps each (not 1000" in note) if each else (done.card["learning_rate"] == 1e-2)


def test_what_it_will_take_is_told_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that is one second later each time it is read, a step takes 1 s and an evaluation 1 s: 36 steps, and
    2 evaluations for each candidate and 6 for the run, are 48 s.
    """
    said: list[str] = []
    order: list[str] = []
    monkeypatch.setattr(ahead, "time", SimpleNamespace(perf_counter=map(float, range(100)).__next__))
    original = train.fit

    def noted(*args: Any, **options: Any) -> Any:
        order.append(options["label"])
        return original(*args, **options)

    monkeypatch.setattr(train, "fit", noted)

    def say(text: str) -> None:
        order.append("said")
        said.append(text)

    whole = go(tmp_path / "told", SEARCH, say=say)
    assert said == [
        "search: 3 learning rates, 6 steps each; then training: 18 steps at the best; about 48 s at most (1 s a step)"
    ]
    assert order[:4] == ["said", "search 1 of 3, rate 0.001", "search 2 of 3, rate 0.01", "search 3 of 3, rate 0.1"]
    assert order[4] == f"training, rate {whole.card['learning_rate']:g}"
    go(tmp_path / "untold", SEARCH)
    assert same(weights(tmp_path / "told"), weights(tmp_path / "untold")), "the rehearsal changes nothing"


def test_a_damaged_search_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "resume").mkdir()
    (tmp_path / "resume" / "search.json").write_text("[{")
    with pytest.raises(BadArgument, match="delete it to search again"):
        go(tmp_path, SEARCH)
