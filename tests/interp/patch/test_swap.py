"""Swapped states bring along exactly the context that they hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hooks
import models
from hooks.errors import BadArgument
from interp import patch
from tests.hooks.conftest import build, left_on
from tests.interp.planted import ANSWER, LENGTH, Linear, last, one_path, prompts

VARIANTS = ["mamba", "lti", "s4d", "s4", "linear_attention"]


def make(variant: str) -> Any:
    if variant != "linear_attention":
        return build(variant)
    shape: dict[str, Any] = {"d_model": 8, "n_layers": 2, "n_heads": 2, "d_conv": 3, "d_in": 5, "d_out": 2}
    return models.build("linear_attention", **shape).double().eval()


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    first, second = torch.randn(2, 20, 9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return first, second


@pytest.mark.law
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_whole_state_recovers_exactly_one_and_nothing_exactly_zero(
    variant: str, pair: tuple[Tensor, Tensor]
) -> None:
    model, (first, second) = make(variant), pair
    swap = patch.Swap(model, first, second, 5)
    assert torch.equal(swap.patched(), swap.first)
    assert torch.equal(swap.patched(layers=()), swap.second) and torch.equal(swap.patched(parts=()), swap.second)
    table = patch.swap_table(model, first, second, 5, last).set_index(["part", "layer"])
    whole = "both" if "conv" in swap.parts else "h"
    rows = table.loc[whole]
    everything = rows[rows.index.isna()].iloc[0]
    assert everything["recovery"] == everything["recovery_low"] == everything["recovery_high"] == 1
    alone = rows[~rows.index.isna()]["recovery"]
    assert ((alone - 1).abs() > 1e-3).all() and (alone.abs() > 1e-6).all()
    assert left_on(model) == []


@pytest.mark.law
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_two_ends_are_runs_of_whole_prompts(variant: str, pair: tuple[Tensor, Tensor]) -> None:
    model, (first, second) = make(variant), pair
    swap = patch.Swap(model, first, second, 5)
    with torch.no_grad():
        own, other = model(second)[:, 5:], model(torch.cat([first[:, :5], second[:, 5:]], dim=1))[:, 5:]
    torch.testing.assert_close(swap.second, own, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(swap.first, other, rtol=1e-10, atol=1e-10)
    recovered = patch.recovery(last(patch.swap_states(model, first, second, 5)), last(other), last(own))
    assert float(recovered.mean) == pytest.approx(1, abs=1e-10)


@pytest.mark.law
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_swapped_state_is_a_patched_one(variant: str, pair: tuple[Tensor, Tensor]) -> None:
    """h of the last layer after token 4: given to a run that goes on from there, or put into a whole run."""
    model, (first, second) = make(variant), pair
    swapped = last(patch.swap_states(model, first, second, 5, parts=("h",), layers=1))
    found = patch.patched(model, first, second, "blocks.1.mixer.hook_state", last, positions=[4])
    torch.testing.assert_close(found.values[0], swapped, rtol=1e-9, atol=1e-11)
    assert (found.values[0] - found.corrupted).abs().max() > 1e-4


@pytest.mark.edit
@pytest.mark.parametrize(
    ("variant", "part"), [*((variant, "h") for variant in VARIANTS), ("mamba", "conv"), ("linear_attention", "conv")]
)
def test_a_part_in_a_layer_is_that_tensor_and_no_other(variant: str, part: str, pair: tuple[Tensor, Tensor]) -> None:
    """The same swap as an edit of the site at which the state enters."""
    model, (first, second) = make(variant), pair
    with torch.no_grad():
        _, one = model(first[:, :4], return_state=True)
        _, two = model(second[:, :4], return_state=True)
        site = "hook_state_init" if part == "h" else "hook_conv_init"
        with hooks.edit(model, {f"blocks.1.mixer.{site}": hooks.set_to(getattr(one[1], part))}):
            expected = model(second[:, 4:], state=two)
    found = patch.swap_states(model, first, second, 4, parts=(part,), layers=1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert (found - patch.swap_states(model, first, second, 4, parts=(part,), layers=0)).abs().max() > 1e-4


@pytest.mark.planted
@pytest.mark.parametrize(("way", "carrier", "decoy"), [("scan", "h", "conv"), ("taps", "conv", "h")])
def test_the_part_that_carries_the_answer_is_found(way: str, carrier: str, decoy: str) -> None:
    """The answer passes the swap in the scan's state, or in the convolution's memory; the other part holds nothing."""
    first, second = prompts()
    table = patch.swap_table(one_path(way, layers=2), first, second, ANSWER + 1, last).set_index(["part", "layer"])
    assert table.loc[(carrier, 0), "recovery"].item() == pytest.approx(1, abs=1e-10)
    assert table.loc[(carrier, 1), "recovery"].item() == pytest.approx(0, abs=1e-10)
    assert table.loc[decoy, "recovery"].abs().max() < 1e-10
    with torch.no_grad():
        one, two = (one_path(way)(x[:, : ANSWER + 1], return_state=True)[1][0] for x in (first, second))
    assert (one.conv - two.conv).abs().max() > 0.1  # it is in both memories; only the taps that are open tell it


@pytest.mark.contract
@pytest.mark.parametrize("variant", ["s4d", "s4"])
def test_a_state_of_one_part_has_no_row_for_the_other(variant: str, pair: tuple[Tensor, Tensor]) -> None:
    table = patch.swap_table(build(variant), *pair, [2, 6], last, by_layer=False)
    assert table[["at", "part"]].to_numpy().tolist() == [[2, "h"], [6, "h"]]
    assert table["layer"].isna().all() and list(table["n"]) == [20, 20]


@pytest.mark.contract
def test_one_pair_has_a_recovery_and_no_interval(pair: tuple[Tensor, Tensor]) -> None:
    first, second = (x[:1] for x in pair)
    table = patch.swap_table(build("mamba"), first, second, 5, last).set_index("part")
    assert table["recovery_low"].isna().all() and list(table["n"].unique()) == [1]
    assert table.loc["both", "recovery"].iloc[0] == 1


@pytest.mark.contract
def test_a_place_without_a_difference_does_not_take_the_others_with_it(pair: tuple[Tensor, Tensor]) -> None:
    first, second = pair
    first = torch.cat([second[:, :2], first[:, 2:]], dim=1)
    table = patch.swap_table(build("mamba"), first, second, [2, 6], last, by_layer=False).set_index(["at", "part"])
    assert table.loc[2, "recovery"].isna().all()
    assert table.loc[(6, "both"), "recovery"] == 1 and table.loc[(6, "both"), "recovery_low"] == 1
    asked = []
    with pytest.raises(BadArgument, match="at=9"):
        patch.swap_table(build("mamba"), first, second, [6, 9], lambda out: asked.append(out) or last(out))
    assert not asked


@pytest.mark.contract
def test_what_cannot_be_swapped_is_refused_in_one_line(pair: tuple[Tensor, Tensor]) -> None:
    first, second = pair
    transformer = models.build("transformer", d_model=8, n_layers=1, n_heads=2, d_in=5, d_out=1).double().eval()
    mamba, s4d = build("mamba"), build("s4d")
    for call, message in (
        (lambda: patch.swap_states(transformer, first, second, 4), "no recurrent state"),
        (lambda: patch.swap_states(Linear(5, LENGTH), first, second, 4), "carries no state"),
        (lambda: patch.swap_states(s4d, first, second, 4, parts=("conv",)), "has no conv: it has h"),
        (lambda: patch.swap_states(mamba, first, second, 4, parts=("g",)), 'no value of parts is called "g"'),
        (lambda: patch.swap_states(mamba, first, second, 4, layers=[2]), "layer=2"),
        (lambda: patch.swap_states(mamba, first, second, 0), "at=0"),
        (lambda: patch.swap_states(mamba, first, second, 9), "at=9"),
        (lambda: patch.swap_states(mamba, first[:3], second, 4), "swapped in pairs"),
        (lambda: patch.swap_table(mamba, first, first, 4, last), "no difference to recover"),
    ):
        with pytest.raises(BadArgument, match=message) as error:
            call()
        assert "\n" not in str(error.value)
