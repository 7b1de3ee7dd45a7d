"""Train a whole grid, models × tasks × seeds × sizes, from one recipe; what is finished is kept.

As in ``python -m analyses.sweep zoo --workers 2 --threads 1``, which trains the bundled grid; a YAML file is one of
yours (its fields: ``interp/training/cells.py``). Every cell is a training of ``analyses.train`` in its own
folder ``out/sweep/<name>/<cell>``. The same command goes on after a kill, keeps finished cells as
they are, and tries failed ones again. A failed cell does not end the sweep: its reason is in the
table, and the exit code is 1 at the end.

Estimand   error of each trained model at the k that its task reports, on 1280 fresh prompts
Controls   the best classical method on the same prompts; parameters, learning rates and prompts alike
           for the models of one task; the error of every checkpoint on yet other prompts
Not shown  with one seed, the spread between trainings; error at every k (learning_curves)
Cost       the sum of its cells: those of zoo take 2 to 49 minutes each, together two and a half hours with two workers
"""

# Beside this file:
# local    processes of this machine
# cluster  the same commands as tasks of a Ray cluster
# rows     the table
# figure   the figure, from the result alone

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from interp import cli
from interp.figures import in_house_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from analyses.sweep.local import Job, Outcome
    from interp.result import Result
    from interp.training.cells import Cell, Sweep

__all__ = ["Config", "plot", "run"]


QUICK = 20
FRESH = 256
"""Prompts on which every checkpoint is measured once more."""


@dataclass(frozen=True)
class Config:
    recipe: Annotated[str, cli.Positional]
    "A sweep of analyses/recipes, e.g. zoo, or a YAML file."
    engine: Literal["local", "ray"] = "local"
    "Processes of this machine, or a Ray cluster (pip install 'mambascope[cluster]')."
    workers: int = 1
    "Trainings at a time; of a running Ray cluster its CPUs decide."
    threads: int = 1
    "Threads of each training: the same number gives the same weights."
    address: str | None = None
    "A running Ray cluster, e.g. auto; its nodes need this folder under the same path. One is started if not given."
    device: str = "cpu"
    "cpu, cuda or mps."
    out: Path = Path("out")
    "Where the runs and the result's folder go."
    quick: bool = False
    "The same with 20 steps a cell, in folders of their own, to see that it works."
    json: bool = False
    "Print result.json instead of the table."

    def __post_init__(self) -> None:
        cli.listed(self)


def run(config: Config) -> Result:
    """Train what is missing, and return the table of all cells.

    Raises BadArgument for a sweep that makes no sense, before anything is trained; RunFailed at the
    end where cells failed, with the table of the others written.
    """
    began = time.perf_counter()
    import models
    from analyses.sweep import rows as sweep_rows
    from hooks.errors import RunFailed
    from interp.machine import provenance
    from interp.machine.progress import progress
    from interp.result import Result
    from interp.training.train import finished

    of = read(config)
    folder = (config.out / "sweep" / of.name).absolute()
    missing = [cell for cell in of.cells if not _kept(cell, folder)]
    jobs = _jobs(missing, folder, config)
    with progress(len(jobs), f"sweep {of.name}") as tick:
        outcomes = _engine(config)(jobs, config.workers, tick) if jobs else {}
    failed = {name: outcome.reason for name, outcome in outcomes.items() if not outcome.ok}
    done = [cell for cell in of.cells if cell.name not in failed]
    cards = {cell.name: finished(cell.recipe, folder / cell.name) or {} for cell in done}
    trained = {cell.name: models.load(folder / cell.name) for cell in done}
    distance = {cell.name: _distance(cell, trained[cell.name], config.device) for cell in done}
    result = Result(
        config={
            "task": of.name,
            "models": list(dict.fromkeys(cell.model for cell in of.cells)),
            "quick": config.quick,
            "cells": {cell.name: cell.recipe.as_dict() for cell in of.cells},
        },
        table=sweep_rows.table(of.cells, cards, failed),
        checks=sweep_rows.checks(of.cells, cards, failed, distance),
        provenance={
            **provenance.provenance(seed=0, device=config.device, seconds=time.perf_counter() - began),
            "weights": {name: models.digest(model) for name, model in trained.items()},
        },
    )
    if failed:
        # Without one finished cell there is nothing to draw.
        saved = (
            cli.saved(sys.modules[__name__], result, config.out) if done else result.save(config.out, analysis="sweep")
        )
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise RunFailed(
            f"{len(failed)} of {len(of.cells)} cells failed ({reasons}); the table of all is in {saved.folder}, "
            f"what a failed one said in {folder / 'logs'}; the same command tries it again"
        )
    return result


