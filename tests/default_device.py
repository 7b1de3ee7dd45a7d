"""torch's default device put back, for the tests that set another."""

from __future__ import annotations

import torch


def put_back() -> None:
    """No default device is set; in torch 2.6 ``set_default_device(None)`` alone breaks ``get_default_device``."""
    torch.set_default_device(None)
    if getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", 0) is None:
        del torch._GLOBAL_DEVICE_CONTEXT.device_context
