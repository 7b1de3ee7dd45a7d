"""What every model here shares: RMSNorm, the pre-norm residual block, the stack with its read-in and read-out.

A model is ``Stack(cfg, mixer)``: read-in, ``n_layers`` blocks r ← r + mixer(norm(r)), a final norm, a read-out. The
mixer is the architecture. State goes in and out as one :class:`LayerState` for each layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import register_pytree_node

from hooks import inputs
from hooks.brief import lines, parts
from hooks.errors import BadArgument, told
from hooks.finite import check_input, check_weights, checked
from hooks.machine.uncompiled import never_compiled
from hooks.point import HookedModule, emit, site
from hooks.recompute import begin
from models.card import Card
from models.heads import ReadOut, TiedLinear, read_in


class LayerState(NamedTuple):
    """What one layer carries from token to token; a part that the architecture lacks is None."""

    conv: Float[Tensor, "batch d_inner taps"] | None
    """The last d_conv − 1 inputs of the convolution, oldest first."""
    h: Float[Tensor, "batch d_inner n"]
    """The recurrence's state (complex states as real parts, then imaginary parts)."""

    def __repr__(self) -> str:
        return f"LayerState({'; '.join(f'{name} {text}' for name, text in parts(self).items())})"


State = Sequence[LayerState]


class Carried(list[LayerState]):
    """What a model returns as its state: one :class:`LayerState` for each layer, and ``seen``, the tokens so far.

    Any sequence of layer states is a state. Where it has no ``seen`` (a plain list), the only thing lacking is what
    ``hooks.edit(…, positions="sequence")`` counts by.
    """

    def __init__(self, layers: Iterable[LayerState] = (), seen: int | None = None) -> None:
        super().__init__(layers)
        self.seen = seen

    def __repr__(self) -> str:
        each = {f"layer {i}": repr(layer) for i, layer in enumerate(self)}
        return lines(f"Carried after {'?' if self.seen is None else self.seen} tokens", each)


# So that torch's transforms go into it as they go into a list.
register_pytree_node(Carried, lambda state: (list(state), state.seen), lambda layers, seen: Carried(layers, seen))


class Config(Protocol):
    """What the stack reads of a model's configuration."""

    d_model: int
    n_layers: int
    norm_eps: float
    head: str


def check_config(cfg: Any, *sizes: str) -> None:
    """Raise :class:`BadArgument` where one of the fields ``sizes`` is below 1, or ``norm_eps`` not in [0, inf).

    None in a field stands for the field's own default, which the class works out of the others.
    """
    for name in sizes:
        value = getattr(cfg, name)
        if value is not None and value < 1:
            raise BadArgument(f"{name}={value}: it must be at least 1")
    if not 0 <= getattr(cfg, "norm_eps", 0.0) < math.inf:
        raise BadArgument(f"norm_eps={cfg.norm_eps}: it must be a finite number, at least 0")


