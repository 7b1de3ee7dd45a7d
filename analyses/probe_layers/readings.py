"""The measurements of ``probe_layers``: the lens with its floors, the probes, the map over blocks and examples.

Each draws its prompts from its own part of the subject's stream "probe", so that none sees the prompts of another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import hooks
from analyses.probe_layers import families, matching, symbols
from analyses.probe_layers.families import Candidates
from hooks.brief import brief
from hooks.inputs import fed
from interp import estimators, lens, probe, seeds
from interp.estimators.iterative import sums_before
from interp.machine.workers import side_by_side
from interp.tasks.base import Batch, Task, TokenTask

TARGETS = ("w", "w_ols", "Xty", "y", "direction", "label", "Xty_clean", "n_clean", "table", "estimate", "row", "counts")
"""The task's variables that are probed for, where it has them."""
PER_PROMPT = ("w", "direction", "table")
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
    def symbols(self) -> bool:
        """Whether tokens are integers and predictions probabilities."""
        return isinstance(self.task, TokenTask)

    @property
    def chain(self) -> bool:
        """Whether there is a transition table: what counting estimators are about."""
        return "table" in self.task.sample(1, torch.Generator(), n_pairs=1).truth

    @property
    def linear(self) -> bool:
        """Whether there is a w: what least squares and its relatives are about."""
        return "w" in self.task.sample(1, torch.Generator(), n_pairs=1).truth

    @property
    def longest(self) -> int:
        """Pairs of the longest prompt: twice the task's, unless the model has a length."""
        limit = getattr(self.model.cfg, "n_ctx", None)
        wanted = 2 * self.task.n_pairs
        one_each = self.symbols or self.task.d_token > self.task.d
        return wanted if limit is None else min(wanted, limit if one_each else (limit + 1) // 2)

    def sample(self, n: int, part: int, n_pairs: int) -> Batch:
        """``n`` prompts of this part of the stream, on the device."""
        return self.task.sample(n, seeds.generator("probe", self.seed, part), n_pairs=n_pairs).to(self.device)


@dataclass(frozen=True)
class Lens:
    """Errors by block and prompt, and the scale and shift of the fit.

    fitted, raw    with a scale and a shift for each prompt and block (of symbols: for each block), and as the model
                   would say it
    untrained      of random weights
    other_labels   against the labels of another w, fitted to them
    other_prompt   of the predictions for another prompt's queries
    nothing        of a feature that knows nothing, fitted: Gaussian, drawn, of which the formula of the floor tells
                   the mean; of symbols, the same at every position
    refit          whether all but ``raw`` are fitted. In classification none is: a feature that only tells a prompt's
                   two patterns apart would be turned the right way round by the labels of the fit
    variance       that of the labels of each prompt ÷ scale; none for symbols
    floor          what a feature that knows nothing has: by formula; chance; of symbols the mean of ``nothing``
    scale, shift   of the fit, a column for each prompt; of symbols the scale, a column for each group of prompts
    rivals         errors of the task's baselines at the same examples, by prompt; for symbols only
    """

    fitted: Float[Tensor, "block batch"]
    raw: Float[Tensor, "block batch"]
    untrained: Float[Tensor, "block batch"]
    other_labels: Float[Tensor, "block batch"]
    other_prompt: Float[Tensor, "block batch"]
    nothing: Float[Tensor, " batch"]
    scale: Float[Tensor, "block fit"]
    shift: Float[Tensor, "block batch"] | None
    variance: Float[Tensor, " batch"] | None
    floor: float
    refit: bool
    profile: lens.Profile
    rivals: dict[str, Float[Tensor, " batch"]]

    __repr__ = brief


def through_lens(subject: Subject, n: int, m: int, queries: int) -> Lens:
    """The lens on ``n`` prompts with m + ``queries`` queries each, and its floors; of symbols, over the ``queries``
    last of the examples 0 … k.
    """
    return _symbols_lens(subject, n, queries) if subject.symbols else _queries_lens(subject, n, m, queries)


def _symbols_lens(subject: Subject, n: int, queries: int) -> Lens:
    task, k = subject.task, subject.k
    read = slice(max(0, k + 1 - queries), k + 1)
    fitting, batch = (subject.sample(n, part, k + 1) for part in (4, 0))
    asked = lens.asked(batch, read)

    def error(log_p: Tensor, judged: Batch = asked) -> Tensor:
        return lens.errors(task, log_p, judged).mean(-1)

    goal = fitting.targets[:, read]
    seen = {name: symbols.logits(getattr(subject, name), fitting)[:, :, read] for name in ("model", "untrained")}
    own, fresh = (symbols.logits(getattr(subject, name), batch)[:, :, read] for name in seen)
    fits = {name: symbols.calibrate(one, goal) for name, one in seen.items()}
    blank = torch.zeros_like(own[:1])
    nothing = error(symbols.calibrate(torch.zeros_like(seen["model"][:1]), goal)(blank))[0]
    other = lens.asked(task.corrupt(batch, seeds.generator("corrupt", subject.seed)), read)
    fitted = error(fits["model"](own))
    return Lens(
        fitted=fitted,
        raw=error(own.log_softmax(-1)),
        untrained=error(fits["untrained"](fresh)),
        other_labels=error(fits["model"](own), other),
        other_prompt=error(fits["model"](own.roll(1, dims=1))),
        nothing=nothing,
        scale=symbols.scales(seen["model"], goal),
        shift=None,
        variance=None,
        floor=float(nothing.mean()),
        refit=True,
        profile=lens.profile(fitted, seed=subject.seed),
        rivals={name: value[:, read].mean(-1) for name, value in task.baselines(batch.to("cpu")).items()},
    )


def _queries_lens(subject: Subject, n: int, m: int, queries: int) -> Lens:
    task = subject.task
    batch = subject.sample(n, 0, subject.k + m + queries)
    own = lens.forks(subject.model, batch, subject.k)
    fresh = lens.forks(subject.untrained, batch, subject.k)
    judged = lens.asked(own.asked, slice(m, None))

    def error(decoded: Tensor, labels: Tensor) -> Tensor:
        corrected = lens.affine(decoded, labels, m).corrected if subject.regression else decoded[..., m:]
        return lens.errors(task, corrected, dataclasses.replace(judged, targets=labels[:, m:])).mean(-1)

    labels = own.asked.targets
    drawn = seeds.normal(labels.shape, seeds.generator("floor", subject.seed)).to(labels)
    fit = lens.affine(own.decoded, labels, m)
    fitted = error(own.decoded, labels)
    variance = judged.targets.double().var(dim=1) / task.scale
    return Lens(
        fitted=fitted,
        raw=lens.errors(task, own.decoded[..., m:], judged).mean(-1),
        untrained=error(fresh.decoded, labels),
        other_labels=error(own.decoded, _other_labels(subject, batch)[:, subject.k :]),
        other_prompt=error(own.decoded.roll(1, dims=1), labels),
        nothing=error(drawn[None], labels)[0],
        scale=fit.scale,
        shift=fit.shift,
        variance=variance,
        floor=lens.floor(m) * float(variance.mean()) if subject.regression else 0.5,
        refit=subject.regression,
        profile=lens.profile(fitted, seed=subject.seed),
        rivals={},
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
    early = min(max(1, subject.k // 4 if subject.symbols else min(task.d - 1, subject.k // 2)), subject.k)
    batches = {k: subject.sample(n, part, k + 1) for part, k in enumerate(sorted({early, subject.k}), start=2)}
    drawn = {k: _targets(task, batch, k) for k, batch in batches.items()}
    # Without examples, sums over them are the same for every prompt: nothing that a probe could read.
    told = [name for name in drawn[early] if all(_varies(values[name]) for values in drawn.values())]
    if not told:
        return []
    for k, batch in batches.items():
        targets = {name: drawn[k][name] for name in told}
        own, fresh = (features(model, batch) for model in (subject.model, subject.untrained))
        sums = _sums(subject, batch, k)
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
    at = {name: value if name in PER_PROMPT else value[:, k] for name, value in variables.items()}
    return {name: value.flatten(1) if value.ndim > 1 else value for name, value in at.items()}


def _sums(subject: Subject, batch: Batch, k: int) -> Float[Tensor, "batch feature"]:
    """What adding up gives: Σ y x and the query; of symbols, how often each has come and which is read."""
    if subject.symbols:
        return symbols.sums(batch, k, subject.task.d_out)
    return torch.cat([sums_before(batch.y[..., None] * batch.x)[:, k], batch.x[:, k]], dim=1)


def _varies(values: Tensor) -> bool:
    return bool((values != values[:1]).any())


def features(model: Any, batch: Batch) -> dict[tuple[str, int], Float[Tensor, "batch feature"]]:
    """The residual after 0, 1, … L blocks and the state after 1, … L, once the last query has been read.

    A model without a recurrent state has residuals only.
    """
    recurrent = hasattr(model, "step")
    keywords = {"return_state": True} if recurrent else {}
    record = hooks.record(model, fed(model, batch.tokens), lens.RESIDUALS, **keywords)
    found = {("residual", block): value[:, -1] for block, value in enumerate(record.values())}
    if recurrent:
        found |= {("state", block): layer.h.flatten(1) for block, layer in enumerate(record.output[1], start=1)}
    return found


@dataclass(frozen=True)
class Map:
    """Every block at every k, on the CPU: predictions as the model says them, and ``raw`` errors.

    Of symbols, ``decoded`` is log p, and ``answers`` are p less that of one who knows nothing; else they are equal.
    ``trained``: number of k of the task itself; from there on prompts are longer than in training.
    """

    batch: Batch
    decoded: Float[Tensor, "block batch n_pairs *symbol"]
    raw: Float[Tensor, "block batch n_pairs"]
    answers: Float[Tensor, "block batch n_pairs *symbol"]
    trained: int

    __repr__ = brief

    def within(self) -> Batch:
        """The prompts cut to the trained number of examples, as an estimator sees them."""
        return lens.asked(self.batch, slice(0, self.trained))


def error_map(subject: Subject, n: int) -> Map:
    """``n`` prompts of the longest length."""
    task, trained = subject.task, subject.task.n_pairs
    batch = subject.sample(n, 1, subject.longest)
    if subject.symbols:
        given, batch = symbols.logits(subject.model, batch).cpu(), batch.to("cpu")
        decoded = given.log_softmax(-1)
        answers = decoded.double().exp() - symbols.uniform(task, batch).double().exp()
    else:
        answers = decoded = lens.decode(subject.model, lens.along(subject.model, batch)).cpu()
        batch = batch.to("cpu")
    return Map(batch, decoded, lens.errors(task, decoded, batch), answers, trained)


def candidates(subject: Subject, levels: Map) -> Candidates | None:
    """The algorithms that the task's answers could come from; none where it has neither a w nor a table, or a prompt
    has no context.
    """
    if levels.trained < 2 or not (subject.linear or subject.chain):
        return None
    within = levels.within()
    return families.candidates(within) if subject.linear else symbols.candidates(subject.task, within)


def matches(
    levels: Map, found: Candidates | None, ks: Sequence[int], seed: int, device: str = "cpu"
) -> tuple[list[matching.Match], dict[tuple[int, int], matching.Match]]:
    """Each block's algorithm over the trained numbers of examples k ≥ 1, and (block, k) → that after k examples, fitted
    for it alone: of the last block after every such k, of every other after ``ks``. Both empty where nothing is
    matched.
    """
    if found is None:
        return [], {}
    every, last = range(1, levels.trained), len(levels.answers) - 1
    some = [k for k in ks if k in every]

    def job(blocks: slice, ks: Sequence[int], by_k: bool) -> Callable[[], list[list[matching.Match]]]:
        answers = levels.answers[blocks]
        return partial(matching.match, answers, found, ks, by_k=by_k, targets=_goal(levels), seed=seed)

    jobs = [job(slice(None), every, False), job(slice(last, None), every, True)]
    jobs += [job(slice(0, last), some, True)] if some and last else []
    together, final, *others = side_by_side(jobs, device=device)
    by_k = {
        (block, k): one
        for block, row in enumerate(others[0] if others else [])
        for k, one in zip(some, row, strict=True)
    }
    by_k |= {(last, k): one for k, one in zip(every, final[0], strict=True)}
    return [one for (one,) in together], by_k


def _goal(levels: Map) -> Tensor | None:
    """What the answers should have been, in their unit; none for symbols."""
    return levels.batch.targets if levels.answers.ndim == 3 else None


def elsewhere(subject: Subject, levels: Map) -> tuple[str, Tensor]:
    """What least squares (of symbols: counting) finds on the same inputs with another w's labels (another chain's
    symbols), in the unit of ``levels.answers``, and its name: nothing that the model could be near to.
    """
    task = subject.task
    batch = task.corrupt(levels.within(), seeds.generator("corrupt", subject.seed))
    if subject.linear:
        return "least squares of another w's labels", estimators.build("ols")(batch)
    rates = {name: task.config[name] for name in ("order", "beta", "n_symbols", "switch")}
    counted = estimators.build("add_beta", **rates)(batch).exp()
    return "counts of another chain's symbols", counted - symbols.uniform(task, batch).exp()


def _other_labels(subject: Subject, batch: Batch) -> Float[Tensor, "batch n_pairs"]:
    """The same queries under another task variable; where the task's only other one turns every label round, which a
    negative scale would undo, the labels of another prompt.
    """
    if subject.regression:
        return subject.task.corrupt(batch, seeds.generator("corrupt", subject.seed)).targets
    return batch.targets.roll(1, dims=0)
