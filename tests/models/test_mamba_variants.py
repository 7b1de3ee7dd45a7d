"""The three variants of Mamba: a direct formula, both scan paths, files, and what the published block keeps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hooks
import models
from hooks.errors import BadArgument
from models.mamba import Mamba, MambaConfig, tangent
from tests.models.test_mamba import numpy_model

VARIANTS = {
    "constant step": {"selection": "constant_step"},
    "tangent": {"step": "tangent"},
    "linear gate": {"gate": "linear"},
    "all that go together": {"selection": "constant_step", "gate": "linear"},
    "tangent and linear gate": {"step": "tangent", "gate": "linear"},
}
EVERY = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


def build(**config: Any) -> Mamba:
    """A model whose steps are wide spread, so that tangents fall below 0."""
    model = Mamba(MambaConfig(d_model=8, n_layers=2, d_state=4, d_in=5, d_out=3, **config)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def tokens(length: int = 9) -> Tensor:
    return torch.randn(3, length, 5, dtype=torch.float64)


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def by_hand(model: Mamba, i: int, r: np.ndarray) -> np.ndarray:
    """One mixer's output on one sequence of its input (pos, d_model), token by token."""
    w = {k: v.detach().numpy() for k, v in model.blocks[i].mixer.named_parameters()}
    cfg, n = model.cfg, model.cfg.d_state
    width, taps = w["conv1d.weight"].shape[0], w["conv1d.weight"].shape[2]
    window, h, out = np.zeros((taps, width)), np.zeros((width, n)), []
    for token in r:
        both = w["in_proj.weight"] @ token
        window = np.concatenate([window[1:], both[None, :width]])
        pre = (w["conv1d.weight"][:, 0].T * window).sum(0) + w["conv1d.bias"]
        x, z = pre * sigmoid(pre), both[width:]
        low = w["x_proj.weight"] @ x
        B, C = low[-2 * n : -n], low[-n:]
        bias = w["dt_bias"] if cfg.selection == "constant_step" else w["dt_proj.bias"]
        writes = forgets = np.logaddexp(0, bias)
        if cfg.selection == "content":
            u = w["dt_proj.weight"] @ low[: -2 * n] + bias
            writes = forgets = np.logaddexp(0, u)
            if cfg.step == "tangent":
                writes = np.logaddexp(0, bias) + sigmoid(bias) * (u - bias)
                forgets = np.maximum(writes, 0)
        h = np.exp(-forgets[:, None] * np.exp(w["A_log"])) * h + (writes * x)[:, None] * B
        gate = z if cfg.gate == "linear" else z * sigmoid(z)
        out.append(w["out_proj.weight"] @ ((h @ C + w["D"] * x) * gate))
    return np.stack(out)


@pytest.mark.definition
@EVERY
def test_a_mixer_is_the_formula(config: dict[str, str]) -> None:
    model = build(**config)
    found = hooks.record(model, tokens(), ["blocks.*.norm.hook_normalized", "blocks.*.mixer.hook_out"])
    for i in range(2):
        r = found[f"blocks.{i}.norm.hook_normalized"] * model.blocks[i].norm.weight.detach()
        expected = np.stack([by_hand(model, i, sequence) for sequence in r.numpy()])
        torch.testing.assert_close(
            found[f"blocks.{i}.mixer.hook_out"], torch.from_numpy(expected), rtol=1e-9, atol=1e-11
        )


@pytest.mark.definition
@EVERY
@pytest.mark.parametrize("length", [1, 2, 33])
def test_the_fused_path_is_the_materialised_one(config: dict[str, str], length: int) -> None:
    model, x = build(**config), tokens(length)
    gradients = []
    for exposed in (False, True):
        model.zero_grad()
        with hooks.expose(model) if exposed else torch.enable_grad():
            out, state = model(x, return_state=True)
            out.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        gradients[-1] |= {"out": out.detach(), "h": state[1].h.detach()}
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 2 + len(list(model.parameters()))
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name], rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.law
@EVERY
def test_chunks_and_steps_are_the_whole(config: dict[str, str]) -> None:
    model, x = build(**config), tokens()
    whole = model(x)
    first, state = model(x[:, :4], return_state=True)
    rest = []
    for t in range(4, 9):
        out, state = model.step(x[:, t], state)
        rest.append(out)
    torch.testing.assert_close(torch.cat([first, torch.stack(rest, 1)], 1), whole, rtol=1e-10, atol=1e-12)


