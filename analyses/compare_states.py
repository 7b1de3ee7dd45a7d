"""What the states of several models hold after the same prompts, and for how long.

Estimand   for each model, layer and number of examples k: how much of the task's variables a ridge probe reads from the
           state (equal numbers of principal components, prompts that it was not fitted on); how alike the models'
           states are, layer against layer (debiased CKA, SVCCA, Procrustes); the effective rank of vec(h) across
           prompts, and of a prompt's own d_inner × d_state matrix; what is left of a write by the product of decays,
           and the half-lives in it (of a channel's slowest mode; at the rate at which it loses what it holds), beside
           the total derivative ∂h_t/∂x_s through everything; how much of ln ā follows the content; tokens that reset a
           channel; the norm of the state up to and beyond the trained length, with the error beside it; how much of
           the prediction comes along when a state is put into another prompt
Controls   shuffled targets; the same architecture untrained; what adding up y x and x xᵀ would give; permuted prompts
           (family-wise over all pairs of layers); decays moved to other tokens of the prompt; a swap of nothing, and of
           everything against the other context in one run; states rebuilt from decays and writes; derivatives against
           differences
Not shown  another training of the same model; what is in the state but not linearly, or in directions of little
           variance (the table has the best layer by number of components); whether a model uses what can be read:
           only the swaps say
Cost       47 seconds with 256 prompts, three models of 8 layers and 2 idle cores
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp import cli

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from interp.result import Check, Result
    from interp.similarity import Similarity
    from interp.states.study import Plan, Study
    from interp.tasks import Task
    from models import Root

    Alike = Mapping[tuple[int, int], Mapping[str, Similarity]]

QUICK = 40
STEMS = ("mamba", "lti-mamba", "s4d")
FP32 = 1e-4
"""Largest difference between two fp32 paths of one function, relative to the largest value."""


@dataclass(frozen=True)
class Config:
    task: str = "linreg"
    "What was learned in context."
    models: tuple[str, ...] = ()
    "Two or more bundled names or run folders; those of mamba-, lti-mamba- and s4d-<task> that there are if not given."
    prompts: int = 256
    "Prompts; a quarter of them judge the probes."
    components: int = 32
    "Principal components of a state that a probe, SVCCA and Procrustes may use."
    permutations: int = 200
    "Permutations of the prompts, and of the tokens."
    reset: float = 0.5
    "A channel is reset where even its slowest mode keeps less than this times its median."
    longer: int = 2
    "The longest prompts are this many times as long as those of the training."
    seed: int = 0
    "Chooses the prompts."
    device: str = "cpu"
    "cpu, cuda or mps."
    out: Path = Path("out")
    "Where the result's folder goes."
    quick: bool = False
    "The same with 40 prompts, 12 components and 60 permutations."
    json: bool = False
    "Print result.json instead of the table."


def run(config: Config) -> Result:
    """Every measurement and control of the module's docstring, for every model and pair of models.

    Raises BadArgument for fewer than two models, models of different tasks, a model without ``hook_state``, and
    numbers that do not work.
    """
    began = time.perf_counter()
    import models
    from interp import provenance
    from interp.progress import progress
    from interp.result import Result
    from interp.states import rows as state_rows
    from interp.states.study import one_thread, plan, study

    names, loaded, task = _open(config)
    components = min(config.components, 12) if config.quick else config.components
    asked = plan(
        task,
        QUICK if config.quick else config.prompts,
        components=components,
        permutations=min(config.permutations, 60) if config.quick else config.permutations,
        reset=config.reset,
        longer=config.longer,
        seed=config.seed,
    )
    studies = []
    # Many small pieces: threads would wait for each other longer than they work.
    with progress(len(names) + 1, "compare_states") as tick, one_thread():
        for name, model in zip(names, loaded, strict=True):
            studies.append(study(name, model, _untrained(model, config), asked))
            tick()
        alike = _alike(studies, asked)
        tick()
    given = {key: value for key, value in asdict(config).items() if key not in ("out", "json")}
    effective = {"prompts": len(asked.batch), "components": components, "permutations": asked.permutations}
    return Result(
        config={**given, **effective, "models": names, "task_config": task.config},
        table=state_rows.table(studies, alike, asked),
        arrays=state_rows.arrays(studies, alike, asked),
        checks=_checks(studies, loaded, alike, asked),
        provenance={
            **provenance.provenance(seed=config.seed, device=config.device, seconds=time.perf_counter() - began),
            "weights": {name: models.digest(model) for name, model in zip(names, loaded, strict=True)},
            "without decays": [each.name for each in studies if each.forgets is None],
        },
    )


def _open(config: Config) -> tuple[list[str], list[Root], Task]:
    """The models, each under a name of its own, and the one task that all were trained on."""
    import models
    from hooks.errors import BadArgument
    from interp import cards, tasks
    from interp.arguments import usable_device, whole_number
    from interp.states import reading as states

    cards.need_vectors(tasks.build(config.task), "the comparison of states")
    whole_number("longer", config.longer, least=2)
    have = models.names()
    names = list(config.models) or [f"{stem}-{config.task}" for stem in STEMS if f"{stem}-{config.task}" in have]
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise BadArgument(
            f"compare_states takes two or more different models, not {', '.join(names) or 'none'}; "
            f"there is: {', '.join(have)}"
        )
    device = usable_device(config.device)
    loaded = [models.load(name).to(device) for name in names]
    task = cards.common_task(dict(zip(names, loaded, strict=True)), config.task)
    for name, model in zip(names, loaded, strict=True):
        states.need(model, ("hook_state",), "the comparison of states", name)
    return names, loaded, task


def _untrained(model: Root, config: Config) -> Any:
    """The same architecture with the weights that a training starts from."""
    import torch

    import models

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return models.build(model.architecture, **asdict(model.cfg)).eval().to(config.device)


def _alike(studies: list[Study], asked: Plan) -> dict[tuple[int, int], dict[str, Similarity]]:
    """Each measure for each pair of models, every layer of one against every layer of the other."""
    from interp.similarity import MEASURES, compare

    return {
        (i, j): {
            measure: compare(
                studies[i].rows,
                studies[j].rows,
                measure,
                components=None if measure == "cka" else asked.components,
                n_perm=asked.permutations,
                seed=asked.seed,
            )
            for measure in MEASURES
        }
        for i in range(len(studies))
        for j in range(i + 1, len(studies))
    }


def _checks(studies: list[Study], loaded: list[Root], alike: Alike, asked: Plan) -> list[Check]:
    """What must hold for the numbers to mean anything, model by model."""
    import numpy as np

    from interp.result import Check

    checks = []
    for study, model in zip(studies, loaded, strict=True):
        name = study.name
        for k, row in model.card["measured"]["model"].items():
            column = int(k[2:]) if k.startswith("k=") else -1
            if column >= 0:
                error = study.error[:, -1 if study.error.shape[1] == 1 else column].double()
                spread = (row["standard_error"] ** 2 + float(error.var()) / len(error)) ** 0.5
                gap = abs(float(error.mean()) - row["error"]) / max(spread, 1e-12)
                checks.append(Check.at_most(f"{name}: clean error at {k} against the card, standard errors", gap, 4.0))
        off = abs(float(study.exact.mean) - 1)
        checks.append(Check.at_most(f"{name}: swap of the whole state, distance of its slope from 1", off, 1e-3))
        checks.append(Check.at_most(f"{name}: swap of nothing, largest change", study.nothing, 0.0))
        for target, reading in study.reading.items():
            shuffled = float(np.nanmean(reading.shuffled[..., 0]))
            checks.append(Check.at_most(f"{name}: shuffled {target}, mean R²", shuffled, reading.lucky))
        checks.append(Check.at_most(f"{name}: derivative against differences, relative", study.reach_gap, 0.05))
        if study.forgets is not None:
            gap = study.forgets.error
            checks.append(Check.at_most(f"{name}: states rebuilt from decays and writes, relative", gap, FP32))
    for (i, j), measures in alike.items():
        # Its variance under permutation is about 2 / (n (n − 3)) (Székely and Rizzo 2013); 5, because the largest of
        # all pairs of layers is asked.
        null = measures["cka"]
        off = float(np.abs(null.null_mean).max()) * (null.n * (null.n - 3) / 2 * null.n_perm) ** 0.5
        names = f"{studies[i].name}, {studies[j].name}"
        checks.append(Check.at_most(f"{names}: debiased CKA of permuted prompts, largest in standard errors", off, 5.0))
    return checks


def plot(result: Result) -> Figure:
    """Ten panels: what is read, which layers are alike, memory with its half-life and its content, rank, norm, error,
    swaps.
    """
    from interp import plot as draw
    from interp.variance import LEVELS

    arrays, config = result.arrays, result.config
    names, ks, last = _labels(config["models"]), arrays["ks"], int(arrays["ks"][-1])
    target = str(arrays["targets"][0])
    figure, axes = draw.grid(((1.0, 1.0, 1.15), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0, 1.0)), (3.3, 3.3, 3.1))
    reads, layers, alike, memory, half, content, rank, norm, error, swap = axes

    by_k, by_layer = {}, {}
    for i, name in enumerate(names):
        score, untrained = arrays[f"r2_{i}"][0], arrays[f"untrained_{i}"][0]
        best, asked = _best(arrays, i), ~(untrained[0, :, 0] != untrained[0, :, 0])
        by_k[name] = {"trained": (ks, score[best[0]]), "untrained": (ks[asked], untrained[best[1]][asked])}
        by_layer[name] = {"trained": _over(score[:, -1]), "untrained": _over(untrained[:, -1])}
    draw.baseline(reads, ks, arrays["sums"][0, :, 0], "from sums of y x and x xᵀ", floor=None)
    draw.baseline(reads, ks, arrays["shuffled_0"][0, :, :, 0].mean(0), f"shuffled ({names[0]})", floor=None, style=3)
    reads.set_ylim(-0.15, 1.0)
    draw.families(reads, by_k, floor=None, key=True)
    _axis(reads, "examples seen, k", f"R² of {target}, best layer")
    layers.set_ylim(-0.15, 1.0)
    draw.families(layers, by_layer, floor=None)
    _axis(layers, "layer", f"R² of {target} at k = {last}")

    for panel in (reads, layers):
        panel.set_yticks([0.0, 0.25, 0.5, 0.75, 1.0])

    value, _, _, _, family = arrays["cka_0_1"]
    rows, columns = ([str(layer) for layer in range(size)] for size in value.shape)
    label = f"debiased CKA at k = {int(arrays['middle'])}"
    draw.heat_map(alike, value, rows, columns, label=label, unsure=family > 0.05, linear=True)
    _axis(alike, f"layer of {names[1]}", f"layer of {names[0]}")

    total, left = "∂h/∂x, all paths (÷ its mean)", "‖∏ decay · w‖ / ‖w‖"
    kept: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(names):
        kept[name] = {total: _over(arrays[f"reach_{i}"])}
        if f"left_{i}" in arrays:
            kept[name][left] = _over(arrays[f"left_{i}"])
    draw.families(memory, kept, floor=1e-3)
    _axis(memory, "age of the example", "what reaches the state")
    lives = {
        name: {
            what: _over(line) for what, line in zip(("slowest mode", "what is held"), arrays[f"half_{i}"], strict=True)
        }
        for i, name in enumerate(names)
        if f"half_{i}" in arrays
    }
    draw.families(half, {name: lives.get(name, {}) for name in names}, floor=1e-1)
    _axis(half, "layer", "half-life in tokens")
    bars = {}
    for i, name in enumerate(names):
        if f"shares_{i}" in arrays:
            label = f"{name}\n{_resets(arrays, i)}"
            bars[label] = dict(zip(LEVELS, map(tuple, arrays[f"shares_{i}"].T.tolist()), strict=True))
    draw.shares(content, bars, LEVELS, label="share of the variance of ln decay")
    content.tick_params(axis="x", labelsize=6.5)

    both = {}
    for i, name in enumerate(names):
        alone = arrays[f"across_{i}"]
        both[name] = {
            "across prompts": (ks, _bare(alone)),
            "of one prompt's matrix": (ks, arrays[f"within_{i}"]),
        }
    draw.families(rank, both, floor=1.0)
    _axis(rank, "examples seen, k", "effective rank")
    sizes = {name: {"": _over(arrays[f"norm_{i}"], 1)} for i, name in enumerate(names)}
    draw.families(norm, sizes, floor=None)
    _axis(norm, "examples seen, k", f"‖h‖ relative to k = {last}")
    draw.boundary(norm, float(last), "trained")
    errors = {name: {"": _over(arrays[f"long_error_{i}"])} for i, name in enumerate(names)}
    draw.families(error, errors, floor=1e-4)
    error.axhline(1.0, color="0.45", linewidth=2.0, alpha=0.75, zorder=1)
    _axis(error, "examples seen, k", "error (grey: predict 0)")
    draw.boundary(error, float(last), "trained")
    moved = {
        name: {
            str(part): _over(line)
            for part, line in zip(arrays[f"parts_{i}"], arrays[f"swaps_{i}"], strict=True)
            if part != "both"
        }
        for i, name in enumerate(names)
    }
    draw.families(swap, moved, floor=None)
    swap.axhline(0, color="0.45", linewidth=0.8)
    _axis(swap, "layer whose state is swapped", f"recovery by a swap at k = {int(arrays['swap_k'])}")

    figure.suptitle(_title(result), fontsize=11)
    figure.supxlabel(
        f"n = {config['prompts']} prompts (probes judged on a quarter, {config['components']} components; decays, "
        f"ranks within, norm and error {int(arrays['some'])}; derivatives {int(arrays['few'])}); bands: 95 % bootstrap "
        "over prompts, in e quartiles of channels; c: grey italics where family-wise p > 0.05",
        fontsize=7.5,
        color="0.35",
    )
    draw.settle(figure)
    return figure


def _labels(names: list[str]) -> list[str]:
    """Bundled names as they are, files and folders by the last part of their path where that tells them apart."""
    short = [Path(name).name.removesuffix(".safetensors") for name in names]
    return short if len(set(short)) == len(short) else names


def _over(line: Any, start: int = 0) -> tuple[Any, Any]:
    """A curve over 0, 1, 2 … (or ``start`` …)."""
    import numpy as np

    return np.arange(start, start + len(line)), line


def _best(arrays: Mapping[str, Any], i: int) -> tuple[int, int]:
    """The layer from which most of the first target is read after the last example, trained and untrained.

    Chosen by the prompts that fitted the probes, not by those that judge them.
    """
    import numpy as np

    trained, untrained = np.nanargmax(arrays[f"folds_{i}"][0][:, :, -1], axis=1)
    return int(trained), int(untrained)


def _bare(line: Any) -> Any:
    """A curve without an interval: resampled prompts repeat each other, which lowers a rank by itself."""
    import numpy as np

    nothing = np.full_like(line, np.nan)
    return np.stack([line, nothing, nothing], axis=-1)


def _axis(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y, fontsize=8)


def _resets(arrays: Mapping[str, Any], i: int) -> str:
    """Resets by kind of token, in a thousand, with those of permuted tokens."""
    rate, control = (arrays[f"resets_{i}"][which].mean(0) * 1000 for which in (0, 1))
    if not rate.any():
        return "no resets"
    parts = [f"{kind} {a:.2g} ({b:.2g})" for kind, a, b in zip(arrays["kinds"], rate, control, strict=False)]
    return "\n".join(["resets in 1000", *parts, "(tokens permuted)"])


def _title(result: Result) -> str:
    """The sentences that the figure supports, made from its numbers."""
    arrays, names = result.arrays, _labels(result.config["models"])
    target, last = str(arrays["targets"][0]), int(arrays["ks"][-1])
    layers = [_best(arrays, i)[0] for i in range(len(names))]
    read = ", ".join(
        f"{arrays[f'r2_{i}'][0, layer, -1, 0]:.2f} in {name} (layer {layer})"
        for i, (name, layer) in enumerate(zip(names, layers, strict=True))
    )
    first = f"After {last} examples one layer's state gives {target} linearly with R² {read}"
    left = [f"{arrays[f'left_{i}'][-1, 0]:.2f} in {name}" for i, name in enumerate(names) if f"left_{i}" in arrays]
    if not left:
        return first
    return f"{first};\nof what the oldest example wrote, the decays leave {', '.join(left)}"


if __name__ == "__main__":
    raise SystemExit(cli.main(sys.modules[__name__]))
