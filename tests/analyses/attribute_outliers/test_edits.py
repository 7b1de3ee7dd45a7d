"""Interventions on the outliers' gate: planted in hand-set models, and that only the chosen tokens are touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hooks
import models
from analyses.attribute_outliers import edits
from analyses.attribute_outliers.prompts import Prompts, draw
from hooks.errors import BadArgument
from interp import tasks
from interp.metric import recovery
from interp.tasks.outliers import Outliers
from models.theory import Theory, TheoryConfig, pattern_vote

pytestmark = pytest.mark.edit

SMALL = {"d": 8, "n_pairs": 9, "M1": 2, "M2": 2, "V": 3}


def prompts_of(purpose: str, alpha: float = 0.5, n: int = 32) -> Prompts:
    return draw(tasks.build("outliers", **SMALL), n, 0, purpose, alpha, rule="flip")


def planned(model: Any, prompts: Prompts, reference: Prompts | None = None) -> dict[str, edits.Intervention]:
    means = edits.Reference(model, reference or prompts_of("reference"))
    return {one.name: one for one in edits.interventions(model, prompts, means)}


def gained(model: Any, prompts: Prompts, one: edits.Intervention) -> float:
    before = edits.run(model, prompts.batch)
    return float(recovery(edits.run(model, prompts.batch, one.edits), edits.run(model, one.whole), before, 20).mean)


@pytest.fixture(scope="module")
def mamba() -> Any:
    torch.manual_seed(0)
    return models.build("mamba", d_model=8, n_layers=2, d_state=4, d_in=9).eval()


@pytest.mark.planted
def test_in_a_model_whose_gate_is_all_the_gate_recovers_all_and_the_rest_nothing() -> None:
    prompts = prompts_of("ablate")
    task = prompts.task
    assert isinstance(task, Outliers)
    model = pattern_vote(task.mu, task.v_star).eval()
    found = planned(model, prompts)
    for name in ("Δ of outliers := clean", "Δ of outliers := twin's", "Δ of clean := outliers'"):
        assert gained(model, prompts, found[name]) == pytest.approx(1.0, abs=1e-3), name
    for name in (
        "x of outliers := twin's",
        "B and C of outliers := twin's",
        "Δ of outliers := outliers'",
        edits.NOTHING,
    ):
        assert abs(gained(model, prompts, found[name])) < 1e-3, name
    assert abs(gained(model, prompts, found["Δ of as many clean := clean"])) < 1e-3
    assert edits.lacking(model) == [
        "no hook_gate: output gate cannot be exchanged",
        "no hook_x_pre: there are no taps to knock a token out of",
    ]
    # Outliers are neither written nor forget: knocked out or frozen, nothing changes; clean ones are all there is.
    before = edits.run(model, prompts.batch)
    for name in ("outliers out of the scan", "outliers frozen"):
        torch.testing.assert_close(edits.run(model, prompts.batch, found[name].edits), before, rtol=1e-4, atol=1e-4)
    gone = edits.run(model, prompts.batch, found["as many clean out of the scan"].edits)
    assert gone.abs().max() < 1e-4 < before.abs().max()


def test_the_twins_own_values_are_put_at_outliers_only(mamba: Any) -> None:
    prompts = prompts_of("ablate")
    change = planned(mamba, prompts)["Δ of outliers := twin's"].edits
    sites = ["blocks.0.mixer.hook_delta", "blocks.0.mixer.hook_x", "blocks.0.mixer.hook_B"]
    own, twin = (hooks.record(mamba, one.tokens, sites) for one in (prompts.batch, prompts.cleaned(prompts.outlier)))
    with hooks.edit(mamba, change):
        edited = hooks.record(mamba, prompts.batch.tokens, sites)
    at = prompts.outlier
    delta = edited[sites[0]]
    assert torch.equal(delta[at], twin[sites[0]][at]) and torch.equal(delta[~at], own[sites[0]][~at])
    assert not torch.equal(delta[at], own[sites[0]][at])
    for site in sites[1:]:
        assert torch.equal(edited[site], own[site])


def test_means_are_of_the_reference_and_by_kind(mamba: Any) -> None:
    reference = prompts_of("reference")
    means = edits.Reference(mamba, reference)
    delta = hooks.record(mamba, reference.batch.tokens, "blocks.1.mixer.hook_delta")["blocks.1.mixer.hook_delta"]
    clean = reference.context & ~reference.outlier
    for which, chosen in (("outlier", reference.outlier), ("clean", clean)):
        found = means.of(which, "hook_delta")["blocks.1.mixer.hook_delta"]
        torch.testing.assert_close(found, delta[chosen].mean(0).expand(9, -1))
    assert list(means.of("clean", "hook_delta_write")) == [f"blocks.{i}.mixer.hook_delta_write" for i in range(2)]


def test_means_of_x_and_y_tokens_are_apart() -> None:
    torch.manual_seed(0)
    model = models.build("mamba", d_model=8, n_layers=1, d_state=4, d_in=3).eval()
    reference = draw(tasks.build("outlier_linreg", d=3, n_pairs=6), 24, 0, "reference", 0.5)
    site = "blocks.0.mixer.hook_delta"
    delta = hooks.record(model, reference.batch.tokens, site)[site]
    found = edits.Reference(model, reference).of("outlier", "hook_delta")[site]
    for part in (0, 1):
        values = delta[:, part:10:2][reference.outlier[:, :-1]].mean(0)
        torch.testing.assert_close(found[part], values)
        torch.testing.assert_close(found[part + 4], values)
    assert not torch.allclose(found[0], found[1])


def test_every_edit_does_something_and_the_identity_nothing(mamba: Any) -> None:
    prompts = prompts_of("ablate")
    before = edits.run(mamba, prompts.batch)
    found = planned(mamba, prompts)
    assert len([one for one in found.values() if one.control]) == 9
    for name, one in found.items():
        moved = (edits.run(mamba, prompts.batch, one.edits) - before).abs().max()
        # In the last block the output gate of an earlier token reaches nothing, in the first it reaches the second.
        assert (moved == 0) == (name == edits.NOTHING), name
    assert edits.lacking(mamba) == []


@pytest.mark.parametrize(("alpha", "missing"), [(0.0, None), (1.0, "as many")])
def test_no_outliers_and_nothing_but_outliers(mamba: Any, alpha: float, missing: str | None) -> None:
    found = planned(mamba, prompts_of("ablate", alpha))
    if missing is None:
        assert found == {}
    else:
        assert found and not any(missing in name for name in found)
        assert edits.run(mamba, prompts_of("ablate", alpha).batch, found["outliers out of both"].edits).isfinite().all()


def test_outliers_of_unequal_number_are_left_out_prompt_by_prompt() -> None:
    torch.manual_seed(0)
    model = models.build("mamba", d_model=8, n_layers=1, d_state=4, d_in=3).eval()
    task = tasks.build("outlier_linreg", d=3, n_pairs=6)
    prompts, reference = (draw(task, 24, 0, purpose, 0.5) for purpose in ("ablate", "reference"))
    found = edits.run(model, planned(model, prompts, reference)["outliers out of both"].whole)
    assert len(prompts.outlier.sum(1).unique()) > 2
    for row, tokens in enumerate(prompts.batch.tokens):
        kept = [t for t in range(11) if not prompts.outlier[row, t // 2]]
        with torch.no_grad():
            alone = model(tokens[None, kept])[0, -1, 0]
        torch.testing.assert_close(found[row], alone)


@pytest.mark.planted
@pytest.mark.parametrize("share", [0.2, 0.9])
def test_in_a_model_that_sums_a_knock_out_is_the_prompt_without_the_outliers(share: float) -> None:
    """F = Σ y_i x_i·x_q / n: an outlier of length 10 costs a hundred times an example, one out of the sum nothing."""
    d, n = 3, 31
    task = tasks.build("outlier_linreg", d=d, n_pairs=n, tokens="joint", r=10.0)
    read = torch.eye(d, d + 1)
    model = Theory(TheoryConfig(d_in=d + 1, d_state=d, selection=False)).set_weights(W_B=read, W_C=read / n).eval()
    prompts, reference = (draw(task, 48, 0, purpose, share) for purpose in ("ablate", "reference"))
    found = planned(model, prompts, reference)
    x, y, kept = prompts.batch.x, prompts.batch.y, (prompts.context & ~prompts.outlier).float()
    out = found["outliers out of the scan"]
    torch.testing.assert_close(
        edits.run(model, prompts.batch, out.edits), ((kept * y)[..., None] * x).sum(1).mul(x[:, -1]).sum(1) / n
    )
    assert gained(model, prompts, out) == pytest.approx(1.0, abs=1e-3)

    def error(prediction: torch.Tensor) -> torch.Tensor:
        return (prediction - prompts.batch.targets[:, -1]).double().square()

    before, clean = (error(edits.run(model, one)) for one in (prompts.batch, prompts.cleaned(prompts.outlier)))
    shares = {
        name: edits.undone(error(edits.run(model, prompts.batch, one.edits)), before, clean)
        for name, one in found.items()
    }
    share_out = shares["outliers out of the scan"]
    assert float(share_out.mean) == pytest.approx(1.0, abs=0.03) and share_out.n == 48
    assert share_out.low <= share_out.mean <= share_out.high
    assert abs(float(shares["as many clean out of the scan"].mean)) < 0.1
    assert float(shares[edits.NOTHING].mean) == 0
    assert float(shares["x, B and C of outliers := twin's"].mean) == pytest.approx(1.0, abs=1e-4)


def test_the_undone_share_is_a_ratio_of_means_and_undefined_without_harm() -> None:
    before, after, clean = torch.tensor([4.0, 2.0] * 8), torch.tensor([1.0, 2.0] * 8), torch.tensor([0.0, 1.0] * 8)
    assert float(edits.undone(after, before, clean).mean) == pytest.approx(3 / 5)  # and not the mean of 3/4 and 0
    assert float(edits.undone(2 * before - clean, before, clean).mean) == pytest.approx(-1)
    for unharmed in (before, before + torch.tensor([1.0, -1.0] * 8), before + 1):
        with pytest.raises(BadArgument, match=r"outliers raise the error by .* nothing to undo"):
            edits.undone(after, before, unharmed)
    few = torch.where(torch.arange(16) < 11, clean, before)
    with pytest.raises(BadArgument, match="the error of 11 prompts, and at least 12"):
        edits.undone(after, before, few)


def test_what_prompts_do_not_allow_is_said() -> None:
    assert edits.undefined(prompts_of("ablate", 0.0)) == edits.undefined(prompts_of("ablate", 0.5)) == []
    assert edits.undefined(prompts_of("ablate", 0.75)) == [
        "as many clean: 32 of 32 prompts have fewer than outliers, and all of theirs are edited"
    ]
    (line,) = edits.undefined(prompts_of("ablate", 1.0))
    assert "no clean examples" in line


def test_what_a_model_lacks_is_said() -> None:
    transformer = models.build("transformer", d_model=8, n_layers=1, n_heads=1, d_in=9).eval()
    prompts = prompts_of("ablate")
    assert planned(transformer, prompts) == {}
    said = " ".join(edits.lacking(transformer))
    for site in ("hook_delta", "hook_gate", "hook_decay", "hook_write", "hook_state"):
        assert site in said