@pytest.mark.definition
def test_the_step_that_decays_is_held_at_zero_and_the_one_that_writes_is_not() -> None:
    model, x = build(step="tangent"), tokens(33)
    found = hooks.record(model, x, "blocks.0.mixer.*")
    stem = "blocks.0.mixer.hook_"
    delta, decays, writes = (found[f"{stem}{site}"] for site in ("delta", "delta_decay", "delta_write"))
    assert (delta < -1e-3).any() and torch.equal(writes, delta) and torch.equal(decays, delta.clamp(min=0))
    assert (found[f"{stem}decay"] > 0).all() and (found[f"{stem}decay"] <= 1).all()
    u, at = found[f"{stem}delta_pre"], model.blocks[0].mixer.dt_proj.bias.detach()
    torch.testing.assert_close(delta, tangent(u, at))
    near = 1e-5 * torch.ones_like(at)
    torch.testing.assert_close(tangent(at + near, at), torch.nn.functional.softplus(at + near), rtol=0, atol=1e-9)
    # linear in u, which softplus is not
    torch.testing.assert_close(tangent(at + 4, at) - tangent(at + 2, at), tangent(at + 2, at) - tangent(at, at))


@pytest.mark.definition
def test_a_constant_step_is_one_for_all_tokens_and_the_key_and_query_are_not() -> None:
    found = hooks.record(build(selection="constant_step"), tokens(), "blocks.1.mixer.*")
    steps = found["blocks.1.mixer.hook_delta"]
    assert torch.equal(steps, steps[:1, :1].expand_as(steps)) and steps[0, 0].unique().numel() == 16
    for site in ("B", "C"):
        assert found[f"blocks.1.mixer.hook_{site}"].std(dim=(0, 1)).min() > 1e-3


@pytest.mark.contract
@EVERY
def test_a_file_gives_the_variant_back(config: dict[str, str], tmp_path: Path) -> None:
    model, x = build(**config), tokens()
    models.save(model, tmp_path / "model.safetensors", {"task": "single_index"})
    loaded = models.load(tmp_path)
    assert loaded.cfg == model.cfg and loaded.card == {"task": "single_index"}
    assert torch.equal(loaded(x), model(x))


@pytest.mark.contract
def test_the_published_block_is_what_it_was() -> None:
    """Names, order of the random draws and function are those of a config that knows nothing of the options."""
    torch.manual_seed(3)
    plain = build()
    torch.manual_seed(3)
    said = build(selection="content", step="softplus", gate="silu")
    assert list(plain.state_dict()) == list(said.state_dict())
    x = tokens()
    assert torch.equal(plain(x), said(x))
    expected = torch.from_numpy(np.stack([numpy_model(plain, sequence) for sequence in x.numpy()]))
    torch.testing.assert_close(plain(x), expected, rtol=1e-10, atol=1e-12)
    for config in VARIANTS.values():
        torch.manual_seed(3)
        assert not torch.allclose(build(**config)(x), plain(x))
    card = models.load("mamba-linreg")
    assert (card.cfg.selection, card.cfg.step, card.cfg.gate) == ("content", "softplus", "silu")


@pytest.mark.contract
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"step": "tangnet"}, 'value of step.*"tangnet".*tangent'),
        ({"gate": "lineer"}, 'value of gate.*"lineer".*linear'),
        ({"selection": "constant"}, "value of selection"),
        ({"selection": "constant_step", "step": "tangent"}, 'selection="constant_step" has none'),
        ({"selective": False, "step": "tangent"}, "selective=False has none"),
        ({"selective": False, "selection": "constant_step"}, "selective=False has none"),
    ],
)
def test_what_does_not_go_together_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(BadArgument, match=message):
        models.build("mamba", **config)


@pytest.mark.contract
@pytest.mark.parametrize("gate", ["silu", "linear"])
def test_the_twin_takes_a_gate(gate: str) -> None:
    model, x = build(selective=False, gate=gate), tokens()
    short = model(x)
    with hooks.expose(model):
        torch.testing.assert_close(model(x), short, rtol=1e-9, atol=1e-11)
    assert dataclasses.asdict(model.cfg)["gate"] == gate


@pytest.mark.edit
def test_writing_into_a_linear_gate_leaves_its_branch_alone() -> None:
    model, x = build(gate="linear"), tokens()
    with hooks.edit(model, {"blocks.0.mixer.hook_gate": lambda gate: gate.zero_()}):
        found = hooks.record(model, x, ["blocks.0.mixer.hook_gate_pre", "blocks.0.mixer.hook_out"])
    assert found["blocks.0.mixer.hook_gate_pre"].abs().min() > 0
    assert not found["blocks.0.mixer.hook_out"].any()
