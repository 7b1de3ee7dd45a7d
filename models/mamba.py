"""Mamba-1 (Gu & Dao 2023), exactly the published function, with a site at every tensor that means something.

One block is r ← r + mixer(RMSNorm(r)); blocks, read-in and read-out are in ``stack.py`` and ``heads.py``, the mixer
is here:

    [x; z] = W_in r̂                      two branches of width d_inner = expand · d_model
    x      = SiLU(conv(x))               causal, depthwise, d_conv taps
    [s, B, C] = W_x x                    s of rank dt_rank; B, C of size d_state
    Δ      = softplus(W_Δ s + b_Δ)       one time step for each channel and position: the selection gate
    ā_t    = exp(Δ_t A),  A = −exp(A_log)        zero-order hold
    w_t    = Δ_t B_t x_t                         Euler, as in the published kernels
    h_t    = ā_t h_{t−1} + w_t
    y_t    = C_t h_t + D x_t
    out    = W_out (y · SiLU(z))         SiLU(z) is the output gate

Glossary: batch, pos; d_model residual width; d_inner channels; d_state numbers of state for each channel (N); taps =
d_conv − 1 inputs before the prompt. A is (d_inner, d_state), real and negative; the step, the decay and the scan are
computed in at least fp32. ``selective=False`` is the time-invariant twin: the same block with Δ, B and C learned
constants.

Three options take one nonlinearity out of the way from a token to what it writes, each by itself:

    selection="constant_step"   Δ = softplus(b_Δ), a learned constant for each channel; B and C stay selective
    step="tangent"              Δ = softplus(b_Δ) + σ(b_Δ) (u − b_Δ) at u = W_Δ s + b_Δ: softplus's tangent at the bias
    gate="linear"               out = W_out (y · z)

The tangent falls below 0 where u is far below the bias. The Δ that writes is left as it is, of either sign: held at 0
it would be a bent line again, and every bend makes powers of the label. The Δ that decays is held at 0, which keeps ā
in (0, 1]: there a token forgets nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from hooks.errors import BadArgument, unknown
from hooks.onlookers import only_read, plain_linear, state_edits, watched
from hooks.point import emit, site
from hooks.precision import exact
from models.recurrence import recurrence
from models.scan import convolution, decays, kernel, rates, selective_scan, selective_scan_states, selective_states
from models.stack import LayerState, Stack, check_config

Inner = Float[Tensor, "batch pos d_inner"]
OPTIONS = {"selection": ("content", "constant_step"), "step": ("softplus", "tangent"), "gate": ("silu", "linear")}
"""Fields of the config that are one of a few words, the published block first."""


@dataclass(frozen=True)
class MambaConfig:
    """Shape of a Mamba. ``dt_rank=None`` means ceil(d_model / 16)."""

    d_model: int = 64
    n_layers: int = 8
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | None = None
    norm_eps: float = 1e-5
    bias: bool = False
    conv_bias: bool = True
    selective: bool = True
    head: str = "regression"
    d_in: int = 1
    d_out: int = 1
    tie_embeddings: bool = True
    selection: str = "content"
    step: str = "softplus"
    gate: str = "silu"

    def __post_init__(self) -> None:
        check_config(self, "d_model", "n_layers", "d_state", "d_conv", "expand", "dt_rank", "d_in", "d_out")
        for name, known in OPTIONS.items():
            if getattr(self, name) not in known:
                raise BadArgument(unknown(f"value of {name}", getattr(self, name), known))
        constant = "selective=False" if not self.selective else 'selection="constant_step"'
        if not self.selective and self.selection != "content":
            raise BadArgument(f'selection="{self.selection}" is about a selective block, and selective=False has none')
        if self.step != "softplus" and not self.content_step:
            raise BadArgument(f'step="{self.step}" is about a step that follows the token, and {constant} has none')

    @property
    def device(self) -> str:
        """Where TransformerLens' ``patching`` collects its numbers; says nothing of where the model is."""
        return "cpu"

    @property
    def content_step(self) -> bool:
        """Whether Δ follows the token."""
        return self.selective and self.selection == "content"

    @property
    def d_inner(self) -> int:
        """Channels of the scan."""
        return self.expand * self.d_model

    @property
    def rank(self) -> int:
        """Rank of the map from x to Δ."""
        return math.ceil(self.d_model / 16) if self.dt_rank is None else self.dt_rank


