"""What must hold of an outlier analysis for its numbers to mean anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from analyses.attribute_outliers import Subjects
    from analyses.attribute_outliers.parts import Findings
    from interp.result import Check
    from interp.tasks import Batch
    from models import Root


def _classes(batch: Batch) -> bool:
    return "same" in batch.truth


def all_checks(found: Findings, subjects: Subjects, untrained: Root, count: int, seed: int) -> list[Check]:
    """What must hold for the numbers to mean anything."""
    from analyses.attribute_outliers.edits import run as predict
    from analyses.attribute_outliers.parts import BOUNDS, PRODUCTS, SHARES, SUMS
    from interp import cards, evaluate
    from interp.metric import rounding
    from interp.result import Check

    checks = []
    batch = evaluate.prompts(subjects.trained, count, seed)
    last = subjects.trained.n_pairs - 1
    for name, model in subjects.measured().items():
        error = evaluate.errors(model, subjects.trained, batch=batch, query_only=True)[:, -1]
        for gap in cards.gaps(model.card, {last: error}).values():
            checks.append(Check.at_most(f"{name}: error against the card, in standard errors", gap, 4.0))
    chance = evaluate.errors(untrained, subjects.trained, batch=batch, query_only=True)[:, -1].double()
    if _classes(batch):
        spread = float(chance.std()) / count**0.5
        off = abs(float(chance.mean()) - 0.5) / max(spread, 1e-12)
        checks.append(Check.at_most("untrained model: distance from chance, in standard errors", off, 4.0))
    else:
        nothing = float(batch.last().targets.square().mean()) / subjects.trained.scale
        relative = float(chance.mean()) / nothing
        checks.append(Check.at_least("untrained model: error relative to predicting zero", relative, 0.9))
    part = batch.take(slice(0, min(64, count)))
    fused = predict(subjects.model, part)
    exposed = _exposed(subjects.model, part)
    if exposed is not None:
        size = float(fused.abs().max()) or 1.0
        gap = float((fused - exposed).abs().max()) / size
        checks.append(Check.at_most("fused against exposed path, relative", gap, rounding(model, 1e-4)))
    # The worst of all models that are asked, so the widest rounding of theirs.
    widest = {
        name: max(rounding(one, BOUNDS[name]) for one in subjects.models.values()) for name in (SUMS, PRODUCTS, SHARES)
    }
    bounds = {**BOUNDS, **widest}
    checks += [Check.at_most(name, value, bounds[name]) for name, value in found.checks.items()]
    return checks


def _exposed(model: Root, batch: Batch) -> Tensor | None:
    """The predictions with the scan sites formed; None where the model has no scan."""
    import hooks
    from analyses.attribute_outliers.edits import run as predict

    if not any(name.endswith(".hook_state") for name in model.hook_dict):
        return None
    with hooks.expose(model):
        return predict(model, batch)
