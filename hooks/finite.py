"""NaN and inf: found on every run, and traced to the first site that holds one.

Weights are looked at again only when they have changed (torch counts in-place writes), so a frozen model pays once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from hooks.errors import NonFinite
from hooks.placed import Placed, opened, run_alone, unsplit
from hooks.transforms import everywhere, plain

T = TypeVar("T")


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


def check_divisor(point: Any, value: Tensor) -> None:
    """Raise :class:`NonFinite` where ``value``, which what follows is divided by, holds NaN or inf.

    In a run of a whole model this is looked at when it ends, for all such sites at once.
    """
    if _run.sums is not None:
        _run.sums.append(value.detach().sum())
    elif not _finite(value.detach()):
        raise NonFinite(f"{_place(point, value)}, which what follows is divided by")


def note(point: Any, value: Tensor) -> None:
    """Keep in mind where an edit made the first NaN or inf of this run: a repeated run may not have that edit."""
    if _run.sums is not None and _run.first is None and not _finite(value.detach()):
        _run.first = _place(point, value)


class _Run(threading.local):
    """The run of a whole model that is going on in this thread: sums of what divides, and the first bad place noted."""

    sums: list[Tensor] | None = None
    first: str | None = None


_run = _Run()


def checked(model: Any, run: Callable[[], tuple[Tensor, Any]]) -> tuple[Tensor, Any]:
    """``run()``, which gives the model's output and state, looked at for NaN and inf.

    Raises :class:`NonFinite` with the first site, in firing order, that holds one, where the output does, and where a
    site does that divides what follows: a norm whose scale overflows makes 0 of it, finite and wrong. The run is
    repeated to find the site; hooks and edits that are on the model act in it as they did.
    """
    (output, state), sums, first = run_alone(model, lambda: _noting(run))
    whole = _finite(output)
    if whole and (not sums or _finite(torch.stack(sums))):
        return output, state
    # Writes through ``.data`` are not counted by torch: look at the weights again before blaming a site.
    model._finite_stamp = None
    check_weights(model)
    # Scores of -inf are how a position is kept from being looked at, exactly: where the output is finite, no fault.
    names = [name for name in model.hook_dict if not (whole and name.endswith("hook_attn_scores"))]
    where = _first_site(model, names, run) or first
    if whole and where is None:  # divisors whose sum is too large, and no more
        return output, state
    what = "a site that divides what follows holds NaN or inf, so the output is finite and wrong"
    what = what if whole else f"the output holds {_describe(output.detach())}"
    where = where or "the output only; no site holds one when the run is repeated"
    raise NonFinite(f"{what}; first seen at {where}")


def _noting(run: Callable[[], T]) -> tuple[T, list[Tensor], str | None]:
    around = _run.sums, _run.first
    sums: list[Tensor] = []
    _run.sums, _run.first = sums, None
    try:
        result = run()
        return result, sums, _run.first
    finally:
        _run.sums, _run.first = around


@unsplit
def _first_site(model: Any, names: list[str], run: Callable[[], object]) -> str | None:
    found: list[str] = []

    def look(tensor: Tensor, hook: Any, point: Any) -> None:
        if not found and not _finite(tensor.detach()):
            found.append(_place(point, tensor))

    points = [model.hook_dict[name] for name in names]
    with Placed(model) as placed, torch.no_grad():
        for point in points:
            placed.hook(point, partial(look, point=point))
        opened(lambda: _noting(run))
    return found[0] if found else None


def _place(point: Any, value: Tensor) -> str:
    return f"{getattr(point, 'listed', None) or point.name} ({_describe(value.detach())})"


def _finite(x: Tensor) -> bool:
    # A sum is one pass and is finite for all but huge values; only a hit is looked at closely.
    return everywhere(torch.isfinite(x.sum())) or everywhere(torch.isfinite(x))


def _describe(x: Tensor) -> str:
    x = plain(x)
    bad = ~torch.isfinite(x)
    first = tuple(int(i) for i in bad.nonzero()[0])
    what = "NaN" if bool(torch.isnan(x).any()) else "inf"
    return f"{what} at {first} ({int(bad.sum())} of {x.numel()} numbers)"
