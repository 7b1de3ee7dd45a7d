"""How fast one recorded Mamba layer is beside Hugging Face, TransformerLens and mambapy: one table.

Every row times a rival and ours on the same weights, in turns within one process, after asserting that they computed
the same numbers; the ratio is that of the medians. Nothing asserts a time. Timed are whole calls as a user writes them,
tokens to logits: the layer and, on both sides, a vocabulary of 32 that costs next to nothing. Ours records with
``hooks.record``, which copies every tensor, while TransformerLens' ``run_with_cache`` keeps references, as our own does
(it has its row).
"""

from __future__ import annotations

import copy
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pytest
import torch
from mambapy.mamba import Mamba as MambapyMamba
from mambapy.mamba import MambaConfig as MambapyConfig
from torch import Tensor, nn
from torch.testing import assert_close
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import MambaConfig, MambaForCausalLM

import hooks
import models
from interp.machine.provenance import versions
from models.pretrained import _torch_functions
from models.scan import scan, selective_scan, selective_states
from tests.benchmarks.timing import HEADING, LEGEND, Row, Run, alone, medians, page_faults, save

Kept = Mapping[str, Tensor]
Side = Callable[[Tensor], tuple[Tensor, Kept]]
"""Tokens → logits and what else the run leaves behind: recorded sites, or the gradients of the layer."""

STATE, DECAY = "blocks.0.mixer.hook_state", "blocks.0.mixer.hook_decay"
THEIR_STATE = "blocks.0.mixer.hook_ssm_state"  # batch d_inner pos d_state
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Size:
    """The 130m shape; gradients are timed on shorter prompts, because the rivals take seconds."""

    d_model: int = 768
    d_state: int = 16
    length: int = 512
    length_backward: int = 256
    vocabulary: int = 32
    threads: int = 2


@dataclass(frozen=True)
class Comparison:
    """What one row times. ``asked``: the ratio wanted; ``sites``: what ours records; ``copies``: by hooks.record."""

    name: str
    rival_name: str
    rival: Side
    ours: Side
    asked: float | None = None
    sites: tuple[str, ...] = ()
    copies: bool = True
    backward: bool = False


