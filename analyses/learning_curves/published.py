"""Errors that papers have published, each with the setting in which it can be laid over ours.

An error here is in our unit, mean squared error ÷ E[y²] of the task; where a source has another, ``scale`` says what
its numbers are multiplied by. Read from curves by eye means two digits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from interp.tasks import Task
from interp.tasks.regression import Regression

GARG = "arXiv 2208.01066"
"""Garg et al.; the numbers are those of the metrics.json that the authors released with their models (12 layers,
trained on 41 pairs, or 101 for trees and networks). Errors ÷ E[y²], 1280 prompts."""
GRAZZI = "arXiv 2402.03170"
"""Grazzi et al.; read off the figures of the paper. Errors ÷ 20, several trainings: (smallest, largest)."""


@dataclass(frozen=True)
class Published:
    """One published curve: error by k, or (smallest, largest) of several trainings.

    config   options of the task, of those that matter to the error; others may differ
    shifts   [[name, options], …] as in ``Shifted.config``; only the options given are compared
    """

    who: str
    source: str
    task: str
    config: Mapping[str, Any]
    points: Mapping[int, float | tuple[float, float]]
    shifts: Sequence[tuple[str, Mapping[str, Any]]] = ()
    scale: float = 1.0

    @property
    def name(self) -> str:
        """What a legend calls it."""
        return f"{self.who}, {self.source}"

    def fits(self, task: Task) -> bool:
        """Whether the curve is of prompts of this kind."""
        if task.name != self.task or any(task.config.get(key) != value for key, value in self.config.items()):
            return False
        if isinstance(task, Regression) and task.noise.size:
            return False
        given = [(name, options) for name, options in task.config.get("shifts", []) if name != "longer_context"]
        return len(given) == len(self.shifts) and all(
            name == wanted and all(_same(options.get(key), value) for key, value in settled.items())
            for (name, options), (wanted, settled) in zip(given, self.shifts, strict=True)
        )

    def range(self, k: int) -> tuple[float, float]:
        """(smallest, largest) at k, in our unit."""
        found = self.points[k]
        low, high = found if isinstance(found, tuple) else (found, found)
        return self.scale * low, self.scale * high


ISOTROPIC = {"d": 20, "covariance": "isotropic"}
HALF = {"d": 20, "covariance": "half_subspace"}
SKEWED = {"d": 20, "covariance": "skewed"}
SPARSE = {"d": 20, "covariance": "isotropic", "sparsity": 3}
TREE = {"d": 20, "depth": 4}
RELU = {"d": 20, "covariance": "isotropic", "hidden": 100}
NOISE = ("label_noise", {"sigma": 1.0, "renormalise": True, "noisy_targets": True})
TF = "transformer"

CURVES: tuple[Published, ...] = (
    Published(TF, GARG, "linreg", ISOTROPIC, {5: 0.735, 10: 0.513, 19: 0.064, 20: 0.0207, 30: 0.0008, 40: 0.0006}),
    Published("OLS", GARG, "linreg", ISOTROPIC, {5: 0.752, 10: 0.496, 19: 0.056}),
    Published("3-NN", GARG, "linreg", ISOTROPIC, {5: 1.12, 10: 0.926, 20: 0.772, 40: 0.613}),
    Published("averaging", GARG, "linreg", ISOTROPIC, {5: 4.52, 10: 2.16, 20: 1.12, 40: 0.508}),
    Published(TF, GARG, "linreg", ISOTROPIC, {20: 0.0617, 40: 0.0040}, [("random_quadrants", {})]),
    Published(TF, GARG, "linreg", ISOTROPIC, {5: 0.212, 10: 0.103, 20: 0.119, 40: 0.128}, [("skewed_inputs", {})]),
    Published("OLS", GARG, "linreg", ISOTROPIC, {10: 0.078, 19: 0.0043}, [("skewed_inputs", {})]),
    Published(TF, GARG, "linreg", ISOTROPIC, {5: 1.0, 10: 1.0, 19: 1.0}, [("orthogonal_query", {})]),
    Published(TF, GARG, "linreg", ISOTROPIC, {20: 0.710, 40: 0.170}, [("scaled_inputs", {"factor": 2.0})]),
    Published(TF, GARG, "linreg", ISOTROPIC, {20: 6.90, 40: 5.25}, [("scaled_inputs", {"factor": 3.0})]),
    Published(TF, GARG, "linreg", ISOTROPIC, {20: 0.0384, 40: 0.0034}, [("scaled_inputs", {"factor": 0.5})]),
    Published(TF, GARG, "linreg", ISOTROPIC, {20: 0.0918, 40: 0.0327}, [("scaled_inputs", {"factor": 1 / 3})]),
    Published(TF, GARG, "linreg", HALF, {5: 0.495, 10: 0.0366, 20: 0.0014}),
    Published(TF, GARG, "linreg", ISOTROPIC, {20: 0.123, 40: 0.0065}, [("scaled_labels", {"factor": 2.0})]),
    Published(TF, GARG, "linreg", ISOTROPIC, {20: 0.781, 40: 0.25}, [("scaled_labels", {"factor": 3.0})]),
    Published(TF, GARG, "linreg", ISOTROPIC, {10: 0.570, 20: 0.968, 30: 0.188, 40: 0.132}, [NOISE]),
    Published("OLS", GARG, "linreg", ISOTROPIC, {10: 0.572, 30: 0.148, 40: 0.0988}, [NOISE]),
    Published(TF, GARG, "sparse_linreg", SPARSE, {5: 0.577, 10: 0.090, 20: 0.0044, 40: 0.0012}),
    Published("lasso 0.1", GARG, "sparse_linreg", SPARSE, {10: 0.104, 20: 0.018}),
    Published("lasso 0.01", GARG, "sparse_linreg", SPARSE, {10: 0.083, 20: 0.0002}),
    Published("lasso 0.001", GARG, "sparse_linreg", SPARSE, {10: 0.084}),
    Published(TF, GARG, "decision_tree", TREE, {10: 0.934, 20: 0.742, 50: 0.277, 100: 0.121}),
    Published("XGBoost", GARG, "decision_tree", TREE, {50: 0.939, 100: 0.726}),
    Published("greedy tree", GARG, "decision_tree", TREE, {100: 0.934}),
    Published(TF, GARG, "relu_net", RELU, {10: 0.496, 20: 0.388, 40: 0.222, 100: 0.144}),
    # Not what the released code gives with its settings (estimators.network): that is 0.32 at k = 40 and 0.17 at 100.
    Published("trained net, settings unknown", GARG, "relu_net", RELU, {10: 0.591, 20: 0.416, 40: 0.248, 100: 0.109}),
    Published("3-NN", GARG, "relu_net", RELU, {100: 0.445}),
    Published("OLS", GARG, "relu_net", RELU, {100: 0.644}),
    Published("Mamba", GRAZZI, "linreg", ISOTROPIC, {200: 0.11}),
    Published("transformer without positions", GRAZZI, "linreg", ISOTROPIC, {200: 0.35}),
    # Beyond the trained length two of three trainings leave the axis, which ends at 1.3.
    Published("Mamba, best of 3", GRAZZI, "linreg", SKEWED, {100: 0.062, 200: 0.36, 490: 0.69}),
    # At k = 40 the curve of the third seed is hidden behind others.
    Published("Mamba", GRAZZI, "linreg", SKEWED, {20: (0.038, 0.058), 40: (0.0038, 0.0071)}),
    Published("S4", GRAZZI, "linreg", SKEWED, {20: (0.27, 0.29), 40: (0.095, 0.123)}),
    Published(
        TF,
        GRAZZI,
        "linreg",
        SKEWED,
        {20: (0.029, 0.045), 40: (0.0008, 0.0015), 100: (0.005, 0.015), 200: (0.013, 0.29), 490: (0.027, 1.28)},
    ),
    # ÷ 20 in the paper for every task; E[y²] is 3 for the sparse one and 1 for the tree.
    Published("Mamba", GRAZZI, "sparse_linreg", SPARSE, {10: (0.009, 0.011), 40: (9e-5, 1.7e-4)}, scale=20 / 3),
    Published(
        TF, GRAZZI, "sparse_linreg", SPARSE, {10: (0.010, 0.015), 40: (7e-5, 1.3e-4), 200: (0.02, 0.0275)}, scale=20 / 3
    ),
    Published("OLS", GRAZZI, "sparse_linreg", SPARSE, {10: (0.070, 0.082)}, scale=20 / 3),
    Published("lasso 0.01", GRAZZI, "sparse_linreg", SPARSE, {10: (0.008, 0.012)}, scale=20 / 3),
    Published("trained net", GRAZZI, "relu_net", RELU, {100: (0.165, 0.182)}),
    Published("OLS", GRAZZI, "relu_net", RELU, {100: (0.62, 0.70)}),
    Published("greedy tree", GRAZZI, "decision_tree", TREE, {100: (0.045, 0.058)}, scale=20.0),
    Published("XGBoost", GRAZZI, "decision_tree", TREE, {100: (0.032, 0.036)}, scale=20.0),
    Published("Mamba", GRAZZI, "relu_net", RELU, {100: (0.164, 0.186), 490: (0.11, 0.127)}),
    Published(TF, GRAZZI, "relu_net", RELU, {100: (0.151, 0.163), 490: (0.41, 0.51)}),
    Published("Mamba", GRAZZI, "decision_tree", TREE, {100: (0.0047, 0.0061), 200: (0.001, 0.0022)}, scale=20.0),
    Published(TF, GRAZZI, "decision_tree", TREE, {100: (0.001, 0.0057), 200: (2.6e-5, 0.0067)}, scale=20.0),
)


def _same(given: Any, settled: Any) -> bool:
    """Whether two options are equal; numbers to 1 %, so that 0.333 is a third."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (given, settled))
    return math.isclose(given, settled, rel_tol=0.01) if numbers else bool(given == settled)


def of(task: Task) -> list[Published]:
    """The published curves of prompts of this kind."""
    return [curve for curve in CURVES if curve.fits(task)]


def settings() -> list[str]:
    """The settings that have published numbers, as one says them on a command line."""
    texts = (
        f"--task {curve.task} --task-config {' '.join(f'{key}={value}' for key, value in curve.config.items())}"
        for curve in CURVES
    )
    return list(dict.fromkeys(texts))
