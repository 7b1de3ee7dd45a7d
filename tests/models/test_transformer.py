"""The softmax transformer: the function that it computes, its bridge, its refusals, checkpoints and copies."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import hooks
import models
from hooks.errors import BadArgument
from models import checkpoint
from models.plain import tensors_of
from models.transformer import boot, tidy
from tests.small_transformer import bare_bridge, left_on, small
from tests.tolerances import assert_matches

Z, PATTERN, SCORES = "blocks.1.attn.hook_z", "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_attn_scores"


@pytest.fixture(scope="module")
def built() -> Any:
    return small()


@pytest.fixture
def model(built: Any) -> Iterator[Any]:
    """One model for all tests that leave it as it was, which is checked."""
    yield built
    assert not left_on(built) and built.context_level == 0


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 11, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_hand(model: Any, x: Tensor) -> dict[str, Tensor]:
    """The same function written out from the weights, one head and one query at a time."""
    w = {name: value.detach() for name, value in model.state_dict().items()}
    cfg, width = model.cfg, model.cfg.d_model // model.cfg.n_heads

    def linear(name: str, r: Tensor) -> Tensor:
        return torch.einsum("oi,bpi->bpo", w[f"{name}.weight"], r) + w[f"{name}.bias"]

    def norm(name: str, r: Tensor) -> Tensor:
        variance = r.var(-1, keepdim=True, unbiased=False)
        return (r - r.mean(-1, keepdim=True)) / (variance + cfg.norm_eps).sqrt() * w[f"{name}.weight"] + w[
            f"{name}.bias"
        ]

    seen: dict[str, Tensor] = {}
    r = linear("embed.linear", x)
    for i in range(cfg.n_layers):
        block = f"blocks.{i}"
        seen[f"{block}.hook_resid_pre"] = r
        normed = norm(f"{block}.ln1", r)
        q, k, v = (linear(f"{block}.attn.{name}", normed) for name in "qkv")
        z, pattern = torch.zeros_like(q), x.new_zeros(len(x), cfg.n_heads, x.shape[1], x.shape[1])
        for head in range(cfg.n_heads):
            at = slice(head * width, (head + 1) * width)
            for t in range(x.shape[1]):
                scores = (k[:, : t + 1, at] * q[:, t : t + 1, at]).sum(-1) / math.sqrt(width)
                weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
                pattern[:, head, t, : t + 1] = weights
                z[:, t, at] = (weights[..., None] * v[:, : t + 1, at]).sum(1)
        seen[f"{block}.attn.hook_pattern"] = pattern
        r = r + linear(f"{block}.attn.o", z)
        hidden = linear(f"{block}.mlp.in", norm(f"{block}.ln2", r))
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        seen[f"{block}.mlp.hook_post"] = hidden
        r = r + linear(f"{block}.mlp.out", hidden)
        seen[f"{block}.hook_resid_post"] = r
    seen["head.hook_out"] = linear("head.linear", norm("ln_final", r))
    return seen


@pytest.mark.parity
@pytest.mark.parametrize("length", [1, 2, 11, 32])
def test_it_is_the_function_that_its_weights_say(model: Any, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(3, length, 5, dtype=torch.float64, generator=generator)
    record, expected = hooks.record(model, x), by_hand(model, x)
    for name, value in expected.items():
        assert_matches(record[name], value, name)
    assert_matches(model(x), expected["head.hook_out"])
    assert_matches(copy.deepcopy(model).float()(x.float()), expected["head.hook_out"])


@pytest.mark.parity
def test_the_root_runs_the_bridge_and_nothing_else(model: Any, x: Tensor) -> None:
    """Also with TransformerLens' own attention in place, so ours is the same function."""
    r = hooks.record(model, x, "hook_embed")["hook_embed"]
    expected = model(x, stop_at_layer=2)
    assert_close(model.bridge.original_model.layers[1](model.bridge.original_model.layers[0](r)[0])[0], expected)
    native = small_native(model)
    through = native(inputs_embeds=r)
    assert_close(through, native.head(native.ln_out(expected)))
    assert not torch.allclose(through, native(inputs_embeds=r.flip(1)).flip(1))


