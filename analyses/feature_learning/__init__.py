"""Whether a model finds the direction of a single-index function in its prompt, and by which nonlinearity.

Estimand   y = g(⟨β, x⟩) + noise, β drawn for each prompt. (1) Error against the number k of pairs, of the model and of
           kernel ridge (RBF, polynomial), kernel ridge told the r coordinates that β lives in, kernel ridge told
           ⟨β, x⟩, and the posterior mean told subspace and link. (2) R² of a ridge probe from the state of each layer
           to β; to ββᵀ where the link is even, since then nothing tells β from −β. (3) The label transform of each
           layer's write Δ B x: what it makes of the label before it adds it to the state, with its Hermite
           coefficients in z = ⟨β, x⟩ (degree 1 finds β, degree 2 where the link is even), the same with Δ at its
           mean, and Δ by itself. (4) The same with Δ constant, with softplus's tangent, and with z as output gate in
           place of SiLU(z): each retrained, where there is a checkpoint, and each only ablated
Controls   untrained weights in (2) and (3); shuffled β; running sums of y x, and of (y, y², tanh y) x; the label itself
           in (3), whose coefficients are the link's; a planted transform and one without the label, among the checks;
           each edit against the model of that config with the same weights
Not shown  whether the model uses the β that can be read; what one token's write takes from the context (deeper layers
           are averaged over it); other bends than Δ's, such as SiLU on x, the norm, and B x, one by one; other
           trainings: intervals are over prompts. Ablated says what these weights need, not what can be learned
Cost       30 seconds with 256 prompts, 4 layers and 2 idle cores
"""

# Beside this file:
# study      the measurements: error against k, the direction in the states, what each variant loses
# rivals     kernel ridge, and the methods that know the subspace or the direction
# transform  Hermite coefficients of the label transform that the selection gate applies
# variants   a constant step, a tangent step, a linear gate: retrained, or put into a trained model
# rows       the table
# checks     what must hold for the numbers to mean anything
# figure     the figure, from the result alone

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp import cli
from interp.figures import in_house_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from analyses.feature_learning.rows import All
    from analyses.feature_learning.study import Found, Subject
    from interp.result import Result
    from models import Root

__all__ = ["Config", "plot", "run"]


QUICK = 48


@dataclass(frozen=True)
class Config:
    task: str = "single_index"
    "What was learned in context; only single_index has a direction to find."
    model: str | None = None
    "A bundled name or a run folder; mamba-<task> if not given."
    variants: tuple[str, ...] = ()
    "Of constant-step, tangent-step, linear-gate (retrained where a bundled one fits the model), or folders; all three."
    prompts: int = 256
    "Prompts whose error counts; the probes take twice as many others, the writes a quarter."
    components: int = 96
    "Principal components of a state that a probe may use."
    seed: int = 0
    "Chooses the prompts."
    device: str = "cpu"
    "cpu, cuda or mps."
    out: Path = Path("out")
    "Where the result's folder goes."
    quick: bool = False
    "The same with 48 prompts and 24 components."
    json: bool = False
    "Print result.json instead of the table."

    def __post_init__(self) -> None:
        cli.listed(self)


def run(config: Config) -> Result:
    """Every part and check of the module's docstring.

    Raises BadArgument for another task, a model that is no published Mamba, a variant that there is not, and a
    retrained model of another variant or task.
    """
    from analyses.feature_learning.checks import all_checks

    began = time.perf_counter()
    import models
    from analyses.feature_learning import rows as feature_rows
    from interp.machine import provenance
    from interp.machine.workers import threads
    from interp.result import Result

    name, every, notes = _measured(config)
    with threads(1):  # many small pieces
        checks = all_checks(every)
    plan, trained = every.asked, [one.subject for one in every.found if one.subject.how in ("trained", "retrained")]
    given = {key: value for key, value in asdict(config).items() if key not in ("out", "json")}
    effective = {"prompts": len(plan.batch), "components": plan.components, "task_config": plan.task.config}
    return Result(
        config={**given, **effective, "model": name},
        table=feature_rows.table(every, name),
        arrays=feature_rows.arrays(every),
        checks=checks,
        provenance={
            **provenance.provenance(seed=config.seed, device=config.device, seconds=time.perf_counter() - began),
            "weights": {one.name: models.digest(one.model) for one in trained},
            "notes": notes,
            "kernel ridge": {family: list(chosen) for family, chosen in every.settings.items()},
        },
    )


