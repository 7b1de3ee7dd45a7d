"""The shape of the repository: who imports whom, what is public, what must be absent.

Every check of ``tests/architecture.py`` is run on the whole repository, on snippets that it must find and on snippets
that it must leave alone: a check that cannot fail proves nothing.
"""

from __future__ import annotations

import importlib

import pytest

from tests.architecture import (
    CHECKS,
    MAX_LINES,
    MAX_NAMES,
    PACKAGES,
    PYPROJECT,
    Source,
    devices,
    doors,
    encodings,
    finished,
    import_direction,
    kinds,
    lazy_imports,
    no_pickle,
    no_print,
    public_list,
    questions_apart,
    reasons,
    short_files,
    sources,
    unshadowed,
)

pytestmark = pytest.mark.architecture


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_repository(check: Check) -> None:
    files = sources()
    assert {f.package for f in files} == {*PACKAGES, None}, "a package or the tests were not found"
    offences = [line for file in files for line in check(file)]
    assert not offences, "\n" + "\n".join(offences)


# --- each check can fail ----------------------------------------------------------------------

UNDONE = "# TO" + "DO: later"
NAMES = [f"name{i}" for i in range(MAX_NAMES + 1)]

# (check, path, text, what the offence must say)
BAD: tuple[tuple[Check, str, str, str], ...] = (
    (
        import_direction,
        "hooks/a.py",
        "\nimport models.scan",
        "hooks/a.py:2: hooks imports models.scan",
    ),
    (import_direction, "interp/a.py", "from models import load", "interp imports models"),
    (
        import_direction,
        "models/a.py",
        "def f():\n    import interp",
        "models/a.py:2: models imports",
    ),
    (import_direction, "models/scan/a.py", "from analyses import train", "models imports analyses"),
    (
        import_direction,
        "hooks/a.py",
        "importlib.import_module('interp.plot')",
        "imports interp.plot",
    ),
    (import_direction, "models/a.py", "from ..interp import cli", "models imports interp"),
    (import_direction, "analyses/a.py", "import tests.conftest", "analyses imports tests"),
    (questions_apart, "analyses/zoo/rows.py", "from analyses.train import Config", "zoo imports train"),
    (questions_apart, "analyses/sweep/rows.py", "from analyses import train, zoo", "sweep imports zoo"),
    (unshadowed, "hooks/__init__.py", "from hooks.edits import edits\n__all__ = ['edits']", "exports edits"),
    (unshadowed, "interp/__init__.py", "__all__ = ['plot']\ndef plot(): ...", "exports plot"),
    (doors, "hooks/run.py", "from transformer_lens import HookPoint", "only hooks/point.py"),
    (doors, "models/a.py", "def f():\n    import nnsight", "models/a.py:2: imports nnsight"),
    (
        doors,
        "models/mamba.py",
        "from transformers.models import mamba",
        "only models/pretrained.py",
    ),
    (doors, "analyses/a.py", "import seaborn as sns", "only interp/plot/*"),
    (doors, "interp/result.py", "from matplotlib.figure import Figure", "only interp/plot/*"),
    (doors, "analyses/a.py", "import tyro", "only interp/cli.py"),
    (
        lazy_imports,
        "hooks/trace.py",
        "import torch\nimport nnsight",
        "hooks/trace.py:2: imports nnsight",
    ),
    (lazy_imports, "models/scan/a.py", "try:\n    import mamba_ssm\nfinally:\n    pass", "a.py:2"),
    (no_pickle, "models/a.py", "import pickle", "imports pickle"),
    (no_pickle, "models/a.py", "weights = torch.load(path)", "calls load, which"),
    (no_pickle, "interp/a.py", "accelerator.save_state(path)", "calls save_state"),
    (no_pickle, "interp/a.py", "np.load(path, allow_pickle=True)", "allows pickle"),
    (no_print, "interp/result.py", "def f():\n    print(1)", "interp/result.py:2: prints"),
    (no_print, "analyses/a.py", "sys.stdout.write('x')", "uses sys.stdout"),
    (
        devices,
        "models/scan/a.py",
        "y = torch.empty(3, dtype=x.dtype)",
        "models/scan/a.py:1: torch.empty without device=",
    ),
    (finished, "tests/test_a.py", f"x = 1\n{UNDONE}", "tests/test_a.py:2"),
    (finished, "models/a.py", "breakpoint()", "breakpoint left in"),
    (finished, "models/a.py", "import pdb", "imports pdb"),
    (encodings, "interp/a.py", "open(path, 'w')", "opens a text without"),
    (encodings, "models/a.py", "x = 1\nPath(a).read_text()", "models/a.py:2: read_text without"),
    (
        reasons,
        "tests/test_a.py",
        "def test():\n    pytest.skip()",
        "test_a.py:2: pytest.skip without",
    ),
    (reasons, "tests/test_a.py", "pytest.skip('')", "without a reason"),
    (reasons, "tests/test_a.py", "@pytest.mark.skip\ndef test(): ...", "pytest.mark.skip without"),
    (reasons, "tests/test_a.py", "@pytest.mark.skipif(True)\ndef test(): ...", "skipif without"),
    (reasons, "tests/test_a.py", "pytest.param(1, marks=pytest.mark.xfail)", "xfail without"),
    (reasons, "tests/test_a.py", "np = pytest.importorskip('numpy')", "importorskip without"),
    (kinds, "tests/a/test_a.py", "def test_it(): ...", "no test of a kind"),
    (kinds, "tests/test_a.py", "@pytest.mark.slow\ndef test_it(): ...", "no test of a kind"),
    (short_files, "hooks/a.py", "\n" * (MAX_LINES + 1), "wants to be two files"),
    (public_list, "hooks/__init__.py", "import torch", "no __all__"),
    (public_list, "hooks/__init__.py", "__all__ = ['a']\n__all__ += ['b']", "2 __all__"),
    (public_list, "hooks/__init__.py", "__all__ = sorted(globals())", "not a literal list"),
    (public_list, "hooks/__init__.py", f"__all__ = {NAMES}", "fit one screen"),
    (public_list, "hooks/__init__.py", "__all__ = ['a', 'b', 'a']", "repeats a"),
)

