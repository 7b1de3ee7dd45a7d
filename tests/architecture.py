"""Checks of the shape of the repository: one takes a parsed file and yields ``path:line: what is wrong``."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
KINDS = {m.partition(":")[0] for m in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]}
KINDS -= {"slow", "benchmark"}  # how long it takes and what it prints, not what it asks

# The arrow picture: a package, and the packages of ours that it may import.
ARROWS = {
    "hooks": {"hooks"},
    "models": {"models", "hooks"},
    "interp": {"interp", "hooks"},
    "analyses": {"analyses", "models", "interp", "hooks"},
}
PACKAGES = tuple(ARROWS)

# Libraries with a door: the only files of ours that import them.
DOORS = {
    "transformer_lens": ("hooks/point.py", "hooks/onlookers.py", "hooks/cache.py", "models/transformer.py"),
    "nnsight": ("hooks/*",),
    "transformers": ("models/pretrained.py",),
    "seaborn": ("interp/plot/*",),
    "matplotlib": ("interp/plot/*",),
    "tyro": ("interp/cli.py",),
    "numba": ("models/scan/*", "hooks/machine/native.py", "interp/attention/pairs_compiled.py"),
    "ray": ("analyses/sweep/cluster.py",),
    "triton": ("models/scan/*",),
    "mamba_ssm": ("models/scan/*",),
    "causal_conv1d": ("models/scan/*",),
}
# Imported inside functions only: slow to import and seldom needed, or impossible without CUDA.
LAZY = {"nnsight", "mamba_ssm", "causal_conv1d", "ray"}

PICKLING_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
PICKLING_CALLS = {"torch.load", "torch.save"}
PICKLING_METHODS = {"read_pickle", "to_pickle", "save_state", "load_state"}  # pandas, accelerate
UNFINISHED = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
COMMAND_LINES = ("interp/cli.py", "interp/machine/streams.py", "analyses/__main__.py")
MAX_LINES = 500
MAX_NAMES = 40  # a list that fits one screen


@dataclass(frozen=True)
class Source:
    """One Python file: ``path`` relative to the root, with forward slashes."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=self.path)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    @property
    def package(self) -> str | None:
        """The package of ours that the file belongs to, None in ``tests``."""
        top = self.path.split("/")[0]
        return top if top in PACKAGES else None

    def at(self, node: ast.AST, message: str) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {message}"


Check = Callable[[Source], Iterator[str]]


@cache
def sources() -> list[Source]:
    """Every Python file of the packages and the tests, read and parsed once."""
    paths = [p for top in (*PACKAGES, "tests") for p in sorted((ROOT / top).rglob("*.py"))]
    return [
        Source(p.relative_to(ROOT).as_posix(), p.read_text(encoding="utf-8"))
        for p in paths
        if not any(part.startswith(".") for part in p.relative_to(ROOT).parts)
    ]


# --- reading imports --------------------------------------------------------------------------


