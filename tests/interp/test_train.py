"""Training that is killed, resumed, searched, refused and interrupted, on a tiny model."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from hooks.errors import BadArgument, RunFailed
from interp import fit, recipe, resume, tasks
from interp.recipe import TrainConfig
from interp.train import Trained, train

ROOT = Path(__file__).resolve().parents[2]


class Tiny(nn.Module):
    """A causal recurrence with dropout, so that a resumed run also needs its random generator."""

    def __init__(self) -> None:
        super().__init__()
        self.read_in = nn.Linear(2, 8)
        self.A_log = nn.Parameter(torch.zeros(8, 1))
        self.dropout = nn.Dropout(0.1)
        self.read_out = nn.Linear(8, 1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        h = torch.zeros(8)
        states = []
        for t in range(x.shape[1]):
            h = torch.sigmoid(self.A_log[:, 0]) * h + torch.tanh(self.read_in(x[:, t]))
            states.append(h)
        return self.read_out(self.dropout(torch.stack(states, dim=1)))


def save(model: nn.Module, path: Path, card: dict[str, Any]) -> None:
    temporary = path.with_suffix(".part")
    safetensors.torch.save_file(model.state_dict(), temporary, {"card": json.dumps(card)})
    os.replace(temporary, path)


TASK = tasks.build("linreg", d=2, n_pairs=5)
CONFIG = TrainConfig(
    task="linreg",
    task_config={"d": 2, "n_pairs": 5},
    model="tiny",
    steps=12,
    batch_size=8,
    learning_rates=(1e-2,),
    search_steps=6,
    save_every=4,
    eval_every=3,
)
SEARCH = dataclasses.replace(CONFIG, learning_rates=(1e-3, 1e-2, 1e-1))


def go(out: Path, config: TrainConfig = CONFIG, **options: Any) -> Trained:
    return train(
        options.pop("build", Tiny), options.pop("task", TASK), config, out,
        options.pop("save", save), **options,
    )  # fmt: skip


def weights(out: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(out / "model.safetensors")


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def metrics(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def killed(body: Callable[[], object]) -> int:
    """Run ``body`` in a forked process and return how it ended (−9: SIGKILL)."""
    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


@pytest.fixture(autouse=True, scope="module")
def quick_disk() -> Iterator[None]:
    """No fsync: it guards against a power cut, which no test makes, and takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken")
    go(out)
    return out


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


def kill_at_call(owner: Any, name: str, call: int, *, before: bool) -> None:
    """Replace ``owner.name`` by a version that SIGKILLs this process around its ``call``-th call."""
    original, count = getattr(owner, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if before and count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        value = original(*args, **kwargs)
        if count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    setattr(owner, name, counted)


KILLS = {
    "before the first checkpoint": (fit, "training_batch", 2, True),
    "in the middle between two checkpoints": (fit, "training_batch", 7, True),
    "metrics written, checkpoint not": (resume.Metrics, "append", 4, False),
    "bytes written, not yet renamed": (resume.os, "replace", 5, True),
    "renamed": (resume.os, "replace", 5, False),
    "after the last step": (fit.evaluate, "errors", 5, True),
    "model written, resume not yet removed": (shutil, "rmtree", 1, True),
}


@pytest.mark.parametrize("moment", KILLS)
def test_killed_at_any_moment_it_ends_in_the_same_weights(
    unbroken: Path, tmp_path: Path, moment: str
) -> None:
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
    def body() -> None:
        kill_at_call(fit, "training_batch", 11, before=True)
        go(tmp_path)

    killed(body)
    progress = resume.read(tmp_path / "resume" / "state.safetensors").progress
    assert progress["step"] == 8
    steps: list[int] = []
    original = fit.training_batch

    def noted(run: Any, step: int, total: int) -> Any:
        steps.append(step)
        return original(run, step, total)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "training_batch", noted)
        go(tmp_path)
    assert steps == [8, 9, 10, 11]


def test_without_the_random_state_the_weights_would_differ(unbroken: Path, tmp_path: Path) -> None:
    """The check on the checks above: dropout makes the generator matter, and they would see it."""

    def body() -> None:
        kill_at_call(fit, "training_batch", 7, before=True)
        go(tmp_path)

    killed(body)
    path = tmp_path / "resume" / "state.safetensors"
    state = resume.read(path)
    state.tensors["rng"] = torch.Generator().manual_seed(5).get_state()[None]
    resume.write(path, state)
    go(tmp_path)
    assert not same(weights(tmp_path), weights(unbroken))


