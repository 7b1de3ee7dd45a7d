"""Freed memory stays with the process, and cycles are looked for seldom, once that has been asked for."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.hygiene

ROOT = Path(__file__).resolve().parents[2]

FAULTS = """
import resource, torch
from interp.machine.heap import keep_freed_memory
if {asked}:
    assert keep_freed_memory()
for _ in range(50):
    torch.ones(8 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has this setting")
@pytest.mark.slow
def test_the_next_tensor_does_not_fault_its_pages_in_again() -> None:
    counts = {}
    for asked in (False, True):
        code = FAULTS.format(asked=asked)
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        counts[asked] = int(run.stdout)
    assert counts[True] < counts[False] / 2


COLLECTIONS = """
import atexit, gc
from interp.machine.heap import look_for_cycles_seldom
atexit.register(lambda: print(gc.get_freeze_count()))  # run last, being registered first
if {asked}:
    look_for_cycles_seldom()
    look_for_cycles_seldom()
begun = []
gc.callbacks.append(lambda phase, info: begun.append(phase == "start"))
kept = [[i] for i in range(300_000)]
class Cycle: pass
for _ in range(300_000):
    one = Cycle()
    one.own = one
print(sum(begun), sum(isinstance(one, Cycle) for one in gc.get_objects()))
"""


def test_cycles_are_looked_for_seldom_but_are_still_freed() -> None:
    counts = {}
    for asked in (False, True):
        code = COLLECTIONS.format(asked=asked)
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        counts[asked] = [int(word) for word in run.stdout.split()]
    assert 0 < counts[True][0] < counts[False][0] / 20
    assert counts[True][1] < 200_000, "the garbage does not pile up"
    started = counts[False][2]  # some hundred objects that Python 3.12 freezes by itself as it starts
    assert started < 1000 and counts[True][2] - started > 300_000, "nothing is looked at once more at the end"
