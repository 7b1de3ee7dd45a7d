"""What a trained model loses in context when it may no longer choose its time step Δ.

Estimand   the change of in-context error, for each number of examples k and each layer, when Δ is
           replaced: by its mean (a fixed step; B and C still selective), by its mean together with B
           and C (all-mean: time invariance, as in S4), by its mean at each position (keeps the
           schedule, drops the content), by its mean over each kind of token (x and y apart), by
           another prompt's, by 0 at the tokens of one kind (freeze: neither written nor forgotten),
           by c times itself. In all layers at once, in each alone, and in one of Δ's two roles alone
           (forgetting, writing; the mean also in each layer). Means come from reference prompts
           that are not evaluated. Beside it: the nested shares of the variance of log Δ
Controls   the identity edit; the same modes on the output gate, on B and on C; the channels whose Δ
           has most content variance against as many random ones; noise on Δ matched in size and
           token kind; the untrained model; the time-invariant twin and S4D; predictions scored on
           another task's labels; least squares on the same prompts
Not shown  what training without selection would lose (the twin's and S4D's rows are one training
           each); other trainings of this model: the intervals are over prompts
Cost       45 seconds with 256 prompts and 2 idle cores
"""

# Beside this file:
# effects   the ways to replace a signal, and the runs that measure what it costs
# controls  identities, other places and other prompts, for each replacement
# rows      the table
# checks    what must hold for the numbers to mean anything
# figure    the figure, from the result alone

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp import cli
from interp.figures import in_house_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from analyses.ablate_delta.effects import Ablation, Cell
    from analyses.ablate_delta.rows import Rows
    from interp.result import Result
    from interp.tasks import Batch, Task
    from interp.variance import Shares
    from models import Root

__all__ = ["Config", "plot", "run"]


QUICK = 32
RIVALS = ("lti-mamba", "s4d")


@dataclass(frozen=True)
class Config:
    task: str = "linreg"
    "What was learned in context."
    task_config: tuple[str, ...] = ()
    "Options that differ from the checkpoint's own, as name=value, e.g. n_pairs=31."
    model: str | None = None
    "A bundled name or a run folder; mamba-<task> if not given."
    prompts: int = 256
    "Prompts that are evaluated."
    reference: int = 256
    "Other prompts, whose means replace Δ."
    modes: tuple[str, ...] = ()
    "Modes to run, e.g. mean freeze:y scale×2; all if not given."
    layers: tuple[int, ...] = ()
    "Layers to edit alone; every one if not given."
    scales: tuple[float, ...] = (0.25, 0.5, 2.0, 4.0)
    "Factors of the mode scale."
    channel_share: float = 0.125
    "Share of each layer's channels in the control of channels."
    seed: int = 0
    "Chooses the prompts."
    device: str = "cpu"
    "cpu, cuda or mps."
    out: Path = Path("out")
    "Where the result's folder goes."
    quick: bool = False
    "The same with 32 prompts."
    json: bool = False
    "Print result.json instead of the table."

    def __post_init__(self) -> None:
        cli.listed(self)


@dataclass(frozen=True)
class Subject:
    """One model with its task, its reference and its runs on the shared prompts."""

    name: str
    model: Root
    task: Task
    runs: Ablation