def test_nothing_is_pickled(tmp_path: Path) -> None:
    def body() -> None:
        kill_at_call(fit, "training_batch", 7, before=True)
        go(tmp_path)

    killed(body)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*"))
    assert files == ["metrics.jsonl", "recipe.json", "resume/state.safetensors"]
    tensors = safetensors.torch.load_file(tmp_path / "resume" / "state.safetensors")
    names = {name.split("/")[0] for name in tensors}
    assert names == {"model", "optimizer", "rng"}


# --- the search -------------------------------------------------------------------------------


def test_the_search_takes_the_best_rate_on_validation_prompts(tmp_path: Path) -> None:
    card = go(tmp_path / "searched", SEARCH).card
    tried = card["learning_rates"]
    assert [cell["lr"] for cell in tried] == list(SEARCH.learning_rates)
    best = min(tried, key=lambda cell: cell["validation_error"])["lr"]
    assert card["learning_rate"] == best
    go(tmp_path / "alone", dataclasses.replace(CONFIG, learning_rates=(best,)))
    assert same(weights(tmp_path / "searched"), weights(tmp_path / "alone"))


def test_every_candidate_sees_the_same_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    original = fit.training_batch

    def noted(*args: Any) -> Any:
        batch = original(*args)
        seen.append(batch[0].tokens)
        return batch

    monkeypatch.setattr(fit, "training_batch", noted)
    go(tmp_path, SEARCH)
    assert len(seen) == 3 * 6 + 12
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
    assert (len(json.loads(search.read_text())) if search.exists() else 0) == finished
    steps = 0
    original = fit.training_batch

    def noted(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "training_batch", noted)
        broken = go(tmp_path / "broken", SEARCH)
    saved = (step - 1) % 6 // 4 * 4 if finished < 3 else 0
    assert steps == 3 * 6 + 12 - finished * 6 - saved
    whole = go(tmp_path / "whole", SEARCH)
    assert broken.card["learning_rates"] == whole.card["learning_rates"]
    assert same(weights(tmp_path / "broken"), weights(tmp_path / "whole"))
    assert [row["step"] for row in metrics(tmp_path / "broken")] == [3, 6, 9, 12]


def test_a_rate_that_blows_up_is_listed_as_null_and_lost(tmp_path: Path) -> None:
    config = dataclasses.replace(SEARCH, learning_rates=(1e-2, 1e-3, 1e38), weight_decay=1.0)
    card = go(tmp_path, config).card
    assert card["learning_rates"][2] == {"lr": 1e38, "validation_error": None}
    assert card["learning_rate"] < 1
    hopeless = dataclasses.replace(SEARCH, learning_rates=(1e36, 1e37, 1e38), weight_decay=1.0)
    with pytest.raises(RunFailed, match="much lower --learning-rates"):
        go(tmp_path / "hopeless", hopeless)


# --- refused ----------------------------------------------------------------------------------


def started(out: Path, call: int = 7) -> Path:
    """A folder whose training was killed, with its resume file."""

    def body() -> None:
        kill_at_call(fit, "training_batch", call, before=True)
        go(out)

    killed(body)
    return out / "resume" / "state.safetensors"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("steps", 13, "steps: asked 13, found 12"),
        ("learning_rates", (2e-2,), r"learning_rates: asked \[0.02\], found \[0.01\]"),
        ("seed", 3, "seed: asked 3, found 0"),
        ("model_config", {"d": 1}, "model_config"),
    ],
)
def test_another_recipe_in_the_same_folder_is_refused(
    unbroken: Path, field: str, value: Any, said: str
) -> None:
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


def test_a_damaged_search_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "resume").mkdir()
    (tmp_path / "resume" / "search.json").write_text("[{")
    with pytest.raises(BadArgument, match="delete it to search again"):
        go(tmp_path, SEARCH)


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
    with pytest.raises(BadArgument, match=r'"tpu" .*cpu'):
        go(tmp_path, device="tpu")


