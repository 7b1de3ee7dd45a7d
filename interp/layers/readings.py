"""The measurements of ``probe_layers``: the lens with its floors, the probes, the map over blocks and examples.

Each draws its prompts from its own part of the subject's stream "probe", so that none sees the prompts of another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import hooks
from interp import probe, seeds
from interp.estimators.iterative import sums_before
from interp.layers import lens, matching
from interp.tasks.base import Batch, Task

TARGETS = ("w", "w_ols", "Xty", "y", "direction", "label", "Xty_clean", "n_clean")
"""The task's variables that are probed for, where it has them."""
PER_PROMPT = ("w", "direction")
SUMS = "running sum"


@dataclass(frozen=True)
class Subject:
    """A model, the same architecture with random weights, the task, the examples k of the context, and the seed."""

    name: str
    model: Any
    untrained: Any
    task: Task
    k: int
    seed: int
    device: str = "cpu"

    @property
    def regression(self) -> bool:
        """Whether labels are numbers, so that a scale and a shift can be fitted; else they are classes."""
        return self.task.metric.startswith("squared error")

    @property
    def linear(self) -> bool:
        """Whether there is a w: what least squares and its relatives are about."""
        return "w" in self.task.sample(1, torch.Generator(), n_pairs=1).truth

    @property
    def longest(self) -> int:
        """Pairs of the longest prompt: twice the task's, unless the model has a length."""
        limit = getattr(self.model.cfg, "n_ctx", None)
        wanted = 2 * self.task.n_pairs
        joint = self.task.d_token > self.task.d
        return wanted if limit is None else min(wanted, limit if joint else (limit + 1) // 2)

    def sample(self, n: int, part: int, n_pairs: int) -> Batch:
        """``n`` prompts of this part of the stream, on the device."""
        return self.task.sample(n, seeds.generator("probe", self.seed, part), n_pairs=n_pairs).to(self.device)


@dataclass(frozen=True)
class Lens:
    """Errors by block and prompt, and the scale and shift of the fit.

    fitted, raw    with a scale and a shift for each prompt and block, and as the model would say it
    untrained      of random weights
    other_labels   against the labels of another w, fitted to them
    other_prompt   of the predictions for another prompt's queries
    nothing        of a Gaussian feature, drawn: it knows nothing and has what the formula of the floor asks for
    refit          whether all but ``raw`` are fitted. In classification none is: a feature that only tells a prompt's
                   two patterns apart would be turned the right way round by the labels of the fit
    variance       that of the labels of each prompt ÷ scale
    """

    forks: lens.Forks
    fitted: Float[Tensor, "block batch"]
    raw: Float[Tensor, "block batch"]
    untrained: Float[Tensor, "block batch"]
    other_labels: Float[Tensor, "block batch"]
    other_prompt: Float[Tensor, "block batch"]
    nothing: Float[Tensor, " batch"]
    scale: Float[Tensor, "block batch"]
    shift: Float[Tensor, "block batch"]
    variance: Float[Tensor, " batch"]
    refit: bool
    profile: lens.Profile


def through_lens(subject: Subject, n: int, m: int, queries: int) -> Lens:
    """The lens on ``n`` prompts with m + ``queries`` queries each, and its floors."""
    task = subject.task
    batch = subject.sample(n, 0, subject.k + m + queries)
    own = lens.forks(subject.model, batch, subject.k)
    fresh = lens.forks(subject.untrained, batch, subject.k)
    judged = lens.asked(own.asked, slice(m, None))

    def error(decoded: Tensor, labels: Tensor) -> Tensor:
        corrected = lens.affine(decoded, labels, m).corrected if subject.regression else decoded[..., m:]
        return lens.errors(task, corrected, dataclasses.replace(judged, targets=labels[:, m:])).mean(-1)

    labels = own.asked.targets
    drawn = torch.randn(labels.shape, generator=seeds.generator("floor", subject.seed)).to(labels)
    fit = lens.affine(own.decoded, labels, m)
    fitted = error(own.decoded, labels)
    return Lens(
        forks=own,
        fitted=fitted,
        raw=lens.errors(task, own.decoded[..., m:], judged).mean(-1),
        untrained=error(fresh.decoded, labels),
        other_labels=error(own.decoded, _other_labels(subject, batch)[:, subject.k :]),
        other_prompt=error(own.decoded.roll(1, dims=1), labels),
        nothing=error(drawn[None], labels)[0],
        scale=fit.scale,
        shift=fit.shift,
        variance=judged.targets.double().var(dim=1) / task.scale,
        refit=subject.regression,
        profile=lens.profile(fitted, seed=subject.seed),
    )


@dataclass(frozen=True)
class Probed:
    """One probe: features ("residual", "state" or SUMS), block (0: before the first; −1: none), k, target."""

    features: str
    block: int
    k: int
    target: str
    probe: probe.Probe


def probes(subject: Subject, n: int) -> list[Probed]:
    """Ridge probes at the context's k, and at one where the pairs do not determine w.

    Residual and state are read after the query, on equal numbers of principal components. The running sums, which no
    block changes, are probed once for each k (features SUMS).
    """
    task, found = subject.task, []
    parts = probe.split(n, seed=subject.seed)
    early = min(max(1, min(task.d - 1, subject.k // 2)), subject.k)
    batches = {k: subject.sample(n, part, k + 1) for part, k in enumerate(sorted({early, subject.k}), start=2)}
    drawn = {k: _targets(task, batch, k) for k, batch in batches.items()}
    # Without examples, sums over them are the same for every prompt: nothing that a probe could read.
    told = [name for name in drawn[early] if all(_varies(values[name]) for values in drawn.values())]
    for k, batch in batches.items():
        targets = {name: drawn[k][name] for name in told}
        own, fresh = (features(model, batch) for model in (subject.model, subject.untrained))
        sums = torch.cat([sums_before(batch.y[..., None] * batch.x)[:, k], batch.x[:, k]], dim=1)
        width = min(subject.model.cfg.d_model, len(parts.train) // 4)
        for (kind, block), values in {(SUMS, -1): sums, **own}.items():
            every = probe.ridge(
                values,
                targets,
                untrained=fresh.get((kind, block)),
                running_sum=None,
                split=parts,
                components=width,
                seed=subject.seed,
            )
            found += [Probed(kind, block, k, name, one) for name, one in every.items()]
    return found


def targets_of(task: Task) -> list[str]:
    """The variables of ``task`` that are probed for."""
    return [name for name in task.variables(task.sample(2, torch.Generator())) if name in TARGETS]


def _targets(task: Task, batch: Batch, k: int) -> dict[str, Tensor]:
    """What the probes are asked for once ``k`` examples and a query have been read."""
    variables = {name: value for name, value in task.variables(batch).items() if name in TARGETS}
    return {name: value if name in PER_PROMPT else value[:, k] for name, value in variables.items()}


def _varies(values: Tensor) -> bool:
    return bool((values != values[:1]).any())


def features(model: Any, batch: Batch) -> dict[tuple[str, int], Float[Tensor, "batch feature"]]:
    """The residual after 0, 1, … L blocks and the state after 1, … L, once the last query has been read.

    A model without a recurrent state has residuals only.
    """
    recurrent = hasattr(model, "step")
    record = hooks.record(model, batch.tokens, lens.RESIDUALS, **({"return_state": True} if recurrent else {}))
    found = {("residual", block): value[:, -1] for block, value in enumerate(record.values())}
    if recurrent:
        found |= {("state", block): layer.h.flatten(1) for block, layer in enumerate(record.output[1], start=1)}
    return found


@dataclass(frozen=True)
class Map:
    """Every block at every k, on the CPU: ``raw`` errors, and predictions ``calibrated`` to the labels' unit.

    ``trained``: number of k of the task itself; from there on prompts are longer than in training.
    """

    batch: Batch
    decoded: Float[Tensor, "block batch n_pairs"]
    raw: Float[Tensor, "block batch n_pairs"]
    calibrated: Float[Tensor, "block batch n_pairs"]
    trained: int

    def within(self) -> Batch:
        """The prompts cut to the trained number of examples, as an estimator sees them."""
        return lens.asked(self.batch, slice(0, self.trained))


def error_map(subject: Subject, n: int) -> Map:
    """``n`` prompts of the longest length; the calibration is fitted on the first half of them and on trained k ≥ 1."""
    task, trained = subject.task, subject.task.n_pairs
    batch = subject.sample(n, 1, subject.longest)
    decoded = lens.decode(subject.model, lens.along(subject.model, batch)).cpu()
    batch = batch.to("cpu")
    calibrated = lens.calibrated(decoded, batch.targets, slice(0, n // 2), slice(1, trained))
    return Map(batch, decoded, lens.errors(task, decoded, batch), calibrated, trained)


def matches(levels: Map, found: matching.Candidates | None, seed: int) -> list[matching.Match]:
    """Each block's nearest algorithm over the trained numbers of examples; none where nothing is matched."""
    if found is None or levels.trained < 2:
        return []
    own = levels.calibrated[..., : levels.trained]
    return [matching.match(one, found, range(1, levels.trained), seed=seed) for one in own]


def matches_by_k(
    levels: Map, found: matching.Candidates | None, ks: Sequence[int], seed: int
) -> dict[tuple[int, int], matching.Match]:
    """The nearest algorithm after each number of examples, chosen for it alone: (block, k) → match.

    The last block after every k ≥ 1 within training, every other block after ``ks``.
    """
    if found is None or levels.trained < 2:
        return {}
    own, last = levels.calibrated[..., : levels.trained], len(levels.calibrated) - 1
    asked = [(block, k) for block in range(last) for k in ks if 0 < k < levels.trained]
    asked += [(last, k) for k in range(1, levels.trained)]
    return {(block, k): matching.match(own[block], found, [k], seed=seed) for block, k in asked}


def _other_labels(subject: Subject, batch: Batch) -> Float[Tensor, "batch n_pairs"]:
    """The same queries under another task variable; where the task's only other one turns every label round, which a
    negative scale would undo, the labels of another prompt.
    """
    if subject.regression:
        return subject.task.corrupt(batch, seeds.generator("corrupt", subject.seed)).targets
    return batch.targets.roll(1, dims=0)
