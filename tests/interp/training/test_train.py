"""Training that is finished, killed, resumed, refused and interrupted, on a tiny model."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from hooks.errors import BadArgument, RunFailed
from interp import tasks
from interp.training import fit, recipe, resume
from tests.interp.tiny import (
    CONFIG,
    TASK,
    Tiny,
    go,
    kill_at_call,
    killed,
    metrics,
    same,
    started,
    steps_of,
    weights,
)

pytestmark = [pytest.mark.contract, pytest.mark.usefixtures("quick_disk")]


# --- a finished run ---------------------------------------------------------------------------


def test_a_finished_folder_holds_weights_card_recipe_and_metrics(unbroken: Path) -> None:
    assert sorted(os.listdir(unbroken)) == ["metrics.jsonl", "model.safetensors", "recipe.json"]
    card = go(unbroken).card
    assert recipe.read(unbroken / "recipe.json") == CONFIG
    assert recipe.from_dict(card["recipe"]) == CONFIG
    assert card["parameters"] == sum(p.numel() for p in Tiny().parameters())
    assert (card["task"], card["model"], card["steps"]) == ("linreg", "tiny", 12)
    assert tasks.build(card["task"], **card["task_config"]).config == TASK.config
    assert card["measured"]["n"] == 1280
    assert set(card["measured"]["model"]) == {"k=2", "k=4", "mean"}
    assert card["threads"] == 1
    assert {"python", "torch", "numpy", "mambascope"} == set(card["versions"])
    assert str(unbroken) not in json.dumps(card)
    assert [row["step"] for row in metrics(unbroken)] == [3, 6, 9, 12]


def test_what_is_measured_is_the_error_on_prompts_that_were_never_trained_on(
    unbroken: Path,
) -> None:
    card = go(unbroken).card
    model = Tiny()
    model.load_state_dict(weights(unbroken))
    model.eval()
    batch = TASK.sample(1280, fit.seeds.generator("evaluate", 0))
    with torch.no_grad():
        error = ((model(batch.tokens)[:, ::2, 0] - batch.targets) ** 2).double() / 2
    found = card["measured"]["model"]["k=4"]
    torch.testing.assert_close(found["error"], float(error[:, 4].mean()), rtol=1e-5, atol=0)
    expected = float(error[:, 4].std()) / math.sqrt(1280)
    torch.testing.assert_close(found["standard_error"], expected, rtol=1e-5, atol=0)
    # By hand: 4 noiseless pairs determine 2 weights, and zero has error E[y²]/d = 1.
    assert card["measured"]["ols"]["k=4"]["error"] < 1e-6
    zero = card["measured"]["zero"]["k=4"]
    assert abs(zero["error"] - 1) < 4 * zero["standard_error"]


class Biased(Tiny):
    """Starts by predicting about 3 everywhere: error (9 + E[y²]) / d = 5.5 until it learns."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.constant_(self.read_out.bias, 3.0)


def test_training_learns(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=60, learning_rates=(0.1,), eval_every=30)
    done = go(tmp_path, config, build=Biased)
    assert done.card["measured"]["model"]["mean"]["error"] < 1.2
    first, last = metrics(tmp_path)
    assert first["loss"] > 1.5 * last["loss"]


def test_the_same_command_on_a_finished_folder_does_nothing(unbroken: Path) -> None:
    before = (unbroken / "model.safetensors").stat().st_mtime_ns

    def never() -> nn.Module:
        raise AssertionError("the model was built again")

    done = go(unbroken, build=never)
    assert done.already
    assert "finished already" in done.summary()
    assert (unbroken / "model.safetensors").stat().st_mtime_ns == before
    assert json.loads(done.to_json())["card"] == done.card


def test_two_seeds_differ_and_one_seed_repeats(unbroken: Path, tmp_path: Path) -> None:
    torch.manual_seed(1234)  # the global generator is neither read nor moved
    before = torch.get_rng_state()
    go(tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), before)
    go(tmp_path / "other", dataclasses.replace(CONFIG, seed=1))
    assert same(weights(unbroken), weights(tmp_path / "again"))
    assert metrics(unbroken) == metrics(tmp_path / "again")
    assert not same(weights(unbroken), weights(tmp_path / "other"))


# --- killed -----------------------------------------------------------------------------------


KILLS = {
    "before the first checkpoint": (fit, "training_batch", 2, True),
    "in the middle between two checkpoints": (fit, "training_batch", 7, True),
    "metrics written, checkpoint not": (resume.Metrics, "append", 4, False),
    "bytes written, not yet renamed": (resume.os, "replace", 5, True),
    "renamed": (resume.os, "replace", 5, False),
    "after the last step": (fit.evaluate, "predictions", 5, True),
    "model written, resume not yet removed": (shutil, "rmtree", 1, True),
}


@pytest.mark.parametrize("moment", KILLS)
def test_killed_at_any_moment_it_ends_in_the_same_weights(unbroken: Path, tmp_path: Path, moment: str) -> None:
    owner, name, call, before = KILLS[moment]

    def body() -> None:
        kill_at_call(owner, name, call, before=before)
        go(tmp_path)

    assert killed(body) == -signal.SIGKILL
    done = go(tmp_path)
    assert done.already == (moment == "model written, resume not yet removed")
    assert same(weights(tmp_path), weights(unbroken))
    assert metrics(tmp_path) == metrics(unbroken)
    assert done.card["measured"] == go(unbroken).card["measured"]
    left = [name for name in os.listdir(tmp_path) if not name.startswith(".")]
    assert sorted(left) == sorted(os.listdir(unbroken))


