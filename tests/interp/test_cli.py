"""The command contract: exit codes, one line per error, what goes to stdout and what to stderr."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pandas as pd
import pytest
from matplotlib.figure import Figure

from analyses import __main__ as listing
from hooks.errors import BadArgument, RunFailed
from interp import cli
from interp.result import Result
from interp.training.fit import orderly_stop

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.contract


@dataclass(frozen=True)
class Config:
    task: str = "linreg"
    "What was learned."
    mode: Literal["mean", "zero"] = "mean"
    "How to replace it."
    seed: int = 0
    "Chooses the prompts."
    scales: tuple[float, ...] = ()
    "Factors."
    out: Path = Path("out")
    "Where the folder goes."
    quick: bool = False
    "Fewer prompts."
    json: bool = False
    "Print result.json."


def result(config: Config) -> Result:
    table = pd.DataFrame({"k": [5, 10], "error": [0.25, float("nan")]})
    return Result({"task": config.task, "model": "m", "seed": config.seed}, table)


def command(run: Callable[[Any], Any], plot: Callable[[Any], Any] | None = None) -> ModuleType:
    module = ModuleType("analyses.example")
    module.__doc__ = "What an example shows."
    module.Config, module.run = Config, run  # type: ignore[attr-defined]
    if plot is not None:
        module.plot = plot  # type: ignore[attr-defined]
    return module


def drawn(result: Result) -> Any:
    figure = Figure((2, 1), layout="constrained")
    figure.subplots().plot([1, 2])
    figure.suptitle("after 10 examples\nthe error is .25")
    return figure


def raising(error: BaseException) -> ModuleType:
    def run(config: Config) -> Any:
        raise error

    return command(run)


def test_a_run_prints_its_table_and_folder_and_saves_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(command(result, drawn), ["--out", str(tmp_path), "--seed", "3"])
    said = capsys.readouterr()
    assert (code, said.err) == (0, "")
    (folder,) = (tmp_path / "example").iterdir()
    assert said.out.splitlines()[0] == "after 10 examples the error is .25"
    assert said.out.splitlines()[1].split() == ["k", "error"]
    assert said.out.splitlines()[-1] == f"written: {folder}"
    names = ["arrays.npz", "figure.png", "figure.svg", "result.json", "table.csv"]
    assert sorted(os.listdir(folder)) == names
    assert Result.load(folder).config["seed"] == 3


def test_json_prints_result_json_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(command(result, drawn), ["--out", str(tmp_path), "--json"])
    said = capsys.readouterr()
    (folder,) = (tmp_path / "example").iterdir()
    assert (code, said.err) == (0, "")
    written = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert {"seal", "files"} < written.keys(), "of the files: their checksums"
    assert json.loads(said.out) == {name: value for name, value in written.items() if name not in ("seal", "files")}
    assert json.loads(said.out)["table"][1]["error"] is None


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--sed", "3"], r"--sed.*did you mean --seed\?"),
        (["--seed", "x"], "--seed.*'x'"),
        (["--seed"], "--seed"),
        (["--mode", "men"], "men.*mean.*zero"),
        (["--scales", "1", "x"], "--scales"),
        (["linreg"], "linreg"),
    ],
)
def test_a_mistyped_command_line_is_one_line_and_exit_2(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(raising(AssertionError("ran")), argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert re.search(said, err), err
    assert "--help" in err


def test_help_shows_every_field_and_exits_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(raising(AssertionError("ran")), ["--help"]) == 0
    text = capsys.readouterr().out
    assert "What an example shows." in text
    assert "How to replace it." in text
    assert "python -m analyses.example" in text


@pytest.mark.parametrize("name", list(listing.questions()))
def test_help_has_its_sections_apart_on_lines_that_fit(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(importlib.import_module(f"analyses.{name}"), ["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    for section in ("Estimand", "Controls", "Not shown", "Cost"):
        (at,) = (i for i, line in enumerate(lines) if re.match(rf"{section}  +\S", line))
        assert lines[at - 1] == "" and lines[at - 2] != "", section
        rest = lines[at + 1 : lines.index("", at)]
        assert all(line.startswith(" " * 11) and line[11] != " " for line in rest), section
    assert (
        listing.questions()[name][0].split() == " ".join(lines[2:]).split()[: len(listing.questions()[name][0].split())]
    )


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (BadArgument("no task is called\n  x"), 2, "no task is called x"),
        (RunFailed("the disk is full"), 1, "the disk is full"),
        (KeyboardInterrupt(), 1, "same command"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (MemoryError(), 1, "out of memory"),
        (ZeroDivisionError("by zero"), 1, "ZeroDivisionError: by zero"),
    ],
)
def test_every_error_is_one_line_with_its_exit_code(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(raising(error), []) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert said in err


def test_the_traceback_is_there_when_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAMBASCOPE_TRACEBACK", "1")
    assert cli.main(raising(BadArgument("wrong")), []) == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.endswith("error: wrong\n")


@pytest.mark.parametrize("where", ["plot", "png", "svg"])
def test_a_figure_that_fails_leaves_the_numbers(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are on the disk before anything is drawn, and printed; the exit code and one line say what is missing."""

    def fails(*given: Any) -> None:
        (folder,) = (tmp_path / "example").iterdir()
        assert Result.load(folder).config["seed"] == 3
        raise ValueError("no\nfont")

    monkeypatch.setattr(f"interp.plot.{where}", fails, raising=False)
    assert cli.main(command(result, fails if where == "plot" else drawn), ["--out", str(tmp_path), "--seed", "3"]) == 1
    (folder,) = (tmp_path / "example").iterdir()
    assert Result.load(folder).table.k.tolist() == [5, 10]
    left = ["figure.png"] if where == "svg" else []
    assert sorted(set(os.listdir(folder)) - {"arrays.npz", "result.json", "table.csv"}) == left
    said = capsys.readouterr()
    assert f"written: {folder}" in said.out and "0.25" in said.out
    assert said.err.count("\n") == 1
    assert "ValueError: no font" in said.err and str(folder) in said.err


