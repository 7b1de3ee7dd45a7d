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
Cost       20 seconds with 256 prompts and 2 idle cores
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp import cli
from interp.figures import in_house_style

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

    from interp.layers.families import Candidates
    from interp.layers.readings import Lens, Map, Probed, Subject
    from interp.result import Check, Result

QUICK = 64
NAMES = {
    "w": "w", "w_ols": "least-squares estimate", "Xty": "Xᵀy", "y": "y",
    "direction": "direction", "label": "label", "Xty_clean": "Xᵀy of clean ones", "n_clean": "number of clean ones",
    "table": "transition table", "estimate": "its Bayes estimate", "row": "row in force", "counts": "counts of pairs",
}  # fmt: skip
"""What the figure calls the targets of the probes."""
DISTANCE = "distance: Σ (ŷ − algorithm)² ÷ Σ (ŷ − mean)²"
NAMED = ("name", "said", "clear")
NONE = "none of these"
OFF = 3.3
"""Largest distance that is drawn; a constant has 1."""
FP32 = 1e-4
"""Largest difference between two fp32 paths of one function, relative to the largest value."""


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

    __post_init__ = cli.listed


def run(config: Config) -> Result:
    """Every part and check of the module's docstring.

    Raises BadArgument for a task, model or device that there is not, for m below 6, a k that the model cannot read,
    and a task whose tokens the checkpoint cannot read.
    """
    began = time.perf_counter()
    import numpy as np
    import torch

    import models
    from interp import provenance, room
    from interp.arguments import whole_number
    from interp.layers import lens
    from interp.layers import readings as layers
    from interp.layers import rows as layer_rows
    from interp.progress import progress
    from interp.result import Result
    from interp.workers import side_by_side

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
    checks = _checks(subject, seen, probes, levels, found, config)
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
            "notes": _notes(subject, probes, levels),
        },
    )


def _subject(config: Config) -> Subject:
    import torch

    import models
    from hooks.errors import BadArgument
    from interp import cards
    from interp.arguments import named_values, usable_device, whole_number
    from interp.layers.readings import Subject
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


def _notes(subject: Subject, probes: list[Probed], levels: Map) -> list[str]:
    """One line for each part that this model or task leaves out."""
    from interp.layers import readings as layers

    notes = []
    if not any(one.features == "state" for one in probes):
        notes.append(f"{subject.name} has no recurrent state: probes read the residual stream only")
    if subject.symbols:
        notes.append(f"{subject.task.name} has symbols: the lens is fitted for all prompts together, m is not used")
    elif not subject.regression:
        notes.append(f"{subject.task.name} is no regression: the lens is not fitted")
    if not (subject.linear or subject.chain):
        notes.append(f"{subject.task.name} has neither a w nor a transition table: no algorithm is matched")
    elif levels.trained < 2:
        notes.append("prompts of one pair have no context: no algorithm is matched")
    if subject.symbols and not layers.targets_of(subject.task):
        notes.append(f"{subject.task.name} has no variable to probe for")
    if alike := sorted({one.target for one in probes} ^ set(layers.targets_of(subject.task)), reverse=True):
        notes.append(f"after {subject.k} examples {', '.join(alike)} are the same for every prompt: not probed")
    if levels.raw.shape[-1] < 2 * subject.task.n_pairs:
        notes.append(f"{subject.name} reads at most {levels.raw.shape[-1]} pairs: the map ends there")
    return notes


# --- checks -----------------------------------------------------------------------------------


