"""The linear transformer: causal linear attention written as a recurrence whose decay is 1, with Mamba's site names.

One block is r ← r + mixer(RMSNorm(r)), then r ← r + MLP(RMSNorm(r)) where ``d_mlp`` is not 0. The mixer, for each head
(Katharopoulos et al. 2020, §3.2–3.3):

    v, k, q = W_v r̂, W_k r̂, W_q r̂          v: d_head values, k and q: d_state features
    B, C    = φ(k), φ(q) / d_state            the write key and the read key; φ is the identity or elu + 1
    ā_t     = 1                               nothing is ever forgotten
    w_t     = v_t B_tᵀ
    h_t     = h_{t−1} + w_t                   (d_head, d_state)
    y_t     = h_t C_t
    out     = W_out y,  or W_out (y / norm) with norm_t = Σ_{s≤t} C_t · B_s where ``normalise``

``x`` of the vocabulary is the value v: d_inner channels are the heads' values, one head after the other. Where
``normalise`` is on, each head has one value more, the constant 1: what it reads out is the norm, and the state that
goes in and out and is swapped or edited holds it too. With more than one head ``hook_B`` and ``hook_C`` have a head
axis. With φ the identity a norm can come near 0 or be negative; it is then kept ``NORM_LEAST`` away from 0.

There are no positions: the order of the tokens is visible only through what each of them is added to, as in the
transformer of Grazzi et al. (2024), whose positions are zeroed; unless ``d_conv`` > 1 puts a causal depthwise
convolution in front of v, k and q. Without a convolution there are no conv sites.

Two paths, one function: in tiles of ``TILE`` tokens, (C Bᵀ ∘ causal) v within a tile and the state between them, or,
where one of the three 4-D sites is watched, the recurrence token by token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from hooks.errors import BadArgument
from hooks.onlookers import state_edits, watched
from hooks.point import emit, site
from hooks.precision import exact
from models.mamba import CausalConv
from models.recurrence import recurrence
from models.stack import LayerState, Stack, check_config

Inner = Float[Tensor, "batch pos d_inner"]
Heads = Float[Tensor, "batch pos head d_state"]
State = Float[Tensor, "batch d_inner d_state"]

TILE = 64
NORM_LEAST = 1e-3
FEATURES = ("identity", "elu")


@dataclass(frozen=True)
class LinearAttentionConfig:
    """Shape of a linear transformer. ``d_state`` is the number of features of one head; None means d_model / n_heads,
    which is also the number of values of a head. ``d_mlp`` is the MLP's width, 0 for none.
    """

    d_model: int = 64
    n_layers: int = 8
    n_heads: int = 4
    d_state: int | None = None
    feature: str = "elu"
    normalise: bool = True
    d_mlp: int = 256
    d_conv: int = 1
    norm_eps: float = 1e-5
    head: str = "regression"
    d_in: int = 1
    d_out: int = 1
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        check_config(self, "d_model", "n_layers", "n_heads", "d_state", "d_conv", "d_in", "d_out")
        if self.d_mlp < 0:
            raise BadArgument(f"d_mlp={self.d_mlp}: it must be at least 0 (0 for no MLP)")
        if self.d_model % self.n_heads:
            raise BadArgument(f"d_model={self.d_model} cannot be shared equally by n_heads={self.n_heads}")
        if self.feature not in FEATURES:
            raise BadArgument(f'feature="{self.feature}": there is {", ".join(FEATURES)}')

    @property
    def device(self) -> str:
        """Where TransformerLens' ``patching`` collects its numbers; says nothing of where the model is."""
        return "cpu"

    @property
    def features(self) -> int:
        """Features of one head, the d_state of its sites."""
        return self.d_model // self.n_heads if self.d_state is None else self.d_state

    @property
    def values(self) -> int:
        """Values of one head; the constant 1 of a normalised one counts."""
        return self.d_model // self.n_heads + int(self.normalise)

    @property
    def d_inner(self) -> int:
        """Channels of the recurrence."""
        return self.n_heads * self.values


