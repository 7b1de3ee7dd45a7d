"""S4 (Gu, Goel & Ré 2022) with its full kernel: diagonal plus low rank, from HiPPO-LegS, with Mamba's site names.

The block around the recurrence is S4D's (``models/s4.py``), and so are the layout of complex tensors at sites and the
channels, each with a system of its own. What differs is the transition and the rule that makes it discrete:

    x      = r̂                            d_inner = d_model channels
    Δ      = exp(log_dt)                   one learned time step for each channel, for every token
    A      = Λ − P Pᴴ                      Λ = −exp(log_A_real) + i A_imag; stable for every P
    Ā      = (I − Δ/2 A)⁻¹ (I + Δ/2 A)     bilinear, as in the paper (S4D here: zero-order hold)
    w_t    = (I − Δ/2 A)⁻¹ Δ B · x_t       B is learned here
    h_t    = Ā h_{t−1} + w_t               complex; each state stands for itself and its conjugate
    y_t    = 2 Re(Σ_n C_n h_t[n]) + D x_t
    out    = GLU(W_out GELU(y_t) + b)

``hook_transition`` takes the place of ``hook_decay``, since Ā mixes the states. It holds the three factors of
Ā h = a ⊙ h + u ⟨q, h⟩, (batch, pos, d_inner, factor, 2 · d_state): factor 0 is the diagonal a, 1 the column u, 2 the
row q, each as real parts followed by imaginary parts; ⟨q, h⟩ is the plain dot product of two such rows of reals. The
recurrence uses what comes out of the point: all zeros cut the past, and a = 1 (real parts 1, imaginary parts 0) with
u = 0 keeps it as it is. ``hook_delta_decay`` is the Δ of Ā and ``hook_delta_write`` that of w.

Two paths, one function: a causal convolution with the exact response of the length that is asked for
(``models/scan/dplr.py``; the Cauchy kernel where it is longer than ``CAUCHY``), or token by token where an edit makes Δ
vary, where its gradient at each token is wanted, or where a 4-D site is watched. An edit of ``hook_state`` interrupts
the recurrence at its positions: none is folded into the factors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from hooks.onlookers import state_edits, watched
from hooks.point import emit, site
from hooks.precision import exact
from hooks.transforms import everywhere
from models.recurrence import recurrence
from models.s4 import Inner, Pair, S4DConfig, Weights, around, constant, initial_state, pair, unpair
from models.scan import convolution, dplr, rates
from models.scan.pair import times
from models.stack import LayerState, Stack

Factors = Float[Tensor, "batch pos d_inner factor re_im"]


@dataclass(frozen=True)
class S4Config(S4DConfig):
    """Shape of an S4, and where it starts: the fields of an S4D.

    ``d_state`` counts complex states, each of which stands for a conjugate pair: HiPPO-LegS of order 2 · d_state. Each
    channel learns 8 · d_state + 2 numbers of its own.
    """


class S4Mixer(nn.Module):
    """The diagonal-plus-low-rank state-space layer; sites in the order in which they fire."""

    def __init__(self, cfg: S4Config) -> None:
        super().__init__()
        self.cfg = cfg
        width, n = cfg.d_model, cfg.d_state
        self.hook_x = site("hook_x")
        low, high = math.log(cfg.dt_min), math.log(cfg.dt_max)
        self.log_dt = nn.Parameter(torch.empty(width).uniform_(low, high))
        self.hook_delta = site("hook_delta")
        self.hook_delta_decay = site("hook_delta_decay")
        self.hook_delta_write = site("hook_delta_write")
        start = dplr.legs(n, outline=self.log_dt.is_meta)
        self.log_A_real = nn.Parameter((-start.diagonal.real).log().to(self.log_dt).repeat(width, 1))
        self.A_imag = nn.Parameter(start.diagonal.imag.to(self.log_dt).repeat(width, 1))
        # Complex weights have real and imaginary part on the last axis, as in S4D. P is called so that training, which
        # decays B and C, leaves it alone like the rest of A.
        self.A_low_rank = nn.Parameter(_as_weight(start.low_rank, width, self.log_dt))
        self.B = nn.Parameter(_as_weight(start.B, width, self.log_dt))
        self.C = nn.Parameter(
            torch.view_as_real(torch.randn(width, n, dtype=self.log_dt.dtype.to_complex())).contiguous()
        )
        self.D = nn.Parameter(torch.randn(width))
        self.hook_state_init = site("hook_state_init", parts=2)
        self.hook_transition, self.hook_write = site("hook_transition", parts=2), site("hook_write", parts=2)
        self.hook_state = site("hook_state", parts=2)
        self.hook_y, self.hook_skip = site("hook_y"), site("hook_skip")
        self.out_proj = nn.Linear(width, 2 * cfg.d_model)
        self.hook_out = site("hook_out")

    def axis_sizes(self) -> dict[str, int]:
        """Size of each named axis of this mixer's sites; sites of the state show 2 · d_state."""
        return {"d_inner": self.cfg.d_model, "d_state": self.cfg.d_state, "factor": 3}

    def forward(
        self, r: Float[Tensor, "batch pos d_model"], state: LayerState | None, return_state: bool
    ) -> tuple[Float[Tensor, "batch pos d_model"], LayerState | None]:
        """Mixer output, and the state after the last position if ``return_state``."""
        return around(self, self._scan, r, state, return_state)

    def read(self, states: Float[Tensor, "batch pos d_inner re_im"]) -> Inner:
        """y = 2 Re(C h) of ``hook_state``'s tensor: linear in the states, C being a weight."""
        return exact(partial(torch.einsum, "bldn,dn->bld"), states, pair(self._read(states.dtype)))

    def system(self, dtype: torch.dtype) -> dplr.System:
        """Λ, P and B of every channel, complex, computed in ``dtype`` (real)."""
        diagonal = torch.complex(rates(self.log_A_real.to(dtype)), self.A_imag.to(dtype))
        return dplr.System(diagonal, _as_complex(self.A_low_rank, dtype), _as_complex(self.B, dtype))

    def _scan(self, x: Inner, given: Tensor | None, return_state: bool) -> tuple[Inner, Pair | None]:
        """2 Re(C h) (batch, pos, d_inner) and, where it is asked for, the last state."""
        # Asked before the first of the three fires, so that an edit of any of them is seen in time.
        looked_at = watched(self.hook_delta, self.hook_delta_decay, self.hook_delta_write)
        wide = torch.promote_types(x.dtype, torch.float32)
        x, step = x.to(wide), torch.exp(self.log_dt.to(wide))
        # Shared: a view of one step for each channel, and each role is edited apart.
        delta = emit(self.hook_delta, step.expand(*x.shape[:2], -1), shared=True)
        delta_decay = emit(self.hook_delta_decay, delta, shared=True)
        delta_write = emit(self.hook_delta_write, delta, shared=True)
        h0 = initial_state(self.hook_state_init, given, x, 2 * self.cfg.d_state)
        forgets = constant(delta_decay) if looked_at else step
        writes = constant(delta_write) if looked_at else step
        varying = forgets.ndim == 3 or writes.ndim == 3
        system = self.system(wide)
        if varying or watched(self.hook_transition, self.hook_write, self.hook_state):
            return self._recur(x, forgets, writes, system, h0)
        return self._convolve(x, forgets, writes, system, h0, return_state)

    def _recur(
        self, x: Inner, forgets: Tensor, writes: Tensor, system: dplr.System, h0: Pair | None
    ) -> tuple[Inner, Pair]:
        """Token by token, with everything 4-D as the points return it."""
        factors = torch.stack([pair(factor) for factor in dplr.discretise(forgets, system)], dim=-2)
        factors = emit(self.hook_transition, factors.expand(*x.shape, -1, -1), shared=True)
        write = emit(self.hook_write, pair(dplr.discretise_input(writes, system)) * x[..., None])
        states = recurrence(factors, write, h0, state_edits(self.hook_state), run=transition_scan, elementwise=False)
        # What is returned as state is h itself; a raw hook on hook_state changes one read-out and no more.
        h_last = states[:, -1].clone()
        read = emit(self.hook_state, states, shared=states.requires_grad)
        return self.read(read), h_last

    def _convolve(
        self, x: Inner, forgets: Tensor, writes: Tensor, system: dplr.System, h0: Pair | None, return_state: bool
    ) -> tuple[Inner, Pair | None]:
        """The same function for a constant Δ: one impulse response a channel, and what h_0 leaves."""
        length, read = x.shape[1], self._read(x.dtype)
        transition, write = dplr.discretise(forgets, system), dplr.discretise_input(writes, system)
        if length > dplr.CAUCHY:
            taps = dplr.cauchy(forgets, system, write, read, length)
        else:
            taps = dplr.response(transition, write, read, length)
        y = convolution(x, taps)
        start = None if h0 is None else rearrange(unpair(h0), "batch d_inner n -> d_inner batch n")
        if start is not None:
            y = y + dplr.left_over(transition, read, start, length)
        h_last = dplr.last_state(transition, write, x, start) if return_state else None
        return y, None if h_last is None else pair(rearrange(h_last, "d_inner batch n -> batch d_inner n"))

    def _read(self, dtype: torch.dtype) -> Weights:
        """The r with 2 Re(C h) = ⟨r, h⟩."""
        return 2 * _as_complex(self.C, dtype).conj()


