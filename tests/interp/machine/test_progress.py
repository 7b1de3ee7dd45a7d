"""Progress: a bar where a person looks on, a line now and then in a log, and else nothing."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import models
from interp import patch, probe
from interp.machine import progress as shown
from interp.machine.progress import bar, followed, progress

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.contract


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that puts a stream in the place of stderr, with progress as in a session, and short times."""
    monkeypatch.delenv("TQDM_DISABLE")
    monkeypatch.setattr(shown, "DELAY", 0.05)
    monkeypatch.setattr(shown, "EVERY", 0.05)

    def put(made: io.StringIO | None) -> Any:
        monkeypatch.setattr(sys, "stderr", made)
        return made

    yield put
    assert shown._Line.opened == []


def work(pieces: int = 4, name: str = "work") -> None:
    for _ in followed(range(pieces), name):
        time.sleep(0.06)


def test_a_log_gets_lines(stream: Any) -> None:
    log = stream(io.StringIO())
    with progress(2, "outer") as tick:
        work()
        tick()
        work(1)
    lines = log.getvalue().splitlines()
    assert len(lines) >= 2 and "\r" not in log.getvalue()
    assert lines[0].startswith("outer 0 of 2, ") and "; work " in lines[0] and " of 4, " in lines[0]
    assert lines[-1].startswith("outer 1 of 2, ") and "s left" in lines[-1]
    log.truncate(0)
    with progress(1, "short"):
        pass
    time.sleep(0.12)
    assert "short" not in log.getvalue()


def test_a_terminal_gets_a_bar_that_goes_away(stream: Any) -> None:
    terminal = stream(Terminal())
    work()
    assert "\rwork: " in terminal.getvalue() and "4/4" in terminal.getvalue()
    assert terminal.getvalue().rpartition("\r")[0].endswith(" ")
    terminal.truncate(0)
    with progress(1, "short"):
        pass
    assert "short" not in terminal.getvalue()


def test_a_notebook_gets_what_tqdm_has_for_it(stream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stream(io.StringIO())
    notebook = ModuleType("IPython")
    notebook.get_ipython = lambda: SimpleNamespace(config={"IPKernelApp": {}})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    made: list[dict[str, Any]] = []

    class Widget:
        def __init__(self, **given: Any) -> None:
            made.append(given)

        def update(self, n: int = 1) -> None: ...

        def set_postfix_str(self, s: str) -> None: ...

        def close(self) -> None:
            made.append({"closed": True})

    auto = ModuleType("tqdm.auto")
    auto.tqdm = Widget  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tqdm.auto", auto)
    work(1)
    assert made[0]["total"] == 1 and made[0]["delay"] == shown.DELAY and made[-1] == {"closed": True}


def test_without_a_stream_or_where_it_is_not_wanted_there_is_nothing(
    stream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream(None)
    work(2)
    closed = io.StringIO()
    closed.close()
    stream(closed)
    work(2)
    for name, value in (("TQDM_DISABLE", "1"), ("RANK", "1")):
        monkeypatch.setenv(name, value)
        log = stream(io.StringIO())
        work(2)
        assert log.getvalue() == ""
        monkeypatch.delenv(name)


def test_a_log_that_is_closed_meanwhile_is_no_error(stream: Any) -> None:
    log = stream(io.StringIO())
    with bar(2, "work") as line:
        log.close()
        time.sleep(0.12)
        line.update()


def test_what_a_run_goes_on_from_is_not_counted_as_its_speed(stream: Any) -> None:
    log = stream(io.StringIO())
    with bar(10, "train", initial=8) as line:
        line.set_postfix_str("loss .1")
        line.update()
        time.sleep(0.12)
    first = log.getvalue().splitlines()[0]
    assert first.startswith("train 9 of 10, 0 s, about 0 s left, loss .1")


def test_verbs_of_a_session_show_it(stream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[tuple[int | None, str]] = []

    def shows(place: str, total: int | None, name: str, initial: int) -> Any:
        names.append((total, name))
        return SimpleNamespace(update=lambda n=1: None, close=lambda: None)

    monkeypatch.setattr(shown, "_shown", shows)
    model = models.build("mamba", d_in=3, d_out=1, d_model=4, n_layers=2, d_state=2).eval()
    x = torch.randn(3, 4, 3)
    patch.activations(model, x, x.flip(0), "*.hook_delta", lambda out: out[:, -1, 0], positions=[1, 2])
    assert names == [(2 * len(model.blocks), "patch")]
    names.clear()
    features = torch.randn(24, 5).numpy()
    probe.ridge(features, {"first": features[:, 0]}, untrained=features, running_sum=None)
    assert names == [(2 * probe.FOLDS, "probe")]


def test_a_process_whose_stderr_is_closed_works(tmp_path: Path) -> None:
    code = "import sys, time\nfrom interp.machine import progress as p\np.EVERY = .05\n"
    code += "with p.progress(2, 'work') as tick:\n    time.sleep(.2); tick()\nprint('done')"
    env = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    command = ["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, code]
    process = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert (process.returncode, process.stdout) == (0, "done\n")
