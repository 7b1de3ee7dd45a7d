"""A table as text: at most so many rows, on lines that fit, and nothing left out without a word."""

from __future__ import annotations

import pandas as pd
import pytest

from interp.printed import folded, lines_of

pytestmark = pytest.mark.contract


def wide(rows: int = 30) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "model": ["mamba-linreg"] * rows,
            "condition": [f"a condition of {'very ' * 20}many words, {i}" for i in range(rows)],
            "role": [""] * rows,
            "value": [0.123456 * i for i in range(rows)],
            **{f"number {i}_{end}": [1e-7 / 3] * rows for i in range(6) for end in ("low", "high")},
            "n": list(range(rows)),
        }
    )


def test_a_table_that_fits_is_printed_as_it_is() -> None:
    table = pd.DataFrame({"k": [5, 10], "error": [0.25, float("nan")], "who": ["a", None]})
    assert lines_of(table) == [" k  error  who", " 5   0.25  a", "10"]


@pytest.mark.parametrize("width", [60, 100])
def test_a_wide_one_fits_and_says_what_is_missing(width: int) -> None:
    lines = lines_of(wide(), width=width)
    assert max(map(len, lines)) <= width
    head = next(i for i, line in enumerate(lines) if line.split() == ["condition", "value", "n"])
    above = " ".join(lines[:head])
    assert above.startswith("these rows: model: mamba-linreg; number 0_low: 3.333e-08; ") and "role" not in above
    assert lines[head + 1].startswith("a condition of very") and "…" in lines[head + 1]
    assert lines[head + 21 :] == ["… 10 more rows in table.csv"]


def test_columns_go_from_the_right_and_ends_of_intervals_together() -> None:
    numbers = {f"number {i}_{end}": [i + 1e-7, i + 0.5] for i in range(5) for end in ("low", "high")}
    lines = lines_of(pd.DataFrame({"k": [1, 2], **numbers}), width=60)
    assert max(map(len, lines)) <= 60
    assert lines[0].split("  ") == ["k", "number 0_low", "number 0_high", "number 1_low", "number 1_high"]
    said = " ".join(lines[3:])
    assert all(f"number {i}_{end}" in said for i in (2, 3, 4) for end in ("low", "high"))


def test_a_path_stays_whole() -> None:
    path = "/a/very" * 20
    assert folded(f"written: {path}")[-1] == path
