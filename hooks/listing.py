"""``show``: a tree of a model's sites with their shapes, for a person to read."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hooks.records import record
from hooks.vocabulary import sites


class Tree(str):
    """Text that a session shows as it is, line by line."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def show(model: Any, x: Tensor | None = None) -> Tree:
    """A tree of the sites of ``model``, one line each: name, shape, equation.

    Axes that depend on the input stand by name; with an input ``x`` the model runs on it once and the shapes are the
    live ones. Blocks that look alike are shown once, with their range.
    """
    table = sites(model)
    live = {} if x is None else {name: tuple(value.shape) for name, value in record(model, x).items()}
    lines: list[str] = [f"{type(model).__name__}: {len(model.hook_dict)} sites"]
    blocks: dict[str, list[tuple[str, str]]] = {}
    outside: list[tuple[str | None, str]] = []
    for site in table:
        size: tuple[int | str, ...] = live.get(site.name) or tuple(
            axis if n is None else n for axis, n in zip(site.axes, site.shape, strict=True)
        )
        shape = "(" + ", ".join(str(n) for n in size) + ")"
        note = f"  [{site.note}]" if site.note else ""
        parts = site.name.split(".")
        if parts[0] == "blocks" and len(parts) > 2:
            if parts[1] not in blocks:
                blocks[parts[1]] = []
                outside.append((parts[1], ""))
            blocks[parts[1]].append((".".join(parts[2:]), f"{shape:<28} {site.equation}{note}"))
        else:
            outside.append((None, f"  {site.name:<28} {shape:<28} {site.equation}{note}"))
    groups = _runs([index for index, _ in outside if index is not None], blocks)
    shown = {first: last for first, last in groups}
    for index, line in outside:
        if index is None:
            lines.append(line)
        elif index in shown:
            last = shown[index]
            lines.append(f"  blocks.{index}." if last == index else f"  blocks.{index} … blocks.{last}.")
            lines += [f"    {name:<26} {rest}" for name, rest in blocks[index]]
    return Tree("\n".join(lines))


def _runs(order: list[str], blocks: dict[str, list[tuple[str, str]]]) -> list[tuple[str, str]]:
    """(first, last) of each run of neighbouring blocks with the same lines."""
    runs: list[tuple[str, str]] = []
    for index in order:
        if runs and blocks[runs[-1][0]] == blocks[index]:
            runs[-1] = (runs[-1][0], index)
        else:
            runs.append((index, index))
    return runs