class CausalConv(nn.Module):
    """Depthwise convolution over the last d_conv inputs: Σ_k weight[:, k] x_{t−d_conv+1+k} + bias.

    Called as a module, so that hooks on it fire (on the usual Mamba code they never do).
    """

    def __init__(self, channels: int, taps: int, bias: bool) -> None:
        super().__init__()
        bound = taps**-0.5
        self.weight = nn.Parameter(torch.empty(channels, 1, taps).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Inner, before: Float[Tensor, "batch d_inner taps"]) -> Inner:
        padded = torch.cat([rearrange(before, "batch d_inner taps -> batch taps d_inner"), x], dim=1)
        # A convolution over an image one row high: its channels-last layout is ours, so nothing is transposed.
        rows = rearrange(padded, "batch pos d_inner -> batch d_inner 1 pos")
        out = F.conv2d(rows, self.weight[:, :, None], self.bias, groups=self.weight.shape[0])
        return rearrange(out, "batch d_inner 1 pos -> batch pos d_inner").contiguous()


class MambaMixer(nn.Module):
    """The selective state-space layer; sites in the order in which they fire."""

    def __init__(self, cfg: MambaConfig) -> None:
        super().__init__()
        self.cfg = cfg
        width, n = cfg.d_inner, cfg.d_state
        self.in_proj = nn.Linear(cfg.d_model, 2 * width, bias=cfg.bias)
        self.hook_x_in, self.hook_gate_pre = site("hook_x_in"), site("hook_gate_pre")
        self.hook_conv_init = site("hook_conv_init")
        self.conv1d = CausalConv(width, cfg.d_conv, cfg.conv_bias)
        self.hook_x_pre, self.hook_x = site("hook_x_pre"), site("hook_x")
        step_bias = _initial_step_bias(width)
        if cfg.content_step:
            self.x_proj = nn.Linear(width, cfg.rank + 2 * n, bias=False)
            self.dt_proj = nn.Linear(cfg.rank, width)
            nn.init.uniform_(self.dt_proj.weight, -(cfg.rank**-0.5), cfg.rank**-0.5)
            self.dt_proj.bias.data.copy_(step_bias)
        else:
            self.dt_bias = nn.Parameter(step_bias)
        if cfg.selective and not cfg.content_step:
            self.x_proj = nn.Linear(width, 2 * n, bias=False)
        if not cfg.selective:
            self.B = nn.Parameter(torch.randn(n))
            self.C = nn.Parameter(torch.randn(n))
        self.hook_delta_pre, self.hook_delta = site("hook_delta_pre"), site("hook_delta")
        self.hook_delta_decay, self.hook_delta_write = site("hook_delta_decay"), site("hook_delta_write")
        self.hook_B, self.hook_C = site("hook_B"), site("hook_C")
        self.A_log = nn.Parameter(torch.arange(1, n + 1, dtype=torch.get_default_dtype()).log().repeat(width, 1))
        self.D = nn.Parameter(torch.ones(width))
        self.hook_state_init = site("hook_state_init")
        self.hook_decay, self.hook_write, self.hook_state = site("hook_decay"), site("hook_write"), site("hook_state")
        self.hook_y, self.hook_skip = site("hook_y"), site("hook_skip")
        self.hook_gate, self.hook_gated = site("hook_gate"), site("hook_gated")
        self.out_proj = nn.Linear(width, cfg.d_model, bias=cfg.bias)
        # GPT-2's rescaling of what writes to the residual stream, as in the published initialisation.
        self.out_proj.weight.data /= math.sqrt(cfg.n_layers)
        self.hook_out = site("hook_out")

    def axis_sizes(self) -> dict[str, int]:
        """Size of each named axis of this mixer's sites."""
        cfg = self.cfg
        return {"d_inner": cfg.d_inner, "d_state": cfg.d_state, "taps": cfg.d_conv - 1}

    def forward(
        self, r: Float[Tensor, "batch pos d_model"], state: LayerState | None, return_state: bool
    ) -> tuple[Float[Tensor, "batch pos d_model"], LayerState | None]:
        """Mixer output, and the state after the last position if ``return_state``."""
        width, taps = self.cfg.d_inner, self.cfg.d_conv - 1
        x_in, z = self._branches(r)
        x_in = emit(self.hook_x_in, x_in)
        z = emit(self.hook_gate_pre, z)
        before = _given(None if state is None else state.conv, (r.shape[0], width, taps), x_in, "conv")
        before = emit(self.hook_conv_init, before, shared=True)
        x_pre = emit(self.hook_x_pre, self.conv1d(x_in, before))
        x = emit(self.hook_x, F.silu(x_pre))
        y, h_last = self._scan(x, state, return_state)
        y = emit(self.hook_y, y.to(x.dtype))
        skip = emit(self.hook_skip, self.D.to(x.dtype) * x)
        linear = self.cfg.gate == "linear"
        # Shared: a linear gate is z itself.
        gate = emit(self.hook_gate, z if linear else F.silu(z), shared=linear)
        gated = emit(self.hook_gated, (y + skip) * gate)
        out = emit(self.hook_out, self.out_proj(gated))
        if not return_state or h_last is None:
            return out, None
        seen = torch.cat([rearrange(before, "batch d_inner taps -> batch taps d_inner"), x_in], dim=1)
        conv = rearrange(seen[:, seen.shape[1] - taps :], "batch taps d_inner -> batch d_inner taps")
        return out, LayerState(conv, h_last)

    def _branches(self, r: Float[Tensor, "batch pos d_model"]) -> tuple[Inner, Inner]:
        """x and z, each in memory of its own.

        Not views: nnsight's gradients over several inputs go wrong at strided sites, and a view from a split cannot
        be edited in place. Two products spare the copies, a tenth of the layer's time.
        """
        width, linear = self.cfg.d_inner, self.in_proj
        if plain_linear(linear):
            biases = (None, None) if linear.bias is None else linear.bias.split(width)
            x, z = (F.linear(r, *part) for part in zip(linear.weight.split(width), biases, strict=True))
        else:
            x, z = (half.clone(memory_format=torch.contiguous_format) for half in linear(r).split(width, dim=-1))
        return x, z

    def read(self, states: Float[Tensor, "batch pos d_inner d_state"], C: Float[Tensor, "batch pos d_state"]) -> Inner:
        """y of ``hook_state``'s tensor and ``hook_C``'s: linear in the states."""
        return exact(partial(torch.einsum, "bldn,bln->bld"), states, C)

    def _scan(self, x: Inner, state: LayerState | None, return_state: bool) -> tuple[Inner, Tensor | None]:
        """C h (batch, pos, d_inner) and the last state; picks the path on the line before ``hook_decay``."""
        if not self.cfg.selective and state is None and not return_state and not watched(*self._scan_points()):
            return self._convolve(x), None
        delta, B, C = self._selection(x)
        # Shared: each role is edited apart, also by a hook that writes in place.
        forgets = delta.clamp(min=0) if self.cfg.step == "tangent" else delta
        delta_decay = emit(self.hook_delta_decay, forgets, shared=True)
        delta_write = emit(self.hook_delta_write, delta, shared=True)
        B, C = emit(self.hook_B, B), emit(self.hook_C, C)
        h0 = self._initial_state(None if state is None else state.h, delta)
        A = rates(self.A_log.to(delta.dtype))
        x = x.to(delta.dtype)
        if not watched(self.hook_decay, self.hook_write, self.hook_state):
            return selective_scan(x, delta_decay, delta_write, A, B, C, h0)
        edits = state_edits(self.hook_state)
        if edits or watched(self.hook_decay, self.hook_write):
            decay = decays(delta_decay, A)
            # Autograd keeps the result of exp for itself.
            decay = emit(self.hook_decay, decay, shared=decay.requires_grad)
            write = emit(self.hook_write, (delta_write * x)[..., None] * B[:, :, None])
            states = recurrence(decay, write, h0, edits)
        elif only_read(self.hook_state) and not torch.is_grad_enabled():
            y, states = selective_scan_states(x, delta_decay, delta_write, A, B, C, h0)
            return y, emit(self.hook_state, states)[:, -1].clone()
        else:
            states = selective_states(x, delta_decay, delta_write, A, B, h0)
        # What is returned as state is h itself; a raw hook on hook_state changes one read-out and no more, also where
        # it writes in place: autograd keeps the states for the scan's backward.
        h_last = states[:, -1].clone()
        read = emit(self.hook_state, states, shared=states.requires_grad)
        return self.read(read, C), h_last

    def _scan_points(self) -> tuple[nn.Module, ...]:
        return (
            *(self.hook_delta_pre, self.hook_delta, self.hook_delta_decay, self.hook_delta_write),
            *(self.hook_B, self.hook_C, self.hook_state_init, self.hook_decay, self.hook_write, self.hook_state),
        )

    def _initial_state(self, given: Tensor | None, like: Tensor) -> Tensor | None:
        """h_0, or None where it is zero and nobody looks."""
        asked = given is not None or watched(self.hook_state_init)
        h0 = _given(given, (like.shape[0], self.cfg.d_inner, self.cfg.d_state), like, "h") if asked else None
        return None if h0 is None else emit(self.hook_state_init, h0, shared=True)

    def _convolve(self, x: Inner) -> Inner:
        """C h of the time-invariant twin: one impulse response for each channel."""
        wide = torch.promote_types(x.dtype, torch.float32)
        step = F.softplus(self.dt_bias.to(wide))[:, None]
        A = rates(self.A_log.to(wide))
        response = kernel(
            decays(step.mT[None], A)[0, 0], step * self.B.to(wide), self.C.to(wide).expand_as(A), x.shape[1]
        )
        return convolution(x.to(wide), response)

    def _selection(self, x: Inner) -> tuple[Inner, Tensor, Tensor]:
        """Δ (batch, pos, d_inner), B and C (batch, pos, d_state), in at least fp32."""
        rank, n = self.cfg.rank, self.cfg.d_state
        wide = torch.promote_types(x.dtype, torch.float32)
        shape = x.shape[:2]
        if self.cfg.content_step:
            low, B, C = self.x_proj(x).split([rank, n, n], dim=-1)
            delta_pre = self.dt_proj(low).to(wide)
        else:
            delta_pre = self.dt_bias.to(wide).expand(*shape, -1)
            if self.cfg.selective:
                B, C = self.x_proj(x).split([n, n], dim=-1)
        if self.cfg.selective:
            B, C = (part.to(wide).clone(memory_format=torch.contiguous_format) for part in (B, C))
        else:
            B, C = self.B.to(wide).expand(*shape, -1), self.C.to(wide).expand(*shape, -1)
        if not self.cfg.content_step:  # watched or not, so that both compute the same
            delta_pre, B, C = delta_pre.contiguous(), B.contiguous(), C.contiguous()
        delta_pre = emit(self.hook_delta_pre, delta_pre)
        if self.cfg.step == "tangent":
            return emit(self.hook_delta, tangent(delta_pre, self.dt_proj.bias.to(wide))), B, C
        return emit(self.hook_delta, F.softplus(delta_pre)), B, C