class RMSNorm(nn.Module):
    """r / sqrt(mean r² + eps) · weight, computed in at least fp32 (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.hook_scale = site("hook_scale")
        self.hook_normalized = site("hook_normalized")

    def forward(self, r: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos width"]:
        wide = r.to(torch.promote_types(r.dtype, torch.float32))
        # Shared: autograd keeps the result of sqrt for itself.
        scale = emit(self.hook_scale, (wide.pow(2).mean(-1, keepdim=True) + self.eps).sqrt(), shared=True)
        return emit(self.hook_normalized, wide / scale).to(r.dtype) * self.weight


class MLP(nn.Module):
    """W_out GELU(W_in r̂ + b) + b, position by position."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(d_model, width)
        self.hook_post = site("hook_post")
        self.out_proj = nn.Linear(width, d_model)
        self.hook_mlp_out = site("hook_mlp_out")

    def forward(self, r: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return emit(self.hook_mlp_out, self.out_proj(emit(self.hook_post, F.gelu(self.in_proj(r)))))


class Block(nn.Module):
    """r + mixer(norm(r)), the pre-norm residual block of Mamba (Gu & Dao 2023, §3.4).

    With ``d_mlp`` the block goes on with r + mlp(norm_mlp(r)), as a transformer's does.
    """

    def __init__(self, d_model: int, eps: float, mixer: nn.Module, d_mlp: int = 0) -> None:
        super().__init__()
        self.hook_resid_pre = site("hook_resid_pre")
        self.norm = RMSNorm(d_model, eps)
        self.mixer = mixer
        self.mlp: MLP | None = None
        if d_mlp:
            self.hook_resid_mid = site("hook_resid_mid")
            self.norm_mlp = RMSNorm(d_model, eps)
            self.mlp = MLP(d_model, d_mlp)
        self.hook_resid_post = site("hook_resid_post")

    def forward(self, r: Float[Tensor, "batch pos d_model"], state: LayerState | None, return_state: bool) -> Any:
        """The residual stream after the block; with ``return_state`` also the mixer's state. One tensor where one is
        asked for: who looks at whole blocks (captum) finds no None beside it.
        """
        # Shared: the same tensor is the last block's hook_resid_post, or the caller's own.
        r = emit(self.hook_resid_pre, r, shared=True)
        out, state = self.mixer(self.norm(r), state, return_state)
        r = r + out
        if self.mlp is not None:
            # Shared: the sum below needs it as it is.
            r = emit(self.hook_resid_mid, r, shared=True)
            r = r + self.mlp(self.norm_mlp(r))
        r = emit(self.hook_resid_post, r)
        return (r, state) if return_state else r


class Root(HookedModule):
    """Root of every model: ``model(x)`` is the prediction at every position.

    A subclass adds ``blocks``, ``ln_final`` and ``head``, in the order in which they fire, and :meth:`_run`.

    Attributes: ``cfg`` (frozen dataclass), ``architecture`` (its name in ``models.ARCHITECTURES``), ``card`` (what a
    checkpoint says of itself; empty for a fresh model).
    """

    architecture: str
    blocks: nn.ModuleList
    head: Any

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.cfg = cfg
        self.card: dict[str, Any] = Card()
        self.embed: Any = read_in(cfg)
        self.hook_embed = site("hook_embed")
        self.register_load_state_dict_pre_hook(_one_table)

    @never_compiled
    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        return_state: bool = False,
        stop_at_layer: int | None = None,
        start_at_layer: int | None = None,
    ) -> Any:
        """The prediction (batch, pos, d_out); with ``return_state`` also the state after the last position.

        ``x``: (batch, pos, d_in), or integers (batch, pos) for a language model. ``state``: what an earlier call
        returned, so that chunks equal the whole. ``stop_at_layer=k``: the residual stream before block k instead;
        ``start_at_layer=k``: ``x`` is that residual stream, (batch, pos, d_model). Both count from the end where
        negative, as in TransformerLens.

        Raises :class:`BadArgument` for an input or a state of another shape, dtype or device, :class:`NonFinite` for
        NaN or inf, with the place where it first appears.
        """
        if (tied := _tied(self)) is not None:
            tied.follow(self.embed)  # which somebody, or DataParallel, may have replaced
        self.runs += 1
        start, stop = self._layer(start_at_layer, "start_at_layer"), self._layer(stop_at_layer, "stop_at_layer")
        self.last_stop = stop_at_layer
        if start is not None and stop is not None and start > stop:
            raise BadArgument(f"start_at_layer={start_at_layer} is after stop_at_layer={stop_at_layer}")
        self.check_input(x, state, start)
        self.tokens_before = before = 0 if state is None else getattr(state, "seen", None)
        check_input(x)
        check_weights(self)
        begin()
        output, new_state = checked(self, lambda: self._run(x, state, return_state, start, stop))
        if not return_state:
            return output
        return output, Carried(new_state, None if before is None else before + x.shape[1])

    def _run(
        self, x: Tensor, state: State | None, return_state: bool, start: int | None, stop: int | None
    ) -> tuple[Tensor, list[Any]]:
        """What ``forward`` returns, for arguments that have been checked; layers are counted from the front."""
        raise NotImplementedError

    def _layer(self, layer: Any, what: str) -> int | None:
        """``layer`` counted from the front; blocks 0 … n_layers, and the end itself."""
        count = len(self.blocks)
        if layer is None:
            return None
        if isinstance(layer, bool) or not isinstance(layer, int) or not -count <= layer <= count:
            raise BadArgument(
                f"{what}={told(layer)}: the model has {count} layers; give a number from {-count} to {count}"
            )
        return layer if layer >= 0 else count + layer

    def check_input(self, x: Any, state: Any = None, start: int | None = None, what: str = "the input") -> None:
        """Nothing, if the model can read ``x`` and go on from ``state``; else :class:`BadArgument`.

        ``start`` is the block that ``x`` goes into, None for a prompt. A tensor of another dtype is refused and not
        converted: rounding somebody's numbers is theirs to ask for (``hooks/inputs.py``).
        """
        expected = self.embed.expects if start is None else self.cfg.d_model
        weight = inputs.first_weight(self.embed if start is None else self)
        weight = inputs.first_weight(self) if weight is None else weight
        inputs.tensor(x, None if expected is None else weight, what)
        if x.ndim != (2 if expected is None else 3) or (expected is not None and x.shape[-1] != expected):
            want = "integers (batch, pos)" if expected is None else f"(batch, pos, {expected})"
            alone = x.ndim == 1 if expected is None else x.ndim == 2 and x.shape[-1] == expected
            hint = ": one prompt is x[None]" if alone else ""
            raise BadArgument(f"the model takes {want}, {what} has shape {tuple(x.shape)}{hint}")
        if x.shape[0] == 0 or x.shape[1] == 0:
            raise BadArgument(f"{what} has shape {tuple(x.shape)}: give at least one prompt of one token")
        if weight is not None:
            (inputs.tokens if expected is None else inputs.same_kind)(x, weight, what)
        if state is None:
            return
        if not isinstance(state, Sequence) or not all(hasattr(layer, "h") for layer in state):
            raise BadArgument(f"the state is {told(state)}: give what return_state=True returned, one part a layer")
        if len(state) != self.cfg.n_layers:
            raise BadArgument(f"the state has {len(state)} layers, the model has {self.cfg.n_layers}")

    def tokens_to_residual_directions(self, tokens: Any) -> Float[Tensor, "*tokens d_model"]:
        """TransformerLens' name: the rows of the read-out for these outputs (tokens, classes, values), with the final
        norm's weight in them. A normalised residual stream times one of them, summed, is that output less its bias.
        """
        if not hasattr(self.head, "linear"):
            raise BadArgument(f"a {type(self).__name__} has no read-out: what it predicts is a channel of its block")
        index = torch.as_tensor(tokens, device=self.head.linear.weight.device)
        if index.is_floating_point():
            raise BadArgument(f"outputs are picked by number, 0 to {self.head.d_out - 1}, not by {told(tokens)}")
        norm: Any = self.ln_final
        weight: Tensor = self.head.linear.weight * norm.weight
        return weight[index.long()]

    def _one_token(self, token: Any) -> Tensor:
        """``token`` as prompts of one token; :class:`BadArgument` where it is not one token a prompt."""
        width = self.embed.expects
        inputs.tensor(token, inputs.first_weight(self), "the token")
        if token.ndim != (1 if width is None else 2):
            want = "integers (batch,)" if width is None else f"(batch, {width})"
            raise BadArgument(f"step takes one token of each prompt, {want}; this one has shape {tuple(token.shape)}")
        prompts: Tensor = token[:, None]
        return prompts


