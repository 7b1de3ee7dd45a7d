"""The table of versions: it has every cell, and what is read from it and written to it is the same."""

from __future__ import annotations

import pytest

from tests import matrix
from tests.test_pins import PYPROJECT_TEXT, ROOT

pytestmark = pytest.mark.architecture

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_b" time="0.1"/>
<testcase classname="tests.test_a" name="test_c[x|y]"><failure message="no"/></testcase>
<testcase classname="tests.test_a" name="test_d"><error message="no"/></testcase>
<testcase classname="tests.test_a" name="test_e"><skipped message="needs CUDA"/></testcase>
</testsuite></testsuites>"""


def test_every_python_has_a_lowest_and_a_newest_cell() -> None:
    told = matrix.project(PYPROJECT_TEXT)
    assert told.cells[:2] == ["3.11-lowest", "3.11-newest"] and told.cells[-1].startswith("3.13-")
    assert {"torch", "scikit-learn", "pytest-xdist"} <= set(told.packages)
    assert [name for name in told.packages if not name.replace("-", "").isalnum()] == []


def test_the_committed_table_has_every_cell() -> None:
    found = matrix.rows((ROOT / "tests" / "matrix.md").read_text(encoding="utf-8"))
    told = matrix.project(PYPROJECT_TEXT)
    # Whether they pass is not asked: this test is itself run in every cell, before its row is written.
    assert list(found) == told.cells, "a Python was added or dropped: make matrix"
    for cell, row in found.items():
        assert row["Python"].startswith(cell.split("-")[0] + ".") or row["what failed"] == "not run"


def test_counts_come_from_the_report() -> None:
    assert matrix.results(REPORT) == {
        "passed": "1",
        "failed": "2",
        "skipped": "1",
        "what failed": "tests.test_a.test_c[x/y], tests.test_a.test_d",
    }


def test_of_many_that_failed_some_are_named() -> None:
    case = '<testcase classname="tests.test_a" name="test_{:03}"><failure/></testcase>'
    found = matrix.results("<testsuites>" + "".join(case.format(i) for i in range(300)) + "</testsuites>")
    names = found["what failed"].split(", ")
    assert (found["failed"], names[0], len(names)) == ("300", "tests.test_a.test_000", matrix.NAMED + 1)
    assert names[-1] == f"and {300 - matrix.NAMED} more"


def test_a_row_is_replaced_and_the_others_stay() -> None:
    cells = ["3.11-lowest", "3.11-newest"]
    row = dict.fromkeys(matrix.COLUMNS, "1") | {"cell": cells[0]} | matrix.results(REPORT)
    first = matrix.rows(matrix.written({cells[0]: row}, cells))
    assert first[cells[0]] == row and first[cells[1]]["what failed"] == "not run"
    hung = row | {"cell": cells[1]} | matrix.none(-9)
    second = matrix.rows(matrix.written(first | {cells[1]: hung}, cells))
    assert second == {cells[0]: row, cells[1]: hung} and "hours" in second[cells[1]]["what failed"]
