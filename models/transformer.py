"""A softmax transformer (GPT-2's blocks; Radford et al. 2019) that is a TransformerLens model, under our heads.

The blocks and the final norm are those of ``TransformerBridge.boot_native``; the root, the read-in and the read-out are
ours. One block is

    r ← r + W_O softmax(q k / sqrt(d_head)) v + b     causal, n_heads heads of d_head = d_model / n_heads
    r ← r + W_out GELU(W_in r̂ + b) + b               d_mlp wide (4 d_model by default)

with r̂ = LayerNorm(r) before each. Nothing tells positions apart: TransformerLens' positional embedding is zeroed and
frozen, as in the papers' linear regression without positions (Garg et al. 2022; Grazzi et al. 2024, §3), and is not
run. There is no dropout. Initial weights are TransformerLens' "gpt2": N(0, 0.64 / d_model), those that write into the
residual stream divided by sqrt(2 n_layers), biases 0.

Sites are TransformerLens' own points. The table lists each point once, under the name that TransformerLens' classic
models give it (``blocks.0.attn.hook_z``); the bridge's own name for the same point (``blocks.0.attn.o.hook_in``) works
wherever a name does. ``setup()`` must not run over a bridge: it would overwrite the names that its points know
themselves by with paths through ``_original_component``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from hooks.errors import BadArgument
from hooks.point import as_ours, emit
from hooks.vocabulary import kind_of
from models.heads import ReadOut
from models.stack import Root, State, check_config

Residual = Float[Tensor, "batch pos d_model"]

POINTS: dict[str, str] = {
    "hook_resid_pre": "hook_in",
    "ln1.hook_in": "ln1.hook_in",
    "ln1.hook_scale": "ln1.hook_scale",
    "ln1.hook_normalized": "ln1.hook_normalized",
    "ln1.hook_out": "ln1.hook_out",
    "attn.hook_in": "attn.hook_in",
    "attn.q.hook_in": "attn.q.hook_in",
    "attn.hook_q": "attn.q.hook_out",
    "attn.k.hook_in": "attn.k.hook_in",
    "attn.hook_k": "attn.k.hook_out",
    "attn.v.hook_in": "attn.v.hook_in",
    "attn.hook_v": "attn.v.hook_out",
    "attn.hook_attn_scores": "attn.hook_attn_scores",
    "attn.hook_pattern": "attn.hook_pattern",
    "attn.hook_z": "attn.o.hook_in",
    "attn.o.hook_out": "attn.o.hook_out",
    "hook_attn_out": "attn.hook_out",
    "ln2.hook_in": "ln2.hook_in",  # what the bridge also calls hook_resid_mid; an edit reaches the MLP's branch alone
    "ln2.hook_scale": "ln2.hook_scale",
    "ln2.hook_normalized": "ln2.hook_normalized",
    "ln2.hook_out": "ln2.hook_out",
    "mlp.hook_in": "mlp.hook_in",
    "mlp.in.hook_in": "mlp.in.hook_in",
    "mlp.hook_pre": "mlp.in.hook_out",
    "mlp.hook_post": "mlp.out.hook_in",
    "mlp.out.hook_out": "mlp.out.hook_out",
    "hook_mlp_out": "mlp.hook_out",
    "hook_resid_post": "hook_out",
}
"""The points of one block in the order in which they fire: classic name → the bridge's own. The bridge has more points
(``hook_result``, ``hook_q_input`` …), which fire only under switches that are off here."""
FINAL = ("hook_in", "hook_scale", "hook_normalized", "hook_out")

# What the bridge's module tree has between the names of its parts, and the names that its wrapped parts have.
_WRAPPED = "_original_component."
_INNER = {".mlp.fc_in.": ".mlp.in.", ".mlp.fc_out.": ".mlp.out."}


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of a transformer. ``d_mlp=None`` means 4 d_model; ``n_ctx`` is the longest input that it takes."""

    d_model: int = 64
    n_layers: int = 8
    n_heads: int = 4
    d_mlp: int | None = None
    n_ctx: int = 512
    norm_eps: float = 1e-5
    head: str = "regression"
    d_in: int = 1
    d_out: int = 1
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        check_config(self, "d_model", "n_layers", "n_heads", "n_ctx", "d_in", "d_out")
        if self.d_mlp is not None and self.d_mlp < 1:
            raise BadArgument(f"d_mlp={self.d_mlp}: it must be at least 1, or None for 4 d_model")
        if self.d_model % self.n_heads:
            raise BadArgument(f"n_heads={self.n_heads} does not divide d_model={self.d_model}")

    @property
    def device(self) -> str:
        """Where TransformerLens' ``patching`` collects its numbers; says nothing of where the model is."""
        return "cpu"

    @property
    def d_head(self) -> int:
        """Width of one head."""
        return self.d_model // self.n_heads

    @property
    def mlp_width(self) -> int:
        """Hidden units of the MLP."""
        return 4 * self.d_model if self.d_mlp is None else self.d_mlp


