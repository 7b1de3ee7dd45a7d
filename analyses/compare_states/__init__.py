"""What the states of several models hold after the same prompts, and for how long.

Estimand   for each model, layer and number of examples k: how much of the task's variables a ridge probe reads from the
           state (equal numbers of principal components, prompts that it was not fitted on); how alike the models'
           states are, layer against layer (debiased CKA, SVCCA, Procrustes); the effective rank of vec(h) across
           prompts, and of a prompt's own d_inner × d_state matrix; what is left of a write by the product of decays,
           and the half-lives in it (of a channel's slowest mode; at the rate at which it loses what it holds), beside
           the total derivative ∂h_t/∂x_s through everything; how much of ln ā follows the content; tokens that reset a
           channel; the norm of the state up to and beyond the trained length, with the error beside it; how much of
           the prediction comes along when a state is put into another prompt. After k ≥ 1 examples a state is read
           before the query; k = 0 is the state at a query with nothing before it, compared in all but memory and swaps
Controls   shuffled targets; the same architecture untrained; what adding up y x and x xᵀ would give; permuted prompts
           (family-wise over all pairs of layers); decays moved to other tokens of the prompt; a swap of nothing, and of
           everything against the other context in one run; states rebuilt from decays and writes; derivatives against
           differences
Not shown  another training of the same model; what is in the state but not linearly, or in directions of little
           variance (the table has the best layer by number of components); whether a model uses what can be read:
           only the swaps say
Cost       65 seconds with 256 prompts, three models of 8 layers and 2 idle cores
"""

# Beside this file:
# study   the measurements: decoding, similarity, swaps
# rows    the table
# figure  the figure
# checks  what must hold for the numbers to mean anything

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp import cli
from interp.figures import in_house_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from torch import Tensor

    from analyses.compare_states.study import Plan, Study
    from interp.result import Result
    from interp.similarity import Similarity
    from interp.tasks import Task
    from models import Root

    Alike = Mapping[int, Mapping[tuple[int, int], Mapping[str, Similarity]]]

__all__ = ["Config", "plot", "run"]


QUICK = 64
STEMS = ("mamba", "s4d", "lti-mamba")


@dataclass(frozen=True)
class Config:
    task: str = "linreg"
    "What was learned in context."
    task_config: tuple[str, ...] = ()
    "Options that differ from the checkpoints' own, as name=value, e.g. n_pairs=31."
    models: tuple[str, ...] = ()
    "Two or more bundled names or run folders; those of mamba-, s4d- and lti-mamba-<task> that there are if not given."
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
    "The same with 40 prompts, 12 components and 60 permutations; with two models where none is named."
    json: bool = False
    "Print result.json instead of the table."

    def __post_init__(self) -> None:
        cli.listed(self)


def run(config: Config) -> Result:
    """Every measurement and control of the module's docstring, for every model and pair of models.

    Raises BadArgument for fewer than two models, models of different tasks, a model without ``hook_state``, and
    numbers that do not work.
    """
    from analyses.compare_states.checks import all_checks, notes

    began = time.perf_counter()
    import numpy as np

    import models
    from analyses.compare_states import rows as state_rows
    from analyses.compare_states.study import plan, study
    from interp.arguments import whole_number
    from interp.machine import provenance, room
    from interp.machine.progress import progress
    from interp.machine.workers import side_by_side, threads
    from interp.result import Result

    names, loaded, task = _open(config)
    components = min(config.components, 12) if config.quick else config.components
    prompts = QUICK if config.quick else whole_number("prompts", config.prompts, 2)
    room.check(room.prompts("compare_states", "prompts", prompts, task, loaded), device=config.device)
    asked = plan(
        task,
        prompts,
        components=components,
        permutations=min(config.permutations, 60) if config.quick else config.permutations,
        reset=config.reset,
        longer=config.longer,
        seed=config.seed,
    )
    jobs = [
        partial(study, name, model, _untrained(model, config), asked) for name, model in zip(names, loaded, strict=True)
    ]
    with progress(len(names) + 1, "compare_states") as tick:
        # One thread each: many small pieces, at which several wait for each other longer than they work.
        studies = side_by_side(jobs, tick, config.device, each=1)
        with threads(1):
            alike = _alike(studies, asked)
        tick()
    given = {key: value for key, value in asdict(config).items() if key not in ("out", "json")}
    effective = {"prompts": len(asked.batch), "components": components, "permutations": asked.permutations}
    return Result(
        config={**given, **effective, "models": names, "task_config": task.config},
        table=state_rows.table(studies, alike, asked),
        arrays={**state_rows.arrays(studies, alike, asked), "trained": np.array(_trained(loaded[0]))},
        checks=all_checks(studies, loaded, alike, asked),
        provenance={
            **provenance.provenance(seed=config.seed, device=config.device, seconds=time.perf_counter() - began),
            "weights": {name: models.digest(model) for name, model in zip(names, loaded, strict=True)},
            "without decays": [each.name for each in studies if each.forgets is None and asked.remembers],
            "notes": notes(studies, dict(zip(names, loaded, strict=True)), asked),
        },
    )


