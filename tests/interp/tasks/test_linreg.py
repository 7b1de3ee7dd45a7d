"""Linear regression: what stands in a token, the covariance, running truth, the forked query."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hooks.errors import BadArgument
from interp import seeds, tasks
from interp.tasks import Batch


def sample(n: int = 4, seed: int = 0, **config: object) -> tuple[tasks.Task, Batch]:
    task = tasks.build("linreg", **config)
    return task, task.sample(n, seeds.generator("evaluate", seed))


class Recurrent(nn.Module):
    """A model with memory in two parts, a buffer of past tokens and a state, in fp64.

    ``step`` writes into the state that it is given, as recurrent caches often do.
    """

    def __init__(self, d_in: int, width: int = 7, taps: int = 3) -> None:
        super().__init__()
        self.width, self.taps, self.d_in = width, taps, d_in
        self.mix = nn.Linear(taps * d_in, width, dtype=torch.float64)
        self.cell = nn.GRUCell(width, width, dtype=torch.float64)
        self.head = nn.Linear(width, 1, dtype=torch.float64)

    def step(self, token: Tensor, state: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        if state is None:
            zeros = token.new_zeros(len(token), self.taps, self.d_in)
            state = [zeros, token.new_zeros(len(token), self.width)]
        buffer, h = state
        shifted = torch.cat([buffer[:, 1:], token[:, None]], dim=1)
        new = self.cell(self.mix(shifted.flatten(1)), h.clone())
        with torch.no_grad():
            buffer.copy_(shifted)
            h.copy_(new)
        return self.head(new), state

    def forward(self, tokens: Tensor) -> Tensor:
        state, out = None, []
        for t in range(tokens.shape[1]):
            prediction, state = self.step(tokens[:, t], state)
            out.append(prediction)
        return torch.stack(out, dim=1)


def in_double(batch: Batch) -> Batch:
    return Batch(batch.tokens.double(), batch.targets, batch.read, batch.kinds, batch.x, batch.y, batch.truth)


@pytest.mark.definition
def test_labels_are_linear_in_the_inputs() -> None:
    _, batch = sample()
    for prompt in range(4):
        for k in range(21):
            expected = torch.dot(batch.truth["w"][prompt], batch.x[prompt, k])
            torch.testing.assert_close(batch.y[prompt, k], expected)


@pytest.mark.definition
@pytest.mark.parametrize("covariance", ["isotropic", "skewed"])
def test_interleaved_tokens_hold_each_label_after_its_input_and_never_the_last(
    covariance: str,
) -> None:
    task, batch = sample(d=3, n_pairs=4, covariance=covariance)
    y = batch.y.clone()
    y[:, -1] = torch.nan  # a token made from the last label would be NaN
    rows = []
    for k in range(4):
        rows += [batch.x[:, k], torch.stack([y[:, k], 0 * y[:, 0], 0 * y[:, 0]], dim=-1)]
    torch.testing.assert_close(batch.tokens, torch.stack(rows[:-1], dim=1), rtol=0, atol=0)
    assert batch.read.tolist() == [0, 2, 4, 6]
    assert [task.kinds[kind] for kind in batch.kinds] == ["x", "y", "x", "y", "x", "y", "x"]


@pytest.mark.definition
def test_joint_tokens_hold_pairs_and_end_in_a_query_without_label() -> None:
    task, batch = sample(d=3, n_pairs=4, tokens="joint")
    assert task.d_token == 4
    torch.testing.assert_close(batch.tokens[..., :3], batch.x)
    torch.testing.assert_close(batch.tokens[:, :-1, 3], batch.y[:, :-1])
    assert not batch.tokens[:, -1, 3].any() and batch.y[:, -1].all()
    assert batch.read.tolist() == [3]
    assert [task.kinds[kind] for kind in batch.kinds] == ["pair", "pair", "pair", "query"]


@pytest.mark.definition
def test_defaults() -> None:
    task = tasks.build("linreg", d=6)
    assert task.config == {
        "d": 6,
        "n_pairs": 25,
        "tokens": "interleaved",
        "covariance": "isotropic",
    }
    assert (task.scale, task.d_token, task.d_out) == (6.0, 6, 1)


@pytest.mark.statistics
def test_isotropic_inputs_are_standard_normal() -> None:
    _, batch = sample(n=1, d=4, n_pairs=100_000)
    torch.testing.assert_close(torch.cov(batch.x[0].T), torch.eye(4), rtol=0, atol=0.02)


@pytest.mark.statistics
def test_skewed_covariance_has_eigenvalues_of_inverse_squares_and_trace_d() -> None:
    d, draws = 4, 200_000
    _, batch = sample(n=3, d=d, n_pairs=draws, covariance="skewed")
    inverse_squares = torch.tensor([1 / i**2 for i in range(d, 0, -1)], dtype=torch.float64)
    expected = d * inverse_squares / inverse_squares.sum()
    for x in batch.x.double():
        covariance = torch.cov(x.T)
        found = torch.linalg.eigvalsh(covariance)
        assert ((found / expected - 1).abs() < 4 * (2 / draws) ** 0.5).all()
        spread = float((2 * expected.square().sum() / draws).sqrt())
        assert abs(float(covariance.trace()) - d) < 4 * spread


@pytest.mark.statistics
def test_each_prompt_is_skewed_along_axes_of_its_own() -> None:
    d = 4
    _, batch = sample(n=2000, d=d, n_pairs=50, covariance="skewed")
    covariances = torch.einsum("bki,bkj->bij", batch.x, batch.x) / 50
    top = torch.linalg.eigh(covariances).eigenvectors[..., -1]
    # cos² between random directions of R^d has mean 1/d and variance 2 (d-1) / (d² (d+2)).
    cos2 = (top[0::2] * top[1::2]).sum(-1).square()
    spread = (2 * (d - 1) / (d**2 * (d + 2)) / 1000) ** 0.5
    assert abs(float(cos2.mean()) - 1 / d) < 4 * spread
    # So the prompts together are isotropic, and no single one is.
    torch.testing.assert_close(covariances.mean(0), torch.eye(d), rtol=0, atol=0.15)
    assert (torch.linalg.cond(covariances) > 4).all()


@pytest.mark.definition
def test_inactive_coordinates_vanish_after_the_rotation() -> None:
    task = tasks.build("linreg", d=5, covariance="skewed")
    whole = task.sample(4, seeds.generator("train", 0))
    part = task.sample(4, seeds.generator("train", 0), d_active=3)
    torch.testing.assert_close(part.x[..., :3], whole.x[..., :3], rtol=0, atol=0)
    assert not part.x[..., 3:].any()
    expected = (part.x * whole.truth["w"][:, None]).sum(-1)
    torch.testing.assert_close(part.y, expected)


@pytest.mark.definition
def test_variables_are_the_sums_over_the_pairs_before_each_example() -> None:
    task, batch = sample(d=3, n_pairs=8, covariance="skewed")
    found = task.variables(batch)
    x, y = batch.x.double().numpy(), batch.y.double().numpy()
    for prompt in range(4):
        for k in range(8):
            seen_x, seen_y = x[prompt, :k], y[prompt, :k]
            at = (prompt, k)
            np.testing.assert_allclose(found["XtX"][at], seen_x.T @ seen_x, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(found["Xty"][at], seen_x.T @ seen_y, rtol=1e-5, atol=1e-6)
            solved = np.linalg.pinv(seen_x) @ seen_y if k else np.zeros(3)
            np.testing.assert_allclose(found["w_ols"][at], solved, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["w"], batch.truth["w"])
    torch.testing.assert_close(found["y"], batch.y)


@pytest.mark.statistics
@pytest.mark.parametrize("covariance", ["isotropic", "skewed"])
def test_baselines_are_exact_where_they_must_be(covariance: str) -> None:
    d = 4
    task, batch = sample(n=500, d=d, covariance=covariance)
    error = {name: loss / task.scale for name, loss in task.baselines(batch).items()}
    assert set(error) == {"ols", "ridge", "averaging", "knn", "zero"}
    for name in ("ols", "ridge", "averaging", "knn"):
        torch.testing.assert_close(error[name][:, 0], error["zero"][:, 0])
    torch.testing.assert_close(error["ols"][:, d:], torch.zeros(500, 17 - d), rtol=0, atol=1e-6)
    assert float(error["ols"][:, d - 1].mean()) > 1e-3
    assert float(error["ridge"][:, -1].mean()) > 1e-4


@pytest.mark.definition
@pytest.mark.parametrize("n_pairs", [1, 2, 9])
def test_joint_predictions_are_those_of_each_prefix_with_its_query(n_pairs: int) -> None:
    task, batch = sample(d=3, n_pairs=n_pairs, tokens="joint")
    batch, model = in_double(batch), Recurrent(4)
    expected = []
    for k in range(n_pairs):
        query = torch.cat([batch.x[:, k], torch.zeros(4, 1)], dim=-1).double()
        pairs = [torch.cat([batch.x[:, i], batch.y[:, i, None]], dim=-1) for i in range(k)]
        expected.append(model(torch.stack([*pairs, query], dim=1))[:, -1, 0])
    torch.testing.assert_close(task.predict(model, batch), torch.stack(expected, dim=1))
    without_step = task.predict(lambda tokens: model(tokens), batch)
    torch.testing.assert_close(without_step, torch.stack(expected, dim=1))


@pytest.mark.law
def test_a_joint_prediction_depends_on_the_pairs_before_it_only() -> None:
    task, batch = sample(d=3, n_pairs=6, tokens="joint")
    batch, model = in_double(batch), Recurrent(4)
    before = task.predict(model, batch)
    batch.tokens[:, 3, -1] += 1
    changed = (task.predict(model, batch) != before).all(dim=0)
    assert changed.tolist() == [False, False, False, False, True, True]


@pytest.mark.statistics
def test_joint_training_draws_every_number_of_examples_alike() -> None:
    task, batch = sample(d=2, n_pairs=5, tokens="joint")
    batch, model = in_double(batch), Recurrent(3)
    every = task.loss(task.predict(model, batch), batch)
    count = torch.zeros(5)
    for step in range(400):
        one = task.training_loss(model, batch, seeds.generator("train", 0, step))
        count += torch.isclose(every, one).all(dim=0)
    assert int(count.sum()) == 400
    assert ((count - 80).abs() < 4 * (400 * 0.2 * 0.8) ** 0.5).all()


@pytest.mark.definition
def test_interleaved_training_loss_is_the_loss_of_every_example() -> None:
    task, batch = sample(d=3)
    batch, model = in_double(batch), Recurrent(3)
    generator = seeds.generator("train", 0)
    state = generator.get_state()
    found = task.training_loss(model, batch, generator)
    torch.testing.assert_close(found, (model(batch.tokens)[:, 0::2, 0] - batch.y) ** 2)
    assert torch.equal(generator.get_state(), state)


@pytest.mark.law
def test_corrupted_labels_are_unrelated_to_the_old_ones() -> None:
    task, batch = sample(n=2000)
    corrupted = task.corrupt(batch, seeds.generator("corrupt", 0))
    expected = (corrupted.x * corrupted.truth["w"][:, None]).sum(-1)
    torch.testing.assert_close(corrupted.y, expected)
    together = torch.stack([batch.y[:, 0], corrupted.y[:, 0]])
    assert abs(float(torch.corrcoef(together)[0, 1])) < 4 / 2000**0.5


@pytest.mark.contract
@pytest.mark.parametrize("tokens", ["interleaved", "joint"])
def test_a_model_that_does_not_fit_is_refused(tokens: str) -> None:
    task, batch = sample(tokens=tokens, n_pairs=3)

    class Config:
        d_in = 99

    def narrow(tokens: Tensor) -> Tensor:
        return tokens[..., :1]

    torch.testing.assert_close(task.predict(narrow, batch), batch.x[..., 0])
    with pytest.raises(BadArgument, match=r"the task needs \(4, \d, 1\)"):
        task.predict(lambda tokens: tokens[..., 0], batch)
    with pytest.raises(BadArgument, match=r"the task needs \(4, \d, 1\)"):
        task.predict(lambda tokens: tokens[:1, :, :1], batch)
    narrow.cfg = Config()  # type: ignore[attr-defined]
    with pytest.raises(BadArgument, match="tokens of width 99"):
        task.predict(narrow, batch)
