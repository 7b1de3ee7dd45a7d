"""Run-time checks of the shapes and types in signatures: jaxtyping's annotations, checked by beartype.

beartype and not typeguard: jaxtyping supports the latter up to version 2, and TransformerLens needs version 4.

jaxtyping has an import hook of its own, ``install_import_hook``. It compiles a checker for each of thousands of
functions when their module is imported, and for a function within a function each time that it is made; it checks every
argument twice; and it binds the arguments of every call in Python. That was half of the time of the tests. Here a
checker is compiled when a function is first called, and in each test the first ``CALLS`` calls of a function are
checked: what a loop calls ten thousand times is not checked ten thousand times.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
import sys
import types
import typing
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, TypeCheckError, jaxtyped

COMPILED = re.compile(r"^\s*(?:import|from)\s+(?:numba|triton)\b", re.MULTILINE)
FEW = 4
"""How many of the makings of a function within a function are checked: each needs a checker of its own."""
CALLS = 3
"""How many calls of a function are checked in each test."""
CHECK = beartype(conf=BeartypeConf(violation_type=TypeCheckError))
"""TypeCheckError is a TypeError, as what Python itself raises for arguments that do not fit."""
made: Counter[types.CodeType] = Counter()
tests = 0
"""How many tests have begun."""
Anything = Callable[..., Any]


class Finder(MetaPathFinder):
    """Finds the modules of some packages, and has what they define checked.

    Modules that import numba or triton are left as they are: both compile the functions that they decorate and cannot
    read a function that a checker has wrapped. What enters these modules has been through a checked signature one call
    earlier.
    """

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = packages

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in self.packages:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or not isinstance(spec.loader, SourceFileLoader):
            return None
        if not COMPILED.search(Path(spec.loader.path).read_text(encoding="utf-8")):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


class Loader(SourceFileLoader):
    """Loads a module whose every function and class is decorated with ``checked``; no bytecode of it is kept."""

    def get_code(self, fullname: str) -> types.CodeType:
        source = self.get_data(self.path)
        tree = Decorated().visit(ast.parse(source, self.path))
        return compile(ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True)


class Decorated(ast.NodeTransformer):
    """``checked`` as the first decorator that a function meets, and the last that a class does (after dataclass)."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        node.decorator_list.append(self._decorator(node))
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        self.generic_visit(node)
        node.decorator_list.insert(0, self._decorator(node))
        return node

    @staticmethod
    def _decorator(node: ast.AST) -> ast.expr:
        expression = ast.parse(f"__import__({__name__!r}, fromlist=['checked']).checked", mode="eval").body
        for part in ast.walk(expression):
            ast.copy_location(part, node)
        return expression


def checked(thing: Any) -> Any:
    """A function with arguments and result checked at each call; a dataclass with its fields checked when made."""
    if isinstance(thing, type):
        if dataclasses.is_dataclass(thing) and not hasattr(thing.__init__, "__wrapped__"):
            thing.__init__ = _checked(thing.__init__)  # type: ignore[method-assign]
        return thing
    return _checked(thing)


def _checked(function: Any) -> Anything:
    if "<locals>" in function.__qualname__:
        made[function.__code__] += 1
        if made[function.__code__] > FEW:
            return function  # type: ignore[no-any-return]
    checker: Anything | None = None
    left = CALLS
    since = tests

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal checker, left, since
        if since != tests:
            left, since = CALLS, tests
        if not left:
            return function(*args, **kwargs)
        left -= 1
        if checker is None:
            checker = _checker(function)
        return checker(*args, **kwargs)

    return call


def _checker(function: types.FunctionType) -> Anything:
    """beartype's, with the axes that a signature names kept apart from those of every other call."""
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    functools.update_wrapper(copy, function)
    copy.__kwdefaults__ = function.__kwdefaults__
    del copy.__wrapped__
    copy.__annotations__ = {name: _resolved(hint, function) for name, hint in function.__annotations__.items()}
    for hint in copy.__annotations__.values():
        for part in _parts(hint):
            # beartype asks isinstance, which a Protocol refuses unless it is marked for that. The mark costs nothing,
            # so it is put here, and the packages need not carry one for the tests' sake.
            if getattr(part, "_is_protocol", False) and part is not typing.Protocol:
                typing.runtime_checkable(part)
    checker: Anything = CHECK(copy)
    if not any(isinstance(part, type) and issubclass(part, AbstractArray) for part in _all_parts(copy)):
        return checker

    def call(*args: Any, **kwargs: Any) -> Any:
        with jaxtyped("context"):
            return checker(*args, **kwargs)

    return call


def _all_parts(function: types.FunctionType) -> list[Any]:
    return [part for hint in function.__annotations__.values() for part in _parts(hint)]


def _parts(hint: Any) -> list[Any]:
    """The hint and all that it is made of."""
    if isinstance(hint, list | tuple):
        return [part for one in hint for part in _parts(one)]
    return [hint, *(part for inner in typing.get_args(hint) for part in _parts(inner))]


def _resolved(hint: Any, function: types.FunctionType) -> Any:
    """The annotation as an object; Any where a name in it exists for type checkers alone."""

    def only() -> None: ...

    only.__annotations__ = {"value": hint}
    try:
        return typing.get_type_hints(only, function.__globals__, include_extras=True)["value"]
    except Exception:  # whatever an expression can raise; jaxtyping's own hook takes the same way out
        return Any


def afresh() -> None:
    """Check the next ``CALLS`` calls of each function: a test begins."""
    global tests
    tests += 1


def install(packages: Sequence[str]) -> None:
    """Check every signature of ``packages`` from here on; none of them may be loaded yet."""
    early = sorted(name for name in sys.modules if name.partition(".")[0] in packages)
    if early:
        raise RuntimeError(f"loaded before their shapes could be checked: {', '.join(early)}")
    sys.meta_path.insert(0, Finder(packages))