def _open(config: Config) -> tuple[list[str], list[Root], Task]:
    """The models, each under a name of its own, and the one task that all were trained on."""
    import models
    from hooks.errors import BadArgument
    from interp import cards, states, tasks
    from interp.arguments import named_values, usable_device, whole_number

    cards.need_vectors(tasks.build(config.task), "the comparison of states")
    whole_number("longer", config.longer, least=2)
    have = models.names()
    default = [f"{stem}-{config.task}" for stem in STEMS if f"{stem}-{config.task}" in have]
    names = list(config.models) or (default[:2] if config.quick else default)
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise BadArgument(
            f"compare_states takes two or more different models, not {', '.join(names) or 'none'}; "
            f"there is: {', '.join(have)}"
        )
    device = usable_device(config.device)
    loaded = [models.load(name).to(device) for name in names]
    options = named_values("task-config", config.task_config)
    task = cards.common_task(dict(zip(names, loaded, strict=True)), config.task, options)
    for name, model in zip(names, loaded, strict=True):
        states.need(model, ("hook_state",), "the comparison of states", name)
    return names, loaded, task


def _untrained(model: Root, config: Config) -> Any:
    """The same architecture with the weights that a training starts from."""
    import torch

    import models

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return models.build(model.architecture, **asdict(model.cfg)).eval().to(next(model.parameters()))


def _trained(model: Root) -> int:
    """The largest number of examples before a query in the training."""
    from interp import tasks

    return tasks.build(model.card["task"], **model.card["task_config"]).n_pairs - 1


def _alike(studies: list[Study], asked: Plan) -> dict[int, dict[tuple[int, int], dict[str, Similarity]]]:
    """By k, each measure for each pair of models, every layer of one against every layer of the other.

    Layers whose state at k = 0 is the same for every prompt have NaN, a pair with nothing else is left out.
    """
    from interp.similarity import MEASURES, leading, varies

    every = [(i, j) for i in range(len(studies)) for j in range(i + 1, len(studies))]
    found: dict[int, dict[tuple[int, int], dict[str, Similarity]]] = {}
    for k in studies[0].rows:
        whole = [[rows if k or varies(rows) else None for rows in study.rows[k]] for study in studies]
        few = [[None if rows is None else leading(rows, asked.components) for rows in layers] for layers in whole]
        found[k] = {}
        for i, j in every:
            if all(any(rows is not None for rows in whole[side]) for side in (i, j)):
                given = {measure: whole if measure == "cka" else few for measure in MEASURES}
                found[k][i, j] = {name: _compared(rows[i], rows[j], name, asked) for name, rows in given.items()}
    return found


def _compared(xs: list[Tensor | None], ys: list[Tensor | None], measure: str, asked: Plan) -> Similarity:
    """The measure between all layers that are there, and NaN where one is not."""
    from dataclasses import replace

    import numpy as np

    from interp.similarity import compare

    found = compare(
        [x for x in xs if x is not None],
        [y for y in ys if y is not None],
        measure,
        components=None if measure == "cka" else asked.components,
        n_perm=asked.permutations,
        seed=asked.seed,
    )
    there = np.ix_([x is not None for x in xs], [y is not None for y in ys])

    def wide(part: NDArray[np.float64]) -> NDArray[np.float64]:
        every = np.full((len(xs), len(ys)), np.nan)
        every[there] = part
        return every

    return replace(
        found,
        value=wide(found.value),
        null_mean=wide(found.null_mean),
        null_edge=wide(found.null_edge),
        p=wide(found.p),
        p_family=wide(found.p_family),
    )


@in_house_style()
def plot(result: Result) -> Figure:
    """What is read, which layers are alike, memory with its half-life and its content, rank, norm, error, swaps."""
    from analyses.compare_states.figure import figure

    return figure(result)
