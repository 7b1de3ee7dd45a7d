"""One optimisation from its first step, or from its checkpoint, to its last.

What is random is a pure function of (seed, step, process) and the schedules are functions of the
step, so weights, optimizer moments and torch's generator are all that a checkpoint has to hold.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from hooks.brief import brief
from hooks.errors import NonFinite, RunFailed
from interp import evaluate, seeds
from interp.machine.progress import bar
from interp.tasks.base import Batch, Task, guess
from interp.training import recipe, resume
from interp.training.recipe import TrainConfig

VALIDATION_PROMPTS = 256
UNDECAYED = {"A", "D", "dt", "delta"}
RIVALS = {"ols": "OLS", "ols_on_powers": "OLS on powers", "bayes": "Bayes", "vote": "vote"}
"""The baselines that are followed during a training, where a task has them, and how they are written.

Without noise least squares is optimal for linear functions, and on the powers for polynomials. Of sparse functions,
networks, trees and single-index functions no optimal predictor is at hand: there it is least squares all the same."""


class BlewUp(NonFinite):
    """The loss or its gradient is NaN or infinite."""


class Objective(nn.Module):
    """The model together with its task: one forward is one training loss.

    accelerate wraps *this* and not the model, so that a task may call the model in any way (several
    times, with states, through ``step``) and the data-parallel wrapper still sees one forward.
    Of several tasks the loss is in the unit of the first, so that none counts more by the scale of its labels.
    """

    def __init__(self, model: nn.Module, tasks: Sequence[Task]) -> None:
        super().__init__()
        self.model = model
        self.tasks = tuple(tasks)

    def forward(self, batch: Batch, generator: torch.Generator, which: int) -> Float[Tensor, ""]:
        loss = self.tasks[which].training_loss(self.model, batch, generator).mean()
        return loss * (self.tasks[0].scale / self.tasks[which].scale) if which else loss


@dataclass
class Stop:
    """Whether a signal has asked for an orderly end; ``name`` says which."""

    name: str = ""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.name:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


@contextlib.contextmanager
def orderly_stop() -> Iterator[Stop]:
    """Turn the first Ctrl-C, SIGTERM or SIGHUP into a request that the loop honours between two steps.

    An exception in the middle of an optimizer step would leave half of the weights updated. The second signal does
    interrupt at once: the last checkpoint on the disk is whole in any case. An ignored SIGHUP (nohup) stays ignored.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Run:
    """What every optimisation of one training shares."""

    build_model: Callable[[], nn.Module]
    task: Task
    config: TrainConfig
    folder: Path
    accelerator: Accelerator
    stop: Stop = field(default_factory=Stop)
    mix: tuple[Task, ...] = ()

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The task that is measured, and those that are trained beside it."""
        return (self.task, *self.mix)

    @property
    def again(self) -> str:
        return f"the same command (--out {self.folder}) goes on from there"


class Fitted(NamedTuple):
    """A model, the seconds that it took in all, and the steps: fewer than asked where it stopped early."""

    model: nn.Module
    seconds: float
    steps: int


def fit(
    run: Run, peak: float, steps: int, name: str, *, label: str, metrics: Path | None = None, patience: int = 0
) -> Fitted:
    """The model trained for ``steps`` at peak rate ``peak``, or until its validation loss has come to rest.

    It has come to rest after ``patience`` evaluations in a row without a lower one; they count from
    the end of warm-up and curriculum. The weights are those of the last step, and the schedule is
    that of all ``steps``. Goes on from ``resume/<name>.safetensors`` if that is there, and writes it
    every ``save_every`` steps and after the last one. Raises :class:`BlewUp` before a step that is
    not finite is taken.
    """
    config, accelerator = run.config, run.accelerator
    model = initial_model(run)
    optimizer = adamw(model, config)
    # The optimizer stays torch's own: accelerate's wrapper is for loss scaling, which bf16 does not
    # need, and looks for an optional package on the disk twice at every step.
    objective = accelerator.prepare(Objective(model, run.tasks))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    file = run.folder / "resume" / f"{name}.safetensors"
    progress, lines = resume.go_on(file, accelerator, model, optimizer, steps)
    writer = None
    if metrics is not None and accelerator.is_main_process:
        writer = resume.Metrics(metrics, lines)
    validate = validation(run)
    began = time.perf_counter() - progress["seconds"]
    model.train()
    with bar(steps, label, initial=progress["step"]) as shown:
        for step in range(progress["step"], steps):
            if at_rest(progress, patience):
                break
            rate = recipe.learning_rate(config, step, steps, peak)
            for group in optimizer.param_groups:
                group["lr"] = rate
            try:
                loss = objective(*training_batch(run, step, steps))
            except NonFinite:  # the model found it first; every process has to hear of it below
                loss = torch.full((), math.nan, device=accelerator.device)
            value, asked = _agree(accelerator, loss, run.stop)
            norm = math.nan
            if math.isfinite(value):
                accelerator.backward(loss)
                norm = float(nn.utils.clip_grad_norm_(parameters, config.grad_clip or math.inf))
            if not math.isfinite(norm):
                raise BlewUp(
                    f"the loss is {value:g} and the norm of its gradient {norm:g} at step {step} "
                    f"of {steps} (learning rate {rate:.3g}); try lower --learning-rates or a "
                    "longer --warmup, in another --out"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            shown.update()

            done = step + 1
            progress["step"] = done
            progress["loss_sum"] += value
            progress["loss_count"] += 1
            progress["seconds"] = time.perf_counter() - began
            if done % config.eval_every == 0 or done == steps:
                found = validate(model)
                row = _row(progress, rate, run.task, found)
                if patience and done >= max(config.curriculum, config.warmup) * steps:
                    _compare(progress, accelerator, found)
                progress["loss_sum"], progress["loss_count"] = 0.0, 0
                shown.set_postfix_str(_postfix(row))
                if writer is not None:
                    writer.append(row)
            last = done == steps or at_rest(progress, patience)
            if done % config.save_every == 0 or last or asked:
                resume.keep(file, accelerator, model, optimizer, progress, "" if writer is None else writer.text)
            if asked and not last:
                raise RunFailed(
                    f"stopped by {run.stop.name or 'a signal'} after step {done} of {steps} ({label}); {run.again}"
                )
    return Fitted(model, progress["seconds"], progress["step"])


def at_rest(progress: Mapping[str, Any], patience: int) -> bool:
    """Whether the last ``patience`` evaluations were none of them the best so far; never for 0."""
    return 0 < patience <= progress["stale"]


def _compare(progress: dict[str, Any], accelerator: Accelerator, found: Measured) -> None:
    """Count in ``progress`` how many evaluations ago the validation loss was lowest, alike in every process."""
    level = found.loss.mean()
    if accelerator.num_processes > 1:
        level = accelerator.reduce(level.to(accelerator.device), "mean")
    if progress["best"] is None or float(level) < progress["best"]:
        progress["best"], progress["stale"] = float(level), 0
    else:
        progress["stale"] += 1


def initial_model(run: Run) -> nn.Module:
    """The untrained model of the recipe's seed, on its device; leaves torch's generator seeded."""
    torch.manual_seed(seeds.number("init", run.config.seed))
    model = run.build_model().to(run.accelerator.device)
    torch.manual_seed(seeds.number("train-noise", run.config.seed, run.accelerator.process_index))
    return model


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves alone biases, norms and the recurrence's A, D and dt.

    Fused: one kernel for all parameters, where the plain loop costs more than a small model's
    backward pass.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        words = set(name.rsplit(".", 1)[-1].split("_"))
        plain = parameter.ndim < 2 or bool(words & UNDECAYED)
        (kept if plain else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=config.betas, fused=True)


def training_batch(run: Run, step: int, steps: int) -> tuple[Batch, torch.Generator, int]:
    """This process's share of the prompts of ``step``, as large as the curriculum has them.

    And their stream, for what a task still has to draw, and which of the run's tasks they are of:
    with equal chance at every step, the same in every process.
    """
    config, accelerator = run.config, run.accelerator
    which = seeds.number("mix", config.seed, step) % len(run.tasks)
    task = run.tasks[which]
    generator = seeds.generator("train", config.seed, step, accelerator.process_index)
    batch = task.sample(
        config.batch_size // accelerator.num_processes,
        generator,
        d_active=recipe.curriculum(config, step, steps, task.d),
        n_pairs=recipe.curriculum(config, step, steps, task.n_pairs, least=2),
    )
    return batch.to(accelerator.device) if accelerator.device.type != "cpu" else batch, generator, which


@dataclass(frozen=True)
class Measured:
    """What a model makes of fixed prompts, at the examples ``ks`` on which it is trained.

    loss, error   (prompt, k): the loss ÷ ``task.scale``, which is what training lowers, and the reported error
    rivals        the error of each baseline, with the same axes
    alike         whether the loss ÷ scale is the reported error by definition, as in regression
    """

    ks: tuple[int, ...]
    loss: Float[Tensor, "prompt k"]
    error: Float[Tensor, "prompt k"]
    rivals: dict[str, Float[Tensor, "prompt k"]]
    alike: bool

    __repr__ = brief

    def at(self, values: Float[Tensor, "prompt k"], k: int) -> Float[Tensor, " prompt"]:
        """The column of ``values`` for k examples seen."""
        return values[:, self.ks.index(k)]


def measuring(run: Run, n: int, purpose: str) -> Callable[[nn.Module], Measured]:
    """A function model → its loss and its error on ``n`` fixed prompts, beside the baselines'."""
    task = run.task
    batch = evaluate.prompts(task, n, run.config.seed, purpose)
    asked = batch.last() if task.query_only else batch
    ks = tuple(range(task.n_pairs))[-asked.targets.shape[1] :]
    rivals = {name: error[:, -len(ks) :] / task.scale for name, error in task.baselines(batch).items()}
    # Of a prediction that is known: a model's own would not do, its hinge and its error can both be 0.
    nothing = guess(task, asked)
    alike = torch.equal(task.loss(nothing, asked) / task.scale, task.error(nothing, asked))

    def measure(model: nn.Module) -> Measured:
        with run.accelerator.autocast():
            predicted = evaluate.predictions(model, task, batch, query_only=task.query_only).float()
        return Measured(ks, task.loss(predicted, asked) / task.scale, task.error(predicted, asked), rivals, alike)

    return measure