class Attention(nn.Module):
    """Causal softmax attention inside the bridge, on the bridge's projections.

    In place of the native one, whose ``hook_attn_scores`` fires after the output has been computed and shows the
    pattern, so that an edit there would do nothing. Here it holds the scores, before the mask: every number in it is
    finite, and no edit can let a position see what comes after it. It also takes half the time.
    """

    # Asks the bridge to hand over its hook_pattern.
    accepts_pattern_fn = True

    def __init__(self, bridge: Any) -> None:
        super().__init__()
        native = bridge.original_component
        self.n_heads, self.d_head = native.n_heads, native.d_head
        self.q, self.k, self.v, self.o = native.q, native.k, native.v, native.o
        self.hook_attn_scores = bridge.hook_attn_scores

    def forward(self, hidden_states: Residual, pattern_fn: nn.Module, **unused: Any) -> tuple[Residual, None]:
        q, k, v = (
            rearrange(project(hidden_states), "batch pos (head d_head) -> batch head pos d_head", head=self.n_heads)
            for project in (self.q, self.k, self.v)
        )
        scores = emit(self.hook_attn_scores, (q * self.d_head**-0.5) @ k.transpose(-2, -1))
        # A sum with -inf and not a masked fill: the softmax then needs no second pass, here or in the backward.
        mask = scores.new_full(scores.shape[-2:], float("-inf")).triu(1)
        pattern = emit(pattern_fn, torch.softmax(scores + mask, dim=-1))
        return self.o(rearrange(pattern @ v, "batch head pos d_head -> batch pos (head d_head)")), None


class Transformer(Root):
    """The softmax transformer; ``bridge`` is the TransformerLens model that its blocks and final norm belong to.

    It has no recurrent state: no ``step``, and ``state=`` and ``return_state=`` are refused.
    """

    architecture = "transformer"
    cfg: TransformerConfig

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__(cfg)
        bridge = boot(cfg)
        # Beside the module tree: only what runs is a submodule, has a place in a checkpoint and counts as a weight.
        self.__dict__["bridge"] = bridge
        self.blocks, self.ln_final = bridge.blocks, bridge.ln_final
        self.head = ReadOut(cfg, self.embed)
        self._list_points(bridge)
        self.register_state_dict_post_hook(_tidy)
        self.register_load_state_dict_pre_hook(_untidy)

    def _list_points(self, bridge: Any) -> None:
        """What ``setup()`` does elsewhere, with the points of the bridge left as they are."""
        own: dict[str, Any] = {"hook_embed": self.hook_embed}
        for name in _names(self.cfg.n_layers):
            own[name] = bridge.hook_dict[name]
        own["head.hook_out"] = self.head.hook_out
        self.hook_dict = own
        listed = {id(point): name for name, point in own.items()}
        names = {other: listed.get(id(point), other) for other, point in bridge.hook_dict.items()}
        self.aliases = {other: name for other, name in names.items() if other != name}
        theirs = bridge.mod_dict.items()
        self.mod_dict = {n: part for n, part in theirs if n.startswith(("blocks", "ln_final")) and _WRAPPED not in n}
        for name, part in self.named_modules():
            if name.startswith(("embed", "hook_embed", "head")):
                self.mod_dict[name] = part
                part.name = name  # type: ignore[assignment]
        for name, point in own.items():
            row = kind_of(name)
            point.pos_dim = None if row is None else row.pos_dim
            as_ours(point, name)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As of any module, and each part once even where duplicates are asked for.

        The bridge has every part at two places of its tree. ``torch.func.functional_call`` would exchange the weights
        of such a part twice, and put back the wrong ones.
        """
        return super().named_modules(memo if remove_duplicate else set(), prefix, True)

    def __deepcopy__(self, memo: dict[int, Any]) -> Transformer:
        """A copy with its hooks, as of any module; ``__reduce__`` would leave them behind."""
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle and ``torch.save``: built anew, as parts of TransformerLens cannot be pickled."""
        from models.plain import tensors_of  # which imports this module

        for point in self.hook_dict.values():
            point.__getstate__()  # refuses where a hook is on it
        tensors = {name: value.detach() for name, value in tensors_of(self).items()}
        return _rebuilt, (self.cfg, tensors, self.card, self.training)

    def axis_sizes(self) -> dict[str, int]:
        """Size of each named axis that does not depend on the input."""
        cfg = self.cfg
        sizes = {"d_model": cfg.d_model, "head": cfg.n_heads, "d_head": cfg.d_head, "d_mlp": cfg.mlp_width}
        return {**sizes, "d_out": self.head.d_out}

    def _run(
        self, x: Tensor, state: State | None, return_state: bool, start: int | None, stop: int | None
    ) -> tuple[Tensor, list[Any]]:
        if state is not None or return_state:
            raise BadArgument("a transformer has no recurrent state: give it the whole prompt, without state arguments")
        if x.shape[1] > self.cfg.n_ctx:
            raise BadArgument(
                f"the input has {x.shape[1]} tokens and n_ctx is {self.cfg.n_ctx}: give fewer, or build a longer model"
            )
        r = emit(self.hook_embed, self.embed(x)) if start is None else x
        for i in range(start or 0, self.cfg.n_layers if stop is None else stop):
            (r,) = self.blocks[i](r)
        return (r if stop is not None else self.head(self.ln_final(r))), []


