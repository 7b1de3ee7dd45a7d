"""The one-layer theory models: the papers' formulas, their closed forms, and gates that are set by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hooks
import models
from hooks.errors import BadArgument
from interp import evaluate, seeds, tasks
from models import checkpoint
from models.theory import Theory, TheoryConfig, online_gradient, pattern_vote

pytestmark = pytest.mark.planted

KINDS: dict[str, dict[str, Any]] = {
    "gated": {},
    "linear": {"selection": False},
    "scan": {"bias": True, "half_life": 4.0, "start": "gaussian", "d_state": 7},
    "euler": {"rule": "euler", "d_state": 3},
}


def build(kind: str, d_in: int = 5, seed: int = 0, **config: Any) -> Theory:
    """A model of random weights, none of them zero, in fp64."""
    torch.manual_seed(seed)
    model = Theory(TheoryConfig(**{"d_in": d_in, **KINDS[kind], **config})).double()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter)
    return model


def prompts(n: int = 3, length: int = 6, d_in: int = 5, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    tokens = torch.randn(n, length, d_in, dtype=torch.float64)
    tokens[:, -1, -1] = 0
    return tokens


def gates(model: Theory, p: Tensor) -> tuple[Tensor, Tensor]:
    """G_i and ∏_i (1 − σ_i) of one prompt (pos, d_in), by the products of the paper."""
    mixer = model.blocks[0].mixer
    if not model.cfg.selection:
        return torch.ones(len(p), dtype=p.dtype), torch.zeros((), dtype=p.dtype)
    z = p @ mixer.w + (mixer.b_delta if model.cfg.bias else 0.0)
    sigma = torch.sigmoid(z)
    write = torch.log1p(torch.exp(z)) if model.cfg.rule == "euler" else sigma
    return torch.stack([write[i] * (1 - sigma[i + 1 :]).prod() for i in range(len(p))]), (1 - sigma).prod()


def formula(model: Theory, p: Tensor) -> Tensor:
    """F(P) = Σ_i G_i y_i (W_B p_i + b_B)·(W_C p_query + b_C) of one prompt."""
    mixer = model.blocks[0].mixer
    b_B, b_C = (mixer.b_B, mixer.b_C) if model.cfg.bias else (0.0, 0.0)
    G, _ = gates(model, p)
    query = mixer.W_C @ p[-1] + b_C
    return sum((G[i] * p[i, -1] * ((mixer.W_B @ p[i] + b_B) @ query) for i in range(len(p))), torch.zeros(()).double())


@pytest.mark.parametrize("length", [1, 2, 6, 33])
@pytest.mark.parametrize("kind", KINDS)
def test_the_recursion_is_the_formula(kind: str, length: int) -> None:
    model, tokens = build(kind), prompts(length=length)
    expected = torch.stack([formula(model, p) for p in tokens])
    torch.testing.assert_close(model(tokens)[:, -1, 0], expected, rtol=1e-10, atol=1e-10)
    # Watched, it goes through decay, write and state instead of the fused scan.
    with hooks.expose(model, "*.hook_state"):
        torch.testing.assert_close(model(tokens)[:, -1, 0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_every_prefix_is_a_prompt_of_its_own(kind: str) -> None:
    model, tokens = build(kind), prompts()
    whole = model(tokens)
    for k in range(tokens.shape[1]):
        torch.testing.assert_close(model(tokens[:, : k + 1])[:, -1], whole[:, k], rtol=1e-10, atol=1e-12)


def write_and_later_decays(model: Theory, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """G from the model's own sites: the share of a unit write that is left at the end; and what is left of h_0."""
    record = hooks.record(model, tokens, ["*.hook_decay", "*.hook_write"])
    decay = record["blocks.0.mixer.hook_decay"][:, :, 0, 0]
    mixer = model.blocks[0].mixer
    unit = tokens[..., -1:] * (tokens @ mixer.W_B.T + (mixer.b_B if model.cfg.bias else 0.0))
    write = (record["blocks.0.mixer.hook_write"][:, :, 0] / unit)[..., 0]
    later = torch.flip(torch.cumprod(torch.flip(decay, [1]), 1), [1])
    return write * torch.cat([later[:, 1:], torch.ones_like(later[:, :1])], 1), later[:, 0]


