"""Checkpoints: one sealed safetensors file with the tensors, the architecture, the config and the card.

Nothing is ever unpickled: a pickle can run code when it is opened, a safetensors file is numbers
behind a JSON header. A file that is not exactly what was saved is refused with one line, because
a model that loads with a few wrong tensors gives numbers that look right. One checksum is over
every byte of the file, the header included (``hooks/sealed.py``).

Header (safetensors' string-to-string metadata): ``format`` (:data:`FORMAT`), ``architecture`` (a
key of ``models.ARCHITECTURES``), ``config`` (JSON, the fields of the config class), ``card``
(JSON: what it was trained on and what it measured), ``seal`` (the checksum).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hooks import sealed
from hooks.errors import BadArgument, RunFailed, told
from hooks.sealed import one_line
from models.card import Card
from models.outline import fill, outline
from models.plain import misfit, tensors_of, unwrapped
from models.stack import Root

FORMAT = "mambascope-2"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What a weight may be kept in: types that torch computes with."""

# Two path components after a slash at the start of a word, a home folder, or a Windows drive.
_ABSOLUTE = re.compile(r"""(?:^|[\s=:,'"(\[])(?:(?:/[\w.+@-]+){2,}|~[\w.-]*/|[A-Za-z]:\\)""")
_PERSONAL = frozenset({"host", "hostname", "node", "user", "username"})
_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG})


class CheckpointError(BadArgument):
    """A checkpoint that cannot be trusted or written; the message says which and why."""


@dataclass(frozen=True)
class Header:
    """What a checkpoint says about itself."""

    architecture: str
    config: dict[str, Any]
    card: dict[str, Any]


def save(model: Any, path: str | os.PathLike[str], card: Mapping[str, Any]) -> None:
    """Write ``model`` and ``card`` to ``path``, whole or not at all.

    The bytes go to a temporary name in the same folder, are synced to the disk, and the file is
    renamed: a reader sees the old file or the new one, also after a power cut.

    A model in ``torch.compile``, DataParallel or DDP is saved as what is inside, and weights that torch
    keeps in parts (a parametrisation, a pruning mask, a weight norm) as the weights that it computes with.
    Hooks and edits are not saved.

    Raises :class:`CheckpointError` before anything is written where a checkpoint could not give the model
    back: a tensor or module that is not of its architecture, two places that share a tensor, NaN or inf;
    where the card is not JSON or names an absolute path or a host; where the folder cannot be written.
    Raises :class:`RunFailed` where the disk is full or failing.
    """
    target = _path(path)
    try:
        sealed.check_target(target)
    except sealed.Unreadable as error:
        raise CheckpointError(f"{_shown(target)} {error.reason}") from error
    check_card(card)
    root, tensors = _checked(model)
    _check_finite(tensors, target)
    metadata = {
        "format": FORMAT,
        "architecture": str(root.architecture),
        "config": json.dumps(dataclasses.asdict(root.cfg), sort_keys=True),
        "card": json.dumps(dict(card), sort_keys=True, allow_nan=False),
    }
    _write_whole(target, sealed.pack(tensors, metadata))


def load_file(path: str | os.PathLike[str]) -> Any:
    """The model in the file ``path``, in eval mode, with its ``.card`` and the file's dtypes.

    The file is compared with the outline of the model that its header describes, before any of the
    model is made: it takes no more memory than the file has. The global random state is left as it
    was. Raises :class:`CheckpointError` where the file is refused by :func:`read` or does not fit
    the model that its own header describes.
    """
    stored = _stored(path)
    header = _header(stored)
    layers = header.config.get("n_layers", 0)
    if isinstance(layers, int) and layers > len(stored.shapes):
        raise CheckpointError(
            f"{_shown(path)} does not fit its own {told(header.architecture)} config: it has {len(stored.shapes)} "
            f"tensors, its config says n_layers={told(layers)}"
        )
    try:
        model = outline(header.architecture, header.config)
    except BadArgument as error:
        raise CheckpointError(f"{_shown(path)} cannot be built: {error}") from error
    own = tensors_of(model)
    _check_names(stored.shapes, own, header.architecture, path)
    fill(model, own, _tensors(stored))
    model.card = Card(header.card)
    return model.eval()


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Header]:
    """``(tensors, header)`` of the checkpoint at ``path``, verified but not yet put into a model.

    A checkpoint of the format before this one, whose header is under no checksum, is read with a warning.

    Raises :class:`CheckpointError` for a file that is missing, no regular file, truncated, not
    safetensors, not ours, of another format, altered since it was saved in any of its bytes, larger than
    the free memory, or that holds NaN or inf or another type of number than torch computes with.
    """
    stored = _stored(path)
    return _tensors(stored), _header(stored)


