"""NaN and inf: found on every run, and traced to the first site that holds one.

Weights are looked at again only when they have changed (torch counts in-place writes), so a frozen model pays once.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from hooks.errors import NonFinite


def check_input(x: Tensor) -> None:
    """Raise :class:`NonFinite` with the first place of ``x`` (batch, pos, …) that is NaN or inf."""
    if x.is_floating_point() and not _finite(x):
        raise NonFinite(f"the input holds {_describe(x)}")


def check_weights(model: Any) -> None:
    """Raise :class:`NonFinite` with the name of the first parameter that holds NaN or inf."""
    stamp = _stamp(model)
    if stamp is not None and getattr(model, "_finite_stamp", None) == stamp:
        return
    for name, parameter in model.named_parameters():
        if not _finite(parameter.detach()):
            name = name.replace("._original_component", "")  # TransformerLens' wrappers are in no name that we list
            raise NonFinite(f"the weight {name} holds {_describe(parameter.detach())}")
    model._finite_stamp = stamp


def _stamp(model: Any) -> list[tuple[int, int]] | None:
    """Where each weight is and how often it has been written to; None under torch.func, where neither is known."""
    try:
        return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters()]
    except RuntimeError:
        return None


def check_output(model: Any, output: Tensor, rerun: Any) -> None:
    """Raise :class:`NonFinite` with the first site, in firing order, where ``output``'s NaN or inf appears.

    ``rerun()`` repeats the run; hooks and edits that are on the model act in it as they did.
    """
    if _finite(output):
        return
    # Writes through ``.data`` are not counted by torch: look at the weights again before blaming a site.
    model._finite_stamp = None
    check_weights(model)
    found: list[str] = []

    def look(tensor: Tensor, hook: Any, name: str) -> None:
        if not found and not _finite(tensor.detach()):
            found.append(f"{name} ({_describe(tensor.detach())})")

    handles = [(point, point.add_hook(partial(look, name=name))) for name, point in model.hook_dict.items()]
    try:
        with torch.no_grad():
            rerun()
    finally:
        for point, handle in handles:
            handle.hook.remove()
            point.fwd_hooks[:] = [kept for kept in point.fwd_hooks if kept is not handle]
    where = found[0] if found else "the output only; no site holds one when the run is repeated"
    raise NonFinite(f"the output holds {_describe(output.detach())}; first seen at {where}")


def _finite(x: Tensor) -> bool:
    # A sum is one pass and is finite for all but huge values; only a hit is looked at closely.
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


def _describe(x: Tensor) -> str:
    bad = ~torch.isfinite(x)
    first = tuple(int(i) for i in bad.nonzero()[0])
    what = "NaN" if bool(torch.isnan(x).any()) else "inf"
    return f"{what} at {first} ({int(bad.sum())} of {x.numel()} numbers)"
