"""A result folder is the old one or the new one at every moment, and what a dead run left goes with the next."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from hooks.errors import RunFailed
from interp.machine import files, folders
from interp.machine.folders import clear_dead, whole_folder

pytestmark = pytest.mark.contract

NUMBERS = ("first", "second")
OURS = {files.__file__, folders.__file__}
EXCHANGES = sys.platform in ("linux", "darwin")


def write(final: Path, text: str) -> None:
    with whole_folder(final) as folder:
        for name in NUMBERS:
            (folder / name).write_text(text)


def content(final: Path) -> set[str]:
    return {(final / name).read_text() for name in NUMBERS}


@pytest.fixture(params=["in one step", "in two"])
def steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "in two":
        monkeypatch.setattr(folders, "_exchanged", lambda first, second: False)
    return str(request.param)


def killed(work: Callable[[], object], at: int) -> bool:
    """Whether ``work``, in a process of its own, was killed (SIGKILL) before the ``at``-th line of our code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads: the child only writes files
        child = os.fork()
    if child == 0:
        lines = count(1)

        def trace(frame: FrameType, event: str, arg: object) -> Any:
            if event == "line" and frame.f_code.co_filename in OURS and next(lines) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        try:
            sys.settrace(trace)
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process that can be killed at a line")
@pytest.mark.slow
def test_killed_at_any_line_the_name_holds_the_old_or_the_new(tmp_path: Path, steps: str) -> None:
    final, other = tmp_path / "run", tmp_path / "other"
    write(final, "0")
    seen, left = set(), 0
    for at in count(1):
        before = content(final)
        if not killed(lambda at=at: write(final, str(at)), at):  # type: ignore[misc]
            break
        if steps == "in one step":
            assert final.is_dir()
        left += len(os.listdir(tmp_path)) > 1
        write(other, "next")  # a run of another name clears, and gives a name back
        assert sorted(os.listdir(tmp_path)) == ["other", "run"]
        assert content(final) in (before, {str(at)}), at
        seen.add(content(final) == before)
    assert at > 60 and left > 20 and seen == {True, False}
    assert content(final) == {str(at)}


@pytest.mark.skipif(not EXCHANGES, reason="the system has no exchange of two names")
@pytest.mark.slow
def test_while_it_is_replaced_the_name_is_never_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absences() -> int:
        missed, over = 0, threading.Event()

        def look() -> None:
            nonlocal missed
            while not over.is_set():
                missed += not os.path.isdir(tmp_path / "run")

        other = threading.Thread(target=look)
        other.start()
        try:
            for i in range(150):
                write(tmp_path / "run", str(i))
        finally:
            over.set()
            other.join()
        return missed

    write(tmp_path / "run", "before")
    assert absences() == 0

    def slow(source: Path, target: Path, rename: Callable[..., None] = os.rename) -> None:
        rename(source, target)
        threading.Event().wait(0.001)

    monkeypatch.setattr(folders, "_exchanged", lambda first, second: False)
    monkeypatch.setattr(folders.os, "rename", slow)
    assert absences() > 0  # in two steps it is seen to be absent


def test_what_a_living_run_is_filling_stays(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "run") as folder:
        (folder / "number").write_text("1")
        write(tmp_path / "other", "2")
        write(tmp_path / "run", "3")  # the same run, twice at once: the later one wins
        clear_dead(tmp_path)
        assert (folder / "number").read_text() == "1"
    assert (tmp_path / "run" / "number").read_text() == "1"
    assert sorted(os.listdir(tmp_path)) == ["other", "run"]


def test_only_what_is_ours_and_dead_is_cleared(tmp_path: Path) -> None:
    kept = [".hidden", "run.0123abcd.new", ".run.new", ".run.0123abcd.png"]
    for name in [*kept, ".run.0123abcd.new", ".run.0123abcd.old", ".gone.4567cdef.old"]:
        (tmp_path / name).mkdir()
    (tmp_path / "run").mkdir()
    clear_dead(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "run", "gone"])


def test_a_result_that_was_moved_aside_is_found_by_its_name(tmp_path: Path) -> None:
    import pandas as pd

    from interp.result import Result

    saved = Result({"task": "linreg"}, pd.DataFrame({"k": [1]})).save(tmp_path, analysis="a")
    assert saved.folder is not None
    os.rename(saved.folder, saved.folder.with_name(f".{saved.folder.name}.0123abcd.old"))
    assert Result.load(saved.folder).config == saved.config


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "run", "old")
    rename = os.rename

    def second_fails(source: Path, target: Path) -> None:
        if str(source).endswith(".new"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(folders, "_exchanged", lambda first, second: False)
        patched.setattr(folders.os, "rename", second_fails)
        with pytest.raises(RunFailed, match="No space left"):
            write(tmp_path / "run", "new")
    assert content(tmp_path / "run") == {"old"}
    assert os.listdir(tmp_path) == ["run"]


def test_the_temporary_files_of_a_killed_run_go(tmp_path: Path) -> None:
    for name in (".state.safetensors.0123abcd", ".model.safetensors.4321.tmp", "lock", ".hidden", "model.safetensors"):
        (tmp_path / name).write_text("")
    files.clear_parts(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "lock", "model.safetensors"]