def small_native(model: Any) -> Any:
    """TransformerLens' own ``NativeModel``, never bridged, with the weights of ``model`` and zero positions."""
    from transformer_lens.model_bridge.sources.native import NativeModel

    native = NativeModel(copy.deepcopy(model.bridge.cfg)).double()
    torch.nn.init.zeros_(native.pos.weight)
    weights = {name.replace("ln_final", "ln_out"): value for name, value in model.state_dict().items()}
    weights = {name.replace("blocks.", "layers."): value for name, value in weights.items()}
    weights = {name.replace("mlp.in", "mlp.fc_in").replace("mlp.out", "mlp.fc_out"): v for name, v in weights.items()}
    given = {name: value for name, value in weights.items() if name.startswith(("layers", "ln_out"))}
    outcome = native.load_state_dict(given, strict=False)
    assert sorted(outcome.missing_keys) == ["head.weight", "pos.weight", "tok_embed.weight"]
    return native


@pytest.mark.law
def test_no_position_sees_what_comes_after_it_even_when_the_scores_are_edited(model: Any, x: Tensor) -> None:
    other = x.clone()
    other[:, 6:] = torch.randn_like(other[:, 6:])
    for edits in (None, {SCORES: hooks.zero()}, {SCORES: hooks.scale(3.0, pos=[2])}):
        first, second = (edited(model, tokens, edits) for tokens in (x, other))
        assert_close(first[:, :6], second[:, :6], rtol=0, atol=1e-13)
        assert not torch.allclose(first[:, 6:], second[:, 6:])


def edited(model: Any, x: Tensor, edits: dict[str, Any] | None) -> Tensor:
    if edits is None:
        return model(x)
    with hooks.edit(model, edits):
        return model(x)


@pytest.mark.law
def test_positions_do_not_exist(x: Tensor) -> None:
    """One layer: the last prediction does not depend on the order of the context. Two layers: it does, by the mask."""
    shuffled = torch.cat([x[:, torch.randperm(10, generator=torch.Generator().manual_seed(0))], x[:, 10:]], 1)
    one, two = small(n_layers=1), small(n_layers=2)
    assert_close(one(x)[:, -1], one(shuffled)[:, -1], rtol=0, atol=1e-12)
    assert not torch.allclose(two(x)[:, -1], two(shuffled)[:, -1])
    positions = dict(two.bridge.pos_embed.named_parameters())
    assert positions and all(not p.requires_grad and not p.any() for p in positions.values())
    assert not any("pos" in name for name, _ in two.named_parameters())


@pytest.mark.contract
def test_a_bare_bridge_has_the_same_names_and_the_same_points_fire(model: Any) -> None:
    bare = bare_bridge()
    for name in model.hook_dict:
        if name not in ("hook_embed", "head.hook_out"):
            assert name in bare.hook_dict, name
            assert model.hook_dict[name] is model.bridge.hook_dict[name]
    for other, name in model.aliases.items():
        assert model.bridge.hook_dict[other] is model.hook_dict[name] and other not in model.hook_dict
    fired: list[str] = []
    for point in {id(p): p for p in bare.hook_dict.values()}.values():
        point.add_hook(lambda value, hook: fired.append(hook.name))
    bare.original_model(inputs_embeds=torch.randn(1, 3, 12))
    outside = {"pos_embed.hook_in", "pos_embed.hook_out", "unembed.hook_in", "unembed.hook_out"}
    ours = [model.hook_dict[name].name for name in model.hook_dict][1:-1]
    assert set(fired) - outside == set(ours) and len(ours) == len(set(ours))
    late = "attn.hook_attn_scores"  # TransformerLens' own attention fires it when the output has been computed

    def order(names: list[str]) -> list[str]:
        return [name for name in names if name not in outside and not name.endswith(late)]

    assert order(fired) == order(ours)


