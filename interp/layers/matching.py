"""Which algorithm predicts what a model predicts: distances to candidates, the nearest, and how sure that is.

A *family* is an algorithm with its settings; a *candidate* is one setting of it. The distance of a prediction ŷ to a
candidate's p is Σ (ŷ − p)² ÷ Σ ŷ², over the same prompts and examples: 0 is the same function, 1 is what predicting
zero would get. Settings are chosen on one half of the prompts and judged on the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from hooks.brief import brief
from hooks.errors import BadArgument
from interp import estimators
from interp.arguments import whole_number
from interp.estimators import iterative
from interp.stats import Interval, bootstrap, ratio
from interp.tasks.base import Batch

STEPS = 32
RATES = (0.1, 0.2, 0.4)
"""Fixed step sizes of gradient descent, in units of 1 / (eigenvalue of XᵀX / k): the same for every prompt."""
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
ONLINE = tuple((rate, forgetting) for forgetting in (1.0, 0.97, 0.9) for rate in (0.03, 0.06, 0.12, 0.2))
NEIGHBOURS = (1, 3, 5)


@dataclass(frozen=True)
class Candidates:
    """Predictions (candidate, batch, n_pairs), fp64, with each one's family, its setting in words, and its step.

    Where a prediction is a probability of each symbol it has one more axis, and 0 stands for knowing nothing.
    ``step`` is the number of steps where the family counts steps, else −1.
    """

    family: tuple[str, ...]
    setting: tuple[str, ...]
    step: tuple[int, ...]
    prediction: Float[Tensor, "candidate batch n_pairs *symbol"]

    __repr__ = brief

    @property
    def families(self) -> list[str]:
        """Each family once, in order."""
        return list(dict.fromkeys(self.family))


def candidates(batch: Batch, steps: int = STEPS) -> Candidates:
    """Zero, averaging, k-NN, online and batch gradient descent, GD++, Newton, ridge and least squares on ``batch``.

    GD, GD++ and Newton are there after 1, 2, … ``steps`` steps; GD with the fastest step size of each prompt, and with
    step sizes that are the same for all.
    """
    whole_number("steps", steps, least=1)
    x, y = batch.x.double().cpu(), batch.y.double().cpu()
    spectrum = iterative.Spectrum.of(x, y)
    rows: list[tuple[str, str, int, Tensor]] = [("zero", "", -1, torch.zeros_like(y))]
    pairs = _Pairs(x, y)
    rows.append(("averaging", "", -1, estimators.averaging()(pairs)))
    rows += [("k-NN", f"{n} nearest", -1, estimators.knn(n)(pairs)) for n in NEIGHBOURS]
    for (rate, keep), one in zip(ONLINE, iterative.online_gd_path(x, y, ONLINE), strict=True):
        rows.append(("online GD", f"rate {rate:g}, forgetting {keep:g}", -1, one))
    paths = {
        ("GD", "fastest rate"): iterative.gd_path(x, y, steps, spectrum=spectrum),
        **{("GD", f"rate {r:g}"): iterative.gd_path(x, y, steps, r, spectrum=spectrum) for r in RATES},
        ("GD++", "iterated"): iterative.gdpp_path(x, y, steps, spectrum=spectrum),
        ("GD++", "once"): iterative.gdpp_path(x, y, steps, form="once", spectrum=spectrum),
        ("Newton", ""): iterative.newton_path(x, y, steps, spectrum=spectrum),
    }
    for (family, setting), path in paths.items():
        rows += [(family, ", ".join(filter(None, (setting, _steps(t)))), t, path[t]) for t in range(1, steps + 1)]
    rows += [("ridge", f"α = {alpha:g}", -1, estimators.ridge(alpha)(pairs)) for alpha in PENALTIES]
    rows.append(("least squares", "", -1, estimators.ols()(pairs)))
    families, settings, taken, predictions = zip(*rows, strict=True)
    return Candidates(families, settings, taken, torch.stack(predictions))


@dataclass(frozen=True)
class Match:
    """One prediction against all candidates.

    family     name → (setting chosen on the first half, distance on the other half with its interval)
    best       the family nearest on the first half
    lead       runner-up's distance minus the best's, on the other half; the best is clear where its interval is > 0
    steps      the best candidate's number of steps and its interval over resamples of the first half; (−1, −1, −1)
               where the best family counts none
    agreement  share of those resamples in which the best family stays the best
    """

    family: dict[str, tuple[str, Interval]]
    best: str
    lead: Interval
    steps: tuple[int, int, int]
    agreement: float

    @property
    def clear(self) -> bool:
        """Whether the best family is told apart from the runner-up."""
        return float(self.lead.low) > 0


def match(
    prediction: Float[Tensor, "batch n_pairs *symbol"],
    found: Candidates,
    ks: Sequence[int],
    n_boot: int = 400,
    seed: int = 0,
) -> Match:
    """``prediction`` against every candidate over the examples ``ks``; the first half of the prompts chooses.

    Raises ``BadArgument`` where the prediction has other axes than the candidates, is zero throughout (every distance
    would be 0 ÷ 0), or has fewer than four prompts.
    """
    own = prediction.detach().double().cpu()
    if own.shape != found.prediction.shape[1:]:
        raise BadArgument(
            f"the prediction has shape {tuple(own.shape)}, the candidates {tuple(found.prediction.shape[1:])}"
        )
    half = len(own) // 2
    at = torch.tensor(list(ks), device=own.device)
    if half < 2 or not len(at):
        raise BadArgument(
            f"{len(own)} prompts and {len(at)} examples are too few to choose on one half and judge on another"
        )
    size = own[:, at].square().flatten(1).sum(1).numpy()
    if not size[:half].any() or not size[half:].any():
        raise BadArgument("the prediction is zero in every example; there is nothing to match")
    miss = (found.prediction[:, :, at] - own[:, at]).square().flatten(2).sum(2).T.numpy()
    nearest = {name: _nearest(miss[:half].mean(0), found, name) for name in found.families}
    order = sorted(nearest, key=lambda name: float(miss[:half, nearest[name]].mean()))
    best, second = nearest[order[0]], nearest[order[1]]
    distance = ratio(miss[half:, list(nearest.values())], size[half:, None].repeat(len(nearest), 1), seed=seed)
    judged = {name: (found.setting[i], one) for (name, i), one in zip(nearest.items(), distance.each(), strict=True)}
    scale = float(size[half:].mean())
    lead = bootstrap((miss[half:, second] - miss[half:, best]) / scale, seed=seed)

    counts = np.random.default_rng(seed).multinomial(half, np.full(half, 1 / half), size=n_boot)
    again = (counts @ miss[:half]).argmin(1)
    families = np.array(found.family)
    agreement = float((families[again] == order[0]).mean())
    return Match(judged, order[0], lead, _step_interval(found, order[0], best, counts @ miss[:half]), agreement)


@dataclass(frozen=True)
class _Pairs:
    x: Float[Tensor, "batch n_pairs d"]
    y: Float[Tensor, "batch n_pairs"]


def _steps(count: int) -> str:
    return f"{count} step" if count == 1 else f"{count} steps"


def _nearest(miss: NDArray[np.float64], found: Candidates, family: str) -> int:
    """The index of the family's candidate with the smallest mean."""
    members = [i for i, name in enumerate(found.family) if name == family]
    return members[int(np.argmin(miss[members]))]


def _step_interval(found: Candidates, family: str, best: int, draws: NDArray[np.float64]) -> tuple[int, int, int]:
    """The best candidate's step and the central 95 % of the best steps of its family over the resamples."""
    if found.step[best] < 0:
        return -1, -1, -1
    members = np.array([i for i, name in enumerate(found.family) if name == family])
    steps = np.array(found.step)[members[draws[:, members].argmin(1)]]
    low, high = np.quantile(steps, [0.025, 0.975], method="inverted_cdf")
    return found.step[best], int(low), int(high)
