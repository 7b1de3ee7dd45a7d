"""Where a model meets its input: in which dtype and on which device it is fed, and what it cannot read.

A model reads real inputs in the dtype of its first weight. Prompts that a task has drawn are fed so (:func:`fed`):
nobody chose their dtype. A tensor that somebody hands over is never rounded behind their back: :func:`readable` refuses
it in one line that says what to do, before any work is done with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from hooks.errors import BadArgument, told


def first_weight(model: Any) -> Tensor | None:
    """The weight whose dtype and device real inputs are read in; None for a plain function, or without weights."""
    weights = model.parameters() if isinstance(model, nn.Module) else ()
    return next((weight for weight in weights if weight.is_floating_point()), None)


def fed(model: Any, x: Tensor, *, device: bool = True) -> Tensor:
    """``x`` as ``model`` reads it: on its device (unless ``device=False``), and in its dtype where x is real.

    The one place that decides this. Integers stay what they are, and so does what a plain function is called with.
    """
    weight = first_weight(model)
    if weight is None:
        return x
    return x.to(weight.device if device else x.device, weight.dtype if x.is_floating_point() else x.dtype)


def readable(
    model: Any, x: Any, what: str = "the input", model_kwargs: Mapping[str, Any] = MappingProxyType({})
) -> Tensor:
    """``x``, if it is a batch that ``model`` can read; else :class:`BadArgument` says what to give instead.

    A model with a method ``check_input`` (all of ours) is asked itself, unless ``model_kwargs`` say that ``x`` goes in
    somewhere else than at its start. Of another only a tensor is wanted that has a prompt and a position axis.
    """
    check = None if "start_at_layer" in model_kwargs else getattr(model, "check_input", None)
    tensor(x, first_weight(model), what)
    if check is not None:
        check(x, what=what)
    elif x.ndim < 2:
        raise BadArgument(f"{what} is {told(x)}: a batch has axes (batch, pos, …); one prompt is x[None]")
    found: Tensor = x
    return found


def tensor(x: Any, like: Tensor | None, what: str = "the input") -> None:
    """Nothing, if ``x`` is a tensor; else :class:`BadArgument` with the call that makes one."""
    if not isinstance(x, Tensor):
        kind = "" if like is None else f", dtype={like.dtype}"
        raise BadArgument(f"{what} is {told(x)}, not a tensor: try torch.as_tensor(x{kind})")


def arguments(model: Any) -> Mapping[str, inspect.Parameter]:
    """What ``model`` can be called with, by name; of a compiled one, what the model inside it can."""
    return inspect.signature(getattr(model, "_orig_mod", model).forward).parameters


def same_kind(x: Tensor, weight: Tensor, what: str = "the input") -> None:
    """Nothing, if ``x`` has the dtype and device of ``weight``, which it is multiplied by.

    Under autocast the product converts both, so any real dtype will do.
    """
    cast = torch.is_autocast_enabled(x.device.type) and x.is_floating_point()
    if x.dtype != weight.dtype and not cast:
        raise BadArgument(
            f"{what} is {_name(x.dtype)} and the model's weights are {_name(weight.dtype)}: "
            f"try x.to({weight.dtype})" + (f", or model.to({x.dtype})" if x.is_floating_point() else "")
        )
    _same_device(x, weight, what)


def tokens(x: Tensor, table: Tensor, what: str = "the input") -> None:
    """Nothing, if ``x`` holds rows of ``table`` by number; else :class:`BadArgument`."""
    if x.dtype not in (torch.int64, torch.int32):
        raise BadArgument(f"{what} is {_name(x.dtype)} and the model reads tokens, 0 to {len(table) - 1}: try x.long()")
    _same_device(x, table, what)
    if x.is_meta:
        return
    try:
        least, most = int(x.min()), int(x.max())
    except RuntimeError:  # under torch.func.vmap a value is not one number
        return
    if least < 0 or most >= len(table):
        wrong = least if least < 0 else most
        raise BadArgument(f"{what} holds the token {wrong}, and the model's vocabulary is 0 to {len(table) - 1}")


def _same_device(x: Tensor, weight: Tensor, what: str) -> None:
    # Weights on the meta device are brought where the input is when they are needed (accelerate's offloading).
    if x.device != weight.device and not weight.is_meta:
        raise BadArgument(f'{what} is on {x.device} and the model on {weight.device}: try x.to("{weight.device}")')


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def no_gradients() -> str:
    """Why a run has no gradients and what to do, for the end of a message."""
    if torch.is_inference_mode_enabled():
        return "torch.inference_mode() is on: leave it (torch.no_grad() may stay)"
    if not torch.is_grad_enabled():
        return "torch.no_grad() is on: leave it, or use torch.enable_grad() inside"
    return "no weight and no input of the model asks for one: requires_grad_(True)"


def gradients_can_be(what: str) -> None:
    """Nothing, unless no gradient can be had here; then :class:`BadArgument`. ``what`` needs them."""
    if torch.is_inference_mode_enabled():
        raise BadArgument(f"{what} needs gradients: {no_gradients()}")