def renew(path: str | os.PathLike[str]) -> bool:
    """Write the checkpoint at ``path``, of the format before this one, as one of this format.

    Tensors, architecture, config and card stay what they are, to the last bit. Returns False, and does
    nothing, where the file is of this format already. Raises as :func:`read` and :func:`save` do.
    """
    stored = _stored(path)
    if stored.sealed:
        return False
    tensors = _tensors(stored, quiet=True)
    texts = {name: text for name, text in stored.metadata.items() if name != "digest"}
    _write_whole(_path(path), sealed.pack(tensors, {**texts, "format": FORMAT}))
    return True


def digest(model: nn.Module) -> str:
    """SHA-256 (64 hex digits) of the tensors of ``model``: names, dtypes, shapes and bytes.

    The same on every device; another dtype or one changed bit gives another digest. Hooks, the
    card, train/eval mode and wrappers such as ``torch.compile``'s do not count.
    """
    return sealed.digest({name: value.detach().cpu() for name, value in tensors_of(model).items()})


def check_card(card: Mapping[str, Any]) -> None:
    """Raise :class:`CheckpointError` where ``card`` is not JSON or tells whose machine made it.

    Long trainings call this before the first step, so that the last one cannot fail here.
    """
    try:
        sealed.check_depth(card)
        json.dumps(dict(card), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the card is not JSON: {one_line(error)}") from error
    for place, value in _leaves(card, "card"):
        key = place.rsplit(".", 1)[-1]
        if key.lower() in _PERSONAL:
            raise CheckpointError(f"{place} would name the machine or its user: leave it out of the card")
        if isinstance(value, str) and _ABSOLUTE.search(value):
            raise CheckpointError(f'{place} holds an absolute path ("{value}"): give it relative to the repository')


def _leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _leaves(part, f"{place}[{index}]")
    else:
        yield place, value


def _checked(model: Any) -> tuple[Root, dict[str, Tensor]]:
    """(the model without its wrappers, its tensors on the CPU), if a checkpoint of them loads as the same function."""
    root = unwrapped(model)
    if not isinstance(root, Root):
        raise CheckpointError(f"{told(root)} is not a model of this project: models.save takes what models.build makes")
    cannot = f"this {type(root).__name__} cannot be saved"
    plain = outline(root.architecture, dataclasses.asdict(root.cfg))
    reason = misfit(root, plain)
    if reason:
        raise CheckpointError(f"{cannot}: {reason}")
    tensors, wanted = tensors_of(root), tensors_of(plain)
    for name, value in wanted.items():
        if name not in tensors or tensors[name].shape != value.shape:
            found = f"has shape {tuple(tensors[name].shape)}" if name in tensors else "is gone"
            raise CheckpointError(f"{cannot}: {name} {found}, its config says {tuple(value.shape)}")
    for name, value in tensors.items():
        if name not in wanted:
            raise CheckpointError(f"{cannot}: {name} is not one of the tensors of its architecture")
        if value.dtype not in DTYPES or value.is_meta:
            what = "has no numbers (it is on the meta device)" if value.is_meta else f"holds {_type(value)}"
            raise CheckpointError(f"{cannot}: {name} {what}; {_KEPT}")
    return root, {name: _apart(value.detach().cpu()) for name, value in tensors.items()}


def _apart(value: Tensor) -> Tensor:
    """``value`` contiguous in memory that is its own: safetensors refuses parts of one vector."""
    whole = value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
    return value if whole else value.clone(memory_format=torch.contiguous_format)


_KEPT = "weights are kept in float64, float32, bfloat16 or float16"


def _type(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _path(path: Any) -> Path:
    try:
        return Path(path)
    except TypeError:
        raise CheckpointError(f"a checkpoint has a path, not {told(path)}") from None


def _stored(path: str | os.PathLike[str]) -> sealed.Stored:
    """The file at ``path``, if it calls itself a checkpoint of this format or of the one before."""
    try:
        stored = sealed.read(_path(path))
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {_shown(path)}") from None
    except sealed.Unreadable as error:
        raise CheckpointError(str(error)) from error
    kind = stored.metadata.get("format")
    if kind is None:
        raise CheckpointError(
            f"{_shown(path)} was not written by this project: its header has no card and no architecture"
        )
    if kind not in (FORMAT, sealed.EARLIER):
        raise CheckpointError(f'{_shown(path)} is of format {told(kind)}; this version reads "{FORMAT}"')
    missing = [key for key in ("architecture", "config", "card") if key not in stored.metadata]
    if kind == FORMAT and not stored.sealed:
        missing.append("seal")
    if missing:
        raise CheckpointError(f"{_shown(path)} is damaged: its header lacks {', '.join(missing)}")
    return stored


def _header(stored: sealed.Stored) -> Header:
    config, card = (_json(stored, key) for key in ("config", "card"))
    return Header(stored.metadata["architecture"], config, card)


def _tensors(stored: sealed.Stored, quiet: bool = False) -> dict[str, Tensor]:
    """The tensors, verified; of the format before this one with a warning, unless ``quiet``."""
    try:
        tensors = stored.tensors()
    except sealed.Unreadable as error:
        raise CheckpointError(str(error)) from error
    for name, value in tensors.items():
        if value.dtype not in DTYPES:
            raise CheckpointError(f"{_shown(stored.path)}: {name} holds {_type(value)}; {_KEPT}")
    _check_finite(tensors, stored.path)
    if not stored.sealed and not stored.earlier(tensors, quiet):
        raise CheckpointError(
            f"{_shown(stored.path)} was altered after it was saved: its tensors do not give the digest in its header"
        )
    return tensors


def _json(stored: sealed.Stored, key: str) -> dict[str, Any]:
    try:
        value = sealed.parsed(stored.metadata[key], stored.path, f"the {key} in its header")
    except sealed.Unreadable as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{_shown(stored.path)} is damaged: the {key} in its header is not a JSON object")
    return value


def _check_names(
    shapes: Mapping[str, tuple[int, ...]],
    own: Mapping[str, Tensor],
    architecture: str,
    path: str | os.PathLike[str],
) -> None:
    wrong = [f"{name} is missing" for name in own if name not in shapes]
    wrong += [f"{one_line(name)} is not one of its tensors" for name in shapes if name not in own]
    wrong += [
        f"{name} has shape {shapes[name]}, its config says {tuple(value.shape)}"
        for name, value in own.items()
        if name in shapes and shapes[name] != tuple(value.shape)
    ]
    if wrong:
        more = f" (and {len(wrong) - 2} more)" if len(wrong) > 2 else ""
        raise CheckpointError(
            f"{_shown(path)} does not fit its own {architecture} config: {'; '.join(wrong[:2])}{more}"
        )


def _check_finite(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            kind = "NaN" if value.isnan().any() else "inf"
            raise CheckpointError(f"{_shown(path)}: {name} holds {kind}, so every output of the model would")


def _write_whole(target: Path, data: bytes) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        kind = RunFailed if isinstance(error, OSError) and error.errno in _DISK else CheckpointError
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        raise kind(f"{_shown(target)} could not be written: {reason}; nothing was changed") from error
    finally:
        with contextlib.suppress(OSError, ValueError):
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut, where the system lets a folder be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        return
    finally:
        os.close(handle)


def _shown(path: str | os.PathLike[str]) -> str:
    return f'"{os.fspath(path)}"'
