"""How well a task is learned in context: error against the number of examples, beside the best classical methods.

Estimand   mean error of each model and each rival after k examples, on prompts like those of training, on longer ones,
           and under each shift, all on the same prompts; the k from which on it stays below given errors (in nats: from
           which on it stays that close to the Bayes predictor)
Controls   clean error against the card; least squares and averaging against their closed forms where there is no
           noise; what comes after a query, its label first, taken from another prompt: no prediction may change; the
           rivals see the pairs before each query and nothing else, but for the oracles, which are marked "told"
Not shown  other trainings of the same models: the intervals are over prompts; k between those measured where a query
           is special; rivals with options other than the ones named
Cost       30 seconds for the six bundled models of linreg, 512 prompts, six panels and 2 idle cores
"""

# Beside this file:
# errors     of models and rivals on a task, its shifts and longer prompts
# published  the numbers of the papers, with their settings
# rows       the table
# checks     what must hold for the numbers to mean anything
# figure     the figure, from the result alone

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp import cli
from interp.figures import in_house_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from analyses.learning_curves.rows import Drawn
    from interp.result import Result
    from interp.tasks import Task

__all__ = ["Config", "plot", "run"]


QUICK = 64
QUICK_FITTED = 16


@dataclass(frozen=True)
class Config:
    task: str = "linreg"
    "What was learned in context."
    task_config: tuple[str, ...] = ()
    "Options that differ from the checkpoints' own, as name=value, e.g. n_pairs=31."
    models: tuple[str, ...] = ()
    "Bundled names or run folders; all bundled ones of the task if not given, none with the word none."
    rivals: tuple[str, ...] = ()
    "Rivals, as name or name:option=value,...; those that fit the task if not given, none with the word none."
    shifts: tuple[str, ...] = ()
    "A panel for each, as name, name:option=value,... or joined by +; a few usual ones if not given, or the word none."
    longer: int = 2
    "The longest prompts are this many times as long as the task's; 1 leaves them out."
    reach: tuple[float, ...] = (0.1, 0.01)
    "Errors of which the table says from which k on they are reached."
    published: bool = False
    "Draw published numbers where the setting is the same."
    prompts: int = 512
    "Prompts of each panel; longer ones are half as many."
    fitted: int = 64
    "Prompts of a rival that is fitted anew for each prompt and k (lasso, trees, network)."
    seed: int = 0
    "Chooses the prompts."
    device: str = "cpu"
    "cpu, cuda or mps."
    out: Path = Path("out")
    "Where the result's folder goes."
    quick: bool = False
    "The same with 64 prompts, 16 for fitted rivals."
    json: bool = False
    "Print result.json instead of the table."

    def __post_init__(self) -> None:
        cli.listed(self)


