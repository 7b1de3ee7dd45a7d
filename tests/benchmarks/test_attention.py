"""Hidden attention beside TransformerLens', and what one prediction's contributions take at 2048 tokens.

The matrix: one Mamba layer of the 130m shape at 64 tokens, all channels and queries. The rival is what a user of
TransformerLens calls, a run with its cache and ``compute_effective_attention`` of the layer; it is timed without its
run as well, which leaves ours with a run and the rival with none. The contributions have no rival elsewhere, so beside
them stands the same by autograd through our own scan. Every row first asserts that both sides found the same numbers.
Times are printed, not asserted; the memory of the contributions is asserted, in a process of its own.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import platform
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import hooks
import models
from interp.attention import contributions, matrix
from interp.attention.pairs import all_pairs
from interp.attention.recurrence import observe
from interp.machine.provenance import versions
from models.pretrained import _torch_functions
from tests.benchmarks.test_layer import Layer, Size
from tests.benchmarks.timing import HEADING, LEGEND, Row, Run, alone, medians, page_faults, save

LENGTH = 64
ASKED = 30.0
MEMORY = 1e9
"""Bytes that the contributions of one prediction may take."""
WRITE = "blocks.0.mixer.hook_write"


@dataclass(frozen=True)
class Long:
    """The prompt and the layer whose contributions are timed; d_inner is 2 · d_model."""

    d_model: int = 256
    d_state: int = 16
    length: int = 2048
    d_in: int = 8


def last(out: Tensor) -> Tensor:
    return out[:, -1, 0]


def long_prompt(size: Long) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    model = models.build("mamba", d_model=size.d_model, n_layers=1, d_state=size.d_state, d_in=size.d_in).eval()
    return model, torch.randn(1, size.length, size.d_in)


def products(model: Any, tokens: Tensor) -> Run:
    """The four matrix products of the layer's run alone: what no run can do without."""
    seen, mixer = hooks.record(model, tokens), model.blocks[0].mixer
    r, x, gated = (seen[f"*.{name}"] for name in ("norm.hook_normalized", "hook_x", "hook_gated"))
    low = seen["*.hook_delta"][..., : mixer.cfg.rank].contiguous()  # the shape that dt_proj is given

    def run(r: Tensor, x: Tensor, low: Tensor, gated: Tensor) -> tuple[Tensor, ...]:
        return mixer.in_proj(r), mixer.x_proj(x), mixer.dt_proj(low), mixer.out_proj(gated)

    return alone(run, [r, x, low, gated], backward=False)


