"""Train a model to learn in context, by a recipe; killed at any moment, the same command goes on.

As in ``python -m analyses.train --recipe mamba-linreg``, which remakes a bundled checkpoint. Flags that are
given replace the recipe's fields; without ``--recipe`` they start from the defaults. The folder
``--out`` then holds ``model.safetensors`` (load it with ``models.load(folder)``), ``recipe.json``
and ``metrics.jsonl``. Under ``accelerate launch`` on GPUs, or ``torchrun -m`` on CPUs, several
processes share every batch.

Estimand   the error of the trained model at k = d, 2d, 4d examples on 1280 fresh prompts
Controls   least squares and the task's other estimators on the same prompts; every learning rate
           that was tried, compared on validation prompts
Not shown  the spread between trainings: one run is one seed
Cost       a bundled recipe about an hour on 2 cores; --quick a minute or two
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp import cli

if TYPE_CHECKING:
    from interp.tasks.base import Task
    from interp.training.train import TrainConfig, Trained
    from models import Root

__all__ = ["Config", "run"]


RECIPES = Path(__file__).resolve().parents[1] / "recipes"


@dataclass(frozen=True)
class Config:
    recipe: str | None = None
    "A recipe of analyses/recipes, a cell of a sweep there, or a JSON file."
    task: str | None = None
    "What is learned in context, e.g. linreg."
    task_config: tuple[str, ...] = ()
    "Options of the task, as name=value, e.g. d=5 n_pairs=21."
    model: str | None = None
    "The architecture, e.g. mamba."
    model_config: tuple[str, ...] = ()
    "Options of the model, as name=value, e.g. d_model=64 n_layers=8."
    steps: int | None = None
    "Optimizer steps."
    batch_size: int | None = None
    "Prompts per step, over all processes together."
    learning_rates: tuple[float, ...] = ()
    "Peak learning rates: one, or at least three of which a search picks the best; the architecture's own if none."
    search_steps: int | None = None
    "Steps for which each of several learning rates is tried; all together no more than the training's."
    warmup: float | None = None
    "Fraction of the steps with a rising learning rate; half a cosine follows."
    floor: float | None = None
    "Final learning rate as a fraction of the peak."
    weight_decay: float | None = None
    "AdamW's decay, on matrices only."
    grad_clip: float | None = None
    "Largest norm of the gradient; 0 for no clipping."
    curriculum: float | None = None
    "Fraction of the steps over which dimensions and pairs grow to their full number."
    seed: int | None = None
    "Chooses the initial weights and every prompt."
    save_every: int | None = None
    "Steps between two checkpoints from which a killed run goes on."
    eval_every: int | None = None
    "Steps between two lines of metrics.jsonl."
    patience: int | None = None
    "Evaluations in a row without a lower validation loss after which the run ends; 0 for all its steps."
    mix: tuple[str, ...] = ()
    "Tasks to draw from besides, with equal chance, as name or name:option=value,option=value."
    precision: str | None = None
    "fp32 or bf16; what accelerate launch says, otherwise the recipe."
    out: Path | None = None
    "The run's folder; out/train/… otherwise. The same command with the same folder goes on."
    device: str = "cpu"
    "cpu, cuda or mps."
    threads: int | None = None
    "Threads of the computation: the same number gives the same weights. torch's own if not given."
    attached: bool = False
    "Save and stop when standard input ends: for a run that belongs to another program."
    quick: bool = False
    "The same with a hundredth of the steps, to see that it works."
    json: bool = False
    "Print the card of the finished model as JSON."

    def __post_init__(self) -> None:
        cli.listed(self)


def run(config: Config) -> Trained:
    """Train, or go on, and return the finished run. Raises BadArgument or RunFailed."""
    import torch

    from hooks.errors import BadArgument
    from interp.training.train import train
    from models import checkpoint

    if config.threads is not None:
        if not 1 <= config.threads <= 1024:
            raise BadArgument(f"--threads is {config.threads}; give a number from 1 to 1024")
        torch.set_num_threads(config.threads)
    recipe = resolve(config)
    task, build = parts(recipe)
    out = config.out or Path("out") / "train" / _folder(config, recipe)
    if config.attached:
        if sys.stdin is None:
            raise BadArgument(
                "--attached stops when standard input ends, and it is closed; give a pipe, or leave it out"
            )
        threading.Thread(target=_stop_with_stdin, daemon=True).start()
    return train(build, task, recipe, out, checkpoint.save, device=config.device, say=cli.say)


def parts(recipe: TrainConfig) -> tuple[Task, Callable[[], Root]]:
    """The task of a recipe and a function that builds its model; raises BadArgument where there is no such task."""
    from functools import partial

    import models
    from interp import tasks
    from interp.tasks.base import model_shape
    from models import checkpoint

    task = tasks.build(recipe.task, **recipe.task_config)
    checkpoint.check_card(recipe.as_dict())
    return task, partial(models.build, recipe.model, **{**model_shape(task), **recipe.model_config})


def _stop_with_stdin() -> None:
    """Wait for the end of standard input, then ask this process to stop as SIGTERM does."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def resolve(config: Config) -> TrainConfig:
    """The recipe that a command line asks for: the named one, with the given flags put in."""
    from hooks.errors import BadArgument
    from interp.arguments import named_values
    from interp.training.recipe import TrainConfig, from_dict

    values: dict[str, Any] = {}
    if config.recipe is not None:
        values = named(config.recipe).as_dict()
    elif config.task is None or config.model is None:
        raise BadArgument(
            "nothing to train: give --recipe NAME, or --task and --model; recipes: " + ", ".join(recipes())
        )
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if config.precision is None and launched != "no":
        values["precision"] = launched
    nested = ("task_config", "model_config")
    for field in fields(TrainConfig):
        given = getattr(config, field.name, None)
        if field.name in nested:
            options = named_values(field.name.replace("_", "-"), given or ())
            values[field.name] = {**values.get(field.name, {}), **options}
        elif field.name == "mix" and given:
            values["mix"] = [_mixed(text) for text in given]
        elif given not in (None, ()):
            values[field.name] = given
    recipe = from_dict(values, config.recipe or "the command line")
    if config.quick:
        fewer = {name: max(20, getattr(recipe, name) // 100) for name in ("steps", "search_steps")}
        recipe = from_dict({**recipe.as_dict(), **fewer})
    return recipe


def _mixed(text: str) -> dict[str, Any]:
    """``name:option=value,option=value`` as an entry of a recipe's mix."""
    from interp.arguments import name_and_options

    name, options = name_and_options("mix", text)
    return {"task": name, "task_config": options}


def recipes() -> list[str]:
    """Names of the bundled recipes that are files of their own."""
    return sorted(path.stem for path in RECIPES.glob("*.json"))


def sweeps() -> list[str]:
    """Names of the bundled sweeps; each of their cells is a recipe too."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def named(name: str) -> TrainConfig:
    """The recipe called ``name``: a bundled file, else a cell of a bundled sweep, else the JSON file at that path."""
    from hooks.errors import BadArgument, unknown
    from interp.training import cells as sweep
    from interp.training.recipe import read

    if name in recipes():
        return read(RECIPES / f"{name}.json")
    if name.endswith(".json"):
        return read(Path(name))
    cells = {cell.name: cell for of in sweeps() for cell in sweep.read(RECIPES / f"{of}.yaml").cells}
    if name in cells:
        return cells[name].recipe
    raise BadArgument(unknown("recipe", name, [*recipes(), *cells], "or give a JSON file"))


def _folder(config: Config, recipe: TrainConfig) -> str:
    """The default folder, a function of the recipe: so the same command finds its own run."""
    import hashlib
    import json

    text = json.dumps(recipe.as_dict(), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    bundled = config.recipe is not None and not config.recipe.endswith(".json")
    name = config.recipe if bundled else f"{recipe.task}-{recipe.model}"
    return f"{name}-{digest}"
