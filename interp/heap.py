"""Keeping freed memory for the next tensor instead of handing it back to the system."""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEEP = 2**31 - 1
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
