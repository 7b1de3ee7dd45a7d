"""How much a share of outliers in the prompt costs, why outliers weigh less than clean examples, and by which means.

Estimand   error at the clean query against the share α of contaminated context examples, for each rule of their labels
           and each placement (far from the query, random, close), for every model of the task and for the hand-set
           one-layer models of the theory (a reference, not trained). Then in one model and layer, at one α: the vote of
           each context example for its own label (to first order through the scan, with its write knocked out, and
           with the example left out); what outliers lose against their clean twins, split over match (B, C), write,
           value, forgetting and output gate by Shapley values over 32 exchanges; the selection gate G (write × later
           decays) against closeness. Then what becomes of prediction and error when the outliers' Δ or output gate is
           put at the clean mean, the clean ones' at the outliers', each of Δ, gate, x, (B, C) at the twin's own value,
           and when outliers are knocked out of the scan, of the convolution's taps, of both; and the share of the
           error that outliers cause which each of these undoes (1: as good as clean examples in the outliers' place)
Controls   as many random clean examples edited in the same way; the outliers' own mean; the identity edit; the
           untrained model; shuffled outlier flags; the prompts without their outliers; the vote over examples with the
           query's pattern, the oracle that knows the outliers, and chance
Not shown  other trainings of these models: intervals are over prompts. First-order parts hold the rest of the network
           at its slope, and leave out what reaches the query by the residual stream and D x; the gap is in the table
Cost       30 seconds with 256 prompts and 2 idle cores; outlier_linreg 50
"""

# Beside this file:
# prompts  prompts with and without outliers that differ in nothing else
# parts    the measurements: weights of tokens, gates, interventions by token kind
# factors  a token's contribution as a product of factors, and each factor's share
# gate     the selection gate at outliers and at clean tokens
# edits    what is replaced at outliers only, with controls
# rows     the table
# figure   the figure
# checks   what must hold for the numbers to mean anything

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp import cli
from interp.figures import in_house_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from analyses.attribute_outliers.parts import Findings
    from interp.result import Result
    from interp.tasks import Task
    from models import Root

__all__ = ["Config", "plot", "run"]


QUICK = {"outliers": 48, "outlier_linreg": 40}
"""The former has twice as many kinds of token to average at each place."""
KNOCKED = 64
"""The most prompts whose writes are knocked out one by one: a run of the model for each token."""
QUICK_KNOCKED = 20
ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
PLAIN, ONLINE = "theory, gate-free (hand-set)", "theory, online gradient (hand-set)"
STEMS = ("mamba", "mamba-1layer", "linear-transformer", "transformer", "s4", "s4d")
QUICK_STEMS = ("mamba", "s4d")
CLEAN_TASK = {"outlier_linreg": "linreg"}
"""The task without outliers whose models may be asked the task with them."""


@dataclass(frozen=True)
class Config:
    task: str = "outliers"
    "What was learned in context: outliers or outlier_linreg."
    task_config: tuple[str, ...] = ()
    "Options that differ from the checkpoint's own, as name=value, e.g. n_pairs=41 outside=true orthogonal=0.5."
    model: str | None = None
    "The model that is looked into; mamba-<task> if not given."
    models: tuple[str, ...] = ()
    "The models that are compared; if not given, the bundled ones of the task and the hand-set ones of the theory."
    alphas: tuple[float, ...] = ALPHAS
    "Shares of outliers of the curve."
    rules: tuple[str, ...] = ("flip", "one", "coin")
    "Labels of the outliers, where the task has rules; the first is used for all but the curve."
    alpha: float = 0.5
    "Share of outliers of everything but the curve."
    layers: tuple[int, ...] = (0,)
    "Layers that are looked into; the figure shows the first."
    prompts: int = 256
    "Prompts that are evaluated."
    seed: int = 0
    "Chooses the prompts."
    device: str = "cpu"
    "cpu, cuda or mps."
    out: Path = Path("out")
    "Where the result's folder goes."
    quick: bool = False
    "The same with 48 prompts (40 in outlier_linreg), 20 with knock-outs by token; with two models where none is named."
    json: bool = False
    "Print result.json instead of the table."

    def __post_init__(self) -> None:
        cli.listed(self)


@dataclass(frozen=True)
class Subjects:
    """The model that is looked into, those that are compared (itself among them), and the task as it was trained."""

    name: str
    models: Mapping[str, Root]
    task: Task
    """With the options of the command line."""
    trained: Task
    """As the cards say."""

    @property
    def model(self) -> Root:
        return self.models[self.name]

    def measured(self) -> dict[str, Root]:
        """The models with a card."""
        return {name: model for name, model in self.models.items() if model.card}


