"""Where a number came from: commit, versions, machine, threads. No host names, no paths."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "numpy", "mambascope")


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Version of Python and of each package; ``"not installed"`` for what has no metadata.

    Read from the packages' metadata, so that asking imports none of them.
    """
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> dict[str, str | bool | None]:
    """``{"commit": hash, "dirty": bool}`` of the checkout that the code runs from.

    ``{"commit": "unknown", "dirty": None}`` when it is not a checkout (an installed wheel), when it
    has no commit yet, or when there is no git. A package installed *inside* somebody else's
    checkout is not that checkout's commit: the top level must be ours.
    """
    try:
        top = _git("rev-parse", "--show-toplevel")
        if Path(top).resolve() != REPOSITORY:
            return {"commit": "unknown", "dirty": None}
        return {
            "commit": _git("rev-parse", "HEAD"),
            "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return {"commit": "unknown", "dirty": None}


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def provenance(*, seed: int, device: str, seconds: float) -> dict[str, Any]:
    """The ``provenance`` of a Result: commit, dirty, versions, seed, device, threads, seconds."""
    import torch

    return {
        **commit(),
        "versions": versions(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "seed": seed,
        "device": device,
        "seconds": round(seconds, 3),
    }
