"""Step-by-step solvers against the loops that define them, against least squares, and against closed forms."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hooks.errors import BadArgument, TooLarge
from interp import estimators, seeds, tasks
from interp.estimators import iterative
from interp.estimators.chains import contexts

Vector = NDArray[np.float64]


def noisy(n: int = 3, n_pairs: int = 9, d: int = 4) -> tuple[Tensor, Tensor]:
    """Inputs and labels with label noise, so that no method is exact."""
    generator = seeds.generator("probe", 0)
    x = torch.randn(n, n_pairs, d, generator=generator, dtype=torch.float64)
    w = torch.randn(n, d, 1, generator=generator, dtype=torch.float64)
    return x, (x @ w)[..., 0] + 0.5 * torch.randn(n, n_pairs, generator=generator, dtype=torch.float64)


def by_loop(x: Tensor, y: Tensor, steps: int, solve: Callable[[Vector, Vector, Vector, int], float]) -> Vector:
    """``solve(x[:k], y[:k], x_k, t)`` for every t, prompt and k ≥ 1."""
    found = np.zeros((steps + 1, *y.shape))
    for t in range(steps + 1):
        for b in range(len(y)):
            for k in range(1, y.shape[1]):
                found[t, b, k] = solve(x[b, :k].numpy(), y[b, :k].numpy(), x[b, k].numpy(), t)
    return found


def fastest(covariance: Vector) -> float:
    """2 / (largest + smallest eigenvalue that is not zero)."""
    values = np.linalg.eigvalsh(covariance)
    present = values[values > 1e-10 * values[-1]]
    return float(2 / (present[-1] + present[0]))


@pytest.mark.definition
@pytest.mark.parametrize("rate", [None, 0.05])
def test_gradient_descent_is_the_loop(rate: float | None) -> None:
    def solve(x: Vector, y: Vector, query: Vector, steps: int) -> float:
        w = np.zeros(x.shape[1])
        eta = fastest(x.T @ x / len(x)) if rate is None else rate
        for _ in range(steps):
            w = w - eta * x.T @ (x @ w - y) / len(x)
        return float(w @ query)

    x, y = noisy()
    found = iterative.gd_path(x, y, 6, rate)
    np.testing.assert_allclose(found.numpy(), by_loop(x, y, 6, solve), rtol=1e-9, atol=1e-10)


@pytest.mark.definition
@pytest.mark.parametrize("rate", [None, 0.05])
@pytest.mark.parametrize("gamma", [None, 0.03])
@pytest.mark.parametrize("form", ["iterated", "once"])
def test_gdpp_is_the_loop_over_tokens(form: str, gamma: float | None, rate: float | None) -> None:
    """The tokens of von Oswald et al.: each step changes every y by one gradient step and every x by I - γ A; the
    query's own y starts at zero and ends at minus the prediction.
    """

    def solve(x: Vector, y: Vector, query: Vector, steps: int) -> float:
        def rounder(x: Vector, query: Vector) -> tuple[Vector, Vector]:
            a = x.T @ x / len(x)
            shift = np.eye(len(a)) - (1 / (3 * np.linalg.eigvalsh(a)[-1]) if gamma is None else gamma) * a
            return x @ shift, query @ shift

        residual, answer = y.copy(), 0.0
        if form == "once":
            x, query = rounder(x, query)
        for _ in range(steps):
            eta = fastest(x.T @ x / len(x)) if rate is None else rate
            slope = x.T @ residual / len(x)
            residual, answer = residual - eta * x @ slope, answer - eta * float(query @ slope)
            if form == "iterated":
                x, query = rounder(x, query)
        return -answer

    x, y = noisy()
    found = iterative.gdpp_path(x, y, 5, rate, gamma, form)
    np.testing.assert_allclose(found.numpy(), by_loop(x, y, 5, solve), rtol=1e-8, atol=1e-9)


@pytest.mark.definition
def test_newton_is_the_loop_over_matrices() -> None:
    def solve(x: Vector, y: Vector, query: Vector, steps: int) -> float:
        a = x.T @ x / len(x)
        inverse = a / np.linalg.norm(a @ a.T)
        for _ in range(steps):
            inverse = inverse @ (2 * np.eye(len(a)) - a @ inverse)
        return float(query @ inverse @ (x.T @ y / len(x)))

    x, y = noisy()
    found = iterative.newton_path(x, y, 8)
    np.testing.assert_allclose(found.numpy(), by_loop(x, y, 8, solve), rtol=1e-8, atol=1e-9)


@pytest.mark.definition
def test_online_descent_is_the_recursion() -> None:
    x, y = noisy()
    settings = [(0.1, 1.0), (0.05, 0.9)]
    for form in ("residual", "label"):
        found = iterative.online_gd_path(x, y, settings, form)
        for s, (rate, keep) in enumerate(settings):
            for b in range(len(y)):
                w = torch.zeros(4, dtype=torch.float64)
                for k in range(y.shape[1]):
                    torch.testing.assert_close(found[s, b, k], w @ x[b, k])
                    w = keep * w
                    error = y[b, k] - w @ x[b, k] if form == "residual" else y[b, k]
                    w = w + rate * error * x[b, k]


@pytest.mark.law
def test_all_of_them_end_at_least_squares() -> None:
    x, y = noisy(n=20, n_pairs=15)
    x[..., 3] = 0  # a direction that is absent: least squares of minimum norm
    expected = estimators.build("ols")(tasks.Batch(x, y, torch.tensor([0]), torch.tensor([0] * 15), x, y, {}))
    ends = {
        "newton": iterative.newton_path(x, y, 60),
        "gdpp": iterative.gdpp_path(x, y, 60),
        "gd": iterative.gd_path(x[:, 6:], y[:, 6:], 5000),
    }
    torch.testing.assert_close(ends["newton"][-1], expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ends["gdpp"][-1], expected, rtol=1e-6, atol=1e-7)
    late = slice(6, None)  # 6 pairs and more: a condition number that 5000 steps are enough for
    short = estimators.ols_weights(x[:, 6:], y[:, 6:])
    torch.testing.assert_close(ends["gd"][-1][:, late], (short * x[:, 6:]).sum(-1)[:, late], rtol=1e-6, atol=1e-7)
    far = [(path[1] - path[-1]).square().mean().item() for path in ends.values()]
    assert min(far) > 1e-3, "the first step is not yet there"


@pytest.mark.law
def test_one_step_from_zero_is_averaging_times_the_rate() -> None:
    x, y = noisy()
    average = (estimators.averaging_weights(x, y) * x).sum(-1)
    torch.testing.assert_close(iterative.gd_path(x, y, 1, rate=0.3)[1], 0.3 * average)
    torch.testing.assert_close(iterative.gdpp_path(x, y, 1, rate=0.3)[1], 0.3 * average)
    label = iterative.online_gd_path(x, y, [(0.3, 1.0)], "label")[0]
    torch.testing.assert_close(label, 0.3 * average * torch.arange(9))


@pytest.mark.definition
def test_over_sums_a_rate_and_a_gamma_are_k_times_as_large() -> None:
    """w ← w − η (XᵀX w − Xᵀy), the gradient of the sum of squares; GD++ with γ for XᵀX."""

    def solve(x: Vector, y: Vector, query: Vector, steps: int) -> float:
        w = np.zeros(x.shape[1])
        for _ in range(steps):
            w = w - 0.02 * x.T @ (x @ w - y)
        return float(w @ query)

    x, y = noisy()
    pairs = tasks.Batch(x, y, torch.tensor([0]), torch.tensor([0] * 9), x, y, {})
    for steps in (1, 2, 5):
        found = estimators.build("gd", steps=steps, rate=0.02, over="sums")(pairs)
        np.testing.assert_allclose(found.numpy(), by_loop(x, y, steps, solve)[-1], rtol=1e-9, atol=1e-10)
        summed = estimators.build("gdpp", steps=steps, rate=0.02, gamma=0.01, over="sums")(pairs)
        for k in (2, 8):
            means = estimators.build("gdpp", steps=steps, rate=0.02 * k, gamma=0.01 * k)(pairs)
            torch.testing.assert_close(summed[:, k], means[:, k], rtol=1e-9, atol=1e-10)
    with pytest.raises(BadArgument, match="over"):
        estimators.build("gd", steps=1, over="products")


@pytest.mark.law
def test_newton_doubles_its_digits_at_each_step_and_descent_does_not() -> None:
    """One direction only, so that the prediction's error is the missing share itself: r ← r² against r ← q r."""
    x, y = noisy(n=2, n_pairs=12, d=2)
    spectrum = iterative.Spectrum.of(x, y)
    weak = spectrum.products * torch.tensor([1.0, 0.0], dtype=torch.float64)
    one = iterative.Spectrum(spectrum.values, weak)
    goal = one.predict([torch.zeros(2, 12, 2, dtype=torch.float64)])[0]
    newton = (1 - iterative.newton_path(x, y, 12, spectrum=one) / goal)[:, :, 6:]
    for before, after in pairwise(newton):
        torch.testing.assert_close(after, before.square(), rtol=1e-6, atol=1e-12)
    descent = (1 - iterative.gd_path(x, y, 3, spectrum=one) / goal)[:, :, 6:]
    torch.testing.assert_close(descent[3] / descent[2], descent[1], rtol=1e-6, atol=1e-9)
    assert float(newton[0].min()) > 0.1 and float(newton[-1].abs().max()) < 1e-9


