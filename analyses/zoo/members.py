"""A collection of trained models against their cards and the classical methods of their tasks, on fresh prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from hooks.brief import brief
from hooks.errors import BadArgument
from interp import cards, evaluate, rivals, seeds, stats
from interp.machine import room
from interp.tasks import Task

EXACT = 1e-6
"""A rival with a smaller error is exact: no ratio to it means anything."""
Errors = Mapping[str, Float[np.ndarray, "prompt k"]]


@dataclass(frozen=True)
class Member:
    """One model: its errors (prompt, k) at the ks that its task reports, and the fair rivals' on the same prompts."""

    name: str
    architecture: str
    parameters: int
    card: Mapping[str, Any]
    task: Task
    error: Float[np.ndarray, "prompt k"]
    rivals: Errors

    __repr__ = brief

    @property
    def ks(self) -> tuple[int, ...]:
        """The reported numbers of examples."""
        return self.task.report_ks

    @property
    def middle(self) -> int:
        """The place in ``ks`` that the figure shows."""
        return len(self.ks) // 2

    @property
    def label(self) -> tuple[str, str]:
        """(what was learned, by what), as the name says it: mamba-skewed is ("skewed", "mamba")."""
        end = f"-{self.task.name}"
        if self.name.endswith(end):
            return self.task.name, self.name.removesuffix(end)
        stem, dash, last = self.name.rpartition("-")
        return (last, stem) if dash else (self.task.name, self.name)

    @property
    def gaps(self) -> dict[int, float]:
        """Distance of the error from the card's at each k that the card has, in standard errors."""
        return cards.gaps(self.card, {k: self.error[:, i] for i, k in enumerate(self.ks)})

    def best(self, place: int, *, exact: bool = True) -> tuple[str, float] | None:
        """The fair rival with the smallest error at ``ks[place]``, and that error; without ``exact``, of those that
        have an error.
        """
        means = {name: float(error[:, place].mean()) for name, error in self.rivals.items()}
        kept = {name: mean for name, mean in means.items() if exact or mean > EXACT}
        return min(kept.items(), key=lambda pair: pair[1], default=None)

    def relative(self) -> tuple[float, float, float]:
        """Error ÷ that of the best rival that has one, at the middle k, and its interval over prompts; else NaN."""
        found = self.best(self.middle, exact=False)
        if found is None:
            return (np.nan,) * 3
        try:
            ratio = stats.ratio(self.error[:, self.middle], self.rivals[found[0]][:, self.middle])
        except BadArgument:  # so few prompts have an error that a resample may have none
            value = float(self.error[:, self.middle].mean()) / found[1]
            return value, np.nan, np.nan
        return float(ratio.mean), float(ratio.low), float(ratio.high)


class Bench:
    """Prompts and rivals of each task once, however many models were trained on it."""

    def __init__(self, prompts: int, seed: int) -> None:
        self.prompts, self.seed = prompts, seed
        self._rivals: dict[str, Errors] = {}

    def member(self, name: str, model: Any) -> Member:
        """``model`` measured on fresh prompts of the task on its card."""
        task = cards.trained_task(name, model, str(model.card.get("task")))
        room.check(room.prompts("zoo", "prompts", self.prompts, task, [model]))
        batch = task.sample(self.prompts, seeds.generator("probe", self.seed))
        ks = list(task.report_ks)
        last = set(ks) == {task.n_pairs - 1}
        error = evaluate.errors(model, task, batch=batch, query_only=last).double().numpy()
        key = f"{task.name} {task.config}"
        if key not in self._rivals:
            own = task.baselines(batch)
            names = [one for one in rivals.fair([*own, *rivals.extra(task)]) if one != "chance"]
            self._rivals[key] = {
                one.name: one.errors(task, batch, ks, own).double().numpy() for one in rivals.build(task, names)
            }
        return Member(
            name=name,
            architecture=model.architecture,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            card=model.card,
            task=task,
            error=error if last else error[:, ks],
            rivals=self._rivals[key],
        )


def table(members: Sequence[Member]) -> pd.DataFrame:
    """One row a model: what it is, its cost, its error and the best rival's at the reported ks; value at the middle."""
    rows = []
    for each in members:
        best = [each.best(i) for i in range(len(each.ks))]
        named = {found[0] for found in best if found is not None}
        texts = ["-" if found is None else said(found[1]) for found in best]
        own = each.error[:, each.middle]
        spread = stats.bootstrap(own)
        rows.append(
            {
                "model": each.name,
                "task": each.task.name,
                "at k": " ".join(map(str, each.ks)),
                "errors": " ".join(said(float(mean)) for mean in each.error.mean(axis=0)),
                "best rival": f"{' '.join(sorted(named))}: {' '.join(texts)}",
                "value": float(own.mean()),
                "low": float(spread.low),
                "high": float(spread.high),
                "from card": max(each.gaps.values(), default=np.nan),
                "architecture": each.architecture,
                "parameters": each.parameters,
                "steps": int(each.card.get("steps", 0)),
                "seconds": round(float(each.card.get("seconds", np.nan))),
            }
        )
    return pd.DataFrame(rows)


def arrays(members: Sequence[Member], prompts: int) -> dict[str, np.ndarray]:
    """What the figure needs: rows and columns of the grid; error, ratio and its ends; the rival that divides."""
    rows = list(dict.fromkeys(each.label[0] for each in members))
    columns = list(dict.fromkeys(each.label[1] for each in members))
    value = np.full((4, len(rows), len(columns)), np.nan)
    names = list(rows)
    for each in members:
        i, j = rows.index(each.label[0]), columns.index(each.label[1])
        value[:, i, j] = (float(each.error[:, each.middle].mean()), *each.relative())
        divides, exact = each.best(each.middle, exact=False), each.best(each.middle)
        text = "no rival" if divides is None else f"{divides[0]} {said(divides[1])}"
        if exact is not None and exact != divides:
            text += f"; {exact[0]} 0"
        names[i] = f"{rows[i]}, k = {each.ks[each.middle]}\n({text})"
    return {
        "rows": np.array(names),
        "columns": np.array(columns),
        "error": value[0],
        "ratio": value[1:],
        "prompts": np.array(prompts),
    }


def said(error: float) -> str:
    """An error in two digits; 0 for what is rounding."""
    return "0" if error < EXACT * 1e-3 else f"{error:.2g}"
