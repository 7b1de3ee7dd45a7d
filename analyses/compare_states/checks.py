"""What must hold of a comparison of states for its numbers to mean anything, and what is said beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from analyses.compare_states.study import Plan, Study
    from interp.result import Check
    from interp.similarity import Similarity
    from models import Root

    Alike = Mapping[int, Mapping[tuple[int, int], Mapping[str, Similarity]]]


def notes(studies: list[Study], loaded: dict[str, Root], asked: Plan) -> list[str]:
    """One line for each part that this task or these prompts leave out."""
    from analyses.compare_states.study import REMEMBERS, unasked, unread
    from interp import cards, probe
    from interp.similarity import varies

    notes = cards.differing(loaded, asked.task)
    judges = len(asked.split.test)
    if judges < probe.FEWEST:
        notes.append(
            f"{judges} prompts judge the probes: below {probe.FEWEST}, from {2 * probe.FEWEST} prompts on, their "
            "intervals lie above 0 by chance more often than they say"
        )
    if alike := unread(asked):
        notes.append(f"after 0 examples {', '.join(alike)} are the same for every prompt: not probed")
    if pair := unasked(asked):
        notes.append(f"the first query is a clean one: {', '.join(pair)} of the first pair not probed after 0 examples")
    for study in studies:
        still = [str(layer) for layer, rows in enumerate(study.rows[0]) if not varies(rows)]
        if still:
            notes.append(f"after 0 examples the states of {study.name} in layers {', '.join(still)} are the same for ")
            notes[-1] += "every prompt: not compared"
    if not asked.remembers:
        notes.append(
            f"prompts of fewer than {REMEMBERS + 1} pairs leave no room to remember: no decay, half-life, reset or "
            "derivative is measured"
        )
    if asked.swap_k == 0:
        notes.append("prompts of one pair have no context: no state is swapped")
    return notes


def all_checks(studies: list[Study], loaded: list[Root], alike: Alike, asked: Plan) -> list[Check]:
    """What must hold for the numbers to mean anything, model by model."""
    import numpy as np

    from interp import cards
    from interp.metric import FP32, rounding
    from interp.result import Check

    checks = []
    for study, model in zip(studies, loaded, strict=True):
        name = study.name
        ks = asked.task.report_ks if model.card["task_config"] == asked.task.config else ()
        alone = study.error.shape[1] == 1
        for k, gap in cards.gaps(model.card, {k: study.error[:, -1 if alone else k] for k in ks}).items():
            checks.append(Check.at_most(f"{name}: clean error at k={k} against the card, standard errors", gap, 4.0))
        if study.exact is not None and study.nothing is not None:
            off = abs(float(study.exact.mean) - 1)
            checks.append(
                Check.at_most(
                    f"{name}: swap of the whole state, distance of its slope from 1", off, rounding(model, 1e-3)
                )
            )
            checks.append(Check.at_most(f"{name}: swap of nothing, largest change", study.nothing, 0.0))
        for target, reading in study.reading.items():
            shuffled = float(np.nanmean(reading.shuffled[..., 0]))
            checks.append(Check.at_most(f"{name}: shuffled {target}, mean R²", shuffled, reading.lucky))
        if study.reach_gap is not None:
            checks.append(Check.at_most(f"{name}: derivative against differences, relative", study.reach_gap, 0.05))
        if study.forgets is not None:
            gap = study.forgets.error
            checks.append(
                Check.at_most(f"{name}: states rebuilt from decays and writes, relative", gap, rounding(model, FP32))
            )
    for k, pairs in alike.items():
        for (i, j), measures in pairs.items():
            # Its variance under permutation is about 2 / (n (n − 3)) (Székely and Rizzo 2013); 5, because the largest
            # of all pairs of layers is asked.
            null = measures["cka"]
            off = float(np.nanmax(np.abs(null.null_mean))) * (null.n * (null.n - 3) / 2 * null.n_perm) ** 0.5
            what = f"{studies[i].name}, {studies[j].name}: debiased CKA of permuted prompts, k={k}"
            checks.append(Check.at_most(f"{what}, largest in standard errors", off, 5.0))
    return checks
