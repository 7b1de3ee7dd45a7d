"""Freed memory stays with the process once it has been asked to."""

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
from interp.heap import keep_freed_memory
if {asked}:
    assert keep_freed_memory()
for _ in range(50):
    torch.ones(8 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has this setting")
def test_the_next_tensor_does_not_fault_its_pages_in_again() -> None:
    counts = {}
    for asked in (False, True):
        code = FAULTS.format(asked=asked)
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        counts[asked] = int(run.stdout)
    assert counts[True] < counts[False] / 2