def dotted(node: ast.AST) -> str:
    """``a.b.c`` for a chain of names and attributes, an empty string for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = dotted(node.value)
        return f"{head}.{node.attr}" if head else ""
    return ""


def assigned(node: ast.stmt) -> list[str]:
    """The names that an assignment statement sets."""
    if isinstance(node, ast.Assign):
        return [dotted(target) for target in node.targets]
    return [dotted(node.target)] if isinstance(node, ast.AnnAssign | ast.AugAssign) else []


def imports(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """Each imported module with its node, ``import_module`` of a literal included."""
    parts = source.path.removesuffix(".py").split("/")
    for node in source.nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = parts[: -node.level] if node.level else []
            yield node, ".".join([*base, *([node.module] if node.module else [])])
        elif isinstance(node, ast.Call) and node.args:
            called = dotted(node.func).rpartition(".")[2]
            name = node.args[0]
            if called in ("import_module", "__import__") and isinstance(name, ast.Constant):
                yield node, str(name.value)


def executed(node: ast.AST, *, called: bool) -> Iterator[ast.AST]:
    """The nodes that run, so not what only type checkers read; those below functions if ``called``."""
    for child in ast.iter_child_nodes(node):
        function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if function and not called:
            continue
        if isinstance(child, ast.If) and dotted(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from executed(child, called=called)


# --- the checks -------------------------------------------------------------------------------


def import_direction(source: Source) -> Iterator[str]:
    """Packages import along the arrows, and none imports ``tests``."""
    if source.package is None:
        return
    for node, name in imports(source):
        top = name.partition(".")[0]
        if top in (*PACKAGES, "tests") and top not in ARROWS[source.package]:
            may = ", ".join(sorted(ARROWS[source.package]))
            yield source.at(node, f"{source.package} imports {name}; it may import {may}")


def questions_apart(source: Source) -> Iterator[str]:
    """What two questions need goes down into ``interp``; only a sweep starts another command, which trains."""
    parts = source.path.split("/")
    if parts[0] != "analyses" or len(parts) < 3:
        return
    for node, name in imports(source):
        named = [name]
        if name == "analyses" and isinstance(node, ast.ImportFrom):
            named = [f"analyses.{alias.name}" for alias in node.names]
        for other in (one.split(".")[1] for one in named if one.startswith("analyses.")):
            if other not in (parts[1], "subject") and (parts[1], other) != ("sweep", "train"):
                yield source.at(node, f"{parts[1]} imports {other}, another question")


def unshadowed(source: Source) -> Iterator[str]:
    """No package exports a name that is one of its submodules: ``import package.name`` would give something else."""
    here = (ROOT / source.path).parent
    if source.package is None or not source.path.endswith("/__init__.py"):
        return
    own = here.relative_to(ROOT).as_posix().replace("/", ".")
    modules = {path.stem for path in here.glob("*.py")} | {path.parent.name for path in here.glob("*/__init__.py")}
    listed = [node.value for node in source.tree.body if "__all__" in assigned(node)]  # type: ignore[attr-defined]
    exported = set(ast.literal_eval(listed[0])) if listed else set()
    for node in source.tree.body:
        if isinstance(node, ast.ImportFrom) and node.module != own:
            bound = {alias.asname or alias.name for alias in node.names}
        else:
            bound = {getattr(node, "name", ""), *assigned(node)}
        for name in sorted(bound & modules & exported):
            yield source.at(node, f"exports {name}, which is a submodule too")


def doors(source: Source) -> Iterator[str]:
    """A library with a door is imported only there; naming its types elsewhere is fine."""
    if source.package is None:
        return
    run = {id(node) for node in executed(source.tree, called=True)}
    for node, name in imports(source):
        allowed = DOORS.get(name.partition(".")[0])
        if id(node) in run and allowed and not any(fnmatch(source.path, pattern) for pattern in allowed):
            yield source.at(node, f"imports {name}, which only {' and '.join(allowed)} may")


def lazy_imports(source: Source) -> Iterator[str]:
    """What is slow or impossible to import is imported where it is used, inside a function."""
    if source.package is None:
        return
    loaded = {id(node) for node in executed(source.tree, called=False)}
    for node, name in imports(source):
        if id(node) in loaded and name.partition(".")[0] in LAZY:
            yield source.at(node, f"imports {name} when loaded; import it inside the function")


def no_pickle(source: Source) -> Iterator[str]:
    """Nothing is pickled or unpickled: a checkpoint must not be able to run code."""
    if source.package is None:
        return
    for node, name in imports(source):
        if name.partition(".")[0] in PICKLING_MODULES:
            yield source.at(node, f"imports {name}: files are safetensors, JSON or npz")
    for node in source.nodes:
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if called in PICKLING_CALLS or method in PICKLING_METHODS:
            yield source.at(node, f"calls {method or called}, which pickles")
        for keyword in node.keywords:
            allowed = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg == "allow_pickle" and not allowed:
                yield source.at(node, "allows pickle in an array file")


def no_print(source: Source) -> Iterator[str]:
    """Only the command lines write to standard output."""
    if source.package is None or source.path in COMMAND_LINES:
        return
    for node in source.nodes:
        if isinstance(node, ast.Call) and dotted(node.func) == "print":
            yield source.at(node, "prints; return the text, or hand it to interp/cli.py")
        elif isinstance(node, ast.Attribute) and dotted(node) == "sys.stdout":
            yield source.at(node, "uses sys.stdout; return the text, or hand it to interp/cli.py")


MAKERS = re.compile(
    r"torch\.(arange|as_tensor|empty|eye|full|linspace|ones|rand|randint|randn|randperm|tensor|tri[lu]_indices|zeros)"
)


def devices(source: Source) -> Iterator[str]:
    """A new tensor says where it is: torch's default device is the user's, who may have put the model elsewhere.

    Weights are the exception: a fresh model is where torch puts its tensors (``models/*.py``).
    """
    if source.package is None or (fnmatch(source.path, "models/*.py") and source.path.count("/") == 1):
        return
    for node in source.nodes:
        if isinstance(node, ast.Call) and MAKERS.fullmatch(dotted(node.func)):
            if not any(keyword.arg == "device" for keyword in node.keywords):
                yield source.at(node, f"{dotted(node.func)} without device=")


def finished(source: Source) -> Iterator[str]:
    """No debugger and no note to oneself is left in."""
    for number, line in enumerate(source.text.splitlines(), 1):
        found = UNFINISHED.search(line)
        if found:
            yield f"{source.path}:{number}: {found[0]} left in"
    for node, name in imports(source):
        if name.partition(".")[0] in ("pdb", "ipdb", "pudb"):
            yield source.at(node, f"imports {name}")
    for node in source.nodes:
        if isinstance(node, ast.Call) and dotted(node.func) == "breakpoint":
            yield source.at(node, "breakpoint left in")


def encodings(source: Source) -> Iterator[str]:
    """A file of text is read and written as UTF-8, whatever the machine's own encoding is."""
    if source.package not in PACKAGES:
        return
    for node in source.nodes:
        if not isinstance(node, ast.Call) or any(given.arg == "encoding" for given in node.keywords):
            continue
        name = dotted(node.func)
        mode = ast.unparse(node.args[1]) if len(node.args) > 1 else ""
        if name == "open" and "b" not in mode:
            yield source.at(node, "opens a text without its encoding")
        elif isinstance(node.func, ast.Attribute) and node.func.attr in ("read_text", "write_text"):
            yield source.at(node, f"{node.func.attr} without its encoding")


def reasons(source: Source) -> Iterator[str]:
    """A test that is skipped, or expected to fail, says why."""
    if not source.path.startswith("tests/"):
        return
    takes = {"skip": 0, "exit": 0, "skipif": 1, "xfail": 1, "importorskip": 2}  # position of the reason
    called: set[int] = set()
    for node in source.nodes:
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            last = name.rpartition(".")[2]
            if not name.startswith(("pytest.", "unittest.")) or last not in takes:
                continue
            called.add(id(node.func))
            given = [k.value for k in node.keywords if k.arg in ("reason", "msg")]
            given += node.args[takes[last] : takes[last] + 1] if last in ("skip", "exit") else []
            if not given or (isinstance(given[0], ast.Constant) and not given[0].value):
                yield source.at(node, f"{name} without a reason")
    for node in source.nodes:
        if isinstance(node, ast.Attribute) and id(node) not in called:
            name = dotted(node)
            if name in ("pytest.mark.skip", "pytest.mark.skipif", "pytest.mark.xfail"):
                yield source.at(node, f"{name} without a reason")


def kinds(source: Source) -> Iterator[str]:
    """A test file says of what kind its tests are (one kind at least; refusals need none)."""
    if not fnmatch(source.path, "tests/*test_*.py") or "/benchmarks/" in source.path:
        return
    marks = {dotted(node) for node in source.nodes if isinstance(node, ast.Attribute)}
    if not marks & {f"pytest.mark.{kind}" for kind in KINDS}:
        yield f"{source.path}:1: no test of a kind: {', '.join(sorted(KINDS))}"


def short_files(source: Source) -> Iterator[str]:
    """A long file is two ideas."""
    lines = source.text.count("\n")
    if lines > MAX_LINES:
        yield f"{source.path}:{MAX_LINES}: {lines} lines; past {MAX_LINES} it wants to be two files"


def public_list(source: Source) -> Iterator[str]:
    """A package's ``__all__`` is written out by hand, without repeats, and fits one screen."""
    if source.package is None or not source.path.endswith("__init__.py"):
        return
    lists = [node for node in source.tree.body if "__all__" in assigned(node)]
    if len(lists) != 1:
        yield f"{source.path}:1: {len(lists) or 'no'} __all__"
        return
    node, value = lists[0], lists[0].value
    literal = isinstance(value, ast.List | ast.Tuple) and all(
        isinstance(e, ast.Constant) and isinstance(e.value, str) for e in value.elts
    )
    if not literal:
        yield source.at(node, "__all__ is not a literal list of names")
        return
    names: list[str] = ast.literal_eval(value)
    if len(names) > MAX_NAMES:
        yield source.at(node, f"__all__ has {len(names)} names; {MAX_NAMES} fit one screen")
    for name in sorted({n for n in names if names.count(n) > 1 or n.startswith("_")}):
        yield source.at(node, f"__all__ repeats {name} or it is private")


CHECKS: tuple[Check, ...] = (
    import_direction,
    questions_apart,
    unshadowed,
    doors,
    lazy_imports,
    no_pickle,
    no_print,
    devices,
    finished,
    encodings,
    reasons,
    kinds,
    short_files,
    public_list,
)
