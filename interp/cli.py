"""The command contract, once for every command: flags, one line per error, exit codes.

    import analyses.NAME as question           in analyses/NAME/__main__.py
    raise SystemExit(cli.main(question))

A command is a package with a docstring, ``Config`` (a frozen dataclass with a string under each
field: it *is* the command line) and ``run(config)``. If it also has ``plot(result)``, what ``run``
returns is a :class:`interp.result.Result` and is saved, then drawn; the figure's title is printed above the table. It
may have ``verdict(result)``: one line where what was found is a failure of what was looked at.

Exit codes: 0 done; 2 a wrong argument; 1 a run that failed, with nothing half-written. Every error
is one line on stderr; ``MAMBASCOPE_TRACEBACK=1`` prints the traceback before it.

This file imports nothing heavy, and neither should a command before ``run`` is called: then
``--help`` and a mistyped flag answer at once instead of after torch has been loaded. Inside ``run``
import what is needed; annotations stay strings (``from __future__ import annotations``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, Protocol, TypeVar

import tyro

from interp.machine import streams
from interp.machine.heap import keep_freed_memory, look_for_cycles_seldom

DONE, FAILED, WRONG = 0, 1, 2
SHORT_WAIT = ("GOMP_SPINCOUNT", "10000")
"""How long torch's threads wait in a busy loop for their next task, read when torch is loaded. The default of some
milliseconds holds the cores that a compiled scan, the next thing to run, needs."""
STOPS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
ConfigT = TypeVar("ConfigT")
Positional = tyro.conf.Positional
"""Marks a field that is given without a flag: ``Annotated[str, cli.Positional]``."""


class Report(Protocol):
    """What a command returns: ``summary`` is for people, ``to_json`` for programs."""

    def summary(self) -> str: ...

    def to_json(self) -> str: ...


class _Usage(Exception):
    """A command line that the dataclass cannot be made from."""


def listed(config: Any) -> None:
    """For the ``__post_init__`` of a ``Config``: what is given alone to a field of several is one of them.

    ``Config(models="mamba-linreg")`` in a notebook would otherwise walk through the letters.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if str(field.type).startswith("tuple[") and not isinstance(value, tuple):
            alone = () if value is None else (value,)
            object.__setattr__(config, field.name, tuple(value) if isinstance(value, list) else alone)


def main(module: ModuleType, argv: Sequence[str] | None = None) -> int:
    """Run the command ``module`` on ``argv`` (the process's own arguments by default).

    Returns the exit code. Reads ``config.out`` and ``config.json`` where the command has them: the folder is tried
    before ``run``, and where the result cannot be written in the end it is printed.
    """
    streams.open_closed()
    streams.take_every_letter()
    try:
        with _stops_as_ctrl_c():
            return streams.flushed(_run(module, argv))
    except BaseException as error:
        code, line = explain(error)
        if os.environ.get("MAMBASCOPE_TRACEBACK") == "1" and not isinstance(error, _Usage):
            traceback.print_exc()
        streams.complain(line)
        return streams.flushed(code)


def _run(module: ModuleType, argv: Sequence[str] | None) -> int:
    try:
        config = parse(module.Config, argv, prog=_prog(module), description=module.__doc__ or "")
        keep_freed_memory()
        look_for_cycles_seldom()
        os.environ.setdefault(*SHORT_WAIT)
        out = getattr(config, "out", None) or Path("out")
        if hasattr(module, "plot"):
            _try(out / _name(module))
        report: Report = module.run(config)
        said = no_figure = ""
        if hasattr(module, "plot"):
            try:
                report, said, no_figure = _saved(module, report, out)
            except Exception:
                _print(report.to_json())
                raise
        _print(report.to_json() if getattr(config, "json", False) else f"{said}{report.summary()}")
        if no_figure:
            streams.complain(no_figure)
            return FAILED
        if hasattr(module, "verdict") and (wrong := module.verdict(report)):
            streams.complain(f"error: {wrong}")
            return FAILED
    except SystemExit as done:  # --help
        return done.code if isinstance(done.code, int) else DONE
    return DONE


class _Stopped(KeyboardInterrupt):
    """A signal that ends a command as Ctrl-C does; its argument is the signal's name."""


@contextlib.contextmanager
def _stops_as_ctrl_c() -> Iterator[None]:
    """Inside the block SIGTERM, which a scheduler sends before it kills, and SIGHUP, of a terminal that is closed, are
    exceptions, unless they are ignored (nohup), or somebody else's, or this is a thread.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stopped(signal.Signals(number).name)

    main = threading.current_thread() is threading.main_thread()
    ours = [number for number in STOPS if main and signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in ours:
            signal.signal(number, stop)
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _try(folder: Path) -> None:
    """Nothing, where ``folder`` can be written, or made where the first of its parents is that there is."""
    from interp.machine.files import writable_folder

    writable_folder(next(each for each in (folder, *folder.parents) if os.path.lexists(each)))


def parse(config: type[ConfigT], argv: Sequence[str] | None, *, prog: str, description: str = "") -> ConfigT:
    """``config`` filled from ``argv``; ``--help`` prints and raises SystemExit(0).

    The library draws a box of several lines around a mistake; it is caught and said in one.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(config, args=argv, prog=prog, description=_laid_out(description))
    except OSError as error:  # of printing the help
        streams.unprinted(error)
        raise SystemExit(DONE) from None
    except SystemExit as stop:
        if stop.code in (None, 0):
            raise
        raise _Usage(_one_line(said.getvalue(), prog)) from None


