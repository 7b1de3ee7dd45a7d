"""Training that can be killed at any moment: the same command goes on and ends in the same weights.

    train(build_model, task, config, out, save) -> Trained

``out`` then holds ``model.safetensors`` (the weights, with a card that says what they are),
``recipe.json`` and ``metrics.jsonl``; ``resume/`` exists only while the training is under way. Whatever is
read back is under a checksum: the checkpoint and the resume files are sealed, and the card has the
checksums of the two files beside it.

accelerate spreads a step over processes and sets the mixed precision. The models and ``save`` are
handed in: this package knows tasks, not architectures.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn

from hooks import sealed
from hooks.brief import brief
from hooks.errors import BadArgument, NonFinite, RunFailed, told
from interp import evaluate, rivals, tasks
from interp.arguments import usable_device
from interp.machine import room
from interp.machine.files import clear_parts, no_half, strict_json, writable_folder, write_whole
from interp.machine.provenance import versions
from interp.printed import folded, lines_of
from interp.stats import paired_difference
from interp.tasks.base import Task, model_shape
from interp.training import ahead, recipe, resume
from interp.training.fit import Fitted, Run, fit, measuring, orderly_stop, validation
from interp.training.recipe import TrainConfig

__all__ = ["TrainConfig", "Trained", "train"]

EVALUATION_PROMPTS = 1280
LAUNCHER = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
"""What accelerate launch and torchrun put into the environment: numbers, all of them."""
CHECKPOINT = "model.safetensors"
BESIDE = ("recipe.json", "metrics.jsonl")
Save = Callable[[nn.Module, Path, dict[str, Any]], None]


@dataclass(frozen=True)
class Trained:
    """A finished training: its folder, the card of its weights, and whether it was done before."""

    folder: Path
    card: dict[str, Any]
    already: bool = False

    __repr__ = brief

    def summary(self) -> str:
        """A few lines for a terminal: the errors against the classical ones, the cost, the folder."""
        measured = self.card["measured"]
        # The file keeps its keys in alphabetical order: k=10 before k=5.
        rows = sorted(measured["model"], key=lambda key: (key == "mean", len(key), key))
        whole = ("model", "ols", "ridge", "vote", "clean_vote", "bayes", "entropy", "chance")
        fitted = [name for name, cells in measured.items() if isinstance(cells, dict) and "mean" not in cells]
        shown = [*(name for name in whole if name in measured), *fitted]
        # A line for each of them and a column for each k: the names are long and many.
        errors = {"error on fresh prompts": shown}
        for key in rows:
            cells = (measured[name].get(key) for name in shown)
            errors[key] = [f"{c['error']:.3g} ± {c['standard_error']:.2g}" if c else "" for c in cells]
        lines = lines_of(pd.DataFrame(errors))
        lines.append(
            f"{self.card['parameters']} parameters, {self.card['steps']} steps, "
            f"{self.card['seconds']:.0f} s, learning rate {self.card['learning_rate']:g}"
        )
        config = recipe.from_dict(self.card["recipe"], "the card")
        blind = [f"{cell['lr']:g}" for cell in self.card["learning_rates"] if cell.get("behind", (1.0,))[0] <= 0]
        if blind:
            lines += folded(
                f"note: the search could not tell {' and '.join(blind)} from {self.card['learning_rate']:g}: after "
                f"{config.search_each} steps their losses differ by no more than chance between validation prompts; "
                f"a longer {'--search-steps' if config.search_each == config.search_steps else '--steps'} may tell",
                indent="      ",
            )
        if len(config.learning_rates) > 1 and config.search_each < config.search_steps:
            lines += folded(f"note: {ahead.steps(config)}", indent="      ")
        lines.append(f"{'was finished already' if self.already else 'written'}: {self.folder}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The card and the folder, as strict JSON."""
        return strict_json({"folder": self.folder, "card": self.card}, indent=2)


