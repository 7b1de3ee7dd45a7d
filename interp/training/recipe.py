"""What is trained and how, as data: the recipe, its schedules, and its JSON form.

Everything here is a pure function of the recipe and of the step. That is what lets a killed run go
on exactly: the scheduler and the curriculum have no state of their own to lose.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hooks.errors import BadArgument, told, unknown
from hooks.sealed import json_value
from interp.machine.files import strict_json

PRECISIONS = ("fp32", "bf16")
MOST = 2**31 - 1
RATES: Mapping[str, tuple[float, ...]] = {
    "mamba": (3e-3, 6e-3, 1.2e-2),
    "linear_attention": (1.5e-3, 3e-3, 6e-3),
    "transformer": (7.5e-4, 1.5e-3, 3e-3),
    "s4": (3e-3, 6e-3, 1.2e-2),
    "s4d": (3e-3, 6e-3, 1.2e-2),
}
"""Peak learning rates from which the search picks where a recipe names none, by architecture.

For models some tens of channels wide. Of 1.5e-3, 3e-3 and 6e-3 first searches took mostly the highest for Mamba, always
for S4 and S4D: their grid is an octave up. The transformer's is an octave down: the lowest was ahead on regression
and on chains, and at 6e-3, picked from rates that were alike after 1,000 steps, it never learned sparse regression."""
OTHER_RATES = (1e-3, 3e-3, 6e-3)
"""The same for an architecture that the table does not name."""
LATER = ("patience", "mix")
"""Fields that are written only where they are not the default: a recipe from before they existed keeps its text, and
with it the name of its folder."""


@dataclass(frozen=True)
class TrainConfig:
    """A training recipe; two equal recipes give equal weights on the same machine and threads."""

    task: str
    "Name of the task in interp.tasks."
    model: str
    "Name of the architecture."
    task_config: Mapping[str, Any] = field(default_factory=dict)
    model_config: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 14_000
    "Optimizer steps of the run that is kept."
    batch_size: int = 64
    "Prompts per step, over all processes together."
    learning_rates: tuple[float, ...] = ()
    "Peak learning rates: one, or at least three of which a search picks one; the architecture's own if none is given."
    search_steps: int = 1_000
    "Steps for which each candidate learning rate is tried; fewer where all of them would be more than ``steps``."
    warmup: float = 0.05
    "Fraction of the steps over which the learning rate rises linearly from 0 to its peak."
    floor: float = 0.01
    "The cosine ends at this fraction of the peak."
    betas: tuple[float, float] = (0.9, 0.95)
    "AdamW's two decay rates."
    weight_decay: float = 0.01
    "AdamW's decoupled decay; matrices only, never A, D, biases or norms."
    grad_clip: float = 1.0
    "Largest global norm of the gradient; 0 for no clipping."
    curriculum: float = 0.3
    "Fraction of the steps over which the active dimensions and pairs grow to their full number."
    seed: int = 0
    "Chooses the initial weights and every prompt."
    save_every: int = 500
    "Steps between two checkpoints from which a killed run goes on."
    eval_every: int = 250
    "Steps between two lines of metrics.jsonl."
    precision: str = "fp32"
    "fp32, or bf16 for mixed precision."
    patience: int = 0
    "Evaluations in a row without a lower validation loss after which the run ends; 0 for all its steps."
    mix: tuple[Mapping[str, Any], ...] = ()
    "Further tasks, each {task, task_config}: every step draws its prompts from the task or from one of these."

    def __post_init__(self) -> None:
        rates = self.learning_rates or RATES.get(self.model, OTHER_RATES)
        rates = (rates,) if isinstance(rates, int | float) else rates
        object.__setattr__(self, "learning_rates", tuple(float(r) for r in rates))
        object.__setattr__(self, "betas", tuple(float(b) for b in self.betas))
        for name in ("steps", "batch_size", "search_steps", "save_every", "eval_every"):
            _whole(name, getattr(self, name))
        for name in ("seed", "patience"):
            _whole(name, getattr(self, name), least=0)
        object.__setattr__(self, "mix", tuple(_mixed(entry, self.task) for entry in self.mix))
        for name in ("warmup", "floor", "curriculum"):
            _within(name, getattr(self, name), 0.0, 1.0)
        for name in ("weight_decay", "grad_clip"):
            _within(name, getattr(self, name), 0.0, math.inf)
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise BadArgument(f"betas is {self.betas}; it must be two numbers in [0, 1)")
        count = len(set(self.learning_rates))
        if count != len(self.learning_rates) or count not in {1} | set(range(3, 100)):
            raise BadArgument(
                f"learning_rates is {list(self.learning_rates)}; give one rate, or at least three "
                "different ones to choose from (a choice between two is hardly a choice)"
            )
        if not all(math.isfinite(rate) and rate > 0 for rate in self.learning_rates):
            raise BadArgument(f"learning_rates is {list(self.learning_rates)}; each must be > 0")
        if self.precision not in PRECISIONS:
            raise BadArgument(
                unknown("precision", str(self.precision), PRECISIONS)
                + ("; fp16 skips steps whose loss scale overflows" * (self.precision == "fp16"))
            )

    @property
    def search_each(self) -> int:
        """Steps for which each of several rates is tried: ``search_steps``, or so few that all together are no more
        than ``steps``. 0 where there is no search: a single rate, or fewer steps than rates.
        """
        count = len(self.learning_rates)
        return min(self.search_steps, self.steps // count) if count > 1 else 0

    @property
    def middle_rate(self) -> float:
        """The rate that is taken where there is no search."""
        return sorted(self.learning_rates)[len(self.learning_rates) // 2]

    def as_dict(self) -> dict[str, Any]:
        """The recipe as plain JSON values, as written to recipe.json and to the card."""
        plain: dict[str, Any] = json.loads(strict_json(dataclasses.asdict(self)))
        return {name: value for name, value in plain.items() if value or name not in LATER}


def _whole(name: str, value: Any, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST:
        bound = f"to {MOST}" if isinstance(value, int) and value > MOST else "up"
        raise BadArgument(f"{name} is {told(value)}; it must be a whole number from {least} {bound}")


def _mixed(entry: Any, task: str) -> dict[str, Any]:
    """One entry of ``mix`` with both its fields; the task is the recipe's own if it names none."""
    if not isinstance(entry, Mapping):
        raise BadArgument(f"mix holds {told(entry)}; each entry is {{task, task_config}}")
    fields = ("task", "task_config")
    for name in entry:
        if name not in fields:
            raise BadArgument(unknown("field of an entry of mix", str(name), fields))
    return {"task": entry.get("task", task), "task_config": dict(entry.get("task_config") or {})}


