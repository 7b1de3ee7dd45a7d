"""Checkpoints: one safetensors file with the tensors, the architecture, the config and the card.

Nothing is ever unpickled: a pickle can run code when it is opened, a safetensors file is numbers
behind a JSON header. A file that is not exactly what was saved is refused with one line, because
a model that loads with a few wrong tensors gives numbers that look right.

Header (safetensors' string-to-string metadata): ``format`` (:data:`FORMAT`), ``architecture`` (a
key of ``models.ARCHITECTURES``), ``config`` (JSON, the fields of the config class), ``card``
(JSON: what it was trained on and what it measured), ``digest`` (SHA-256 of the tensors).
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from hooks.errors import BadArgument, RunFailed
from models.card import Card

FORMAT = "mambascope-1"

# A JSON header longer than this is not a header (safetensors has the same limit).
_LONGEST_HEADER = 100_000_000
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

    Raises :class:`CheckpointError` where the model holds NaN or inf, the card is not JSON or
    names an absolute path or a host, or the folder cannot be written; :class:`RunFailed` where
    the disk is full or failing.
    """
    target = Path(path)
    check_card(card)
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors_of(model).items()}
    _check_finite(tensors, target)
    metadata = {
        "format": FORMAT,
        "architecture": str(model.architecture),
        "config": json.dumps(dataclasses.asdict(model.cfg), sort_keys=True),
        "card": json.dumps(dict(card), sort_keys=True, allow_nan=False),
        "digest": _digest(tensors),
    }
    _write_whole(target, safetensors.torch.save(tensors, metadata))


def load_file(path: str | os.PathLike[str]) -> Any:
    """The model in the file ``path``, in eval mode, with its ``.card`` and the file's dtypes.

    The global random state is left as it was. Raises :class:`CheckpointError` where the file is
    refused by :func:`read` or does not fit the model that its own header describes.
    """
    # Here and not at the top: models/__init__ imports this module.
    from models import build

    tensors, header = read(path)
    try:
        # On the CPU, as the file's tensors are, whatever torch's default device is.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            model = build(header.architecture, **header.config)
    except BadArgument as error:
        raise CheckpointError(f"{_shown(path)} cannot be built: {error}") from error
    own = tensors_of(model)
    _check_names(tensors, own, header.architecture, path)
    for name, value in own.items():
        # Through .data, as Module.to does: tied parameters stay tied and the file's dtype wins.
        value.data = tensors[name]
    model.card = Card(header.card)
    return model.eval()


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Header]:
    """``(tensors, header)`` of the checkpoint at ``path``, verified but not yet put into a model.

    Raises :class:`CheckpointError` for a file that is missing, truncated, not safetensors, not
    ours, of another format, altered since it was saved, or that holds NaN or inf.
    """
    data = _bytes(path)
    metadata = _metadata(data, path)
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{_shown(path)} is damaged: {_one_line(error)}") from error
    header = Header(
        architecture=metadata["architecture"],
        config=_json(metadata, "config", path),
        card=_json(metadata, "card", path),
    )
    _check_finite(tensors, path)
    if _digest(tensors) != metadata["digest"]:
        raise CheckpointError(
            f"{_shown(path)} was altered after it was saved: its tensors do not give the digest in its header"
        )
    return tensors, header


def digest(model: nn.Module) -> str:
    """SHA-256 (64 hex digits) of the tensors of ``model``: names, dtypes, shapes and bytes.

    The same on every device; another dtype or one changed bit gives another digest. Hooks, the
    card and train/eval mode do not count.
    """
    return _digest({name: value.detach().cpu() for name, value in tensors_of(model).items()})


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of ``model`` by name, a tied one under its first name."""
    seen: dict[int, str] = {}
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and seen.setdefault(id(value), name) == name:
            found[name] = value
    return found


def check_card(card: Mapping[str, Any]) -> None:
    """Raise :class:`CheckpointError` where ``card`` is not JSON or tells whose machine made it.

    Long trainings call this before the first step, so that the last one cannot fail here.
    """
    try:
        json.dumps(dict(card), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the card is not JSON: {_one_line(error)}") from error
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


def _bytes(path: str | os.PathLike[str]) -> bytes:
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {_shown(path)}") from None
    except OSError as error:
        raise CheckpointError(f"{_shown(path)} cannot be read: {error.strerror}") from error
    if not data:
        raise CheckpointError(f"{_shown(path)} is empty")
    if data.startswith(b"PK\x03\x04") or (data[0] == 0x80 and data[1:2] in b"\x02\x03\x04\x05"):
        raise CheckpointError(f"{_shown(path)} is a pickle (torch.save): nothing is unpickled here; save safetensors")
    if data.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{_shown(path)} is a Git LFS pointer, not the file itself: run `git lfs pull`")
    return data


def _metadata(data: bytes, path: str | os.PathLike[str]) -> dict[str, str]:
    """The string metadata of a safetensors file of ours, after its length has been checked."""
    size = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else _LONGEST_HEADER + 1
    if size > _LONGEST_HEADER or data[8:9] not in (b"{", b""):
        raise CheckpointError(f"{_shown(path)} is not a safetensors file (it starts with {data[:12]!r})")
    if len(data) < 8 + size:
        raise CheckpointError(f"{_shown(path)} is truncated: {len(data)} bytes, and its header alone has {8 + size}")
    try:
        header = json.loads(data[8 : 8 + size])
        metadata = header.pop("__metadata__", {})
        whole = 8 + size + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{_shown(path)} is damaged: its header is not a safetensors header") from error
    if len(data) < whole:
        raise CheckpointError(f"{_shown(path)} is truncated: it has {len(data)} of {whole} bytes")
    if not isinstance(metadata, dict) or "format" not in metadata:
        raise CheckpointError(
            f"{_shown(path)} was not written by this project: its header has no card and no architecture"
        )
    if metadata["format"] != FORMAT:
        raise CheckpointError(f'{_shown(path)} is of format "{metadata["format"]}"; this version reads "{FORMAT}"')
    missing = [key for key in ("architecture", "config", "card", "digest") if key not in metadata]
    if missing:
        raise CheckpointError(f"{_shown(path)} is damaged: its header lacks {', '.join(missing)}")
    return metadata


def _json(metadata: Mapping[str, str], key: str, path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        value = json.loads(metadata[key])
    except ValueError as error:
        raise CheckpointError(f"{_shown(path)} is damaged: the {key} in its header is not JSON") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{_shown(path)} is damaged: the {key} in its header is not a JSON object")
    return value


def _check_names(
    tensors: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    architecture: str,
    path: str | os.PathLike[str],
) -> None:
    wrong = [f"{name} is missing" for name in own if name not in tensors]
    wrong += [f"{name} is not one of its tensors" for name in tensors if name not in own]
    wrong += [
        f"{name} has shape {tuple(tensors[name].shape)}, its config says {tuple(value.shape)}"
        for name, value in own.items()
        if name in tensors and tensors[name].shape != value.shape
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


def _digest(tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _write_whole(target: Path, data: bytes) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        kind = RunFailed if error.errno in _DISK else CheckpointError
        raise kind(f"{_shown(target)} could not be written: {error.strerror}; nothing was changed") from error
    finally:
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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
