"""The size of what is asked for, computed before the forward, so that a refusal comes instead of a crash."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hooks.errors import TooLarge
from hooks.sites import axes_of


def free_memory(device: torch.device) -> int:
    """Bytes that are free now on ``device``."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def site_bytes(model: Any, tokens: Tensor, name: str) -> int:
    """Bytes of one site for this input: the product of its axes times the size of one number."""
    axes = axes_of(model, name)
    if not axes or not hasattr(model, "axis_sizes"):
        return 0
    sizes = {**model.axis_sizes(), "batch": tokens.shape[0], "pos": tokens.shape[1], "1": 1}
    sizes["pos_k"] = tokens.shape[1]
    parts = getattr(model.hook_dict[name], "parts", 1)
    # Whatever the weights are in, most sites are in at least fp32.
    number = max(4, next((p.element_size() for p in model.parameters()), 4))
    return math.prod(sizes.get(axis, 1) for axis in axes) * parts * number


def check_memory(model: Any, tokens: Tensor, names: Sequence[str], max_memory: int | None, copies: int = 1) -> int:
    """The bytes that ``names`` take for this input.

    Raises :class:`TooLarge` above ``max_memory``, which is half of what is free unless given.
    """
    sizes = {name: site_bytes(model, tokens, name) * copies for name in names}
    total = sum(sizes.values())
    limit = free_memory(tokens.device) // 2 if max_memory is None else max_memory
    if total > limit:
        big = {"hook_decay", "hook_transition", "hook_write", "hook_state"}
        small = sum(size for name, size in sizes.items() if name.rsplit(".", 1)[-1] not in big)
        if 0 < small < total and small <= limit:
            shown = ", ".join(sorted(big & {name.rsplit(".", 1)[-1] for name in sizes}))
            advice = f"without the sites of the scan ({shown}) it is {_human(small)}"
        else:
            advice = "ask for fewer sites, fewer prompts or a shorter input"
        raise TooLarge(
            f"{len(names)} sites of {tokens.shape[0]} × {tokens.shape[1]} tokens take {_human(total)}, "
            f"allowed are {_human(limit)} (max_memory): {advice}"
        )
    return total


def _human(size: int | float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