class Layer:
    """One random layer four times over, with the same weights, and the rows that compare them."""

    def __init__(self, size: Size) -> None:
        config = MambaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.d_model,
            state_size=size.d_state,
            num_hidden_layers=1,
            initializer_range=0.02,  # at the default, Δ is so large that decays are subnormal numbers, which are slow
        )
        self.hugging_face: Any = MambaForCausalLM(config).eval()
        self.ours: Any = models.load(self.hugging_face)
        # A bridge takes the module apart in place, so it gets one of its own.
        self.bridge: Any = build_bridge_from_module(
            copy.deepcopy(self.hugging_face), "MambaForCausalLM", hf_config=config
        )
        for block in self.bridge.blocks:
            block.mixer.eager_scan = True
        blocks: Any = MambapyMamba(MambapyConfig(d_model=size.d_model, n_layers=1, d_state=size.d_state))
        blocks.layers.load_state_dict(self.hugging_face.backbone.layers.state_dict())
        ends = copy.deepcopy(self.hugging_face)
        self.mambapy: Any = nn.Sequential(ends.backbone.embeddings, blocks, ends.backbone.norm_f, ends.lm_head)

    def comparisons(self) -> list[Comparison]:
        """Every row; the first three are the ones with a ratio asked for."""
        sites = hooks.sites(self.ours)
        flat = tuple(site.name for site in sites if len(site.axes) < 4)
        some, every = tuple(name for name in sites.names if name in flat or name == STATE), tuple(sites.names)

        def theirs(tokens: Tensor) -> Tensor:
            return self.hugging_face(tokens, use_cache=False).logits

        def eager(tokens: Tensor) -> tuple[Tensor, Kept]:
            return self.bridge.run_with_cache(tokens, use_cache=False)

        def recorded(names: Sequence[str]) -> Side:
            def run(tokens: Tensor) -> tuple[Tensor, Kept]:
                record = hooks.record(self.ours, tokens, names)
                return record.output, record

            return run

        def cached(tokens: Tensor) -> tuple[Tensor, Kept]:
            return self.ours.run_with_cache(tokens, names_filter=some)

        ours, mambapy, bridge = forward(self.ours), forward(self.mambapy), "TransformerLens eager"
        own = both_ways(self.ours, self.ours, self.ours.blocks[0])
        back = both_ways(self.hugging_face, theirs, self.hugging_face.backbone.layers[0])
        mambapy_back = both_ways(self.mambapy, self.mambapy, self.mambapy[1].layers[0])
        return [
            Comparison("3-D sites recorded", "Hugging Face", forward(theirs), recorded(flat), 3.5, flat),
            Comparison("3-D sites and states recorded", bridge, eager, recorded(some), 2.5, some),
            Comparison("forward and backward", "Hugging Face", back, own, 12.0, backward=True),
            Comparison("nothing recorded", "Hugging Face", forward(theirs), ours),
            Comparison("3-D sites and states, cached", bridge, eager, cached, sites=some, copies=False),
            Comparison("all sites recorded, 4-D ones too", bridge, eager, recorded(every), sites=every),
            Comparison("nothing recorded", "mambapy", mambapy, ours),
            Comparison("forward and backward", "mambapy", mambapy_back, own, backward=True),
        ]

    def parts(self, tokens: Tensor, what: Comparison) -> dict[str, Run]:
        """What our run cannot do without: the four matrix products, the recurrence, the copies."""
        seen, mixer = hooks.record(self.ours, tokens), self.ours.blocks[0].mixer
        r = seen["*.norm.hook_normalized"]
        x, delta, B, C, gated = (seen[f"*.hook_{site}"] for site in ("x", "delta", "B", "C", "gated"))
        low = delta[..., : mixer.cfg.rank].contiguous()  # of the shape that dt_proj is given; the values do not matter

        def products(r: Tensor, x: Tensor, low: Tensor, gated: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
            return mixer.in_proj(r), mixer.x_proj(x), mixer.dt_proj(low), mixer.out_proj(gated)

        def recurrence(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, ...]:
            if STATE not in what.sites:
                return selective_scan(x, delta, delta, A, B, C)[:1]
            if DECAY in what.sites:
                states = scan(torch.exp(delta[..., None] * A), (delta * x)[..., None] * B[:, :, None])
            else:
                states = selective_states(x, delta, delta, A, B)
            return (torch.einsum("bldn,bln->bld", states, C),)

        weights = [part.weight for part in (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj)]
        parts: dict[str, Run] = {
            "products": alone(products, [r, x, low, gated, *weights], what.backward),
            "recurrence": alone(recurrence, [x, delta, -torch.exp(mixer.A_log), B, C], what.backward),
        }
        if what.sites and what.copies:
            parts["copies"] = lambda: [seen[name].clone() for name in what.sites]
        return parts


def forward(logits: Callable[[Tensor], Tensor]) -> Side:
    return lambda tokens: (logits(tokens), {})


def both_ways(module: nn.Module, logits: Callable[[Tensor], Tensor], layer: nn.Module) -> Side:
    """Forward and backward through ``module``; leaves the gradients of ``layer``, named alike in all of them."""

    def run(tokens: Tensor) -> tuple[Tensor, Kept]:
        module.zero_grad(set_to_none=True)
        out = logits(tokens)
        out.square().mean().backward()
        return out.detach(), {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}

    return run


def assert_same(what: Comparison, tokens: Tensor) -> None:
    """Logits within 1e-4, and whatever both sides keep: gradients by parameter, sites by name, the states."""
    (theirs, kept), (ours, own) = what.rival(tokens), what.ours(tokens)
    assert_close(ours, theirs, rtol=0, atol=TOLERANCE)
    assert set(own) >= set(what.sites)
    expected = {name: kept[name] for name in own if name in kept}
    if STATE in own:  # without use_cache=False TransformerLens' eager scan does not run, and says nothing
        expected[STATE] = kept[THEIR_STATE].transpose(1, 2)
    assert len(expected) >= (len(own) if what.backward else STATE in own)
    for name, value in expected.items():
        size = float(value.abs().max())
        assert_close({name: own[name] / size}, {name: value / size}, rtol=0, atol=TOLERANCE)


def measure(size: Size, repetitions: int) -> tuple[dict[str, Any], list[Row]]:
    """The configuration of everybody, and the rows."""
    layer, rows = Layer(size), []
    tokens = torch.randint(size.vocabulary, (1, size.length), generator=torch.Generator().manual_seed(0))
    for what in layer.comparisons():
        prompt = tokens[:, : size.length_backward] if what.backward else tokens
        with _torch_functions(layer.hugging_face), torch.set_grad_enabled(what.backward):
            assert_same(what, prompt)
            pair = medians({"rival": partial(what.rival, prompt), "ours": partial(what.ours, prompt)}, repetitions)
            parts = medians(layer.parts(prompt, what), repetitions)
            faults = page_faults(partial(what.rival, prompt)), page_faults(partial(what.ours, prompt))
        names = (what.name, what.rival_name, prompt.shape[1])
        rows.append(Row(*names, pair["rival"], pair["ours"], what.asked, parts, *faults))
    return configuration(layer, size, tokens, repetitions), rows


def configuration(layer: Layer, size: Size, tokens: Tensor, repetitions: int) -> dict[str, Any]:
    """Who was timed, how, on what, and that no subnormal number slowed anybody down."""
    seen = hooks.record(layer.ours, tokens, ["*.hook_delta", DECAY])
    smallest = float(seen[DECAY].min())
    assert smallest > torch.finfo(torch.float32).tiny
    theirs, mambapy = layer.hugging_face.config, layer.mambapy[1].config
    return {
        "layer": f"{asdict(size)}, d_inner {theirs.intermediate_size}, d_conv {theirs.conv_kernel}, batch 1, fp32",
        "weights": f"random, Δ up to {float(seen['*.hook_delta'].max()):.2g}, smallest decay {smallest:.2g}",
        "Hugging Face": f"MambaForCausalLM, eval, use_cache=False, use_mambapy={theirs.use_mambapy}, "
        f"use_associative_scan={theirs.use_associative_scan} (compiled only), no kernels: torch functions",
        "TransformerLens": "bridge over the same module, mixer.eager_scan=True, "
        "run_with_cache(tokens, use_cache=False) without a filter (keeps references)",
        "mambapy": f"pscan={mambapy.pscan}, use_cuda={mambapy.use_cuda}, between Hugging Face's embedding and read-out",
        "ours": "model(tokens); hooks.record(model, tokens, names): copies; 'cached': run_with_cache, references",
        "idle threads": f"GOMP_SPINCOUNT={os.environ.get('GOMP_SPINCOUNT', 'not set')}, for all sides alike",
        "backward": "of the mean squared logit, to every weight; gradients cleared first",
        "clock": f"medians of {repetitions}, in turns, after one round of warm-up; forward rows under no_grad",
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f} at the end (alone: at most {size.threads})",
        "versions": versions(("torch", "transformers", "transformer-lens", "mambapy", "numba", "numpy", "mambascope")),
    }


@pytest.fixture
def size() -> Iterator[Size]:
    size, before = Size(), torch.get_num_threads()
    torch.set_num_threads(size.threads)
    yield size
    torch.set_num_threads(before)


@pytest.mark.benchmark
def test_one_layer_beside_other_implementations(size: Size, request: pytest.FixtureRequest) -> None:
    start = time.perf_counter()
    described, rows = measure(size, repetitions=21)
    described["shape checks"] = "off" if request.config.getoption("--no-shape-checks") else "on, which slows ours"
    print("", *(f"{what}: {how}" for what, how in described.items()), "", HEADING, *rows, LEGEND, sep="\n")
    assert [row.asked for row in rows if row.asked is not None] == [3.5, 2.5, 12.0] and len(rows) == 8
    for row in rows:
        assert all(math.isfinite(ms) and ms > 0 for ms in (row.rival_ms, row.ours_ms, *row.parts_ms.values())), row
    print(save("layer", described, rows, time.perf_counter() - start))
