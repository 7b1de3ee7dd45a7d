"""Mamba against a few lines of numpy, and the laws of every stack of it: state, chunks, causality, the twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hooks
import models
from models.mamba import CausalConv, Mamba, MambaConfig

LENGTHS = [1, 2, 3, 11, 33]


def build(dtype: torch.dtype = torch.float64, **config: Any) -> Mamba:
    shape = {"d_model": 8, "n_layers": 2, "d_state": 4, "d_in": 5, "d_out": 3, **config}
    model = Mamba(MambaConfig(**shape)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.3 * torch.randn_like(parameter)
            if name.endswith(("dt_proj.bias", "dt_bias")):
                parameter += 2
    return model


def tokens(length: int = 11, batch: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, length, 5, dtype=dtype)


# --- the definition, written a second time ----------------------------------------------------


def silu(z: np.ndarray) -> np.ndarray:
    return z / (1 + np.exp(-z))


def numpy_mixer(w: dict[str, np.ndarray], r: np.ndarray, n: int) -> np.ndarray:
    """The mixer on one sequence r (pos, d_model), one token and one state at a time."""
    out = []
    width, taps = w["conv1d.weight"].shape[0], w["conv1d.weight"].shape[2]
    window, h = np.zeros((taps, width)), np.zeros((width, n))
    for token in r:
        both = w["in_proj.weight"] @ token + w.get("in_proj.bias", 0)
        window = np.concatenate([window[1:], both[None, :width]])
        x = silu((w["conv1d.weight"][:, 0].T * window).sum(0) + w.get("conv1d.bias", 0))
        if "x_proj.weight" in w:
            low = w["x_proj.weight"] @ x
            rank = len(low) - 2 * n
            step = w["dt_proj.weight"] @ low[:rank] + w["dt_proj.bias"]
            B, C = low[rank : rank + n], low[rank + n :]
        else:
            step, B, C = w["dt_bias"], w["B"], w["C"]
        delta = np.logaddexp(0, step)
        for d in range(width):
            for k in range(n):
                h[d, k] = np.exp(-delta[d] * np.exp(w["A_log"][d, k])) * h[d, k] + delta[d] * B[k] * x[d]
        y = h @ C + w["D"] * x
        out.append(w["out_proj.weight"] @ (y * silu(both[width:])) + w.get("out_proj.bias", 0))
    return np.stack(out)


def numpy_model(model: Mamba, x: np.ndarray) -> np.ndarray:
    """The whole regression model on one sequence."""
    w = {name: value.detach().double().numpy() for name, value in model.named_parameters()}
    eps = model.cfg.norm_eps

    def norm(r: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return r / np.sqrt((r**2).mean(-1, keepdims=True) + eps) * weight

    r = x @ w["embed.linear.weight"].T + w["embed.linear.bias"]
    for i in range(model.cfg.n_layers):
        stem = f"blocks.{i}.mixer."
        part = {name.removeprefix(stem): value for name, value in w.items() if name.startswith(stem)}
        r = r + numpy_mixer(part, norm(r, w[f"blocks.{i}.norm.weight"]), model.cfg.d_state)
    return norm(r, w["ln_final.weight"]) @ w["head.linear.weight"].T + w["head.linear.bias"]


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"bias": True},
    "no convolution bias": {"conv_bias": False},
    "one tap": {"d_conv": 1},
    "two taps": {"d_conv": 2},
    "three taps": {"d_conv": 3},
    "one state": {"d_state": 1},
    "expansion 3, rank 5": {"expand": 3, "dt_rank": 5},
    "the twin": {"selective": False},
    "the twin, one tap, biases": {"selective": False, "d_conv": 1, "bias": True},
}


@pytest.mark.definition
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("length", [1, 2, 9])
def test_the_model_is_the_definition(config: str, length: int) -> None:
    model, x = build(**CONFIGS[config]), tokens(length)
    expected = torch.from_numpy(np.stack([numpy_model(model, sequence) for sequence in x.numpy()]))
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)
    with hooks.expose(model):
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.definition
@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float32, 2e-4, 2e-5), (torch.bfloat16, 0.1, 0.2)])
@pytest.mark.parametrize("selective", [True, False])
def test_lower_precision_stays_close_to_the_definition(
    dtype: torch.dtype, rtol: float, atol: float, selective: bool
) -> None:
    model, x = build(selective=selective), tokens()
    expected = model(x)
    low = model.to(dtype)
    output = low(x.to(dtype))
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), low.double()(x.to(dtype).double()), rtol=rtol, atol=atol)
    torch.testing.assert_close(output.double(), expected, rtol=3 * rtol, atol=3 * atol)


@pytest.mark.definition
@pytest.mark.parametrize("selective", [True, False])
def test_the_scan_stays_in_fp32_in_a_bf16_model(selective: bool) -> None:
    model, x = build(torch.bfloat16, selective=selective), tokens(dtype=torch.bfloat16)
    values = hooks.record(model, x, "blocks.1.mixer.*")
    wide = {"delta_pre", "delta", "delta_decay", "delta_write", "B", "C", "state_init", "decay", "write", "state"}
    for name, value in values.items():
        kind = name.rsplit("hook_", 1)[-1]
        assert value.dtype == (torch.float32 if kind in wide else torch.bfloat16), name
    _, state = model(x, return_state=True)
    assert state[0].h.dtype == torch.float32 and state[0].conv.dtype == torch.bfloat16


@pytest.mark.definition
def test_the_two_paths_agree_under_autocast() -> None:
    """The read-out C h is in fp32 on the fused path; autocast must not put the other one into bf16."""
    model, x = build(torch.float32), tokens(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = hooks.record(model, x, "*.hook_y")
        exposed = hooks.record(model, x, ["*.hook_y", "*.hook_state", "*.hook_out"])
    assert exposed["blocks.0.mixer.hook_out"].dtype == torch.bfloat16, "autocast is on"
    torch.testing.assert_close(fused["blocks.0.mixer.hook_y"], exposed["blocks.0.mixer.hook_y"], rtol=1e-5, atol=1e-6)


@pytest.mark.definition
@pytest.mark.parametrize("taps", [1, 2, 3, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_the_convolution_is_torchs(taps: int, bias: bool) -> None:
    ours = CausalConv(6, taps, bias).double()
    x, before = torch.randn(2, 7, 6, dtype=torch.float64), torch.randn(2, 6, taps - 1, dtype=torch.float64)
    padded = torch.cat([before, x.transpose(1, 2)], dim=2)
    expected = torch.nn.functional.conv1d(padded, ours.weight, ours.bias, groups=6).transpose(1, 2)
    torch.testing.assert_close(ours(x, before), expected)


@pytest.mark.definition
def test_gradients_are_those_of_the_definition() -> None:
    """Every parameter and the input, by central differences, on the fused path and on the materialised one."""
    for selective in (True, False):
        model = build(selective=selective, d_model=4, n_layers=1, d_state=2)
        x = tokens(4, batch=2).requires_grad_()
        names, weights = zip(*model.named_parameters(), strict=True)

        def run(*given: Tensor) -> Tensor:
            return torch.func.functional_call(model, dict(zip(names, given[1:], strict=True)), given[0])  # noqa: B023

        assert torch.autograd.gradcheck(run, (x, *weights), fast_mode=True)
        with hooks.expose(model):
            assert torch.autograd.gradcheck(run, (x, *weights), fast_mode=True)


@pytest.mark.definition
@pytest.mark.parametrize("selective", [True, False])
def test_trap_3_second_derivatives(selective: bool) -> None:
    """A backward that can be differentiated once gives silently wrong ones under ``create_graph``."""
    model = build(selective=selective, d_model=4, n_layers=1, d_state=2)
    x = tokens(4, batch=1).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda z: model(z), (x,), fast_mode=True)
    with hooks.expose(model):
        assert torch.autograd.gradgradcheck(lambda z: model(z), (x,), fast_mode=True)


# --- laws -------------------------------------------------------------------------------------


@pytest.mark.law
@pytest.mark.parametrize("selective", [True, False])
@pytest.mark.parametrize("d_conv", [1, 2, 4])
@pytest.mark.parametrize("length", LENGTHS)
def test_steps_are_the_forward(length: int, d_conv: int, selective: bool) -> None:
    model, x = build(d_conv=d_conv, selective=selective), tokens(length)
    whole, last = model(x, return_state=True)
    torch.testing.assert_close(whole, model(x))
    state, outputs = None, []
    for t in range(length):
        out, state = model.step(x[:, t], state)
        outputs.append(out)
    torch.testing.assert_close(torch.stack(outputs, dim=1), whole)
    for ours, theirs in zip(state, last, strict=True):
        torch.testing.assert_close(ours.h, theirs.h)
        torch.testing.assert_close(ours.conv, theirs.conv)
        assert ours.h.shape == (3, 16, 4) and ours.conv.shape == (3, 16, d_conv - 1)


@pytest.mark.law
@pytest.mark.parametrize("selective", [True, False])
@pytest.mark.parametrize("d_conv", [1, 2, 4])
@pytest.mark.parametrize("cuts", [[1], [5], [10], [1, 2, 3], [4, 8], list(range(1, 11))], ids=str)
def test_chunks_are_the_whole_with_gradients(cuts: list[int], d_conv: int, selective: bool) -> None:
    """Also chunks shorter than the convolution; the gradient crosses the cuts."""
    model, x = build(d_conv=d_conv, selective=selective), tokens()
    results = []
    for pieces in ([x], torch.tensor_split(x, cuts, dim=1)):
        pieces = [piece.clone().requires_grad_() for piece in pieces]
        state, outputs = None, []
        for piece in pieces:
            out, state = model(piece, state=state, return_state=True)
            outputs.append(out)
        model.zero_grad()
        left = sum(layer.h.pow(2).sum() + layer.conv.sum() for layer in state)
        (left + torch.cat(outputs, 1).pow(3).sum()).backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        results.append((torch.cat(outputs, 1), torch.cat([piece.grad for piece in pieces], 1), gradients))
    torch.testing.assert_close(results[1], results[0])
    assert bool(results[0][1][:, 0].any())


@pytest.mark.law
@pytest.mark.parametrize("selective", [True, False])
def test_causality(selective: bool) -> None:
    """What comes later changes nothing, exactly, in values and in gradients; what came earlier does."""
    model, x = build(selective=selective), tokens().requires_grad_()
    clean = model(x)
    changed = x.detach().clone()
    changed[:, 6] += 1
    other = model(changed)
    torch.testing.assert_close(other[:, :6], clean[:, :6], rtol=1e-12, atol=1e-12)
    assert bool(((other - clean)[:, 6:].abs().amax((0, 2)) > 1e-8).all())
    gradient = torch.autograd.grad(clean[:, 6].sum(), x)[0]
    assert float(gradient[:, 7:].abs().max()) < 1e-12 and bool((gradient[:, :7].abs().amax((0, 2)) > 1e-8).all())


@pytest.mark.law
def test_the_label_of_the_query_is_not_seen() -> None:
    """Tokens x₁ y₁ x₂ y₂ …: the prediction read at x_k does not know y_k, and the one read at y_k would."""
    model, x = build(), tokens(12)
    changed = x.clone()
    changed[:, 7] = torch.randn(3, 5)
    before, after = model(x), model(changed)
    torch.testing.assert_close(after[:, 0:7:2], before[:, 0:7:2], rtol=0, atol=0)
    assert not torch.allclose(after[:, 7], before[:, 7])


@pytest.mark.law
@pytest.mark.parametrize("selective", [True, False])
def test_prompts_do_not_see_each_other(selective: bool) -> None:
    model, x = build(selective=selective), tokens()
    torch.testing.assert_close(torch.cat([model(x[:1]), model(x[1:])]), model(x))
    assert not torch.allclose(model(x[:1]), model(x[1:2]))


@pytest.mark.law
def test_the_state_is_linear_in_the_write() -> None:
    """With decay and write given, h is linear in the write: superposition of two writes is that of their states."""
    model, x = build(), tokens()
    write, state = (f"blocks.1.mixer.hook_{kind}" for kind in ("write", "state"))
    one = hooks.record(model, x, [write, state])
    other = torch.randn_like(one[write])

    def states(value: Tensor) -> Tensor:
        with hooks.edit(model, {write: hooks.set_to(value)}):
            return hooks.record(model, x, state)[state]

    torch.testing.assert_close(states(2 * one[write] + other), 2 * one[state] + states(other))


@pytest.mark.law
def test_the_twin_is_one_function_by_convolution_and_by_recurrence() -> None:
    for length in LENGTHS:
        model, x = build(selective=False), tokens(length)
        convolved = model(x)
        with hooks.expose(model):
            torch.testing.assert_close(model(x), convolved)
        torch.testing.assert_close(model(x, return_state=True)[0], convolved)
        gradients = []
        for expose in (False, True):
            model.zero_grad()
            if expose:
                with hooks.expose(model):
                    model(x).pow(2).sum().backward()
            else:
                model(x).pow(2).sum().backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.edit
@pytest.mark.parametrize(
    "kind", ["hook_delta_pre", "hook_delta", "hook_delta_decay", "hook_delta_write", "hook_B", "hook_C"]
)
def test_edits_at_one_position_of_the_twin(kind: str) -> None:
    """Δ, B and C are constants there; an edit of one position, also in place, edits that position alone."""
    model, x = build(selective=False), tokens()
    name = f"blocks.1.mixer.{kind}"
    clean = hooks.record(model, x, name)
    constant = clean[name]
    torch.testing.assert_close(constant, constant[:1, :1].expand_as(constant), rtol=0, atol=0)

    def in_place(value: Tensor, hook: Any) -> None:
        value[:, 4] = 0.25

    outputs = []
    with hooks.edit(model, {name: hooks.set_to(0.25, pos=4)}):
        found = hooks.record(model, x, name)
    outputs.append(found.output)
    expected = constant.clone()
    expected[:, 4] = 0.25
    torch.testing.assert_close(found[name], expected)
    with model.hooks(fwd_hooks=[(name, in_place)]):
        found = hooks.record(model, x, name)
        outputs.append(model(x))
    torch.testing.assert_close(found[name], expected)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)
    torch.testing.assert_close(outputs[0][:, :4], clean.output[:, :4])
    assert not torch.allclose(outputs[0][:, 4:], clean.output[:, 4:])


@pytest.mark.law
def test_the_twin_has_no_way_to_choose() -> None:
    twin, mamba = build(selective=False), build()
    x = tokens()
    for kind in ("hook_delta", "hook_B", "hook_C"):
        name = f"blocks.0.mixer.{kind}"
        value = hooks.record(twin, x, name)[name]
        assert float(value.var((0, 1)).max()) < 1e-20
        assert float(hooks.record(mamba, x, name)[name].var((0, 1)).max()) > 1e-4
    names = {name.rsplit("mixer.", 1)[-1] for name, _ in twin.named_parameters()}
    assert {"dt_bias", "B", "C"} <= names and not {"x_proj.weight", "dt_proj.weight"} & names


@pytest.mark.law
@pytest.mark.parametrize("selective", [True, False])
def test_stop_and_start_at_layer_are_the_two_halves(selective: bool) -> None:
    model, x = build(selective=selective, n_layers=3), tokens()
    whole = model(x)
    for cut in (0, 1, 2, 3, -1):
        torch.testing.assert_close(model(model(x, stop_at_layer=cut), start_at_layer=cut), whole)
    residual = model(x, stop_at_layer=1)
    torch.testing.assert_close(model(residual, start_at_layer=1, stop_at_layer=2), model(x, stop_at_layer=2))
    assert residual.shape == (3, 11, 8)
    for bad in ({"stop_at_layer": 4}, {"stop_at_layer": -4}, {"start_at_layer": 4}):
        with pytest.raises(hooks.BadArgument, match="3 layers"):
            model(x, **bad)
    with pytest.raises(hooks.BadArgument, match="start_at_layer"):
        model(residual, start_at_layer=2, stop_at_layer=1)


# --- heads, configuration, refusals -----------------------------------------------------------


@pytest.mark.contract
def test_heads() -> None:
    regression = build()
    assert regression(tokens()).shape == (3, 11, 3) and regression.head.linear.bias is not None
    classification = build(head="classification", d_out=4)
    assert classification(tokens()).shape == (3, 11, 4) and classification.head.linear.bias is not None
    tied = build(head="lm", d_out=7)
    words = torch.randint(7, (3, 11))
    assert tied(words).shape == (3, 11, 7) and tied.head.linear.bias is None
    assert tied.head.linear.weight is tied.embed.table.weight
    with torch.no_grad():
        before = hooks.record(tied, words, "hook_embed")["hook_embed"]
        tied.head.linear.weight *= 2
        torch.testing.assert_close(hooks.record(tied, words, "hook_embed")["hook_embed"], 2 * before)
    free = build(head="lm", d_out=7, tie_embeddings=False)
    assert free.head.linear.weight is not free.embed.table.weight
    out, _ = free.step(words[:, 0])
    torch.testing.assert_close(out, free(words)[:, 0])
    with pytest.raises(hooks.BadArgument, match="regression, classification, lm"):
        build(head="poetry")


@pytest.mark.contract
@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: m(torch.randn(3, 11, 4)), r"\(batch, pos, 5\)"),
        (lambda m: m(torch.randn(11, 5)), r"\(batch, pos, 5\)"),
        (lambda m: m(torch.randn(3, 0, 5)), "at least one"),
        (lambda m: m(torch.randn(0, 3, 5)), "at least one"),
        (lambda m: m(tokens(), state=m(tokens(), return_state=True)[1][:1]), "2 layers|1 layers"),
        (lambda m: m(tokens(), state=m(tokens(batch=2), return_state=True)[1]), "shape"),
        (lambda m: m(tokens(), state=build(d_state=3)(tokens(), return_state=True)[1]), "shape"),
        (lambda m: m(tokens(), state=build(d_conv=2)(tokens(), return_state=True)[1]), "shape"),
    ],
)
def test_wrong_shapes_are_refused_in_one_line(call: Callable[[Mamba], Any], says: str) -> None:
    with pytest.raises(hooks.BadArgument, match=says) as caught:
        call(build())
    assert "\n" not in str(caught.value)


@pytest.mark.contract
@pytest.mark.parametrize("field", ["d_model", "n_layers", "d_state", "d_conv", "expand", "d_in", "d_out"])
def test_sizes_below_one_are_refused(field: str) -> None:
    with pytest.raises(hooks.BadArgument, match=field):
        MambaConfig(**{field: 0})


@pytest.mark.contract
def test_initial_values_are_the_published_ones() -> None:
    """Δ log-uniform in [0.001, 0.1], A = −1 … −N, D = 1; the map that writes to the residual scaled by 1/√n_layers."""
    model = models.build("mamba", d_model=64, n_layers=4, d_in=5, d_out=1)
    mixer = model.blocks[0].mixer
    step = torch.nn.functional.softplus(mixer.dt_proj.bias.detach())
    assert float(step.min()) >= 1e-3 * 0.999 and float(step.max()) <= 0.1 * 1.001
    logs = torch.cat([torch.nn.functional.softplus(b.mixer.dt_proj.bias.detach()) for b in model.blocks]).log()
    assert abs(float(logs.mean()) - 0.5 * (np.log(1e-3) + np.log(0.1))) < 0.3
    torch.testing.assert_close(torch.exp(mixer.A_log), torch.arange(1.0, 17).repeat(128, 1))
    assert bool((mixer.D == 1).all()) and bool(mixer.dt_proj.weight.abs().max() <= 4**-0.5)
    assert model.cfg.rank == 4 and model.architecture == "mamba" and model.card == {}
    bound = 128**-0.5 / 2
    assert 0.9 * bound < float(mixer.out_proj.weight.detach().abs().max()) <= bound