def _checks(
    subject: Subject,
    seen: Lens,
    probes: list[Probed],
    levels: Map,
    found: Candidates | None,
    config: Config,
) -> list[Check]:
    """What must hold for the numbers to mean anything."""
    import numpy as np
    import torch

    from hooks.inputs import fed
    from interp import cards
    from interp.evaluate import predictions
    from interp.layers import lens
    from interp.layers import readings as layers
    from interp.metric import rounding
    from interp.result import Check
    from interp.stats import ratio

    task, model, checks = subject.task, subject.model, []
    part = levels.batch.take(slice(0, 32))
    whole = predictions(model, task, part)
    moved = float((levels.decoded[-1, :32] - whole).abs().max() / whole.abs().max())
    checks.append(
        Check.at_most("map after the last block against the model itself, relative", moved, rounding(model, FP32))
    )
    if not subject.symbols:
        batch = subject.sample(32, 0, subject.k + 2)
        run = torch.cat([lens.context_tokens(batch, subject.k), lens.query_tokens(batch)[:, -1:]], dim=1)
        with torch.no_grad():
            direct = model(fed(model, run))[:, -1, 0]
        forked = lens.forks(model, batch, subject.k).decoded[-1, :, -1]
        moved = float((forked - direct).abs().max() / direct.abs().max())
        checks.append(
            Check.at_most("lens after the last block against a run of its own, relative", moved, rounding(model, FP32))
        )
    if model.card.get("task_config") == task.config:
        for k, gap in cards.gaps(model.card, {k: levels.raw[-1, :, k] for k in task.report_ks}).items():
            checks.append(Check.at_most(f"error at k={k} against the card, in standard errors", gap, 4.0))
    if probes:
        blind = float(np.mean([one.probe.controls["shuffled"].mean for one in probes]))
        checks.append(Check.at_most("probes of shuffled targets: mean R²", blind, 0.02))
    floors = {"other labels": seen.other_labels, "untrained weights": seen.untrained}
    if subject.symbols:
        # Random weights still show which symbols have come, and that tells something of the next.
        least = seen.floor
        del floors["untrained weights"]
    elif seen.variance is not None and subject.regression:
        spread = seen.variance.cpu().numpy()
        ours = ratio(seen.nothing.double().cpu().numpy(), spread)
        gap = abs(float(ours.mean) - lens.floor(config.m)) / max(float(ours.high - ours.low) / 3.92, 1e-12)
        checks.append(Check.at_most("floor, formula against a feature drawn at random, in standard errors", gap, 4.0))
        # Of a feature that is linear in x and knows nothing of w, the fit still uses its 1/d in common with w.
        least = (1 - 1 / task.d) * float(spread.mean())
    else:
        least = 0.5
    for name, values in floors.items():
        below = (least - float(values[-1].mean())) / max(float(values[-1].std()) / values.shape[1] ** 0.5, 1e-12)
        checks.append(Check.at_most(f"{name}: lens after the last block below chance, in standard errors", below, 4.0))
    if found is not None:
        what, wrong = layers.elsewhere(subject, levels)
        own = levels.answers[-1][:, : levels.trained]
        level = float((wrong - own)[:, 1:].square().mean() / own[:, 1:].square().mean())
        checks.append(Check.at_least(f"distance to {what}", level, 0.9))
    return checks


# --- figure -----------------------------------------------------------------------------------


