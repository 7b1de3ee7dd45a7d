"""The parts of an outlier analysis that look into one model: why outliers weigh less, and whether that is used.

Both write rows and arrays, and hand back the numbers that must be small for these to mean anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.attribute_outliers import edits
from analyses.attribute_outliers.factors import FACTORS, factors, split
from analyses.attribute_outliers.gate import by_rank, clock, selection_gate
from analyses.attribute_outliers.prompts import Prompts, by_example, shuffled, tokens_of
from analyses.attribute_outliers.rows import ENOUGH, Rows, by_place, level, mean_in
from hooks.errors import BadArgument
from hooks.inputs import fed
from interp import seeds
from interp.attention.tokens import contributions
from interp.metric import recovery
from interp.stats import bootstrap, ratio

CLEANED, CONTAMINATED = "all outliers clean", "all clean contaminated"
LEFT_OUT = "all outliers left out"
"""The prompts without their outliers, shorter by as many."""
GATED = "theory, gated (hand-set)"
"""The model of the theory whose gate is drawn beside that of a trained one."""
SUMS = "contributions: distance of their sum from what they explain, relative"
PRODUCTS = "factors: distance of their product from the contributions, relative"
SHARES = "Shapley shares: distance of their sum from the difference, relative"
FLAGS = "shuffled outlier flags: difference in standard errors"
IDENTITY = "identity edit: largest change of a prediction"
UNDONE = "share of the outliers' error undone"
"""The quantity of :func:`edits.undone` in the table."""
BOUNDS = {SUMS: 1e-5, PRODUCTS: 1e-3, SHARES: 1e-6, FLAGS: 4.0, IDENTITY: 0.0}
"""The largest value of each that still lets the numbers mean something."""


@dataclass
class Findings:
    """Rows, arrays, and the numbers that checks are made of."""

    rows: Rows = field(default_factory=Rows)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    checks: dict[str, float] = field(default_factory=dict)

    def worst(self, name: str, value: float) -> None:
        """Keep the largest."""
        self.checks[name] = max(self.checks.get(name, value), value)

    def take(self, other: Findings) -> None:
        """Put the other's behind these."""
        self.rows.take(other.rows)
        self.arrays |= other.arrays
        for name, value in other.checks.items():
            self.worst(name, value)


def query(output: Tensor) -> Float[Tensor, " batch"]:
    """The prediction: what the model says at the last position."""
    return output[:, -1, 0]


def why(found: Findings, name: str, model: Any, prompts: Prompts, layer: int, knocked: int, seed: int) -> None:
    """Contributions of every context example, their split over factors, and the gate, in one layer.

    ``knocked`` is the number of prompts whose writes are also knocked out one by one.
    """
    votes, groups, pairs = prompts.votes().double(), prompts.groups, prompts.context.shape[1]
    tokens = fed(model, prompts.batch.tokens)
    context = {group: chosen[:, :-1] for group, chosen in groups.items()}
    out = _left_out(model, prompts)
    _contribution(found, name, "left out", "", out * votes[:, :-1], context)
    _shuffled_flags(found, name, out.abs(), prompts, seed)
    _closeness(found, "left_out", out * votes[:, :-1], context)
    try:
        first = contributions(model, tokens, layer, scalar=query)
    except BadArgument as error:
        found.rows.skip(name, f"contributions, split and gate: {error}")
        return
    found.worst(SUMS, first.relative_error)
    each = by_example(first.tokens, pairs).sum(-1).double().cpu()
    _contribution(found, name, "first order", str(layer), each * votes, groups)
    _closeness(found, "first_order", (each * votes)[:, :-1], context)
    if f"blocks.{layer}.mixer.hook_conv_init" in model.hook_dict:
        taps = _with_taps(found, name, model, tokens, layer)
        if taps is not None:
            shown = by_example(taps, pairs).sum(-1).double().cpu() * votes
            _contribution(found, name, "first order, taps inside", str(layer), shown, groups)
    _knocked_out(found, name, model, prompts, layer, knocked)
    try:
        seen = factors(model, tokens[:ENOUGH], layer, query)
    except BadArgument as error:
        found.rows.skip(name, f"split and gate: {error}")
        return
    size = float(first.tokens.abs().max()) or 1.0
    again = float((seen.contributions() - first.tokens[:ENOUGH]).abs().max()) / size
    found.worst(PRODUCTS, again)
    _split(found, name, model, prompts, layer)
    gate_rows(found, name, model, prompts, layer)


