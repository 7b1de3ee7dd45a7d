"""Files under one checksum: every byte that is read back, headers and configurations included.

A sealed file holds the SHA-256 of all its bytes, taken with 64 zeros in the place of those digits themselves. One
flipped bit anywhere, a cut or an exchanged part is so noticed before anything in the file is believed. There are two
kinds: safetensors, with the seal in the header's metadata, and JSON, with the seal an entry of the object.

Only regular files are read, nothing is unpickled, and what a file takes in memory is known from its size before more
than its header is read: twice that size at most.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from hooks.errors import BadArgument
from hooks.memory import free_memory

EARLIER = "mambascope-1"
"""The format of checkpoints from before files were sealed: their tensors are under a digest, their headers are not."""

_SEAL = "seal"
_BLANK = "0" * 64
# As JSON is written with and without spaces. Inside a string the quotes would be escaped, so this is an entry.
_SLOT = re.compile(rb'"seal": ?"([0-9a-f]{64})"')
# Levels of lists and objects in each other: what Python's own readers bear differs from version to version.
_DEEPEST = 200
# A JSON header longer than this is not a header (safetensors has the same limit).
_LONGEST_HEADER = 100_000_000


class TooDeep(ValueError):
    """JSON, or what was to become JSON, that is nested too deep."""


class Unreadable(BadArgument):
    """A file that is not what it should be; ``reason`` goes on from its name: "is truncated: …"."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(f'"{os.fspath(path)}" {reason}')
        self.reason = reason


@dataclass(frozen=True)
class Stored:
    """A safetensors file whose sizes add up and whose seal, where it has one, is whole.

    ``shapes`` are by the name of the tensor; ``sealed`` is False for a file that has no seal, whose ``metadata`` may
    then say anything.
    """

    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    sealed: bool
    data: bytes
    path: str | os.PathLike[str]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, in memory of their own; raises :class:`Unreadable` for a header that is not of them."""
        try:
            return safetensors.torch.load(self.data)
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise Unreadable(self.path, f"is damaged: {one_line(error)}") from error

    def earlier(self, tensors: Mapping[str, Tensor], quiet: bool = False) -> bool:
        """Whether this is a checkpoint from before files were sealed, with the tensors that its digest is of; says so
        in a warning unless ``quiet``.

        A sealed file never becomes one by damage: it has no digest of its tensors alone.
        """
        if self.sealed or self.metadata.get("format") != EARLIER or self.metadata.get("digest") != digest(tensors):
            return False
        if not quiet:
            self._warn()
        return True

    def _warn(self) -> None:
        warnings.warn(
            f'"{os.fspath(self.path)}" is of the earlier format {EARLIER}: its configuration and its card are under no '
            "checksum; if they are right, models.checkpoint.renew(path) puts them under one",
            stacklevel=5,
        )


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (64 hex digits) of names, dtypes, shapes and bytes; tensors on the CPU."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a sealed safetensors file; ``metadata`` is text by name, without the name "seal"."""
    return _seal(safetensors.torch.save(dict(tensors), {**metadata, _SEAL: _BLANK}))


def read(path: str | os.PathLike[str]) -> Stored:
    """The safetensors file at ``path``; its tensors are not yet made.

    Raises ``FileNotFoundError``, or :class:`Unreadable` for what is no regular file, is cut, is of another kind, does
    not fit into memory, or has a seal that its bytes do not give.
    """
    size = _size(path)
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            _check_kind(start + file.read(56), path)
            length = struct.unpack("<Q", start)[0]
            if size < 8 + length:
                raise Unreadable(path, f"is truncated: {size} bytes, and its header alone has {8 + length}")
            file.seek(8)
            metadata, shapes, whole = _header(file.read(length), path)
            if size < whole:
                raise Unreadable(path, f"is truncated: it has {size} of {whole} bytes")
            if size > whole:
                raise Unreadable(path, f"is damaged: it has {size} bytes, and its header is of {whole}")
            _check_memory(2 * size, path)
            file.seek(0)
            data = file.read(size)
    except OSError as error:
        raise Unreadable(path, f"cannot be read: {error.strerror or one_line(error)}") from error
    seal = metadata.pop(_SEAL, None)
    if seal is not None and not _whole(data, seal, 8 + length):
        raise Unreadable(
            path, "was altered after it was saved: its header and tensors do not give the checksum in its header"
        )
    return Stored(metadata, shapes, seal is not None, data, path)


def pack_json(value: Mapping[str, Any], indent: int | None = None) -> str:
    """``value``, which holds JSON values only, as the text of a sealed JSON object, with a line break at its end."""
    # First, so that no entry of the same name further inside is taken for it.
    text = json.dumps({_SEAL: _BLANK, **value}, indent=indent, allow_nan=False, ensure_ascii=False)
    return _seal(f"{text}\n".encode()).decode()


def read_json(path: str | os.PathLike[str]) -> tuple[Any, bool]:
    """``(value, sealed)`` of the JSON file at ``path``; a seal that is there is whole, and is not in the value.

    Raises ``FileNotFoundError``, or :class:`Unreadable` as :func:`read` does.
    """
    data = content(path)
    value = parsed(data, path)
    seal = value.pop(_SEAL, None) if isinstance(value, dict) else None
    if seal is not None and not _whole(data, seal, len(data)):
        raise Unreadable(path, "was altered after it was saved: its text does not give the checksum in it")
    return value, seal is not None


