"""The README tells the truth: its code runs, its tables are the vocabulary's and the cards', its commands exist."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import models
from analyses.sweep.rows import best_rival
from hooks.vocabulary import SITES, Kind

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
PLACES = {
    "hook_embed": "root",
    "hook_resid_pre": "`blocks.i.`",
    "hook_resid_mid": "`blocks.i.`",
    "hook_post": "`blocks.i.mlp.`",
    "hook_mlp_out": "`blocks.i.mlp.`",
    "hook_resid_post": "`blocks.i.`",
    "hook_scale": "`blocks.i.norm.`, `ln_final.`",
    "hook_normalized": "`blocks.i.norm.`, `ln_final.`",
    "hook_out": "the mixer's output; the prediction is `head.hook_out`",
}


def between(marker: str) -> str:
    """The README's text between <!-- marker --> and <!-- /marker -->."""
    return README.split(f"<!-- {marker} -->")[1].split(f"<!-- /{marker} -->")[0].strip()


def site_table() -> str:
    """The table of sites as the README must have it."""
    rows = ["| site | axes | equation | range | note |", "|---|---|---|---|---|"]
    for name, kind in SITES.items():
        rows.append(f"| `{name}` | {' '.join(kind.axes)} | {kind.equation} | {kind.range} | {_note(name, kind)} |")
    return "\n".join(rows)


def _note(name: str, kind: Kind) -> str:
    note = "" if name == "hook_out" else kind.note
    return "; ".join(part for part in (PLACES.get(name, ""), note) if part)


@cache
def bundled() -> dict[str, dict[str, Any]]:
    """The cards of the bundled checkpoints."""
    return {name: models.load(name).card for name in models.names()}


def cards(task: str) -> dict[str, dict[str, Any]]:
    """Those of one task."""
    return {name: card for name, card in bundled().items() if card["task"] == task}


def row(name: str, card: dict[str, Any], cells: list[str]) -> str:
    shown = [f"`{name}`", f"{card['parameters']:,}", f"{card['steps']:,}", f"{card['seconds']:,.0f}"]
    return "| " + " | ".join([*shown, f"{card['learning_rate']:g}", *cells]) + " |"


def cell(measured: dict[str, float]) -> str:
    return f"{measured['error']:.4f} ± {measured['standard_error']:.4f}"


def deep() -> dict[str, dict[str, Any]]:
    """The cards of the deep models of linear regression; those of the grid are called after its inputs."""
    return {name: card for name, card in cards("linreg").items() if name.endswith("-linreg")}


def linreg_table() -> str:
    """The bundled checkpoints as their cards have them: squared error ÷ E[y²] on fresh prompts."""
    rows = [
        "| checkpoint | parameters | steps | seconds | learning rate | error at k = d | 2d | 4d |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, card in deep().items():
        d, errors = card["task_config"]["d"], card["measured"]["model"]
        rows.append(row(name, card, [cell(errors[f"k={k}"]) for k in (d, 2 * d, 4 * d)]))
    return "\n".join(rows)


def outliers_table() -> str:
    """The bundled checkpoints as their cards have them: share of wrong labels on fresh training prompts."""
    rows = [
        "| checkpoint | parameters | steps | seconds | learning rate | wrong labels | the vote's | k-NN's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, card in cards("outliers").items():
        measured = card["measured"]
        rows.append(row(name, card, [cell(measured[who]["mean"]) for who in ("model", "vote", "knn")]))
    return "\n".join(rows)


def others_table() -> str:
    """The other bundled checkpoints as their cards have them, beside the best classical method on the same prompts."""
    rows = [
        "| checkpoint | parameters | steps | seconds | learning rate | k | error | best classical |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, card in bundled().items():
        if name in {*cards("outliers"), *deep()}:
            continue
        measured = card["measured"]
        k = sorted(int(key[2:]) for key in measured["model"] if key.startswith("k="))[1]
        rival, best = best_rival(card, f"k={k}")
        rows.append(row(name, card, [str(k), cell(measured["model"][f"k={k}"]), f"{rival} {cell(best)}"]))
    return "\n".join(rows)


@pytest.mark.contract
def test_the_site_table_is_the_vocabulary() -> None:
    assert between("sites") == site_table(), f"put this between the markers:\n{site_table()}"


@pytest.mark.contract
def test_the_table_of_checkpoints_is_what_their_cards_say() -> None:
    for marker, table in (("linreg", linreg_table()), ("outliers", outliers_table()), ("others", others_table())):
        assert between(marker) == table, f"put this between the markers:\n{table}"


@pytest.mark.end_to_end
def test_the_python_blocks_run_one_after_the_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = [code for language, code in BLOCKS if language == "python"]
    assert len(blocks) >= 3
    # As a file, because nnsight reads the source of the block that it traces.
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    runpy.run_path(str(script))
    said = capsys.readouterr().out
    clean, fixed = (
        float(number) for number in re.findall(r"(\d+\.\d+) with", said)[:1] + re.findall(r", (\d+\.\d+) with", said)
    )
    assert fixed > clean


@pytest.mark.end_to_end
def test_every_shell_line_is_a_command_that_exists() -> None:
    """make targets by a dry run; analyses by --help. (make demo and make test themselves are what sets this test
    up.)
    """
    lines = [line.split("#")[0].strip() for language, code in BLOCKS if language == "sh" for line in code.splitlines()]
    lines += re.findall(r"`(python -m analyses[^`]*)`", README)
    assert len(lines) >= 4
    for line in filter(None, dict.fromkeys(lines)):
        words = shlex.split(line)
        if words[0] == "make":
            command = ["make", "-n", *words[1:]]
        else:
            assert words[:2] == ["python", "-m"], line
            command = [sys.executable, *words[1:], *([] if words[2] == "analyses" else ["--help"])]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 0, f"{line}: {done.stderr}"


@pytest.mark.contract
def test_every_block_is_of_a_kind_that_a_test_looks_at() -> None:
    assert {language for language, _ in BLOCKS} <= {"python", "sh", ""}
    pictures = [code for language, code in BLOCKS if language == ""]
    assert len(pictures) == 1 and "analyses" in pictures[0]  # the arrow picture


@pytest.mark.contract
def test_pictures_that_the_readme_shows_are_there() -> None:
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file(), path