def used(found: Findings, name: str, model: Any, prompts: Prompts, reference: Prompts, seed: int) -> None:
    """Error, margin, recovery and the undone share of the outliers' error, under every intervention on one model; a
    line for what is not defined on these prompts.
    """
    batch, scale = prompts.batch.to("cpu").last(), prompts.task.scale
    outlier, others = prompts.outlier, prompts.context & ~prompts.outlier
    before = edits.run(model, prompts.batch)

    def measures(prediction: Float[Tensor, " n"]) -> tuple[Tensor, Tensor]:
        error = prompts.task.error(prediction[:, None], batch)[:, 0]
        return error.double(), (prediction * batch.targets[:, 0] / scale).double()

    clean = measures(before)
    found.rows.add("use", name, "unedited", "error", level(clean[0]))
    found.rows.add("use", name, "unedited", "margin", bootstrap(clean[1]))
    planned = edits.interventions(model, prompts, edits.Reference(model, reference), seed)
    for line in [*edits.lacking(model), *edits.undefined(prompts)]:
        found.rows.skip(name, line)
    if not planned:
        why = "the model has none of their sites" if bool(outlier.any()) else "these prompts have no outliers"
        found.rows.skip(name, f"interventions: {why}")
    errors: dict[tuple[str, str], Tensor] = {}
    wholes: dict[int, Tensor] = {}
    alike: dict[int, list[str]] = {}
    for one in planned:
        after = edits.run(model, prompts.batch, one.edits)
        error, margin = measures(after)
        group = "control" if one.control else ""
        found.rows.add("use", name, one.name, "error", level(error), group=group)
        found.rows.add("use", name, one.name, "change of error", bootstrap(error - clean[0]), group=group)
        found.rows.add("use", name, one.name, "change of margin", bootstrap(margin - clean[1]), group=group)
        errors[one.name, group] = error
        key = id(one.whole)
        if key not in wholes:
            wholes[key] = edits.run(model, one.whole)
        if int((wholes[key] != before).sum()) >= ENOUGH:
            share = recovery(after, wholes[key], before)
            found.rows.add("use", name, one.name, "recovery", share, group=group)
        else:
            alike.setdefault(key, []).append(one.name)
        if one.name == edits.NOTHING:
            found.worst(IDENTITY, float((after - before).abs().max()))
    for names in alike.values():
        found.rows.skip(
            name, f"recovery: fewer than {ENOUGH} predictions change with what these stand for: {', '.join(names)}"
        )
    reals: dict[str, Any] = {}
    if bool(outlier.any()):
        reals |= {CLEANED: prompts.cleaned(outlier), LEFT_OUT: prompts.without(outlier)}
    if bool(others.any()):
        reals[CONTAMINATED] = prompts.contaminated(others)
    for label, real in reals.items():
        error, margin = measures(edits.run(model, real))
        found.rows.add("use", name, label, "error", level(error), group="whole")
        found.rows.add("use", name, label, "change of margin", bootstrap(margin - clean[1]), group="whole")
        errors[label, "whole"] = error
    clean_error = errors.pop((CLEANED, "whole"), None)
    errors.pop((CONTAMINATED, "whole"), None)
    if clean_error is not None:
        _undone(found, name, errors, clean[0], clean_error)


def _undone(
    found: Findings, name: str, errors: Mapping[tuple[str, str], Tensor], before: Tensor, clean: Tensor
) -> None:
    """Rows of :func:`edits.undone` by (condition, group), or one line where there is no error to undo."""
    for (condition, group), after in errors.items():
        try:
            share = edits.undone(after, before, clean)
        except BadArgument as error:
            found.rows.skip(name, f"{UNDONE}: {error}")
            return
        found.rows.add("use", name, condition, UNDONE, share, group=group)


def _contribution(
    found: Findings, name: str, quantity: str, layer: str, values: Tensor, groups: dict[str, Tensor]
) -> None:
    for group, chosen in groups.items():
        mean = mean_in(values.cpu(), chosen.cpu())
        found.rows.add("contribution", name, "vote for its own label", quantity, mean, group=group, layer=layer)


def _closeness(found: Findings, name: str, values: Tensor, groups: dict[str, Tensor]) -> None:
    """Mean by distance from the query for each group, as arrays (3, place)."""
    for group, chosen in groups.items():
        kept = torch.where(chosen, values, torch.nan).flip(1)
        found.arrays[f"{name}|{group}"] = by_place(kept.cpu().numpy())


def _left_out(model: Any, prompts: Prompts) -> Float[Tensor, "batch example"]:
    """F − F without the example, for each context example: one run on shorter prompts each."""
    base = edits.run(model, prompts.batch).double()
    count = prompts.context.shape[1] - 1
    changes = []
    for example in range(count):
        one = torch.zeros_like(prompts.context)
        one[:, example] = True
        changes.append(base - edits.run(model, prompts.without(one)).double())
    return torch.stack(changes, dim=1) if changes else base.new_zeros(len(base), 0)


