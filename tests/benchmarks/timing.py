"""Timing side by side, the same way in every benchmark: in turns, medians, and what bounds ours beside them."""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hooks.errors import MambascopeError
from interp.machine.files import strict_json, writable_folder, write_whole
from interp.machine.provenance import REPOSITORY, provenance

Run = Callable[[], object]

HEADING = (
    f"{'row':<34} {'rival':<22} {'L':>5} {'rival ms':>9} {'ours ms':>8} {'ratio':>6} {'asked':>6} {'':<8} "
    f"{'ceiling':>7} {'faults':>11}  what bounds ours: each part alone, ms"
)
LEGEND = (
    "products: the four projections alone, the floor; ceiling: the ratio if nothing else were left of ours;\n"
    "rest: norms, convolution, activations, hooks, checks for NaN; "
    "faults: page faults of one run, rival / ours: each hands out and clears fresh memory, which takes some µs"
)


@dataclass(frozen=True)
class Row:
    """One line of the table: medians in ms, the parts of our run, each timed alone, and page faults."""

    name: str
    rival: str
    length: int
    rival_ms: float
    ours_ms: float
    asked: float | None
    parts_ms: dict[str, float]
    rival_faults: int
    ours_faults: int

    @property
    def ratio(self) -> float:
        """How many times faster ours is."""
        return self.rival_ms / self.ours_ms

    @property
    def verdict(self) -> str:
        """Whether the ratio is the one asked for; empty where none was."""
        return "" if self.asked is None else "met" if self.ratio >= self.asked else "not met"

    @property
    def ceiling(self) -> float:
        """The ratio if ours were its matrix products and nothing else."""
        return self.rival_ms / self.parts_ms["products"]

    def as_dict(self) -> dict[str, Any]:
        """The fields and what is computed from them."""
        return {**asdict(self), "ratio": self.ratio, "verdict": self.verdict, "ceiling": self.ceiling}

    def __str__(self) -> str:
        parts = {**self.parts_ms, "rest": self.ours_ms - sum(self.parts_ms.values())}
        bound = ", ".join(f"{part} {ms:.1f}" for part, ms in sorted(parts.items(), key=lambda item: -item[1]))
        times = f"{self.rival_ms:9.1f} {self.ours_ms:8.1f} {self.ratio:6.2f}"
        asked = "" if self.asked is None else f"{self.asked:g}"
        left = f"{self.name:<34} {self.rival:<22} {self.length:>5} {times} {asked:>6} {self.verdict:<8}"
        faults = f"{self.rival_faults} / {self.ours_faults}"
        return f"{left} {self.ceiling:7.1f} {faults:>11}  {bound}"


def medians(runs: Mapping[str, Run], repetitions: int) -> dict[str, float]:
    """Median milliseconds of each; all in turns, so that a busy moment hits them alike, after one round of warm-up."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    with collector_off():
        for _ in range(repetitions + 1):
            for name, run in runs.items():
                start = time.perf_counter()
                result = run()
                taken[name].append(1e3 * (time.perf_counter() - start))
                del result  # after the clock is read: a user keeps it
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


@contextmanager
def collector_off() -> Iterator[None]:
    """Inside the block nobody pays for collecting another's garbage; timeit does the same."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def page_faults(run: Run) -> int:
    """How many pages of memory ``run`` touches for the first time."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    result = run()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    del result
    return after - before


def alone(function: Callable[..., tuple[Tensor, ...]], operands: list[Tensor], backward: bool) -> Run:
    """``function`` of ``operands``, with the gradients of all of them where ``backward``."""
    if not backward:
        return lambda: function(*operands)
    leaves = [o if isinstance(o, nn.Parameter) else o.detach().requires_grad_() for o in operands]
    ones = [torch.ones_like(out) for out in function(*leaves)]
    return lambda: torch.autograd.grad(function(*leaves), leaves, ones)


def save(name: str, configuration: dict[str, Any], rows: list[Row], seconds: float) -> str:
    """Write ``out/bench/{name}.json`` where that can be written; one line that says where, or why not."""
    file = REPOSITORY / "out" / "bench" / f"{name}.json"
    made = provenance(seed=0, device="cpu", seconds=seconds)
    found = {"configuration": configuration, "rows": [row.as_dict() for row in rows], "provenance": made}
    try:
        write_whole(writable_folder(file.parent) / file.name, strict_json(found, indent=2))
    except MambascopeError as error:
        return f"not written: {error}"
    return f"written to {file.relative_to(REPOSITORY)}"
