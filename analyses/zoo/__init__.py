"""The bundled models: what each is, how well it does beside the best classical method, and whether its card is true.

Estimand   for each file: task, architecture, parameters, steps and seconds of its training; mean error at the numbers k
           of examples that its task reports, on fresh prompts; the best rival's on the same prompts. Figure: the error
           at the middle k, relative to the best rival that is not exact
Controls   every error against the card within 4 standard errors; prompts that neither trained, nor chose, nor measured
           the model that is on the card
Not shown  other trainings of the same models; other k (learning_curves); whether models of different sizes or steps
           are compared fairly: the table has both
Cost       about 2 minutes for 44 files and 1280 prompts on 2 cores
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from interp import cli
from interp.figures import in_house_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from analyses.zoo.members import Member
    from interp.result import Check, Result

__all__ = ["Config", "plot", "run"]


QUICK = 128
BOUND = 4.0
"""Largest distance from the card, in standard errors."""


@dataclass(frozen=True)
class Config:
    models: tuple[str, ...] = ()
    "Bundled names or run folders; every bundled one if not given."
    prompts: int = 1280
    "Fresh prompts for each task."
    seed: int = 0
    "Chooses the prompts."
    device: str = "cpu"
    "cpu, cuda or mps."
    out: Path = Path("out")
    "Where the result's folder goes."
    quick: bool = False
    "The same with 128 prompts."
    json: bool = False
    "Print result.json instead of the table."

    def __post_init__(self) -> None:
        cli.listed(self)


def run(config: Config) -> Result:
    """The table, the grid, and for each file the checks against its card.

    A bundled file that cannot be read fails a check, and the others are measured. Raises BadArgument for a model or
    device that there is not.
    """
    began = time.perf_counter()
    import models
    from analyses.zoo import members as grid
    from hooks.errors import BadArgument, TooLarge
    from interp.arguments import usable_device, whole_number
    from interp.machine import provenance
    from interp.machine.progress import progress
    from interp.result import Check, Result

    device = usable_device(config.device)
    prompts = QUICK if config.quick else whole_number("prompts", config.prompts, 8)
    bundled = models.names()
    names = list(dict.fromkeys(config.models)) or bundled
    bench, members, checks, weights = grid.Bench(prompts, config.seed), [], [], {}
    with progress(len(names), "zoo") as tick:
        for name in names:
            try:
                model = models.load(name)
                member = bench.member(name, model.to(device))
            except BadArgument as reason:
                if name not in bundled or isinstance(reason, TooLarge):
                    raise
                checks.append(Check(f"{name}: {reason}", 0.0, 1.0, False))
            else:
                members.append(member)
                weights[name] = models.digest(model)
                checks += _checks(member)
            tick()
    if not members:
        raise BadArgument("; ".join(check.name for check in checks) or "there is no bundled model: give --models")
    asked = {key: value for key, value in asdict(config).items() if key not in ("out", "json")}
    return Result(
        config={**asked, "task": "zoo", "models": names, "prompts": prompts},
        table=grid.table(members),
        arrays=grid.arrays(members, prompts),
        checks=checks,
        provenance={
            **provenance.provenance(seed=config.seed, device=config.device, seconds=time.perf_counter() - began),
            "weights": weights,
        },
    )


def _checks(member: Member) -> list[Check]:
    """The error at each reported k against the card; a card that has none fails."""
    from interp.result import Check

    gaps = member.gaps
    return [
        Check.at_most(
            f"{member.name}: error at k={k} against its card, standard errors", gaps.get(k, float("nan")), BOUND
        )
        for k in member.ks
    ]


@in_house_style(font_scale=1.05)
def plot(result: Result) -> Figure:
    """The grid: a row for each task, a column for each architecture."""
    from analyses.zoo.figure import figure

    return figure(result)


# --- command ----------------------------------------------------------------------------------


def verdict(result: Result) -> str | None:
    """One line that names the files that are not what their cards say."""
    wrong = [check.name for check in result.checks if not check.ok]
    return f"not as the card says: {'; '.join(wrong)}" if wrong else None
