"""How a model's answer comes about over its blocks, and which algorithm it is.

Estimand   (1) the lens: each block's residual stream at the query through the model's own norm and
           head, with a scale and a shift fitted on m points of each prompt, error on other queries
           of the same context; the scales and shifts; the same without fitting. Of symbols (markov):
           a scale and a shift of each symbol's log p, fitted on other prompts for all together, error
           over the last examples. Each block's share of the decrease of the error, and of its
           logarithm. (2) R² of ridge probes, after each
           block, from the residual at the query and from the recurrent state, to the task's
           variables. (3) The distance of each block's prediction to gradient descent (over means
           and over sums) after t steps, GD++, Newton, online descent (of residuals and of labels),
           ridge, least squares, k-NN, averaging; of symbols, to counting estimators of other orders,
           priors and memories. Rates, penalties and the like are fitted to the prediction on half of
           the prompts, once as it is and once with a scale and a shift (of symbols: a power), and
           judged on the other half; over all numbers of examples and after each. A name is given only
           to what leaves at most 1 % of the prediction's spread, ties are called ties, and "none of
           these" is an answer.
           (4) Error after each block and each number k of examples, up to twice as many as in training
Controls   the floor of the fit, by formula and of a feature drawn at random; the labels of another
           w or chain; the same architecture with random weights in the lens and the probes; shuffled
           targets and running sums in the probes; least squares (counting) on another w's labels
           (chain's symbols) and the labels themselves in the matching; the lens after the last block
           against the model itself
Not shown  whether what can be read is used (ablate_delta edits, this only reads); what a probe that
           is not linear could read; other trainings: the intervals are over prompts
Cost       30 seconds with 256 prompts and 2 idle cores
"""

# Beside this file:
# families  the algorithms that are tried, as functions of their settings
# fitting   settings fitted to predictions
# symbols   the algorithms where a prediction is a distribution over symbols
# matching  predictions after each block against solvers and classical methods
# readings  the measurements: lens with floors, probes, map over blocks and examples
# rows      the table
# figure    the figure
# checks    what must hold for the numbers to mean anything

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

    from analyses.probe_layers.readings import Subject
    from interp.result import Result

__all__ = ["Config", "plot", "run"]


QUICK = 64


@dataclass(frozen=True)
class Config:
    task: str = "linreg"
    "What was learned in context."
    task_config: tuple[str, ...] = ()
    "Options that differ from the checkpoint's own, as name=value, e.g. n_pairs=31."
    model: str | None = None
    "A bundled name or a run folder; mamba-<task> if not given."
    prompts: int = 256
    "Prompts of the lens; probes, matching and map take twice as many others."
    k: int | None = None
    "Examples in the context of lens and probes; as many as in training if not given."
    m: int = 10
    "Queries of each prompt that fit its scale and shift; 6 or more. Not used where tokens are integers."
    queries: int = 20
    "Other queries of each prompt, on which the lens is judged; where tokens are integers, its last examples."
    seed: int = 0
    "Chooses the prompts."
    device: str = "cpu"
    "cpu, cuda or mps."
    out: Path = Path("out")
    "Where the result's folder goes."
    quick: bool = False
    "The same with 64 prompts."
    json: bool = False
    "Print result.json instead of the table."

    def __post_init__(self) -> None:
        cli.listed(self)