@pytest.mark.parametrize("kind", ["gated", "scan"])
def test_the_gates_break_a_stick(kind: str) -> None:
    model, tokens = build(kind), prompts()
    tokens[:, -1, -1] = 1.0  # a label of 0 would hide the query's own gate in the write
    G, left = write_and_later_decays(model, tokens)
    torch.testing.assert_close(G.sum(1) + left, torch.ones(3).double(), rtol=1e-10, atol=0)
    assert G.min() > 0 and left.min() > 0


def test_eulers_gates_do_not() -> None:
    tokens = prompts()
    tokens[:, -1, -1] = 1.0
    G, left = write_and_later_decays(build("euler"), tokens)
    assert (G.sum(1) + left - 1).abs().min() > 1e-2


# The table of arXiv 2509.23779 (reproduced to all digits by its closed form): d, N, loss with the paper's factor ½.
TABLE = [(10, 10, 2.6671), (10, 40, 1.1117), (20, 10, 6.858), (4, 50, 0.1884)]


def online_gradient_losses(model: Theory, d: int, n: int, prompts: int = 8000) -> Tensor:
    generator = seeds.generator("evaluate", 3)
    w = torch.randn(prompts, d, generator=generator)
    x = torch.randn(prompts, n + 1, d, generator=generator)
    y = torch.einsum("bkd,bd->bk", x, w)
    tokens = torch.cat([x, y[..., None]], dim=-1)
    tokens[:, -1, -1] = 0
    with torch.no_grad():
        return (model(tokens)[:, -1, 0] - y[:, -1]) ** 2 / 2


def standard_error(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values))


@pytest.mark.statistics
@pytest.mark.parametrize(("d", "n", "expected"), TABLE)
def test_the_scan_set_by_hand_has_the_loss_of_the_closed_form(d: int, n: int, expected: float) -> None:
    loss = online_gradient_losses(online_gradient(d, n), d, n)
    assert abs(float(loss.mean()) - expected) < 4 * standard_error(loss)
    # And it is a minimum that the test can see: another scale, or another decay under the same scale, is worse.
    scaled, forgetful = online_gradient(d, n), online_gradient(d, n)
    scaled.set_weights(W_C=1.5 * scaled.blocks[0].mixer.W_C.detach())
    forgetful.set_weights(b_delta=0.0)
    for other in (scaled, forgetful):
        worse = online_gradient_losses(other, d, n) - loss
        assert float(worse.mean()) > 4 * standard_error(worse)


def test_the_online_gradient_is_its_recursion() -> None:
    """h̃_l = α h̃_{l−1} + (1 − α) β y_l x_l, the paper's state in the space of w."""
    d, n = 3, 5
    model, tokens = online_gradient(d, n).double(), prompts(length=n + 1, d_in=d + 1)
    states = hooks.record(model, tokens, ["*.hook_state"])["blocks.0.mixer.hook_state"][:, :, 0]
    read = model.blocks[0].mixer.W_C[:, :d].detach()
    alpha, beta = 2 ** (-1 / n), float(read[0, 0])
    h = torch.zeros(3, d, dtype=torch.float64)
    for t in range(n):
        h = alpha * h + (1 - alpha) * beta * tokens[:, t, -1:] * tokens[:, t, :d]
        torch.testing.assert_close(states[:, t] @ read, h, rtol=1e-6, atol=1e-7)


def outlier_errors(model: Theory, **config: Any) -> float:
    task = tasks.build("outliers", **config)
    return float(evaluate.errors(model, task, n=300, query_only=True).mean())


