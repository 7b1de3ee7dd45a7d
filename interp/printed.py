"""A table as text for people: the first rows, on lines that fit a terminal.

What does not fit is left out in this order: columns that are empty or the same in all of these rows (the latter are
said once, above), digits, the ends of long texts, the last columns. ``table.csv`` has everything.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import pandas as pd

WIDTH = 100
"""Columns of a line."""
ROWS = 20
GAP = "  "
LEAST = 20
"""A text is cut to no fewer letters than this."""


def lines_of(table: pd.DataFrame, rows: int = ROWS, width: int = WIDTH) -> list[str]:
    """The first ``rows`` rows of ``table``, at most ``width`` columns wide, with a line for what is not shown."""
    shown = table.head(rows)
    columns = {str(name): _cells(shown[name].tolist(), 4) for name in table.columns}
    above: list[str] = []
    if _wide(columns) > width and len(shown) > 1:
        same = {name: cells[0] for name, cells in columns.items() if len(set(cells)) == 1}
        above = [f"{name}: {cell}" for name, cell in same.items() if cell]
        columns = {name: _cells(shown[name].tolist(), 3) for name in columns if name not in same}
    if _wide(columns) > width:
        columns = _cut(columns, width)
    left = list(columns)
    while _wide(columns) > width and len(columns) > 1:
        name, _ = columns.popitem()
        if name.endswith("high"):  # one end of an interval says little
            columns.pop(name.removesuffix("high") + "low", None)
    missing = [name for name in left if name not in columns]
    found = folded("these rows: " + "; ".join(above), width) if above else []
    found += _grid(columns, {name for name in columns if _numeric(table[name])})
    if len(table) > rows:
        found.append(f"… {len(table) - rows} more rows in table.csv")
    if missing:
        found += folded(f"not shown for want of room: {', '.join(missing)} (table.csv has all columns)", width)
    return found


def folded(text: str, width: int = WIDTH, indent: str = "") -> list[str]:
    """``text`` on lines of at most ``width``; a word that is longer, such as a path, stays whole."""
    look: dict[str, Any] = {"subsequent_indent": indent, "break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(text, width, **look) or [text]


def _cells(values: Sequence[Any], digits: int) -> list[str]:
    return [_cell(value, digits) for value in values]


def _cell(value: Any, digits: int) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and value != value):
        return ""
    return f"{value:.{digits}g}" if isinstance(value, float) else " ".join(str(value).split())


def _numeric(column: pd.Series) -> bool:
    return column.dtype.kind in "iuf"


def _wide(columns: dict[str, list[str]]) -> int:
    return sum(_width(name, cells) for name, cells in columns.items()) + len(GAP) * max(0, len(columns) - 1)


def _width(name: str, cells: Sequence[str]) -> int:
    return max(map(len, [name, *cells]))


def _cut(columns: dict[str, list[str]], width: int) -> dict[str, list[str]]:
    """The columns with their longest texts cut, the widest column first, until they fit or nothing is left to cut."""
    limit = {name: _width(name, cells) for name, cells in columns.items()}
    gaps = len(GAP) * (len(columns) - 1)
    while (over := sum(limit.values()) + gaps - width) > 0:
        name = max(limit, key=lambda each: limit[each])
        second = max([size for other, size in limit.items() if other != name], default=0)
        least = max(LEAST, len(name))
        if limit[name] <= least:
            break
        limit[name] = max(least, limit[name] - over, min(second - 1, limit[name] - 1))
    return {name: [_end(cell, limit[name]) for cell in cells] for name, cells in columns.items()}


def _end(cell: str, limit: int) -> str:
    return cell if len(cell) <= limit else cell[: limit - 1] + "…"


def _grid(columns: dict[str, list[str]], numbers: set[str]) -> list[str]:
    """Numbers to the right, texts to the left."""
    set_out = []
    for name, cells in columns.items():
        wide = _width(name, cells)
        set_out.append([cell.rjust(wide) if name in numbers else cell.ljust(wide) for cell in [name, *cells]])
    return [GAP.join(row).rstrip() for row in zip(*set_out, strict=True)]