def say(text: str) -> None:
    """A line on stderr, where progress is told."""
    streams.complain(text)


def _laid_out(text: str) -> str:
    """A docstring as ``--help`` shows it: paragraphs and sections apart, a section's text beside its name.

    The library joins lines that begin with a letter, whatever section they begin, and breaks none: all but the first
    of a block are set in.
    """
    wide, blocks = min(100, max(40, shutil.get_terminal_size().columns)), [""]
    for line in text.strip().splitlines():
        if not line.strip() or re.match(r"[A-Z][\w ]*? {2,}\S", line):
            blocks.append("")
        blocks[-1] += f"{line.strip()}\n"
    found = []
    for block in filter(str.strip, blocks):
        name, gap, rest = (*re.split(r"( {2,})", block, maxsplit=1), "", "")[:3]
        head = f"{name}{gap}" if gap else ""
        look: dict[str, Any] = {"initial_indent": head, "subsequent_indent": " " * (len(head) or 2)}
        found.append(textwrap.fill(" ".join((rest if gap else block).split()), wide, break_on_hyphens=False, **look))
    return "\n\n".join(found)


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code and the one line for an exception that ended a command."""
    if isinstance(error, _Usage):
        return WRONG, f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        by = str(error) if isinstance(error, _Stopped) else "Ctrl-C"
        return FAILED, (
            f"stopped by {by}; nothing is half-written, and the same command starts again "
            "(a training goes on from its last checkpoint)"
        )
    text = " ".join(str(error).split()) or type(error).__name__
    # Looked up rather than imported: the package behind it loads torch, and if it is not loaded
    # yet the error cannot be one of ours.
    ours = sys.modules.get("hooks.errors")
    if ours is not None and isinstance(error, ours.MambascopeError):
        return (WRONG if isinstance(error, ours.BadArgument) else FAILED), f"error: {text}"
    if isinstance(error, OSError) and error.strerror:
        return FAILED, f"error: {text}; free some space or mend the folder and run it again"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return FAILED, f"error: out of memory ({text[:200]}); try --quick or a smaller request"
    return FAILED, (
        f"error: {type(error).__name__}: {text[:400]}; this is a mistake in the program: "
        "MAMBASCOPE_TRACEBACK=1 shows where"
    )


def saved(module: ModuleType, result: Any, out: Path) -> Any:
    """``result``, written with its figure. A figure that fails is one line on stderr: the numbers are written."""
    result, _, no_figure = _saved(module, result, out)
    if no_figure:
        print(no_figure, file=sys.stderr, flush=True)
    return result


def _saved(module: ModuleType, result: Any, out: Path) -> tuple[Any, str, str]:
    """The result with its folder, the figure's title as lines, and one line where the figure failed.

    The numbers are on the disk before anything is drawn.
    """
    from interp.printed import folded

    result = result.save(out, analysis=_name(module))
    try:
        from interp import plot

        with plot.house():
            figure = module.plot(result)
        result.illustrate({"figure.png": partial(plot.png, figure), "figure.svg": partial(plot.svg, figure)})
    except Exception as error:
        if os.environ.get("MAMBASCOPE_TRACEBACK") == "1":
            traceback.print_exc()
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        again = f"{module.__name__.rpartition('.')[2]}.plot(Result.load(…)) draws them"
        return result, "", f"error: the figure was not drawn ({what}); the numbers are in {result.folder}: {again}"
    title = " ".join(figure.get_suptitle().split())
    return result, "".join(f"{line}\n" for line in folded(title)) if title else "", ""


def _name(module: ModuleType) -> str:
    """``ablate_delta`` for analyses/ablate_delta."""
    return module.__name__.rpartition(".")[2]


def _prog(module: ModuleType) -> str:
    return f"python -m {module.__name__}"


def _print(text: str) -> None:
    """``text`` on stdout, once for all processes; quiet when the reader (``| head``) has gone."""
    rank = os.environ.get("RANK", "0")
    if rank.isdigit() and int(rank) > 0:
        return
    streams.say(text)


def _one_line(box: str, prog: str) -> str:
    """The message of tyro's error box, its near names, and where help is.

    The box is drawn in ASCII where stdout is not UTF-8: then rules are hyphens and the title is a
    section of its own.
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    rows = [row.strip(" │") for row in plain.splitlines() if not row.startswith(("╭", "╰"))]
    parts = re.split(r"^[─-]{4,}$", "\n".join(rows), flags=re.MULTILINE)
    if "╭" not in plain:
        parts = parts[1:]
    near = [
        match
        for part in parts[1:]
        if "Perhaps you meant" in part
        for match in re.findall(r"^--[\w-]+", part, flags=re.MULTILINE)
    ]
    message = " ".join("".join(parts[:1]).split()) or "the command line cannot be read"
    if near:
        message += "; did you mean " + " or ".join(dict.fromkeys(near)) + "?"
    return f"{message} ({prog} --help lists the options)"