def test_ctrl_c_while_a_figure_is_drawn_leaves_the_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(result: Result) -> Any:
        raise KeyboardInterrupt

    assert cli.main(command(result, stopped), ["--out", str(tmp_path)]) == 1
    (folder,) = (tmp_path / "example").iterdir()
    assert Result.load(folder).table.k.tolist() == [5, 10]
    assert "Ctrl-C" in capsys.readouterr().err


def test_an_unwritable_out_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(command(result, drawn), ["--out", str(tmp_path / "file")]) == 2
    assert "--out" in capsys.readouterr().err


# --- as processes -----------------------------------------------------------------------------


def started(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, text=True, **{**pipes, **options})


WITHOUT = """
import runpy, sys
sys.argv = ["-m", "--help"]
try:
    runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
except SystemExit as done:
    assert not done.code, done.code
heavy = {{"torch", "transformer_lens", "sklearn", "pandas", "matplotlib"}} & set(sys.modules)
assert not heavy, f"loaded to print help: {{heavy}}"
"""


@pytest.mark.parametrize("module", ["analyses", *(f"analyses.{name}" for name in listing.questions())])
def test_help_loads_nothing_heavy(module: str) -> None:
    process = started("-c", WITHOUT.format(module=module))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "--help" in out


def test_a_reader_that_has_gone_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    process = started("-m", "analyses", stdout=write)
    os.close(write)
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")


@pytest.mark.parametrize("command", [["analyses"], ["analyses.attribute_outliers", "--help"]])
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_every_letter_can_be_printed_in_every_encoding(command: list[str], encoding: str) -> None:
    process = started("-m", *command, env={**os.environ, "PYTHONIOENCODING": encoding}, encoding=encoding)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    assert "?" in out and "attribute_outliers" in out


PREPARED = """
import gc, types
from dataclasses import dataclass
from interp import cli
from interp.machine import heap

@dataclass(frozen=True)
class Config:
    seed: int = 0

def run(config):
    raise ValueError(gc.get_threshold()[0] == heap.EVERY)

module = types.ModuleType("analyses.example")
module.Config, module.run = Config, run
before = gc.get_threshold()
cli.parse(Config, [], prog="example")
assert gc.get_threshold() == before, "not at import"
cli.main(module, [])
"""


def test_a_command_looks_for_cycles_seldom() -> None:
    process = started("-c", PREPARED)
    _, err = process.communicate(timeout=300)
    assert "True" in err and "assert" not in err.lower()


INTERRUPTED = """
import sys, time, types
from dataclasses import dataclass
from interp import cli

@dataclass(frozen=True)
class Config:
    seed: int = 0

def run(config):
    print("running", flush=True)
    time.sleep(60)

module = types.ModuleType("analyses.example")
module.Config, module.run = Config, run
raise SystemExit(cli.main(module, []))
"""


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP")]
)
def test_ctrl_c_sigterm_and_sighup_are_one_line_and_exit_1(number: int, name: str, signals: None) -> None:
    process = started("-c", INTERRUPTED)
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (1, "")
    assert err.count("\n") == 1
    assert f"stopped by {name}; nothing is half-written" in err


