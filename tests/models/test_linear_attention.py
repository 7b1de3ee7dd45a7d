"""The linear transformer: both paths against plain sums over tokens, its sites, its state, edits that propagate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

import hooks
import models
from hooks.errors import BadArgument
from models.linear_attention import NORM_LEAST, TILE

VARIANTS: dict[str, dict[str, Any]] = {
    "elu, normalised": {},
    "elu": {"normalise": False},
    "identity": {"feature": "identity", "normalise": False},
    "identity, normalised": {"feature": "identity"},
    "one head": {"n_heads": 1},
    "few features": {"d_state": 3},
    "no MLP": {"d_mlp": 0},
    "convolution": {"d_conv": 3},
}
MIXER = "blocks.1.mixer."


def small(dtype: torch.dtype = torch.float64, **config: Any) -> Any:
    torch.manual_seed(0)
    shape = {"d_model": 8, "n_layers": 2, "n_heads": 2, "d_mlp": 12, "d_in": 3, "d_out": 2, **config}
    return models.build("linear_attention", **shape).to(dtype).eval()


def prompts(length: int, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, length, 3, generator=torch.Generator().manual_seed(length), dtype=dtype)


def exposed(model: Any, x: Tensor) -> Tensor:
    with hooks.expose(model):
        return model(x)


def by_sums(model: Any, layer: int, r: Tensor) -> Tensor:
    """The mixer's output at every position as sums over source tokens, head by head."""
    cfg, mixer = model.cfg, model.blocks[layer].mixer
    if cfg.d_conv > 1:
        padded = F.pad(r, (0, 0, cfg.d_conv - 1, 0))
        weight = mixer.conv1d.weight[:, 0]
        r = sum(padded[:, k : k + r.shape[1]] * weight[:, k] for k in range(cfg.d_conv)) + mixer.conv1d.bias
    v, k, q = mixer.v_proj(r), mixer.k_proj(r), mixer.q_proj(r)
    if cfg.feature == "elu":
        k, q = (torch.where(z > 0, z + 1, z.exp()) for z in (k, q))
    width, n = cfg.d_model // cfg.n_heads, cfg.features
    out = torch.zeros_like(v)
    for head in range(cfg.n_heads):
        mine, keys = slice(head * width, (head + 1) * width), slice(head * n, (head + 1) * n)
        for t in range(r.shape[1]):
            weights = torch.stack([(q[:, t, keys] * k[:, s, keys]).sum(-1) / n for s in range(t + 1)], dim=1)
            read = (weights[..., None] * v[:, : t + 1, mine]).sum(1)
            if cfg.normalise:
                total = weights.sum(1, keepdim=True)
                read = read / torch.where(total.abs() < NORM_LEAST, total.sign() * NORM_LEAST, total)
            out[:, t, mine] = read
    return out @ mixer.out_proj.weight.T


