"""The label transform: hand-set scans whose transform is known are found, and decoys have none; what is exact is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import eval_hermitenorm
from torch import Tensor

import models
from analyses.feature_learning.transform import (
    TOP,
    Unpaired,
    even,
    exact,
    features,
    hermites,
    labels,
    transform,
    unpaired,
    writes,
)
from interp import seeds, tasks

D, BIG, SHIFT = 4, 1e4, 200.0


def task_of(link: Any = "he3", tau: float = 0.0, **config: Any) -> Any:
    return tasks.build("single_index", d=D, r=2, n_pairs=9, link=link, tau=tau, **config)


def asked_of(task: Any, n: int = 32) -> Unpaired:
    return unpaired(task, n, seeds.generator("unpaired", 0))


def by_scipy(t: Callable[[float], float], link: int) -> np.ndarray:
    """Coefficients of t(He_link(z) / sqrt(link!)) less its mean, ÷ its standard deviation, by adaptive quadrature."""

    def mean(f: Callable[[float], float]) -> float:
        density = lambda z: math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)  # noqa: E731
        return float(quad(lambda z: f(z) * density(z), -9, 9, limit=400)[0])

    def of(z: float) -> float:
        return t(float(eval_hermitenorm(link, z)) / math.sqrt(math.factorial(link)))

    middle = mean(of)
    root = math.sqrt(mean(lambda z: (of(z) - middle) ** 2))
    he = [lambda z, k=k: eval_hermitenorm(k, z) / math.sqrt(math.factorial(k)) for k in range(TOP + 1)]
    return np.array([mean(lambda z, h=h: (of(z) - middle) * h(z)) / root for h in he])


def softplus(y: float) -> float:
    return float(np.logaddexp(0, y))


def planted(**config: str) -> Any:
    """A Mamba layer that writes Δ · y · (x_c + SHIFT) in channel c, with Δ = softplus(y − 1) unless ``config`` says.

    The norm divides by a constant, since the token carries a large one, and SiLU is the identity far from 0.
    """
    width = D + 2
    shape = {"d_model": width, "n_layers": 1, "d_state": 1, "d_conv": 1, "expand": 1, "d_in": D + 1, "dt_rank": 1}
    model: Any = models.build("mamba", **shape, **config).double()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if name.endswith("D") else 0.0)
        model.embed.linear.weight[:-1] = torch.eye(D + 1)
        model.embed.linear.bias[-1] = BIG
        block, mixer = model.blocks[0], model.blocks[0].mixer
        block.norm.weight.fill_(BIG / width**0.5)
        block.norm.weight[-1] = width**-0.5  # the constant comes out as 1
        mixer.in_proj.weight[:width, :] = torch.eye(width)
        mixer.in_proj.weight[:width, -1] = SHIFT
        mixer.conv1d.weight.fill_(1.0)
        row = torch.zeros(width, dtype=torch.float64)
        row[D], row[-1] = 1.0, -1.0  # y
        mixer.x_proj.weight[:] = row
        bias = mixer.dt_bias if config.get("selection") == "constant_step" else mixer.dt_proj.bias
        bias.fill_(-1.0)
        if config.get("selection") != "constant_step":
            mixer.dt_proj.weight.fill_(1.0)
    return model.eval()


def measured(model: Any, task: Any, order: int = 1) -> Any:
    asked = asked_of(task)
    context = task.sample(len(asked.tokens), seeds.generator("ablate", 0))
    (layer,) = writes(model, context, asked, 3)
    return transform(layer.write(), asked, order, order), transform(layer.write(held=True), asked, order, order)


@pytest.mark.planted
def test_the_gate_of_a_hand_set_scan_is_found_and_gone_with_the_step_at_its_mean() -> None:
    """y softplus(y − 1) on He_3 has the degree 1 that y has not; the published table gives .786, 1.856, 2.983."""
    whole, held = measured(planted(), task_of())
    expected = by_scipy(lambda y: y * softplus(y - 1), 3)
    np.testing.assert_allclose(whole.coefficient.mean[1:4], expected[1:4], rtol=0.04)
    ratios = whole.coefficient.mean[1:4] / whole.coefficient.mean[3]
    np.testing.assert_allclose(ratios, np.array([0.786, 1.856, 2.983]) / 2.983, rtol=0.04)
    np.testing.assert_allclose(np.sqrt(whole.share.mean[1:4]), expected[1:4], rtol=0.04)
    assert abs(held.coefficient.mean[1]) < 1e-2 and abs(held.share.mean[1]) < 1e-6
    assert held.share.mean[3] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.planted
@pytest.mark.parametrize("config", [{"selection": "constant_step"}, {"step": "tangent"}])
def test_without_the_bend_an_odd_link_keeps_its_first_degree_at_zero(config: dict[str, str]) -> None:
    """y (a + b y) of an odd y has an odd part that is linear in y: only a bend gives degree 1."""
    whole, _ = measured(planted(**config), task_of())
    assert abs(whole.share.mean[1]) < 1e-6
    bent, _ = measured(planted(), task_of())
    assert bent.share.mean[1] > 0.005
    a, b = softplus(-1), 1 / (1 + math.exp(1))
    expected = by_scipy(lambda y: y * (a + b * y) if "step" in config else y, 3)
    np.testing.assert_allclose(whole.share.mean[1:4], expected[1:4] ** 2, atol=0.02)


@pytest.mark.planted
def test_a_transform_that_cannot_find_the_direction_has_no_coefficient_there() -> None:
    """He_2 of the label z has degree 2 and no other; He_1 is its decoy, and a write without the label has none."""
    task = task_of("identity")
    asked = asked_of(task)
    y, phi = asked.labels.y.expand(32, 2, -1)[..., None], features(asked.inside, 1)
    noise = torch.randn(32, 1, 1, 3, dtype=torch.float64).expand(32, 2, y.shape[2], 3)
    for bend, degree in ((lambda y: (y**2 - 1) / 2**0.5, 2), (lambda y: y, 1)):
        made = transform(torch.cat([bend(y) * phi[..., :1], noise], dim=-1), asked, 1, 1)
        assert made is not None
        np.testing.assert_allclose(made.share.mean, np.eye(TOP + 1)[degree], atol=1e-3)
        assert (made.share.low <= made.share.mean + 1e-12).all() and (made.share.mean <= made.share.high + 1e-12).all()
    assert transform(noise + phi[..., :1], asked, 1, 1) is None
    assert transform(y, asked, 1, 1) is None  # of another order in x
    assert transform(y.clone(), asked, 0, 1) is not None


@pytest.mark.planted
def test_an_even_link_is_read_in_the_second_order() -> None:
    task = task_of("he2")
    asked = asked_of(task, 64)
    y, phi = asked.labels.y.expand(64, 2, -1)[..., None], features(asked.inside, 2)
    made = transform(torch.tanh(y) * phi, asked, 2, 2)
    assert made is not None
    np.testing.assert_allclose(made.share.mean[1:4], by_scipy(math.tanh, 2)[1:4] ** 2, atol=2e-3)
    assert even(task) and not even(task_of("he3")) and not even(task_of("relu")) and even(task_of("he4"))


@pytest.mark.planted
def test_the_curve_is_the_transform() -> None:
    task = task_of(tau=0.1)
    asked = asked_of(task)
    y, phi = asked.labels.y.expand(32, 2, -1)[..., None], features(asked.inside, 1)
    made = transform(torch.tanh(y - 0.5) * phi[..., :1], asked, 1, 1)
    assert made is not None
    weight, t = asked.labels.weight, torch.tanh(asked.labels.y - 0.5)
    t = (t - weight @ t) / (weight @ (t - weight @ t).square()).sqrt()
    near = [int((asked.labels.y - at).abs().argmin()) for at in made.at]
    inner = slice(1, -1)  # the outer bins reach far, and the mean of a bend is not the bend of the mean
    # The entries are taken with the sign that makes degree 1 positive.
    turned = np.sign(exact(task, lambda y: torch.tanh(y - 0.5))[1])
    np.testing.assert_allclose(made.curve[0][inner], turned * t[near].numpy()[inner], atol=0.12)
    assert made.coefficient.mean[1] > 0 and (np.diff(made.at) > 0).all()


@pytest.mark.definition
@pytest.mark.parametrize("form", ["sign", "gaussian"])
def test_labels_have_the_moments_of_their_law(form: str) -> None:
    every = labels(task_of("identity", 0.5, noise_form=form))
    assert float(every.weight.sum()) == pytest.approx(1)
    assert float(every.weight @ every.y.square()) == pytest.approx(1.25, abs=1e-4)
    fourth = 3 + 6 * 0.25 + (1 if form == "sign" else 3) * 0.5**4
    assert float(every.weight @ every.y**4) == pytest.approx(fourth, abs=2e-3)
    gram = every.projection.mT @ hermites(every.z)
    torch.testing.assert_close(gram, torch.eye(TOP + 1, dtype=torch.float64), rtol=0, atol=3e-2)


@pytest.mark.definition
@pytest.mark.parametrize("link", [1, 2, 3])
def test_the_exact_coefficients_are_scipys(link: int) -> None:
    task = task_of("identity" if link == 1 else f"he{link}")
    np.testing.assert_allclose(exact(task, torch.tanh), by_scipy(math.tanh, link), atol=2e-3)
    np.testing.assert_allclose(exact(task, lambda y: y), np.eye(TOP + 1)[link], atol=1e-9)


@pytest.mark.law
def test_features_are_orthonormal_and_even_or_odd() -> None:
    x = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for order, count in ((0, 1), (1, 2), (2, 3)):
        phi = features(x, order)
        assert phi.shape[1] == count
        gram = phi.mT @ phi / len(x)
        # the largest variance is that of He_2²: 14
        torch.testing.assert_close(gram, torch.eye(count, dtype=torch.float64), rtol=0, atol=4 * (14 / len(x)) ** 0.5)
        torch.testing.assert_close(features(-x, order), (-1) ** order * phi)


@pytest.mark.definition
@pytest.mark.parametrize("tokens", ["joint", "interleaved"])
def test_an_unpaired_token_is_written_after_its_own_context(tokens: str) -> None:
    """One of them again, by a run of its own."""
    torch.manual_seed(1)
    task = task_of(tau=0.1, tokens=tokens)
    model = models.build("mamba", d_model=8, n_layers=2, d_state=3, d_in=task.d_token, d_out=1).eval()
    asked, context = asked_of(task, 4), task.sample(4, seeds.generator("ablate", 0))
    found = writes(model, context, asked, 5)
    length = asked.tokens.shape[3]
    prompt = torch.cat([context.tokens[2:3, : 5 * length], asked.tokens[2, 1, 7][None]], dim=1)
    import hooks

    expected = hooks.record(model, prompt, "*.hook_write")["blocks.1.mixer.hook_write"][0, -1].flatten().double()
    torch.testing.assert_close(found[1].write()[2, 1, 7], expected, rtol=1e-4, atol=1e-6)
    assert isinstance(found[0].step, Tensor) and len(found) == 2