def run(config: Config) -> Result:
    """Curve, placement, contributions, split, gate, interventions and checks of the module's docstring.

    Raises BadArgument for a task, model, layer, rule, share or device that there is not, and for models that were
    trained on different tasks.
    """
    from analyses.attribute_outliers.checks import all_checks

    began = time.perf_counter()
    import numpy as np

    import models
    from analyses.attribute_outliers.parts import GATED, Findings, gate_rows, used, why
    from analyses.attribute_outliers.prompts import draw
    from hooks.errors import BadArgument
    from interp.arguments import between, whole_number
    from interp.machine import provenance, room
    from interp.machine.progress import progress
    from interp.machine.workers import side_by_side
    from interp.result import Result

    for alpha in (*config.alphas, config.alpha):
        between("alpha", alpha, 0.0, 1.0)
    subjects = _open(config)
    count = QUICK[subjects.task.name] if config.quick else config.prompts
    whole_number("prompts", count, least=2)
    part = room.prompts("attribute_outliers", "prompts", count, subjects.task, [subjects.model])
    room.check(part, device=config.device)
    for layer in config.layers:
        if not 0 <= layer < len(subjects.model.blocks):
            raise BadArgument(f"there is no layer {layer}: {subjects.name} has {len(subjects.model.blocks)}")
    untrained = _untrained(subjects, config)
    changes = {"rule": config.rules[0]} if config.rules and "rule" in subjects.task.config else {}
    prompts, others = (
        draw(subjects.task, count, config.seed, purpose, config.alpha, **changes) for purpose in ("ablate", "reference")
    )
    knocked = min(count, QUICK_KNOCKED if config.quick else KNOCKED)
    name, model = subjects.name, subjects.model
    # Each part on a copy of its own: side by side, no two may use the same model.
    apart = replace(subjects, models={**subjects.models, name: deepcopy(model)})
    jobs = [
        *(partial(_part, why, name, deepcopy(model), prompts, layer, knocked, config.seed) for layer in config.layers),
        partial(_part, used, name, deepcopy(model), prompts, others, config.seed),
        partial(_part, used, "untrained", untrained, prompts, others, config.seed),
        partial(_part, _errors, apart, list(_conditions(subjects.task, config)), count, config),
    ]
    found = Findings()
    with progress(len(jobs), "attribute_outliers") as tick:
        for one in side_by_side(jobs, tick, config.device):
            found.take(one)
    if GATED in subjects.models:
        gate_rows(found, GATED, subjects.models[GATED], prompts, 0)
    checks = all_checks(found, subjects, untrained, count, config.seed)
    asked = {key: value for key, value in asdict(config).items() if key not in ("out", "json")}
    given = {"model": subjects.name, "models": list(subjects.models), "prompts": count}
    seconds = time.perf_counter() - began
    return Result(
        config={**asked, **given, "task_config": subjects.task.config},
        table=found.rows.table(),
        arrays={"alphas": np.array(config.alphas), **found.arrays},
        checks=checks,
        provenance={
            **provenance.provenance(seed=config.seed, device=config.device, seconds=seconds),
            "weights": {name: models.digest(model) for name, model in subjects.models.items()},
        },
    )


def _part(work: Callable[..., None], *given: Any) -> Findings:
    """What ``work`` finds, apart from all else."""
    from analyses.attribute_outliers.parts import Findings

    found = Findings()
    work(found, *given)
    return found


def _open(config: Config) -> Subjects:
    """The models, and their task; models of different tasks, or of one task with different options, are refused."""
    import models
    from analyses.attribute_outliers.prompts import share_of
    from hooks.errors import BadArgument
    from interp import cards, tasks
    from interp.arguments import named_values, usable_device

    share_of(tasks.build(config.task))
    device = usable_device(config.device)
    own = CLEAN_TASK.get(config.task)
    name = config.model or next(
        (one for one in (f"mamba-{config.task}", f"mamba-{own}") if one in models.names()), f"mamba-{config.task}"
    )
    first = models.load(name).to(device).eval()
    trained_on = first.card.get("task")
    if trained_on not in (config.task, own):
        raise BadArgument(f'{name} was trained on "{trained_on}", not on "{config.task}"')
    bundled = [one for stem in STEMS if (one := f"{stem}-{trained_on}") in models.names()]
    given = list(config.models) or ([] if config.model and config.model not in bundled else bundled)
    if config.quick and not config.models:
        given = [one for one in given if one.removesuffix(f"-{trained_on}") in QUICK_STEMS]
    found = {name: first}
    for other in given:
        if other not in found:
            found[other] = models.load(other).to(device).eval()
    clean = cards.common_task(found, str(trained_on))
    card = first.card["task_config"]
    task = tasks.build(config.task, **{**card, **named_values("task-config", config.task_config)})
    if (task.d_token, task.d_out) != (first.cfg.d_in, first.cfg.d_out):
        raise BadArgument(f"{name} reads tokens of {first.cfg.d_in} numbers and this task has {task.d_token}")
    if not config.models:
        found |= {each: model.to(device).eval() for each, model in _theory(task).items()}
    return Subjects(name, found, task, clean)