def _tied(model: Root) -> TiedLinear | None:
    read_out = getattr(model.head, "linear", None)
    return read_out if isinstance(read_out, TiedLinear) else None


def _one_table(
    model: Root, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any,
    errors: list[str],
) -> None:  # fmt: skip
    """A tied model has one table: a dict that names it as the read-out too, or only so, gives the one; two different
    ones are refused.
    """
    if _tied(model) is None:
        return
    table, second = f"{prefix}embed.table.weight", f"{prefix}head.linear.weight"
    if second not in state_dict:
        return
    value = state_dict.pop(second)
    first = state_dict.setdefault(table, value)
    if first is not value and (first.shape != value.shape or not torch.equal(first.to(value), value)):
        errors.append(
            f"{second} differs from {table}, and in this model they are one tensor: build it with tie_embeddings=False"
        )


class Stack(Root):
    """Read-in, blocks with a mixer that carries a state from token to token, final norm, read-out."""

    def __init__(self, cfg: Any, mixer: Callable[[], nn.Module], d_mlp: int = 0) -> None:
        super().__init__(cfg)
        self.blocks = nn.ModuleList(Block(cfg.d_model, cfg.norm_eps, mixer(), d_mlp) for _ in range(cfg.n_layers))
        self.ln_final = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.head = ReadOut(cfg, self.embed)
        self.setup()

    def step(self, token: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """``(prediction (batch, d_out), state)`` of one more token: (batch, d_in), or integers (batch,)."""
        out, state = self(self._one_token(token), state=state, return_state=True)
        return out[:, 0], state

    def axis_sizes(self) -> dict[str, int]:
        """Size of each named axis that does not depend on the input."""
        mixer: Any = self.blocks[0].mixer
        mlp: Any = self.blocks[0].mlp
        width = {} if mlp is None else {"d_mlp": mlp.in_proj.out_features}
        return {"d_model": self.cfg.d_model, "d_out": self.head.d_out, **width, **mixer.axis_sizes()}

    def _run(
        self, x: Tensor, state: State | None, return_state: bool, start: int | None, stop: int | None
    ) -> tuple[Tensor, list[Any]]:
        r = emit(self.hook_embed, self.embed(x)) if start is None else x
        states: list[Any] = []
        for i in range(start or 0, len(self.blocks) if stop is None else stop):
            made = self.blocks[i](r, None if state is None else state[i], return_state)
            r, new = made if return_state else (made, None)
            states.append(new)
        return (r if stop is not None else self.head(self.ln_final(r))), states
