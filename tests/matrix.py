"""Run the default tests on every Python that pyproject.toml names, at both ends of its version bounds: `make matrix`.

A cell is a Python and a resolution, such as 3.12-lowest:

lowest   what the project and its tests ask for directly, at the lowest versions that the bounds of pyproject.toml
         allow and that have wheels for this Python (``uv pip compile --resolution lowest-direct``)
newest   the newest versions that pip finds within the same bounds

Each cell has a virtual environment under .matrix/, which is kept; packages are changed in it only when the
requirements of pyproject.toml have changed. tests/matrix.md has a row for each cell, and a run replaces the rows of its
own cells. This file is run by whatever Python there is, before anything is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "matrix.md"
RESOLUTIONS = ("lowest", "newest")
GIGABYTES = 8
"""What an environment may take while it is made: CUDA builds of torch are 5 to 7 GB, and PyPI has no other for most."""
HOURS = 2
"""A cell that has not ended by then hangs."""
NAMED = 20
"""So many failed tests are named in a row; pytest's report in the folder has them all."""

HEAD = """\
# Versions

The default tests on each Python, at the lowest and at the newest versions that the bounds of `pyproject.toml` allow:
`make matrix` writes this table, `make matrix CELLS="3.12-lowest"` one row of it. `constraints.txt` is what
`make test` runs on. A commit with a + was not all committed. torch with +cu… or without a + is a CUDA build, for which
PyPI has no CPU build; the tests use no GPU.

"""
COLUMNS = ("cell", "Python", "passed", "failed", "skipped", "seconds", "commit", "versions", "what failed")


@dataclass(frozen=True)
class Project:
    """What pyproject.toml says: the Pythons (3.11, …), and the direct requirements, those of the tests last."""

    pythons: tuple[str, ...]
    requirements: tuple[str, ...]

    @property
    def cells(self) -> list[str]:
        return [f"{python}-{resolution}" for python in self.pythons for resolution in RESOLUTIONS]

    @property
    def packages(self) -> list[str]:
        """The names of what is required directly, as pyproject.toml has them."""
        return [re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0] for line in self.requirements]


def project(text: str) -> Project:
    """Read the text of a pyproject.toml."""
    told = tomllib.loads(text)["project"]
    named = [re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line) for line in told["classifiers"]]
    pythons = tuple(match[1] for match in named if match)
    return Project(pythons, (*told["dependencies"], *told["optional-dependencies"]["test"]))


def interpreter(version: str) -> str:
    """The command of Python ``version``: on the path, or pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for command in (f"python{version}", *map(str, sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True))):
        asked = [command, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        if shutil.which(command) and subprocess.run(asked, capture_output=True, text=True).stdout.strip() == version:
            return command
    raise SystemExit(f"error: no Python {version} here; install it, or give the other CELLS")


def call(*command: str | Path) -> None:
    """Run, and stop where it fails."""
    print("$", *command, file=sys.stderr, flush=True)
    done = subprocess.run([str(part) for part in command], cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"error: exit {done.returncode} of {' '.join(map(str, command))}")


def pip(python: Path, *arguments: str | Path) -> None:
    # No build isolation: setuptools is there already, and one more would be fetched for each package without a wheel.
    install = ("-m", "pip", "--disable-pip-version-check", "--no-input", "install", "-q", "--no-compile")
    call(python, *install, *arguments)


def lowest(told: Project, version: str, folder: Path) -> Path:
    """A file of exact versions, the lowest that Python ``version`` can have within the bounds of pyproject.toml."""
    tools = folder / "tools"
    uv = tools / "bin" / "uv"
    if not uv.exists():
        call(sys.executable, "-m", "venv", "--clear", tools)
        pip(tools / "bin" / "python", "-c", "constraints.txt", "uv")
    wheels = [part for name in told.packages for part in ("--only-binary", name)]
    exact = folder / f"{version}-lowest.txt"
    options = ("--resolution", "lowest-direct", "--python-version", version, "--extra", "test", *wheels)
    call(uv, "pip", "compile", "-q", "--no-header", "--no-annotate", *options, "-o", exact, "pyproject.toml")
    return exact


def install(cell: str, told: Project, folder: Path) -> Path:
    """The Python of the cell's environment, which is made if it is not there; this checkout is installed into it."""
    version, resolution = cell.split("-")
    home = folder / cell
    python = home / "bin" / "python"
    made = home / "requirements.json"
    wanted = json.dumps(told.requirements)
    if not made.exists() or made.read_text(encoding="utf-8") != wanted:
        free = shutil.disk_usage(folder).free / 1e9
        if free < GIGABYTES:
            raise SystemExit(
                f"error: {cell} may take {GIGABYTES} GB and {free:.0f} are free; remove folders of {folder}"
            )
        call(interpreter(version), "-m", "venv", home)
        pip(python, "--upgrade", "setuptools")
        newest = ("--upgrade", "--upgrade-strategy", "eager", *told.requirements)
        asked = ("-r", lowest(told, version, folder)) if resolution == "lowest" else newest
        pip(python, "--no-build-isolation", *asked)
        made.write_text(wanted, encoding="utf-8")
    pip(python, "--no-build-isolation", "--no-deps", "-e", ".")
    return python


