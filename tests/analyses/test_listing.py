"""The list of questions: ``python -m analyses``."""

from __future__ import annotations

from pathlib import Path

import pytest

from analyses import __main__ as listing

pytestmark = pytest.mark.contract


def test_the_list_reads_docstrings_without_importing(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "alone.py").write_text('"""Not a question."""')
    for name in ("broken", "long"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__main__.py").touch()
    (tmp_path / "broken" / "__init__.py").write_text('"""Is it listed?\n\nCost       1 s\n"""\nimport nothing_\n')
    (tmp_path / "long" / "__init__.py").write_text(
        '"""What is long?\n\nNot shown  much\nCost       a minute on 2 cores;\n'
        '           --quick less\n\nAnd more.\n"""\n'
    )
    assert listing.questions(tmp_path) == {
        "broken": ("Is it listed?", "1 s"),
        "long": ("What is long?", "a minute on 2 cores; --quick less"),
    }


def test_every_command_has_a_question_and_a_cost() -> None:
    found = listing.questions()
    assert "train" in found
    for name, (question, cost) in found.items():
        assert question and cost, name


def test_the_list_is_printed_and_anything_else_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert listing.main([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in listing.questions())
    assert listing.main(["--help"]) == 0
    capsys.readouterr()
    assert listing.main(["trian"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and '"trian"' in err