def tangent(u: Tensor, at: Tensor) -> Tensor:
    """softplus(at) + σ(at) (u − at): the line that touches softplus at ``at``, which broadcasts to ``u``."""
    return F.softplus(at) + torch.sigmoid(at) * (u - at)


def _given(value: Tensor | None, shape: tuple[int, ...], like: Tensor, what: str) -> Tensor:
    """``value`` checked against ``shape``, or zeros."""
    if value is None:
        return like.new_zeros(shape)
    if tuple(value.shape) != shape:
        raise BadArgument(f"the state's {what} has shape {tuple(value.shape)}, this model and batch need {shape}")
    return value.to(like)


def _initial_step_bias(width: int, low: float = 1e-3, high: float = 0.1) -> Tensor:
    """b_Δ with softplus(b_Δ) log-uniform in [low, high] (published initialisation)."""
    step = torch.exp(torch.rand(width) * (math.log(high) - math.log(low)) + math.log(low))
    return step + torch.log(-torch.expm1(-step))


class Mamba(Stack):
    """A stack of Mamba-1 blocks between a read-in and a read-out; see :class:`MambaConfig`."""

    architecture = "mamba"

    def __init__(self, cfg: MambaConfig) -> None:
        super().__init__(cfg, lambda: MambaMixer(cfg))
