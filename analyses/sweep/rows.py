"""What came of a sweep, as a table and as checks: one row for each cell and number of examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from interp.result import Check
from interp.rivals import fair
from interp.training.cells import Cell

ABOUT = ("n", "seed", "purpose")
"""What a card's measurement says of its prompts; its other keys are the model and its rivals."""
COLUMNS = {
    "cell": str, "model": str, "task": str, "seed": int, "size": str, "parameters": int, "steps": int,
    "seconds": float, "rate": float, "k": float, "error": float, "standard_error": float, "rival": str,
    "rival_error": float, "rival_standard_error": float, "failed": str,
}  # fmt: skip


def table(cells: Sequence[Cell], cards: Mapping[str, Mapping[str, Any]], failed: Mapping[str, str]) -> pd.DataFrame:
    """Each cell's error at every k that its task reports, and over all where ``k`` is NaN, beside the best rival's.

    Errors are on the same fresh prompts, in the task's unit. ``seconds`` is the training that was
    kept, without the search; ``rate`` the learning rate that the search took. A cell that failed is
    one row of zeros and NaN with the reason in ``failed``.
    """
    rows: list[dict[str, Any]] = []
    for cell in cells:
        named = {"cell": cell.name, "model": cell.model, "task": cell.task, "seed": cell.seed, "size": cell.size}
        if cell.name in failed:
            rows.append({**named, "failed": failed[cell.name]})
            continue
        card = cards[cell.name]
        cost = {name: card[name] for name in ("parameters", "steps", "seconds")}
        for k in ks(card):
            own = card["measured"]["model"][k]
            rival, best = best_rival(card, k)
            errors = {name: own[name] for name in ("error", "standard_error")}
            errors |= {"rival": rival, "rival_error": best["error"], "rival_standard_error": best["standard_error"]}
            rows.append(
                {
                    **named,
                    **cost,
                    "rate": card["learning_rate"],
                    "k": float(k.removeprefix("k=").replace("mean", "nan")),
                    **errors,
                }
            )
    empty = {str: "", int: 0, float: math.nan}
    return pd.DataFrame(
        {
            name: pd.Series([row.get(name, empty[kind]) for row in rows], dtype=object if kind is str else kind)
            for name, kind in COLUMNS.items()
        }
    )


def ks(card: Mapping[str, Any]) -> list[str]:
    """The keys of a card's errors, "k=5" before "k=10" and "mean" last."""
    return sorted(card["measured"]["model"], key=lambda key: (key == "mean", len(key), key))


def best_rival(card: Mapping[str, Any], k: str) -> tuple[str, Mapping[str, float]]:
    """The classical method with the lowest error at ``k`` on the same prompts, and its cell of the card.

    Of those that are told nothing but the context; some have no "mean", which was too expensive.
    """
    measured = card["measured"]
    known = [name for name in fair(list(measured)) if name not in (*ABOUT, "model") and k in measured[name]]
    name = min(known, key=lambda rival: measured[rival][k]["error"])
    return name, measured[name][k]


def checks(
    cells: Sequence[Cell],
    cards: Mapping[str, Mapping[str, Any]],
    failed: Mapping[str, str],
    distance: Mapping[str, float],
) -> list[Check]:
    """That every cell finished, that what is compared is comparable, and that the checkpoints are what they say.

    ``distance`` is, of each cell, its error on other prompts from the card's, in standard errors.
    """
    sizes: dict[tuple[str, str], list[int]] = {}
    for cell in cells:
        if cell.name in cards and not cell.beside:
            sizes.setdefault((cell.task, cell.size), []).append(cards[cell.name]["parameters"])
    rates = [len(card["learning_rates"]) for card in cards.values()]
    return [
        Check.at_most("cells that failed", float(len(failed)), 0.0),
        Check.at_most(
            "parameters of the grid's models of one task and size: largest ÷ smallest",
            max((max(of) / min(of) for of in sizes.values()), default=math.nan),
            1.1,
        ),
        Check.at_least("learning rates from which each cell's was chosen, fewest", float(min(rates, default=0)), 3.0),
        Check.at_most(
            "error on other prompts: largest distance from the card's, in standard errors",
            max(distance.values(), default=math.nan),
            4.0,
        ),
    ]
