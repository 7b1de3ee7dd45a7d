"""The number that an intervention is judged by, the share of it that a patch brings, and how two runs are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

import hooks
from hooks.errors import BadArgument, told
from hooks.inputs import first_weight
from hooks.vocabulary import points
from interp import stats

Metric = Callable[[Tensor], Tensor]
"""The model's output → one number for each prompt, (batch,); ``lambda out: out[:, -1, 0]``."""


def one_number(metric: Metric, output: Any, size: int) -> Float[Tensor, " batch"]:
    """``metric(output)``, if it is one number for each of ``size`` prompts; else :class:`BadArgument`."""
    if not callable(metric):
        raise BadArgument(f"the metric is {told(metric)}: give a function of the output, lambda out: out[:, -1, 0]")
    found: Any = metric(output)
    if not isinstance(found, Tensor) or tuple(found.shape) != (size,):
        what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise BadArgument(f"the metric gave {what} for {size} prompts: give one number each, lambda out: out[:, -1, 0]")
    return found


def recovery(
    f_patch: stats.Values,
    f_1: stats.Values,
    f_2: stats.Values,
    n_boot: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> stats.Interval:
    """The slope of f_patch − f_2 on f_1 − f_2 over prompts, and its bootstrap interval: 1 where the patch brings all of
    f_1 along, 0 where nothing.

    f_2 is the metric of the run that is patched, f_1 that of the run that the patch is from, each (n,); ``f_patch`` is
    (n, …), and every further axis is a patch of its own. The slope is Σ a b / Σ b², a line through the origin: no
    difference, nothing to bring. A single prompt's ratio a / b has no mean over prompts where b can be near 0, and the
    ratio of mean differences has none where prompts are paired at random.
    Raises :class:`BadArgument` where f_1 and f_2 differ for no prompt, or for so few that a resample has none.
    """
    patch, one, two = (_doubles(values) for values in (f_patch, f_1, f_2))
    if one.ndim != 1 or one.shape != two.shape or patch.shape[:1] != one.shape:
        shapes = f"f_patch {patch.shape}, f_1 {one.shape}, f_2 {two.shape}"
        raise BadArgument(f"recovery compares the same prompts: give (n, …), (n,) and (n,), not {shapes}")
    column = (-1, *[1] * (patch.ndim - 1))
    moved = patch - two.reshape(column)
    apart = np.broadcast_to((one - two).reshape(column), patch.shape)
    if not apart.any():
        raise BadArgument("f_1 and f_2 are the same for every prompt: there is no difference to recover")
    return stats.ratio(moved * apart, apart * apart, n_boot=n_boot, level=level, seed=seed)


def recovered(
    f_patch: stats.Values, f_1: stats.Values, f_2: stats.Values, n_boot: int = 1000, level: float = 0.95, seed: int = 0
) -> stats.Interval:
    """:func:`recovery`, for what has taken long: NaN where f_1 and f_2 differ for no prompt, an empty interval where
    they differ for so few that a resample has none, or where there is one prompt.
    """
    stats.valid(n_boot, level)
    try:
        return recovery(f_patch, f_1, f_2, n_boot=n_boot, level=level, seed=seed)
    except BadArgument:
        patch, one, two = (_doubles(values) for values in (f_patch, f_1, f_2))
        apart, moved = one - two, (patch.T - two).T
        size = float(apart @ apart)
        return stats.without_spread(apart @ moved / (size or np.nan), len(one), level)


def _doubles(values: stats.Values) -> NDArray[np.float64]:
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def kind(name: str) -> str:
    """The last part of a site's full name."""
    return name.rsplit(".", 1)[-1]


HALF = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Six and ten units in the last place: what a few layers in half precision round away of their largest number."""
FP32 = 1e-4
"""Largest difference between two fp32 paths of one function, relative to the largest value."""


def rounding(model: Any, least: float) -> float:
    """How far apart two paths of one function may be, relative to the largest value: ``least``, or in half precision
    what the model's own dtype rounds away.
    """
    weight = first_weight(model)
    return least if weight is None else max(least, HALF.get(weight.dtype, 0.0))


@contextmanager
def one_arithmetic(model: Any) -> Iterator[None]:
    """Inside the block no run of ``model`` depends on who looks: its scan sites, if it has any, are always formed.

    A fused run and a materialised one differ by rounding, so a comparison of the two would see an effect of nothing.
    """
    scan_sites = [name for name, point in points(model).items() if hasattr(point, "exposed")]
    if not any(kind(name) in ("hook_decay", "hook_write", "hook_state") for name in scan_sites):
        yield
        return
    with hooks.expose(model, scan_sites):
        yield
