"""Small models with a recurrence in the vocabulary, edits of them, and hand-set ones with a known mechanism."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hooks
import models

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", {"n_layers": 2, "d_state": 4, "d_out": 2}),
    "lti": ("mamba", {"n_layers": 2, "d_state": 4, "d_out": 2, "selective": False}),
    "s4d": ("s4d", {"n_layers": 2, "d_state": 3, "d_out": 2}),
    "s4": ("s4", {"n_layers": 2, "d_state": 3, "d_out": 2}),
    "linear": ("linear_attention", {"n_layers": 2, "n_heads": 2, "d_mlp": 6, "d_out": 2}),
    "theory": ("theory", {}),
}
LAYER = {"theory": 0}
"""The layer that is asked about; 1 where it is not here."""


def build(variant: str, dtype: torch.dtype = torch.float64, seed: int = 0, **config: Any) -> Any:
    """Width 8, 5 numbers a token, noise on every weight; Δ around 0.1 … 1, so that states are kept and forgotten."""
    torch.manual_seed(seed)
    name, shape = VARIANTS[variant]
    width = {} if name == "theory" else {"d_model": 8}
    model = models.build(name, **{**width, "d_in": 5, **shape, **config}).to(dtype)
    with torch.no_grad():
        for weight, parameter in model.named_parameters():
            parameter += 0.3 * torch.randn_like(parameter)
            if weight.endswith(("dt_proj.bias", "dt_bias", "log_dt")):
                parameter += 2
    return model.eval()


def prompts(batch: int = 3, length: int = 11, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, length, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


MIXER = "blocks.1.mixer."
EDITS: dict[str, Callable[[], Any]] = {
    "do_state": lambda: hooks.do_state(1, [4, 8], 0.7),
    "zero state": lambda: {MIXER + "hook_state": hooks.zero(pos=5, channels=[0, 3])},
    "scale and add": lambda: [
        {MIXER + "hook_state": hooks.scale(0.5, pos=[2, 3])},
        {MIXER + "hook_state": hooks.add(0.3, pos=3)},
    ],
    "freeze": lambda: {MIXER + "hook_state": hooks.freeze(pos=[0, 6])},
    "mean state": lambda: {MIXER + "hook_state": hooks.mean(("batch", "pos"), reference=prompts(5), pos=7)},
    "Δ zero": lambda: {"*.hook_delta": hooks.zero(pos=[3, 10])},
    "Δ mean": lambda: {"*.hook_delta": hooks.mean(("batch", "pos"))},
    "Δ decay": lambda: {MIXER + "hook_delta_decay": hooks.scale(3.0)},
    "decay zero": lambda: {MIXER + "hook_decay": hooks.zero(pos=6)},
    "write zero": lambda: {MIXER + "hook_write": hooks.zero(pos=[2, 5])},
    "write set": lambda: {MIXER + "hook_write": hooks.set_to(0.4, pos=5, channels=[1, 2])},
    "write scaled": lambda: {MIXER + "hook_write": hooks.scale(-2.0, pos=slice(1, 4))},
    "x set": lambda: {MIXER + "hook_x": hooks.set_to(0.4, pos=5)},
    "x zero": lambda: {MIXER + "hook_x": hooks.zero(pos=[0, 5])},
    "write and state": lambda: [
        {MIXER + "hook_write": hooks.add(0.2, pos=4)},
        {MIXER + "hook_state": hooks.scale(0.5, pos=4)},
    ],
    "earlier and later layers": lambda: {
        "*.hook_resid_pre": hooks.add(0.1),
        "head.hook_out": hooks.scale(2.0),
    },
}
"""Every one on a Mamba of ``VARIANTS``; those whose sites S4D has too are in ``S4D_EDITS``."""
S4D_EDITS = [name for name in EDITS if name not in ("Δ mean",)]
TRANSITION_EDITS: dict[str, Callable[[], Any]] = {
    **{name: EDITS[name] for name in S4D_EDITS if name != "decay zero"},
    "transition zero": lambda: {MIXER + "hook_transition": hooks.zero(pos=6)},
}
"""Those of S4."""

VALUE, MARK, DECOY, ONE = range(4)
LENGTH, MARKED, DECOYED = 9, 3, 6


def copier(listens: int = MARK, back: int = 0) -> Any:
    """A one-layer Mamba that keeps, in channel ``VALUE``, the value of the token that has the feature ``listens``.

    Tokens are (value, mark, decoy, 1). Δ is large where the feature is, and nothing elsewhere; nothing is forgotten.
    With ``back`` the convolution hands the value on by that many tokens: what is kept is the value ``back`` tokens
    before the mark.
    """
    model = models.build("mamba", d_model=4, n_layers=1, d_state=2, d_conv=4, expand=1, dt_rank=1, d_in=4, d_out=1)
    mixer = model.blocks[0].mixer
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embed.linear.weight.copy_(torch.eye(4))
        model.blocks[0].norm.weight.fill_(1)
        model.ln_final.weight.fill_(1)
        model.head.linear.weight[0, VALUE] = 1
        mixer.in_proj.weight[:4] = torch.eye(4)
        mixer.in_proj.weight[4:, ONE] = 1
        mixer.conv1d.weight[:, 0, -1] = 1
        mixer.conv1d.weight[VALUE, 0] = 0
        mixer.conv1d.weight[VALUE, 0, 3 - back] = 1
        mixer.x_proj.weight[0, listens] = 1
        mixer.x_proj.weight[1:, ONE] = 1
        mixer.dt_proj.weight.fill_(40)
        mixer.dt_proj.bias.fill_(-20)
        mixer.A_log.fill_(-30)
        mixer.out_proj.weight[VALUE, VALUE] = 1
    return model.double().eval()


def marked() -> Tensor:
    """Four prompts of random values with one marked token and one decoy, which has the same norm; the last is empty."""
    tokens = torch.zeros(4, LENGTH, 4, dtype=torch.float64)
    signs = torch.randint(2, (4, LENGTH - 1), generator=torch.Generator().manual_seed(2))
    tokens[:, :-1, VALUE] = 2.0 * signs - 1
    tokens[:, MARKED, MARK] = tokens[:, DECOYED, DECOY] = 1
    tokens[:, :, ONE] = 1
    return tokens