@pytest.mark.law
def test_gradients_reach_every_site_and_every_weight(x: Tensor) -> None:
    model = small()
    seen: dict[str, Tensor] = {}

    def keep(gradient: Tensor, hook: Any) -> None:
        seen[hook.name] = gradient

    with model.hooks(bwd_hooks=[("*", keep)]):
        model(x.requires_grad_()).pow(2).sum().backward()
    record = hooks.record(model, x)
    assert set(seen) == set(model.hook_dict)
    assert all(seen[name].shape == record[name].shape and seen[name].any() for name in seen)
    without = [name for name, weight in model.named_parameters() if weight.grad is None]
    assert without == []
    # A softmax does not change with a shift of its scores, so the gradient of the keys' bias is zero.
    assert {tidy(n).split(".", 2)[-1] for n, w in model.named_parameters() if w.grad.abs().max() < 1e-12} == {
        "attn.k.bias"
    }


@pytest.mark.contract
def test_start_and_stop(x: Tensor) -> None:
    model = small(n_layers=3)
    record = hooks.record(model, x)
    for layer in (0, 1, 2, -1):
        r = model(x, stop_at_layer=layer)
        assert_close(r, record[f"blocks.{layer % 3}.hook_resid_pre"], rtol=0, atol=0)
        assert_close(model(r, start_at_layer=layer), model(x), rtol=0, atol=0)
    kept = r.clone()
    model.run_with_hooks(r, start_at_layer=2, fwd_hooks=[("blocks.2.hook_resid_pre", lambda v, hook: v.zero_())])
    assert_close(r, kept, rtol=0, atol=0)


@pytest.mark.contract
def test_refusals(x: Tensor) -> None:
    model = small()
    assert model(torch.randn(1, 32, 5, dtype=x.dtype)).shape == (1, 32, 2)
    with pytest.raises(BadArgument, match="33 tokens and n_ctx is 32"):
        model(torch.randn(1, 33, 5, dtype=x.dtype))
    assert not hasattr(model, "step")
    for given in ({"return_state": True}, {"state": [models.LayerState(None, torch.zeros(4, 1, 1))] * 2}):
        with pytest.raises(BadArgument, match="no recurrent state"):
            model(x, **given)
    for config in ({"n_heads": 5}, {"d_mlp": 0}, {"n_ctx": 0}):
        with pytest.raises(BadArgument):
            models.build("transformer", **{"d_model": 12, "n_layers": 1, **config})
    assert models.TransformerConfig().n_ctx == 512 and models.TransformerConfig(d_model=40).mlp_width == 160


@pytest.mark.contract
def test_a_checkpoint_is_the_same_model(tmp_path: Path, x: Tensor) -> None:
    model = small()
    names = list(tensors_of(model))
    assert "blocks.0.attn.q.weight" in names and "blocks.1.mlp.in.bias" in names and "ln_final.weight" in names
    assert not any("_original_component" in name or "mask" in name or "pos" in name for name in names)
    assert sum(v.numel() for v in tensors_of(model).values()) == sum(p.numel() for p in model.parameters())
    checkpoint.save(model, tmp_path / "t.safetensors", {"task": "none"})
    loaded = models.load(tmp_path / "t.safetensors")
    assert_close(loaded(x), model(x), rtol=0, atol=0)
    assert checkpoint.digest(loaded) == checkpoint.digest(model) and models.load(loaded) is loaded
    other = small(seed=3)
    other.load_state_dict(model.state_dict())
    assert_close(other(x), model(x), rtol=0, atol=0)
    weights = model.state_dict()
    weights["blocks.0.attn.w.weight"] = weights.pop("blocks.0.attn.q.weight")
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*attn.*q.*Unexpected.*attn.w.weight"):
        other.load_state_dict(weights)


@pytest.mark.hygiene
def test_a_copy_stands_on_its_own(x: Tensor) -> None:
    model = small()
    clean = model(x)
    twin = copy.deepcopy(model)
    with hooks.edit(twin, {PATTERN: hooks.zero()}):
        assert_close(model(x), clean, rtol=0, atol=0)
        assert not torch.allclose(twin(x), clean)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert twin.bridge.blocks is twin.blocks and twin.hook_dict[Z] is twin.bridge.hook_dict[Z]
    del model
    assert_close(twin(x), clean, rtol=0, atol=0)


