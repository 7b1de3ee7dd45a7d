"""The one-layer models of the theory papers, small enough to set by hand, with Mamba's site names.

A token is p = (x; y), a query (x; 0), d_in = d + 1. There is no read-in, no norm, no residual sum, no convolution, no
output gate and no skip: one scan whose only channel is the label, read at every position.

    x_t     = y of p_t                    ``hook_x``: the scan's input is the last coordinate of the token
    B, C    = W_B p + b_B, W_C p + b_C    (d_state,)
    Δ       = softplus(w·p + b_Δ)         the selection gate, one for all states
    ā_t     = exp(−Δ_t)                   A = −I, so ā = 1 − σ(w·p + b_Δ)
    w_t     = (1 − exp(−Δ_t)) B_t x_t     ``rule="zoh"``: the factor is σ(w·p + b_Δ); ``rule="euler"``: it is Δ_t
    h_t     = ā_t h_{t−1} + w_t
    F_t     = C_t · h_t                   the prediction

Unrolled at a query, F = Σ_i G_i y_i p_iᵀ W_Bᵀ W_C p_query with G_i = σ_i ∏_{j>i} (1 − σ_j), the query's own 1 − σ
included. With zero-order hold Σ_i G_i + ∏_i (1 − σ_i) = 1; with Euler's rule the G do not sum to one.

Which paper is which configuration:
  selection=True                        "gated": arXiv 2510.00399 §3, without biases
  selection=False                       "linear": its linear transformer, G = 1; no Δ and no sites of it
  bias=True, half_life=N                "scan": the selective scan of arXiv 2509.23779; Δ starts at (log 2)/N where
                                        w·p = 0, so that a context of N tokens halves the weight

D1's other channels never reach the prediction, which it reads at the label channel; here they do not exist.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from hooks.errors import BadArgument
from hooks.onlookers import state_edits, watched
from hooks.point import emit, site
from hooks.precision import exact
from models.recurrence import recurrence
from models.s4 import initial_state
from models.scan import selective_scan
from models.stack import LayerState, Root, State

Inner = Float[Tensor, "batch pos 1"]
Key = Float[Tensor, "batch pos d_state"]
Residual = Float[Tensor, "batch pos d_model"]

RULES = ("zoh", "euler")
STARTS = ("diagonal", "gaussian")


@dataclass(frozen=True)
class TheoryConfig:
    """Which one-layer model, its size and where it starts.

    d_state    rows of W_B and W_C; None: d_in
    start      "diagonal": the first d entries of the diagonals of W_B and W_C are ``scale``, the rest 0 (arXiv
               2510.00399). "gaussian": entries N(0, 1/d_state). In both w ~ N(0, I/d_in), and biases start at 0.
    half_life  b_Δ starts where Δ = (log 2)/half_life for w·p = 0; needs bias. None: b_Δ = 0.
    """

    d_in: int = 31
    d_state: int | None = None
    selection: bool = True
    rule: str = "zoh"
    bias: bool = False
    half_life: float | None = None
    start: str = "diagonal"
    scale: float = 0.2
    d_out: int = 1

    def __post_init__(self) -> None:
        if self.d_in < 2:
            raise BadArgument(f"d_in={self.d_in}: a token is (x; y), so it must be at least 2")
        if self.states < 1:
            raise BadArgument(f"d_state={self.d_state}: it must be at least 1")
        if self.d_out != 1:
            raise BadArgument(f"d_out={self.d_out}: a theory model reads one label channel, so it must be 1")
        if self.rule not in RULES:
            raise BadArgument(f'rule="{self.rule}": there is {", ".join(RULES)}')
        if self.start not in STARTS:
            raise BadArgument(f'start="{self.start}": there is {", ".join(STARTS)}')
        if self.half_life is not None and not (self.bias and self.selection):
            raise BadArgument(f"half_life={self.half_life:g} is a bias of Δ: give bias=True and selection=True")
        if self.half_life is not None and not 1e-30 < self.half_life < math.inf:
            raise BadArgument(f"half_life={self.half_life:g}: it must be a positive number of tokens")
        if not abs(self.scale) < 1e30:  # weights are in single precision
            raise BadArgument(f"scale={self.scale:g}: it must be a finite number below 1e30")

    @property
    def device(self) -> str:
        """Where TransformerLens' ``patching`` collects its numbers; says nothing of where the model is."""
        return "cpu"

    @property
    def n_layers(self) -> int:
        """One."""
        return 1

    @property
    def d_model(self) -> int:
        """Width of what goes into the block: the token itself."""
        return self.d_in

    @property
    def states(self) -> int:
        """Numbers of state of the label channel, the d_state of its sites."""
        return self.d_in if self.d_state is None else self.d_state

    @property
    def head(self) -> str:
        """A regressor: what it predicts is a number."""
        return "regression"


