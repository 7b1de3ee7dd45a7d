"""``python -m analyses``: every question that can be asked, with its cost.

The docstrings are read with ``ast`` and not by importing: the list appears at once, and one broken
analysis does not hide the others.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

from interp.machine import streams

HERE = Path(__file__).resolve().parent


def questions(folder: Path = HERE) -> dict[str, tuple[str, str]]:
    """``{name: (first line of its docstring, its cost)}`` of every command in ``folder``."""
    found = {}
    for path in sorted(folder.glob("*/__main__.py")):
        text = ast.get_docstring(ast.parse(path.with_name("__init__.py").read_text(encoding="utf-8"))) or ""
        found[path.parent.name] = (text.partition("\n")[0].strip(), _cost(text))
    return found


def _cost(text: str) -> str:
    """What follows "Cost" in a docstring, up to the next blank or unindented line."""
    match = re.search(r"^Cost\b[:. ]*(.*(?:\n[ \t]+\S.*)*)", text, flags=re.MULTILINE)
    return " ".join(match[1].split()) if match else ""


def listing(found: dict[str, tuple[str, str]]) -> str:
    """The list as text, one paragraph a command."""
    rows = ["python -m analyses.NAME --help   says what a command takes", ""]
    for name, (question, cost) in found.items():
        rows.append(f"{name}\n    {question}" + (f"\n    cost: {cost}" if cost else ""))
    return "\n".join(rows)


def main(argv: list[str]) -> int:
    streams.open_closed()
    streams.take_every_letter()
    found = questions()
    if argv and argv != ["--help"] and argv != ["-h"]:
        name = argv[0]
        try_this = f"python -m analyses.{name}" if name in found else "python -m analyses.NAME"
        have = ", ".join(found)
        line = f'error: asked for "{" ".join(argv)}"; there is: {have}; try {try_this} --help'
        streams.complain(line)
        return 2
    try:
        streams.say(listing(found))
    except OSError as error:
        streams.complain(f"error: {error.strerror}; free some space or print elsewhere")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
