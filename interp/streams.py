"""Standard output that takes every letter: one that its encoding lacks is a "?", and no error."""

from __future__ import annotations

import io
import sys


def take_every_letter() -> None:
    """From now on a Δ on a terminal that has none (cp1252, ascii) is a "?"; stderr is like that from the start."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
