"""Mamba-1 checkpoints ⇄ ours: Hugging Face modules and state dicts with mamba_ssm's names.

The one file that imports transformers, and only inside functions. A conversion is not believed:
both models run on the same tokens, and every part (the embedding, each block, the final norm with the
read-out) is compared on the same input before the model is handed out.
mamba_ssm's names are the canonical ones:

    backbone.embedding.weight         embed.table.weight
    backbone.layers.{i}.norm.weight   blocks.{i}.norm.weight
    backbone.layers.{i}.mixer.*       blocks.{i}.mixer.*       the same names and shapes inside
    backbone.norm_f.weight            ln_final.weight
    lm_head.weight                    head.linear.weight       absent or equal where it is tied

Hugging Face writes ``embeddings`` where mamba_ssm has ``embedding``; a bare ``MambaModel`` leaves
out ``backbone.``.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooks.errors import BadArgument
from models.card import Card
from models.checkpoint import CheckpointError
from models.mamba import Mamba, MambaConfig
from models.plain import tensors_of

TOLERANCE = 1e-5
"""Largest difference between a part of a model and the same part of the other on the same input, as a share of the
largest number that comes out. Rounding is a tenth of it, at any depth: no part sees what the others rounded."""

_EMBEDDING = "backbone.embedding.weight"
_LAYER = re.compile(r"backbone\.layers\.(\d+)\.(norm\.weight|mixer\..+)")
_FIXED = {
    _EMBEDDING: "embed.table.weight",
    "backbone.norm_f.weight": "ln_final.weight",
    "lm_head.weight": "head.linear.weight",
}
_OUR_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_WHY_NOT = {
    "falcon_mamba": "it normalises Δ, B and C after the projection, which Mamba-1 does not",
    "mamba2": "it is Mamba-2: one decay for each head, another mixer",
    "jamba": "it alternates Mamba with attention layers",
    "zamba": "it alternates Mamba with attention layers",
}
_STRANGE_KEYS = {
    ".mixer.dt_bias": "it is Mamba-2 (mixer.dt_bias)",
    ".mixer.B_bias": "it is Mamba-3 (mixer.B_bias)",
    ".mixer.Wqkv.": "it has attention layers (mixer.Wqkv)",
    ".norm2.": "its blocks have an MLP (norm2)",
}


def from_hugging_face(module: nn.Module) -> Mamba:
    """Our Mamba with the weights of a live ``MambaForCausalLM`` or ``MambaModel``, in eval mode.

    A bare ``MambaModel`` gets its own embedding table as the read-out. Half-precision weights are
    widened to fp32, which loses nothing. On a few random tokens every part of both agrees to
    :data:`TOLERANCE`, or :class:`CheckpointError` is raised; so it is for a variant that is
    another function (the message says which).
    """
    from transformers import MambaForCausalLM, MambaModel, __version__

    name = type(module).__name__
    if not isinstance(module, MambaForCausalLM | MambaModel):
        kind = getattr(getattr(module, "config", None), "model_type", "")
        raise CheckpointError(f"a {name} is not converted: {_WHY_NOT.get(kind, 'it is not a Mamba-1 language model')}")
    config: Any = module.config
    if config.hidden_act not in ("silu", "swish"):
        raise CheckpointError(f'this {name} is not converted: its activation is "{config.hidden_act}", Mamba has SiLU')
    low, high = getattr(config, "time_step_limit", None) or (0.0, float("inf"))
    if low > 0 or high < float("inf"):
        raise CheckpointError(f"this {name} is not converted: it clamps Δ to ({low}, {high}), Mamba does not")
    devices = {parameter.device for parameter in module.parameters()}
    if len(devices) != 1 or torch.device("meta") in devices:
        where = ", ".join(sorted(str(device) for device in devices))
        raise CheckpointError(f"this {name} is not converted: its weights are on {where}; put them on one device")
    model = from_state_dict(module.state_dict(), norm_eps=config.layer_norm_epsilon)
    difference = _compare(model, module)
    model.card = Card(
        {
            "source": f"transformers {name}",
            "name": Path(getattr(config, "name_or_path", "") or "").name,
            "parity": difference,
            "parameters": sum(value.numel() for value in tensors_of(model).values()),
            "versions": {"transformers": __version__, "torch": str(torch.__version__)},
        }
    )
    return model


def to_hugging_face(model: nn.Module) -> Any:
    """A Hugging Face ``MambaForCausalLM`` with a copy of the weights of ``model``, in eval mode.

    ``model`` is a selective Mamba with ``head="lm"``; anything else has no counterpart there
    (:class:`BadArgument`). Both are compared as in :func:`from_hugging_face`. (On a CPU
    where a mamba_ssm can be imported, transformers calls its CUDA functions all the same and the
    module's own forward fails.)
    """
    from transformers import MambaConfig as HuggingFaceConfig
    from transformers import MambaForCausalLM

    ours = _language_model(model)
    cfg = ours.cfg
    config = HuggingFaceConfig(
        vocab_size=cfg.d_out,
        hidden_size=cfg.d_model,
        state_size=cfg.d_state,
        num_hidden_layers=cfg.n_layers,
        layer_norm_epsilon=cfg.norm_eps,
        expand=cfg.expand,
        conv_kernel=cfg.d_conv,
        use_bias=cfg.bias,
        use_conv_bias=cfg.conv_bias,
        time_step_rank=cfg.rank,
        tie_word_embeddings=cfg.tie_embeddings,
    )
    with torch.random.fork_rng(devices=[]):
        module = MambaForCausalLM(config)
    own = next(ours.parameters())
    module = module.to(device=own.device, dtype=own.dtype).eval()
    values = {name.replace("embedding.", "embeddings."): value for name, value in to_state_dict(ours).items()}
    module.load_state_dict(values)
    _compare(ours, module)
    return module


def from_state_dict(tensors: Mapping[str, Tensor], *, norm_eps: float = 1e-5) -> Mamba:
    """Our Mamba with the weights of a state dict with mamba_ssm's or Hugging Face's names.

    The configuration is read off the shapes; ``norm_eps`` is not among them. A falcon_mamba has
    the very names of a Mamba and is another function: give the live module, whose class tells.
    Raises :class:`CheckpointError` for Mamba-2, Mamba-3, MLP or attention layers, missing or
    unknown names, shapes that contradict each other, NaN or inf.
    """
    named = {_canonical(name): value for name, value in tensors.items()}
    for name in named:
        for part, reason in _STRANGE_KEYS.items():
            if part in name:
                raise CheckpointError(f"this state dict is not converted: {reason}, not Mamba-1")
    cfg = _config(named, norm_eps)
    if cfg.tie_embeddings:
        named.pop("lm_head.weight", None)
    with torch.random.fork_rng(devices=[]):
        model = Mamba(cfg)
    own = tensors_of(model)
    given = {_ours(name): (name, value) for name, value in named.items()}
    for wanted, target in own.items():
        if wanted not in given:
            raise CheckpointError(f"the state dict lacks {_theirs(wanted)}")
        name, value = given.pop(wanted)
        if value.shape != target.shape:
            raise CheckpointError(
                f"{name} has shape {tuple(value.shape)}, by the other tensors it is {tuple(target.shape)}"
            )
        if not value.is_floating_point():
            raise CheckpointError(f"{name} holds {value.dtype}: quantised weights are not converted")
        if not torch.isfinite(value).all():
            raise CheckpointError(f"{name} holds NaN or inf")
        target.data = value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)
    if given:
        raise CheckpointError(f"the state dict has {next(iter(given.values()))[0]}, which a Mamba-1 does not have")
    return model.eval()


def to_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights under mamba_ssm's names, with ``lm_head.weight`` also where tied."""
    tensors = {_theirs(name): value for name, value in tensors_of(_language_model(model)).items()}
    tensors.setdefault("lm_head.weight", tensors[_EMBEDDING])
    return {name: value.detach().clone() for name, value in tensors.items()}


def _language_model(model: Any) -> Mamba:
    if not isinstance(model, Mamba):
        raise BadArgument(f"a {type(model).__name__} has no counterpart in mamba_ssm or transformers: only Mamba has")
    if model.cfg.head != "lm" or not model.cfg.selective:
        what = f'head="{model.cfg.head}"' if model.cfg.head != "lm" else "selective=False"
        raise BadArgument(
            f"a Mamba with {what} has no counterpart in mamba_ssm or transformers: "
            'only a selective one with head="lm" has'
        )
    return model


def _canonical(name: str) -> str:
    name = re.sub(r"(^|\.)embeddings\.", r"\1embedding.", name)
    return name if name.startswith(("backbone.", "lm_head.")) else f"backbone.{name}"


def _ours(name: str) -> str:
    """Our name for mamba_ssm's; a name that it does not have comes back as it is."""
    found = _LAYER.fullmatch(name)
    return f"blocks.{found[1]}.{found[2]}" if found else _FIXED.get(name, name)


def _theirs(name: str) -> str:
    found = _OUR_BLOCK.fullmatch(name)
    return f"backbone.layers.{found[1]}.{found[2]}" if found else {ours: name for name, ours in _FIXED.items()}[name]


def _config(named: Mapping[str, Tensor], norm_eps: float) -> MambaConfig:
    """The configuration that the shapes of a canonical state dict say."""

    def shape(name: str, axes: int) -> torch.Size:
        if name not in named:
            raise CheckpointError(f"the state dict lacks {name}: it is no Mamba-1 language model")
        if named[name].ndim != axes:
            raise CheckpointError(f"{name} has shape {tuple(named[name].shape)}, a Mamba-1 has {axes} axes there")
        return named[name].shape

    first = "backbone.layers.0.mixer."
    vocabulary, d_model = shape(_EMBEDDING, 2)
    d_inner, d_state = shape(f"{first}A_log", 2)
    if d_inner % d_model:
        raise CheckpointError(f"{d_inner} channels are no multiple of d_model={d_model}: expand must be an integer")
    embedding, head = named[_EMBEDDING], named.get("lm_head.weight")
    return MambaConfig(
        d_model=d_model,
        n_layers=1 + max(int(found[1]) for name in named if (found := _LAYER.fullmatch(name))),
        d_state=d_state,
        d_conv=shape(f"{first}conv1d.weight", 3)[2],
        expand=d_inner // d_model,
        dt_rank=shape(f"{first}dt_proj.weight", 2)[1],
        norm_eps=norm_eps,
        bias=f"{first}in_proj.bias" in named,
        conv_bias=f"{first}conv1d.bias" in named,
        head="lm",
        d_out=vocabulary,
        tie_embeddings=head is None or head is embedding or torch.equal(head, embedding),
    )


def _compare(model: Mamba, module: Any) -> float:
    """Largest difference of a part of both on the same input, as a share of the part's largest number; raises above
    :data:`TOLERANCE`, and where a weight of one is not that of the other to the last bit.

    Each block gets what our blocks before it gave, so that depth adds nothing: with ever more layers, or weights that
    amplify, the logits of two right models drift apart by rounding alone. That their model is these parts one after
    the other, and nothing else, is asked of their own forward.
    """
    wrong = f"the conversion of this {type(module).__name__} is wrong"
    given = {_canonical(name): value for name, value in module.state_dict().items()}
    for name, value in to_state_dict(model).items():
        theirs = given.get(name, given[_EMBEDDING] if name == "lm_head.weight" else None)
        if theirs is None or not torch.equal(value, theirs.to(value)):
            raise CheckpointError(f"{wrong}: {name} has other values here than there")
    own = next(model.parameters())
    if module.dtype != own.dtype:
        module = copy.deepcopy(module).to(own.dtype)  # half precision, which is widened
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.cfg.d_out, (2, 12), generator=generator, device="cpu").to(own.device)
    largest = 0.0
    with torch.no_grad(), _in_eval_mode(module), _torch_functions(module):
        theirs, composed = _logits(module, tokens), _composed(module, tokens)
        if not float((theirs - composed).abs().max()) <= TOLERANCE * float(theirs.abs().max()):
            raise CheckpointError(f"{wrong}: its forward is not its blocks one after the other")
        for part, ours, reference in _parts(model, module, tokens):
            difference = float((ours.double() - reference.double()).abs().max())
            scale = float(reference.abs().max())
            if not difference <= TOLERANCE * scale:
                raise CheckpointError(
                    f"{wrong}: {part} differ by {difference:.2g} of {scale:.2g}, allowed {TOLERANCE:g} of that"
                )
            largest = max(largest, difference / scale if scale else 0.0)
    return largest