def _rebuilt(cfg: TransformerConfig, tensors: dict[str, Tensor], card: dict[str, Any], training: bool) -> Transformer:
    from models.plain import tensors_of  # which imports this module

    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model = Transformer(cfg)
    for name, value in tensors_of(model).items():
        value.data = tensors[name]
    model.card = card
    return model.train(training)


def boot(cfg: TransformerConfig) -> Any:
    """The TransformerLens model (``TransformerBridge``) of ``cfg``, with its positions zeroed and frozen.

    Its token embedding and unembedding are of a vocabulary of one and are not used. Weights are drawn with torch's
    global seed.
    """
    # Here and not at the top: it takes as long to import as everything else together.
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge.sources.native import boot as boot_native

    bridge = boot_native(
        TransformerBridgeConfig(
            d_model=cfg.d_model,
            d_head=cfg.d_head,
            n_layers=cfg.n_layers,
            n_heads=cfg.n_heads,
            n_ctx=cfg.n_ctx,
            d_mlp=cfg.mlp_width,
            d_vocab=1,
            act_fn="gelu",
            normalization_type="LN",
            eps=cfg.norm_eps,
        )
    )
    for position in bridge.pos_embed.parameters():
        nn.init.zeros_(position).requires_grad_(False)
    for block in bridge.blocks:
        block.attn.set_original_component(Attention(block.attn))
        # TransformerLens' conversion here is the identity on three axes, and keeps a record of every call for ever.
        block.attn.hook_in.hook_conversion = block.attn.hook_out.hook_conversion = None
        # The points that these private torch hooks feed are switched off; in a deep copy they would write to the
        # attention of the original.
        block._capture_hooks_wired = True
    return bridge


def _names(n_layers: int) -> Iterator[str]:
    for i in range(n_layers):
        yield from (f"blocks.{i}.{name}" for name in POINTS)
    yield from (f"ln_final.{name}" for name in FINAL)


def tidy(name: str) -> str:
    """The name of a weight without the bridge's wrappers: ``blocks.0.attn.q.weight``."""
    name = name.replace(_WRAPPED, "")
    for inner, outer in _INNER.items():
        name = name.replace(inner, outer)
    return name


def _tidy(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Each weight once, under its tidy name: the bridge has every part at two places of its tree."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        value = state_dict.pop(name)
        state_dict.setdefault(prefix + tidy(name.removeprefix(prefix)), value)


def _untidy(module: nn.Module, state_dict: dict[str, Any], prefix: str, *unused: Any) -> None:
    """The inverse of :func:`_tidy`: every place of a weight in the bridge's tree gets its value."""
    given = {name: state_dict.pop(name) for name in list(state_dict) if name.startswith(prefix)}
    parts = nn.Module.named_modules(module, remove_duplicate=False)
    places = [prefix + (f"{part}." if part else "") + name for part, own in parts for name in own._parameters]
    for place in places:
        tidied = prefix + tidy(place.removeprefix(prefix))
        if tidied in given:
            state_dict[place] = given[tidied]
    known = {prefix + tidy(place.removeprefix(prefix)) for place in places}
    state_dict.update({name: value for name, value in given.items() if name not in known})
