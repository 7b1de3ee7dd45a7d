"""Small S4 models, and their systems as dense matrices: the definition that the tests compare with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import models
from models.s4_dplr import S4Mixer
from models.scan import dplr


def small(n_layers: int = 2, dtype: torch.dtype = torch.float64, **config: int) -> models.Stack:
    """Weights noisy enough for every site to matter, and steps long enough that states are kept and forgotten."""
    fields = {"d_model": 6, "n_layers": n_layers, "d_state": 4, "d_in": 3, "d_out": 2, **config}
    model = models.build("s4", **fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.3 * torch.randn_like(parameter)
            if name.endswith("log_dt"):
                parameter += 2
    return model.to(dtype).eval()


def prompts(length: int, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(batch, length, 3, generator=generator, dtype=dtype)


def both(values: Tensor) -> np.ndarray:
    """Complex numbers (d, n) followed by their conjugates, (d, 2n)."""
    z = torch.view_as_complex(values.detach().double()).numpy()
    return np.concatenate([z, z.conj()], -1)


def dense(mixer: S4Mixer, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ā (d, 2n, 2n), B̄ and C (d, 2n) by the definition, with Δ times ``scale``; no structure used."""
    real, imag = -mixer.log_A_real.detach().double().exp(), mixer.A_imag.detach().double()
    diagonal, P, B, C = both(torch.stack([real, imag], -1)), both(mixer.A_low_rank), both(mixer.B), both(mixer.C)
    step = scale * mixer.log_dt.detach().double().exp().numpy()[:, None, None]
    one = np.eye(P.shape[1])
    A = diagonal[:, :, None] * one - P[:, :, None] * P[:, None].conj()
    backward = np.linalg.inv(one - step / 2 * A)
    return backward @ (one + step / 2 * A), (backward * step @ B[..., None])[..., 0], C


def by_powers(mixer: S4Mixer, length: int) -> Tensor:
    """C Āˡ B̄ for every channel, by powers of the dense matrix."""
    A, B, C = dense(mixer)
    taps = []
    for _ in range(length):
        taps.append((C * B).sum(-1))
        B = (A @ B[..., None])[..., 0]
    assert np.abs(np.imag(taps)).max() < 1e-9
    return torch.from_numpy(np.real(taps).T.copy())


def operands(mixer: S4Mixer) -> tuple[Tensor, dplr.System, dplr.Transition, Tensor, Tensor]:
    step, system = mixer.log_dt.exp(), mixer.system(mixer.D.dtype)
    read = 2 * torch.view_as_complex(mixer.C).conj()
    return step, system, dplr.discretise(step, system), dplr.discretise_input(step, system), read
