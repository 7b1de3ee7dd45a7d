"""Nested variance shares: planted shares are found, the parts sum to 1, and the intervals hold the truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hooks.errors import BadArgument
from interp.variance import LEVELS, content_variance, shares

KINDS = torch.arange(10) % 2


def planted(sizes: dict[str, float], n: int, seed: int = 0) -> torch.Tensor:
    """A signal (4 layers, n, 10 positions, 200 channels) whose levels have these standard deviations, centred within
    each level.
    """
    g = torch.Generator().manual_seed(seed)

    def level(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    layer = level(4, 1, 1, 1)
    channel = level(4, 1, 1, 200)
    kind = level(4, 1, 2, 200)[:, :, KINDS]
    position = level(4, 1, 10, 200)
    for k in (0, 1):
        position[:, :, k == KINDS] -= position[:, :, k == KINDS].mean(2, keepdim=True)
    parts = {
        "layer": layer - layer.mean(),
        "channel": channel - channel.mean(3, keepdim=True),
        "kind": kind - kind.mean(2, keepdim=True),
        "position": position,
        "content": level(4, n, 10, 200),
    }
    signal = torch.zeros(4, n, 10, 200, dtype=torch.float64)
    for name, size in sizes.items():
        signal = signal + size * parts[name] / parts[name].square().mean().sqrt()
    return signal


@pytest.mark.planted
@pytest.mark.parametrize("only", LEVELS)
def test_one_planted_level_takes_the_whole_variance(only: str) -> None:
    found = shares(planted({only: 2.0}, n=40), KINDS)
    expected = np.array([float(level == only) for level in LEVELS])
    np.testing.assert_allclose(found.share, expected, atol=2e-3)
    assert found.variance == pytest.approx(4.0, rel=0.02)


@pytest.mark.planted
def test_planted_shares_are_found_and_sum_to_one() -> None:
    sizes = {"layer": 1.0, "channel": 2.0, "kind": 1.5, "position": 0.5, "content": 1.2}
    found = shares(planted(sizes, n=64), KINDS)
    truth = np.array([sizes[level] ** 2 for level in LEVELS])
    np.testing.assert_allclose(found.share, truth / truth.sum(), rtol=0.03)
    np.testing.assert_allclose(found.moving, truth[2:] / truth[2:].sum(), rtol=0.03)
    assert found.share.sum() == pytest.approx(1.0, abs=1e-12)
    assert found.moving.sum() == pytest.approx(1.0, abs=1e-12)
    assert (found.low <= found.share + 1e-12).all() and (found.share <= found.high).all()


@pytest.mark.statistics
def test_no_position_share_is_invented_from_few_prompts() -> None:
    """With 5 prompts a fifth of the content variance stands in the means; it must not be called position."""
    means = [shares(planted({"content": 1.0}, n=5, seed=seed), KINDS).share[3] for seed in range(20)]
    assert abs(np.mean(means)) < 4 * np.std(means) / np.sqrt(len(means)) + 1e-3
    plain = planted({"content": 1.0}, n=5).mean(1).var().item()
    assert plain > 0.1  # what the uncorrected share would have been


@pytest.mark.statistics
@pytest.mark.slow
def test_intervals_hold_the_content_share() -> None:
    """Prompts that differ in how much their content varies: 95 % intervals hold the truth in most of 60 samples."""
    hits = 0
    for seed in range(60):
        values = planted({"channel": 1.0, "content": 1.0}, n=60, seed=seed)
        scale = 0.5 + torch.rand(60, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        content = values - values.mean(1, keepdim=True)
        values = values - content + content * scale[None, :, None, None]
        truth = (0.25 + 0.5 + 1 / 3) / (1 + 0.25 + 0.5 + 1 / 3)
        found = shares(values, KINDS, n_boot=200, seed=seed)
        hits += bool(found.low[4] <= truth <= found.high[4])
    assert hits >= 48


def test_content_variance_ranks_the_channel_that_depends_on_the_prompt() -> None:
    values = planted({"channel": 3.0, "position": 1.0}, n=30)
    values[2, :, :, 7] += torch.randn(30, 10, dtype=torch.float64)
    found = content_variance(values)
    assert int(found[2].argmax()) == 7
    torch.testing.assert_close(found[0], torch.zeros(200, dtype=torch.float64), atol=1e-12, rtol=0)


def test_refuses_one_prompt_and_a_constant() -> None:
    with pytest.raises(BadArgument, match="at least 2 prompts"):
        shares(planted({"content": 1.0}, n=1), KINDS)
    with pytest.raises(BadArgument, match="does not vary"):
        shares(torch.ones(2, 5, 10, 3), KINDS)
