"""S4D (Gu, Gupta, Goel & Ré 2022): the time-invariant baseline, with Mamba's site names.

One block is r ← r + mixer(RMSNorm(r)), pre-norm and without dropout, as in the rest of this
package; the mixer is

    x      = r̂                            d_inner = d_model channels, no expansion
    Δ      = exp(log_dt)                   one learned time step for each channel, for every token
    A      = −exp(log_A_real) + i A_imag   (d_inner, d_state), complex
    ā      = exp(Δ A)                      zero-order hold
    w_t    = (ā − 1)/A · x_t               zero-order hold with B = 1
    h_t    = ā h_{t−1} + w_t               complex; each state stands for itself and its conjugate
    y_t    = 2 Re(Σ_n C_n h_t[n]) + D x_t
    out    = GLU(W_out GELU(y_t) + b)      a · σ(b) of the two halves of d_model each

There is no convolution on the input branch and no output gate: the GLU mixes the block's own
output, and no other branch multiplies it. So the sites of Mamba that are about those
(``hook_x_in``, ``hook_gate`` …) do not exist here, and neither do ``hook_B`` and ``hook_C``: B is
1 and C is a weight of each channel, not a function of the token.

Complex tensors at sites. ``hook_state_init``, ``hook_decay``, ``hook_write`` and ``hook_state``
are real with a last axis of 2 · d_state: the d_state real parts, then the d_state imaginary
parts. An edited decay is still a complex factor: all zeros cut the past, real parts 1 with
imaginary parts 0 keep it as it is, so *freeze* (decay 1, write 0) is real parts 1 and everything
else 0. The same layout is the state that goes in and out.

Two paths, one function. With one Δ for all tokens and nobody looking at a 4-D site the read-out
is one causal convolution. Where an edit makes Δ vary from token to token, or its gradient
at each token is wanted, or a 4-D site is watched, it is the recurrence, which takes whatever
comes out of the points.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Complex, Float
from torch import Tensor, nn
from torch.nn import functional as F

from hooks.errors import BadArgument
from hooks.onlookers import only_read, state_edits, watched
from hooks.point import emit, site
from hooks.precision import exact
from hooks.transforms import active
from models.recurrence import recurrence
from models.scan import constant_pair_states, convolution, kernel, pair_scan, rates
from models.stack import LayerState, Stack, check_config

Inner = Float[Tensor, "batch pos d_inner"]
Pair = Float[Tensor, "batch d_inner re_im"]
Weights = Complex[Tensor, "d_inner d_state"]


@dataclass(frozen=True)
class S4DConfig:
    """Shape of an S4D, and where it starts.

    ``d_state`` counts complex states, each of which stands for a conjugate pair. Δ starts
    log-uniform in [dt_min, dt_max].
    """

    d_model: int = 64
    n_layers: int = 8
    d_state: int = 32
    norm_eps: float = 1e-5
    dt_min: float = 1e-3
    dt_max: float = 0.1
    head: str = "regression"
    d_in: int = 1
    d_out: int = 1
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        check_config(self, "d_model", "n_layers", "d_state", "d_in", "d_out")
        if not 0 < self.dt_min <= self.dt_max < math.inf:
            raise BadArgument(f"dt_min={self.dt_min}, dt_max={self.dt_max}: it must be 0 < dt_min ≤ dt_max")

    @property
    def device(self) -> str:
        """Where TransformerLens' ``patching`` collects its numbers; says nothing of where the model is."""
        return "cpu"