GOOD: tuple[tuple[Check, str, str], ...] = (
    (import_direction, "models/a.py", "import hooks\nfrom models.scan import scan\nimport torch"),
    (import_direction, "analyses/a.py", "import interp, models, hooks"),
    (import_direction, "models/scan/a.py", "from . import reference\nfrom ..heads import Head"),
    (import_direction, "tests/test_a.py", "import analyses, models, hooks"),
    (questions_apart, "analyses/sweep/__init__.py", "from analyses import train\nfrom analyses.sweep import rows"),
    (questions_apart, "analyses/__main__.py", "from analyses.zoo import Config"),
    (unshadowed, "interp/__init__.py", "__all__ = ['plot']"),
    (unshadowed, "models/scan/__init__.py", "from models.scan import pair\n__all__ = ['pair']"),
    (doors, "hooks/point.py", "from transformer_lens import HookedRootModule"),
    (doors, "interp/plot/lines.py", "import seaborn"),
    (doors, "tests/test_a.py", "import transformers"),
    (doors, "analyses/a.py", "if TYPE_CHECKING:\n    from matplotlib.figure import Figure"),
    (lazy_imports, "hooks/trace.py", "def f():\n    import nnsight"),
    (lazy_imports, "hooks/trace.py", "if TYPE_CHECKING:\n    import nnsight"),
    (
        no_pickle,
        "models/a.py",
        "model.load_state_dict(load_file(path))\nnp.load(p, allow_pickle=False)",
    ),
    (no_print, "interp/cli.py", "print(text)"),
    (devices, "interp/a.py", "torch.zeros(2, device=x.device)\nx.new_zeros(2)\ntorch.zeros_like(x)"),
    (devices, "models/a.py", "self.D = nn.Parameter(torch.ones(3))"),
    (no_print, "models/a.py", "def fingerprint(x):\n    return x.print()"),
    (finished, "models/a.py", "# done"),
    (encodings, "interp/a.py", "open(path, 'rb')\nopen(path, encoding='utf-8')\np.read_text(encoding='utf-8')"),
    (encodings, "tests/test_a.py", "open(path)"),
    (reasons, "tests/test_a.py", "pytest.skip('needs CUDA')\npytest.importorskip('x', reason='y')"),
    (reasons, "tests/test_a.py", "@pytest.mark.skipif(True, reason='needs CUDA')\ndef test(): ..."),
    (kinds, "tests/test_a.py", "pytestmark = [pytest.mark.law]\ndef test_it(): ..."),
    (kinds, "tests/a/test_a.py", "@pytest.mark.slow\n@pytest.mark.law\ndef test_it(): ..."),
    (kinds, "tests/conftest.py", "def test_data(): ..."),
    (short_files, "hooks/a.py", "\n" * MAX_LINES),
    (public_list, "hooks/__init__.py", "__all__ = ['record', 'edit']"),
    (public_list, "hooks/__init__.py", "__all__: list[str] = []"),
    (public_list, "hooks/run.py", "import torch"),
)


@pytest.mark.parametrize(("check", "path", "text", "says"), BAD)
def test_a_check_finds(check: Check, path: str, text: str, says: str) -> None:
    offences = list(check(Source(path, text)))
    assert len(offences) == 1
    assert says in offences[0]


@pytest.mark.parametrize(("check", "path", "text"), GOOD)
def test_a_check_leaves_alone(check: Check, path: str, text: str) -> None:
    assert list(check(Source(path, text))) == []


def test_every_check_is_shown_both_ways() -> None:
    assert {case[0] for case in BAD} == {case[0] for case in GOOD} == set(CHECKS)


# --- public names and declared packages -------------------------------------------------------


@pytest.mark.parametrize("package", PYPROJECT["tool"]["setuptools"]["packages"])
def test_public_names_resolve(package: str) -> None:
    module = importlib.import_module(package)
    missing = [name for name in module.__all__ if not hasattr(module, name)]
    assert not missing, f"{package}.__all__ promises {', '.join(missing)}"


def test_packages_are_declared() -> None:
    on_disk = {s.path.rpartition("/")[0].replace("/", ".") for s in sources() if s.package}
    assert on_disk == set(PYPROJECT["tool"]["setuptools"]["packages"])