VERSIONS = """
import importlib.metadata, json, platform, sys
names = json.loads(sys.argv[1])
print(json.dumps([platform.python_version(), {name: importlib.metadata.version(name) for name in names}]))
"""


def measure(cell: str, told: Project, python: Path, report: Path, arguments: list[str]) -> dict[str, str]:
    """The row of one cell: runs the default tests in its environment."""
    asked = [str(python), "-c", VERSIONS, json.dumps(told.packages)]
    version, found = json.loads(subprocess.run(asked, capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    report.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", f"--junitxml={report}", *arguments]
    print("$", *command, file=sys.stderr, flush=True)
    began = time.monotonic()
    running = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        running.wait(timeout=HOURS * 3600)
    except BaseException as error:  # no test outlives this: neither one that hangs nor one of a run that is stopped
        os.killpg(running.pid, signal.SIGKILL)
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
    row = {"cell": cell, "Python": version, "seconds": f"{time.monotonic() - began:.0f}", "commit": commit()}
    row["versions"] = ", ".join(f"{name} {number}" for name, number in found.items())
    return row | (results(report.read_text(encoding="utf-8")) if report.exists() else none(running.returncode))


def none(status: int) -> dict[str, str]:
    """The results of a run that left no report."""
    why = f"still running after {HOURS} hours" if status == -signal.SIGKILL else f"pytest ended with exit {status}"
    return dict.fromkeys(("passed", "failed", "skipped"), "–") | {"what failed": why}


def results(report: str) -> dict[str, str]:
    """Counts and the names of what failed, from pytest's JUnit report; an error counts as a failure."""
    cases = list(ElementTree.fromstring(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    names = sorted({f"{case.get('classname')}.{case.get('name')}".replace("|", "/") for case in failed})
    counts = {"passed": len(cases) - len(failed) - len(skipped), "failed": len(failed), "skipped": len(skipped)}
    more = [f"and {len(names) - NAMED} more"] if len(names) > NAMED else []
    said = ", ".join(names[:NAMED] + more)
    return {name: str(count) for name, count in counts.items()} | {"what failed": said}


def commit() -> str:
    """The commit of this checkout, with a + where files differ from it."""
    git = ("git", "-C", str(ROOT))
    head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True).stdout.strip()
    # The table itself is written by the first cell and would mark the others.
    asked = [*git, "status", "--porcelain", "--", ".", f":!{TABLE.relative_to(ROOT)}"]
    changed = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return (head or "unknown") + ("+" if changed else "")


def rows(text: str) -> dict[str, dict[str, str]]:
    """The rows of a table that ``written`` wrote, by cell."""
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    parts = ([part.strip() for part in line.strip("|").split("|")] for line in lines)
    return {values[0]: dict(zip(COLUMNS, values, strict=True)) for values in parts}


def written(found: dict[str, dict[str, str]], cells: list[str]) -> str:
    """The page with the rows of ``found``, in the order of ``cells``; a cell that was not run says so."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    for cell in cells:
        row = found.get(cell, {"what failed": "not run"})
        lines.append(tuple({"cell": cell, **row}.get(name, "–") for name in COLUMNS))
    table = "".join("|" + "|".join(line) + "|\n" if line[0] == "---" else f"| {' | '.join(line)} |\n" for line in lines)
    return HEAD + table


def main() -> None:
    told = project((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", default=told.cells, help=f"of {' '.join(told.cells)}; all of them if none")
    parser.add_argument("--folder", type=Path, default=ROOT / ".matrix", help="where the environments are")
    parser.add_argument("--install-only", action="store_true", help="make the environments and run nothing")
    parser.add_argument("--pytest", default="", help="further arguments for pytest; the table is then left alone")
    asked = parser.parse_args()
    unknown = sorted(set(asked.cells) - set(told.cells))
    if unknown:
        parser.error(f"there is no cell {' '.join(unknown)}; cells: {' '.join(told.cells)}")
    asked.folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for cell in asked.cells:
        python = install(cell, told, asked.folder.resolve())
        if asked.install_only:
            continue
        row = measure(cell, told, python, asked.folder.resolve() / f"{cell}.xml", asked.pytest.split())
        print(f"{cell}: {row['passed']} passed, {row['failed']} failed, {row['skipped']} skipped", flush=True)
        failed += [cell] if row["failed"] != "0" else []
        if not asked.pytest:
            known = rows(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
            TABLE.write_text(written(known | {cell: row}, told.cells), encoding="utf-8")
    if failed:
        raise SystemExit(f"error: tests fail in {' '.join(failed)}; tests/matrix.md names them")


if __name__ == "__main__":
    main()