def content(path: str | os.PathLike[str], size: int | None = None) -> bytes:
    """All bytes of the regular file at ``path``, which has to have ``size`` of them where that is given.

    Raises ``FileNotFoundError``, or :class:`Unreadable`.
    """
    found = _size(path)
    if size is not None and found != size:
        raise Unreadable(path, f"is damaged: it has {found} bytes, and {size} were saved")
    _check_memory(found, path)
    try:
        with open(path, "rb") as file:
            return file.read(found)
    except OSError as error:
        raise Unreadable(path, f"cannot be read: {error.strerror or one_line(error)}") from error


def parsed(text: str | bytes, path: str | os.PathLike[str], what: str = "it") -> Any:
    """The JSON value of ``text``; raises :class:`Unreadable`, also for a value that is nested too deep."""
    try:
        return json_value(text)
    except ValueError as error:
        why = "is nested too deep" if isinstance(error, TooDeep) else "is not JSON"
        raise Unreadable(path, f"is damaged: {what} {why}") from error


def json_value(text: str | bytes) -> Any:
    """The JSON value of ``text``; raises ``ValueError``, and its :class:`TooDeep` as :func:`check_depth` does."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise TooDeep(_TOO_DEEP) from error
    check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Raise :class:`TooDeep` for lists and mappings that are more than 200 levels deep in each other."""
    level = [value] if isinstance(value, Mapping | list | tuple) else []
    for _ in range(_DEEPEST):
        parts = (part.values() if isinstance(part, Mapping) else part for part in level)
        level = [item for part in parts for item in part if isinstance(item, Mapping | list | tuple)]
        if not level:
            return
    raise TooDeep(_TOO_DEEP)


_TOO_DEEP = f"it is nested more than {_DEEPEST} levels deep"


def one_line(error: BaseException | str) -> str:
    """The message of ``error``, or a text, without its line breaks, 200 characters of it."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _size(path: str | os.PathLike[str]) -> int:
    """Bytes of the regular file at ``path``. Asked before it is opened: opening a pipe waits for its other end."""
    try:
        found = Path(path).stat()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise Unreadable(path, f"cannot be read: {reason}") from error
    _check_regular(found.st_mode, path, "read")
    return found.st_size


def check_target(path: str | os.PathLike[str]) -> None:
    """Raise :class:`Unreadable` where a file at ``path`` would take the place of a device, a pipe or a folder."""
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError):  # not there, or a name that writing will refuse
        return
    _check_regular(mode, path, "written")


def _check_regular(mode: int, path: str | os.PathLike[str], done: str) -> None:
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise Unreadable(path, f"cannot be {done}: it is {kind}, not a regular file")


def _check_memory(needed: int, path: str | os.PathLike[str]) -> None:
    # Small files are read without asking: what is free is a look at the system each time.
    if needed > 100_000_000 and needed > (free := free_memory(torch.device("cpu"))):
        raise Unreadable(path, f"does not fit into memory: reading it takes {needed:,} bytes, and {free:,} are free")


def _check_kind(start: bytes, path: str | os.PathLike[str]) -> None:
    """Raise :class:`Unreadable` where a file that begins with ``start`` is no safetensors file, and say what it is."""
    if not start:
        raise Unreadable(path, "is empty")
    if start.startswith(b"PK\x03\x04") or (start[0] == 0x80 and start[1:2] in b"\x02\x03\x04\x05"):
        raise Unreadable(path, "is a pickle (torch.save): nothing is unpickled here; save safetensors")
    if start.startswith(b"version https://git-lfs"):
        raise Unreadable(path, "is a Git LFS pointer, not the file itself: run `git lfs pull`")
    length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else _LONGEST_HEADER + 1
    if length > _LONGEST_HEADER or start[8:9] not in (b"{", b""):
        raise Unreadable(path, f"is not a safetensors file (it starts with {start[:12]!r})")


def _header(text: bytes, path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, tuple[int, ...]], int]:
    """(metadata, shapes by name, bytes of the whole file) of a safetensors header."""
    header = parsed(text, path, "its header")
    try:
        metadata = header.pop("__metadata__", {})
        shapes = {name: tuple(map(int, entry["shape"])) for name, entry in header.items()}
        last = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        named = all(isinstance(value, str) for value in metadata.values())
    except (ValueError, AttributeError, KeyError, TypeError, IndexError, OverflowError) as error:
        raise Unreadable(path, "is damaged: its header is not a safetensors header") from error
    if not 0 <= last < 2**62:
        raise Unreadable(path, "is damaged: its header has a place that no file has")
    if not named:
        raise Unreadable(path, "is damaged: the metadata in its header are not all text")
    return metadata, shapes, 8 + len(text) + last


def _seal(data: bytes) -> bytes:
    """``data`` with its blank seal filled in."""
    slot = _SLOT.search(data)
    assert slot is not None and slot[1] == _BLANK.encode(), "written by the caller"
    return data[: slot.start(1)] + hashlib.sha256(data).hexdigest().encode() + data[slot.end(1) :]


def _whole(data: bytes, seal: Any, end: int) -> bool:
    """Whether ``seal``, which stands before ``end``, is that of ``data``."""
    slot = _SLOT.search(data, 0, end)
    if slot is None or slot[1].decode() != seal:
        return False
    total = hashlib.sha256(memoryview(data)[: slot.start(1)])
    total.update(_BLANK.encode())
    total.update(memoryview(data)[slot.end(1) :])
    return total.hexdigest() == seal
