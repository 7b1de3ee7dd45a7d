"""The size of what is asked for, computed before the forward, so that a refusal comes instead of a crash."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from hooks.errors import BadArgument, TooLarge, told
from hooks.vocabulary import axes_of

CGROUPS = Path("/sys/fs/cgroup")
"""Where Linux shows the limits of a container, or of a job that a scheduler has started."""
OWN_CGROUPS = Path("/proc/self/cgroup")
_FILES = {
    True: (CGROUPS, "memory.max", "memory.current", "inactive_file"),
    False: (CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""By whether it is version 2: the root, the limit, what is in use, and how much of that can be dropped."""


def free_memory(device: torch.device) -> int:
    """Bytes that are free now on ``device``; of the host's no more than the container, or the job, may still take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([psutil.virtual_memory().available, *_left_to_groups()])


def allowed_memory(device: torch.device, max_memory: Any) -> int:
    """``max_memory`` in bytes, or half of what is free on ``device``; :class:`BadArgument` for what is no number."""
    if max_memory is None:
        return free_memory(device) // 2
    if isinstance(max_memory, bool) or not isinstance(max_memory, int | float) or not 0 <= max_memory < math.inf:
        raise BadArgument(
            f"max_memory is {told(max_memory)}; give a number of bytes, e.g. 2e9, or None for the default"
        )
    return int(max_memory)


def _left_to_groups() -> Iterator[int]:
    """What each control group that this process is in, and each above it, leaves of its limit."""
    try:
        lines = OWN_CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux, or a sandbox
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        newest = number == "0" and not controllers
        if newest or "memory" in controllers.split(","):
            root, *files = _FILES[newest]
            # Inside a container the path may be the host's, of which only the root is shown.
            own = root / path.strip("/")
            for group in (own, *(above for above in own.parents if above.is_relative_to(root))):
                left = _left(group, *files)
                if left is not None:
                    yield left


def _left(group: Path, limit: str, used: str, droppable: str) -> int | None:
    """The limit less what is in use and cannot be dropped; None where there is no limit, "max", or no such group."""
    try:
        most = int((group / limit).read_text(encoding="utf-8"))
        held = int((group / used).read_text(encoding="utf-8"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
        return max(0, most - held + int(counts.get(droppable, 0)))
    except (OSError, ValueError):
        return None


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


def check_memory(model: Any, tokens: Tensor, names: Sequence[str], max_memory: Any, copies: int = 1) -> int:
    """The bytes that ``names`` take for this input.

    Raises :class:`TooLarge` above ``max_memory``, which is half of what is free unless given.
    """
    sizes = {name: site_bytes(model, tokens, name) * copies for name in names}
    total = sum(sizes.values())
    limit = allowed_memory(tokens.device, max_memory)
    if total > limit:
        big = {"hook_decay", "hook_transition", "hook_write", "hook_state"}
        small = sum(size for name, size in sizes.items() if name.rsplit(".", 1)[-1] not in big)
        if 0 < small < total and small <= limit:
            shown = ", ".join(sorted(big & {name.rsplit(".", 1)[-1] for name in sizes}))
            advice = f"without the sites of the scan ({shown}) it is {human(small)}"
        else:
            advice = "ask for fewer sites, fewer prompts or a shorter input"
        raise TooLarge(
            f"{len(names)} sites of {tokens.shape[0]} × {tokens.shape[1]} tokens take {human(total)}, "
            f"allowed are {human(limit)} (max_memory): {advice}"
        )
    return total


def human(size: int | float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
