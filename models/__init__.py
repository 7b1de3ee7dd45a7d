"""Models that have sites: build one from its config, load a trained one, list what is bundled.

``build("mamba", d_model=64, …)`` is a fresh model; ``build("mamba", selective=False, …)`` is its
time-invariant twin. ``load("mamba-linreg")``, ``load("out/run")`` and
``load(hugging_face_module)`` are trained ones, in eval mode, with a ``.card`` that says what they
were trained on and what they measured.
"""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hooks.errors import BadArgument, told, unknown
from models.checkpoint import CheckpointError, digest, load_file, save
from models.linear_attention import LinearAttentionConfig, LinearTransformer
from models.mamba import Mamba, MambaConfig
from models.outline import check_size
from models.plain import unwrapped
from models.s4 import S4D, S4DConfig
from models.s4_dplr import S4, S4Config
from models.stack import Carried, LayerState, Root, Stack
from models.theory import Theory, TheoryConfig
from models.transformer import Transformer, TransformerConfig

__all__ = [
    "ARCHITECTURES",
    "CONFIGS",
    "S4",
    "S4D",
    "Carried",
    "CheckpointError",
    "LayerState",
    "LinearAttentionConfig",
    "LinearTransformer",
    "Mamba",
    "MambaConfig",
    "Root",
    "S4Config",
    "S4DConfig",
    "Stack",
    "Theory",
    "TheoryConfig",
    "Transformer",
    "TransformerConfig",
    "build",
    "digest",
    "load",
    "names",
    "save",
]

ARCHITECTURES: dict[str, Any] = {
    "mamba": Mamba,
    "s4d": S4D,
    "s4": S4,
    "linear_attention": LinearTransformer,
    "transformer": Transformer,
    "theory": Theory,
}
CONFIGS: dict[str, Any] = {
    "mamba": MambaConfig,
    "s4d": S4DConfig,
    "s4": S4Config,
    "linear_attention": LinearAttentionConfig,
    "transformer": TransformerConfig,
    "theory": TheoryConfig,
}

ZOO = Path(__file__).parent / "zoo"
RUN_FILE = "model.safetensors"
LARGEST = 2**31 - 1
"""What the whole numbers of a configuration stay below: no axis of a model is longer."""


def build(architecture: str, **config: Any) -> Root:
    """A fresh model of ``architecture``, drawn with torch's global seed.

    ``config`` are fields of its config class (:data:`CONFIGS`); the others have their defaults.

    Raises :class:`BadArgument` for an unknown architecture, an unknown field (with the near
    names), a field of another type, or a value that the config class refuses; :class:`TooLarge`
    for a model that the free memory does not hold.
    """
    checked = checked_config(architecture, config)
    check_size(architecture, checked)
    return ARCHITECTURES[architecture](checked)


def load(source: str | os.PathLike[str] | nn.Module) -> Root:
    """The trained model that ``source`` names, in eval mode, with its ``.card``.

    ``source``: a bundled name (:func:`names`; write ``./name`` for a folder of that name), a run
    folder, a checkpoint file, or a live Hugging Face ``MambaForCausalLM`` or ``MambaModel``,
    whose weights are copied and every part of which is compared with ours. A model of ours is returned
    as it is; of ``torch.compile``, DataParallel and DDP, what is inside counts.

    Raises :class:`BadArgument` (:class:`CheckpointError` where there is a file) with one line on
    what is wrong.
    """
    if isinstance(source, nn.Module):
        return _from_module(unwrapped(source))
    if not isinstance(source, str | os.PathLike) or not isinstance(name := os.fspath(source), str):
        raise BadArgument(f"a model has a bundled name, a path or is a module; {told(source)} is none of them")
    if name in names():
        return load_file(ZOO / f"{name}.safetensors")
    path = Path(name)
    if os.path.isdir(path):  # these say no, and raise nothing, of a name that the system does not take
        return load_file(_run_file(path))
    if os.path.lexists(path) or path.suffix == ".safetensors":
        return load_file(path)
    shown = f'"{name}"' if len(name) <= 200 else told(name)
    if "/" in name or os.sep in name:
        raise BadArgument(
            f"there is no file or folder {shown}; a Hugging Face model is loaded with "
            "transformers first and given as a module"
        )
    raise BadArgument(unknown("bundled model", name, names(), "or give the path of a run folder"))


def names() -> list[str]:
    """Names of the bundled checkpoints, sorted."""
    return sorted(path.stem for path in ZOO.glob("*.safetensors"))


def _run_file(folder: Path) -> Path:
    file = folder / RUN_FILE
    if file.exists():
        return file
    if (folder / "resume").exists():
        raise BadArgument(
            f'the training in "{folder}" has not finished: the same command with the same --out goes on with it'
        )
    raise BadArgument(f'the folder "{folder}" holds no {RUN_FILE}, so it is no run folder')


def _from_module(module: nn.Module) -> Root:
    if isinstance(module, Root):
        return module
    for name in ("module", "_orig_mod"):  # DataParallel and its like; torch.compile
        if isinstance(inside := getattr(module, name, None), Root):
            raise BadArgument(f"a {type(module).__name__} wraps a {type(inside).__name__}: give model.{name}")
    # By name, so that a session without transformers models never pays for importing transformers.
    if any(base.__module__.startswith("transformers.") for base in type(module).__mro__):
        from models.pretrained import from_hugging_face

        return from_hugging_face(module)
    raise BadArgument(
        f"a {type(module).__name__} cannot be loaded: give a Hugging Face MambaForCausalLM or "
        "MambaModel, or the state dict of a mamba_ssm model to models.pretrained.from_state_dict"
    )


def checked_config(architecture: str, config: Mapping[str, Any]) -> Any:
    """The config of ``architecture`` that ``config`` describes; raises as :func:`build` does."""
    if not isinstance(architecture, str):
        raise BadArgument(f"an architecture is a name, not {told(architecture)} (there is: {', '.join(ARCHITECTURES)})")
    if architecture not in ARCHITECTURES:
        raise BadArgument(unknown("architecture", architecture, ARCHITECTURES))
    fields = CONFIGS[architecture]
    return fields(**_checked(architecture, fields, config))


def _checked(architecture: str, fields: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with every name known and every value of its field's type."""
    kinds = typing.get_type_hints(fields)
    have = [field.name for field in dataclasses.fields(fields)]
    for name, value in config.items():
        if name not in have:
            raise BadArgument(unknown(f"field of the {architecture} config", name, have))
        if not _fits(value, kinds[name]):
            kind = getattr(kinds[name], "__name__", None) or str(kinds[name])
            raise BadArgument(
                f"{name}={told(value)}: a {architecture} config takes {kind} there, not {type(value).__name__}"
            )
        if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
            raise BadArgument(f"{name} has {len(str(value))} digits: the largest number that it may be is {LARGEST:,}")
    return {name: float(value) if kinds[name] is float else value for name, value in config.items()}


def _fits(value: Any, kind: Any) -> bool:
    """Whether ``value`` may stand in a field of type ``kind``: 1 is a float too, True is no int."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return any(_fits(value, part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return isinstance(value, kind)