@pytest.mark.parametrize("outside", [False, True])
def test_a_gate_that_reads_the_outliers_makes_them_transparent(outside: bool) -> None:
    task = tasks.build("outliers")
    gated = pattern_vote(task.mu, task.kappa_a * task.v_star, sharpness=40.0)
    linear = pattern_vote(task.mu, None)
    test = {"rule": "flip", "outside": outside}
    for alpha in (0.0, 0.3, 0.8, 0.95):
        assert outlier_errors(gated, alpha=alpha, **test) < 0.01, alpha
    for alpha in (0.0, 0.3):
        assert outlier_errors(linear, alpha=alpha, **test) < 0.01, alpha
    for alpha in (0.6, 0.8, 0.95):
        assert outlier_errors(linear, alpha=alpha, **test) > 0.9, alpha


def test_a_gate_that_reads_something_else_protects_from_nothing() -> None:
    """The decoy: the same gate, as sharp, on directions that no token has here, so that σ = ½ everywhere.

    Examples then weigh 2^−j, the last one more than all before it: the answer is wrong where that one is contaminated.
    """
    task = tasks.build("outliers")
    elsewhere = pattern_vote(task.mu, task.kappa_a * task.nu[:3], sharpness=40.0)
    wrong = outlier_errors(elsewhere, alpha=0.8, rule="flip", k_test=0.0)
    assert abs(wrong - 0.8) < 4 * math.sqrt(0.8 * 0.2 / 300)


def test_one_clean_example_close_to_the_query_is_enough_and_its_write_is_what_counts() -> None:
    task = tasks.build("outliers", alpha=0.95, rule="flip")
    model = pattern_vote(task.mu, task.kappa_a * task.v_star, sharpness=40.0)
    batch = evaluate.prompts(task, 50)
    clean_write = hooks.record(model, batch.tokens, ["*.hook_write"])["blocks.0.mixer.hook_write"].abs().sum((2, 3))
    outlier = batch.truth["outlier"][:, :-1]
    assert float(clean_write[:, :-1][outlier].max()) < 1e-6 < 1.0 < float(clean_write[:, :-1][~outlier].min())


# --- a model like the others ------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_site_fires_and_takes_part(kind: str) -> None:
    model, tokens = build(kind), prompts()
    record = hooks.record(model, tokens, "*")
    assert list(record) == hooks.sites(model).names
    for row in hooks.sites(model):
        found = tuple(record[row.name].shape)
        wanted = tuple({"batch": 3, "pos": 6}.get(a, n) for a, n in zip(row.axes, row.shape, strict=True))
        assert found == wanted, row.name
    assert torch.equal(record["blocks.0.mixer.hook_x"], tokens[..., -1:])
    assert ("blocks.0.mixer.hook_delta" in record) == model.cfg.selection
    clean = model(tokens)
    for name in hooks.sites(model).names:
        zeroed = 1.0 if name.endswith("state_init") else 0.0  # h_0 is zero already
        with hooks.edit(model, {name: hooks.set_to(zeroed)}):
            changed = model(tokens)
        same = torch.allclose(changed, clean)
        assert same == (kind == "linear" and name.endswith("hook_nothing")), name


@pytest.mark.law
@pytest.mark.parametrize("kind", KINDS)
def test_do_state_propagates_and_chunks_and_steps_are_the_whole(kind: str) -> None:
    model, tokens = build(kind), prompts()
    whole, last = model(tokens, return_state=True)
    first, state = model(tokens[:, :2], return_state=True)
    rest, end = model(tokens[:, 2:], state=state, return_state=True)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole)
    torch.testing.assert_close(end[0].h, last[0].h)
    state = None
    for t in range(tokens.shape[1]):
        out, state = model.step(tokens[:, t], state)
        torch.testing.assert_close(out, whole[:, t])
    # do(h_2 := 0) is a prompt that starts after token 2.
    with hooks.edit(model, hooks.do_state(layer=0, pos=[2], value=0.0)):
        cut = model(tokens)
    torch.testing.assert_close(cut[:, 3:], model(tokens[:, 3:]))
    assert not torch.allclose(cut[:, 3:], whole[:, 3:])


