"""Nothing that a training goes on from, or takes for finished, is believed once a bit of it has changed."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from hooks import sealed
from hooks.errors import BadArgument
from interp.training import resume
from interp.training.train import finished
from tests.interp.tiny import CONFIG, SEARCH, go, metrics, same, started, weights

pytestmark = [pytest.mark.contract, pytest.mark.usefixtures("quick_disk")]

MANY = pytest.mark.parametrize("count", [250, pytest.param(4000, marks=pytest.mark.slow)])


def damages(data: bytes, count: int) -> Iterator[bytes]:
    """``data`` with one bit flipped, ``count`` times, and cut, a tenth as often."""
    rng = random.Random(len(data))
    for _ in range(count):
        changed = bytearray(data)
        bit = rng.randrange(8 * len(data))
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)
    for _ in range(count // 10):
        yield data[: rng.randrange(len(data))]


def refusal(run: Callable[[], Any], *named: str) -> str:
    with pytest.raises(BadArgument) as caught:
        run()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600 and all(name in message for name in named), message
    return message


@MANY
def test_a_damaged_resume_file_is_refused(count: int, tmp_path: Path) -> None:
    path = started(tmp_path)
    data = path.read_bytes()
    # Every digit of the header's progress, one of which made a run go on from another step; then anywhere.
    at = data.index(b'"progress"')
    for place in range(at, data.index(b"}", at)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        refusal(lambda: resume.read(path), str(path), "delete that file to train from step 0")
    for damaged in damages(data, count):
        path.write_bytes(damaged)
        refusal(lambda: resume.read(path), str(path), "delete that file to train from step 0")
    path.write_bytes(data)
    assert resume.read(path).progress["step"] == 4


def test_the_metrics_of_a_resumed_run_are_those_that_were_saved(unbroken: Path, tmp_path: Path) -> None:
    """What is in metrics.jsonl is not read back: the lines so far are in the resume file."""
    started(tmp_path)
    for text in ('{"step": 3, "loss": 1e9}\n', "[", "", None):
        file = tmp_path / "run" / "metrics.jsonl"
        shutil.copytree(tmp_path, tmp_path / "run", ignore=shutil.ignore_patterns("run"))
        file.unlink() if text is None else file.write_text(text)
        go(tmp_path / "run")
        assert metrics(tmp_path / "run") == metrics(unbroken) and same(weights(tmp_path / "run"), weights(unbroken))
        shutil.rmtree(tmp_path / "run")


@MANY
@pytest.mark.parametrize("name", ["model.safetensors", "metrics.jsonl", "recipe.json"])
def test_a_damaged_finished_run_is_not_finished(name: str, count: int, unbroken: Path, tmp_path: Path) -> None:
    shutil.copytree(unbroken, tmp_path / "run")
    file = tmp_path / "run" / name
    data = file.read_bytes()
    for damaged in damages(data, count):
        file.write_bytes(damaged)
        refusal(lambda: finished(CONFIG, tmp_path / "run"), name if name != "recipe.json" else "recipe")
    file.write_bytes(data)
    assert finished(CONFIG, tmp_path / "run") is not None
    file.unlink()
    if name == "metrics.jsonl":  # taken away, it misleads nobody
        assert finished(CONFIG, tmp_path / "run") is not None


def test_a_finished_run_of_the_earlier_format_is_taken_with_a_warning(unbroken: Path, tmp_path: Path) -> None:
    shutil.copytree(unbroken, tmp_path / "run")
    file = tmp_path / "run" / "model.safetensors"
    stored = sealed.read(file)
    old = {"format": sealed.EARLIER, "digest": sealed.digest(stored.tensors()), **stored.metadata}
    safetensors.torch.save_file(stored.tensors(), file, old)
    with pytest.warns(UserWarning, match="earlier format"):
        assert finished(CONFIG, tmp_path / "run") is not None
    safetensors.torch.save_file(stored.tensors(), file, stored.metadata)
    assert "is not sealed" in refusal(lambda: finished(CONFIG, tmp_path / "run"), str(file))


def test_a_resume_file_of_the_earlier_format_says_so(tmp_path: Path) -> None:
    path = started(tmp_path)
    state = resume.read(path)
    header = {"format": "mambascope-resume-1", "progress": json.dumps(state.progress), "digest": "0" * 64}
    safetensors.torch.save_file(state.tensors, path, header)
    refusal(lambda: go(tmp_path), str(path), "an earlier version wrote it", "delete that file to train from step 0")


@MANY
def test_a_damaged_search_is_refused(count: int, tmp_path: Path) -> None:
    file = tmp_path / "resume" / "search.json"
    file.parent.mkdir()
    done = [{"lr": rate, "validation_error": 0.5, "losses": [0.25, 0.75]} for rate in SEARCH.learning_rates]
    data = sealed.pack_json({"done": done}).encode()
    for damaged in damages(data, count):
        file.write_bytes(damaged)
        refusal(lambda: go(tmp_path, SEARCH), str(file), "delete it to search again")
    file.write_bytes(data)
    assert [cell["lr"] for cell in go(tmp_path, SEARCH).card["learning_rates"]] == list(SEARCH.learning_rates)


@pytest.mark.parametrize(
    "change",
    [
        {"step": "4"},
        {"step": 4.0},
        {"step": -1},
        {"step": True},
        {"step": 10**30},
        {"step": 13},
        {"seconds": None},
        {"seconds": [1]},
        {"loss_sum": "x"},
        {"loss_sum": None},
        {"loss_count": 1.5},
        {"best": "x"},
        {"stale": {}},
        {"processes": "1"},
        {"processes": 2},
        {"processes": None},
    ],
)
def test_progress_of_another_kind_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = started(tmp_path)
    state = resume.read(path)
    resume.write(path, state._replace(progress={**state.progress, **change}))
    refusal(lambda: go(tmp_path), str(path))


def test_progress_that_is_no_object_is_refused(tmp_path: Path) -> None:
    path = started(tmp_path)
    state = resume.read(path)
    for text in ("[]", "1", "null", "{", '{"a":' * 5000 + "1" + "}" * 5000, "{}"):
        path.write_bytes(sealed.pack(state.tensors, {"format": resume.FORMAT, "progress": text}))
        refusal(lambda: go(tmp_path), str(path))
    path.write_bytes(sealed.pack(state.tensors, {"format": resume.FORMAT}))
    refusal(lambda: go(tmp_path), str(path))


def test_tensors_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = started(tmp_path)
    state = resume.read(path)
    rng = state.tensors["rng"]
    for name, value in {
        "rng": rng[:, :100].clone(),
        "rng ": rng.float(),
        "rng  ": torch.zeros(0, 5, dtype=torch.uint8),
        "rng   ": rng[0].clone(),
        "rng    ": torch.zeros_like(rng),
        "optimizer/exp_avg/A_log": torch.zeros(3),
        "optimizer/step/A_log": torch.zeros(8, 1),
        "model/A_log": torch.zeros(3),
    }.items():
        before = torch.get_rng_state()
        resume.write(path, state._replace(tensors={**state.tensors, name.strip(): value}))
        refusal(lambda: go(tmp_path), str(path), "delete it to train from step 0")
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["resume/state.safetensors", "resume/search.json", "recipe.json", "model.safetensors"])
def test_a_pipe_in_the_folder_is_not_waited_for(name: str, tmp_path: Path) -> None:
    config = SEARCH if "search" in name else CONFIG
    (tmp_path / "resume").mkdir()
    if name == "model.safetensors":
        (tmp_path / "recipe.json").write_text(json.dumps(CONFIG.as_dict()))
    os.mkfifo(tmp_path / name)
    said: list[str] = []
    thread = threading.Thread(target=lambda: said.append(refusal(lambda: go(tmp_path, config))), daemon=True)
    thread.start()
    thread.join(20)
    assert said and name in said[0] and "it is a pipe" in said[0]
