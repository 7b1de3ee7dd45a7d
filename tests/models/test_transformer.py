"""The softmax transformer: its function, TransformerLens' names and points, and every verb of hooks on them."""

# ruff: noqa: SIM117  (nnsight runs the body of a ``with`` itself)

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import hooks
import models
from hooks.edit import derangement
from hooks.errors import BadArgument, DidNotFire, NonFinite, TooLarge, UnknownSite
from hooks.memory import site_bytes
from models import checkpoint
from models.transformer import POINTS, boot, tidy
from tests.tolerances import assert_matches

Z, PATTERN, SCORES = "blocks.1.attn.hook_z", "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_attn_scores"


RESID = "blocks.0.hook_resid_post"


def small(dtype: torch.dtype = torch.float64, seed: int = 0, **config: Any) -> Any:
    """A small transformer with noise on every weight, so that norms and biases count too."""
    torch.manual_seed(seed)
    fields = {"d_model": 12, "n_layers": 2, "n_heads": 3, "d_mlp": 20, "d_in": 5, "d_out": 2, "n_ctx": 32, **config}
    model = models.build("transformer", **fields).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def built() -> Any:
    return small()


@pytest.fixture
def model(built: Any) -> Iterator[Any]:
    """One model for all tests that leave it as it was, which is checked."""
    yield built
    left = [
        name
        for name, part in built.named_modules()
        for table in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "fwd_hooks", "bwd_hooks")
        if part.__dict__.get(table)
    ]
    assert not left and built.context_level == 0


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


def bare_bridge() -> Any:
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge.sources.native import boot as boot_native

    return boot_native(
        TransformerBridgeConfig(
            d_model=12, d_head=4, n_heads=3, n_layers=2, n_ctx=32, d_vocab=1, d_mlp=20, act_fn="gelu", eps=1e-5
        )
    )


@pytest.mark.hygiene
def test_every_site_fires_in_the_listed_order_and_is_told_its_listed_name(model: Any, x: Tensor) -> None:
    fired: list[str] = []
    model.run_with_hooks(x, fwd_hooks=[("*", lambda value, hook: fired.append(hook.name))])
    assert fired == list(model.hook_dict) == hooks.sites(model).names
    assert len(fired) == 2 + 2 * len(POINTS) + 4


@pytest.mark.hygiene
def test_setup_was_never_run_over_the_bridge() -> None:
    model = small()
    own = {name: point.name for name, point in model.bridge.hook_dict.items()}
    assert own == {name: point.name for name, point in bare_bridge().hook_dict.items()}
    assert own[Z] == "blocks.1.attn.o.hook_in"
    broken = copy.deepcopy(model)
    broken.setup()
    assert Z not in broken.hook_dict
    assert broken.bridge.hook_dict[Z].name == ("blocks.1._original_component.attn._original_component.o.hook_in")


@pytest.mark.contract
def test_the_table_gives_the_axes_of_every_site(model: Any, x: Tensor) -> None:
    record = hooks.record(model, x)
    sizes = {"batch": 4, "pos": 11, "pos_k": 11, "1": 1, **model.axis_sizes()}
    for site in hooks.sites(model):
        assert site.equation and tuple(record[site.name].shape) == tuple(sizes[axis] for axis in site.axes), site.name
        assert site.shape == tuple(None if axis in ("batch", "pos", "pos_k") else sizes[axis] for axis in site.axes)
        assert model.hook_dict[site.name].pos_dim == site.axes.index("pos")
        assert site_bytes(model, x, site.name) == record[site.name].numel() * 8
    assert "blocks.0 … blocks.1." in hooks.show(model, x)
    with pytest.raises(TooLarge, match=r"sites of 4 × 11 tokens"):
        hooks.record(model, x, "*.hook_pattern", max_memory=2 * 4 * 3 * 11 * 11 * 8 - 1)
    hooks.record(model, x, "*.hook_pattern", max_memory=2 * 4 * 3 * 11 * 11 * 8)


@pytest.mark.contract
def test_the_bridge_s_own_names_work_wherever_a_name_does(model: Any, x: Tensor) -> None:
    assert hooks.resolve(model, "blocks.1.attn.o.hook_in") == [Z]
    assert hooks.resolve(model, "*.attn.o.hook_in") == ["blocks.0.attn.hook_z", Z]
    assert hooks.resolve(model, ["blocks.0.hook_out", "*.hook_resid_post"])[0] == "blocks.0.hook_resid_post"
    record = hooks.record(model, x, "blocks.1.attn.o.hook_in")
    assert_close(record["blocks.1.attn.o.hook_in"], record[Z])
    with pytest.raises(UnknownSite):
        hooks.resolve(model, "blocks.0.attn.hook_result")  # the bridge has it, and it never fires here
    with pytest.raises(UnknownSite, match=r'did you mean "blocks\.0\.attn\.hook_pattern"'):
        hooks.resolve(model, "blocks.0.attn.hook_patern")


