"""What must hold of what the layers tell for its numbers to mean anything, and what is said beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from analyses.probe_layers import Config
    from analyses.probe_layers.families import Candidates
    from analyses.probe_layers.readings import Lens, Map, Probed, Subject
    from interp.result import Check


def notes(subject: Subject, probes: list[Probed], levels: Map) -> list[str]:
    """One line for each part that this model or task leaves out."""
    from analyses.probe_layers import readings as layers

    notes = []
    if not any(one.features == "state" for one in probes):
        notes.append(f"{subject.name} has no recurrent state: probes read the residual stream only")
    if subject.symbols:
        notes.append(f"{subject.task.name} has symbols: the lens is fitted for all prompts together, m is not used")
    elif not subject.regression:
        notes.append(f"{subject.task.name} is no regression: the lens is not fitted")
    if not (subject.linear or subject.chain):
        notes.append(f"{subject.task.name} has neither a w nor a transition table: no algorithm is matched")
    elif levels.trained < 2:
        notes.append("prompts of one pair have no context: no algorithm is matched")
    if subject.symbols and not layers.targets_of(subject.task):
        notes.append(f"{subject.task.name} has no variable to probe for")
    if alike := sorted({one.target for one in probes} ^ set(layers.targets_of(subject.task)), reverse=True):
        notes.append(f"after {subject.k} examples {', '.join(alike)} are the same for every prompt: not probed")
    if levels.raw.shape[-1] < 2 * subject.task.n_pairs:
        notes.append(f"{subject.name} reads at most {levels.raw.shape[-1]} pairs: the map ends there")
    return notes


def all_checks(
    subject: Subject,
    seen: Lens,
    probes: list[Probed],
    levels: Map,
    found: Candidates | None,
    config: Config,
) -> list[Check]:
    """What must hold for the numbers to mean anything."""
    import numpy as np
    import torch

    from analyses.probe_layers import readings as layers
    from hooks.inputs import fed
    from interp import cards, lens
    from interp.evaluate import predictions
    from interp.metric import FP32, rounding
    from interp.result import Check
    from interp.stats import ratio

    task, model, checks = subject.task, subject.model, []
    part = levels.batch.take(slice(0, 32))
    whole = predictions(model, task, part)
    moved = float((levels.decoded[-1, :32] - whole).abs().max() / whole.abs().max())
    checks.append(
        Check.at_most("map after the last block against the model itself, relative", moved, rounding(model, FP32))
    )
    if not subject.symbols:
        batch = subject.sample(32, 0, subject.k + 2)
        run = torch.cat([lens.context_tokens(batch, subject.k), lens.query_tokens(batch)[:, -1:]], dim=1)
        with torch.no_grad():
            direct = model(fed(model, run))[:, -1, 0]
        forked = lens.forks(model, batch, subject.k).decoded[-1, :, -1]
        moved = float((forked - direct).abs().max() / direct.abs().max())
        checks.append(
            Check.at_most("lens after the last block against a run of its own, relative", moved, rounding(model, FP32))
        )
    if model.card.get("task_config") == task.config:
        for k, gap in cards.gaps(model.card, {k: levels.raw[-1, :, k] for k in task.report_ks}).items():
            checks.append(Check.at_most(f"error at k={k} against the card, in standard errors", gap, 4.0))
    if probes:
        blind = float(np.mean([one.probe.controls["shuffled"].mean for one in probes]))
        checks.append(Check.at_most("probes of shuffled targets: mean R²", blind, 0.02))
    floors = {"other labels": seen.other_labels, "untrained weights": seen.untrained}
    if subject.symbols:
        # Random weights still show which symbols have come, and that tells something of the next.
        least = seen.floor
        del floors["untrained weights"]
    elif seen.variance is not None and subject.regression:
        spread = seen.variance.cpu().numpy()
        ours = ratio(seen.nothing.double().cpu().numpy(), spread)
        gap = abs(float(ours.mean) - lens.floor(config.m)) / max(float(ours.high - ours.low) / 3.92, 1e-12)
        checks.append(Check.at_most("floor, formula against a feature drawn at random, in standard errors", gap, 4.0))
        # Of a feature that is linear in x and knows nothing of w, the fit still uses its 1/d in common with w.
        least = (1 - 1 / task.d) * float(spread.mean())
    else:
        least = 0.5
    for name, values in floors.items():
        below = (least - float(values[-1].mean())) / max(float(values[-1].std()) / values.shape[1] ** 0.5, 1e-12)
        checks.append(Check.at_most(f"{name}: lens after the last block below chance, in standard errors", below, 4.0))
    if found is not None:
        what, wrong = layers.elsewhere(subject, levels)
        own = levels.answers[-1][:, : levels.trained]
        level = float((wrong - own)[:, 1:].square().mean() / own[:, 1:].square().mean())
        checks.append(Check.at_least(f"distance to {what}", level, 0.9))
    return checks