def test_a_resumed_run_really_goes_on_and_does_not_start_over(tmp_path: Path) -> None:
    path = started(tmp_path, call=11)
    assert resume.read(path).progress["step"] == 8
    assert steps_of(lambda: go(tmp_path)) == [8, 9, 10, 11]


def test_without_the_random_state_the_weights_would_differ(unbroken: Path, tmp_path: Path) -> None:
    """The check on the checks above: dropout makes the generator matter, and they would see it."""
    path = started(tmp_path)
    state = resume.read(path)
    state.tensors["rng"] = torch.Generator().manual_seed(5).get_state()[None]
    resume.write(path, state)
    go(tmp_path)
    assert not same(weights(tmp_path), weights(unbroken))


def test_nothing_is_pickled(tmp_path: Path) -> None:
    path = started(tmp_path)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*"))
    assert files == ["metrics.jsonl", "recipe.json", "resume/state.safetensors"]
    names = {name.split("/")[0] for name in safetensors.torch.load_file(path)}
    assert names == {"model", "optimizer", "rng"}


# --- refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("steps", 13, "steps: asked 13, found 12"),
        ("learning_rates", (2e-2,), r"learning_rates: asked \[0.02\], found \[0.01\]"),
        ("seed", 3, "seed: asked 3, found 0"),
        ("model_config", {"d": 1}, "model_config"),
    ],
)
def test_another_recipe_in_the_same_folder_is_refused(unbroken: Path, field: str, value: Any, said: str) -> None:
    with pytest.raises(BadArgument, match=said) as refused:
        go(unbroken, dataclasses.replace(CONFIG, **{field: value}))
    assert "\n" not in str(refused.value)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(bytes(data))


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _foreign(path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(2)}, path)


@pytest.mark.parametrize("harm", [_cut, _flip, _empty, _foreign])
def test_a_damaged_resume_file_is_refused_with_what_to_do(
    unbroken: Path, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    path = started(tmp_path)
    harm(path)
    with pytest.raises(BadArgument, match="delete that file to train from step 0") as refused:
        go(tmp_path)
    assert "\n" not in str(refused.value)
    path.unlink()
    go(tmp_path)
    assert same(weights(tmp_path), weights(unbroken))


def test_a_resume_file_of_another_model_is_refused(tmp_path: Path) -> None:
    class Wider(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Linear(2, 2)

    started(tmp_path)
    with pytest.raises(BadArgument, match="of another model") as refused:
        go(tmp_path, build=Wider)
    assert "\n" not in str(refused.value)


def test_a_second_training_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "resume").mkdir()
    with (
        resume.only_one(tmp_path / "resume"),
        pytest.raises(BadArgument, match="another training is running"),
    ):
        go(tmp_path)
    go(tmp_path)


def test_an_unwritable_folder_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadArgument, match="another folder with --out"):
        go(tmp_path / "file" / "run")


def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match=r'"tpu".*cpu'):
        go(tmp_path, device="tpu")


def test_a_model_that_does_not_fit_the_task_leaves_no_folder(tmp_path: Path) -> None:
    class OtherWidth(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.read_out = nn.Linear(8, 2)

    with pytest.raises(BadArgument, match="d_out=1"):
        go(tmp_path / "run", build=OtherWidth)
    assert not (tmp_path / "run").exists()


# --- failed -----------------------------------------------------------------------------------


class Exploding(Tiny):
    """Its loss overflows at the ninth training step."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (math.inf if self.training and self.calls >= 9 else 1.0)


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"at step 8 of 12 .*lower --learning-rates") as failed:
        go(tmp_path, build=Exploding)
    assert "\n" not in str(failed.value)
    assert not (tmp_path / "model.safetensors").exists()
    state = resume.read(tmp_path / "resume" / "state.safetensors")
    assert state.progress["step"] == 8
    assert all(bool(torch.isfinite(t.float()).all()) for t in state.tensors.values())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, signals: None
) -> None:
    original = fit.training_batch

    def interrupting(run: Any, step: int, steps: int) -> Any:
        if step == 6:
            signal.raise_signal(number)
        return original(run, step, steps)

    before = signal.getsignal(number)
    monkeypatch.setattr(fit, "training_batch", interrupting)
    with pytest.raises(RunFailed, match=r"after step 7 of 12 .*the same command") as stopped:
        go(tmp_path)
    assert signal.Signals(number).name in str(stopped.value)
    assert signal.getsignal(number) is before
    assert resume.read(tmp_path / "resume" / "state.safetensors").progress["step"] == 7
    monkeypatch.undo()
    go(tmp_path)
    assert same(weights(tmp_path), weights(unbroken))
    assert metrics(tmp_path) == metrics(unbroken)


def test_a_second_ctrl_c_interrupts_at_once(unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = fit.training_batch

    def impatient(run: Any, step: int, steps: int) -> Any:
        if step == 6:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return original(run, step, steps)

    monkeypatch.setattr(fit, "training_batch", impatient)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path)
    monkeypatch.undo()
    go(tmp_path)
    assert same(weights(tmp_path), weights(unbroken))


def test_a_full_disk_fails_and_the_run_goes_on_later(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 7:  # recipe.json, metrics.jsonl and the first checkpoint take two each
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFailed, match=r"No space left on device; .*same command again"):
        go(tmp_path)
    assert sorted(os.listdir(tmp_path / "resume")) == ["lock", "state.safetensors"]
    assert resume.read(tmp_path / "resume" / "state.safetensors").progress["step"] == 4
    go(tmp_path)
    assert same(weights(tmp_path), weights(unbroken))
