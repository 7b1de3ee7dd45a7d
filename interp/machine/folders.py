"""Folders that take their name in one step, and what a run that was killed left beside them.

While a run fills ``.<name>.<mark>.new`` it holds ``.<name>.<mark>.lock``, and the system lets go of that when the
process ends, however it ends. So what nobody holds is a dead run's: :func:`clear_dead` removes it, and never a folder
that a living run is filling.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from interp.machine.files import no_half, sync_folder, writable_folder

try:
    import fcntl
except ImportError:  # Windows has no flock: there what a dead run left is not told from a living run's, and stays
    fcntl = None  # type: ignore[assignment]

_BESIDE = re.compile(r"\.(.+)\.([0-9a-f]{8})\.(?:new|old|lock)")
_HERE, _RENAME_EXCHANGE, _RENAME_SWAP = -100, 2, 2  # Linux: AT_FDCWD and linux/fs.h; macOS: sys/stdio.h


@contextlib.contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A temporary sibling to fill; on leaving without an exception it takes the name ``final``.

    A folder that has the name already changes places with the new one in a single step, so the name is never absent.
    Where the disk cannot do that (some network disks, Windows) it is moved aside first; a run that is killed between
    those two steps leaves it beside, and :func:`clear_dead` gives it its name back. After any exception in the body the
    temporary folder is gone and ``final`` is as it was.
    """
    writable_folder(final.parent)
    clear_dead(final.parent)
    with no_half(final), _held(final) as mark:
        fresh, old = (_beside(final, mark, kind) for kind in ("new", "old"))
        try:
            fresh.mkdir()
            yield fresh
            for item in fresh.iterdir():
                with open(item, "rb") as file:
                    os.fsync(file.fileno())
            sync_folder(fresh)
            _put(fresh, final, old)
            sync_folder(final.parent)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
            _settle(final, old)


def clear_dead(folder: Path) -> None:
    """Remove what killed runs left in ``folder``; a result that one of them had moved aside gets its name back."""
    found: set[tuple[str, ...]] = set()
    with contextlib.suppress(OSError):
        found = {match.groups() for name in os.listdir(folder) if (match := _BESIDE.fullmatch(name))}
    for name, mark in found:
        with contextlib.suppress(OSError):  # what this user may not write is for another to clear
            _clear(folder / name, mark)


def _clear(final: Path, mark: str) -> None:
    lock = _beside(final, mark, "lock")
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if _taken(descriptor, lock):
            shutil.rmtree(_beside(final, mark, "new"), ignore_errors=True)
            _settle(final, _beside(final, mark, "old"))
            lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _beside(final: Path, mark: str, kind: str) -> Path:
    return final.with_name(f".{final.name}.{mark}.{kind}")


def _put(fresh: Path, final: Path, old: Path) -> None:
    """Give ``fresh`` the name ``final``; what had it is then ``fresh`` or ``old``."""
    if not final.exists():
        try:
            os.rename(fresh, final)
            return
        except OSError:
            if not final.exists():  # else: the same run beside this one was first
                raise
    if not _exchanged(fresh, final):
        os.rename(final, old)
        os.rename(fresh, final)


def _settle(final: Path, old: Path) -> None:
    """Give ``old`` its name back if that is free, else remove it."""
    if old.exists() and not final.exists():
        os.rename(old, final)
    shutil.rmtree(old, ignore_errors=True)


def _exchanged(first: Path, second: Path) -> bool:
    """Whether the two have changed places in one step; False where the system or the disk cannot, or refuses."""
    names = os.fsencode(first), os.fsencode(second)
    if sys.platform == "linux":
        rename = getattr(ctypes.CDLL(None), "renameat2", None)
        return rename is not None and rename(_HERE, names[0], _HERE, names[1], _RENAME_EXCHANGE) == 0
    if sys.platform == "darwin":
        rename = getattr(ctypes.CDLL(None), "renamex_np", None)
        return rename is not None and rename(names[0], names[1], _RENAME_SWAP) == 0
    return False


@contextlib.contextmanager
def _held(final: Path) -> Iterator[str]:
    """A mark that no other run has, held for this process."""
    while True:
        mark = secrets.token_hex(4)
        lock = _beside(final, mark, "lock")
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        if _taken(descriptor, lock, unless_told=True):
            break
        os.close(descriptor)  # another run took it for a dead one's before it was held
    try:
        yield mark
    finally:
        # Windows removes no open file; elsewhere the name goes first, so that nobody finds it without its holder.
        if fcntl is not None:
            lock.unlink(missing_ok=True)
        os.close(descriptor)
        lock.unlink(missing_ok=True)


def _taken(descriptor: int, path: Path, unless_told: bool = False) -> bool:
    """Whether this process now holds the open file ``path`` alone; ``unless_told`` where the system does not say."""
    if fcntl is None:
        return unless_told
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a disk without locks
        return unless_told
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:  # its last holder removed it before this one held it
        return False