@pytest.mark.law
def test_gdpp_is_ahead_of_descent_where_inputs_are_skewed() -> None:
    task = tasks.build("linreg", d=5, n_pairs=21, covariance="skewed")
    batch = task.sample(200, seeds.generator("probe", 1))
    error = {
        name: (path[-1] - batch.y)[:, 20].square().mean().item()
        for name, path in {
            "gd": iterative.gd_path(batch.x, batch.y, 6),
            "once": iterative.gdpp_path(batch.x, batch.y, 6, form="once"),
            "iterated": iterative.gdpp_path(batch.x, batch.y, 6),
        }.items()
    }
    assert error["iterated"] < 0.8 * error["once"] < 0.8 * error["gd"]


@pytest.mark.statistics
@pytest.mark.parametrize(("d", "n", "loss"), [(10, 10, 2.6671), (10, 40, 1.1117), (20, 20, 5.219)])
def test_online_descent_of_labels_has_the_papers_loss(d: int, n: int, loss: float) -> None:
    """(d / 2)(1 - β3² / β1) at the best β, with α = 2^(-1/N); half the squared error of the last example."""
    keep = 2 ** (-1 / n)
    c1 = keep / 2
    c2 = (1 - keep) ** 2 * keep**2 * (1 - keep ** (2 * n)) / (1 - keep**2)
    beta = c1 / (c1**2 + (d + 1) * c2)
    task = tasks.build("linreg", d=d, n_pairs=n + 1)
    batch = task.sample(40_000, seeds.generator("probe", 2))
    found = iterative.online_gd_path(batch.x, batch.y, [((1 - keep) * beta, keep)], "label")[0, :, -1]
    half = (keep * found - batch.y[:, -1]).double().square() / 2
    assert abs(float(half.mean()) - loss) < 4 * float(half.std()) / len(half) ** 0.5