def _within(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise BadArgument(f"{name} is {told(value)}; it must be a number from {low:g} to {high:g}")


def from_dict(values: Mapping[str, Any], source: str = "the recipe") -> TrainConfig:
    """The recipe that ``values`` describes; an unknown or missing field is a BadArgument."""
    names = [entry.name for entry in dataclasses.fields(TrainConfig)]
    for name in values:
        if name not in names:
            raise BadArgument(f"{source}: {unknown('field of a recipe', str(name), names)}")
    for name in ("task", "model"):
        if name not in values:
            raise BadArgument(f'{source} does not say which {name}: add the field "{name}"')
    for name in ("learning_rates", "betas"):
        if name in values and not isinstance(values[name], list | tuple):
            raise BadArgument(f"{source}: {name} is {told(values[name])}; give a list of numbers")
    try:
        return TrainConfig(**{name: _as_field(name, value) for name, value in values.items()})
    except BadArgument as error:
        raise BadArgument(f"{source}: {error}") from error
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise BadArgument(f"{source} has a field of the wrong type: {reason}") from error


def _as_field(name: str, value: Any) -> Any:
    """JSON does not tell 1 from 1.0; the recipe does, for its numbers that are not counts. Nor a list from a tuple."""
    if name == "mix" and isinstance(value, list | tuple):
        for entry in value:
            _mixed(entry, "")
        return tuple(value)
    if name in ("learning_rates", "betas") and isinstance(value, list | tuple):
        return tuple(map(float, value))
    default = next(f.default for f in dataclasses.fields(TrainConfig) if f.name == name)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if whole and isinstance(default, float) else value


def read(path: Path) -> TrainConfig:
    """The recipe in a JSON file."""
    try:
        values = json_value(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadArgument(f"cannot read the recipe {path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise BadArgument(f"{path} is not a recipe: it holds no JSON object")
    return from_dict(values, str(path))


def difference(asked: TrainConfig, found: TrainConfig) -> str | None:
    """The first field in which two recipes differ, as ``name: asked …, found …``; else None."""
    left, right = asked.as_dict(), found.as_dict()
    defaults = {entry.name: entry.default for entry in dataclasses.fields(TrainConfig)}
    for name in {**left, **right}:
        one, other = left.get(name, defaults[name]), right.get(name, defaults[name])
        if one != other:
            return f"{name}: asked {json.dumps(one)}, found {json.dumps(other)}"
    return None


def learning_rate(config: TrainConfig, step: int, steps: int, peak: float) -> float:
    """Rate at ``step`` of ``steps``: linear warm-up to ``peak``, then half a cosine to its floor.

    Step 0 already moves (peak / warm-up steps), and the last step runs just above
    ``floor * peak``. In (0, peak].
    """
    rise = max(1, round(config.warmup * steps))
    if step < rise:
        return peak * (step + 1) / rise
    done = (step - rise) / max(1, steps - rise)
    return peak * (config.floor + (1 - config.floor) * 0.5 * (1 + math.cos(math.pi * done)))


def curriculum(config: TrainConfig, step: int, steps: int, full: int, least: int = 1) -> int:
    """How many of ``full`` dimensions (or pairs) are in play at ``step``: a staircase.

    From a quarter of ``full`` (at least ``least``) to all of them over the first
    ``config.curriculum`` of the steps, every stair equally wide. The quarter is Garg et al.'s and
    Grazzi et al.'s start (5 of 20 dimensions, 11 of 41 pairs), the length is scaled to the run.
    """
    start = min(full, max(least, math.ceil(full / 4)))
    ramp = config.curriculum * steps
    if step >= ramp:
        return full
    return min(full, start + math.floor((full - start + 1) * step / ramp))
