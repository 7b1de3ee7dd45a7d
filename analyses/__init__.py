"""One folder per question, each with a command line; ``python -m analyses`` lists them."""

import sys
from importlib.util import find_spec
from pathlib import Path

__all__: list[str] = []


def _refuse_strangers() -> None:
    """End with one line where another ``models``, ``hooks`` or ``interp`` comes before ours on the path.

    The working directory comes first there, and many a project has a folder called models. Its functions would
    missing one after the other, far from the reason.
    """
    root = Path(__file__).resolve().parent.parent
    for name in ("hooks", "models", "interp"):
        spec = find_spec(name)
        found = None if spec is None or spec.origin is None else Path(spec.origin).resolve()
        if found is None or root not in found.parents:
            line = (
                f'error: "import {name}" finds {found or "none"} and not the one beside analyses: run the command '
                f"from another folder, or rename that {name}"
            )
            if sys.argv[:1] != ["-m"]:  # a session, which an exit would end
                raise ImportError(line.removeprefix("error: "))
            sys.stderr.write(f"{line}\n")
            raise SystemExit(2)


_refuse_strangers()
