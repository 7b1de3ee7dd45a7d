"""NaN and inf in gradients: found where somebody asks for them by our verbs, and traced to where they first appear.

A gradient flows from the last site to the first, so *first* is the last site in firing order that holds one. A backward
that is called without any of our verbs on the model is torch's own, and is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from hooks.errors import NonFinite
from hooks.finite import _describe, _finite
from hooks.transforms import active


def check_gradient(gradient: Tensor, site: str) -> None:
    """Raise :class:`NonFinite` where the gradient at ``site`` holds NaN or inf."""
    if not _finite(gradient.detach()):
        raise NonFinite(f"the gradient at {site} holds {_describe(gradient.detach())}")


def watch_gradient(tensor: Tensor, site: str) -> None:
    """Check the gradient of ``tensor`` whenever a backward reaches it."""
    if tensor.requires_grad and not active():
        tensor.register_hook(partial(_look, site=site))


def _look(gradient: Tensor | None, site: str) -> None:
    if gradient is not None:
        check_gradient(gradient, site)


def refuse_gradients(
    gradients: Mapping[str, Tensor], model: Any, x: Tensor, number: Callable[[Any], Tensor], **model_kwargs: Any
) -> None:
    """Raise :class:`NonFinite`, as :func:`trace`, where one of ``gradients`` (in firing order) holds NaN or inf."""
    for name, gradient in reversed(list(gradients.items())):
        try:
            check_gradient(gradient, name)
        except NonFinite as error:
            trace(error, model, x, number, **model_kwargs)


def trace(error: NonFinite, model: Any, x: Tensor, number: Callable[[Any], Tensor], **model_kwargs: Any) -> NoReturn:
    """Raise ``error``, and name the first site on the way back from ``number(output)``, one number.

    The run is repeated with all sites looked at; hooks and edits that are on the model act in it as they did.
    """
    from hooks.records import record  # which watches gradients by this module

    with torch.enable_grad():
        run = record(model, x, grad=True, max_memory=1 << 62, **model_kwargs)
        leaves = [value for value in run.values() if value.requires_grad]
        try:
            torch.autograd.grad(number(run.output), leaves, allow_unused=True)
        except NonFinite as found:
            where = str(found).removeprefix("the gradient at ").replace(" holds ", " (", 1)
            raise NonFinite(f"{error}; on the way back from the output first seen at {where})") from None
    raise NonFinite(f"{error}; no site holds one when the run is repeated") from None
