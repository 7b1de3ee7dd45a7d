"""Every verb of hooks on TransformerLens' own points: those of the softmax transformer."""

# ruff: noqa: SIM117  (nnsight runs the body of a ``with`` itself)

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import hooks
from hooks.edits import derangement
from hooks.errors import BadArgument, DidNotFire, NonFinite, TooLarge, UnknownSite
from hooks.memory import site_bytes
from models.transformer import POINTS
from tests.small_transformer import bare_bridge, left_on, small

Z, PATTERN, SCORES = "blocks.1.attn.hook_z", "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_attn_scores"
RESID = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def built() -> Any:
    return small()


@pytest.fixture
def model(built: Any) -> Iterator[Any]:
    """One model for all tests that leave it as it was, which is checked."""
    yield built
    assert not left_on(built) and built.context_level == 0


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
def test_nnsight_reads_and_edits_the_same(x: Tensor, path: str, name: str | None) -> None:
    """By the bridge's own names; where there are heads nnsight sees the value before it is split into them."""
    model = small()  # nnsight leaves its wrappers on the points
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
