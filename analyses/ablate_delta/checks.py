"""What must hold of an ablation of Δ for its numbers to mean anything, and what is said beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from analyses.ablate_delta import RIVALS

if TYPE_CHECKING:
    from torch import Tensor

    from analyses.ablate_delta import Subject
    from analyses.ablate_delta.effects import Cell
    from interp.result import Check
    from interp.variance import Shares


def notes(subject: Subject, taps: Mapping[str, Any]) -> list[str]:
    """What the model lacks, and how much of the frozen tokens the others still hold."""
    from analyses.ablate_delta.effects import lacking

    notes = [f"{subject.name} has {line}" for line in lacking(subject.model)]
    for kind, ends in zip(taps.get("tap_share_kinds", ()), taps.get("tap_share", ()), strict=True):
        share, low, high = ends
        least, most = (
            f"{share[i]:.2f} [{low[i]:.2f}, {high[i]:.2f}] (layer {i})" for i in (share.argmin(), share.argmax())
        )
        notes.append(
            f"freeze:{kind} leaves its tokens in the other tokens' convolution taps: a share of {least} to {most}, "
            f"n = {len(subject.runs.batch)}"
        )
    return notes


def all_checks(
    subject: Subject,
    controls: Mapping[str, Tensor],
    rivals: list[Subject],
    beside: Mapping[str, Mapping[Cell, Tensor]],
    parts: Shares,
    seed: int,
) -> list[Check]:
    """What must hold for the numbers to mean anything."""
    import torch

    import hooks
    from analyses.ablate_delta.controls import identity
    from analyses.ablate_delta.effects import MEANS
    from interp import cards, evaluate, seeds
    from interp.metric import FP32, rounding
    from interp.result import Check
    from interp.tasks.base import least_by_constant

    runs, task, model = subject.runs, subject.task, subject.model
    checks = []
    if model.card.get("task_config") == task.config:
        for k, gap in cards.gaps(model.card, {k: runs.clean[:, k] for k in task.report_ks}).items():
            checks.append(Check.at_most(f"clean error at k={k} against the card, in standard errors", gap, 4.0))
    moved = float((controls["identity"] - runs.unedited(identity(model))).abs().max())
    checks.append(Check.at_most("identity edit: largest change of an error", moved, 0.0))
    part = runs.batch.take(slice(0, min(64, len(runs.batch))))
    with torch.no_grad():
        fused = task.predict(model, part)
        with hooks.expose(model):
            exposed = task.predict(model, part)
            with hooks.edit(model, identity(model)):
                again = task.predict(model, part)
    size = float(exposed.abs().max())
    checks.append(
        Check.at_most("identity edit on the exposed path: largest change", float((again - exposed).abs().max()), 0.0)
    )
    checks.append(
        Check.at_most(
            "fused against exposed path, relative", float((fused - exposed).abs().max()) / size, rounding(model, FP32)
        )
    )
    other = task.corrupt(runs.batch, seeds.generator("corrupt", seed))
    wrong = evaluate.errors(model, task, batch=replace(runs.batch, targets=other.targets))
    relative = float(wrong.mean()) / least_by_constant(task, other)
    checks.append(Check.at_least("another task's labels: error relative to the best constant", relative, 0.9))
    nothing = least_by_constant(task, runs.batch)
    for rival in rivals:
        if rival.name == "untrained":
            relative = float(rival.runs.clean.mean()) / nothing
            checks.append(Check.at_least("untrained model: error relative to the best constant", relative, 0.9))
        elif rival.name.startswith(RIVALS):
            most = max(
                float((error - rival.runs.clean).abs().max())
                for cell, error in beside[rival.name].items()
                if cell.mode in (*MEANS, "resample")
            )
            checks.append(
                Check.at_most(
                    f"{rival.name}: Δ has no content to lose, largest change", most, rounding(rival.model, FP32 * 10)
                )
            )
            least = min(
                float((error - rival.runs.clean).abs().max())
                for cell, error in beside[rival.name].items()
                if cell.mode.startswith("scale")
            )
            checks.append(Check.at_least(f"{rival.name}: scaling Δ does change the error", least, FP32 * 10))
    checks.append(
        Check.at_most("variance shares: distance of their sum from 1", abs(float(parts.share.sum()) - 1), 1e-9)
    )
    return checks
