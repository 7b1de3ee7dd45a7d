"""What a run takes in memory, known from what it is asked for before the first prompt is drawn.

A prompt's share of the peak is counted in two units, its own tensors and what it holds at the sites of the models that
read it, and where prompts are compared with each other in pairs of prompts. How many of each a command holds at its
peak was measured (``HELD``); ``tests/analyses/test_room.py`` measures it again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hooks.errors import TooLarge
from hooks.memory import free_memory, human, site_bytes

LIBRARIES = 150e6
"""Bytes that compiled scans and the first run of a model take, whatever the prompts."""
SCAN = ("hook_decay", "hook_transition", "hook_write", "hook_state")
"""The sites that are formed only where somebody looks."""


@dataclass(frozen=True)
class Held:
    """Multiples of what one prompt has at the sites of the models together, of its own tensors, and bytes of each pair
    of prompts for each layer of one model. Whatever is asked for, ``fixed`` times the sites and ``base`` bytes go too.
    """

    sites: float = 0.0
    own: float = 0.0
    pair: float = 0.0
    fixed: float = 0.0
    base: float = 0.0


HELD = {
    "ablate_delta": Held(sites=1.0, own=10.0, fixed=150.0),
    "probe_layers": Held(sites=0.1, own=650.0),
    "compare_states": Held(sites=0.5, own=20.0, pair=120.0, fixed=300.0),
    "attribute_outliers": Held(sites=3.9, own=85.0),
    "feature_learning": Held(own=1300.0, base=1.3e9),
    "learning_curves": Held(own=35.0, fixed=50.0),
    "train": Held(sites=1.35, own=10.0),
    "zoo": Held(own=30.0, fixed=50.0),
}
QUERY = 0.15
"""Of a token's sites, what ``probe_layers`` keeps of each query of each prompt: residual streams, three times."""


@dataclass(frozen=True)
class Part:
    """``number`` of what the option ``flag`` counts, each of ``each`` bytes, and each pair of them of ``pair``."""

    flag: str
    number: int
    each: float
    pair: float = 0.0
    fixed: float = 0.0

    @property
    def size(self) -> float:
        """Bytes of all of them, beside what is fixed."""
        return self.number * (self.each + self.number * self.pair)

    def fits(self, room: float) -> int:
        """How many take no more than ``room`` bytes: the root of pair · n² + each · n = room."""
        if room <= 0:
            return 0
        return int(2 * room / (self.each + math.sqrt(self.each**2 + 4 * self.pair * room)))


def prompts(command: str, flag: str, number: int, task: Any, models: Sequence[Any], n_pairs: int | None = None) -> Part:
    """``number`` prompts of ``task``, of ``n_pairs`` pairs if given, that ``command`` shows to ``models``."""
    generator = torch.Generator().manual_seed(0)
    batch = task.sample(8, generator) if n_pairs is None else task.sample(8, generator, n_pairs=n_pairs)
    own = sum(map(_bytes, vars(batch).values())) / 8
    held = HELD[command]
    sites = sum(of_sites(model, batch.tokens.shape[1]) for model in models)
    layers = max((len(getattr(model, "blocks", ())) for model in models), default=0)
    return Part(flag, number, held.sites * sites + held.own * own, held.pair * layers, held.fixed * sites + held.base)


def of_sites(model: Any, length: int) -> float:
    """Bytes that a prompt of ``length`` tokens holds at all sites of ``model`` but those of the scan."""
    tokens = torch.empty(1, length, 1, device="meta")
    names = [name for name in getattr(model, "hook_dict", {}) if name.rsplit(".", 1)[-1] not in SCAN]
    return float(sum(site_bytes(model, tokens, name) for name in names))


def check(*parts: Part, device: torch.device | str = "cpu") -> float:
    """The bytes that a run with these ``parts`` takes at its peak, beside what is loaded already.

    Raises :class:`TooLarge` where they are more than is free, with the number that fits of the largest part.
    """
    need = LIBRARIES + max(part.fixed for part in parts) + sum(part.size for part in parts)
    free = min(free_memory(torch.device(name)) for name in {"cpu", str(device)})
    if need <= free:
        return need
    most = max(parts, key=lambda part: part.size)
    fits = most.fits(float(free - need + most.size))
    advice = f"about {fits} fit" if fits else "give a smaller model, fewer models or shorter prompts"
    raise TooLarge(
        f"--{most.flag} {most.number} would take about {human(need)} of memory, {human(free)} are free: {advice}"
    )


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value.values())) if isinstance(value, Mapping) else 0