@pytest.mark.hygiene
def test_record_run_with_cache_and_plain_hooks_read_the_same(model: Any, x: Tensor) -> None:
    record = hooks.record(model, x)
    output, cache = model.run_with_cache(x)
    assert list(record) == list(cache) == list(model.hook_dict)
    for name, value in record.items():
        assert_close(cache[name], value, rtol=0, atol=0)
    assert_close(output, model(x), rtol=0, atol=0)
    _, cut = model.run_with_cache(x, pos_slice=(2, 5))
    for site in hooks.sites(model):
        at = site.axes.index("pos")
        assert_close(cut[site.name], record[site.name].narrow(at, 2, 3), rtol=0, atol=0)


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


EDITS: dict[str, Callable[[], Any]] = {
    "zero at positions": lambda: hooks.zero(pos=[2, 5]),
    "zero of heads": lambda: hooks.zero(channels=1),
    "zero of a head at positions": lambda: hooks.zero(pos=[2, 5], channels=1),
    "scale": lambda: hooks.scale(0.5),
    "add": lambda: hooks.add(0.7, pos=3),
    "set_to": lambda: hooks.set_to(0.3, pos=slice(4, None)),
    "batch mean": lambda: hooks.mean(over="batch"),
    "position mean": lambda: hooks.mean(over="pos"),
    "mean by kind": lambda: hooks.mean(over=("batch", "kind"), kinds=[i % 2 for i in range(11)]),
    "resample": lambda: hooks.resample(),
}


def expected_edit(what: str, value: Tensor, axes: tuple[str, ...]) -> Tensor:
    """What the edit does, written with positions and channels moved to axes 1 and 2."""
    at, columns = axes.index("pos"), axes.index("head") if "head" in axes else axes.index("pos") + 1
    v = value.clone().movedim((at, columns), (1, 2))
    if what == "zero at positions":
        v[:, [2, 5]] = 0
    elif what == "zero of heads":
        v[:, :, 1] = 0
    elif what == "zero of a head at positions":
        v[:, [2, 5], 1] = 0
    elif what == "scale":
        v = v * 0.5
    elif what == "add":
        v[:, 3] += 0.7
    elif what == "set_to":
        v[:, 4:] = 0.3
    elif what == "batch mean":
        v = v.mean(0, keepdim=True).expand_as(v)
    elif what == "position mean":
        v = v.mean(1, keepdim=True).expand_as(v)
    elif what == "mean by kind":
        for kind in (0, 1):
            v[:, kind::2] = v[:, kind::2].mean((0, 1), keepdim=True)
    else:
        v = v[derangement(4)]
    return v.movedim((1, 2), (at, columns))


@pytest.mark.edit
@pytest.mark.parametrize("what", EDITS)
@pytest.mark.parametrize("name", [Z, PATTERN, SCORES, RESID, "blocks.0.mlp.hook_post"])
def test_every_edit_does_what_it_says_and_equals_transformerlens(model: Any, x: Tensor, name: str, what: str) -> None:
    clean = model(x)
    (site,) = [s for s in hooks.sites(model) if s.name == name]
    by_lens = model.run_with_hooks(x, fwd_hooks=[(name, lambda value, hook: expected_edit(what, value, site.axes))])
    with hooks.edit(model, {name: EDITS[what]()}) as edited:
        ours = model(x)
    assert edited.fired == {name: 1}
    assert_close(ours, by_lens, rtol=0, atol=1e-13)
    # A softmax does not notice one number added to all scores of a query, nor a LayerNorm one added to all channels.
    assert torch.allclose(ours, clean) == (what == "add" and name in (SCORES, RESID))
    assert_close(model(x), clean, rtol=0, atol=0)


