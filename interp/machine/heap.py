"""What a command asks of memory: keep what is freed for the next tensor, and look for cycles seldom."""

from __future__ import annotations

import atexit
import ctypes
import gc
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEEP = 2**31 - 1
EVERY = 100_000
"""New containers between two looks for cycles; Python's own is 700 or 2,000."""
LARGEST = (1 << 30, 32 << 20)  # the second is the most that older versions accept


def keep_freed_memory() -> bool:
    """Whether the C library was told to keep what is freed; only glibc takes this advice.

    A forward makes and frees hundreds of tensors of a megabyte each. By default glibc returns such memory to the system
    at once, and the next tensor's first touch faults every page in anew: in an ablation that was a third of the time.
    The process keeps its peak size until it ends, so this is for commands and not for libraries.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Both: setting one alone ends glibc's own adaptation of the other.
    return bool(mallopt(M_TRIM_THRESHOLD, KEEP)) and any(mallopt(M_MMAP_THRESHOLD, size) for size in LARGEST)


def look_for_cycles_seldom() -> None:
    """Collect cycles after every ``EVERY`` new containers, and old ones after a hundred times as many at the earliest.

    Loading the libraries makes half a million objects that live as long as the process, and each full collection looks
    at them all: a tenth of a short command. Tensors are freed by counting, so that memory does not grow for want of it.
    The look at the very end, which would only free what ends anyway and takes two seconds, is left out.
    """
    gc.set_threshold(EVERY, 10, 10)
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