def _theory(task: Task) -> dict[str, Any]:
    """The one-layer models of the theory with weights set by hand for this task, where they read its tokens."""
    import torch

    from analyses.attribute_outliers.parts import GATED
    from models.theory import online_gradient, pattern_vote

    whole: Any = task
    with torch.random.fork_rng(devices=[]):
        if hasattr(task, "v_star"):
            return {GATED: pattern_vote(whole.mu, whole.v_star), PLAIN: pattern_vote(whole.mu, None)}
        if getattr(task, "tokens", "") == "joint" and task.n_pairs > 1:
            return {ONLINE: online_gradient(task.d, task.n_pairs - 1)}
    return {}


def _untrained(subjects: Subjects, config: Config) -> Root:
    import torch

    import models

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        fresh = models.build(subjects.model.architecture, **asdict(subjects.model.cfg))
    return fresh.to(next(subjects.model.parameters())).eval()


@dataclass(frozen=True)
class Condition:
    """A share of outliers with options of the task, and the part of the table that its errors belong to."""

    part: str
    label: str
    alpha: float
    changes: Mapping[str, Any]


def _conditions(task: Task, config: Config) -> Iterator[Condition]:
    """Every rule and α; the first rule with outliers outside those of training; the placements at one α."""
    from interp.arguments import one_of
    from interp.tasks.outliers import PLACEMENTS, RULES

    rules: list[dict[str, Any]] = [{}]
    if "rule" in task.config:
        rules = [{"rule": one_of("rule", rule, RULES)} for rule in config.rules] or [{"rule": task.config["rule"]}]
    sets = [(str(rule.get("rule", "outliers")), rule) for rule in rules]
    if task.config.get("outside") is False and task.config.get("V") == 3:
        sets.append((f"{sets[0][0]}, outliers outside training", {**rules[0], "outside": True}))
    for label, changes in sets:
        for alpha in config.alphas:
            yield Condition("curve", label, alpha, changes)
    if "placement" in task.config:
        for place in PLACEMENTS:
            yield Condition("placement", place, config.alpha, {**rules[0], "placement": place})


def _errors(found: Findings, subjects: Subjects, conditions: list[Condition], count: int, config: Config) -> None:
    """The error of every model and baseline under each condition.

    A model reads the prompts of all conditions in one go: most of the time of small batches is overhead.
    """
    import torch

    from analyses.attribute_outliers.prompts import share_of
    from interp import evaluate, tasks

    share = share_of(subjects.task)
    drawn = []
    for condition in conditions:
        changes = {**condition.changes, share: condition.alpha}
        task = tasks.build(subjects.task.name, **{**subjects.task.config, **changes})
        drawn.append((condition, task, evaluate.prompts(task, count, config.seed)))
    if not drawn:
        return
    batches = [batch.last() for _, _, batch in drawn]
    fields = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in ("tokens", "targets", "x", "y")}
    every = replace(batches[0], **fields, truth={})
    for name, model in subjects.models.items():
        predicted = evaluate.predictions(model, subjects.task, every, query_only=True).split(count)
        for (condition, task, batch), part in zip(drawn, predicted, strict=True):
            _error_row(found, name, condition, task.error(part, batch.last())[:, -1])
    for condition, task, batch in drawn:
        for name, errors in task.baselines(batch).items():
            _error_row(found, name, condition, errors[:, -1] / task.scale)


def _error_row(found: Findings, name: str, condition: Condition, error: Tensor) -> None:
    from analyses.attribute_outliers.rows import level

    found.rows.add(condition.part, name, condition.label, "error", level(error), alpha=condition.alpha)


@in_house_style()
def plot(result: Result) -> Figure:
    """Error against α; placement, else what knock-outs undo; votes, their split, the gate; what edits change."""
    from analyses.attribute_outliers.figure import figure

    return figure(result)