@pytest.mark.edit
def test_an_edit_with_a_reference_and_the_refusals(model: Any, x: Tensor) -> None:
    with hooks.edit(model, {PATTERN: hooks.mean(over="batch", reference=x.flip(0))}):
        by_reference = model(x)
    with hooks.edit(model, {PATTERN: hooks.mean(over="batch")}):
        assert_close(model(x), by_reference, rtol=0, atol=1e-13)
    with pytest.raises(DidNotFire, match="stop_at_layer=1"):
        with hooks.edit(model, {Z: hooks.zero()}):
            model(x, stop_at_layer=1)
    with pytest.raises(BadArgument, match="outside"):
        with hooks.edit(model, {PATTERN: hooks.zero(channels=3)}):
            model(x)
    with pytest.raises(UnknownSite), hooks.edit(model, {"*.hook_delta": hooks.zero()}):
        pass


def doubled(value: Tensor) -> Tensor:
    new = value.clone()
    new[..., 2:5, :] = value[..., 2:5, :] * 2 + 0.1
    return new


@pytest.mark.edit
@pytest.mark.parametrize(
    "path, name",
    [
        ("blocks.1.attn.o.hook_in", None),
        ("blocks.1.attn.hook_pattern", None),
        ("blocks.1.attn.hook_attn_scores", None),
        ("blocks.0.hook_out", "blocks.0.hook_resid_post"),
        ("head.hook_out", None),
    ],
)
def test_nnsight_reads_and_edits_the_same(model: Any, x: Tensor, path: str, name: str | None) -> None:
    """By the bridge's own names; where there are heads nnsight sees the value before it is split into them."""
    (name,) = hooks.resolve(model, name or path)
    record = hooks.record(model, x)
    split = len(record[name].shape) == 4 and "pattern" not in name and "scores" not in name

    def on_the_flat_value(value: Tensor, hook: Any) -> Tensor:
        return doubled(value.flatten(2)).view(value.shape) if split else doubled(value)

    expected = model.run_with_hooks(x, fwd_hooks=[(name, on_the_flat_value)])
    traced = hooks.nnsight(model)
    point = traced
    for part in path.split("."):
        point = point[int(part)] if part.isdigit() else getattr(point, part)
    with traced.trace(x):
        value = point.output.save()
    assert_close(value.view(record[name].shape), record[name], rtol=0, atol=0)
    with traced.trace(x):
        point.output = doubled(point.output)
        output = traced.output.save()
    assert_close(output, expected, rtol=0, atol=0)
    assert not torch.allclose(output, model(x))


@pytest.mark.edit
def test_scores_are_read_before_the_softmax_and_an_edit_of_them_acts(model: Any, x: Tensor) -> None:
    """In the bridge as it comes the point holds the pattern and an edit does nothing."""
    record = hooks.record(model, x)
    masked = record[SCORES] + torch.full((11, 11), float("-inf"), dtype=x.dtype).triu(1)
    assert_close(torch.softmax(masked, -1), record[PATTERN])
    with hooks.edit(model, {SCORES: hooks.scale(0.0)}):
        uniform = hooks.record(model, x, PATTERN)[PATTERN]
    assert_close(uniform, torch.ones_like(uniform).tril() / torch.arange(1, 12)[:, None])
    bare, r = bare_bridge().double(), torch.randn(1, 3, 12, dtype=x.dtype)
    clean = bare.original_model(inputs_embeds=r)
    bare.blocks[1].attn.hook_attn_scores.add_hook(lambda value, hook: value * 0)
    with pytest.warns(UserWarning, match="edit is discarded"):
        assert_close(bare.original_model(inputs_embeds=r), clean, rtol=0, atol=0)


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


@pytest.mark.hygiene
def test_where_a_nan_comes_from_is_said_in_listed_names(x: Tensor) -> None:
    model = small()
    with pytest.raises(NonFinite, match=rf"first seen at {Z} \(NaN"):
        model.run_with_hooks(x, fwd_hooks=[(Z, lambda value, hook: value * float("nan"))])
    assert not model.hook_dict[Z].fwd_hooks
    with torch.no_grad():
        model.blocks[1].attn.q.original_component.weight[0, 0] = float("inf")
    with pytest.raises(NonFinite, match=r"the weight blocks\.1\.attn\.q\.weight"):
        model(x)


@pytest.mark.contract
def test_a_checkpoint_is_the_same_model(tmp_path: Path, x: Tensor) -> None:
    model = small()
    names = list(checkpoint.tensors_of(model))
    assert "blocks.0.attn.q.weight" in names and "blocks.1.mlp.in.bias" in names and "ln_final.weight" in names
    assert not any("_original_component" in name or "mask" in name or "pos" in name for name in names)
    assert sum(v.numel() for v in checkpoint.tensors_of(model).values()) == sum(p.numel() for p in model.parameters())
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
