"""``run_with_cache`` of the TransformerLens idiom: filters, position slices, gradients, what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import ActivationCache

import hooks
from models.mamba import Mamba, MambaConfig

LAYER = "blocks.1.mixer."
DELTA, STATE = LAYER + "hook_delta", LAYER + "hook_state"


class Scalar(Mamba):
    """Mamba whose output is one number, as ``incl_bwd`` asks for."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs).pow(2).sum()


# --- run_with_cache ---------------------------------------------------------------------------


@pytest.mark.hygiene
@pytest.mark.parametrize("variant", ["mamba", "lti", "s4d"])
def test_an_unfiltered_cache_holds_every_site(
    make: Callable[..., Any], x: Tensor, leftovers: Callable[[Any], list[str]], variant: str
) -> None:
    model = make(variant)
    output, cache = model.run_with_cache(x)
    assert isinstance(cache, ActivationCache)
    assert list(cache.keys()) == list(model.hook_dict)
    torch.testing.assert_close(output, model(x))
    torch.testing.assert_close(dict(cache), dict(hooks.record(model, x)), rtol=0, atol=0)
    assert leftovers(model) == [] and model.is_caching is False


@pytest.mark.hygiene
@pytest.mark.parametrize(
    "names_filter",
    [DELTA, [DELTA], (DELTA,), {DELTA}, lambda name: name == DELTA, "blocks.1.mixer.hook_delt?"],
    ids=["str", "list", "tuple", "set", "predicate", "glob"],
)
def test_filters_of_every_kind(make: Callable[..., Any], x: Tensor, names_filter: Any) -> None:
    """TransformerLens refuses tuples and sets (trap 7)."""
    model = make()
    _, cache = model.run_with_cache(x, names_filter=names_filter)
    assert list(cache.keys()) == [DELTA]
    torch.testing.assert_close(cache[DELTA], hooks.record(model, x, DELTA)[DELTA])
    store = model.add_caching_hooks(names_filter=names_filter)
    model(x)
    assert list(store) == [DELTA]
    model.reset_hooks()
    filled, forward, backward = model.get_caching_hooks(names_filter, incl_bwd=True)
    assert [name for name, _ in forward] == [name for name, _ in backward] == [DELTA] and not filled
    model.run_with_hooks(x, fwd_hooks=forward)
    assert list(filled) == [DELTA]


@pytest.mark.hygiene
@pytest.mark.parametrize(
    "pattern",
    ["hook_nothing", ["hook_nothing"], [DELTA, "hook_nothing"], lambda name: False, "*.hook_q", []],
    ids=["name", "list", "one of two", "predicate", "glob", "empty"],
)
def test_trap_7_names_that_match_nothing_are_refused_by_every_call(
    make: Callable[..., Any], x: Tensor, leftovers: Callable[[Any], list[str]], pattern: Any
) -> None:
    model = make()

    def fn(value: Tensor, hook: Any) -> None:
        pytest.fail("nothing may run")

    runs = model.runs
    for call in (
        lambda: model.run_with_cache(x, names_filter=pattern),
        lambda: model.get_caching_hooks(pattern),
        lambda: model.add_caching_hooks(pattern),
        lambda: model.add_hook(pattern, fn),
        lambda: model.add_perma_hook(pattern, fn),
        lambda: model.run_with_hooks(x, fwd_hooks=[(pattern, fn)]),
        lambda: model.run_with_hooks(x, bwd_hooks=[(pattern, fn)], reset_hooks_end=False),
        lambda: model.run_with_hooks(x, fwd_hooks=[(DELTA, fn), (pattern, fn)]),
        lambda: model.run_with_cache(x, fwd_hooks=[(pattern, fn)]),
        lambda: model.hooks(fwd_hooks=[(pattern, fn)]).__enter__(),
        lambda: model.hooks(bwd_hooks=[(pattern, fn)]).__enter__(),
    ):
        with pytest.raises(hooks.UnknownSite):
            call()
        assert leftovers(model) == []
    assert model.runs == runs


SLICES: dict[str, tuple[Any, list[int]]] = {
    "int": (3, [3]),
    "negative": (-1, [10]),
    "pair": ((2, 5), [2, 3, 4]),
    "triple": ((1, 9, 3), [1, 4, 7]),
    "slice": (slice(8, None), [8, 9, 10]),
    "list": ([9, 0], [9, 0]),
    "tensor": (torch.tensor([1, 2]), [1, 2]),
    "all": (None, list(range(11))),
}


@pytest.mark.hygiene
@pytest.mark.parametrize("variant", ["mamba", "s4d"])
@pytest.mark.parametrize("given", SLICES)
def test_trap_6_positions_are_sliced_on_each_sites_own_axis(
    make: Callable[..., Any], x: Tensor, given: str, variant: str
) -> None:
    """3-D sites, 4-D sites, and sites without positions, which are kept whole."""
    model = make(variant)
    pos_slice, positions = SLICES[given]
    full = hooks.record(model, x)
    _, cache = model.run_with_cache(x, pos_slice=pos_slice)
    for name in model.hook_dict:
        whole = name.endswith("_init")
        expected = full[name] if whole else full[name][:, positions]
        torch.testing.assert_close(cache[name], expected, rtol=0, atol=0)
    assert (
        cache[STATE].shape[1] == len(positions)
        and cache[LAYER + "hook_state_init"].shape == full[LAYER + "hook_state_init"].shape
    )