def _parts(
    model: Mamba, module: Any, tokens: Int[Tensor, "batch pos"]
) -> Iterator[tuple[str, Float[Tensor, "batch pos d"], Float[Tensor, "batch pos d"]]]:
    """(what it is, ours, theirs) of each part."""
    backbone = _backbone(module)
    r = model.embed(tokens)
    yield "the embeddings", r, backbone.embeddings(tokens)
    for i, (block, layer) in enumerate(zip(model.blocks, backbone.layers, strict=True)):
        # What a layer adds, not the sum, in which a large residual stream would hide it.
        ours, _ = block.mixer(block.norm(r), None, False)  # type: ignore[operator, union-attr]
        yield f"what layer {i} adds", ours, layer.mixer(layer.norm(r))
        r = block(r, None, False)
    yield "the logits", model.head(model.ln_final(r)), _read_out(module, backbone.norm_f(r))


def _composed(module: Any, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_out"]:
    """Their logits from their own parts."""
    backbone = _backbone(module)
    r = backbone.embeddings(tokens)
    for layer in backbone.layers:
        r = r + layer.mixer(layer.norm(r))
    return _read_out(module, backbone.norm_f(r))


def _logits(module: Any, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_out"]:
    """Their logits as their own forward gives them."""
    out = module(tokens, use_cache=False, return_dict=True)
    return out.logits if hasattr(out, "logits") else _read_out(module, out.last_hidden_state)


def _backbone(module: Any) -> Any:
    return getattr(module, "backbone", module)


def _read_out(module: Any, hidden: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_out"]:
    return module.lm_head(hidden) if hasattr(module, "lm_head") else hidden @ module.embeddings.weight.T


@contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def _torch_functions(module: nn.Module) -> Iterator[None]:
    """Inside the block, on a CPU, transformers scans and convolves with its own torch functions.

    transformers binds the functions of an importable mamba_ssm when it is imported itself,
    without a look at the device, and the CUDA functions then fail on a CPU. Each of its wrappers
    still holds the torch function that it wraps.
    """
    from transformers.models.mamba import modeling_mamba

    names = (
        "causal_conv1d_fn",
        "causal_conv1d_update",
        "mamba_inner_fn",
        "mamba_selective_scan",
        "mamba_selective_state_update",
    )
    on_cpu = next(module.parameters()).device.type == "cpu"
    saved = {name: getattr(modeling_mamba, name) for name in names if on_cpu and hasattr(modeling_mamba, name)}
    try:
        for name, function in saved.items():
            setattr(modeling_mamba, name, inspect.unwrap(function))
        yield
    finally:
        for name, function in saved.items():
            setattr(modeling_mamba, name, function)