def train(
    build_model: Callable[[], nn.Module],
    task: Task,
    config: TrainConfig,
    out: Path | str,
    save: Save,
    *,
    device: str = "cpu",
    say: Callable[[str], None] | None = None,
) -> Trained:
    """Train ``build_model()`` on ``task`` by ``config`` in the folder ``out``, or go on with it.

    ``save(model, path, card)`` writes the finished checkpoint, whole or not at all, as a sealed file
    (``hooks.sealed``) whose metadata hold the card as JSON. The number of
    threads is torch's and is recorded. If ``out`` holds the finished result of this very recipe, it
    is returned at once. ``say`` is called once, before the first step, with what the whole will take.

    Raises :class:`BadArgument` when ``out`` cannot be written, or holds another recipe, a damaged
    resume file or a training that is running; :class:`RunFailed` when the loss is no longer finite,
    the disk is full, or Ctrl-C (or SIGTERM, SIGHUP) asked for a stop, after saving where it stopped.
    """
    folder = Path(out)
    mix = mixed(task, config)
    accelerator = _accelerator(config, device)
    card = finished(config, folder)
    if card is not None:
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(folder / "resume", ignore_errors=True)
        return Trained(folder, card, already=True)

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        _rehearse(build_model, (task, *mix), config.batch_size // accelerator.num_processes)
        writable_folder(folder)
        if accelerator.is_main_process:
            with no_half(folder):
                (folder / "resume").mkdir(exist_ok=True)
            stack.enter_context(resume.only_one(folder / "resume"))
            for each in (folder, folder / "resume"):
                clear_parts(each)
            write_whole(folder / "recipe.json", strict_json(config.as_dict(), indent=2) + "\n")
        accelerator.wait_for_everyone()
        stop = stack.enter_context(orderly_stop())
        run = Run(build_model, task, config, folder, accelerator, stop, mix)
        if say is not None and accelerator.is_main_process:
            say(ahead.told(run))
        tried = _search(run)
        scored = [cell for cell in tried if cell["validation_error"] is not None]
        peak = min(scored, key=lambda cell: cell["validation_error"])["lr"]
        metrics = folder / "metrics.jsonl"
        fitted = fit(
            run,
            peak,
            config.steps,
            "state",
            label=f"training, rate {peak:g}",
            metrics=metrics,
            patience=config.patience,
        )
        if accelerator.is_main_process:
            card = {**_make_card(run, fitted, peak, tried), "files": _beside(folder)}
            with no_half(folder):
                save(fitted.model, folder / CHECKPOINT, card)
            shutil.rmtree(folder / "resume", ignore_errors=True)
        accelerator.wait_for_everyone()
    return Trained(folder, _card(folder / CHECKPOINT))


def finished(config: TrainConfig, folder: Path) -> dict[str, Any] | None:
    """The card of the finished training of this very recipe in ``folder``, or None where it has not finished.

    Raises BadArgument where the folder holds another training, or a file that is not as the training wrote it.
    """
    _same_recipe(config, folder)
    path = folder / CHECKPOINT
    if not os.path.lexists(path):
        return None
    card = _card(path)
    said = card.get("recipe", {})
    if not isinstance(said, Mapping):
        raise BadArgument(f"{path} is not a finished checkpoint: its card has no recipe; delete it to train again")
    differs = recipe.difference(config, recipe.from_dict(said, f"the card of {path}"))
    if differs:
        raise BadArgument(f"{path} is of another training ({differs}); give another --out")
    # Cards from before it was kept have none. A file that somebody has taken away is none that could mislead.
    files = card.get("files")
    for name, checksum in files.items() if isinstance(files, Mapping) else ():
        if os.path.lexists(folder / name) and _checksum(folder / name) != checksum:
            raise BadArgument(
                f"{folder / name} was altered after the training wrote it: it does not give the checksum in the card "
                f"of {path}; delete it, or give another --out"
            )
    return card


def _beside(folder: Path) -> dict[str, str]:
    """Checksums of the files that are finished before the checkpoint is, by name; on the disk as well as in memory."""
    for name in BESIDE:
        if (folder / name).exists():
            write_whole(folder / name, (folder / name).read_bytes())
    return {name: _checksum(folder / name) for name in BESIDE if (folder / name).exists()}


def _checksum(path: Path) -> str:
    return hashlib.sha256(_content(path)).hexdigest()


def _content(path: Path) -> bytes:
    """What is in a file of a run's folder, if it is one."""
    try:
        return sealed.content(path)
    except (sealed.Unreadable, FileNotFoundError) as error:
        raise BadArgument(f"{error}; delete it, or give another --out") from error


def _accelerator(config: TrainConfig, device: str) -> Accelerator:
    wanted = usable_device(device)
    mixed = "bf16" if config.precision == "bf16" else "no"
    threads = torch.get_num_threads()
    said = {name: value for name in LAUNCHER if (value := os.environ.get(name)) is not None}
    for name, value in said.items():
        if not value.strip().removeprefix("-").isdecimal():
            raise BadArgument(f"the environment says {name}={told(value)}, which is no whole number; unset {name}")
    try:
        accelerator = Accelerator(cpu=wanted.type == "cpu", mixed_precision=mixed)
    except ValueError as error:
        if not said:
            raise
        reason = " ".join(str(error).split())[:200]
        shown = ", ".join(f"{name}={value}" for name, value in said.items())
        raise BadArgument(f"the environment asks for a part in several processes ({shown}): {reason}") from error
    torch.set_num_threads(threads)  # with several processes accelerate chooses another number
    if accelerator.device.type != wanted.type:
        raise BadArgument(
            f"accelerate has chosen {accelerator.device.type}, not {device}; try --device {accelerator.device.type}"
        )
    if config.batch_size % accelerator.num_processes:
        raise BadArgument(
            f"a batch of {config.batch_size} prompts cannot be shared equally by "
            f"{accelerator.num_processes} processes; change --batch-size"
        )
    return accelerator


def mixed(task: Task, config: TrainConfig) -> tuple[Task, ...]:
    """The tasks that ``config.mix`` names; one whose tokens are laid out otherwise than ``task``'s is refused."""
    found = []
    for entry in config.mix:
        other = tasks.build(entry["task"], **entry["task_config"])
        theirs, ours = (f"{model_shape(one)}, tokens {'/'.join(one.kinds)}" for one in (other, task))
        if theirs != ours:
            raise BadArgument(
                f"mix: {other.name} {entry['task_config']} has another layout ({theirs}) than {task.name} ({ours}); "
                "give it the same d and tokens"
            )
        found.append(other)
    return tuple(found)


@torch.no_grad()
def _rehearse(build_model: Callable[[], nn.Module], mix: Sequence[Task], batch_size: int) -> None:
    """One forward on two prompts of each task: a model that does not fit, or a batch, is refused here.

    Later would be too late: a folder that holds a recipe refuses the corrected one.
    """
    generator = torch.Generator().manual_seed(0)
    model = build_model()
    room.check(room.prompts("train", "batch-size", batch_size, mix[0], [model]))
    for task in mix:
        task.training_loss(model, task.sample(2, generator), generator)


def _same_recipe(config: TrainConfig, folder: Path) -> None:
    path = folder / "recipe.json"
    if os.path.lexists(path):
        _content(path)  # nothing that would be waited for
        differs = recipe.difference(config, recipe.read(path))
        if differs:
            raise BadArgument(
                f"{folder} holds another training ({differs}); give another --out, or the recipe in {path}"
            )
    elif os.path.lexists(folder / CHECKPOINT):
        raise BadArgument(f"{folder} holds a model of unknown recipe; give another --out")


def _card(path: Path) -> dict[str, Any]:
    """The card of a checkpoint of which every byte is as it was saved."""
    try:
        stored = sealed.read(path)
        if not stored.sealed and not stored.earlier(stored.tensors()):
            raise sealed.Unreadable(path, "is not sealed: it has no checksum of its header and tensors")
        card = sealed.parsed(stored.metadata.get("card", ""), path, "its card")
    except (sealed.Unreadable, FileNotFoundError) as error:
        reason = error.reason if isinstance(error, sealed.Unreadable) else "is not there"
        raise BadArgument(f"{path} is not a finished checkpoint: it {reason}; delete it to train again") from error
    if not isinstance(card, dict):
        raise BadArgument(f"{path} is not a finished checkpoint: its card is no JSON object; delete it to train again")
    return card


def _search(run: Run) -> list[dict[str, Any]]:
    """Each candidate rate with its validation error (the loss ÷ task.scale), and the same of each validation prompt
    (``losses``): null where the loss blew up.

    The candidates see the same prompts from the same initial weights, each with its own full cosine
    over ``search_each`` steps: comparing prefixes of long schedules instead would favour small rates.
    A finished candidate is kept in ``resume/search.json`` and is not trained again.
    """
    rates, each = run.config.learning_rates, run.config.search_each
    if each == 0:  # nothing is chosen; the card gets the error of the run itself
        return [{"lr": run.config.middle_rate, "validation_error": math.inf, "losses": None}]
    path = run.folder / "resume" / "search.json"
    done = _searched(path)
    for index in range(len(done), len(rates)):
        name = f"search-{index}"
        label = f"search {index + 1} of {len(rates)}, rate {rates[index]:g}"
        try:
            model = fit(run, rates[index], each, name, label=label).model
            losses = validation(run)(model).loss.mean(1)
        except NonFinite:
            losses = torch.full((1,), math.nan, device="cpu")
        if bool(losses.isfinite().all()):
            done.append({"lr": rates[index], "validation_error": float(losses.mean()), "losses": losses.tolist()})
        else:
            done.append({"lr": rates[index], "validation_error": None, "losses": None})
        run.accelerator.wait_for_everyone()
        if run.accelerator.is_main_process:
            write_whole(path, sealed.pack_json({"done": done}))
            (run.folder / "resume" / f"{name}.safetensors").unlink(missing_ok=True)
    if all(cell["validation_error"] is None for cell in done):
        raise RunFailed(
            f"the loss is not finite within {each} steps at any of the learning "
            f"rates {list(rates)}; try much lower --learning-rates in another --out"
        )
    return done


def _searched(path: Path) -> list[dict[str, Any]]:
    """The candidates that the search in ``path`` has finished."""
    if not os.path.lexists(path):
        return []
    try:
        kept, whole = sealed.read_json(path)
        if not whole:
            raise sealed.Unreadable(path, "has no checksum: an earlier version wrote it, or it is damaged")
        return [{key: cell[key] for key in ("lr", "validation_error", "losses")} for cell in kept["done"]]
    except (sealed.Unreadable, FileNotFoundError, KeyError, TypeError) as error:
        reason = error.reason if isinstance(error, sealed.Unreadable) else "is damaged"
        raise BadArgument(f"{path} {reason}; delete it to search again") from error


def compared(tried: list[dict[str, Any]], peak: float) -> list[dict[str, Any]]:
    """The candidates as the card has them: each but the chosen one with ``behind``, the 95 % interval over validation
    prompts of how far its loss is above the chosen one's. Where that reaches 0 chance may have told them apart.
    """
    best = next(cell for cell in tried if cell["lr"] == peak)
    found = []
    for cell in tried:
        row = {key: cell[key] for key in ("lr", "validation_error")}
        if cell is not best and cell["losses"] is not None and best["losses"] is not None:
            behind = paired_difference(np.asarray(cell["losses"]), np.asarray(best["losses"]))
            row["behind"] = [float(behind.low), float(behind.high)]
        found.append(row)
    return found


def _make_card(run: Run, fitted: Fitted, peak: float, tried: list[dict[str, Any]]) -> dict[str, Any]:
    config, task, model = run.config, run.task, fitted.model
    if len(tried) == 1:
        tried = [{"lr": peak, "validation_error": float(validation(run)(model).loss.mean())}]
    else:
        tried = compared(tried, peak)
    return {
        "task": config.task,
        "task_config": dict(task.config),
        "model": config.model,
        "model_config": dict(config.model_config),
        "recipe": config.as_dict(),
        "learning_rate": peak,
        "learning_rates": tried,
        "measured": measured(model, run),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": fitted.steps,
        "seconds": round(fitted.seconds, 1),
        "processes": run.accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "device": run.accelerator.device.type,
        "platform": platform.machine(),
        "versions": versions(),
    }


def measured(model: nn.Module, run: Run) -> dict[str, Any]:
    """Error of the model and of every baseline on the same fresh prompts, in units of task.scale.

    ``{"n", "seed", "purpose", "model": {"k=5": {"error", "standard_error"}, …, "mean": {…}},
    "ols": {…}, …}``. "mean" is over every k of a prompt that is trained; standard errors are over
    prompts. The rivals beyond the baselines (``rivals.extra``) have the reported k only. Where the
    loss is not the error (a classifier's hinge), the model's cells have "loss" too.
    """
    found = measuring(run, EVALUATION_PROMPTS, "evaluate")(model)
    summary: dict[str, Any] = {"n": EVALUATION_PROMPTS, "seed": run.config.seed, "purpose": "evaluate"}
    for name, error in {"model": found.error, **found.rivals}.items():
        loss = None if found.alike or name != "model" else found.loss
        summary[name] = {f"k={k}": _cell(error, loss, [found.ks.index(k)]) for k in run.task.report_ks}
        summary[name]["mean"] = _cell(error, loss, range(len(found.ks)))
    batch = evaluate.prompts(run.task, EVALUATION_PROMPTS, run.config.seed, "evaluate")
    for rival in rivals.build(run.task, rivals.extra(run.task)):
        error = rival.errors(run.task, batch, run.task.report_ks, {})
        summary[rival.name] = {f"k={k}": _cell(error, None, [i]) for i, k in enumerate(run.task.report_ks)}
    return summary


def _cell(
    error: Float[Tensor, "prompt k"], loss: Float[Tensor, "prompt k"] | None, columns: Sequence[int]
) -> dict[str, float]:
    picked = list(columns)
    cell = _mean(error[:, picked].mean(1).double())
    return cell if loss is None else {**cell, "loss": float(loss[:, picked].mean(1).double().mean())}


def _mean(values: Float[Tensor, " prompt"]) -> dict[str, float]:
    spread = values.std() / math.sqrt(len(values))
    return {"error": float(values.mean()), "standard_error": float(spread)}
