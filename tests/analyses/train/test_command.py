"""``python -m analyses.train``: flags and recipes, and the real command, killed and resumed."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from analyses import train as command
from hooks.errors import BadArgument
from interp import cli, evaluate, tasks
from interp.tasks.base import model_shape
from interp.training import recipe, resume

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "--task", "linreg", "--model", "mamba", "--task-config", "d=2", "n_pairs=5",
    "--model-config", "d_model=8", "n_layers=2", "d_state=4", "--batch-size", "8",
    "--learning-rates", "0.01", "--threads", "1", "--save-every", "5", "--eval-every", "10",
]  # fmt: skip


def config(*argv: str) -> command.Config:
    return cli.parse(command.Config, list(argv), prog="train")


@pytest.mark.contract
@pytest.mark.parametrize("name", command.recipes())
def test_every_recipe_is_a_whole_recipe_of_a_model_that_can_be_built(name: str) -> None:
    bundled = command.resolve(config("--recipe", name))
    task = tasks.build(bundled.task, **bundled.task_config)
    shape = {**model_shape(task), **bundled.model_config}
    model = models.build(bundled.model, **shape)
    with torch.no_grad():
        batch = evaluate.prompts(task, 2)
        assert task.predict(model, batch).shape[:2] == (2, task.n_pairs)
    assert task.report_ks and max(task.report_ks) < task.n_pairs
    assert task.query_only or task.n_pairs >= 4 * task.d + 1
    assert len(bundled.learning_rates) >= 3


@pytest.mark.contract
@pytest.mark.parametrize("first", ["mamba-linreg", "mamba-outliers"])
def test_compared_recipes_are_fair(first: str) -> None:
    """Same prompts and steps, parameters within ten percent, each with a search over rates."""
    found = {name: command.resolve(config("--recipe", name)) for name in command.recipes()}
    ours = found[first]
    sizes = {}
    for name, other in found.items():
        if other.task != ours.task:
            continue
        for field in ("task_config", "steps", "batch_size", "seed", "curriculum", "search_steps"):
            assert getattr(other, field) == getattr(ours, field), (name, field)
        task = tasks.build(other.task, **other.task_config)
        shape = {**model_shape(task), **other.model_config}
        model = models.build(other.model, **shape)
        sizes[name] = sum(parameter.numel() for parameter in model.parameters())
    assert len(sizes) > 3 and max(sizes.values()) <= 1.1 * min(sizes.values()), sizes


@pytest.mark.contract
def test_tasks_to_mix_are_flags_too() -> None:
    flags = ("--mix", "linreg:covariance=skewed,d=5", "sparse_linreg")
    asked = command.resolve(config("--recipe", "mamba-linreg", *flags))
    assert [dict(entry) for entry in asked.mix] == [
        {"task": "linreg", "task_config": {"covariance": "skewed", "d": 5}},
        {"task": "sparse_linreg", "task_config": {}},
    ]
    with pytest.raises(BadArgument, match="takes name=value"):
        command.resolve(config("--recipe", "mamba-linreg", "--mix", "linreg:skewed"))
    with pytest.raises(BadArgument, match=r"--mix .*: it is nested more than 200 levels deep"):
        command.resolve(config("--recipe", "mamba-linreg", "--mix", f"linreg:d={'[' * 300 + ']' * 300}"))


@pytest.mark.contract
def test_one_layer_chains_differ_by_their_convolution_alone() -> None:
    with_taps, without = (
        command.resolve(config("--recipe", f"mamba-1layer{name}-markov")).as_dict() for name in ("", "-noconv")
    )
    taps = (with_taps["model_config"].pop("d_conv"), without["model_config"].pop("d_conv"))
    assert taps == (4, 1) and with_taps == without


@pytest.mark.contract
def test_flags_replace_the_fields_of_a_recipe() -> None:
    plain = command.resolve(config("--recipe", "mamba-linreg"))
    given = command.resolve(
        config(
            "--recipe", "mamba-linreg", "--steps", "7", "--learning-rates", "1e-3",
            "--task-config", "d=3", "tokens=joint", "--model-config", "selective=false",
        )
    )  # fmt: skip
    assert given.steps == 7
    assert given.learning_rates == (1e-3,)
    assert given.task_config == {**plain.task_config, "d": 3, "tokens": "joint"}
    assert given.model_config == {**plain.model_config, "selective": False}
    unchanged = {"steps", "learning_rates", "task_config", "model_config"}
    for field in dataclasses.fields(plain):
        if field.name not in unchanged:
            assert getattr(given, field.name) == getattr(plain, field.name), field.name


@pytest.mark.contract
def test_a_recipe_may_be_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"task": "linreg", "model": "mamba", "steps": 5}))
    assert command.resolve(config("--recipe", str(file))) == recipe.read(file)
    file.write_text("{")
    with pytest.raises(BadArgument, match="cannot read the recipe"):
        command.resolve(config("--recipe", str(file)))


@pytest.mark.contract
def test_the_precision_is_what_accelerate_launch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert command.resolve(config("--recipe", "mamba-linreg")).precision == "fp32"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert command.resolve(config("--recipe", "mamba-linreg")).precision == "bf16"
    asked = config("--recipe", "mamba-linreg", "--precision", "fp32")
    assert command.resolve(asked).precision == "fp32"


@pytest.mark.contract
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--recipe NAME, or --task and --model; recipes: "),
        (["--recipe", "mamba-lingre"], 'did you mean "mamba-linreg"'),
        (["--task", "lingre", "--model", "mamba"], 'did you mean "linreg"'),
        (["--task", "linreg", "--model", "mambo"], 'did you mean "mamba"'),
        ([*SMALL, "--model-config", "d_mode=8"], "d_model"),
        ([*SMALL, "--task-config", "d"], "name=value"),
        ([*SMALL, "--task-config", "q=3"], "q"),
        ([*SMALL, "--steps", "0"], "steps"),
        ([*SMALL, "--learning-rates", "1", "2"], "at least three"),
        ([*SMALL, "--device", "tpu"], "tpu"),
        ([*SMALL, "--threads", "0"], "--threads"),
        ([*SMALL, "--model-config", "d_in=7"], "d_in"),
        ([*SMALL, "--precision", "fp16"], "fp16"),
    ],
)
def test_wrong_arguments_exit_2_in_one_line_and_leave_nothing(
    argv: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command, [*argv, "--out", str(tmp_path / "run")]) == 2  # type: ignore[arg-type]
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert said in err
    assert not (tmp_path / "run").exists()


@pytest.mark.end_to_end
def test_quick_trains_a_model_that_loads_with_its_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = [*SMALL, "--steps", "2000", "--quick", "--json"]
    assert cli.main(command, argv) == 0  # type: ignore[arg-type]
    said = json.loads(capsys.readouterr().out)
    folder = Path(said["folder"])
    assert folder.parent == Path("out/train")
    assert said["card"]["steps"] == 20
    model = models.load(folder)
    assert model.card == said["card"]
    assert model.architecture == model.card["model"] == "mamba"
    task = tasks.build(model.card["task"], **model.card["task_config"])
    error = evaluate.errors(model, task, n=1280, seed=model.card["measured"]["seed"])
    measured = model.card["measured"]["model"]["k=4"]["error"]
    torch.testing.assert_close(float(error[:, 4].mean()), measured, rtol=1e-4, atol=0)
    assert cli.main(command, argv[:-1]) == 0  # type: ignore[arg-type]
    assert "finished already" in capsys.readouterr().out


def launched(*argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "analyses.train", *argv],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for_checkpoint(process: subprocess.Popen[Any], out: Path) -> None:
    """Until the command has written its first checkpoint."""
    deadline = time.monotonic() + 300
    while not (out / "resume" / "state.safetensors").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.end_to_end
def test_the_real_command_killed_and_started_again_ends_in_the_same_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*SMALL, "--steps", "200"]
    process = launched(*argv, "--out", str(tmp_path / "broken"))
    wait_for_checkpoint(process, tmp_path / "broken")
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    state = resume.read(tmp_path / "broken" / "resume" / "state.safetensors")
    assert 0 < state.progress["step"] < 200
    for name in ("broken", "whole"):
        assert cli.main(command, [*argv, "--out", str(tmp_path / name)]) == 0  # type: ignore[arg-type]
        assert f"written: {tmp_path / name}" in capsys.readouterr().out
    broken, whole = models.load(tmp_path / "broken"), models.load(tmp_path / "whole")
    assert models.digest(broken) == models.digest(whole)
    assert not (tmp_path / "broken" / "resume").exists()


@pytest.mark.end_to_end
def test_ctrl_c_on_the_real_command_is_one_line_and_exit_1(tmp_path: Path) -> None:
    process = launched(*SMALL, "--steps", "100000", "--out", str(tmp_path))
    wait_for_checkpoint(process, tmp_path)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (1, "")
    told, stopped = err.splitlines()
    assert told.startswith("training: 100000 steps at learning rate 0.01; about") and "s a step" in told
    assert "the same command" in stopped
    left = [name for name in os.listdir(tmp_path) if name.startswith(".")]
    assert left == []
    assert resume.read(tmp_path / "resume" / "state.safetensors").progress["step"] > 0


@pytest.mark.contract
def test_attached_to_a_closed_standard_input_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(BadArgument, match="--attached stops when standard input ends, and it is closed"):
        command.run(config(*SMALL, "--attached", "--out", str(tmp_path)))
    assert os.listdir(tmp_path) == []


@pytest.mark.contract
@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"])
@pytest.mark.parametrize("value", ["x", "", "1.5"])
def test_a_launcher_s_environment_that_is_no_number_is_one_line(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    assert cli.main(command, [*SMALL, "--steps", "1", "--out", str(tmp_path)]) == 2  # type: ignore[arg-type]
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"{name}={value!r}" in err and f"unset {name}" in err