@pytest.mark.contract
def test_single_precision_in_and_out_is_computed_in_double() -> None:
    x, y = noisy()
    for call in (iterative.gd_path, iterative.gdpp_path, iterative.newton_path):
        found = call(x.float(), y.float(), 9)
        assert found.dtype == torch.float32 and found.shape == (10, *y.shape)
        exact = call(x.float().double(), y.float().double(), 9)
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)
        assert not found[:, :, 0].any(), "no pair, no prediction"


@pytest.mark.contract
def test_wrong_options_are_refused() -> None:
    x, y = noisy()
    for call, message in (
        (lambda: iterative.gd_path(x, y, -1), "steps=-1"),
        (lambda: iterative.gd_path(x, y, 1, rate=0.0), "rate=0.0"),
        (lambda: iterative.gdpp_path(x, y, 1, gamma=-1.0), "gamma=-1.0"),
        (lambda: iterative.gdpp_path(x, y, 1, form="twice"), 'value of form is called "twice"'),
        (lambda: iterative.online_gd_path(x, y, [(0.1, 1.5)]), "forgetting=1.5"),
        (lambda: iterative.online_gd_path(x, y, [(float("nan"), 1.0)]), "rate=nan"),
    ):
        with pytest.raises(BadArgument, match=message):
            call()


class Largest(TorchDispatchMode):
    """The most numbers that any one tensor made meanwhile holds."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return found


@pytest.mark.contract
@pytest.mark.parametrize("name", ["gd", pytest.param("gdpp", marks=pytest.mark.slow), "newton"])
def test_only_what_is_asked_for_is_kept(name: str) -> None:
    """However many steps: no tensor is larger than the one covariance of each example, and the answer is least
    squares, which 2000 steps of each reach where there are twice as many pairs as dimensions."""
    x, y = noisy(n=3, n_pairs=13, d=4)
    batch = tasks.Batch(x, y, torch.tensor([0]), torch.tensor([0] * 13), x, y, {})
    few, many = Largest(), Largest()
    with few:
        estimators.build(name, steps=1)(batch)
    with many:
        found = estimators.build(name, steps=2000)(batch)
    assert 0 < many.numbers == few.numbers
    torch.testing.assert_close(found[:, 8:], estimators.build("ols")(batch)[:, 8:], rtol=1e-4, atol=1e-5)


@pytest.mark.contract
@pytest.mark.parametrize("path", [iterative.gd_path, iterative.gdpp_path, iterative.newton_path])
def test_the_steps_that_are_named_are_those_of_the_whole_path(path: Any) -> None:
    x, y = noisy()
    whole = path(x, y, 7)
    assert torch.equal(path(x, y, [5, 2, 7, 2]), whole[[2, 5, 7]])
    assert torch.equal(path(x, y, [0]), whole[:1]) and not torch.equal(whole[0], whole[1])


@pytest.mark.contract
def test_what_does_not_fit_is_refused_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 prompts × 9 examples after 1001 steps, twice 8 bytes each: 0.577 MB of the 0.5 MB that are half of 1 MB."""
    x, y = noisy(n=4)
    monkeypatch.setattr("interp.estimators.base.free_memory", lambda device: 1_000_000)
    with pytest.raises(TooLarge, match=r"1001 × 4 × 9 predictions take 0\.000577 GB, .*steps=\[1000\]"):
        iterative.gd_path(x, y, 1000)
    assert iterative.gd_path(x, y, [1000]).shape == (1, 4, 9)
    with pytest.raises(TooLarge, match=r"counts in 9\^40 contexts"):
        contexts(torch.zeros(4, 9, dtype=torch.int64), 9, 40)
