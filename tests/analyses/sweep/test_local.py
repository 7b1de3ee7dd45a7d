"""Jobs side by side: failures, kills, Ctrl-C; the commands are a few lines of Python each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from analyses.sweep import local as sweep_local
from analyses.sweep.local import AGAIN, Job, run
from interp.training import resume

pytestmark = pytest.mark.contract

KILLS_ITSELF = """
import os
with open({file!r}, "a") as file:
    file.write("x")
if os.path.getsize({file!r}) < {enough}:
    os.kill(os.getpid(), 9)
"""


def job(folder: Path, name: str, code: str) -> Job:
    return Job(name, ("-S", "-c", code), folder / name, folder / "logs" / f"{name}.txt")


def test_one_that_fails_does_not_end_the_others_and_says_why(tmp_path: Path) -> None:
    said = "import sys; print('first', file=sys.stderr); print('error: the reason', file=sys.stderr); sys.exit(2)"
    ticks: list[int] = []
    jobs = [job(tmp_path, "bad", said), job(tmp_path, "good", "pass"), job(tmp_path, "mute", "import os; os._exit(3)")]
    found = run(jobs, 1, lambda: ticks.append(1))
    assert [(o.name, o.ok, o.reason) for o in found.values()] == [
        ("bad", False, "the reason"),
        ("good", True, ""),
        ("mute", False, "it ended with exit code 3 and said nothing"),
    ]
    assert len(ticks) == 3
    assert (tmp_path / "logs" / "bad.txt").read_text() == "first\nerror: the reason\n"


def test_a_killed_one_is_started_again_and_not_for_ever(tmp_path: Path) -> None:
    jobs = [
        job(tmp_path, name, KILLS_ITSELF.format(file=str(tmp_path / f"{name}.starts"), enough=enough))
        for name, enough in (("once", 2), ("always", 99))
    ]
    found = run(jobs, 2)
    assert (found["once"].ok, found["once"].starts) == (True, 2)
    assert (found["always"].ok, found["always"].starts) == (False, AGAIN + 1)
    assert "killed 3 times, last by SIGKILL" in found["always"].reason
    assert len((tmp_path / "always.starts").read_text()) == AGAIN + 1


def test_as_many_at_a_time_as_there_are_workers(tmp_path: Path) -> None:
    code = f"import os, time; a = '{tmp_path}/running'; os.makedirs(a, exist_ok=True); b = a + '/' + str(os.getpid()); "
    code += f"open(b, 'w').close(); open('{tmp_path}/seen', 'a').write(str(len(os.listdir(a)))); time.sleep(.2); "
    code += "os.remove(b)"
    for workers in (1, 2):
        (tmp_path / "seen").write_text("")
        assert all(outcome.ok for outcome in run([job(tmp_path, n, code) for n in "abcd"], workers).values())
        assert max(map(int, (tmp_path / "seen").read_text())) == workers


PATIENT = """
import signal, sys, time
def end(*_):
    open({file!r}, 'w').write('in order'); sys.exit(1)
signal.signal(signal.SIGINT, end); open({file!r}, 'w').write('started'); time.sleep(60)
"""


def test_ctrl_c_asks_the_workers_to_stop_and_waits_for_them(tmp_path: Path) -> None:
    file = tmp_path / "state"

    def interrupt() -> None:
        while not file.exists() or file.read_text() != "started":
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run([job(tmp_path, "patient", PATIENT.format(file=str(file))), job(tmp_path, "never", "pass")], 1)
    assert file.read_text() == "in order"
    assert not (tmp_path / "logs" / "never.txt").exists()


def test_a_worker_hears_when_its_sweep_is_killed(tmp_path: Path) -> None:
    file = tmp_path / "state"
    waits = f"import sys; open({str(file)!r}, 'w').write('on'); sys.stdin.read(); open({str(file)!r}, 'w').write('off')"
    process = multiprocessing.get_context("fork").Process(target=run, args=([job(tmp_path, "a", waits)], 1))
    process.start()

    def wait_for(state: str) -> None:
        until = time.monotonic() + 120
        while not file.exists() or file.read_text() != state:
            assert time.monotonic() < until
            time.sleep(0.02)

    wait_for("on")
    process.kill()
    process.join()
    wait_for("off")


def test_a_folder_that_is_just_being_left_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "resume").mkdir(parents=True)
    held = threading.Event()

    def hold() -> None:
        with resume.only_one(tmp_path / "a" / "resume"):
            held.set()
            time.sleep(0.4)

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    began = time.monotonic()
    assert run([job(tmp_path, "a", "pass")], 1)["a"].ok
    assert time.monotonic() - began > 0.25
    other.join()
    monkeypatch.setattr(sweep_local, "LOCK_WAIT", 0.1)
    with resume.only_one(tmp_path / "a" / "resume"):  # and not for ever: the training itself says what is wrong
        assert run([job(tmp_path, "a", "pass")], 1)["a"].ok
