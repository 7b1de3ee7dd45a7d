"""A model's outline: every tensor with its shape and no memory behind it, so that a file is compared first.

A loaded model is its outline filled with the tensors of the file: no initial weight is ever drawn, and nothing larger
than the file is made, whatever the configuration in the file says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hooks.errors import TooLarge
from hooks.memory import free_memory
from hooks.sealed import one_line
from models.stack import Root

_ELEMENTWISE = {
    *("add", "sub", "rsub", "mul", "div", "neg", "exp", "expm1", "log", "sqrt", "float"),
    *("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__", "__rtruediv__", "__neg__"),
}
_IN_PLACE = {"normal_", "uniform_", "copy_", "fill_", "zero_", "div_", "mul_", "__itruediv__", "__imul__"}


USUAL = 2**28
"""Weights up to which no look is taken at the memory that a model needs: 1 GB in fp32."""
LAYER = 100_000
"""Bytes of the Python objects of one layer, about."""


class _NothingComputed(TorchFunctionMode):
    """The arithmetic of initial weights, for shapes alone.

    torch would do it on the meta device too, but imports its compiler for that, which takes seconds. What is not
    listed above goes to torch.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _IN_PLACE:
            return args[0] if args else kwargs["tensor"]
        if name in _ELEMENTWISE:
            given = [value for value in args if isinstance(value, Tensor)]
            shape = np.broadcast_shapes(*(value.shape for value in given))
            return torch.empty(shape, dtype=torch.float32 if name == "float" else given[0].dtype)
        if name in ("rand", "randn"):
            return torch.empty(*args, **kwargs)
        if name == "repeat":
            value, *times = args
            shape = (1,) * (len(times) - value.ndim) + tuple(value.shape)
            return torch.empty([n * size for n, size in zip(times, shape, strict=True)], dtype=value.dtype)
        if name == "arange":
            return torch.empty(len(range(*args)), dtype=kwargs.get("dtype", torch.int64))
        return func(*args, **kwargs)


def outline(architecture: str, config: Mapping[str, Any]) -> Root:
    """The model of :func:`models.build` on torch's "meta" device; raises as that does. Nothing random is drawn."""
    # Here and not at the top: models/__init__ imports this module.
    from models import ARCHITECTURES, checked_config

    checked = checked_config(architecture, config)
    try:
        with torch.device("meta"), _NothingComputed():
            return ARCHITECTURES[architecture](checked)
    except RuntimeError as error:
        if "overflow" in str(error):  # a tensor with more bytes than an address can count
            raise TooLarge(f"this {architecture} is too large for any memory: {one_line(error)}") from error
    # Somebody's own architecture, whose initial weights need numbers: the outline is a whole model.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        return ARCHITECTURES[architecture](checked)


def check_size(architecture: str, config: Any) -> None:
    """Raise :class:`TooLarge` where a model of ``config`` has more weights than there is free memory."""
    fields = dataclasses.asdict(config)
    layers = fields.get("n_layers", 1)
    length = fields.get("n_ctx", 0)
    others = [value for name, value in fields.items() if isinstance(value, int) and name not in ("n_layers", "n_ctx")]
    # An outline takes as long as a small model. No tensor has more weights than three of the numbers multiplied.
    if layers * max(max(others, default=1) ** 3, length**2) <= USUAL:
        return
    model = outline(architecture, {**fields, **({"n_layers": 1} if "n_layers" in fields else {})})
    weights = [*model.parameters(), *(value for part in _unlisted(model) for value in part.parameters())]
    layer = LAYER + length**2  # TransformerLens makes a mask of every layer, which goes again
    needed = layers * (layer + sum(value.numel() * value.element_size() for value in weights))
    free = free_memory(torch.device("cpu"))
    if needed > free:
        sizes = {name: value for name, value in fields.items() if isinstance(value, int)}
        largest = sorted(sizes, key=lambda name: sizes[name], reverse=True)[:3]
        size = ", ".join(f"{name}={value}" for name, value in sizes.items() if name in largest)
        raise TooLarge(
            f"a {architecture} with {size} takes about {needed / 1e9:,.0f} GB, and {free / 1e9:,.0f} GB are free: "
            "give a smaller one"
        )


def fill(model: Root, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Put ``tensors`` in the place of the tensors ``own`` of an outline, which have the same names and shapes.

    Wherever the model holds a parameter it then holds the filled one. What is in no checkpoint and never runs (the
    positions and the vocabulary that TransformerLens adds) becomes zeros.
    """
    for name, empty in own.items():
        _swap(empty, tensors[name])
    for part in _unlisted(model):
        for value in (*part._parameters.values(), *part._buffers.values()):
            if value is not None and value.is_meta:
                # One zero for all of them: their size is in the configuration alone.
                _swap(value, torch.zeros((), dtype=value.dtype).expand(value.shape))


def _swap(empty: Tensor, value: Tensor) -> None:
    if isinstance(empty, nn.Parameter):
        value = nn.Parameter(value, requires_grad=empty.requires_grad)
    torch.utils.swap_tensors(empty, value)


def _unlisted(model: Root) -> list[nn.Module]:
    """Modules that a model keeps beside its tree."""
    beside = [part for part in vars(model).values() if isinstance(part, nn.Module)]
    return [inner for part in beside for inner in part.modules()]