@in_house_style()
def plot(result: Result) -> Figure:
    """Lens, scale and shift, shares of the decrease; probes of residual and state, nearest algorithms, map."""
    import numpy as np

    from interp import plot as draw

    arrays, config = result.arrays, result.config
    blocks = np.arange(arrays["lens_fitted"].shape[1])
    figure, panels = draw.grid([(1.2, 0.9, 1.1, 1.15), (0.85, 0.85, 1.1, 0.95)], heights=(3.8, 4.4), width=17.0)
    lens, fit, decrease, mapped, residual, state, match, match_k = panels
    _draw_lens(lens, arrays, blocks, draw)
    symbols = len(arrays["rivals"]) > 0
    fitted = {"scale a": "scale"} if symbols else {"scale a": "scale", "shift b": "shift"}
    draw.curves(fit, blocks, {name: tuple(arrays[key]) for name, key in fitted.items()}, floor=None)
    draw.baseline(fit, blocks, np.ones(len(blocks)), "no scaling" if symbols else "no scaling, no shift", style=1)
    draw.baseline(fit, blocks, np.zeros(len(blocks)), "_", style=1)
    fit.set_ylabel("scale a in log softmax(a z + b)" if symbols else "y ≈ a ŷ + b, median over prompts")
    shares = {"error": tuple(arrays["share"])} if symbols else {}
    shares = shares or {"error": tuple(arrays["share"]), "log error": tuple(arrays["factor"])}
    draw.bars(
        decrease,
        [str(b) for b in blocks[1:]],
        {name: ends for name, ends in shares.items() if np.isfinite(ends[0]).all()},
        even=1 / max(1, len(blocks) - 1),
    )
    decrease.set_ylabel("share of the decrease")
    draw.level_map(
        mapped,
        arrays["map"],
        [str(b) for b in blocks],
        label=f"{arrays['metric']}, not fitted",
        edge=float(arrays["map_trained"]) - 0.5,
    )
    mapped.set_xlabel("examples seen, k (beyond the line: more than in training)")
    mapped.set_ylabel("block")
    _draw_probes(residual, arrays, "residual", draw)
    _draw_probes(state, arrays, "state", draw)
    _draw_matches(match, match_k, arrays, blocks, draw)
    for panel in (lens, fit, residual, state, match):
        panel.set_xlabel("block (0: before the first)")
    decrease.set_xlabel("block")
    for panel in (lens, fit, match):
        panel.set_xticks(blocks)
    for panel in (lens, fit, decrease):
        panel.legend(frameon=False, fontsize=7)
    # Panels side by side share their lines, so one legend does for both; it stands at the last one that has any.
    for pair in ((residual, state), (match, match_k)):
        drawn = [panel for panel in pair if panel.lines]
        if drawn:
            drawn[-1].legend(frameon=False, fontsize=6.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    panels[0].set_ylabel(str(arrays["metric"]))
    figure.suptitle(_title(result), fontsize=10.5)
    how = f"m = {config['m']} points fit, {config['queries']} judge"
    if symbols:
        how = f"as many others fit, the last {config['queries']} examples judge"
    figure.supxlabel(
        f"n = {config['prompts']} prompts (lens; {how}), "
        f"{2 * config['prompts']} others (probes: a quarter judges; matching: half; map); k = {config['k']}; "
        "bands and lines: 95 % bootstrap over prompts; * the one that fits, (*) with ties, none: nothing fits",
        fontsize=7.5,
        color="0.35",
    )
    return draw.settle(figure)


def _draw_lens(axes: Any, arrays: Mapping[str, Any], blocks: np.ndarray, draw: Any) -> None:
    import numpy as np

    regression, rivals = bool(arrays["lens_refit"]), [str(name) for name in arrays["rivals"]]
    other = "labels of another w" if regression else "labels of another prompt"
    if rivals:
        other = "symbols of another chain"
    named = {"as the model says it": "lens_raw", "untrained weights": "lens_untrained", other: "lens_other_labels"}
    lowest = min(float(arrays["lens_fitted"].min()), float(arrays["lens_raw"].min()))
    floor = max(1e-4, 0.3 * lowest) if regression and not rivals else None
    if regression:
        named = {"scale and shift fitted": "lens_fitted", **named}
    draw.curves(axes, blocks, {name: tuple(arrays[key]) for name, key in named.items()}, floor=floor)
    level = np.full(len(blocks), float(arrays["lens_floor"]))
    nothing = "chance" if not regression else "knows nothing (fitted)" if rivals else "knows nothing (formula)"
    draw.baseline(axes, blocks, level, nothing)
    # One who knows nothing is drawn already.
    for style, (name, value) in enumerate(zip(rivals, arrays["rival_errors"], strict=True), start=1):
        if name != "uniform":
            draw.baseline(axes, blocks, np.full(len(blocks), float(value)), name, style=style)
    for style, (name, key) in enumerate({"GD, a step a block": "descent_gd", "GD++": "descent_gdpp"}.items(), start=2):
        if key in arrays:
            draw.baseline(axes, blocks, arrays[key], name, style=style)


def _draw_probes(axes: Any, arrays: Mapping[str, Any], features: str, draw: Any) -> None:
    import numpy as np

    ks, name = arrays["probe_ks"], f"probe_{features}"
    late = arrays.get(f"{name}_{ks[-1]}") if len(ks) else None
    if late is None:
        axes.set_axis_off()
        axes.text(0.5, 0.5, f"no {features} to probe", ha="center", transform=axes.transAxes)
        return
    targets = [str(target) for target in arrays["probe_targets"]]
    at = np.arange(late.shape[-1]) + (0 if features == "residual" else 1)
    # With as many pairs as unknowns least squares is w: it is drawn where the pairs do not determine it.
    lines = {NAMES[t]: tuple(late[i]) for i, t in enumerate(targets) if t != "w_ols" or len(ks) == 1}
    if "w_ols" in targets and len(ks) > 1:
        lines[f"{NAMES['w_ols']}, k = {ks[0]}"] = tuple(arrays[f"{name}_{ks[0]}"][targets.index("w_ols")])
    draw.curves(axes, at, lines, floor=None)
    first = NAMES[targets[0]]
    draw.baseline(axes, at, arrays[f"{name}_{ks[-1]}_shuffled"][0, 0], f"{first}, shuffled")
    draw.baseline(axes, at, arrays[f"{name}_{ks[-1]}_untrained"][0, 0], f"{first}, untrained", style=1)
    sums = np.full(len(at), arrays[f"probe_sums_{ks[-1]}"][0, 0, 0])
    draw.baseline(axes, at, sums, f"{first}, from running sums", style=3)
    axes.set_xticks(at)
    axes.set_ylim(-0.28, 1.05)
    axes.set_ylabel(f"R² of a ridge probe from the {features}")


def _draw_matches(axes: Any, by_k: Any, arrays: Mapping[str, Any], blocks: np.ndarray, draw: Any) -> None:
    """Distances by block, and of the last block by number of examples, with the nearest named."""
    import numpy as np

    if "match" not in arrays:
        for panel in (axes, by_k):
            panel.set_axis_off()
        axes.text(0.5, 0.5, "no algorithm is matched", ha="center", transform=axes.transAxes)
        return
    names = [str(name) for name in arrays["match_families"]]
    for panel, x, key in ((axes, blocks, "match"), (by_k, 1 + np.arange(arrays["match_by_k"].shape[-1]), "match_by_k")):
        # Beyond the panel there is nothing to compare; the band of what diverges on one prompt would cover the rest.
        shown = np.where(arrays[key][:, :1] > OFF, np.nan, arrays[key])
        drawn = {name: tuple(ends) for name, ends in zip(names, shown, strict=True) if name != "zero"}
        positive = [float(mean[mean > 0].min()) for mean, *_ in drawn.values() if (mean > 0).any()]
        lowest = 0.5 * max(min(positive, default=1.0), 1e-7)
        draw.curves(panel, x, drawn, floor=lowest)
        fit = np.full(len(x), float(arrays["match_fit"]))
        draw.baseline(panel, x, np.ones(len(x)), "a constant")
        draw.baseline(panel, x, fit, "largest of a name", style=1)
        named, room = None, (x[-1] - x[0]) / 30
        for at, name, said, clear in zip(x, *(arrays[f"{key}_{part}"] for part in NAMED), strict=True):
            # Many numbers of examples: named where it changes, and where there is room.
            if named is not None and (at - named[0] < room or (len(x) > 40 and named[1] == name)):
                continue
            named = (at, name)
            text = str(said).split(", not told apart")[0] if name != NONE else "none"
            mark = "* " if clear else "(*) " if name != NONE else ""
            place = {"rotation": 90, "ha": "center", "va": "bottom", "fontsize": 6}
            panel.text(at, lowest / 2500, f"{mark}{text}", **place)
        panel.set_ylim(lowest / 4000, OFF)
    axes.set_ylabel("distance: Σ (p̂ − algorithm)² ÷ Σ (p̂ − mean)²" if len(arrays["rivals"]) else DISTANCE)
    by_k.set_xlabel(f"examples seen, k (block {blocks[-1]}, each k alone)")


def _title(result: Result) -> str:
    """The sentence that the figure supports, made from its numbers."""
    import numpy as np

    from interp.plot import called

    arrays, config = result.arrays, result.config
    fitted, share, words = arrays["lens_fitted"], arrays["share"], str(arrays["profile_words"][0])
    (before, *between), (after, *end) = fitted[:, 0], fitted[:, -1]
    blocks = share.shape[1]
    way = {
        "steady": "steadily",
        "stepwise": "in few steps",
        "neither steady nor stepwise": "neither evenly nor in few steps",
        "flat": "without a clear decrease",
        "rising": "with an increase",
    }.get(words, "too few blocks to call it even or stepwise")
    largest = int(np.argmax(share[0]))
    what, digits = ("nats go", 3) if len(arrays["rivals"]) else ("error goes", 2)
    text = (
        f"{called(config['model'])}, {config['k']} examples: over {blocks} blocks the {what} from {before:.{digits}g} "
        f"[{between[0]:.{digits}g}, {between[1]:.{digits}g}] to {after:.{digits}g} "
        f"[{end[0]:.{digits}g}, {end[1]:.{digits}g}], {way}"
    )
    if words not in ("flat", "rising"):
        ends = f"[{share[1, largest]:.0%}, {share[2, largest]:.0%}]"
        text += f"; the largest share is block {largest + 1}'s, {share[0, largest]:.0%} {ends}"
    if "match_name" in arrays:
        text += f";\n{_named(arrays)}"
    return text


def _named(arrays: Mapping[str, Any]) -> str:
    """Which algorithm the last block's predictions are, as they are; and with a scale, where that says more."""

    def left(key: str) -> str:
        mean, low, high = (float(end) for end in arrays[f"{key}_nearest"][:, -1])
        return f"{_percent(mean)} [{_percent(low)}, {_percent(high)}] of their spread left"

    name, scaled = (str(arrays[f"{key}_name"][-1]) for key in ("match", "match_scaled"))
    said, scaled_said = (str(arrays[f"{key}_said"][-1]) for key in ("match", "match_scaled"))
    if not math.isfinite(arrays["match_nearest"][0, -1]):
        return "the last block's predictions are the same for every prompt: no algorithm"
    text = f"the last block's predictions, as they are, fit {said}: {left('match')}"
    if name == NONE:
        nearest = said.removeprefix(f"{NONE}, ")
        text = (
            f"none of the algorithms tried fits the last block's predictions as they are ({nearest}: {left('match')})"
        )
        if scaled != NONE:
            text += f"; scaled, {scaled_said} does: {left('match_scaled')}"
    return text


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 10 else f"{100 * share:.0f} %"


if __name__ == "__main__":
    raise SystemExit(cli.main(sys.modules[__name__]))