def run(config: Config) -> Result:
    """Every cell, control and check of the module's docstring.

    Raises BadArgument for a task, model, mode, layer or device that there is not, and for a task
    whose tokens the checkpoint cannot read.
    """
    from analyses.ablate_delta.checks import all_checks, notes

    began = time.perf_counter()
    import numpy as np

    import models
    from analyses.ablate_delta.effects import cells_of
    from interp import evaluate
    from interp.arguments import between, whole_number
    from interp.machine import provenance, room
    from interp.machine.progress import progress
    from interp.result import Result
    from interp.variance import shares

    count, other_count = (QUICK, QUICK) if config.quick else (config.prompts, config.reference)
    whole_number("prompts", count, least=2)  # resample takes another prompt's step
    whole_number("reference", other_count, least=2)
    between("channel_share", config.channel_share, 1e-6, 1.0)
    name = config.model or f"mamba-{config.task}"
    model, task = _open(name, config)
    asked_for = {"prompts": count, "reference": other_count}
    room.check(
        *(room.prompts("ablate_delta", flag, number, task, [model]) for flag, number in asked_for.items()),
        device=config.device,
    )
    batch = evaluate.prompts(task, count, config.seed, "ablate")
    others = evaluate.prompts(task, other_count, config.seed, "reference")
    subject = _subject(name, model, task, batch, others)
    kinds = subject.runs.reference.present
    cells = cells_of(model, kinds, config.scales, config.modes, config.layers)
    rivals = _rivals(subject, batch, others, config)
    with progress(len(cells) + 16, "ablate_delta") as tick:
        found = subject.runs.sweep(cells, tick)
        controls = _controls(subject, config, tick)
        beside = {rival.name: _beside(rival, tick) for rival in rivals}
    # log Δ of the reference prompts: layer prompt position channel.
    parts = shares(subject.runs.reference.record.stack("*.hook_delta").log().cpu(), others.kinds, seed=config.seed)
    taps = _tap_shares(subject)
    rows = _rows(subject, found, controls, rivals, beside)
    mapped = _map(subject, found, min(2 * task.d, task.n_pairs - 1))
    asked = {key: value for key, value in asdict(config).items() if key not in ("out", "json")}
    seconds = time.perf_counter() - began
    return Result(
        config={**asked, "model": name, "prompts": count, "reference": other_count, "task_config": task.config},
        table=rows.table(list(task.report_ks)),
        arrays={
            "k": np.arange(task.n_pairs),
            **rows.arrays(),
            **mapped,
            **_shares(parts),
            **taps,
        },
        checks=all_checks(subject, controls, rivals, beside, parts, config.seed),
        provenance={
            **provenance.provenance(seed=config.seed, device=config.device, seconds=seconds),
            "weights": {each.name: models.digest(each.model) for each in [subject, *rivals]},
            "notes": notes(subject, taps),
        },
    )


def _open(name: str, config: Config) -> tuple[Root, Task]:
    """The model, and the task of its card with the options of the command line put in."""
    import models
    from hooks.errors import BadArgument
    from interp import cards, tasks
    from interp.arguments import named_values, usable_device

    cards.need_vectors(tasks.build(config.task), "replacing Δ by position")
    model = models.load(name).to(usable_device(config.device))
    task = cards.trained_task(name, model, config.task, named_values("task-config", config.task_config))
    if task.query_only:
        raise BadArgument(
            f'a prompt of "{config.task}" is read at its last token only, and this analysis reads every example; '
            "python -m analyses.attribute_outliers replaces Δ there"
        )
    if task.config.get("tokens", "interleaved") != "interleaved":
        raise BadArgument(
            f"{name} reads joint tokens, one forked step for each example; means by position need all "
            "of a prompt in one forward: train it with --task-config tokens=interleaved"
        )
    return model, task


def _subject(name: str, model: Root, task: Task, batch: Batch, others: Batch) -> Subject:
    from analyses.ablate_delta.effects import Ablation, Reference

    return Subject(name, model, task, Ablation(model, task, batch, Reference(model, others, task.kinds)))


def _rivals(subject: Subject, batch: Batch, others: Batch, config: Config) -> list[Subject]:
    """The untrained model, and the bundled twin and S4D of this task if their tokens are the same."""
    import torch

    import models

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        fresh = models.build(subject.model.architecture, **asdict(subject.model.cfg)).eval()
    found = {"untrained": fresh.to(next(subject.model.parameters()))}
    for name in (f"{stem}-{config.task}" for stem in RIVALS):
        if name in models.names() and name != subject.name:
            rival = models.load(name).to(config.device)
            if (rival.cfg.d_in, rival.cfg.d_out) == (subject.model.cfg.d_in, subject.model.cfg.d_out):
                found[name] = rival
    return [_subject(name, model, subject.task, batch, others) for name, model in found.items()]


def _beside(rival: Subject, tick: Any) -> dict[Cell, Tensor]:
    """The modes in all layers at once, on another model."""
    from analyses.ablate_delta.effects import MEANS, Cell

    return rival.runs.sweep([Cell(mode) for mode in (*MEANS, "resample", "scale×0.5", "scale×2")], tick)


