"""Models whose mechanism is known because their weights were set by hand, each with a decoy beside it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import models
from hooks.point import HookedModule, site

ANSWER, DECOY, LENGTH = 2, 4, 8
"""Positions of a prompt of ``LENGTH`` tokens; the answer is read at the last one."""


class Linear(HookedModule):
    """out_t = w · Σ_{s≤t} mix[t, s] (A x_s), with a branch ``hook_gate_pre`` of the same norm that nobody reads."""

    def __init__(self, width: int = 4, length: int = LENGTH) -> None:
        super().__init__()
        self.cfg = SimpleNamespace(n_layers=0, d_model=width, device="cpu")
        self.A = nn.Parameter(torch.linalg.qr(torch.randn(width, width)).Q)
        self.mix = nn.Parameter(torch.rand(length, length).tril())
        self.w = nn.Parameter(torch.randn(width, 1))
        self.hook_x_in, self.hook_gate_pre = site("hook_x_in"), site("hook_gate_pre")
        self.hook_x_pre, self.hook_out = site("hook_x_pre"), site("hook_out")
        self.setup()
        self.double().eval()

    def axis_sizes(self) -> dict[str, int]:
        return {"d_model": 1, "d_inner": self.cfg.d_model}

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        x_in = self.hook_x_in(x @ self.A)
        self.hook_gate_pre(x @ self.A.T)
        mixed = self.hook_x_pre(torch.einsum("ts,bsd->btd", self.mix, x_in))
        return self.hook_out(mixed @ self.w)


class Product(HookedModule):
    """out_t = x_t[0] · x_t[1]."""

    def __init__(self) -> None:
        super().__init__()
        self.cfg = SimpleNamespace(n_layers=0, d_model=2, device="cpu")
        self.hook_x_in = site("hook_x_in")
        self.setup()
        self.eval()

    def axis_sizes(self) -> dict[str, int]:
        return {"d_inner": 2}

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        x = self.hook_x_in(x)
        return x[..., :1] * x[..., 1:]


def one_path(way: str = "scan", layers: int = 1) -> Any:
    """A Mamba that reads out, at each position, the signals of earlier tokens, and never their decoys.

    Tokens are (signal, decoy, 1). Channel 0 of layer 0 carries the signal and channel 1 the decoy, in the same way: by
    the scan, with a decay near 1 and B and C constant, or (``way="taps"``) by the last tap of the convolution, in a
    layer whose scan forgets at once. Only channel 0 is written to the residual stream. Later layers add nothing.
    """
    taps = LENGTH - ANSWER
    model = models.build("mamba", d_model=3, n_layers=layers, d_state=2, d_conv=taps, d_in=3, d_out=1).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.embed.linear.weight.copy_(torch.eye(3))
        model.ln_final.weight.fill_(1)
        model.head.linear.weight[0, 0] = 1
        for block in model.blocks:
            block.norm.weight.fill_(1)
        mixer = model.blocks[0].mixer
        mixer.in_proj.weight[:3] = torch.eye(3)  # channels 0, 1, 2: signal, decoy, 1
        mixer.in_proj.weight[6:9, 2] = 1  # the output gate of each is a constant
        mixer.conv1d.weight[:2, 0, -1 if way == "scan" else 0] = 1
        mixer.conv1d.weight[2, 0, -1] = 1
        rank = mixer.cfg.rank
        mixer.x_proj.weight[rank, 2] = mixer.x_proj.weight[rank + 2, 2] = 1  # B[0] and C[0] from channel 2
        mixer.dt_proj.bias.fill_(-2.0 if way == "scan" else 20.0)
        mixer.A_log.fill_(-3.0 if way == "scan" else 5.0)
        mixer.out_proj.weight[0, 0] = 1
    return model.eval()


def prompts(n: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``(clean, corrupted)``: signal ±1 at ``ANSWER``, decoy ±1 at ``DECOY``; signs drawn for each prompt, both turned
    round in the corrupted prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (n, 2), generator=generator).double() * 2 - 1
    clean = torch.zeros(n, LENGTH, 3, dtype=torch.float64)
    clean[..., 2] = 1
    corrupted = clean.clone()
    for i, position in enumerate((ANSWER, DECOY)):
        clean[:, position, i], corrupted[:, position, i] = signs[:, i], -signs[:, i]
    return clean, corrupted


def last(output: Tensor) -> Tensor:
    """The prediction at the last position."""
    return output[:, -1, 0]
