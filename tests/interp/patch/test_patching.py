"""Activation patching moves what it names, finds the answer and no decoy, and changes nothing from a run to itself."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import hooks
import models
from hooks.errors import BadArgument, NonFinite, UnknownSite
from interp import patch
from tests.hooks.conftest import build, left_on
from tests.interp.planted import ANSWER, DECOY, LENGTH, Linear, last, one_path, prompts


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# --- what the patch does ------------------------------------------------------------------------


@pytest.mark.planted
@pytest.mark.parametrize("kind", ["hook_resid_pre", "mixer.hook_x_in", "mixer.hook_write"])
def test_the_answer_is_found_and_the_decoy_gives_nothing(kind: str) -> None:
    model, (clean, corrupted) = one_path(), prompts()
    table = patch.activations(model, clean, corrupted, f"blocks.0.{kind}", last).set_index("pos")
    assert table.loc[ANSWER, "recovery"] == pytest.approx(1, abs=1e-12)
    others = [t for t in range(LENGTH) if t != ANSWER]
    assert table.loc[others, ["effect", "effect_low", "effect_high", "recovery"]].abs().max().max() == 0
    with torch.no_grad():
        record = [hooks.record(model, x, f"blocks.0.{kind}")[f"blocks.0.{kind}"] for x in (clean, corrupted)]
    moved = (record[0] - record[1]).flatten(2).norm(dim=2)
    torch.testing.assert_close(moved[:, DECOY], moved[:, ANSWER])  # the decoy is changed by as much


@pytest.mark.planted
def test_the_state_carries_the_answer_from_the_token_on() -> None:
    """A patched state propagates: any position from the answer on will do, and none before it."""
    model, (clean, corrupted) = one_path(), prompts()
    name = "blocks.0.mixer.hook_state"
    table = patch.activations(model, clean, corrupted, name, last).set_index("pos")
    np.testing.assert_allclose(table.loc[ANSWER:, "recovery"], 1, rtol=0, atol=1e-12)
    assert table.loc[: ANSWER - 1, "recovery"].abs().max() == 0
    read = patch.activations(model, clean, corrupted, name, last, readout_only=True).set_index("pos")
    assert read.loc[: LENGTH - 2, "recovery"].abs().max() == 0
    assert read.loc[LENGTH - 1, "recovery"] == pytest.approx(1, abs=1e-12)


@pytest.mark.law
def test_in_a_linear_model_each_effect_is_its_closed_form() -> None:
    model = Linear()
    clean, corrupted = torch.randn(2, 6, LENGTH, 4, dtype=torch.float64)
    table = patch.activations(model, clean, corrupted, "hook_x_in", last).set_index("pos")
    weight = (model.A @ model.w)[:, 0].detach()
    expected = model.mix[-1].detach() * ((clean - corrupted) @ weight).mean(0)
    np.testing.assert_allclose(table["effect"], expected, rtol=1e-10, atol=1e-12)
    assert list(table["n"].unique()) == [6]


@pytest.mark.edit
@pytest.mark.parametrize("variant", ["mamba", "lti", "s4d", "s4"])
def test_a_patch_is_the_edit_with_the_clean_runs_value(variant: str, x: Tensor) -> None:
    """Also where the run starts at the patched layer."""
    model, clean, corrupted = build(variant), x, x.roll(1, 0)
    names = ["hook_embed", "blocks.1.hook_resid_pre", "blocks.1.mixer.hook_delta", "blocks.0.mixer.hook_state"]
    found = patch.patched(model, clean, corrupted, names, last, positions=[0, 4])
    record = hooks.record(model, clean, names)
    assert len(found.cells) == 8
    for (name, pos), value in zip(found.cells, found.values, strict=True):
        change = hooks.set_to(record[name][:, pos : pos + 1], pos=[pos])  # type: ignore[operator]
        with torch.no_grad(), hooks.edit(model, {name: change}):
            torch.testing.assert_close(value, last(model(corrupted)), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.clean, last(model(clean)).detach())
    torch.testing.assert_close(found.corrupted, last(model(corrupted)).detach())
    constant = variant != "mamba"
    for (name, pos), value in zip(found.cells, found.values, strict=True):
        same = bool((value == found.corrupted).all())
        assert same is (constant and name.endswith("delta")), (name, pos)


@pytest.mark.law
@pytest.mark.parametrize("variant", ["mamba", "lti", "s4d", "s4", "linear_attention", "transformer"])
def test_a_run_patched_from_itself_changes_no_bit(variant: str, x: Tensor) -> None:
    shape: dict[str, Any] = {"d_model": 8, "n_layers": 2, "n_heads": 2, "d_in": 5, "d_out": 1}
    model = build(variant) if variant in ("mamba", "lti", "s4d", "s4") else models.build(variant, **shape)
    model, x = model.float().eval(), x.float()
    found = patch.patched(model, x, x, "*", last, positions=[1])
    assert torch.equal(found.values, found.clean.expand_as(found.values))
    assert {label for label, _ in found.cells} == set(model.hook_dict)
    other = patch.patched(model, x.roll(1, 0), x, "hook_embed", last, positions=[1])
    assert (other.values - other.corrupted).abs().min() > 1e-7
    table = found.table()
    assert table["effect"].abs().max() == 0 and table["recovery"].isna().all()
    assert left_on(model) == []


@pytest.mark.edit
def test_groups_of_sites_and_of_positions_are_patched_together(x: Tensor) -> None:
    model, clean, corrupted = build("mamba"), x, x.roll(1, 0)
    groups = {"everything that enters": "hook_embed", "both layers": "blocks.*.mixer.hook_write"}
    table = patch.activations(
        model, clean, corrupted, groups, last, positions={"even": [0, 2, 4, 6], "odd": [1, 3, 5], "all": range(7)}
    )
    assert list(table["site"]) == ["everything that enters"] * 3 + ["both layers"] * 3
    assert list(table["pos"]) == ["even", "odd", "all"] * 2
    assert table["layer"].isna().all()
    assert table["recovery"][2] == pytest.approx(1, abs=1e-12)
    assert table["recovery"][0] != pytest.approx(1, abs=1e-3)
    whole = patch.activations(model, clean, corrupted, groups, last, positions=None)
    np.testing.assert_allclose(whole["effect"], table["effect"][[2, 5]], rtol=1e-12)
    by_hand = {
        name: hooks.resample(source=hooks.record(model, clean, name)) for name in hooks.resolve(model, "*.hook_write")
    }
    with torch.no_grad(), hooks.edit(model, by_hand):
        effect = last(model(corrupted)) - last(model(clean)).roll(1, 0)
    assert whole["effect"][1] == pytest.approx(float(effect.mean()), rel=1e-9)


@pytest.mark.contract
def test_the_table_has_a_row_for_each_site_layer_and_position(x: Tensor) -> None:
    model = build("mamba")
    sites = ["*.hook_delta", "*.hook_state_init", "head.hook_out"]
    table = patch.activations(model, x, x.roll(1, 0), sites, last)
    assert len(table) == 2 * 7 + 2 + 7
    assert table["layer"].dropna().unique().tolist() == [0, 1]
    assert table[table["kind"] == "hook_state_init"]["pos"].tolist() == ["all", "all"]
    interval = table[["effect_low", "effect", "effect_high"]].to_numpy()
    assert (np.diff(interval, axis=1) >= 0).all()
    assert table[(table["site"] == "head.hook_out") & (table["pos"] == 6)]["recovery"].item() == pytest.approx(1)


@pytest.mark.contract
def test_a_transformers_sites_are_patched(x: Tensor) -> None:
    model = models.build("transformer", d_model=8, n_layers=2, n_heads=2, d_in=5, d_out=1).double().eval()
    table = patch.activations(
        model, x, x.roll(1, 0), ["*.attn.hook_z", "*.attn.hook_pattern", "*.hook_resid_pre"], last
    )
    assert set(table["layer"]) == {0, 1} and len(table) == 6 * 7
    assert table["effect"].abs().min() >= 0 and (table.groupby("site")["effect"].agg(lambda e: e.abs().max()) > 0).all()


@pytest.mark.contract
def test_what_cannot_be_patched_is_refused(x: Tensor) -> None:
    model = build("mamba")
    for clean, sites, options, error, message in (
        (x[:, 1:], "*.hook_y", {}, BadArgument, "give one shape"),
        (x, "*.hook_yy", {}, UnknownSite, "no site matches"),
        (x, {}, {}, BadArgument, "no sites to patch"),
        (x, "*.hook_y", {"positions": [7]}, BadArgument, "outside"),
        (x, "*.hook_y", {"positions": "all"}, BadArgument, 'positions="all"'),
        (x, "*.hook_y", {"positions": []}, BadArgument, "positions=.* picks none"),
    ):
        with pytest.raises(error, match=message):
            patch.patched(model, clean, x, sites, last, **options)
    assert left_on(model) == []


class Counted:
    """``last``, and how often it was asked; NaN or inf where ``turns`` says so."""

    def __init__(self, turns: dict[int, float] | None = None) -> None:
        self.asked, self.turns = 0, turns or {}

    def __call__(self, out: Tensor) -> Tensor:
        self.asked += 1
        return last(out) * self.turns.get(self.asked - 1, 1.0)


@pytest.mark.contract
def test_one_pair_has_effects_and_empty_intervals(x: Tensor) -> None:
    """In a linear model the effect of a position is its closed form, for one pair of prompts as for many."""
    model = Linear()
    clean, corrupted = torch.randn(2, 1, LENGTH, 4, dtype=torch.float64)
    table = patch.activations(model, clean, corrupted, "hook_x_in", last)
    weight = (model.A @ model.w)[:, 0].detach()
    effect = model.mix[-1].detach() * ((clean - corrupted) @ weight)[0]
    np.testing.assert_allclose(table["effect"], effect, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(table["recovery"], effect / effect.sum(), rtol=1e-8, atol=1e-12)
    assert table[["effect_low", "effect_high", "recovery_low", "recovery_high"]].isna().all(axis=None)
    assert list(table["n"].unique()) == [1]
    same = patch.activations(model, clean, clean, "hook_x_in", last)
    assert same["effect"].abs().max() == 0 and same["recovery"].isna().all()


@pytest.mark.contract
def test_recovery_of_few_pairs_that_differ_has_no_interval() -> None:
    """One prompt of six differs, so that a resample may have none: the slope is there, its interval is not."""
    model = Linear()
    clean = torch.randn(6, LENGTH, 4, dtype=torch.float64)
    corrupted = clean.clone()
    corrupted[2] += 1
    table = patch.activations(model, clean, corrupted, "hook_x_in", last, positions=None)
    assert table["recovery"].item() == pytest.approx(1) and table["recovery_low"].isna().all()
    assert table["effect_low"].notna().all()


@pytest.mark.contract
def test_what_is_wrong_is_known_before_the_first_patch(x: Tensor) -> None:
    model, other = build("mamba"), x.roll(1, 0)
    for options, turns, error, message in (
        ({"level": 95.0}, {}, BadArgument, "level=95"),
        ({"n_boot": 0}, {}, BadArgument, "n_boot=0"),
        ({"positions": [0, 7]}, {}, BadArgument, "position 7 is outside"),
        ({"positions": {"some": [1], "others": [2, -8]}}, {}, BadArgument, "position -8 is outside"),
        ({}, {0: np.nan}, NonFinite, "metric of the corrupted run is NaN or inf for 5 of 5 prompts"),
        ({}, {1: np.inf}, NonFinite, "metric of the clean run"),
    ):
        metric = Counted(turns)
        with pytest.raises(error, match=message):
            patch.activations(model, x, other, "*.hook_y", metric, **options)
        assert metric.asked <= 2, "no patched run yet"
    assert left_on(model) == []


@pytest.mark.contract
def test_a_cell_that_is_not_finite_does_not_take_the_others_with_it(x: Tensor) -> None:
    model, other = build("mamba"), x.roll(1, 0)
    expected = patch.activations(model, x, other, "*.hook_y", last, positions=[0, 4])
    with pytest.warns(
        UserWarning, match=r"blocks\.0\.mixer\.hook_y at 4 is NaN in the table: the metric of the patched"
    ):
        found = patch.activations(model, x, other, "*.hook_y", Counted({3: np.inf}), positions=[0, 4])
    numbers = ["effect", "effect_low", "effect_high", "recovery", "recovery_low", "recovery_high"]
    assert found.loc[1, numbers].isna().all()
    pd.testing.assert_frame_equal(found.drop(1), expected.drop(1))
    assert left_on(model) == []


# --- recovery -----------------------------------------------------------------------------------


@pytest.mark.statistics
def test_recovery_is_the_slope_through_the_origin() -> None:
    rng = np.random.default_rng(0)
    f_1, f_2 = rng.normal(size=(2, 300))
    f_patch = f_2 + 0.3 * (f_1 - f_2) + 0.1 * rng.normal(size=300)
    found = patch.recovery(f_patch, f_1, f_2)
    expected = np.linalg.lstsq((f_1 - f_2)[:, None], f_patch - f_2, rcond=None)[0][0]
    assert float(found.mean) == pytest.approx(expected)
    assert float(found.low) < 0.3 < float(found.high) and float(found.high - found.low) < 0.05


@pytest.mark.statistics
def test_its_interval_covers() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(200):
        f_1, f_2 = rng.normal(size=(2, 80))
        found = patch.recovery(f_2 + 0.5 * (f_1 - f_2) + 0.5 * rng.normal(size=80), f_1, f_2, n_boot=300)
        inside += bool(found.low < 0.5 < found.high)
    assert 0.88 <= inside / 200 <= 0.99


@pytest.mark.law
def test_all_is_exactly_one_nothing_is_exactly_zero_and_columns_stand_alone() -> None:
    f_1, f_2 = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    patches = torch.stack([f_1, f_2, (f_1 + f_2) / 2], dim=1)
    found = patch.recovery(patches, f_1, f_2)
    assert found.mean[0] == found.low[0] == found.high[0] == 1
    assert found.mean[1] == found.low[1] == found.high[1] == 0
    one = patch.recovery(patches[:, 2], f_1, f_2)
    assert found.mean[2] == pytest.approx(float(one.mean)) and found.low[2] == pytest.approx(float(one.low))


@pytest.mark.contract
def test_no_difference_has_no_recovery() -> None:
    f = torch.randn(20)
    with pytest.raises(BadArgument, match="no difference to recover"):
        patch.recovery(f + 1, f, f)
    with pytest.raises(BadArgument, match=re.escape("give (n, …), (n,) and (n,)")):
        patch.recovery(f, f[:-1], f[:-1])