def read(config: Config) -> Sweep:
    """The sweep that is asked for; every task, mix and model of it can be built."""
    import dataclasses

    import torch

    from analyses.train import RECIPES, parts, sweeps
    from hooks.errors import BadArgument, unknown
    from interp.arguments import usable_device, whole_number
    from interp.training import cells as sweep
    from interp.training.train import mixed

    whole_number("workers", config.workers, 1, 1024)
    whole_number("threads", config.threads, 1, 1024)
    usable_device(config.device)
    if config.address is not None and config.engine != "ray":
        raise BadArgument(f"--address {config.address} is a Ray cluster's; add --engine ray")
    if config.recipe.endswith((".yaml", ".yml")):
        path = Path(config.recipe)
    elif config.recipe in sweeps():
        path = RECIPES / f"{config.recipe}.yaml"
    else:
        raise BadArgument(unknown("sweep", config.recipe, sweeps(), "or give a YAML file"))
    found = sweep.read(path)
    if config.quick:
        fewer = {"steps": QUICK, "search_steps": QUICK}
        short = [
            dataclasses.replace(cell, recipe=dataclasses.replace(cell.recipe, **fewer))  # type: ignore[arg-type]
            for cell in found.cells
        ]
        found = sweep.Sweep(f"{found.name}-quick", tuple(short))
    for cell in found.cells:
        try:
            task, build = parts(cell.recipe)
            mixed(task, cell.recipe)
            with torch.random.fork_rng(devices=[]):
                build()
        except BadArgument as error:
            raise BadArgument(f"{path}: cell {cell.name}: {error}") from error
    return found


def _kept(cell: Cell, folder: Path) -> bool:
    """Whether the cell's checkpoint is there, of this very recipe, and nothing is left to tidy up."""
    from interp.training.train import finished

    return finished(cell.recipe, folder / cell.name) is not None and not (folder / cell.name / "resume").exists()


def _jobs(cells: Sequence[Cell], folder: Path, config: Config) -> list[Job]:
    """One command of analyses.train for each cell, with its recipe written beside the runs."""
    from analyses.sweep.local import Job
    from interp.machine.files import strict_json, writable_folder, write_whole

    jobs = []
    for cell in cells:
        recipe = writable_folder(folder / "recipes") / f"{cell.name}.json"
        write_whole(recipe, strict_json(cell.recipe.as_dict(), indent=2) + "\n")
        flags = ("--threads", str(config.threads), "--device", config.device, "--attached")
        where = ("--recipe", str(recipe), "--out", str(folder / cell.name))
        arguments = ("-m", "analyses.train", *where, *flags)
        jobs.append(Job(cell.name, arguments, folder / cell.name, folder / "logs" / f"{cell.name}.txt"))
    return jobs


def _engine(config: Config) -> Callable[[Sequence[Job], int, Callable[[], Any]], Mapping[str, Outcome]]:
    from analyses.sweep import cluster as sweep_ray
    from analyses.sweep import local as sweep_local

    if config.engine == "local":
        return sweep_local.run
    return partial(sweep_ray.run, threads=config.threads, address=config.address)


def _distance(cell: Cell, model: Any, device: str) -> float:
    """How far the error on prompts of another seed is from the card's, in standard errors of the difference."""
    from interp import evaluate, tasks

    task = tasks.build(cell.recipe.task, **cell.recipe.task_config)
    error = evaluate.errors(model.to(device), task, FRESH, cell.seed + 1, query_only=task.query_only).double().mean(1)
    said = model.card["measured"]["model"]["mean"]
    spread = float((error.var() / FRESH + said["standard_error"] ** 2).sqrt())
    return abs(float(error.mean()) - said["error"]) / max(spread, 1e-9)


@in_house_style(font_scale=1.05)
def plot(result: Result) -> Figure:
    """Error by task and model at the middle k of each task: the mean over seeds, each seed, the best rival."""
    from analyses.sweep.figure import figure

    return figure(result)