def run(config: Config) -> Result:
    """Every curve, table and check of the module's docstring.

    All models see the same prompts: of the first one's task, with the options of ``task_config`` put in. One that was
    trained with other options is noted, and not held against its card. Raises BadArgument for a task, model, rival,
    shift or device that there is not, for a model of another task, and for published numbers of another setting.
    """
    from analyses.learning_curves.checks import all_checks

    began = time.perf_counter()
    import models
    from analyses.learning_curves import errors as curves
    from analyses.learning_curves import published
    from analyses.learning_curves import rows as curve_rows
    from hooks.errors import BadArgument
    from interp import cards, rivals
    from interp.arguments import between, whole_number
    from interp.machine import provenance, room
    from interp.machine.progress import progress
    from interp.machine.workers import side_by_side
    from interp.result import Result

    for level in config.reach:
        between("reach", level, 0.0)
    whole_number("longer", config.longer, least=1)
    prompts = QUICK if config.quick else whole_number("prompts", config.prompts, 8)
    fitted = min(QUICK_FITTED if config.quick else whole_number("fitted", config.fitted, 2), prompts)
    loaded, task = _open(config)
    given = config.rivals or tuple(rivals.usual(task))
    beside = [] if tuple(given) == ("none",) else rivals.build(task, given)
    if not loaded and not beside:
        raise BadArgument("neither models nor rivals are left: give --models or --rivals")
    found, left = curves.settings(task, config.shifts, config.longer, prompts)
    left += cards.differing(loaded, task)
    if config.published and not any(published.of(each.task) for each in found):
        raise BadArgument(
            f"no numbers are published for {task.name} with {_options(task)}; there are some for: "
            + "; ".join(published.settings())
        )
    most = max(found, key=lambda each: each.n_pairs * each.prompts)
    part = room.prompts("learning_curves", "prompts", prompts, task, list(loaded.values()), most.n_pairs)
    room.check(part, device=config.device)
    drawn: list[Drawn] = []
    with progress(len(loaded) + len(found), "learning_curves") as tick:
        jobs = [partial(curves.every, name, model, found, config.seed) for name, model in loaded.items()]
        every = side_by_side(jobs, tick, config.device)
        for i, setting in enumerate(found):
            lines = []
            for name, made in zip(loaded, every, strict=True):
                curve = made[i]
                if curve is None:
                    left.append(f"{name} reads no prompts of {setting.n_pairs} pairs")
                else:
                    lines.append(curve)
            of_rivals, failed = curves.rival_errors(beside, setting, config.seed, fitted)
            left += [f"no {who} on {setting.name}: {reason}" for who, reason in failed.items()]
            lines += of_rivals
            tick()
            drawn.append(curve_rows.drawn(setting, lines, published.of(setting.task) if config.published else []))
    if not drawn[0].curves:
        raise BadArgument("; ".join(left))
    shown = {curve.who for curve in drawn[0].curves}
    asked = {key: value for key, value in asdict(config).items() if key not in ("out", "json")}
    resolved = {"models": list(loaded), "rivals": [each.name for each in beside], "prompts": prompts, "fitted": fitted}
    return Result(
        config={**asked, **resolved, "shifts": [each.name for each in found], "task_config": task.config},
        table=curve_rows.table(drawn, config.reach),
        arrays=curve_rows.arrays(drawn),
        checks=all_checks(loaded, [each for each in beside if each.name in shown], task, drawn, config.seed),
        provenance={
            **provenance.provenance(seed=config.seed, device=config.device, seconds=time.perf_counter() - began),
            "weights": {name: models.digest(model) for name, model in loaded.items()},
            "notes": left,
        },
    )


def _open(config: Config) -> tuple[dict[str, Any], Task]:
    """The models by name, and the task of the first with the options of the command line put in.

    The others may have been trained with other options, as long as they read these tokens: ``run`` notes it.
    """
    import models
    from hooks.errors import BadArgument
    from interp import cards, tasks
    from interp.arguments import named_values, usable_device

    device = usable_device(config.device)
    options = named_values("task-config", config.task_config)
    plain = tasks.build(config.task, **options)
    names = list(config.models)
    if names == ["none"]:
        return {}, plain
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise BadArgument(f"the model {doubled[0]} is given twice; give each once")
    found = {name: models.load(name) for name in names or models.names()}
    if not names:
        found = {name: found[name] for name in cards.alike(found, config.task)}
    if not found:
        return {}, plain
    first = next(iter(found))
    task = cards.trained_task(first, found[first], config.task, options)
    for name, model in found.items():
        cards.trained_task(name, model, config.task, task.config)
    return {name: model.to(device) for name, model in found.items()}, task


def _options(task: Task) -> str:
    return " ".join(f"{key}={value}" for key, value in task.config.items())


# --- checks -----------------------------------------------------------------------------------


# --- figure -----------------------------------------------------------------------------------


@in_house_style()
def plot(result: Result) -> Figure:
    """A panel for each setting: models in colour, rivals in grey, published numbers as rings."""
    from analyses.learning_curves.figure import figure

    return figure(result)
