"""``brief``: what an object holds, in ten lines at most: names, axes and sizes instead of numbers."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from hooks.errors import told

LINES, COLUMNS = 10, 100


def brief(self: Any) -> str:
    """The ``__repr__`` of a dataclass: its class, then each field with its axes, as its annotation names them."""
    return lines(type(self).__name__, parts(self))


def parts(self: Any) -> dict[str, str]:
    """Each field of a dataclass or named tuple with its axes."""
    named = getattr(self, "_fields", None) or [field.name for field in dataclasses.fields(self) if field.repr]
    axes = _axes(type(self))
    return {name: written(getattr(self, name), axes.get(name, "")) for name in named}


def lines(title: str, parts: Mapping[str, str]) -> str:
    """``title``, then each part on a line of its own where they are few, else one after the other."""
    width = max(map(len, parts), default=0)
    rows = [_cut(f"  {name.ljust(width)}  {text}") for name, text in parts.items()]
    if len(rows) >= LINES:
        rows = _packed([f"{name} {text}" for name, text in parts.items()])
    return "\n".join([title, *rows])


def written(value: Any, axes: str = "") -> str:
    """``value`` on one line: an array by its axes and dtype, a table by its columns, a collection by its names."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return f"a {type(value).__name__}"
    if hasattr(value, "columns") and hasattr(value, "dtypes"):
        return f"{len(value)} rows of {', '.join(map(str, value.columns))}"
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if isinstance(shape, tuple) and dtype is not None:
        if len(shape) == 0 and not getattr(value, "is_meta", False):
            return f"{value.item():g}" if str(dtype).removeprefix("torch.").startswith("float") else str(value.item())
        return f"{_sized(axes, shape) or shape}  {str(dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return f"{len(value)}: " + ", ".join(_item(key, one) for key, one in value.items()) if value else "none"
    if isinstance(value, list | tuple) and value and all(dataclasses.is_dataclass(one) for one in value):
        return f"{len(value)} of {type(value[0]).__name__}"
    return told(value)


def _item(key: Any, value: Any) -> str:
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return f"{key} {tuple(shape)}"
    return f"{key}={told(value)}" if isinstance(value, bool | int | float | str) else str(key)


def _sized(axes: str, shape: tuple[int, ...]) -> str:
    """``batch=64 pos=81``; an axis without a name, or of several sizes, is its sizes alone."""
    names = axes.split()
    several = [i for i, name in enumerate(names) if name.startswith(("*", "..."))]
    if len(several) == 1:
        (at,) = several
        count = len(shape) - len(names) + 1
        name = names[at].lstrip("*")
        filled = [name] if count == 1 and name != "..." else [""] * max(count, 0)
        names = [*names[:at], *filled, *names[at + 1 :]]
    if len(names) != len(shape):
        return ""
    named = re.compile(r"[^\W\d]\w*")
    return " ".join(
        f"{name}={size}" if named.fullmatch(name) else str(size) for name, size in zip(names, shape, strict=True)
    )


def _axes(kind: Any) -> dict[str, str]:
    """The axes in the annotation of each field, as jaxtyping has them; none where it cannot be read."""
    try:
        hints = typing.get_type_hints(kind)
    except (NameError, TypeError, AttributeError):  # a name that only a type checker imports
        hints = {}
    found = {}
    for name, annotation in kind.__annotations__.items():
        each = [hints.get(name), *typing.get_args(hints.get(name))]
        axes = next((one.dim_str for one in each if isinstance(getattr(one, "dim_str", None), str)), None)
        if axes is None:
            match = re.search(r"\[[^\"']*,\s*[\"']([^\"']*)[\"']\]", str(annotation))
            axes = match[1] if match else ""
        found[name] = axes
    return found


def _packed(parts: Iterable[str]) -> list[str]:
    rows = ["  "]
    for part in parts:
        if len(rows[-1]) > 2 and len(rows[-1]) + len(part) > COLUMNS:
            rows.append("  ")
        rows[-1] += part + "; "
    rows = [_cut(row.rstrip("; ")) for row in rows]
    return rows if len(rows) < LINES else [*rows[: LINES - 2], f"  … {len(rows) - LINES + 2} more lines"]


def _cut(text: str) -> str:
    line = " ".join(text.split("\n"))
    return line if len(line) <= COLUMNS else f"{line[: COLUMNS - 2]} …"
