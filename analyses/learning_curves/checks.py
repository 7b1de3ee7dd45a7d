"""What must hold of learning curves for their numbers to mean anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analyses.learning_curves.errors import Curve
    from analyses.learning_curves.rows import Drawn
    from interp.result import Check
    from interp.rivals import Rival
    from interp.tasks import Task


def all_checks(
    loaded: Mapping[str, Any], beside: Sequence[Rival], task: Task, drawn: Sequence[Drawn], seed: int
) -> list[Check]:
    """What must hold for the numbers to mean anything."""
    from analyses.learning_curves import rows as curve_rows
    from interp import cards
    from interp.metric import FP32
    from interp.result import Check

    checks: list[Check] = []
    own = drawn[0]
    by_name: dict[str, Curve] = {curve.who: curve for curve in own.curves}
    for name, model in loaded.items():
        if model.card.get("task_config") == task.config and name in by_name:
            curve = by_name[name]
            columns = {k: curve.error[:, i] for i, k in enumerate(curve.ks)}
            for k, gap in cards.gaps(model.card, columns).items():
                checks.append(Check.at_most(f"{name}: error at k={k} against the card, standard errors", gap, 4.0))
    for who, gap in curve_rows.closed_gaps(task, beside, seed).items():
        checks.append(Check.at_most(f"{who}: distance from its closed form, standard errors", gap, 4.0))
    for who, change in curve_rows.leaks(task, loaded, beside, own.setting, seed).items():
        checks.append(Check.at_most(f"{who}: change by another query label, relative", change, FP32))
    return checks
