"""What sites there are, in which order they fire, and what a pattern picks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hooks

VARIANTS = ["mamba", "lti", "s4d", "s4", "linear"]


def fired(model: Any, x: Tensor, **kwargs: Any) -> list[str]:
    """Names in the order in which plain torch hooks see them."""
    seen: list[str] = []
    handles = [
        point.register_forward_hook(lambda module, args, out, name=name: seen.append(name))
        for name, point in model.hook_dict.items()
    ]
    model(x, **kwargs)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.hygiene
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "config",
    [{}, {"head": "classification"}, {"head": "lm", "d_out": 7}, {"n_layers": 1, "d_state": 1}],
    ids=str,
)
def test_sites_fire_in_the_order_in_which_they_are_registered(
    make: Callable[..., Any], x: Tensor, variant: str, config: dict[str, Any]
) -> None:
    model = make(variant, **config)
    tokens = torch.randint(7, (2, 6)) if config.get("head") == "lm" else x
    assert fired(model, tokens) == list(model.hook_dict)
    assert fired(model, tokens, return_state=True) == list(model.hook_dict)
    assert list(hooks.record(model, tokens)) == list(model.hook_dict) == hooks.sites(model).names


@pytest.mark.hygiene
@pytest.mark.parametrize("config", [{"d_conv": 1}, {"d_conv": 2}, {"bias": True, "conv_bias": False}], ids=str)
def test_order_holds_for_other_shapes_of_mamba(make: Callable[..., Any], x: Tensor, config: dict[str, Any]) -> None:
    model = make(**config)
    assert fired(model, x) == list(model.hook_dict)


@pytest.mark.law
@pytest.mark.parametrize("variant", VARIANTS)
def test_axes_of_the_table_are_the_axes_of_the_tensors(make: Callable[..., Any], x: Tensor, variant: str) -> None:
    """Sizes as the table says; trap 6: each point carries its own position axis, None where it has none."""
    model = make(variant)
    values = hooks.record(model, x)
    sizes = {"batch": 4, "pos": 11}
    for site in hooks.sites(model):
        live = values[site.name].shape
        known = tuple(sizes.get(axis, n) for axis, n in zip(site.axes, site.shape, strict=True))
        assert tuple(live) == known, site.name
        place = model.hook_dict[site.name].pos_dim
        assert place == (site.axes.index("pos") if "pos" in site.axes else None), site.name
        assert site.equation
        assert values[site.name].is_contiguous(), f"{site.name}: trap 4, strided sites break nnsight's gradients"


@pytest.mark.law
def test_ranges_of_the_table_hold(make: Callable[..., Any], x: Tensor) -> None:
    values = hooks.record(make(), 5 * x)
    bounds = {
        "hook_decay": (0.0, 1.0), "hook_delta": (0.0, torch.inf), "hook_scale": (0.0, torch.inf),
        "hook_x": (-0.2785, torch.inf), "hook_gate": (-0.2785, torch.inf),
    }  # fmt: skip
    for name, value in values.items():
        low, high = bounds.get(name.rsplit(".", 1)[-1], (-torch.inf, torch.inf))
        assert bool((value >= low).all()) and bool((value <= high).all()), name
    assert bool((values["blocks.0.mixer.hook_x"] < -0.2).any()), "the bound is reached, not idle"


@pytest.mark.hygiene
def test_a_model_lists_only_what_it_has(make: Callable[..., Any]) -> None:
    s4d = {name.rsplit(".", 1)[-1] for name in hooks.sites(make("s4d")).names}
    mamba = {name.rsplit(".", 1)[-1] for name in hooks.sites(make()).names}
    others = {"hook_transition", "hook_norm", "hook_resid_mid", "hook_post", "hook_mlp_out"}
    assert mamba == set(hooks.SITES) - others, "Mamba has all but what S4's DPLR form and an MLP add"
    assert s4d < mamba
    assert not {"hook_B", "hook_C", "hook_gate", "hook_conv_init"} & s4d
    with pytest.raises(hooks.UnknownSite, match="hook_gate"):
        hooks.resolve(make("s4d"), "*.hook_gate")


@pytest.mark.hygiene
def test_what_a_pattern_picks(make: Callable[..., Any]) -> None:
    model = make(n_layers=3)
    every = list(model.hook_dict)
    delta = [f"blocks.{i}.mixer.hook_delta" for i in range(3)]
    assert hooks.resolve(model, None) == every
    assert hooks.resolve(model, delta[1]) == [delta[1]]
    assert hooks.resolve(model, "*.hook_delta") == delta
    assert hooks.resolve(model, "blocks.[12].mixer.hook_delta") == delta[1:]
    assert hooks.resolve(model, lambda name: name.endswith("hook_delta")) == delta
    for kind in (list, tuple, set, frozenset):
        assert hooks.resolve(model, kind([delta[2], delta[0]])) == [delta[0], delta[2]], "in firing order"
    assert hooks.resolve(model, ["*.hook_delta", delta[1], lambda name: name == "hook_embed"]) == ["hook_embed", *delta]


@pytest.mark.hygiene
@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("*.hook_dleta", '"*.hook_delta"'),
        ("blocks.0.mixer.hook_sate", '"blocks.0.mixer.hook_state"'),
        ("blocks.0.mixer.hook_detla", '"blocks.0.mixer.hook_delta"'),
        ("hook_embd", '"hook_embed"'),
        ("blocks.7.mixer.hook_delta", "hooks.show"),
        (["*.hook_delta", "*.hook_nothing"], "hook_nothing"),
        (lambda name: False, "none of the"),
        ([], "empty"),
        ("", "hooks.show"),
    ],
)
def test_a_pattern_that_picks_nothing_is_refused_with_the_near_names(
    make: Callable[..., Any], pattern: Any, near: str
) -> None:
    with pytest.raises(hooks.UnknownSite) as caught:
        hooks.resolve(make(), pattern)
    assert near in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.hygiene
def test_a_module_is_no_pattern(make: Callable[..., Any]) -> None:
    """A module is callable and returns what it is given, so as a predicate it would be true of every site."""
    model = make()
    with pytest.raises(hooks.BadArgument, match=r"blocks\.0\.mixer\.hook_delta"):
        hooks.resolve(model, model.blocks[0].mixer.hook_delta)
    with pytest.raises((hooks.BadArgument, TypeError), match="int"):
        hooks.resolve(model, 3)


@pytest.mark.hygiene
def test_show_is_a_tree_with_shapes(make: Callable[..., Any], x: Tensor) -> None:
    model = make(n_layers=3)
    names, live = hooks.show(model), hooks.show(model, x)
    assert names.splitlines()[0] == f"Mamba: {len(model.hook_dict)} sites"
    assert "blocks.0 … blocks.2." in names and "(batch, pos, 16, 4)" in names
    assert "(4, 11, 16, 4)" in live and "batch" not in live.split("hook_delta")[0]
    assert "raw hook changes one read-out" in names, "the one site where idioms differ says so"
    for name in model.hook_dict:
        assert name.split(".", 2)[-1] in names
    assert len(names.splitlines()) == len(hooks.show(make(n_layers=7)).splitlines()), "equal blocks are shown once"


@pytest.mark.hygiene
def test_the_table_of_sites_prints_one_line_each(make: Callable[..., Any]) -> None:
    model = make()
    lines = repr(hooks.sites(model)).splitlines()
    assert len(lines) == len(model.hook_dict) + 1
    assert lines[0].split() == ["site", "axes", "equation", "range"]
    assert "softplus" in next(line for line in lines if line.startswith("blocks.0.mixer.hook_delta "))


@pytest.mark.hygiene
def test_complex_states_show_twice_the_numbers(make: Callable[..., Any], x: Tensor) -> None:
    model = make("s4d")
    site = next(s for s in hooks.sites(model) if s.name == "blocks.0.mixer.hook_state")
    assert site.shape == (None, None, 8, 8)
    assert hooks.record(model, x, site.name)[site.name].shape == (4, 11, 8, 8)


@pytest.mark.hygiene
def test_sites_of_a_model_that_is_not_ours() -> None:
    from transformer_lens import HookedRootModule
    from transformer_lens.hook_points import HookPoint

    class Other(HookedRootModule):
        def __init__(self) -> None:
            super().__init__()
            self.hook_thing = HookPoint()
            self.hook_state = HookPoint()
            self.setup()

        def forward(self, x: Tensor) -> Tensor:
            return self.hook_state(self.hook_thing(x))

    model, x = Other(), torch.randn(2, 3, 4)
    assert hooks.sites(model).names == ["hook_thing", "hook_state"]
    assert hooks.sites(model)[0].note == "not in the vocabulary"
    assert "hook_thing" in hooks.show(model)
    torch.testing.assert_close(hooks.record(model, x)["hook_thing"], x)
    with hooks.edit(model, {"hook_thing": hooks.scale(2.0, pos=1)}):
        torch.testing.assert_close(model(x)[:, 1], 2 * x[:, 1])
    with pytest.raises(hooks.DidNotFire), hooks.edit(model, {"hook_thing": hooks.zero()}):
        pass
    with pytest.raises(hooks.BadArgument, match="readout_only"), hooks.edit(model, {"hook_state": hooks.zero()}):
        pytest.fail("the body must not run")
    with hooks.edit(model, {"hook_state": hooks.zero()}, readout_only=True):
        assert not model(x).any()


@pytest.mark.contract
@pytest.mark.parametrize("wrong", [lambda out: out[:, -1, 0], lambda: True, lambda name: torch.zeros(3)])
def test_a_metric_in_the_place_of_a_filter_is_one_line(make: Callable[..., Any], wrong: Any) -> None:
    model = make()
    with pytest.raises(
        hooks.BadArgument, match=r'picks sites fails on "hook_embed" \(\w+: .*\): it takes a name'
    ) as caught:
        hooks.resolve(model, wrong)
    assert "\n" not in str(caught.value)
