"""Versions that are written in more than one place agree, and what is declared is what is used."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.architecture import PACKAGES, Source, imports, sources

pytestmark = pytest.mark.architecture

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT_TEXT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads(PYPROJECT_TEXT)
PROJECT = PYPROJECT["project"]
RUN_TIME = [Requirement(line) for line in PROJECT["dependencies"]]
TEST = [Requirement(line) for line in PROJECT["optional-dependencies"]["test"]]
EXTRAS = [Requirement(r) for lines in PROJECT["optional-dependencies"].values() for r in lines]

MODULE_OF = {"scikit-learn": "sklearn", "pyyaml": "yaml"}  # not the name with _ for -
BROUGHT_ALONG = {"matplotlib"}  # by seaborn, whose figures are matplotlib's


def module_of(name: str) -> str:
    return MODULE_OF.get(name, name.replace("-", "_"))


def pins(text: str) -> dict[str, str]:
    """Name → exact version of each line; raises ``ValueError`` for any other kind of line."""
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)", line)
        if match is None:
            raise ValueError(f"constraints.txt:{number}: not name==version: {line}")
        name = canonicalize_name(match[1])
        if name in found:
            raise ValueError(f"constraints.txt:{number}: {name} a second time")
        found[name] = match[2]
    return found


def unpinned(requirements: list[Requirement], pinned: dict[str, str]) -> list[str]:
    """A line for each requirement without a pin, without a bound, or that refuses its pin."""
    faults = []
    for requirement in requirements:
        version = pinned.get(canonicalize_name(requirement.name))
        if version is None:
            faults.append(f"{requirement} is not in constraints.txt")
        elif not requirement.specifier.contains(version, prereleases=True):
            faults.append(f"{requirement} does not admit the tested {version}")
        if not any(part.operator == ">=" for part in requirement.specifier):
            faults.append(f"{requirement} has no lower bound")
    return faults


def third_party(files: list[Source]) -> dict[str, str]:
    """Top-level module of each import that is neither ours nor Python's → the first place."""
    own = {*PACKAGES, "tests", "__future__"} | sys.stdlib_module_names
    found: dict[str, str] = {}
    for file in files:
        for node, name in imports(file):
            top = name.partition(".")[0]
            if file.package and top not in own:
                found.setdefault(top, file.at(node, name))
    return found


def uncommented(text: str) -> list[str]:
    """Requirement lines of a pyproject that do not say who needs them."""
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if re.match(r'"[a-z0-9-]+>=[^"]*",', line) and "  # " not in line]


PINS = pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))


def test_each_requirement_has_a_bound_and_a_pin_within_it() -> None:
    assert unpinned(RUN_TIME + TEST, PINS) == []
    assert PINS["torch"] == "2.13.0"


def test_pins_that_disagree_are_found() -> None:
    asked = [Requirement("numpy>=2.0"), Requirement("torch>=2.6"), Requirement("tqdm")]
    faults = unpinned(asked, {"numpy": "1.26.4", "tqdm": "4.65.0"})
    assert faults == [
        "numpy>=2.0 does not admit the tested 1.26.4",
        "torch>=2.6 is not in constraints.txt",
        "tqdm has no lower bound",
    ]


@pytest.mark.parametrize("line", ["numpy>=2", "torch==2.13.0+cpu", "-e .", "a @ file:///b", "numpy==2.0\nNumPy==2.1"])
def test_a_constraint_is_a_plain_exact_version(line: str) -> None:
    with pytest.raises(ValueError, match=r"constraints\.txt:\d: "):
        pins(line)


def test_each_requirement_says_who_needs_it() -> None:
    assert uncommented(PYPROJECT_TEXT) == []
    assert uncommented('  "numpy>=2.0",\n') == ['"numpy>=2.0",']


def test_what_is_imported_is_declared() -> None:
    declared = {module_of(r.name) for r in RUN_TIME + EXTRAS} | BROUGHT_ALONG
    missing = {top: place for top, place in third_party(sources()).items() if top not in declared}
    assert not missing, f"imported and not in pyproject.toml: {missing}"


def test_what_is_declared_is_imported() -> None:
    used = third_party(sources())
    idle = {r.name for r in RUN_TIME if module_of(r.name) not in used}
    assert not idle, "in pyproject.toml and imported nowhere"


def test_an_undeclared_import_is_found() -> None:
    file = Source("models/a.py", "import torch.nn as nn\nimport os\nimport models\nfrom foo.bar import b")
    assert third_party([file]) == {
        "torch": "models/a.py:1: torch.nn",
        "foo": "models/a.py:4: foo.bar",
    }


def test_the_linter_of_pre_commit_is_the_pinned_one() -> None:
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    wanted = set(re.findall(r"\bruff==([\w.]+)", text))
    assert wanted == {PINS["ruff"]}


def test_the_python_floor_is_the_same_everywhere() -> None:
    floor = PROJECT["requires-python"].removeprefix(">=")
    assert Version(floor) <= Version(".".join(map(str, sys.version_info[:2])))
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py" + floor.replace(".", "")
    assert PYPROJECT["tool"]["mypy"]["python_version"] == floor
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"sys.version_info < {ast.literal_eval(floor.replace('.', ','))}" in makefile


def test_the_changelog_starts_with_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (\d+\.\d+\.\d+)\b", text, re.MULTILINE)
    assert versions[0] == PROJECT["version"]
