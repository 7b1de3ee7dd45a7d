"""Files that are either whole or not there: temporary sibling, fsync, rename."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hooks.errors import BadArgument, RunFailed

_PART = re.compile(r"\..+\.([0-9a-f]{8}|\d+\.tmp)")
"""Names under which :func:`write_whole` here, and the checkpoint's, write before they rename."""


def strict_json(value: Any, indent: int | None = None) -> str:
    """JSON text that every parser reads: NaN and infinities become null, numpy scalars numbers.

    Python's own ``json.dumps`` writes ``NaN``, which is not JSON and which browsers, jq and most
    other languages refuse.
    """
    return json.dumps(_plain(value), indent=indent, allow_nan=False, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Path):
        return value.as_posix()
    if hasattr(value, "tolist"):  # numpy and torch, arrays and scalars, without importing either
        return _plain(value.tolist())
    raise BadArgument(f"a {type(value).__name__} has no place in JSON")


def write_whole(path: Path, data: bytes | str) -> None:
    """Put ``data`` at ``path`` so that a reader sees the old file or the new one, never a part.

    The bytes are on the disk (fsync) before the name points at them: without that, a power cut
    after the rename can leave an empty file under the good name. Raises :class:`RunFailed` when
    the disk is full or the folder is gone, with the temporary file removed.
    """
    content = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with no_half(path):
        try:
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the renames in ``folder`` last through a power cut, where the system lets a folder be opened."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clear_parts(folder: Path) -> None:
    """Remove the temporary files that a run which was killed left in ``folder``; nobody may be writing there."""
    for path in folder.glob(".*"):
        if _PART.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def no_half(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write ``path`` into a one-line :class:`RunFailed`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunFailed(
            f"could not write {path}: {reason}; what was there before is untouched; "
            "free some space or mend the folder and run the same command again"
        ) from error


def writable_folder(folder: Path) -> Path:
    """``folder``, made if need be and proved writable; otherwise :class:`BadArgument`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise BadArgument(f"cannot write into {folder}: {reason}; give another folder with --out") from error
    return folder
