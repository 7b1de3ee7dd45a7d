"""How far a computed tensor may be from the expected one, for every definition test: one table.

The error of a sum is relative to its largest terms and not to what is left of them, so the figure is relative to the
largest entry of the expected tensor (or to 1 where that is smaller).
"""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 3e-6,  # some thirty roundings of 1e-7, for sums over up to a few hundred terms
    torch.bfloat16: 8e-3,  # two roundings to 8 bits
    torch.float16: 1e-3,
}


def assert_matches(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """``torch.testing.assert_close`` at the tolerance of ``actual``'s dtype; ``expected`` may be more precise."""
    size = expected[torch.isfinite(expected)].abs().max().item() if expected.numel() else 1.0
    bound = TOLERANCE[actual.dtype] * max(1.0, size)
    torch.testing.assert_close(
        actual, expected.to(actual.dtype), rtol=0.0, atol=bound, msg=lambda text: f"{what}: {text}"
    )
