"""Forgetting: closed forms for constant decays, planted resets with a decoy, and a reconstruction that can fail."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hooks
import models
from hooks.errors import BadArgument
from interp.forgetting import forgetting, half_life, reset_events, resets, survival


def small(architecture: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config: dict[str, Any] = {"d_model": 6, "n_layers": 2, "d_state": 3, "d_in": 2, "d_out": 1, **options}
    return models.build(architecture, **config).eval()


def tokens(n: int = 5, length: int = 9) -> Tensor:
    return torch.randn(n, length, 2, generator=torch.Generator().manual_seed(1))


@pytest.mark.planted
def test_a_constant_decay_is_found_by_every_measure() -> None:
    """ā = 0.9 everywhere: what is left is 0.9^age, all half-lives are ln 2 / −ln 0.9."""
    with hooks.edit(model := small("mamba"), {"*.hook_decay": hooks.set_to(torch.tensor(0.9))}):
        found = forgetting(model, tokens(), 7)
    life = math.log(2) / -math.log(0.9)
    ages = torch.arange(8, dtype=torch.float64)
    torch.testing.assert_close(
        survival(found.left, found.written, 1).sqrt(), (0.9**ages).expand(2, 5, 8), rtol=1e-6, atol=0
    )
    for rate in (-found.slow.log(), -found.log_decay, found.lost):
        torch.testing.assert_close(half_life(rate), torch.full((2, 12), life), rtol=1e-4, atol=0)
    assert found.error < 1e-6


@pytest.mark.definition
def test_complex_modes_forget_by_their_modulus() -> None:
    """S4D: |ā| = exp(−Δ exp(log_A_real)) for each channel and mode."""
    model = small("s4d")
    for block in model.blocks:
        block.mixer.log_A_real.data.copy_(torch.randn(6, 3))
    found = forgetting(model, tokens(), 8)
    for layer, block in enumerate(model.blocks):
        rate = block.mixer.log_dt.exp()[:, None] * block.mixer.log_A_real.exp()
        torch.testing.assert_close(half_life(-found.slow.log())[layer], math.log(2) / rate.amin(1), rtol=1e-3, atol=0)
        torch.testing.assert_close(-found.log_decay[layer, 0, 3], rate.mean(1), rtol=1e-4, atol=1e-7)
    assert found.error < 1e-6
    assert bool((found.left <= found.written * (1 + 1e-9)).all())


@pytest.mark.definition
def test_a_transition_matrix_forgets_by_its_products_and_eigenvalues() -> None:
    """S4: against dense matrices A = Λ − P Pᴴ in numpy, made discrete by the bilinear rule."""
    model = small("s4")
    x = tokens()
    found = forgetting(model, x, 8)
    assert found.error < 1e-5
    seen = hooks.record(model, x, "*.hook_write")
    for layer, block in enumerate(model.blocks):
        mixer = block.mixer
        left = 0.0
        write = seen[f"blocks.{layer}.mixer.hook_write"].double().numpy()
        for channel in range(6):
            matrix = dense(mixer, channel)
            size = np.abs(np.linalg.eigvals(matrix))
            assert float(found.slow[layer, 1, 3, channel]) == pytest.approx(size.max(), rel=1e-5)
            assert float(found.log_decay[layer, 1, 3, channel]) == pytest.approx(np.log(size).mean(), rel=1e-4)
            w = write[2, 3, channel, :3] + 1j * write[2, 3, channel, 3:]
            arrived = np.linalg.matrix_power(matrix, 5) @ np.concatenate([w, w.conj()])
            left += float((np.abs(arrived[:3]) ** 2).sum())
        assert float(found.left[layer, 2, 3]) == pytest.approx(left, rel=1e-4)


def dense(mixer: Any, channel: int) -> np.ndarray:
    """(I − Δ/2 A)⁻¹ (I + Δ/2 A) of the states and their conjugates, by which each state stands for a pair."""
    system, step = mixer.system(torch.float64), float(mixer.log_dt[channel].detach().exp())
    diagonal, low = (part[channel].detach().numpy() for part in (system.diagonal, system.low_rank))
    whole, both = np.concatenate([diagonal, diagonal.conj()]), np.concatenate([low, low.conj()])
    A, one = np.diag(whole) - np.outer(both, both.conj()), np.eye(len(whole))
    return np.asarray(np.linalg.solve(one - step / 2 * A, one + step / 2 * A))


@pytest.mark.planted
def test_a_cut_transition_leaves_nothing() -> None:
    model = small("s4")
    with hooks.edit(model, {"*.hook_transition": hooks.zero(pos=4)}):
        cut = forgetting(model, tokens(), 7)
    assert bool((cut.left[:, :, :4] == 0).all()) and bool((cut.left[:, :, 4:] > 0).all())
    assert cut.error < 1e-5 and float(cut.slow[:, :, 4].max()) < 1e-30


@pytest.mark.definition
def test_what_is_lost_weighs_modes_by_what_they_hold() -> None:
    """One channel, two modes with decays ½ and 1 that hold 3 and 1: (¼·9 + 1) / 10 is kept."""
    model = small("mamba", d_state=2, n_layers=1, expand=1, d_model=1)
    decay, write = torch.tensor([[0.5, 1.0]]), torch.zeros(1, 2, 1, 2)
    write[0, 0, 0] = torch.tensor([3.0, 1.0])
    with hooks.edit(model, {"*.hook_decay": hooks.set_to(decay), "*.hook_write": hooks.set_to(write)}):
        found = forgetting(model, tokens(1, 2), 1)
    assert float(found.lost[0, 0, 1, 0]) == pytest.approx(-0.5 * math.log((0.25 * 9 + 1) / 10))
    assert math.isnan(float(found.lost[0, 0, 0, 0]))
    assert float(found.slow[0, 0, 1, 0]) == 1.0
    assert float(found.log_decay[0, 0, 1, 0]) == pytest.approx(0.5 * math.log(0.5))
    assert float(found.written[0, 0, 0]) == 10 and float(found.left[0, 0, 0]) == pytest.approx(3.25)


@pytest.mark.planted
def test_a_decay_of_zero_leaves_nothing_and_no_decay_leaves_everything() -> None:
    model = small("mamba")
    with hooks.edit(model, {"*.hook_decay": hooks.zero(pos=4)}):
        cut = forgetting(model, tokens(), 7)
    assert bool((cut.left[:, :, :4] == 0).all()) and bool((cut.left[:, :, 4:] > 0).all())
    assert cut.error < 1e-6
    with hooks.edit(model, {"*.hook_decay": hooks.set_to(torch.tensor(1.0))}):
        kept = forgetting(model, tokens(), 7)
    torch.testing.assert_close(kept.left, kept.written)
    assert bool(half_life(kept.lost).isinf().all()) and bool(half_life(-kept.slow.log()).isinf().all())


@pytest.mark.law
@pytest.mark.parametrize("architecture", ["mamba", "s4d", "s4"])
def test_the_reconstruction_fails_for_states_that_the_recurrence_did_not_make(architecture: str) -> None:
    model = small(architecture)
    assert forgetting(model, tokens(), 7).error < 1e-5
    with hooks.edit(model, {"blocks.1.mixer.hook_state": hooks.scale(1.1)}, readout_only=True):
        assert forgetting(model, tokens(), 7).error > 0.05


@pytest.mark.contract
def test_survival_adds_the_tokens_of_an_example_newest_first() -> None:
    energy, base = torch.tensor([[[9.0, 1.0, 2.0, 3.0, 4.0]]]), torch.tensor([[[9.0, 2.0, 2.0, 5.0, 9.0]]])
    assert survival(energy, base, 2).tolist() == [[[0.5, 0.75]]]
    torch.testing.assert_close(survival(energy, None, 2), torch.tensor([[[1.0, 3 / 7]]], dtype=torch.float64))


def planted(where: str) -> tuple[Tensor, Tensor]:
    """Decays of 0.9 to 1 in which 200 resets are put: at tokens of kind 1, or at any token but the first."""
    generator = torch.Generator().manual_seed(0)
    slow = 0.9 + 0.1 * torch.rand(1, 20, 21, 6, generator=generator)
    kinds = torch.arange(21) % 2
    at = kinds.nonzero()[:, 0] if where == "kind 1" else torch.arange(1, 21)
    for _ in range(200):
        prompt, place, channel = (int(torch.randint(n, (), generator=generator)) for n in (20, len(at), 6))
        slow[0, prompt, at[place], channel] = 0.1
    return slow, kinds


@pytest.mark.planted
def test_resets_at_one_kind_of_token_are_found_and_those_at_random_are_not() -> None:
    slow, kinds = planted("kind 1")
    found = resets(slow, kinds, n_perm=199)
    events = reset_events(slow, 0.5)
    assert float(found.rate[0, 0]) == 0 and float(found.rate[0, 1]) > 0.1
    assert float(found.rate[0, 1]) == pytest.approx(float(events[0, :, 1::2].double().mean()))
    assert found.p.tolist() == [[1 / 200, 1 / 200]]
    assert float(found.rate[0, 1]) > float(found.high[0, 1]) and float(found.low[0, 0]) > 0
    slow, kinds = planted("anywhere")
    decoy = resets(slow, kinds, n_perm=199)
    assert float(decoy.p.min()) > 0.05 and float(decoy.rate.min()) > 0.03
    # Permuted tokens hold the same events: 10 tokens of each kind after the first.
    torch.testing.assert_close(decoy.control.mean(1), decoy.rate.mean(1))


@pytest.mark.contract
def test_the_first_token_and_wrong_thresholds() -> None:
    slow = torch.full((1, 4, 5, 2), 0.9)
    slow[:, :, 0] = 0.0
    assert not bool(reset_events(slow, 0.5).any())
    slow[0, 2, 3, 1] = 0.44
    assert reset_events(slow, 0.5).nonzero().tolist() == [[0, 2, 3, 1]]
    for threshold in (0.0, 1.0, math.nan):
        with pytest.raises(BadArgument, match="reset="):
            reset_events(slow, threshold)


@pytest.mark.contract
def test_transitions_with_real_factors_are_refused() -> None:
    model = models.build("s4", d_model=4, n_layers=2, d_state=2, d_in=3)
    tokens = torch.randn(2, 5, 3)
    forgetting(model, tokens, 4)
    model.hook_dict["blocks.1.mixer.hook_transition"].parts = 1
    with pytest.raises(BadArgument, match=r"^forgetting\(\) reads .*blocks.1.mixer.hook_transition holds real factors"):
        forgetting(model, tokens, 4)
