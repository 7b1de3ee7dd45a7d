"""Memory for tensors that are written once and are large: asked for in huge pages where the system has them.

All states of one layer of a 130m Mamba over 512 tokens are 50 MB. In 4 kB pages their first touch is 12,000 page
faults, which takes longer than computing them; in 2 MB pages it is 25.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

HUGE = 2 << 20
LEAST = 8 * HUGE
"""Bytes from which it is worth asking; no cache holds that much."""
VECTOR = 32
"""Bytes of one store past the caches (`streaming.py`), and what its place has to be a multiple of."""


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """``torch.empty`` on the CPU; a large one is advised to lie in huge pages before anyone touches it."""
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    size = math.prod(shape) * dtype.itemsize
    advise = _advise() if size >= LEAST else None
    if advise is not None:
        # Only whole pages inside the tensor, so that no neighbour's memory is spoken for. Advice may be refused.
        start = -(-tensor.data_ptr() // HUGE) * HUGE
        advise(start, (tensor.data_ptr() + size - start) // HUGE * HUGE, mmap.MADV_HUGEPAGE)
    return tensor


def worth_streaming(tensor: Tensor, run: int) -> bool:
    """Whether ``tensor`` is large, and pieces of ``run`` numbers lie in it on whole vectors."""
    size = tensor.element_size()
    return tensor.numel() * size >= LEAST and run * size % VECTOR == 0 and tensor.data_ptr() % VECTOR == 0


@cache
def _advise() -> Any:
    """The C library's ``madvise``, or None where there is no such advice."""
    if not sys.platform.startswith("linux") or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