@pytest.mark.contract
def test_language_model_and_classification_heads() -> None:
    tokens = torch.randint(7, (2, 6), generator=torch.Generator().manual_seed(0))
    lm = small(head="lm", d_out=7, tie_embeddings=True)
    assert lm(tokens).shape == (2, 6, 7) and lm.head.linear.weight is lm.embed.table.weight
    classes = small(head="classification", d_out=3)
    assert classes(torch.randn(2, 6, 5, dtype=torch.float64)).shape == (2, 6, 3)


@pytest.mark.contract
def test_initial_weights_are_gpt2_s_and_the_global_seed_s() -> None:
    def digest(seed: int) -> str:
        torch.manual_seed(seed)
        return checkpoint.digest(models.build("transformer", d_model=8, n_layers=1, n_heads=2))

    assert digest(1) == digest(1) != digest(2)
    torch.manual_seed(0)
    attention = boot(models.TransformerConfig(d_model=128, n_layers=8, n_heads=4)).blocks[3].attn
    # Standard deviations over 16 384 draws: the estimate is within 2 % with a probability of 1 - 3e-4.
    assert abs(attention.q.weight.std().item() / (0.8 / 128**0.5) - 1) < 0.02
    assert abs(attention.o.weight.std().item() / (0.8 / 128**0.5 / 4) - 1) < 0.02
    assert not attention.q.bias.any()


@pytest.mark.law
def test_training_lowers_the_loss() -> None:
    """Copying the previous token needs attention: without it (zero pattern) the loss stays."""

    def trained(edits: dict[str, Any] | None) -> list[float]:
        torch.manual_seed(0)
        model = models.build("transformer", d_model=16, n_layers=1, n_heads=2, d_in=2, d_out=2)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        losses = []
        for _ in range(60):
            x = torch.randn(16, 6, 2)
            running = x.cumsum(1) / torch.arange(1, 7)[:, None]
            loss = (edited(model, x, edits) - running).pow(2)[:, 3:].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    learned, blind = trained(None), trained({"*.hook_pattern": partial(torch.mul, 0)})
    assert sum(learned[-10:]) < 0.3 * sum(learned[:10])
    assert sum(learned[-10:]) < 0.5 * sum(blind[-10:])


@pytest.mark.hygiene
def test_what_pickle_is_told_makes_the_same_model() -> None:
    """pickle and torch.save ask a model what to call, with which arguments; nothing is unpickled here."""
    model = models.build("transformer", d_model=8, n_layers=2, n_heads=2, d_in=3).to(torch.float64).eval()
    model.card = {"task": "linreg"}
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    make, given = model.__reduce_ex__(2)
    again = make(*given)
    assert torch.equal(again(x), model(x)) and again.card == model.card and not again.training
    plain = (str, int, float, bool, type(None), torch.Tensor, type(model.cfg), dict)
    assert all(isinstance(part, plain) for part in given)
    assert all(isinstance(part, torch.Tensor) for part in given[1].values())
    with hooks.edit(model, {"head.hook_out": hooks.zero()}):
        assert not model(x).any()
        with pytest.raises(BadArgument, match="cannot be pickled"):
            model.__reduce_ex__(2)


@pytest.mark.hygiene
def test_a_deep_copy_keeps_its_hooks_and_shares_no_weight() -> None:
    model = models.build("transformer", d_model=8, n_layers=1, n_heads=2, d_in=3)
    seen: list[str] = []
    model.add_hook("blocks.0.hook_resid_post", lambda value, hook: seen.append(hook.name))
    again = copy.deepcopy(model)
    again(torch.randn(1, 4, 3))
    assert seen == ["blocks.0.hook_resid_post"]
    with torch.no_grad():
        again.head.linear.weight.zero_()
    assert bool(model.head.linear.weight.any())
