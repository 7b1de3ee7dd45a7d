"""States: recording in chunks, ranks, and the total derivative against exact Jacobians and a planted cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hooks
import models
from hooks.errors import BadArgument
from interp import evaluate, states, tasks
from interp.similarity import effective_rank


def small(architecture: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config: dict[str, Any] = {"d_model": 6, "n_layers": 2, "d_state": 3, "d_in": 2, "d_out": 1, **options}
    return models.build(architecture, **config).eval()


def tokens(n: int = 5, length: int = 7) -> Tensor:
    return torch.randn(n, length, 2, generator=torch.Generator().manual_seed(1))


@pytest.mark.definition
@pytest.mark.parametrize("architecture", ["mamba", "s4d"])
def test_states_in_chunks_are_the_states_of_one_run(architecture: str) -> None:
    model, x = small(architecture), tokens()
    record = hooks.record(model, x, "*.hook_state")
    whole = list(record.values())
    parts = list(states.walk(model, x, budget=2 * sum(h[0].numel() for h in whole)))
    assert [part.stop - part.start for part, _ in parts] == [2, 2, 1]
    for layer, expected in enumerate(whole):
        torch.testing.assert_close(torch.cat([layers[layer][0] for _, layers in parts]), expected)
        torch.testing.assert_close(states.at(model, x, [0, 6])[layer], expected[:, [0, 6]])
        torch.testing.assert_close(states.norms(model, x)[layer], expected.square().sum((2, 3)).sqrt())


@pytest.mark.contract
def test_missing_sites_are_named_in_one_line() -> None:
    model = small("mamba")
    states.need(model, ("hook_state", "hook_decay"), "this")
    with pytest.raises(BadArgument, match="a-model has no hook_attn and no hook_z: this needs") as error:
        states.need(model, ("hook_state", "hook_attn", "hook_z"), "this", "a-model")
    assert "\n" not in str(error.value)
    assert states.missing(small("s4d"), ("hook_state", "hook_B")) == ["hook_B"]


@pytest.mark.contract
def test_positions_of_queries_in_both_layouts() -> None:
    pairs = evaluate.prompts(tasks.build("linreg", d=2, n_pairs=4), 3)
    joint = evaluate.prompts(tasks.build("linreg", d=2, n_pairs=4, tokens="joint"), 3)
    assert [states.query(pairs, k) for k in range(4)] == [0, 2, 4, 6] and states.stride(pairs) == 2
    assert [states.query(joint, k) for k in range(4)] == [0, 1, 2, 3] and states.stride(joint) == 1


@pytest.mark.definition
@pytest.mark.parametrize("layout", ["interleaved", "joint"])
def test_the_first_query_alone_has_nothing_before_it_and_no_label(layout: str) -> None:
    batch = evaluate.prompts(tasks.build("linreg", d=2, n_pairs=4, tokens=layout), 3)
    x = torch.cat([batch.x[:, :1], torch.zeros(3, 1, 1)], dim=-1) if layout == "joint" else batch.x[:, :1]
    torch.testing.assert_close(states.alone(batch), x)
    assert (batch.tokens[:, :1] == states.alone(batch)).all() == (layout == "interleaved")


@pytest.mark.planted
def test_rank_across_prompts_is_that_of_the_centred_states() -> None:
    """Three equal directions around a large common state: 3, whereas without centring the common one hides them."""
    direction = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(0)).double())[0][:3]
    sides = torch.cat([torch.eye(3), -torch.eye(3)]).double()
    rows = sides @ direction + 100.0
    assert states.rank_across(rows) == pytest.approx(3, rel=1e-9)
    assert float(effective_rank(rows)) < 1.2


def exact(model: nn.Module, x: Tensor, position: int) -> Tensor:
    """‖∂h_t/∂x_s‖_F² (layer, s) of one prompt, from the whole Jacobian."""

    def state(leaf: Tensor) -> tuple[Tensor, ...]:
        record = hooks.record(model, leaf, "*.hook_state", grad=True)
        return tuple(h[0, position] for h in record.values())

    jacobians: Any = torch.autograd.functional.jacobian(state, x)
    return torch.stack([jacobian.square().sum((0, 1, 2, 4)) for jacobian in jacobians])


@pytest.mark.definition
@pytest.mark.parametrize("architecture", ["mamba", "s4d"])
def test_reach_is_an_unbiased_estimate_of_the_jacobian(architecture: str) -> None:
    """The mean of many probes within 4 standard errors of the whole Jacobian, for every layer and source; and the
    spread of single probes is sqrt(2 / participation ratio), between sqrt(2 / 2) and sqrt(2) for tokens of two numbers.
    """
    model, x = small(architecture), tokens(1, 5)
    expected = exact(model, x, 3)
    single = states.reach(model, x.expand(400, 5, 2), 3).transpose(0, 1)  # each copy has its own probe
    off = (single.mean(0) - expected)[:, :4] / (single.std(0)[:, :4] / 400**0.5)
    assert float(off.abs().max()) < 4
    assert bool((expected[:, :4] > 0).all())
    assert bool((single[..., 4] == 0).all()) and bool((expected[:, 4] == 0).all())
    spread = (single.std(0) / single.mean(0))[:, :4]
    assert float(spread.min()) > 0.8 and float(spread.max()) < 1.8
    more = states.reach(model, x.expand(50, 5, 2), 3, probes=16).transpose(0, 1)
    assert float((more.std(0) / more.mean(0))[:, :4].max()) < 1.5 * 2**0.5 / 4


@pytest.mark.planted
def test_reach_sees_a_cut_and_only_behind_it() -> None:
    """One layer without taps whose decays are 0 at position 3: nothing before it reaches t = 5, everything after does.
    The decoy, decays of 0 at a later position than t, cuts nothing.
    """
    model, x = small("mamba", n_layers=1, d_conv=1), tokens(3)
    with hooks.edit(model, {"*.hook_decay": hooks.zero(pos=3)}):
        cut = states.reach(model, x, 5)[0]
    with hooks.edit(model, {"*.hook_decay": hooks.zero(pos=6)}):
        decoy = states.reach(model, x, 5)[0]
    assert bool((cut[:, :3] == 0).all()) and bool((cut[:, 3:6] > 0).all())
    assert bool((decoy[:, :6] > 0).all())


@pytest.mark.law
@pytest.mark.parametrize("architecture", ["mamba", "s4d"])
def test_derivatives_agree_with_differences_unless_a_gradient_is_tampered_with(architecture: str) -> None:
    model, x = small(architecture), tokens(3)
    trained = [weight.requires_grad_(i > 0).requires_grad for i, weight in enumerate(model.parameters())]
    assert states.reach_gap(model, x, 5) < 5e-3
    states.reach(model, x, 5)
    assert [weight.requires_grad for weight in model.parameters()] == trained  # as they were
    with hooks.edit(model, {}, backward={"blocks.1.hook_resid_pre": lambda g: 3 * g}):
        assert states.reach_gap(model, x, 5) > 0.05


@pytest.mark.contract
def test_tokens_that_are_integers_have_no_derivative() -> None:
    with pytest.raises(BadArgument, match="real vectors"):
        states.reach(small("mamba"), torch.zeros(2, 3, dtype=torch.long), 1)
    with pytest.raises(BadArgument, match="probes"):
        states.reach(small("mamba"), tokens(), 1, probes=0)