def test_under_nohup_a_closed_terminal_stops_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def run(config: Config) -> Any:
        os.kill(os.getpid(), signal.SIGHUP)
        return result(config)

    try:
        assert cli.main(command(run), []) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        with orderly_stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.name
    finally:
        signal.signal(signal.SIGHUP, before)


def test_sigterm_in_the_middle_of_saving_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(path: Path, data: str | bytes) -> None:
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("interp.result.write_whole", half)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(command(result, drawn), ["--out", str(tmp_path)]) == 1
    assert os.listdir(tmp_path / "example") == []
    assert "SIGTERM" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_in_the_middle_of_drawing_leaves_the_numbers_and_no_half_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(figure: Figure, file: Any) -> None:
        file.write(b"half")
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("interp.plot.svg", half)
    assert cli.main(command(result, drawn), ["--out", str(tmp_path)]) == 1
    (folder,) = (tmp_path / "example").iterdir()
    assert list(Result.load(folder).table["k"]) == [5, 10] and not (folder / "figure.svg").exists()
    assert "SIGTERM" in capsys.readouterr().err


def test_a_handler_of_the_caller_stays(capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[int] = []

    def run(config: Config) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return result(config)

    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        assert cli.main(command(run), []) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


# --- where the result goes --------------------------------------------------------------------


@pytest.mark.parametrize("out", ["file", "file/below", "dangling"])
def test_out_is_tried_before_the_work(out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")

    def run(config: Config) -> Any:
        raise AssertionError("the work was begun")

    assert cli.main(command(run, drawn), ["--out", str(tmp_path / out)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "--out" in said.err
    assert sorted(os.listdir(tmp_path)) == ["dangling", "file"]


def test_trying_out_makes_nothing(tmp_path: Path) -> None:
    def run(config: Config) -> Any:
        assert os.listdir(tmp_path) == []
        raise BadArgument("no task is called x")

    assert cli.main(command(run, drawn), ["--out", str(tmp_path / "a" / "b")]) == 2
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_result_that_cannot_be_written_is_printed(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert cli.main(command(result, drawn), ["--out", str(tmp_path), *flags]) == 1
    said = capsys.readouterr()
    assert [row["error"] for row in json.loads(said.out)["table"]] == [0.25, None]
    assert said.err.count("\n") == 1 and "No space left" in said.err


# --- standard streams -------------------------------------------------------------------------

SHELL = 'exec "$0" "$@"'


@pytest.mark.parametrize(
    ("arguments", "streams", "code", "says"),
    [
        (("-m", "analyses"), ">&-", 0, ""),
        (("-m", "analyses"), ">/dev/full", 1, "could not print: No space left on device"),
        (("-m", "analyses", "nothing"), "2>/dev/full", 2, ""),
        (("-m", "analyses", "nothing"), "2>&-", 2, ""),
        (("-m", "analyses.ablate_delta", "--help"), ">&-", 0, ""),
        (("-m", "analyses.ablate_delta", "--help"), ">&- <&- 2>&-", 0, ""),
        (("-m", "analyses.ablate_delta", "--help"), ">/dev/full", 1, "could not print: No space left on device"),
        (("-m", "analyses.ablate_delta", "--hlep"), "2>&-", 2, ""),
        (("-m", "analyses.ablate_delta", "--hlep"), "2>/dev/full", 2, ""),
        (("-c", INTERRUPTED.replace("time.sleep(60)", "raise ValueError")), ">/dev/full", 1, "No space left"),
    ],
)
def test_closed_and_full_streams_are_one_line_at_most(
    arguments: tuple[str, ...], streams: str, code: int, says: str
) -> None:
    run = subprocess.run(
        ["sh", "-c", f"{SHELL} {streams}", sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == code, run.stderr
    assert run.stderr.count("\n") == bool(says) and says in run.stderr


def test_a_file_of_ours_is_not_given_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """What a library prints to number 1 would else be in the middle of it."""
    code = (
        "import os; from interp.machine import streams; streams.open_closed(); "
        f"file = open({str(tmp_path / 'numbers')!r}, 'w'); os.write(1, b'said'); print('said'); file.close()"
    )
    subprocess.run(["sh", "-c", f"{SHELL} >&-", sys.executable, "-c", code], cwd=ROOT, check=True)
    assert (tmp_path / "numbers").read_text() == ""