class TheoryMixer(nn.Module):
    """The scan of the label channel; sites in the order in which they fire."""

    def __init__(self, cfg: TheoryConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.hook_x = site("hook_x")
        self.W_B, self.W_C = nn.Parameter(_start(cfg)), nn.Parameter(_start(cfg))
        if cfg.selection:
            self.w = nn.Parameter(torch.randn(cfg.d_in) / math.sqrt(cfg.d_in))
            self.hook_delta_pre, self.hook_delta = site("hook_delta_pre"), site("hook_delta")
            self.hook_delta_decay, self.hook_delta_write = site("hook_delta_decay"), site("hook_delta_write")
        if cfg.bias:
            self.b_B, self.b_C = nn.Parameter(torch.zeros(cfg.states)), nn.Parameter(torch.zeros(cfg.states))
        if cfg.bias and cfg.selection:
            step = math.log(2) if cfg.half_life is None else math.log(2) / cfg.half_life
            self.b_delta = nn.Parameter(torch.tensor([step + math.log(-math.expm1(-step))]))
        self.hook_B, self.hook_C = site("hook_B"), site("hook_C")
        self.hook_state_init = site("hook_state_init")
        self.hook_decay, self.hook_write, self.hook_state = site("hook_decay"), site("hook_write"), site("hook_state")
        self.hook_y, self.hook_out = site("hook_y"), site("hook_out")

    def axis_sizes(self) -> dict[str, int]:
        """Size of each named axis of this mixer's sites."""
        return {"d_inner": 1, "d_state": self.cfg.states}

    def forward(self, r: Residual, state: LayerState | None, return_state: bool) -> tuple[Residual, LayerState | None]:
        """(0, …, 0, F) at every position, and the state after the last one if ``return_state``."""
        wide = torch.promote_types(r.dtype, torch.float32)
        # A copy, not a view of the token.
        x = emit(self.hook_x, r[..., -1:].to(wide).clone(memory_format=torch.contiguous_format))
        decay, write = self._selection(r, x)
        B = emit(self.hook_B, F.linear(r, self.W_B, self.b_B if self.cfg.bias else None).to(wide))
        C = emit(self.hook_C, F.linear(r, self.W_C, self.b_C if self.cfg.bias else None).to(wide))
        y, h_last = self._scan(x, decay, write, B, C, None if state is None else state.h)
        y = emit(self.hook_y, y.to(r.dtype))
        out = emit(self.hook_out, F.pad(y, (r.shape[-1] - 1, 0)))
        return out, LayerState(None, h_last) if return_state else None

    def read(self, states: Float[Tensor, "batch pos d_inner d_state"], C: Key) -> Inner:
        """y of ``hook_state``'s tensor and ``hook_C``'s: linear in the states."""
        return exact(partial(torch.einsum, "bldn,bln->bld"), states, C)

    def _selection(self, r: Residual, x: Inner) -> tuple[Inner, Inner]:
        """−log of the decay, and the factor by which the token is written."""
        if not self.cfg.selection:
            return torch.zeros_like(x), torch.ones_like(x)
        pre = F.linear(r, self.w[None], self.b_delta if self.cfg.bias else None).to(x.dtype)
        delta = emit(self.hook_delta, F.softplus(emit(self.hook_delta_pre, pre)))
        # Shared: each role is edited apart, also by a hook that writes in place.
        decay = emit(self.hook_delta_decay, delta, shared=True)
        write = emit(self.hook_delta_write, delta, shared=True)
        return decay, write if self.cfg.rule == "euler" else -torch.expm1(-write)

    def _scan(
        self, x: Inner, decay: Inner, write: Inner, B: Key, C: Key, given: Tensor | None
    ) -> tuple[Inner, Float[Tensor, "batch 1 d_state"]]:
        """C h, and the last state; picks the path on the line before ``hook_decay``."""
        h0 = initial_state(self.hook_state_init, given, x, self.cfg.states)
        if not watched(self.hook_decay, self.hook_write, self.hook_state):
            # The factor takes the place of Δ_write, which there multiplies B x and nothing else.
            return selective_scan(x, decay, write, -torch.ones_like(B[0, :1]), B, C, h0)
        survives = torch.exp(-decay)[..., None].expand(*x.shape, self.cfg.states)
        survives = emit(self.hook_decay, survives, shared=True)
        written = emit(self.hook_write, (write * x)[..., None] * B[:, :, None])
        states = recurrence(survives, written, h0, state_edits(self.hook_state))
        h_last = states[:, -1].clone()
        read = emit(self.hook_state, states, shared=states.requires_grad)
        return self.read(read, C), h_last


class TheoryBlock(nn.Module):
    """The mixer alone: neither a norm before it nor the residual sum after it."""

    def __init__(self, cfg: TheoryConfig) -> None:
        super().__init__()
        self.hook_resid_pre = site("hook_resid_pre")
        self.mixer = TheoryMixer(cfg)
        self.hook_resid_post = site("hook_resid_post")

    def forward(self, r: Residual, state: LayerState | None, return_state: bool) -> Any:
        # Shared: the same tensor is the caller's own.
        out, state = self.mixer(emit(self.hook_resid_pre, r, shared=True), state, return_state)
        out = emit(self.hook_resid_post, out, shared=True)
        return (out, state) if return_state else out


class Theory(Root):
    """A one-layer model of :class:`TheoryConfig`; ``set_weights`` sets it by hand."""

    architecture = "theory"
    cfg: TheoryConfig
    embed: Any
    head: Any

    def __init__(self, cfg: TheoryConfig) -> None:
        super().__init__(cfg)
        self.embed = _TokenItself(cfg.d_in)
        self.blocks = nn.ModuleList([TheoryBlock(cfg)])
        self.head = _LabelChannel()
        self.setup()

    @torch.no_grad()
    def set_weights(self, **weights: Tensor | float) -> Theory:
        """This model with the named weights replaced: W_B, W_C (d_state, d_in), w (d_in), b_B, b_C, b_delta.

        A value broadcasts to its weight: ``w=0.0`` takes the gate off the tokens. Returns the model itself.
        Raises :class:`BadArgument` for a name that this configuration does not have, or a shape that does not fit.
        """
        mixer: Any = self.blocks[0].mixer
        own = dict(mixer.named_parameters())
        for name, value in weights.items():
            if name not in own:
                raise BadArgument(f'this theory model has no weight "{name}" (there is: {", ".join(own)})')
            given = torch.as_tensor(value, device=own[name].device)
            try:
                fits = torch.broadcast_shapes(given.shape, own[name].shape) == own[name].shape
            except RuntimeError:
                fits = False
            if not fits:
                raise BadArgument(f"{name} has shape {tuple(own[name].shape)}, not {tuple(given.shape)}")
        for name, value in weights.items():
            own[name].copy_(torch.as_tensor(value, dtype=own[name].dtype, device=own[name].device))
        return self

    def step(self, token: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """``(prediction (batch, 1), state)`` of one more token (batch, d_in)."""
        out, state = self(self._one_token(token), state=state, return_state=True)
        return out[:, 0], state

    def axis_sizes(self) -> dict[str, int]:
        """Size of each named axis that does not depend on the input."""
        mixer: Any = self.blocks[0].mixer
        return {"d_model": self.cfg.d_model, "d_out": 1, **mixer.axis_sizes()}

    def _run(
        self, x: Tensor, state: State | None, return_state: bool, start: int | None, stop: int | None
    ) -> tuple[Tensor, list[LayerState | None]]:
        r = emit(self.hook_embed, self.embed(x), shared=True) if start is None else x
        states: list[LayerState | None] = []
        for block in self.blocks[start or 0 : stop]:
            made = block(r, None if state is None else state[0], return_state)
            r, new = made if return_state else (made, None)
            states.append(new)
        return (r if stop is not None else self.head(r)), states


class _TokenItself(nn.Module):
    """p, as it is."""

    def __init__(self, d_in: int) -> None:
        super().__init__()
        self.expects = d_in

    def forward(self, x: Float[Tensor, "batch pos d_in"]) -> Residual:
        return x


class _LabelChannel(nn.Module):
    """The last coordinate of what the block gives."""

    d_out = 1

    def __init__(self) -> None:
        super().__init__()
        self.hook_out = site("head.hook_out")

    def forward(self, r: Residual) -> Float[Tensor, "batch pos 1"]:
        return emit(self.hook_out, r[..., -1:].clone(memory_format=torch.contiguous_format))


def _start(cfg: TheoryConfig) -> Float[Tensor, "d_state d_in"]:
    if cfg.start == "gaussian":
        return torch.randn(cfg.states, cfg.d_in) / math.sqrt(cfg.states)
    weight = torch.zeros(cfg.states, cfg.d_in)
    weight.diagonal()[: cfg.d_in - 1] = cfg.scale
    return weight


def online_gradient(d: int, n: int) -> Theory:
    """The solution of arXiv 2509.23779 for ``n`` pairs of R^d: one step of online gradient with forgetting per pair.

    Δ = (log 2)/n for every token, C·B = β x_qᵀ x_i, and no bias of B or C. With α = 2^{−1/n}

        c1 = α (1 − α^n),   c2 = (1 − α)² α² (1 − α^{2n}) / (1 − α²),   β = c1 / (c1² + (d + 1) c2)

    β is the scale that minimises E (F − w·x_q)² for x, w ~ N(0, I); that minimum is d (1 − c1 β), twice the loss of the
    paper, which has a ½.
    """
    alpha = 2.0 ** (-1 / n)
    c1 = alpha * (1 - alpha**n)
    c2 = ((1 - alpha) * alpha) ** 2 * (1 - alpha ** (2 * n)) / (1 - alpha**2)
    beta = c1 / (c1**2 + (d + 1) * c2)
    model = Theory(TheoryConfig(d_in=d + 1, d_state=d, bias=True, half_life=float(n)))
    read = torch.eye(d, d + 1)
    return model.set_weights(W_B=read, W_C=beta * read, w=0.0)


def pattern_vote(
    relevant: Float[Tensor, "pattern d"],
    outliers: Float[Tensor, "kind d"] | None,
    sharpness: float = 10.0,
) -> Theory:
    """A vote over examples: for the label of an example with the query's pattern, against that with another's.

    ``relevant`` are orthogonal patterns of one norm; the score C·B of examples with the patterns i and j is δ_ij − ½,
    in units of norm⁴, so also the other pattern's label tells. With ``outliers`` the selection gate reads them:
    w·p = −``sharpness`` for an example that has one of these (orthogonal) vectors added, and 0 for a clean one, so that
    a contaminated example is neither written nor forgets. Without, the twin of G = 1.
    """
    d = relevant.shape[1]
    directions = F.pad(relevant, (0, 1))
    score = torch.eye(len(relevant)) - 0.5
    cfg = TheoryConfig(d_in=d + 1, d_state=len(relevant), selection=outliers is not None)
    model = Theory(cfg).set_weights(W_B=directions, W_C=score @ directions)
    if outliers is not None:
        along = outliers / outliers.pow(2).sum(-1, keepdim=True)
        model.set_weights(w=-sharpness * F.pad(along.sum(0), (0, 1)))
    return model
