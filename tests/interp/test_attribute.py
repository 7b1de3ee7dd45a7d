"""Attributions are exact where they must be, sum to what they explain, and give nothing to a decoy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import LayerGradientXActivation
from torch import Tensor

import hooks
import models
from hooks.edits import region_of
from hooks.errors import BadArgument, UnknownSite
from interp import attribute, patch
from tests.hooks.conftest import build, left_on
from tests.interp.planted import ANSWER, DECOY, Linear, Product, last, one_path, prompts

VARIANTS = ["mamba", "lti", "s4d", "s4", "linear"]
INTEGRATED = [
    *(
        (variant, kind, pos)
        for variant in ("mamba", "lti", "s4d", "s4")
        for kind, pos in (("hook_delta", None), ("hook_write", [1, 4]), ("hook_state", 4), ("hook_y", None))
    ),
    *(("linear", kind, pos) for kind, pos in (("hook_B", None), ("hook_write", [1, 4]), ("hook_state", 4))),
    *(("linear", "hook_y", None), ("s4", "hook_transition", 4)),
]


def make(variant: str) -> Any:
    if variant != "transformer":
        return build(variant)
    return models.build("transformer", d_model=8, n_layers=2, n_heads=2, d_in=5, d_out=1).double().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def slope(run: Callable[[float], Tensor]) -> Tensor:
    """The derivative at 0 by a central difference."""
    step = 1e-5
    return (run(step) - run(-step)) / (2 * step)


# --- gradient × activation ----------------------------------------------------------------------


@pytest.mark.law
@pytest.mark.parametrize("name", ["hook_x_in", "hook_x_pre", "hook_out"])
def test_gradient_times_activation_is_what_zeroing_takes_away_in_a_linear_model(name: str) -> None:
    model, tokens = Linear(), torch.randn(5, 8, 4, dtype=torch.float64)
    found = attribute.gradient_x_activation(model, tokens, name, last)[name]
    with torch.no_grad():
        clean = last(model(tokens))
        for t in range(8):
            with hooks.edit(model, {name: hooks.zero(pos=t)}):
                torch.testing.assert_close(found[:, t].sum(-1), clean - last(model(tokens)), rtol=1e-10, atol=1e-12)
    assert found.abs().max() > 0.01


@pytest.mark.parity
@pytest.mark.parametrize(
    ("variant", "name"),
    [
        *(("mamba", f"blocks.{name}") for name in ("0.mixer.hook_delta", "1.mixer.hook_write", "1.hook_resid_pre")),
        *(("s4", f"blocks.0.mixer.{kind}") for kind in ("hook_delta", "hook_transition", "hook_write")),
        *(("linear", f"blocks.0.{kind}") for kind in ("mixer.hook_B", "mixer.hook_write", "mixer.hook_norm")),
        *(("transformer", f"blocks.0.attn.{kind}") for kind in ("hook_k", "hook_attn_scores", "hook_z")),
    ],
)
def test_gradient_times_activation_is_captums(variant: str, name: str, x: Tensor) -> None:
    model = make(variant)
    found = attribute.gradient_x_activation(model, x, name, last)[name]
    expected = LayerGradientXActivation(lambda tokens: last(model(tokens)), model.hook_dict[name]).attribute(x)
    # A head axis is split off by TransformerLens, which captum does not see.
    torch.testing.assert_close(found, expected.reshape(found.shape), rtol=1e-10, atol=1e-14)
    assert found.abs().max() > 1e-6


@pytest.mark.law
@pytest.mark.parametrize("variant", VARIANTS)
def test_at_the_state_the_gradient_is_that_of_an_edit_which_propagates(variant: str, x: Tensor) -> None:
    """And with ``readout_only`` that of one which does not."""
    model, name = build(variant), "blocks.0.mixer.hook_state"
    direction = torch.randn(hooks.record(model, x, name)[name][:, 3:4].shape, dtype=torch.float64)
    totals = []
    for readout_only in (False, True):
        _, slopes = attribute.gradients(model, x, name, last, readout_only=readout_only)

        def run(step: float, only: bool = readout_only) -> Tensor:
            with torch.no_grad(), hooks.edit(model, {name: hooks.add(step * direction, pos=3)}, readout_only=only):
                return last(model(x))

        totals.append((slopes[name][:, 3:4] * direction).flatten(1).sum(1))
        torch.testing.assert_close(totals[-1], slope(run), rtol=1e-5, atol=1e-8)
    assert (totals[0] - totals[1]).abs().max() > 1e-4


@pytest.mark.planted
def test_the_answer_is_found_and_the_decoy_gets_nothing() -> None:
    model, (clean, _) = one_path(), prompts()
    found = attribute.gradient_x_activation(
        model, clean, ["*.hook_write", "*.hook_x_in", "*.norm.hook_normalized"], last
    )
    for name, values in found.items():
        assert values[:, ANSWER, 0].reshape(len(clean), -1).abs().amax(1).min() > 1e-3, name
        assert values[:, DECOY, 1].abs().max() == 0, name
    held = hooks.record(model, clean, "*.hook_write")["*.hook_write"]
    # As much of the decoy is there to be found (an x of SiLU(1) or SiLU(−1)).
    torch.testing.assert_close(held[:, DECOY, 1].abs().max(), held[:, ANSWER, 0].abs().max())


@pytest.mark.contract
def test_weights_need_no_gradients_and_neither_do_sites_without_history(x: Tensor) -> None:
    model = build("mamba")
    expected = attribute.gradients(model, x, "*", last)[1]
    model.requires_grad_(False)
    with torch.no_grad():
        found = attribute.gradients(model, x, "*", last)[1]
    assert list(found) == list(model.hook_dict)
    for name, values in found.items():
        torch.testing.assert_close(values, expected[name])
    for name in ("blocks.0.mixer.hook_state_init", "blocks.1.mixer.hook_conv_init"):
        assert found[name].abs().max() > 0, name


# --- attribution patching -----------------------------------------------------------------------


@pytest.mark.law
def test_attribution_patching_is_activation_patching_in_a_linear_model() -> None:
    model = Linear()
    clean, corrupted = torch.randn(2, 6, 8, 4, dtype=torch.float64)
    guess = attribute.attribution_patching(model, clean, corrupted, "*", last)
    found = patch.patched(model, clean, corrupted, "*", last)
    effects = dict(zip(found.cells, found.values - found.corrupted, strict=True))
    for name, values in guess.items():
        by_position = attribute.by_position(values, name)
        for t in range(8):
            torch.testing.assert_close(by_position[:, t], effects[name, t].to(by_position), rtol=1e-9, atol=1e-12)
    assert guess["hook_gate_pre"].abs().max() == 0
    assert guess["hook_x_in"].abs().max() > 0.01


@pytest.mark.law
@pytest.mark.parametrize(
    ("variant", "name"),
    [
        *(("mamba", f"blocks.{name}") for name in ("1.mixer.hook_y", "0.mixer.hook_state", "0.mixer.hook_delta")),
        *((variant, "blocks.0.mixer.hook_state") for variant in ("s4", "linear")),
        ("transformer", "blocks.0.attn.hook_pattern"),
    ],
)
def test_it_is_the_first_order_of_activation_patching(variant: str, name: str, x: Tensor) -> None:
    """The miss shrinks as the square of the distance between the two prompts."""
    model, other = make(variant), torch.randn_like(x)
    misses = []
    for size in (1e-2, 1e-3):
        guess = attribute.by_position(
            attribute.attribution_patching(model, x + size * other, x, name, last)[name], name
        )
        found = patch.patched(model, x + size * other, x, name, last)
        misses.append((guess.T - (found.values - found.corrupted)).abs().max() / size)
    assert misses[1] < misses[0] / 5
    assert guess.abs().max() / size > 10 * misses[1]


# --- integrated gradients -----------------------------------------------------------------------


@pytest.mark.law
@pytest.mark.parametrize(("variant", "kind", "pos"), INTEGRATED)
def test_integrated_gradients_sum_to_the_difference_from_the_sites_own_baseline(
    variant: str, kind: str, pos: Any, x: Tensor
) -> None:
    model, name = build(variant), f"blocks.0.mixer.{kind}"
    value = hooks.record(model, x, name)[name]
    baseline: Any = 0.0
    if kind == "hook_delta" or variant == "linear":  # a norm of 0 would have to be kept away from 0
        baseline = region_of(value.mean(0, keepdim=True) / 2, pos, None, name)
    # S4D's states turn by up to half a circle between the two ends.
    found = attribute.integrated_gradients(model, x, name, last, baseline=baseline, pos=pos, steps=64)
    with torch.no_grad(), hooks.edit(model, {name: hooks.set_to(found.baseline, pos=pos)}):
        without = last(model(x))
    clean = last(model(x)).detach()
    torch.testing.assert_close(found.total, clean - without, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.gap, found.values.flatten(1).sum(1) - found.total, rtol=0, atol=1e-15)
    assert found.gap.abs().max() < 1e-6 * found.total.abs().max()
    assert found.total.abs().max() > 1e-4
    rough = attribute.integrated_gradients(model, x, name, last, baseline=baseline, pos=pos, steps=1)
    if kind == "hook_delta":
        assert rough.gap.abs().max() > 100 * found.gap.abs().max()


@pytest.mark.law
def test_a_product_is_shared_equally() -> None:
    model, tokens = Product(), torch.randn(3, 2, 2, dtype=torch.float64)
    found = attribute.integrated_gradients(model, tokens, "hook_x_in", last)
    expected = tokens[:, -1].prod(-1)[:, None].expand(-1, 2) / 2
    torch.testing.assert_close(found.values[:, -1], expected, rtol=1e-6, atol=1e-9)
    assert found.values[:, 0].abs().max() == 0
    local = attribute.gradient_x_activation(model, tokens, "hook_x_in", last)["hook_x_in"]
    torch.testing.assert_close(local[:, -1].sum(-1), 2 * found.total)  # which is why it does not sum to the difference


@pytest.mark.planted
def test_integrated_gradients_find_the_answer_and_no_decoy() -> None:
    model, (clean, corrupted) = one_path(), prompts(8)
    name = "blocks.0.mixer.hook_x"
    start = hooks.record(model, corrupted, name)[name]
    found = attribute.integrated_gradients(model, clean, name, last, baseline=start)
    positions = attribute.by_position(found.values, name)
    torch.testing.assert_close(positions[:, ANSWER], found.total, rtol=1e-6, atol=1e-9)
    assert positions[:, DECOY].abs().max() == 0
    assert (clean - corrupted)[:, DECOY].abs().max() == 2


@pytest.mark.contract
@pytest.mark.parametrize("batch_size", [None, 4, 12])
def test_a_metric_may_hold_the_labels_of_its_prompts(x: Tensor, batch_size: int | None) -> None:
    model, labels = build("mamba"), torch.randn(4, dtype=torch.float64)

    def squared_error(out: Tensor) -> Tensor:
        return (out[:, -1, 0] - labels).square()

    whole = attribute.integrated_gradients(model, x, "blocks.1.mixer.hook_B", squared_error, batch_size=batch_size)
    for i in range(4):
        one = attribute.integrated_gradients(
            model, x[i : i + 1], "blocks.1.mixer.hook_B", lambda out, i=i: (out[:, -1, 0] - labels[i]).square()
        )
        torch.testing.assert_close(whole.values[i], one.values[0], rtol=1e-6, atol=1e-10)


@pytest.mark.contract
def test_a_run_that_goes_on_from_a_state_can_be_integrated(x: Tensor) -> None:
    model, name = build("mamba"), "blocks.0.mixer.hook_x"
    with torch.no_grad():
        _, state = model(x[:, :4], return_state=True)
    whole = attribute.integrated_gradients(model, x, name, last, pos=slice(4, None))
    rest = attribute.integrated_gradients(model, x[:, 4:], name, last, state=state)
    torch.testing.assert_close(rest.values, whole.values, rtol=1e-6, atol=1e-10)


# --- any model, and refusals --------------------------------------------------------------------


@pytest.mark.law
@pytest.mark.parametrize("name", ["blocks.1.attn.hook_z", "blocks.0.attn.hook_pattern", "blocks.0.ln2.hook_in"])
def test_a_transformers_sites(name: str, x: Tensor) -> None:
    model = make("transformer")
    values, slopes = attribute.gradients(model, x, name, last)
    direction = torch.randn_like(values[name])

    def run(step: float) -> Tensor:
        with torch.no_grad(), hooks.edit(model, {name: hooks.add(step * direction)}):
            return last(model(x))

    torch.testing.assert_close((slopes[name] * direction).flatten(1).sum(1), slope(run), rtol=1e-5, atol=1e-8)
    by_position = attribute.by_position(values[name] * slopes[name], name)
    assert by_position.shape == x.shape[:2]
    torch.testing.assert_close(by_position.sum(1), (values[name] * slopes[name]).flatten(1).sum(1))
    found = attribute.integrated_gradients(model, x, name, last, baseline=values[name].roll(1, 0), steps=64)
    assert found.gap.abs().max() < 1e-5 * found.total.abs().max()


@pytest.mark.contract
def test_a_model_in_train_mode_is_refused(x: Tensor) -> None:
    model = build("mamba").train()
    for call in (attribute.gradients, attribute.gradient_x_activation, attribute.integrated_gradients):
        with pytest.raises(BadArgument, match=r"train mode.*model\.eval\(\)"):
            call(model, x, "blocks.0.mixer.hook_y", last)
    with pytest.raises(BadArgument, match="train mode"):
        attribute.attribution_patching(model, x, x, "*.hook_y", last)
    model.eval().blocks[1].norm.train()
    with pytest.raises(BadArgument, match=r"blocks\.1\.norm is in train mode"):
        attribute.gradients(model, x, "*.hook_y", last)


@pytest.mark.contract
def test_what_has_no_answer_is_refused_and_leaves_nothing_behind(x: Tensor) -> None:
    model = build("mamba")
    for sites, metric, error, message in (
        ("*.hook_yy", last, UnknownSite, "no site matches"),
        ("*.hook_y", lambda out: out[:, -1], BadArgument, r"shape \(4, 2\) for 4 prompts"),
        ("*.hook_y", lambda out: 1.0, BadArgument, "gave float"),
        ("*.hook_y", lambda out: last(out).detach(), BadArgument, "carries no gradient"),
        ("head.hook_out", lambda out: model.head.linear.weight[0, 0].expand(4), BadArgument, "no gradient reaches"),
    ):
        with pytest.raises(error, match=message):
            attribute.gradients(model, x, sites, metric)
    for sites, options, message in (
        ("*.hook_y", {}, "matches 2 sites"),
        ("blocks.0.mixer.hook_y", {"baseline": torch.zeros(3)}, r"baseline \(3,\) does not fit"),
        ("blocks.0.mixer.hook_y", {"steps": 0}, "steps=0"),
        ("blocks.0.mixer.hook_y", {"readout_only": True}, "is about hook_state"),
    ):
        with pytest.raises(BadArgument, match=message):
            attribute.integrated_gradients(model, x, sites, last, **options)
    with pytest.raises(BadArgument, match="give one shape"):
        attribute.attribution_patching(model, x, x[:, 1:], "*.hook_y", last)
    with pytest.raises(BadArgument, match="has no position axis"):
        attribute.by_position(torch.zeros(2, 3, 4), "blocks.0.mixer.hook_state_init")
    assert left_on(model) == []