class S4DMixer(nn.Module):
    """The diagonal state-space layer; sites in the order in which they fire."""

    def __init__(self, cfg: S4DConfig) -> None:
        super().__init__()
        self.cfg = cfg
        width, n = cfg.d_model, cfg.d_state
        self.hook_x = site("hook_x")
        low, high = math.log(cfg.dt_min), math.log(cfg.dt_max)
        self.log_dt = nn.Parameter(torch.empty(width).uniform_(low, high))
        self.hook_delta = site("hook_delta")
        self.hook_delta_decay = site("hook_delta_decay")
        self.hook_delta_write = site("hook_delta_write")
        # S4D-Lin: A_n = −1/2 + i π n, the same for every channel.
        self.log_A_real = nn.Parameter(torch.full((width, n), 0.5).log())
        self.A_imag = nn.Parameter(math.pi * torch.arange(n, dtype=torch.get_default_dtype()).repeat(width, 1))
        # Real and imaginary part on the last axis, as in the published state dict: optimizers
        # then see real numbers.
        self.C = nn.Parameter(
            torch.view_as_real(torch.randn(width, n, dtype=self.log_dt.dtype.to_complex())).contiguous()
        )
        self.D = nn.Parameter(torch.randn(width))
        self.hook_state_init = site("hook_state_init", parts=2)
        self.hook_decay, self.hook_write = site("hook_decay", parts=2), site("hook_write", parts=2)
        self.hook_state = site("hook_state", parts=2)
        self.hook_y, self.hook_skip = site("hook_y"), site("hook_skip")
        self.out_proj = nn.Linear(width, 2 * cfg.d_model)
        self.hook_out = site("hook_out")

    def axis_sizes(self) -> dict[str, int]:
        """Size of each named axis of this mixer's sites; sites of the state show 2 · d_state."""
        return {"d_inner": self.cfg.d_model, "d_state": self.cfg.d_state}

    def forward(
        self, r: Float[Tensor, "batch pos d_model"], state: LayerState | None, return_state: bool
    ) -> tuple[Float[Tensor, "batch pos d_model"], LayerState | None]:
        """Mixer output, and the state after the last position if ``return_state``."""
        return around(self, self._scan, r, state, return_state)

    def read(self, states: Float[Tensor, "batch pos d_inner re_im"]) -> Inner:
        """y = 2 Re(C h) of ``hook_state``'s tensor: linear in the states, C being a weight."""
        return exact(partial(torch.einsum, "bldn,dn->bld"), states, self._read_out(states.dtype))

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
        A = torch.stack([rates(self.log_A_real.to(wide)), self.A_imag.to(wide)])
        decay = _decay(constant(delta_decay) if looked_at else step, A)
        write = _zero_order_hold(constant(delta_write) if looked_at else step, A)
        varying = decay.ndim == 4 or write.ndim == 4
        edits = state_edits(self.hook_state) or watched(self.hook_decay, self.hook_write)
        if not varying and not edits and watched(self.hook_state) and only_read(self.hook_state):
            if not torch.is_grad_enabled():
                y, states = constant_pair_states(x, decay, write, self._read_out(x.dtype), h0)
                return y, emit(self.hook_state, states)[:, -1].clone()
        if varying or watched(self.hook_decay, self.hook_write, self.hook_state):
            return self._recur(x, decay, write, h0)
        return self._convolve(x, unpair(decay), unpair(write), h0, return_state)

    def _recur(self, x: Inner, decay: Tensor, write: Tensor, h0: Pair | None) -> tuple[Inner, Pair]:
        """Token by token, with everything 4-D as the points return it."""
        decay = emit(self.hook_decay, decay.expand(*x.shape, -1), shared=True)
        write = emit(self.hook_write, write * x[..., None])
        states = recurrence(decay, write, h0, state_edits(self.hook_state), run=pair_scan)
        # What is returned as state is h itself; a raw hook on hook_state changes one read-out and
        # no more, also where it writes in place: autograd keeps the states for the scan's backward.
        h_last = states[:, -1].clone()
        read = emit(self.hook_state, states, shared=states.requires_grad)
        return self.read(read), h_last

    def _convolve(
        self, x: Inner, decay: Weights, write: Weights, h0: Pair | None, return_state: bool
    ) -> tuple[Inner, Pair | None]:
        """The same function for a constant Δ: one impulse response a channel, and what h_0
        leaves.
        """
        C, length = self._C(x.dtype), x.shape[1]
        y = convolution(x, kernel(decay, write, 2 * C, length))
        if h0 is None and not return_state:
            return y, None
        first = torch.ones_like(decay)[..., None]
        powers = torch.cat([first, decay[..., None].expand(-1, -1, length)], -1).cumprod(-1)
        h_last = None
        if return_state:
            response = write[..., None] * powers[..., :length].flip(-1)
            h_last = einsum(response, x.to(C.dtype), "d n pos, batch pos d -> batch d n")
        if h0 is not None:
            start = unpair(h0)
            left = einsum(2 * C[..., None] * powers[..., 1:], start, "d n pos, batch d n -> batch pos d")
            y = y + left.real
            h_last = None if h_last is None else h_last + powers[..., length] * start
        return y, None if h_last is None else pair(h_last)

    def _read_out(self, dtype: torch.dtype) -> Float[Tensor, "d_inner re_im"]:
        """What the states of a channel are multiplied by: 2 (Re C Re h − Im C Im h) = 2 Re(C h)."""
        return 2 * pair(self._C(dtype).conj())

    def _C(self, dtype: torch.dtype) -> Weights:
        return torch.view_as_complex(self.C.to(dtype))


