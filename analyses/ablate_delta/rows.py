"""The table of an ablation: one condition, one number of examples, one interval a row."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.result import numbers
from interp.stats import bootstrap


@dataclass(frozen=True)
class Condition:
    """What was run: a model (or an estimator), a mode on a signal in a role, in one layer or in all."""

    model: str
    mode: str
    signal: str = ""
    role: str = ""
    layer: str = "all"


class Rows:
    """Conditions with the errors of every prompt and example, (n, n_pairs), and the clean run they change."""

    def __init__(self) -> None:
        self._conditions: list[Condition] = []
        self._errors: list[Tensor] = []
        self._clean: list[Tensor | None] = []

    def add(
        self,
        condition: Condition,
        error: Float[Tensor, "n n_pairs"],
        clean: Float[Tensor, "n n_pairs"] | None = None,
    ) -> None:
        """One condition; without ``clean`` it is compared with nothing."""
        self._conditions.append(condition)
        self._errors.append(error.double())
        self._clean.append(None if clean is None else clean.double())

    def table(self, ks: list[int], n_boot: int = 1000) -> pd.DataFrame:
        """``error`` and ``change`` (error − clean, paired by prompt) with 95 % intervals, at each k and as ``mean``
        over k.

        ``k`` and ``layer`` are numbers: k is NaN in the rows of the mean, layer where all layers were changed at once.
        Errors are squared and divided by the task's scale; ``n`` is the number of prompts.
        """
        columns = [str(k) for k in ks] + ["mean"]
        error = torch.stack([_at(e, ks) for e in self._errors], dim=1)
        change = torch.stack(
            [_at(e if c is None else e - c, ks) for e, c in zip(self._errors, self._clean, strict=True)], dim=1
        )
        level, moved = bootstrap(error.numpy(), n_boot), bootstrap(change.numpy(), n_boot)
        compared = np.array([c is not None for c in self._clean])
        rows = []
        for i, condition in enumerate(self._conditions):
            for j, k in enumerate(columns):
                part = {"change": moved.mean, "change_low": moved.low, "change_high": moved.high}
                rows.append(
                    {
                        **asdict(condition),
                        "k": k,
                        "error": level.mean[i, j],
                        "low": level.low[i, j],
                        "high": level.high[i, j],
                        **{name: value[i, j] if compared[i] else np.nan for name, value in part.items()},
                        "n": level.n,
                    }
                )
        made = pd.DataFrame(rows)
        return made.assign(layer=numbers(made["layer"]), k=numbers(made["k"]))

    def arrays(self, n_boot: int = 1000) -> dict[str, np.ndarray]:
        """The whole curves of the conditions on all layers: ``curves`` (condition, 3, n_pairs) holds mean, low,
        high.
        """
        chosen = [i for i, c in enumerate(self._conditions) if c.layer == "all" and c.role in ("", "both")]
        level = bootstrap(torch.stack([self._errors[i] for i in chosen], dim=1).numpy(), n_boot)
        named = [f"{c.model}|{c.signal}|{c.mode}" for c in (self._conditions[i] for i in chosen)]
        return {
            "curve_names": np.array(named),
            "curves": np.stack([level.mean, level.low, level.high], axis=1),
        }


def _at(error: Float[Tensor, "n n_pairs"], ks: list[int]) -> Float[Tensor, "n columns"]:
    return torch.cat([error[:, ks], error.mean(dim=1, keepdim=True)], dim=1)
