"""The four facts for which this toolkit owns its model code, each as a regression test."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import hooks

LAYER = "blocks.1.mixer."


@pytest.mark.edit
@pytest.mark.parametrize("name", ["conv1d", "dt_proj", "x_proj", "in_proj", "out_proj"])
def test_fact_1_hooks_on_our_submodules_fire(make: Callable[..., Any], x: Tensor, name: str) -> None:
    """Reads, and edits that reach the output."""
    model = make()
    clean, seen = model(x), []
    module = getattr(model.blocks[1].mixer, name)
    reading = module.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    torch.testing.assert_close(model(x), clean)
    assert seen == [(4, 11, {"conv1d": 16, "dt_proj": 16, "x_proj": 9, "in_proj": 32, "out_proj": 8}[name])]
    reading.remove()
    editing = module.register_forward_hook(lambda module, args, out: out * 0)
    assert not torch.allclose(model(x), clean)
    editing.remove()
    torch.testing.assert_close(model(x), clean)


@pytest.mark.parity
def test_fact_1_hooks_on_hugging_faces_do_not() -> None:
    """Why ours are modules that are called: there an ablation changes nothing and raises nothing."""
    from transformers import MambaConfig, MambaModel

    config = MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, vocab_size=11)
    model, tokens = MambaModel(config).eval(), torch.randint(11, (2, 7))
    with torch.no_grad():
        clean = model(tokens).last_hidden_state
        silent = []
        for name in ("conv1d", "dt_proj", "in_proj"):
            seen: list[int] = []

            def ablate(module: Any, args: Any, out: Tensor, seen: list[int] = seen) -> Tensor:
                seen.append(1)
                return out * 0

            handle = getattr(model.layers[1].mixer, name).register_forward_hook(ablate)
            same = torch.equal(model(tokens).last_hidden_state, clean)
            handle.remove()
            assert same == (not seen)
            silent += [name] if not seen else []
    assert silent == ["conv1d", "dt_proj"], "in_proj shows that a hook there can fire"


@pytest.mark.edit
def test_fact_2_the_time_step_is_after_the_softplus(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    with hooks.edit(model, {LAYER + "hook_delta": hooks.zero()}):
        zeroed = hooks.record(model, x, LAYER + "*")
    with hooks.edit(model, {LAYER + "hook_delta_pre": hooks.zero()}):
        before = hooks.record(model, x, LAYER + "*")
    assert not zeroed[LAYER + "hook_delta_decay"].any() and not zeroed[LAYER + "hook_delta_write"].any()
    assert not zeroed[LAYER + "hook_state"].any()
    for role in ("", "_decay", "_write"):
        value = before[f"{LAYER}hook_delta{role}"]
        torch.testing.assert_close(value, torch.full_like(value, math.log(2)))
    assert bool(before[LAYER + "hook_state"].any())


@pytest.mark.edit
def test_fact_3_a_patched_state_reaches_later_positions(make: Callable[..., Any], x: Tensor) -> None:
    """Patch h_3 of another prompt: h_4 is ā_4 h_3 + w_4 of the patched h_3, and the outputs after it change."""
    model = make()
    other = hooks.record(model, torch.randn_like(x), LAYER + "hook_state")
    clean = hooks.record(model, x)
    with hooks.edit(model, {LAYER + "hook_state": hooks.resample(source=other, pos=3)}):
        found = hooks.record(model, x, LAYER + "*")
    patched = found[LAYER + "hook_state"]
    torch.testing.assert_close(patched[:, 3], other[LAYER + "hook_state"][:, 3])
    step = clean[LAYER + "hook_decay"][:, 4] * patched[:, 3] + clean[LAYER + "hook_write"][:, 4]
    torch.testing.assert_close(patched[:, 4], step)
    changed = (found.output - clean.output).abs().amax((0, 2))
    assert bool((changed[:3] < 1e-12).all()) and bool((changed[3:] > 1e-6).all())
    # What other tools do: stack the states, then patch. Only the read-out of that position changes.
    with hooks.edit(model, {LAYER + "hook_state": hooks.resample(source=other, pos=3)}, readout_only=True):
        readout = hooks.record(model, x, LAYER + "hook_y")[LAYER + "hook_y"]
    changed = (readout - clean[LAYER + "hook_y"]).abs().amax((0, 2))
    assert bool(changed[3] > 1e-6) and bool((changed[4:] < 1e-12).all())


class Largest(TorchDispatchMode):
    """Remembers the number of entries of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, tuple | list) else (out,)
        self.numel = max([self.numel, *(t.numel() for t in tensors if isinstance(t, Tensor))])
        return out


@pytest.mark.edit
@pytest.mark.parametrize("variant", ["mamba", "lti"])
def test_fact_4_state_memory_grows_linearly(make: Callable[..., Any], variant: str) -> None:
    """No (pos, pos) tensor: reading or editing a state costs batch · pos · d_inner · d_state, and where nobody looks
    at a state Mamba forms nothing of that size.
    """
    model, unwatched = make(variant), []
    for length in (300, 600):  # the twin convolves shorter prompts as a matrix product
        x = torch.randn(1, length, 5, dtype=torch.float64)
        full = length * 16 * 4
        with torch.no_grad(), Largest() as seen:
            model(x)
        unwatched.append(seen.numel)
        with Largest() as seen:
            hooks.record(model, x, LAYER + "hook_state")
        assert variant == "lti" or seen.numel == full
        with torch.no_grad(), Largest() as seen, hooks.edit(model, hooks.do_state(1, [3], 0.0)):
            model(x)
        assert full <= seen.numel <= 1.1 * full
    assert unwatched[1] <= 2.1 * unwatched[0]
    assert variant == "lti" or unwatched[1] < full