class LinearAttentionMixer(nn.Module):
    """Causal linear attention; sites in the order in which they fire."""

    def __init__(self, cfg: LinearAttentionConfig) -> None:
        super().__init__()
        self.cfg = cfg
        keys = cfg.n_heads * cfg.features
        if cfg.d_conv > 1:
            whole = ("batch", "pos", "d_model")  # v, k and q are all made of what the convolution gives
            self.hook_x_in = site("hook_x_in", axes=whole)
            self.hook_conv_init = site("hook_conv_init", axes=("batch", "d_model", "taps"))
            self.conv1d = CausalConv(cfg.d_model, cfg.d_conv, bias=True)
            self.hook_x_pre = site("hook_x_pre", axes=whole)
        self.v_proj = nn.Linear(cfg.d_model, cfg.d_model, bias=False)
        self.k_proj = nn.Linear(cfg.d_model, keys, bias=False)
        self.q_proj = nn.Linear(cfg.d_model, keys, bias=False)
        axes = ("batch", "pos", "head", "d_state") if cfg.n_heads > 1 else None
        self.hook_x = site("hook_x")
        self.hook_B, self.hook_C = site("hook_B", axes=axes), site("hook_C", axes=axes)
        self.hook_state_init = site("hook_state_init")
        self.hook_decay, self.hook_write, self.hook_state = site("hook_decay"), site("hook_write"), site("hook_state")
        self.hook_y = site("hook_y")
        if cfg.normalise:
            self.hook_norm = site("hook_norm")
        self.out_proj = nn.Linear(cfg.d_model, cfg.d_model, bias=False)
        self.out_proj.weight.data /= math.sqrt(2 * cfg.n_layers)
        self.hook_out = site("hook_out")

    def axis_sizes(self) -> dict[str, int]:
        """Size of each named axis of this mixer's sites."""
        cfg = self.cfg
        sizes = {"d_inner": cfg.d_inner, "d_state": cfg.features, "head": cfg.n_heads}
        return {**sizes, "taps": cfg.d_conv - 1} if cfg.d_conv > 1 else sizes

    def forward(
        self, r: Float[Tensor, "batch pos d_model"], state: LayerState | None, return_state: bool
    ) -> tuple[Float[Tensor, "batch pos d_model"], LayerState | None]:
        """Mixer output, and the state after the last position if ``return_state``."""
        cfg = self.cfg
        seen, conv = self._convolve(r, None if state is None else state.conv, return_state)
        x = emit(self.hook_x, self._values(seen))
        wide = torch.promote_types(x.dtype, torch.float32)
        B = emit(self.hook_B, self._keys(self.k_proj(seen).to(wide)))
        C = emit(self.hook_C, self._keys(self.q_proj(seen).to(wide)) / cfg.features)
        y, h_last = self._scan(x.to(wide), B, C, None if state is None else state.h, return_state)
        y = emit(self.hook_y, y)
        heads = rearrange(y, "batch pos (head value) -> batch pos head value", head=cfg.n_heads)
        if cfg.normalise:
            norm = emit(self.hook_norm, heads[..., -1].contiguous())
            away = torch.where(norm < 0, norm.clamp(max=-NORM_LEAST), norm.clamp(min=NORM_LEAST))
            heads = heads[..., :-1] / away[..., None]
        read = rearrange(heads, "batch pos head value -> batch pos (head value)").to(r.dtype)
        out = emit(self.hook_out, self.out_proj(read))
        return out, None if h_last is None or not return_state else LayerState(conv, h_last)

    def read(self, states: Float[Tensor, "batch pos d_inner d_state"], C: Tensor) -> Inner:
        """y of ``hook_state``'s tensor and ``hook_C``'s: linear in the states."""
        by_head = rearrange(states, "batch pos (head value) n -> batch pos head value n", head=self.cfg.n_heads)
        y = exact(partial(torch.einsum, "blhvn,blhn->blhv"), by_head, self._by_head(C))
        return rearrange(y, "batch pos head value -> batch pos (head value)")

    def _scan(
        self, x: Inner, B: Tensor, C: Tensor, given: State | None, return_state: bool
    ) -> tuple[Inner, State | None]:
        h0 = self._initial_state(given, x)
        if not watched(self.hook_decay, self.hook_write, self.hook_state):
            return self._in_tiles(x, B, C, h0)
        write = self._write(x, B)
        decay = emit(self.hook_decay, torch.ones_like(write))
        write = emit(self.hook_write, write)
        states = recurrence(decay, write, h0, state_edits(self.hook_state))
        h_last = states[:, -1].clone()
        read = emit(self.hook_state, states, shared=states.requires_grad)
        return self.read(read, C), h_last

    def _in_tiles(self, x: Inner, B: Tensor, C: Tensor, h0: State | None) -> tuple[Inner, State]:
        """The same without a tensor of states: quadratic within a tile, the state between tiles."""
        heads = self.cfg.n_heads
        values = rearrange(x, "batch pos (head value) -> batch head pos value", head=heads)
        keys, queries = (rearrange(self._by_head(part), "b pos head n -> b head pos n") for part in (B, C))
        h = None if h0 is None else rearrange(h0, "batch (head value) n -> batch head value n", head=heads)
        pieces = []
        for start in range(0, x.shape[1], TILE):
            v, k, q = (part[:, :, start : start + TILE] for part in (values, keys, queries))
            y = exact(torch.matmul, exact(torch.matmul, q, k.mT).tril(), v)
            if h is not None:
                y = y + exact(torch.matmul, q, h.mT)
            new = exact(torch.matmul, v.mT, k)
            h = new if h is None else h + new
            pieces.append(y)
        assert h is not None  # an empty input is refused by the stack
        y = rearrange(torch.cat(pieces, dim=2), "batch head pos value -> batch pos (head value)")
        return y.contiguous(), rearrange(h, "batch head value n -> batch (head value) n").contiguous()

    def _write(self, x: Inner, B: Tensor) -> Float[Tensor, "batch pos d_inner d_state"]:
        return x[..., None] * repeat(self._by_head(B), "b pos head n -> b pos (head v) n", v=self.cfg.values)

    def _by_head(self, key: Tensor) -> Heads:
        return key if key.ndim == 4 else key[:, :, None]

    def _values(self, r: Float[Tensor, "batch pos d_model"]) -> Inner:
        v = self.v_proj(r)
        if not self.cfg.normalise:
            return v
        heads = rearrange(v, "batch pos (head value) -> batch pos head value", head=self.cfg.n_heads)
        return rearrange(F.pad(heads, (0, 1), value=1.0), "batch pos head value -> batch pos (head value)")

    def _keys(self, z: Float[Tensor, "batch pos keys"]) -> Tensor:
        features = F.elu(z) + 1 if self.cfg.feature == "elu" else z
        if self.cfg.n_heads == 1:
            return features
        return rearrange(features, "batch pos (head n) -> batch pos head n", head=self.cfg.n_heads)

    def _convolve(
        self, r: Float[Tensor, "batch pos d_model"], given: Tensor | None, return_state: bool
    ) -> tuple[Float[Tensor, "batch pos d_model"], Tensor | None]:
        """What v, k and q are made of, and the taps after the last position."""
        taps = self.cfg.d_conv - 1
        if taps == 0:
            return r, None
        x_in = emit(self.hook_x_in, r, shared=True)
        shape = (r.shape[0], self.cfg.d_model, taps)
        if given is not None and tuple(given.shape) != shape:
            raise BadArgument(f"the state's conv has shape {tuple(given.shape)}, this model and batch need {shape}")
        before = emit(self.hook_conv_init, r.new_zeros(shape) if given is None else given.to(r), shared=True)
        x_pre = emit(self.hook_x_pre, self.conv1d(x_in, before))
        if not return_state:
            return x_pre, None
        seen = torch.cat([rearrange(before, "batch d taps -> batch taps d"), x_in], dim=1)
        return x_pre, rearrange(seen[:, seen.shape[1] - taps :], "batch taps d -> batch d taps")

    def _initial_state(self, given: State | None, like: Tensor) -> State | None:
        """h_0, or None where it is zero and nobody looks."""
        shape = (like.shape[0], self.cfg.d_inner, self.cfg.features)
        if given is None:
            if not watched(self.hook_state_init):
                return None
            given = like.new_zeros(shape)
        if tuple(given.shape) != shape:
            raise BadArgument(f"the state's h has shape {tuple(given.shape)}, this model and batch need {shape}")
        return emit(self.hook_state_init, given.to(like), shared=True)


class LinearTransformer(Stack):
    """A stack of linear-attention blocks between a read-in and a read-out; see :class:`LinearAttentionConfig`."""

    architecture = "linear_attention"

    def __init__(self, cfg: LinearAttentionConfig) -> None:
        super().__init__(cfg, lambda: LinearAttentionMixer(cfg), d_mlp=cfg.d_mlp)