@pytest.mark.definition
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [1, 2, 13])
def test_the_mixer_is_a_sum_over_source_tokens(variant: str, length: int) -> None:
    model, x = small(**VARIANTS[variant]), prompts(length)
    record = hooks.record(model, x, ["blocks.1.norm.hook_normalized", f"{MIXER}hook_out"])
    with torch.no_grad():
        expected = by_sums(model, 1, record["blocks.1.norm.hook_normalized"] * model.blocks[1].norm.weight)
    assert_close(record[f"{MIXER}hook_out"], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.definition
@pytest.mark.parametrize("variant", VARIANTS)
def test_both_paths_are_one_function_over_several_tiles(variant: str) -> None:
    model, x = small(**VARIANTS[variant]), prompts(2 * TILE + 5)
    fused, token_by_token = gradients(model, model, x), gradients(model, lambda x: exposed(model, x), x)
    for name, value in fused.items():
        assert_close(token_by_token[name], value, rtol=1e-8, atol=1e-9, msg=name)


def gradients(model: Any, run: Any, x: Tensor) -> dict[str, Tensor]:
    """The output of ``run(x)`` and the gradients of its squares' sum."""
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    out = run(x)
    out.square().sum().backward()
    return {"out": out.detach(), "x": x.grad} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.definition
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cut", [1, 2, 7, TILE])
def test_chunks_and_steps_equal_the_whole(variant: str, cut: int) -> None:
    model, x = small(**VARIANTS[variant]), prompts(TILE + 6)
    whole, last = model(x, return_state=True)
    first, state = model(x[:, :cut], return_state=True)
    rest, end = model(x[:, cut:], state=state, return_state=True)
    assert_close(torch.cat([first, rest], 1), whole, rtol=1e-10, atol=1e-11)
    for one, two in zip(last, end, strict=True):
        assert_close(one.h, two.h, rtol=1e-10, atol=1e-11)
    out, _ = model.step(x[:, cut], state)
    assert_close(out, whole[:, cut], rtol=1e-10, atol=1e-11)


@pytest.mark.hygiene
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_site_fires_in_its_order_and_shape(variant: str) -> None:
    model, x = small(**VARIANTS[variant]), prompts(5)
    record = hooks.record(model, x)
    assert list(record) == list(model.hook_dict)
    for site in hooks.sites(model):
        shape = tuple(record[site.name].shape)
        assert len(shape) == len(site.axes), site
        assert all(size in (None, found) for size, found in zip(site.shape, shape, strict=True)), site
    assert ("head" in {axis for site in hooks.sites(model) for axis in site.axes}) == (
        model.cfg.n_heads > 1 or model.cfg.normalise
    )
    assert "hook_B" in hooks.show(model, x)


@pytest.mark.law
@pytest.mark.parametrize("variant", ["elu, normalised", "identity", "one head"])
def test_the_state_forgets_nothing_and_reads_out_linearly(variant: str) -> None:
    model, x = small(**VARIANTS[variant]), prompts(9)
    record = hooks.record(model, x, f"{MIXER}*")
    assert bool((record[f"{MIXER}hook_decay"] == 1).all())
    states = record[f"{MIXER}hook_state"]
    assert_close(states, record[f"{MIXER}hook_write"].cumsum(1), rtol=1e-12, atol=1e-13)
    mixer = model.blocks[1].mixer
    assert_close(mixer.read(states, record[f"{MIXER}hook_C"]), record[f"{MIXER}hook_y"], rtol=1e-10, atol=1e-12)


@pytest.mark.edit
@pytest.mark.parametrize("variant", ["elu, normalised", "identity"])
def test_a_frozen_token_is_as_if_it_had_not_been_written(variant: str) -> None:
    """In the last layer nothing but the frozen token's own read-out and later read-outs can change."""
    model, x = small(**VARIANTS[variant]), prompts(6)
    site = f"{MIXER}hook_state"
    with hooks.edit(model, {site: hooks.freeze(pos=[2])}):
        frozen = model(x)
    with hooks.edit(model, {f"{MIXER}hook_write": hooks.zero(pos=[2])}):
        unwritten = model(x)
    assert_close(frozen, unwritten, rtol=1e-12, atol=1e-13)
    assert_close(frozen[:, :2], model(x)[:, :2], rtol=1e-12, atol=1e-13)
    assert not torch.allclose(frozen[:, 3:], model(x)[:, 3:])


@pytest.mark.edit
def test_the_three_idioms_agree() -> None:
    model, x = small(), prompts(6)
    site = "blocks.0.mixer.hook_B"
    with hooks.edit(model, {site: hooks.scale(0.5)}):
        ours = model(x)
    theirs = model.run_with_hooks(x, fwd_hooks=[(site, lambda B, hook: B * 0.5)])
    traced = hooks.nnsight(model)
    with traced.trace(x):
        traced.blocks[0].mixer.hook_B.output = traced.blocks[0].mixer.hook_B.output * 0.5
        nnsights = traced.output.save()
    assert torch.equal(ours, theirs) and torch.equal(ours, nnsights)


@pytest.mark.law
def test_the_past_alone_matters() -> None:
    model, x = small(), prompts(8)
    changed = x.clone()
    changed[:, 5:] += 1
    out, other = model(x), model(changed)
    assert_close(out[:, :5], other[:, :5], rtol=1e-12, atol=1e-13)
    assert not torch.allclose(out[:, 5:], other[:, 5:])


@pytest.mark.law
def test_one_layer_does_not_see_the_order_of_the_context() -> None:
    model, x = small(n_layers=1), prompts(8)
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4, 7])
    assert_close(model(x)[:, -1], model(x[:, order])[:, -1], rtol=1e-10, atol=1e-12)
    conv = small(n_layers=1, d_conv=2)
    assert not torch.allclose(conv(x)[:, -1], conv(x[:, order])[:, -1])


@pytest.mark.contract
def test_a_checkpoint_comes_back(tmp_path: Any) -> None:
    model, x = small(torch.float32), prompts(5, dtype=torch.float32)
    models.save(model, tmp_path / "model.safetensors", {"task": "linreg"})
    assert torch.equal(models.load(tmp_path)(x), model(x))


@pytest.mark.contract
@pytest.mark.parametrize(
    "config, reason",
    [
        ({"n_heads": 3}, "d_model=8 cannot be shared equally by n_heads=3"),
        ({"feature": "relu"}, 'feature="relu": there is identity, elu'),
        ({"d_mlp": -1}, "d_mlp=-1"),
        ({"d_state": 0}, "d_state=0"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadArgument, match=reason.replace("(", r"\(")):
        small(**config)