def _measured(config: Config) -> tuple[str, All, list[str]]:
    """The model's name, everything that was measured, and what is left out."""
    from analyses.feature_learning import rivals as feature_rivals
    from analyses.feature_learning import study as feature_study
    from analyses.feature_learning.rows import All
    from analyses.feature_learning.study import HELD, STEP, WRITE, study
    from interp import evaluate
    from interp.arguments import whole_number
    from interp.machine import room
    from interp.machine.progress import progress
    from interp.machine.workers import side_by_side, threads

    prompts = QUICK if config.quick else whole_number("prompts", config.prompts, 32)
    components = min(24, config.components) if config.quick else whole_number("components", config.components, 1)
    name, model, task = _open(config)
    subjects, notes = _subjects(config, name, model)
    room.check(room.prompts("feature_learning", "prompts", prompts, task, [model]), device=config.device)
    # One thread each: many small pieces, at which several wait for each other longer than they work.
    with progress(len(subjects) + len(feature_rivals.FAMILIES) + 1, "feature_learning") as tick:
        with threads(1):
            asked = feature_study.plan(task, prompts, components, config.seed)
            means = feature_study.mean_steps(model, asked)
        jobs: list[Callable[[], Found]] = []
        for subject in subjects:
            whole = subject.variant is None
            ks, whats = (asked.ks, (WRITE, HELD, STEP)) if whole else (asked.ks[-1:], (WRITE,))
            # Only ablated is the trained model itself under an edit: side by side, no two may use the same.
            own = deepcopy(subject.model) if subject.how == "ablated" else subject.model
            jobs.append(partial(study, replace(subject, model=own, means=means), asked, ks, whats))
        ran = side_by_side(jobs, tick, config.device, each=1)
        found = [
            replace(one, subject=replace(subject, means=means)) for one, subject in zip(ran, subjects, strict=True)
        ]
        tune = evaluate.prompts(task, max(48, (3 * prompts) // 4), config.seed, "validation")
        families = list(feature_rivals.FAMILIES)
        tunings = [partial(feature_rivals.kernel_ridge, task, tune, asked.batch, family) for family in families]
        tuned = side_by_side(tunings, tick, each=1)
        rivals = {family: one.error for family, one in zip(families, tuned, strict=True)}
        settings = {family: one.settings for family, one in zip(families, tuned, strict=True)}
        with threads(1):
            rivals[feature_rivals.TOLD_ALL] = feature_rivals.posterior(task, asked.batch, config.seed)
            every = All(asked, found, rivals, settings, feature_study.running_sums(asked))
        tick()
    return name, every, notes


def _open(config: Config) -> tuple[str, Root, Any]:
    """The model's name, the model, and the task that it was trained on."""
    import models
    from analyses.feature_learning.variants import variant_of
    from hooks.errors import BadArgument
    from interp import tasks
    from interp.arguments import usable_device

    tasks.build(config.task)
    if config.task != "single_index":
        raise BadArgument(f'feature_learning is about the direction of "single_index"; "{config.task}" has none')
    name = config.model or f"mamba-{config.task}"
    model = models.load(name).to(usable_device(config.device))
    _trained_on(name, model, None)
    if model.architecture != "mamba" or not model.cfg.selective:
        raise BadArgument(f"{name} is no selective Mamba: there is no step, B and C whose parts could be told apart")
    own = variant_of(model.cfg)
    if own is not None:
        raise BadArgument(f"{name} is the {own} variant: give it as --variants, and the published block as --model")
    return name, model, tasks.build(config.task, **model.card["task_config"])


def _trained_on(name: str, model: Any, task_config: Any) -> None:
    """Nothing, or a BadArgument for a model of another task."""
    from hooks.errors import BadArgument
    from interp import cards

    trained_on = model.card.get("task")
    if trained_on != "single_index":
        raise BadArgument(f'{name} was trained on "{trained_on}", not on "single_index"')
    differs = [] if task_config is None else cards.differ(model.card["task_config"], task_config)
    if differs:
        own = model.card["task_config"]
        said = ", ".join(f"{key}={own.get(key)} instead of {task_config.get(key)}" for key in differs)
        raise BadArgument(f"{name} was trained on another single_index than the model: {said}")


def _subjects(config: Config, name: str, model: Root) -> tuple[list[Subject], list[str]]:
    """Trained, untrained, then each variant only ablated and retrained; and a note for each that is not there."""
    import torch

    import models
    from analyses.feature_learning.study import Subject
    from analyses.feature_learning.variants import VARIANTS, variant_of
    from hooks.errors import BadArgument
    from interp import cards

    retrained: dict[str, Subject] = {}
    for entry in config.variants or tuple(VARIANTS):
        bundled = f"mamba-{entry}-{config.task}"
        source = bundled if entry in VARIANTS else entry
        loaded = models.load(source).to(config.device) if source != bundled or bundled in models.names() else None
        # A run folder of another task is refused; a bundled one is only not there.
        fits = loaded is not None and not cards.differ(loaded.card["task_config"], model.card["task_config"])
        if entry in VARIANTS and not fits:
            retrained.setdefault(entry, Subject(bundled, "missing", None, entry))
            continue
        assert loaded is not None
        _trained_on(source, loaded, model.card["task_config"])
        variant = variant_of(loaded.cfg)
        if variant is None:
            raise BadArgument(f"{source} is the published block and no variant; there is {', '.join(VARIANTS)}")
        retrained[variant] = Subject(source, "retrained", loaded, variant)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        fresh = models.build(model.architecture, **asdict(model.cfg)).eval().to(next(model.parameters()))
    subjects = [Subject(name, "trained", model), Subject(name, "untrained", fresh)]
    notes = []
    for variant, one in retrained.items():
        subjects.append(Subject(name, "ablated", model, variant))
        if one.how == "retrained":
            subjects.append(one)
        else:
            notes.append(
                f"{variant} is only ablated: there is no {one.name} for this task's options; "
                f"python -m analyses.train --recipe {one.name} with --task-config trains one for --variants"
            )
    return subjects, notes


# --- checks -----------------------------------------------------------------------------------


# --- figure -----------------------------------------------------------------------------------


@in_house_style()
def plot(result: Result) -> Figure:
    """Error against k; the variants' errors; β read by k; the variants' reading; the label transform, its degrees."""
    from analyses.feature_learning.figure import figure

    return figure(result)
