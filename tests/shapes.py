"""Run-time checks of the shapes and types in signatures: jaxtyping's import hook over beartype.

beartype and not typeguard: jaxtyping supports the latter up to version 2, and TransformerLens needs
version 4.
"""

from __future__ import annotations

import re
import sys
import typing
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from beartype import beartype
from jaxtyping import install_import_hook

COMPILED = re.compile(r"^\s*(?:import|from)\s+(?:numba|triton)\b", re.MULTILINE)


class CompiledModules(MetaPathFinder):
    """Finds modules that import numba or triton ahead of jaxtyping's hook, so that it skips them.

    Both compile the functions that they decorate and cannot read a function that a checker has
    wrapped. What enters these modules has been through a checked signature one call earlier.
    """

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = packages

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in self.packages:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            return None
        return spec if COMPILED.search(Path(spec.origin).read_text(encoding="utf-8")) else None


def checked(function: Callable[..., object]) -> Callable[..., object]:
    """``function`` with its arguments and its result checked at each call.

    beartype asks ``isinstance``, which a Protocol refuses unless it is marked for that. The mark
    costs nothing, so it is put here on the protocols that ``function`` can name, and the packages
    need not carry one for the tests' sake.
    """
    for value in list(getattr(function, "__globals__", {}).values()):
        protocol = isinstance(value, type) and getattr(value, "_is_protocol", False)
        if protocol and not getattr(value, "_is_runtime_protocol", False):
            if value is not typing.Protocol:
                typing.runtime_checkable(value)
    return beartype(function)


def install(packages: Sequence[str]) -> None:
    """Check every signature of ``packages`` from here on; none of them may be loaded yet."""
    early = sorted(name for name in sys.modules if name.partition(".")[0] in packages)
    if early:
        raise RuntimeError(f"loaded before their shapes could be checked: {', '.join(early)}")
    install_import_hook(packages, f"{__name__}.checked")
    sys.meta_path.insert(0, CompiledModules(packages))