def validation(run: Run) -> Callable[[nn.Module], Measured]:
    """``measuring`` on the validation prompts, which are neither trained on nor reported."""
    return measuring(run, VALIDATION_PROMPTS, "validation")


def _agree(accelerator: Accelerator, loss: Tensor, stop: Stop) -> tuple[float, bool]:
    """(mean loss over processes, whether any was asked to stop), the same in every process."""
    if accelerator.num_processes == 1:
        return float(loss.detach()), bool(stop.name)
    both = torch.stack([loss.detach().float(), loss.new_tensor(float(bool(stop.name)))])
    value, asked = accelerator.reduce(both, "mean").tolist()
    return value, asked > 0


def _row(progress: dict[str, Any], rate: float, task: Task, found: Measured) -> dict[str, Any]:
    row: dict[str, Any] = {
        "step": progress["step"],
        "loss": progress["loss_sum"] / progress["loss_count"],
        "lr": rate,
        "error_mean": float(found.error.mean()),
    }
    if not found.alike:
        row["validation_loss"] = float(found.loss.mean())
    row |= {f"error_k{k}": float(found.at(found.error, k).mean()) for k in task.report_ks}
    for name in RIVALS:
        if name in found.rivals:
            row |= {f"{name}_k{k}": float(found.at(found.rivals[name], k).mean()) for k in task.report_ks}
    return row | {"seconds": round(progress["seconds"], 3)}


def _postfix(row: dict[str, Any]) -> str:
    keys = [key for key in row if key.startswith("error_k")]
    if not keys:
        return f"error {row['error_mean']:.4f}"
    key = keys[min(1, len(keys) - 1)]
    text = f"k={key.removeprefix('error_k')}: error {row[key]:.4f}"
    beside = {shown: row.get(key.replace("error", name)) for name, shown in RIVALS.items()}
    beside["loss"] = row.get("validation_loss")
    return ", ".join([text, *(f"{name} {value:.4f}" for name, value in beside.items() if value is not None)])