def _controls(subject: Subject, config: Config, tick: Any) -> dict[str, Tensor]:
    """Errors of the subject under each control, by name."""
    from analyses.ablate_delta import controls as make
    from interp.patch.knockout import has_taps

    runs = subject.runs
    changes: dict[str, Any] = {"identity": make.identity(subject.model)}
    if has_taps(subject.model):
        kinds = runs.reference.present
        changes |= {f"freeze:{kind}, taps cut": make.freeze_and_cut_taps(runs, kind) for kind in kinds}
    changes["noise like content"] = make.noise(runs, config.seed)
    for which, edits in make.channel_sets(runs, config.channel_share, config.seed).items():
        changes[f"mean of channels: {which}"] = edits
    found = {}
    for name, edits in changes.items():
        found[name] = runs.under(edits)
        tick()
    return found


def _tap_shares(subject: Subject) -> dict[str, Any]:
    """What freezing leaves of the frozen tokens in the others' taps: kind × share, low, high × layer."""
    import numpy as np

    from analyses.ablate_delta.controls import tap_share
    from interp.patch.knockout import has_taps

    kinds = subject.runs.reference.present
    if not has_taps(subject.model) or len(kinds) < 2:
        return {}
    found = [tap_share(subject.runs, kind) for kind in kinds]
    return {
        "tap_share_kinds": np.array(kinds),
        "tap_share": np.stack([np.stack([each.mean, each.low, each.high]) for each in found]),
    }


def _rows(
    subject: Subject,
    found: Mapping[Cell, Tensor],
    controls: Mapping[str, Tensor],
    rivals: list[Subject],
    beside: Mapping[str, Mapping[Cell, Tensor]],
) -> Rows:
    """Every condition, each against the clean run of its own model; least squares and others last."""
    from analyses.ablate_delta.rows import Condition, Rows

    rows = Rows()
    rows.add(Condition(subject.name, "clean"), subject.runs.clean, subject.runs.clean)
    for cell, error in found.items():
        place = "all" if cell.layer is None else str(cell.layer)
        rows.add(Condition(subject.name, cell.label, cell.signal, cell.role, place), error, subject.runs.clean)
    for name, error in controls.items():
        rows.add(Condition(subject.name, name, "control"), error, subject.runs.clean)
    for rival in rivals:
        rows.add(Condition(rival.name, "clean"), rival.runs.clean, rival.runs.clean)
        for cell, error in beside[rival.name].items():
            rows.add(Condition(rival.name, cell.mode, cell.signal, cell.role), error, rival.runs.clean)
    for name, error in subject.task.baselines(subject.runs.batch).items():
        rows.add(Condition(name, "clean"), error.cpu() / subject.task.scale)
    return rows


def _map(subject: Subject, found: Mapping[Cell, Tensor], k: int) -> dict[str, Any]:
    """Change of error at ``k`` by layer (rows; all of them last) and mode (columns), both roles, with its interval."""
    import numpy as np
    import torch

    from interp.stats import bootstrap

    cells = [cell for cell in found if cell.role == "both" and cell.signal in ("delta", "delta,B,C")]
    modes = list(dict.fromkeys(cell.label for cell in cells))
    places = sorted({cell.layer for cell in cells if cell.layer is not None})
    rows: list[int | None] = [*places, None]
    by = {(cell.label, cell.layer): found[cell] for cell in cells}
    change = torch.stack(
        [torch.stack([by[mode, row][:, k] - subject.runs.clean[:, k] for mode in modes], -1) for row in rows], 1
    )
    moved = bootstrap(change.double().numpy())
    return {
        "map": np.stack([moved.mean, moved.low, moved.high]),
        "map_k": np.array(k),
        "map_modes": np.array(modes),
        "map_layers": np.array(["all" if row is None else str(row) for row in rows]),
    }


def _shares(parts: Shares) -> dict[str, Any]:
    """The variance shares as arrays: share, low, high of each level."""
    import numpy as np

    return {
        "shares": np.stack([parts.share, parts.low, parts.high]),
        "moving": np.stack([parts.moving, parts.moving_low, parts.moving_high]),
    }


@in_house_style(font_scale=1.05)
def plot(result: Result) -> Figure:
    """Error against k for each mode, and for each factor; the change by layer and mode; shares of log Δ's variance."""
    from analyses.ablate_delta.figure import figure

    return figure(result)