def test_a_model_that_does_not_fit_the_task_leaves_no_folder(tmp_path: Path) -> None:
    class OtherWidth(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.read_out = nn.Linear(8, 2)

    with pytest.raises(BadArgument, match="d_out=1"):
        go(tmp_path / "run", build=OtherWidth)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("steps", 0, "whole number from 1 up"),
        ("steps", 2.5, "steps|wrong type"),
        ("learning_rates", [1e-3, 1e-2], "at least three"),
        ("learning_rates", [1e-3, 1e-3, 1e-2], "at least three"),
        ("learning_rates", [-1.0], "must be > 0"),
        ("warmup", 2, "from 0 to 1"),
        ("curriculum", float("nan"), "from 0 to 1"),
        ("precision", "fp16", "fp16 skips steps"),
        ("precision", "fp8", "no precision"),
        ("seed", -1, "seed"),
        ("step", 3, 'did you mean "steps"'),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(field: str, value: Any, said: str) -> None:
    good = CONFIG.as_dict()
    assert recipe.from_dict(good) == CONFIG
    with pytest.raises(BadArgument, match=said):
        recipe.from_dict({**good, field: value})
    with pytest.raises(BadArgument, match="does not say which task"):
        recipe.from_dict({"model": "tiny"})


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
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


def test_a_second_ctrl_c_interrupts_at_once(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


# --- schedules --------------------------------------------------------------------------------


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine() -> None:
    config = dataclasses.replace(CONFIG, warmup=0.1, floor=0.2)
    rates = [recipe.learning_rate(config, step, 100, 1.0) for step in range(100)]
    torch.testing.assert_close(rates[:10], [(step + 1) / 10 for step in range(10)])
    torch.testing.assert_close(rates[10], 1.0)
    torch.testing.assert_close(rates[55], 0.2 + 0.8 / 2)  # half-way down the cosine
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.2 < rates[99] < 0.201
    assert recipe.learning_rate(dataclasses.replace(config, warmup=0.0), 0, 1, 3.0) == 3.0


def test_the_curriculum_is_a_staircase_from_a_quarter_to_all() -> None:
    config = dataclasses.replace(CONFIG, curriculum=0.5)
    stairs = [recipe.curriculum(config, step, 100, 20) for step in range(100)]
    assert stairs[0] == 5
    assert stairs[49] == 20
    assert set(stairs[50:]) == {20}
    assert sorted(set(stairs)) == list(range(5, 21))
    assert stairs == sorted(stairs)
    assert recipe.curriculum(dataclasses.replace(CONFIG, curriculum=0.0), 0, 100, 20) == 20
    assert recipe.curriculum(config, 0, 100, 1, least=2) == 1


def test_decay_leaves_out_biases_and_the_recurrence() -> None:
    model = Tiny()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = fit.adamw(model, CONFIG).param_groups
    decayed = {names[id(p)] for p in groups[0]["params"]}
    assert decayed == {"read_in.weight", "read_out.weight"}
    assert groups[0]["weight_decay"] == CONFIG.weight_decay
    assert {names[id(p)] for p in groups[1]["params"]} == set(names.values()) - decayed
    assert groups[1]["weight_decay"] == 0
    assert groups[0]["betas"] == (0.9, 0.95)


# --- several processes ------------------------------------------------------------------------

TWO = """
    import sys
    from pathlib import Path
    sys.path[:0] = [{root!r}, {here!r}]
    import test_train
    config = test_train.dataclasses.replace(test_train.SEARCH, precision={precision!r})
    print(test_train.go(Path({out!r}), config).card["processes"])
"""


def launch(tmp_path: Path, name: str, processes: int, precision: str = "fp32") -> Path:
    script = tmp_path / f"{name}.py"
    out = tmp_path / name
    here = str(Path(__file__).parent)
    text = TWO.format(root=str(ROOT), here=here, out=str(out), precision=precision)
    script.write_text(textwrap.dedent(text))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu"]
    if processes > 1:
        command += ["--num_processes", str(processes), "--main_process_port", "0"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    done = subprocess.run(
        [*command, str(script)],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert str(processes) in done.stdout
    return out


@pytest.mark.slow
def test_two_processes_share_a_batch_and_write_once(tmp_path: Path) -> None:
    two, again = launch(tmp_path, "two", 2), launch(tmp_path, "again", 2)
    assert same(weights(two), weights(again))
    assert [row["step"] for row in metrics(two)] == [3, 6, 9, 12]
    one = launch(tmp_path, "one", 1)
    assert not same(weights(one), weights(two))  # other prompts: each process draws its own


@pytest.mark.slow
def test_mixed_precision_trains(tmp_path: Path) -> None:
    mixed, full = launch(tmp_path, "mixed", 1, "bf16"), launch(tmp_path, "full", 1)
    assert not same(weights(mixed), weights(full))
    assert all(value.dtype != torch.bfloat16 for value in weights(mixed).values())