@pytest.mark.hygiene
def test_the_cache_reads_after_the_hooks_of_the_same_call(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    clean, plain = model.run_with_cache(x)
    output, cache = model.run_with_cache(
        x, names_filter=[DELTA, STATE], fwd_hooks=[(DELTA, lambda value, hook: value * 2)]
    )
    torch.testing.assert_close(cache[DELTA], 2 * plain[DELTA])
    assert not torch.allclose(output, clean) and not torch.allclose(cache[STATE], plain[STATE])
    torch.testing.assert_close(output, model.run_with_hooks(x, fwd_hooks=[(DELTA, lambda value, hook: value * 2)]))


@pytest.mark.hygiene
def test_gradients_in_the_cache(make: Callable[..., Any], x: Tensor, leftovers: Callable[[Any], list[str]]) -> None:
    model = Scalar(MambaConfig(d_model=8, n_layers=2, d_state=4, d_in=5)).double()
    names = [DELTA, STATE, LAYER + "hook_B"]
    output, cache = model.run_with_cache(x, names_filter=names, incl_bwd=True, pos_slice=(2, 6))
    assert output.ndim == 0 and set(cache.keys()) == {*names, *(f"{name}_grad" for name in names)}
    found = hooks.record(model, x, names, grad=True)
    expected = torch.autograd.grad(found.output, [found[name] for name in names])
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(cache[f"{name}_grad"], gradient[:, 2:6])
    assert leftovers(model) == []
    with pytest.raises(hooks.DidNotFire, match="gradient"):
        model.run_with_cache(x, names_filter=[DELTA, LAYER + "hook_state_init"], incl_bwd=True)
    assert leftovers(model) == []
    _, everything = model.run_with_cache(x, incl_bwd=True)
    assert f"{LAYER}hook_decay_grad" in everything and f"{LAYER}hook_state_init_grad" not in everything


@pytest.mark.hygiene
def test_batch_dimension_device_and_keywords(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    full = hooks.record(model, x[:1])
    _, cache = model.run_with_cache(x[:1], remove_batch_dim=True, device="cpu")
    assert not cache.has_batch_dim
    for name in model.hook_dict:
        torch.testing.assert_close(cache[name], full[name][0])
    with pytest.raises(hooks.BadArgument, match="one prompt"):
        model.run_with_cache(x, remove_batch_dim=True)
    (output, state), cache = model.run_with_cache(x=x, names_filter=DELTA, return_state=True)
    assert output.shape == (4, 11, 2) and len(state) == 2
    with pytest.raises(hooks.TooLarge, match="max_memory"):
        model.run_with_cache(x, max_memory=10_000)
    model.run_with_cache(x, names_filter=DELTA, max_memory=10_000)


@pytest.mark.hygiene
def test_stop_at_layer(make: Callable[..., Any], x: Tensor, leftovers: Callable[[Any], list[str]]) -> None:
    model = make(n_layers=3)
    found = hooks.record(model, x, "*.hook_resid_pre")
    for stop in (0, 1, 2, -1, -3):
        output, cache = model.run_with_cache(x, stop_at_layer=stop)
        torch.testing.assert_close(output, found[f"blocks.{stop % 3}.hook_resid_pre"])
        assert "head.hook_out" not in cache
    with pytest.raises(hooks.DidNotFire, match=r"blocks\.2.*stop_at_layer=1"):
        model.run_with_cache(x, names_filter="blocks.2.mixer.hook_delta", stop_at_layer=1)
    with pytest.raises(hooks.DidNotFire, match="stop_at_layer=1"):
        model.run_with_hooks(x, fwd_hooks=[("blocks.2.mixer.hook_delta", lambda v, hook: v)], stop_at_layer=1)
    with pytest.raises(hooks.BadArgument, match="3 layers"):
        model(x, stop_at_layer=4)
    assert leftovers(model) == []


@pytest.mark.hygiene
def test_helpers_of_the_activation_cache(make: Callable[..., Any], x: Tensor) -> None:
    model = make(n_layers=3)
    output, cache = model.run_with_cache(x)
    full = hooks.record(model, x)
    torch.testing.assert_close(cache["delta", 1, "mixer"], full["blocks.1.mixer.hook_delta"])
    torch.testing.assert_close(cache["state", -1, "mixer"], full["blocks.2.mixer.hook_state"])
    torch.testing.assert_close(cache["resid_post", 0], full["blocks.0.hook_resid_post"])
    torch.testing.assert_close(cache["scale", 1, "norm"], full["blocks.1.norm.hook_scale"])
    torch.testing.assert_close(cache["embed"], full["hook_embed"])
    residuals, labels = cache.accumulated_resid(return_labels=True)
    assert labels == ["0_pre", "1_pre", "2_pre", "final_post"]
    torch.testing.assert_close(residuals[:3], full.stack("*.hook_resid_pre"))
    torch.testing.assert_close(residuals[3], full["blocks.2.hook_resid_post"])
    torch.testing.assert_close(cache.stack_activation("delta", sublayer_type="mixer"), full.stack("*.hook_delta"))
    torch.testing.assert_close(cache.accumulated_resid(layer=1, pos_slice=3), full.stack("*.hook_resid_pre")[:2, :, 3])
    logits = model.head.linear(
        residuals[3] / residuals[3].pow(2).mean(-1, keepdim=True).add(1e-5).sqrt() * model.ln_final.weight
    )
    torch.testing.assert_close(logits, output, msg="a logit lens at the last layer is the output")
    two = cache.apply_slice_to_batch_dim(slice(0, 2))
    torch.testing.assert_close(two[STATE], full[STATE][:2])