class S4D(Stack):
    """A stack of S4D blocks between a read-in and a read-out; see :class:`S4DConfig`."""

    architecture = "s4d"

    def __init__(self, cfg: S4DConfig) -> None:
        super().__init__(cfg, lambda: S4DMixer(cfg))


def around(
    mixer: Any,
    scan: Callable[[Tensor, Tensor | None, bool], tuple[Tensor, Tensor | None]],
    r: Float[Tensor, "batch pos d_model"],
    state: LayerState | None,
    return_state: bool,
) -> tuple[Float[Tensor, "batch pos d_model"], LayerState | None]:
    """GLU(W_out GELU(y + D x) + b) with y = ``scan(x, h_0, return_state)``: what an S4 mixer is around its recurrence.

    ``mixer`` has ``hook_x``, ``hook_y``, ``hook_skip``, ``D``, ``out_proj`` and ``hook_out``.
    """
    x = emit(mixer.hook_x, r)
    y, h_last = scan(x, None if state is None else state.h, return_state)
    y = emit(mixer.hook_y, y.to(x.dtype).contiguous())
    skip = emit(mixer.hook_skip, mixer.D.to(x.dtype) * x)
    value, gate = mixer.out_proj(F.gelu(y + skip)).chunk(2, dim=-1)
    out = emit(mixer.hook_out, value * gate.sigmoid())  # the GLU; torch's own has no second derivative forwards
    return out, None if h_last is None or not return_state else LayerState(None, h_last)


def initial_state(point: nn.Module, given: Tensor | None, like: Inner, width: int) -> Pair | None:
    """h_0 (batch, d_inner, width) as it comes out of ``point``, or None where it is zero and nobody looks."""
    shape = (like.shape[0], like.shape[2], width)
    if given is None:
        if not watched(point):
            return None
        given = like.new_zeros(shape)
    if tuple(given.shape) != shape:
        raise BadArgument(f"the state's h has shape {tuple(given.shape)}, this model and batch need {shape}")
    return emit(point, given.to(like), shared=True)


def constant(delta: Inner) -> Tensor:
    """Δ (d_inner,) where it is the same for every token of the batch, else ``delta`` itself.

    A Δ that carries gradients counts as varying: its gradient at each token exists only in the
    recurrence. So does any Δ inside a transform, which may carry what it does not show.
    """
    if active() or (torch.is_grad_enabled() and delta.requires_grad):
        return delta
    return delta[0, 0] if bool((delta == delta[:1, :1]).all()) else delta


def _decay(delta: Tensor, A: Tensor) -> Tensor:
    """exp(Δ A) as a pair, (…, d_inner, 2 d_state).

    ``A`` (2, d_inner, d_state): its real, then its imaginary parts.

    In real arithmetic, here and below: the complex exponential is a scalar loop, ten times
    slower.
    """
    size, angle = torch.exp(delta[..., None] * A[0]), delta[..., None] * A[1]
    return torch.cat([size * torch.cos(angle), size * torch.sin(angle)], dim=-1)


def _zero_order_hold(delta: Tensor, A: Tensor) -> Tensor:
    """(exp(Δ A) − 1)/A as a pair, (…, d_inner, 2 d_state), without cancellation at small Δ A."""
    rate, angle = delta[..., None] * A[0], delta[..., None] * A[1]
    real = torch.expm1(rate) * torch.cos(angle) - 2 * torch.sin(angle / 2) ** 2
    imag = torch.exp(rate) * torch.sin(angle)
    inverse = A / (A**2).sum(0)  # 1/A = conj(A)/|A|²
    return torch.cat([real * inverse[0] + imag * inverse[1], imag * inverse[0] - real * inverse[1]], dim=-1)


def pair(z: Complex[Tensor, "*shape n"]) -> Float[Tensor, "*shape re_im"]:
    """A complex tensor as a real one with twice the last axis: real parts, then imaginary parts."""
    return torch.cat([z.real, z.imag], dim=-1)


def unpair(values: Float[Tensor, "*shape re_im"]) -> Complex[Tensor, "*shape n"]:
    """The inverse of :func:`pair`."""
    real, imag = rearrange(values, "... (part n) -> part ... n", part=2)
    return torch.complex(real, imag)