def _shuffled_flags(found: Findings, name: str, size: Tensor, prompts: Prompts, seed: int) -> None:
    """The difference of |effect| between flagged and other examples, with the true flags and with shuffled ones."""
    flags = {"true flags": prompts.outlier, "shuffled flags": shuffled(prompts, seeds.generator("flags", seed))}
    for label, flagged in flags.items():
        chosen, others = flagged[:, :-1].cpu(), ~flagged[:, :-1].cpu()
        both = chosen.any(1) & others.any(1)
        if int(both.sum()) < ENOUGH:
            return
        means = [(size * mask).sum(1)[both] / mask.sum(1)[both] for mask in (chosen, others)]
        moved = bootstrap(means[0] - means[1])
        found.rows.add("contribution", name, label, "|left out|: flagged − others", moved)
        if label == "shuffled flags":
            spread = float((means[0] - means[1]).std()) / int(both.sum()) ** 0.5
            z = abs(float(moved.mean)) / spread if spread else 0.0
            found.worst(FLAGS, z)


def _with_taps(found: Findings, name: str, model: Any, tokens: Tensor, layer: int) -> Tensor | None:
    try:
        shown = contributions(model, tokens, layer, scalar=query, inside=("scan", "taps"))
    except BadArgument as error:
        found.rows.skip(name, f"first order with the taps inside: {error}")
        return None
    found.worst(SUMS, shown.relative_error)
    return shown.tokens


def _knocked_out(found: Findings, name: str, model: Any, prompts: Prompts, layer: int, knocked: int) -> None:
    """do(write_s := 0) in this layer, token by token, and how far the first order is from it."""
    tokens = fed(model, prompts.batch.tokens[:knocked])
    if tokens.shape[1] < 2:
        return
    one = contributions(model, tokens, layer, scalar=query, finite=True)
    assert one.finite is not None
    effect, gap = one.finite.effect.double(), one.finite.gap.double()
    pairs, votes = prompts.context.shape[1], prompts.votes()[:knocked].double()
    each = by_example(effect, pairs).sum(-1) * votes
    groups = {group: chosen[:knocked] for group, chosen in prompts.groups.items()}
    _contribution(found, name, "write knocked out", str(layer), each, groups)
    if len(tokens) >= 2 and bool(effect.any()):
        miss = ratio(gap.square().sum(1), effect.square().sum(1))
        found.rows.add(
            "contribution",
            name,
            "write knocked out",
            "gap of the first order: Σ gap² / Σ effect²",
            miss,
            layer=str(layer),
        )


def _split(found: Findings, name: str, model: Any, prompts: Prompts, layer: int) -> None:
    """Shapley shares of what the outliers of each group lose against their clean twins, for each example."""
    tokens, twins = (fed(model, batch.tokens) for batch in (prompts.batch, prompts.cleaned(prompts.outlier)))
    votes, pairs = prompts.votes(clean=True), prompts.context.shape[1]
    for group, chosen in prompts.groups.items():
        counts = chosen.sum(1).double().cpu()
        if not group.startswith("outlier") or int((counts > 0).sum()) < ENOUGH:
            continue
        weight = tokens_of(prompts.batch, chosen) * _by_token(votes, prompts.batch.tokens.shape[1], pairs)
        parts = split(model, tokens, twins, weight.double(), layer, query)
        found.worst(SHARES, parts.gap)
        values = {
            **dict(zip(FACTORS, parts.factors, strict=True)),
            "what follows": parts.following,
            "difference": parts.twin - parts.outlier,
            "outlier": parts.outlier,
            "twin": parts.twin,
        }
        for quantity, value in values.items():
            mean = ratio(value.cpu(), counts)
            found.rows.add("split", name, "twin − outlier", quantity, mean, group=group, layer=str(layer))


def gate_rows(found: Findings, name: str, model: Any, prompts: Prompts, layer: int) -> None:
    """G by closeness and kind, and the line of log G, in one layer."""
    groups, pairs = prompts.groups, prompts.context.shape[1]
    clean = prompts.context & ~prompts.outlier
    weighed = groups.get("clean, same pattern", clean)
    if not bool(weighed.any()):
        weighed = prompts.context
    if not bool(weighed.any()):
        found.rows.skip(name, "gate: the prompts are empty")
        return
    tokens = fed(model, prompts.batch.tokens)
    gate = by_example(selection_gate(model, tokens, layer, query, tokens_of(prompts.batch, weighed)), pairs)[..., -1]
    slopes = clock(gate, clean, prompts.outlier)
    names = {"clean": "log G per clean example between", "outlier": "log G per outlier between"}
    names["suppressed"] = "log G of an outlier − of a clean example at its place"
    for field_name, quantity in names.items():
        found.rows.add("gate", name, "selection gate G", quantity, getattr(slopes, field_name), layer=str(layer))
    for label, chosen in (("clean", clean), ("outlier", prompts.outlier)):
        found.rows.add(
            "gate", name, "selection gate G", "mean G", mean_in(gate.cpu(), chosen.cpu()), group=label, layer=str(layer)
        )
        if bool(chosen.any()):
            ranked = np.log(np.clip(by_rank(gate, chosen), 1e-300, None))
            found.arrays[f"gate|{name}|{label}"] = np.exp(by_place(ranked))


def _by_token(values: Tensor, length: int, pairs: int) -> Tensor:
    """Values of examples at each of their tokens."""
    return values.repeat_interleave(1 if length == pairs else 2, dim=1)[:, :length]
