"""The split of a contribution over its factors: planted mechanisms, and the product against autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import models
from analyses.attribute_outliers import factors as outlier_factors
from analyses.attribute_outliers.factors import FACTORS, Factors, Split, factors, split, split_factors
from analyses.attribute_outliers.gate import by_rank, clock, selection_gate
from analyses.attribute_outliers.parts import query
from analyses.attribute_outliers.prompts import Prompts, draw, tokens_of
from hooks.errors import BadArgument
from interp import tasks
from interp.attribute import gradient_x_activation
from interp.tasks.outliers import Outliers
from models.theory import Theory, TheoryConfig, pattern_vote

pytestmark = pytest.mark.planted

SMALL = {"d": 8, "n_pairs": 9, "M1": 2, "M2": 2, "V": 3}


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return draw(tasks.build("outliers", **SMALL), 32, 0, "ablate", 0.5, rule="flip")


def mamba(layers: int = 2) -> Any:
    torch.manual_seed(0)
    return models.build("mamba", d_model=8, n_layers=layers, d_state=4, d_in=9).eval()


def gated(prompts: Prompts) -> Theory:
    """The gate reads outliers, nothing else does."""
    task = prompts.task
    assert isinstance(task, Outliers)
    return pattern_vote(task.mu, task.v_star).eval()


def blind(prompts: Prompts) -> Theory:
    """The decoy: no gate, and a key that takes 1 from the score of an outlier, of whichever pattern."""
    task = prompts.task
    assert isinstance(task, Outliers)
    relevant = F.pad(task.mu / task.mu.square().sum(1, keepdim=True), (0, 1))
    outlier = F.pad((task.v_star / task.v_star.square().sum(1, keepdim=True)).sum(0), (0, 1)) / task.kappa_a
    model = Theory(TheoryConfig(d_in=9, d_state=3, selection=False)).eval()
    return model.set_weights(
        W_B=torch.cat([relevant, outlier[None]]), W_C=torch.cat([relevant, -relevant.sum(0)[None]])
    )


def shares(model: Any, prompts: Prompts, group: str = "outlier, same pattern", layer: int = 0) -> tuple[Split, Tensor]:
    """The split of this group, and its Shapley values per prompt as shares of the difference."""
    weight = (tokens_of(prompts.batch, prompts.groups[group]) * prompts.votes()).double()
    found = split(model, prompts.batch.tokens, prompts.cleaned(prompts.outlier).tokens, weight, layer, query)
    return found, found.factors.sum(1) / (found.twin - found.outlier).sum()


def test_a_gate_that_reads_outliers_is_found_in_write_and_forgetting(prompts: Prompts) -> None:
    """By hand: c = y σ_s ∏ (1 − σ) · ½β⁴. An outlier is not written; where the others are clean they also forget it."""
    found, share = shares(gated(prompts), prompts)
    by_name = dict(zip(FACTORS, share.tolist(), strict=True))
    for name in ("match", "value", "output gate"):
        assert abs(by_name[name]) < 1e-6, by_name
    assert by_name["write"] > 1 and by_name["forgetting"] < 0  # the twins forget each other, which takes from them
    assert found.outlier.abs().max() < 1e-4
    after = prompts.context.flip(1).cumsum(1).flip(1) - prompts.context.long()
    own = prompts.groups["outlier, same pattern"] * 0.5 ** (after + 2.0) * 0.5 * 3.0**4  # the query forgets as well
    torch.testing.assert_close(found.twin, own.sum(1).double(), rtol=1e-4, atol=1e-4)


def test_with_one_outlier_all_is_in_write(prompts: Prompts) -> None:
    """Nothing after it changes, so forgetting has no share."""
    one = draw(prompts.task, 64, 0, "ablate", 0.125, rule="flip")
    _, share = shares(gated(prompts), one)
    assert share[FACTORS.index("write")] == pytest.approx(1.0, abs=1e-6)


def test_on_the_decoy_all_is_in_match_and_nothing_in_the_gate(prompts: Prompts) -> None:
    model = blind(prompts)
    found, share = shares(model, prompts)
    assert share[FACTORS.index("match")] == pytest.approx(1.0, abs=1e-6)
    assert share.abs().sum() == pytest.approx(1.0, abs=1e-6)
    assert found.outlier.abs().max() < 1e-5 < found.twin.abs().max()
    weighed = tokens_of(prompts.batch, prompts.context)
    gate = selection_gate(model, prompts.batch.tokens, 0, query, weighed)
    torch.testing.assert_close(gate, torch.ones_like(gate))
    slopes = clock(gate, prompts.context & ~prompts.outlier, prompts.outlier, n_boot=20)
    for slope in (slopes.clean, slopes.outlier, slopes.suppressed):
        assert slope is not None and abs(float(slope.mean)) < 1e-9


@pytest.mark.parametrize("architecture", ["mamba", "linear_attention", "theory"])
def test_the_product_is_the_gradient_times_the_write(architecture: str, prompts: Prompts) -> None:
    """An independent way to the same contribution: autograd at ``hook_write``, of every layer."""
    torch.manual_seed(1)
    sizes = {
        "mamba": {"d_model": 8, "n_layers": 2, "d_state": 4, "d_in": 9},
        "linear_attention": {"d_model": 8, "n_layers": 2, "n_heads": 2, "d_mlp": 8, "d_in": 9},
        "theory": {"d_in": 9, "rule": "euler"},
    }
    model = models.build(architecture, **sizes[architecture]).eval()
    for layer in range(len(model.blocks)):
        site = f"blocks.{layer}.mixer.hook_write"
        by_autograd = gradient_x_activation(model, prompts.batch.tokens, site, query)[site].sum((-2, -1))
        found = factors(model, prompts.batch.tokens, layer, query)
        torch.testing.assert_close(found.contributions(), by_autograd.double(), rtol=1e-3, atol=1e-6)
        assert found.error < 1e-6


def test_the_six_sum_to_the_whole_difference_and_each_factor_is_seen(prompts: Prompts) -> None:
    """In the second layer of a Mamba every factor changes between the runs, the output gate and g included."""
    found, _ = shares(mamba(), prompts, layer=1)
    whole = found.twin - found.outlier
    torch.testing.assert_close(found.factors.sum(0) + found.following, whole, rtol=1e-9, atol=1e-15)
    assert (found.factors.abs().amax(1) > 0).all() and found.following.abs().max() > 0
    assert found.gap < 1e-9


def test_only_the_factor_that_differs_gets_a_share(prompts: Prompts) -> None:
    """Each factor of one run exchanged by itself, the others kept, all by hand: φ of it is everything."""
    run = factors(mamba(), prompts.batch.tokens, 1, query)
    names = {"write": "write", "value": "value", "decay": "forgetting", "gate": "output gate", "key": "match"}
    weight = torch.ones(prompts.batch.tokens.shape[:2], dtype=torch.float64)
    for attribute, factor in names.items():
        other = Factors(**{**vars(run), attribute: getattr(run, attribute) * 0.7})
        found = split_factors(run, other, weight)
        expected = torch.zeros_like(found.factors)
        expected[FACTORS.index(factor)] = found.twin - found.outlier
        torch.testing.assert_close(found.factors, expected, rtol=1e-9, atol=1e-15)
        assert expected.abs().max() > 0


def test_the_same_prompt_twice_has_nothing_to_split(prompts: Prompts) -> None:
    weight = tokens_of(prompts.batch, prompts.outlier).double()
    found = split(mamba(), prompts.batch.tokens, prompts.batch.tokens, weight, 0, query)
    assert not found.factors.any() and not found.following.any() and found.outlier.any()


def test_what_is_no_product_and_what_lacks_sites_is_refused(prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    s4d = models.build("s4d", d_model=8, n_layers=1, d_in=9).eval()
    with pytest.raises(BadArgument, match="has no hook_B, hook_C"):
        factors(s4d, prompts.batch.tokens, 0, query)
    with pytest.raises(BadArgument, match="no prompt"):
        split(mamba(), prompts.batch.tokens[:0], prompts.batch.tokens[:0], torch.zeros(0, 9), 0, query)
    monkeypatch.setattr(outlier_factors, "PRODUCT", -1.0)
    with pytest.raises(BadArgument, match="its largest deviation"):
        factors(mamba(), prompts.batch.tokens, 0, query)


def test_the_clock_of_the_hand_set_model_is_the_theorems(prompts: Prompts) -> None:
    """−log 2 for each clean example, nothing for an outlier, and log σ(−κ_a · sharpness) / σ(0) for being one."""
    clean = prompts.context & ~prompts.outlier
    weighed = tokens_of(prompts.batch, clean)
    gate = selection_gate(gated(prompts), prompts.batch.tokens, 0, query, weighed)
    found = clock(gate, clean, prompts.outlier, n_boot=50)
    assert found.clean is not None and found.outlier is not None and found.suppressed is not None
    assert float(found.clean.mean) == pytest.approx(-0.6931472, abs=1e-4)
    assert float(found.outlier.mean) == pytest.approx(0.0, abs=1e-4)
    assert float(found.suppressed.mean) == pytest.approx(float(F.logsigmoid(torch.tensor(-20.0))) + 0.6931472, abs=1e-2)
    ranked = by_rank(gate, clean)
    torch.testing.assert_close(
        torch.tensor(ranked[0]), 0.5 ** torch.arange(2.0, 6.0, dtype=torch.float64), rtol=1e-5, atol=0
    )


def test_the_clock_leaves_out_what_does_not_vary() -> None:
    gate = torch.rand(4, 5) + 0.1
    nothing = torch.zeros(4, 5, dtype=torch.bool)
    clean = torch.ones_like(nothing)
    clean[:, -1] = False
    found = clock(gate, clean, nothing, n_boot=10)
    assert found.clean is not None and found.outlier is None and found.suppressed is None
    assert clock(gate, nothing, nothing) == clock(gate, nothing, nothing)
    assert clock(gate, nothing, nothing).clean is None
    ragged = clean.clone()
    ragged[0, 1:3] = False
    ranked = by_rank(gate, ragged)
    assert ranked.shape == (4, 4) and ranked[0, :2].tolist() == gate[0, [3, 0]].double().tolist()
    assert list(map(bool, torch.tensor(ranked[0]).isnan())) == [False, False, True, True]