def test_the_gates_two_roles_are_apart() -> None:
    model, tokens = build("gated"), prompts()
    sigma = torch.sigmoid(tokens @ model.blocks[0].mixer.w)
    record = hooks.record(model, tokens, ["*.hook_decay", "*.hook_delta"])
    torch.testing.assert_close(record["blocks.0.mixer.hook_decay"][..., 0, 0], 1 - sigma)
    nothing = {"*.hook_delta_write": hooks.zero(pos=[1])}
    with hooks.edit(model, nothing):
        edited = hooks.record(model, tokens, ["*.hook_decay", "*.hook_write"])
    assert torch.equal(edited["blocks.0.mixer.hook_decay"], record["blocks.0.mixer.hook_decay"])
    assert not edited["blocks.0.mixer.hook_write"][:, 1].any()
    with hooks.edit(model, {"*.hook_delta_decay": hooks.zero()}):
        kept = hooks.record(model, tokens, ["*.hook_decay"])["blocks.0.mixer.hook_decay"]
    assert torch.equal(kept, torch.ones_like(kept))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_both_paths_agree_and_reach_every_weight(kind: str) -> None:
    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(tokens)[:, -1].pow(2).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model, tokens = build(kind), prompts()
    fused = gradients()
    with hooks.expose(model, "*.hook_decay"):
        torch.testing.assert_close(gradients(), fused)
    used = {name for name, _ in model.named_parameters()}
    assert set(fused) == used and all(g.any() for g in fused.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_the_same_model(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    checkpoint.save(model, tmp_path / "model.safetensors", {"task": "outliers"})
    again = models.load(tmp_path)
    assert again.cfg == model.cfg and again.card == {"task": "outliers"}
    assert torch.equal(again(prompts()), model(prompts()))
    assert type(models.build("theory", **{"d_in": 5, **KINDS[kind]})) is Theory


@pytest.mark.statistics
def test_it_starts_as_the_paper_does() -> None:
    torch.manual_seed(0)
    model = models.build("theory", d_in=31, d_state=40)
    mixer = model.blocks[0].mixer
    for weight in (mixer.W_B, mixer.W_C):
        expected = torch.zeros(40, 31)
        expected[range(30), range(30)] = 0.2
        assert torch.equal(weight, expected)
    drawn = torch.stack([models.build("theory", d_in=31).blocks[0].mixer.w.detach() for _ in range(200)])
    assert abs(float(drawn.pow(2).mean()) * 31 - 1) < 4 * math.sqrt(2 / drawn.numel())
    model = models.build("theory", d_in=3, bias=True, half_life=10.0).set_weights(w=0.0)
    delta = hooks.record(model, torch.randn(1, 4, 3), ["*.hook_delta"])["blocks.0.mixer.hook_delta"]
    torch.testing.assert_close(delta, torch.full_like(delta, math.log(2) / 10))


@pytest.mark.contract
@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"d_in": 1}, "d_in=1"),
        ({"d_state": 0}, "d_state=0"),
        ({"d_out": 2}, "d_out=2"),
        ({"rule": "bilinear"}, "zoh, euler"),
        ({"start": "zero"}, "diagonal, gaussian"),
        ({"half_life": 3.0}, "bias=True"),
        ({"half_life": 3.0, "bias": True, "selection": False}, "selection=True"),
        ({"half_life": 0.0, "bias": True}, "positive"),
    ],
)
def test_what_cannot_be_built(config: dict[str, Any], says: str) -> None:
    with pytest.raises(BadArgument, match=says) as refused:
        models.build("theory", **config)
    assert "\n" not in str(refused.value)


@pytest.mark.contract
def test_weights_that_do_not_fit_are_refused_and_change_nothing() -> None:
    model = build("gated")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(BadArgument, match='no weight "b_delta"'):
        model.set_weights(w=0.0, b_delta=1.0)
    with pytest.raises(BadArgument, match=r"W_B has shape \(5, 5\), not \(4, 5\)"):
        model.set_weights(w=0.0, W_B=torch.zeros(4, 5))
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    with pytest.raises(BadArgument, match="the state's h has shape"):
        model(prompts(), state=[models.LayerState(None, torch.zeros(3, 1, 2))])
