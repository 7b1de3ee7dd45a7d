"""Files and folders that are either whole or not there: temporary sibling, fsync, rename."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hooks.errors import BadArgument, RunFailed


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
    raise BadArgument(f"a {type(value).__name__} has no place in JSON: {value!r}")


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
    """Make the renames in ``folder`` last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


@contextlib.contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A temporary sibling to fill; on leaving without an exception it takes the name ``final``.

    A folder that is there already is moved aside first and removed once the new one is in its
    place; if the second rename fails the old one is moved back. After any exception in the body
    the temporary folder is gone and ``final`` is as it was.
    """
    mark = secrets.token_hex(4)
    fresh, old = (final.with_name(f".{final.name}.{mark}.{word}") for word in ("new", "old"))
    writable_folder(final.parent)
    with no_half(final):
        try:
            fresh.mkdir()
            yield fresh
            for item in fresh.iterdir():
                with open(item, "rb") as file:
                    os.fsync(file.fileno())
            if final.exists():
                os.rename(final, old)
            try:
                os.rename(fresh, final)
            except BaseException:
                if old.exists():
                    os.rename(old, final)
                raise
            sync_folder(final.parent)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
            if final.exists():
                shutil.rmtree(old, ignore_errors=True)