def run(config: Config) -> Result:
    """Every part and check of the module's docstring.

    Raises BadArgument for a task, model or device that there is not, for m below 6, a k that the model cannot read,
    and a task whose tokens the checkpoint cannot read.
    """
    from analyses.probe_layers.checks import all_checks, notes

    began = time.perf_counter()
    import numpy as np
    import torch

    import models
    from analyses.probe_layers import readings as layers
    from analyses.probe_layers import rows as layer_rows
    from interp import lens
    from interp.arguments import whole_number
    from interp.machine import provenance, room
    from interp.machine.progress import progress
    from interp.machine.workers import side_by_side
    from interp.result import Result

    m, queries = whole_number("m", config.m, lens.LEAST_M), whole_number("queries", config.queries, 1)
    prompts = QUICK if config.quick else whole_number("prompts", config.prompts, 32)
    subject = _subject(config)
    asked_for = room.prompts("probe_layers", "prompts", prompts, subject.task, [subject.model])
    query = room.of_sites(subject.model, 1) * room.QUERY
    parts = [replace(asked_for, each=asked_for.each + queries * query)]
    if queries > prompts:  # then it is they that are too many
        parts = [asked_for, room.Part("queries", queries, prompts * query)]
    room.check(*parts, device=config.device)
    # Side by side, no two may use the same model.
    second, third = (
        replace(subject, model=deepcopy(subject.model), untrained=deepcopy(subject.untrained)) for _ in range(2)
    )
    jobs: list[Callable[[], Any]] = [
        partial(layers.through_lens, subject, prompts, m, queries),
        partial(layers.probes, second, 2 * prompts),
        partial(layers.error_map, third, 2 * prompts),
    ]
    with torch.no_grad(), progress(len(jobs) + 1, "probe_layers") as tick:
        seen, probes, levels = side_by_side(jobs, tick, config.device)
        found = layers.candidates(subject, levels)
        ks = sorted({*subject.task.report_ks, levels.trained - 1})
        matches, by_k = layers.matches(levels, found, ks, config.seed, config.device)
        tick()
    asked = {key: value for key, value in asdict(config).items() if key not in ("out", "json")}
    resolved = {"model": subject.name, "prompts": prompts, "k": subject.k, "task_config": subject.task.config}
    rows = layer_rows.lens_rows(seen, m) + layer_rows.probe_rows(probes)
    rows += layer_rows.match_rows(matches, by_k, ks) + layer_rows.map_rows(levels, subject)
    checks = all_checks(subject, seen, probes, levels, found, config)
    seconds = time.perf_counter() - began
    return Result(
        config={**asked, **resolved},
        table=layer_rows.table(rows, subject.name),
        arrays={
            **layer_rows.lens_arrays(seen),
            **layer_rows.probe_arrays(probes),
            **layer_rows.match_arrays(matches, by_k, found, levels),
            **layer_rows.map_arrays(levels),
            "metric": np.array(subject.task.metric),
        },
        checks=checks,
        provenance={
            **provenance.provenance(seed=config.seed, device=config.device, seconds=seconds),
            "weights": models.digest(subject.model),
            "last block": layer_rows.last_block(matches),
            "notes": notes(subject, probes, levels),
        },
    )


def _subject(config: Config) -> Subject:
    import torch

    import models
    from analyses.probe_layers.readings import Subject
    from hooks.errors import BadArgument
    from interp import cards
    from interp.arguments import named_values, usable_device, whole_number
    from interp.tasks.outlier_linreg import OutlierLinearRegression

    name = config.model or f"mamba-{config.task}"
    device = usable_device(config.device)
    model = models.load(name).to(device)
    task = cards.trained_task(name, model, config.task, named_values("task-config", config.task_config))
    if isinstance(task, OutlierLinearRegression):
        raise BadArgument(
            f'the lens asks several queries after one context, and in "{config.task}" a query may be an outlier of its '
            "own; python -m analyses.attribute_outliers looks into it"
        )
    alpha = getattr(task, "alpha", None)
    if alpha is not None:
        raise BadArgument(
            f"alpha={alpha}: the lens asks several queries after one context, and a fixed share of outliers would "
            "be counted over both; leave alpha out (p_a contaminates each example by itself)"
        )
    k = task.n_pairs - 1 if config.k is None else whole_number("k", config.k, 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        fresh = models.build(model.architecture, **asdict(model.cfg)).eval()
    subject = Subject(name, model, fresh.to(next(model.parameters())), task, k, config.seed, config.device)
    if k >= subject.longest:
        raise BadArgument(f"k={k}: prompts of at most {subject.longest} pairs are read here; give a smaller k")
    return subject


# --- checks -----------------------------------------------------------------------------------


# --- figure -----------------------------------------------------------------------------------


@in_house_style()
def plot(result: Result) -> Figure:
    """Lens, scale and shift, shares of the decrease; probes of residual and state, nearest algorithms, map."""
    from analyses.probe_layers.figure import figure

    return figure(result)
