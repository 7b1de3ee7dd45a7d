"""matplotlib, loaded whatever back end ``MPLBACKEND`` names.

A command that is started from a notebook inherits the notebook's, which may not be installed where the command runs;
matplotlib refuses to be loaded then. Figures here have canvases of their own and need none. Everything else about back
ends is left as the session has it. Whoever is about to load matplotlib through another library imports this first.
"""

from __future__ import annotations

import contextlib
import os
import sys


def load() -> None:
    """Import matplotlib; a back end that it knows by ``MPLBACKEND`` is the process's, as ever."""
    if "matplotlib" in sys.modules:
        return
    asked = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if asked is not None:
            os.environ["MPLBACKEND"] = asked
    if asked:
        with contextlib.suppress(ValueError):  # the name of none: it stays the one that matplotlib chooses itself
            matplotlib.rcParams["backend"] = asked


load()