def matrix_rows(layer: Layer, tokens: Tensor, repetitions: int) -> list[Row]:
    mixer = layer.bridge.blocks[0].mixer

    def cached() -> Any:
        return layer.bridge.run_with_cache(tokens, use_cache=False)[1]

    def theirs(cache: Any) -> Tensor:
        return mixer.compute_effective_attention(cache, 0, include_dt_scaling=True)

    def ours() -> Tensor:
        return matrix(layer.ours, tokens, 0).values

    seen = observe(layer.ours, tokens, 0, gain=True)
    assert seen.gain is not None
    decay, gain, row = seen.decay, seen.gain, seen.rows(torch.ones_like(seen.x))
    out = torch.zeros(1, decay.shape[2], LENGTH, LENGTH)
    cache = cached()
    expected = theirs(cache)
    assert_close(ours(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    del expected
    runs: dict[str, Run] = {"without": lambda: theirs(cache), "with": lambda: theirs(cached()), "ours": ours}
    timed = medians(runs, repetitions)
    pairs: Run = lambda: all_pairs(decay, gain, row, out)  # noqa: E731
    parts = medians({"products": products(layer.ours, tokens), "pairs": pairs}, repetitions)
    faults = {name: page_faults(run) for name, run in runs.items()}
    return [
        Row(name, rival, LENGTH, timed[run], timed["ours"], asked, parts, faults[run], faults["ours"])
        for name, rival, run, asked in (
            ("matrix; the rival without its run", "effective attention", "without", ASKED),
            ("matrix; both with their run", "the same and its run", "with", None),
        )
    ]


def contributions_row(size: Long, repetitions: int) -> Row:
    """Gradient times write by autograd through our own scan beside the adjoint recurrence."""
    model, x = long_prompt(size)

    def by_autograd() -> Tensor:
        seen = hooks.record(model, x, WRITE, grad=True)
        (gradient,) = torch.autograd.grad(last(seen.output).sum(), seen[WRITE])
        return (gradient * seen[WRITE]).sum(-1).detach()

    def ours() -> Tensor:
        return contributions(model, x, 0, scalar=last).by_channel

    expected = by_autograd()
    assert_close(ours(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    seen = observe(model, x, 0)
    weights = torch.randn(seen.x.shape, generator=torch.Generator().manual_seed(0))
    timed = medians({"rival": by_autograd, "ours": ours}, repetitions)
    adjoint: Run = lambda: seen.pull_back(weights, [seen.write])  # noqa: E731
    parts = medians({"products": products(model, x), "adjoint": adjoint}, repetitions)
    faults = page_faults(by_autograd), page_faults(ours)
    return Row(
        "contributions of one prediction", "autograd, our scan", size.length, *timed.values(), None, parts, *faults
    )


def memory_of_contributions(size: Long, threads: int) -> int:
    """Bytes by which the process's largest size grows; call it in a process of its own."""
    torch.set_num_threads(threads)
    model, x = long_prompt(size)
    contributions(model, x[:, :16], 0, scalar=last)  # what is loaded and compiled at the first call
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = contributions(model, x, 0, scalar=last)
    assert found.relative_error < 1e-5
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


@pytest.fixture
def size() -> Iterator[Size]:
    size, before = Size(length=LENGTH), torch.get_num_threads()
    torch.set_num_threads(size.threads)
    yield size
    torch.set_num_threads(before)


@pytest.mark.benchmark
def test_hidden_attention(size: Size, request: pytest.FixtureRequest) -> None:
    start, repetitions, long = time.perf_counter(), 7, Long()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        memory = pool.apply(memory_of_contributions, (long, size.threads))
    layer = Layer(size)
    tokens = torch.randint(size.vocabulary, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    with _torch_functions(layer.hugging_face), torch.no_grad():
        rows = matrix_rows(layer, tokens, repetitions)
    rows.append(contributions_row(long, repetitions))
    described = {
        "matrix": f"{asdict(size)}, d_inner {layer.hugging_face.config.intermediate_size}, batch 1, fp32",
        "contributions": f"{asdict(long)}, d_inner {2 * long.d_model}, one layer, batch 1, fp32; "
        f"largest growth of a process of its own {memory / 1e6:.0f} MB",
        "TransformerLens": "bridge, eager_scan=True, run_with_cache(tokens, use_cache=False), "
        "compute_effective_attention(cache, 0, include_dt_scaling=True)",
        "ours": "matrix(model, tokens, 0): the run, all channels and queries, and the error of the reconstruction; "
        "contributions(model, x, 0, scalar=…)",
        "parts": "products: the four projections; pairs: all pairs of positions; adjoint: the recurrence from the end",
        "clock": f"medians of {repetitions}, in turns, after one round of warm-up",
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f} at the end (alone: at most {size.threads})",
        "versions": versions(("torch", "transformers", "transformer-lens", "numba", "numpy", "mambascope")),
        "shape checks": "off" if request.config.getoption("--no-shape-checks") else "on, which slows ours",
    }
    print("", *(f"{what}: {how}" for what, how in described.items()), "", HEADING, *rows, LEGEND, sep="\n")
    assert 0 < memory < MEMORY
    for row in rows:
        assert all(math.isfinite(ms) and ms > 0 for ms in (row.rival_ms, row.ours_ms, *row.parts_ms.values())), row
    print(save("attention", described, rows, time.perf_counter() - start))