class S4(Stack):
    """A stack of S4 blocks between a read-in and a read-out; see :class:`S4Config`."""

    architecture = "s4"

    def __init__(self, cfg: S4Config) -> None:
        super().__init__(cfg, lambda: S4Mixer(cfg))


def transition_scan(
    factors: Factors, write: Float[Tensor, "batch pos d_inner re_im"], h0: Pair | None = None
) -> Float[Tensor, "batch pos d_inner re_im"]:
    """All states of h_t = a_t ⊙ h_{t−1} + u_t ⟨q_t, h_{t−1}⟩ + w_t, complex numbers as pairs; differentiable.

    ``factors`` holds a, u and q on its ``factor`` axis. Where a factor is 0 nothing of the past passes through it, not
    even the NaN of 0 · inf.
    """
    states = _run(factors, write, h0, guarded=False)
    # A NaN reaches every later state that is not cut off, and the last one tells unless it was; so all are asked.
    return states if everywhere(~torch.isnan(states)) else _run(factors, write, h0, guarded=True)


def _run(factors: Tensor, write: Tensor, h0: Tensor | None, guarded: bool) -> Tensor:
    # Taken apart by unbind, whose backward is one stack; that of an index writes full-size gradients at every token.
    h = torch.zeros_like(write[:, 0]) if h0 is None else h0
    states = []
    for (a, u, q), w in zip((f.unbind(-2) for f in factors.unbind(1)), write.unbind(1), strict=True):
        if guarded:
            overlap = torch.where(q == 0, 0, q * h).sum(-1, keepdim=True)
            h = times(a, h) + torch.where(u == 0, 0, u * overlap) + w
        else:
            (re, im), (p, r) = a.chunk(2, dim=-1), h.chunk(2, dim=-1)
            turned = torch.cat([re * p - im * r, re * r + im * p], dim=-1)
            h = torch.addcmul(turned + w, u, (q * h).sum(-1, keepdim=True))
        states.append(h)
    return torch.stack(states, dim=1)


def _as_weight(values: Tensor, width: int, like: Tensor) -> Float[Tensor, "d_inner d_state re_im"]:
    return torch.view_as_real(values.repeat(width, 1)).to(like).contiguous()


def _as_complex(weight: Tensor, dtype: torch.dtype) -> Weights:
    return torch.view_as_complex(weight.to(dtype))
