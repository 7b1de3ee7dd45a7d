"""A tiny model to train in tests, and ways to kill its training at a chosen moment."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch._dynamo  # the optimizer's first step loads it; here once, and not in every forked child
from torch import Tensor, nn

from hooks import sealed
from interp import tasks
from interp.training import fit
from interp.training.recipe import TrainConfig
from interp.training.train import Trained, train


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
    temporary.write_bytes(sealed.pack(model.state_dict(), {"card": json.dumps(card)}))
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
SEARCH = dataclasses.replace(CONFIG, steps=18, learning_rates=(1e-3, 1e-2, 1e-1))


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


def steps_of(body: Callable[[], object]) -> list[int]:
    """The steps that are trained while ``body`` runs."""
    steps: list[int] = []
    original = fit.training_batch

    def noted(run: Any, step: int, total: int) -> Any:
        steps.append(step)
        return original(run, step, total)

    fit.training_batch = noted
    try:
        body()
    finally:
        fit.training_batch = original
    return steps


def killed(body: Callable[[], object]) -> int:
    """Run ``body`` in a forked process and return how it ended (−9: SIGKILL)."""
    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def kill_at_call(owner: Any, name: str, call: int, *, before: bool) -> None:
    """Replace ``owner.name`` by one that SIGKILLs this process around its ``call``-th call."""
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


def started(out: Path, call: int = 7) -> Path:
    """A folder whose training was killed, with its resume file."""

    def body() -> None:
        kill_at_call(fit, "training_batch", call, before=True)
        go(out)

    killed(body)
    return out / "resume" / "state.safetensors"
