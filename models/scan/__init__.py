"""The recurrence h_t = decay_t ⊙ h_{t−1} + write_t: one signature, whatever computes it.

CPU tensors go to compiled loops (`cpu.py`), CUDA tensors to mamba_ssm's kernel where it is installed and applies
(`cuda.py`), everything else, and complex numbers, to the definition (`reference.py`). Every operand is checked
first: compiled code does not know shapes, and would read past the end of what a wrong edit returned.

float32, bfloat16 and float16 operands may be mixed, as autocast does; they are computed in float32. float64 is
computed in float64 and mixes with nothing. In all functions a decay of exactly 0 cuts the past, also against inf.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from hooks.errors import BadArgument
from models.scan import cpu, cuda, pair, reference
from models.scan.causal import convolution, kernel
from models.scan.reference import decays, rates

__all__ = [
    "constant_pair_states",
    "convolution",
    "decays",
    "kernel",
    "pair_scan",
    "rates",
    "scan",
    "selective_scan",
    "selective_scan_states",
    "selective_states",
]

_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
_DOUBLE = (torch.float64,)
_COMPLEX = ((torch.complex64,), (torch.complex128,))


def selective_scan(
    x: Float[Tensor, "batch pos d_inner"],
    delta_decay: Float[Tensor, "batch pos d_inner"],
    delta_write: Float[Tensor, "batch pos d_inner"],
    A: Float[Tensor, "d_inner d_state"],
    B: Float[Tensor, "batch pos d_state"],
    C: Float[Tensor, "batch pos d_state"],
    h0: Float[Tensor, "batch d_inner d_state"] | None = None,
) -> tuple[Float[Tensor, "batch pos d_inner"], Float[Tensor, "batch d_inner d_state"]]:
    """Read-out y (without the skip D x) and last state of the selective recurrence; nothing 4-D is formed.

    h_t = exp(Δ_decay A) h_{t−1} + Δ_write B x_t,  y_t = Σ_n C_t[n] h_t[:, n],  from ``h0`` (zero unless given).
    y has the dtype of x; the last state is float32 or float64. Both are differentiable in every operand, twice.
    Raises BadArgument, naming the operand, for a wrong shape, dtype or device. Gu and Dao 2023, section 3.2.
    """
    given = (x, delta_decay, delta_write, A, B, C, h0)
    operands = _checked(dict(zip(_SCAN, given, strict=True)), _SCAN, _SINGLE, _DOUBLE)
    run = cuda if x.device.type == "cuda" else _engine(x)
    y, h_last = run.selective_scan(*operands)
    return y.to(x.dtype), h_last


def selective_states(
    x: Float[Tensor, "batch pos d_inner"],
    delta_decay: Float[Tensor, "batch pos d_inner"],
    delta_write: Float[Tensor, "batch pos d_inner"],
    A: Float[Tensor, "d_inner d_state"],
    B: Float[Tensor, "batch pos d_state"],
    h0: Float[Tensor, "batch d_inner d_state"] | None = None,
) -> Float[Tensor, "batch pos d_inner d_state"]:
    """All states of ``selective_scan``, float32 or float64; decay and write are never formed.

    batch · pos · d_inner · d_state numbers. Raises BadArgument as ``selective_scan`` does.
    """
    given = (x, delta_decay, delta_write, A, B, h0)
    axes = {name: axes for name, axes in _SCAN.items() if name != "C"}
    operands = _checked(dict(zip(axes, given, strict=True)), axes, _SINGLE, _DOUBLE)
    run = _engine(x)
    return run.selective_states(*operands)


def selective_scan_states(
    x: Float[Tensor, "batch pos d_inner"],
    delta_decay: Float[Tensor, "batch pos d_inner"],
    delta_write: Float[Tensor, "batch pos d_inner"],
    A: Float[Tensor, "d_inner d_state"],
    B: Float[Tensor, "batch pos d_state"],
    C: Float[Tensor, "batch pos d_state"],
    h0: Float[Tensor, "batch d_inner d_state"] | None = None,
) -> tuple[Float[Tensor, "batch pos d_inner"], Float[Tensor, "batch pos d_inner d_state"]]:
    """Read-out and all states of ``selective_scan`` in one pass, for who reads both and wants no gradient.

    The states are read out while they are at hand, not fetched from memory once more. A gradient is that of the
    definition, and slow. Raises BadArgument as ``selective_scan`` does.
    """
    given = (x, delta_decay, delta_write, A, B, C, h0)
    operands = _checked(dict(zip(_SCAN, given, strict=True)), _SCAN, _SINGLE, _DOUBLE)
    run = _engine(x)
    y, states = run.selective_scan_states(*operands)
    return y.to(x.dtype), states


def scan(
    decay: Inexact[Tensor, "batch pos *rest"],
    write: Inexact[Tensor, "batch pos *rest"],
    h0: Inexact[Tensor, "batch *rest"] | None = None,
) -> Inexact[Tensor, "batch pos *rest"]:
    """All states h_t = decay_t ⊙ h_{t−1} + write_t of the materialised recurrence, from ``h0`` (zero unless given).

    Elementwise over any trailing shape, the same for all three operands (expand one that is smaller); real or
    complex. Setting decay_t = 0 and write_t = v makes h_t = v, whatever came before. Raises BadArgument.
    """
    rest = " ".join(f"axis{k}" for k in range(2, getattr(write, "ndim", 2)))
    axes = {"decay": f"batch pos {rest}", "write": f"batch pos {rest}", "h0": f"batch {rest}"}
    operands = _checked({"write": write, "decay": decay, "h0": h0}, axes, _SINGLE, _DOUBLE, *_COMPLEX)
    write, decay, h0 = operands
    return _engine(write).scan(decay, write, h0)


def pair_scan(
    decay: Float[Tensor, "batch pos d_inner re_im"],
    write: Float[Tensor, "batch pos d_inner re_im"],
    h0: Float[Tensor, "batch d_inner re_im"] | None = None,
) -> Float[Tensor, "batch pos d_inner re_im"]:
    """All states of h_t = ā_t h_{t−1} + w_t, complex numbers as pairs: d_state real parts, then the imaginary parts.

    Differentiable, also twice. Where a decay is 0 nothing of the past arrives, not even the NaN of 0 · inf. Raises
    BadArgument as ``selective_scan`` does.
    """
    axes = {"write": "batch pos d_inner re_im", "decay": "batch pos d_inner re_im", "h0": "batch d_inner re_im"}
    write, decay, h0 = _checked({"write": write, "decay": decay, "h0": h0}, axes, _SINGLE, _DOUBLE)
    _even("write", write)
    return pair.scan(decay, write, h0)


def constant_pair_states(
    x: Float[Tensor, "batch pos d_inner"],
    decay: Float[Tensor, "d_inner re_im"],
    gain: Float[Tensor, "d_inner re_im"],
    read: Float[Tensor, "d_inner re_im"],
    h0: Float[Tensor, "batch d_inner re_im"] | None = None,
) -> tuple[Float[Tensor, "batch pos d_inner"], Float[Tensor, "batch pos d_inner re_im"]]:
    """y_t = Σ_n read[n] h_t[n] and all states of h_t = ā h_{t−1} + gain x_t in one pass, for who wants no gradient.

    ``pair_scan`` where decay and gain are the same for every token; no write is formed. Raises BadArgument as
    ``selective_scan`` does.
    """
    weights = dict.fromkeys(("decay", "gain", "read"), "d_inner re_im")
    axes = {"x": "batch pos d_inner", **weights, "h0": "batch d_inner re_im"}
    operands = _checked(dict(zip(axes, (x, decay, gain, read, h0), strict=True)), axes, _SINGLE, _DOUBLE)
    _even("decay", operands[1])
    y, states = pair.constant_states(*operands)
    return y.to(x.dtype), states


def _engine(operand: Tensor) -> Any:
    """What computes: the compiled loops for real CPU tensors where there are any, else the definition."""
    if operand.device.type != "cpu" or operand.is_complex():
        return reference
    from hooks.machine import native  # numba: half a second that only those pay who scan

    return cpu if native.usable() else reference


def _even(name: str, pairs: Tensor) -> None:
    if pairs.shape[-1] % 2:
        raise BadArgument(
            f"{name} has shape {tuple(pairs.shape)}; its last axis holds real parts and as many imaginary"
        )


_SCAN = {
    "x": "batch pos d_inner",
    "delta_decay": "batch pos d_inner",
    "delta_write": "batch pos d_inner",
    "A": "d_inner d_state",
    "B": "batch pos d_state",
    "C": "batch pos d_state",
    "h0": "batch d_inner d_state",
}


def _checked(operands: Mapping[str, object], axes: dict[str, str], *families: tuple[torch.dtype, ...]) -> list[Any]:
    """The operands, in one dtype to compute in, or BadArgument. The first one settles device, dtype and sizes."""
    first_name, first = next(iter(operands.items()))
    if not isinstance(first, Tensor):
        raise BadArgument(f"{first_name} is {type(first).__name__}; give a torch tensor")
    family = next((dtypes for dtypes in families if first.dtype in dtypes), None)
    if family is None:
        known = ", ".join(str(dtype) for dtypes in families for dtype in dtypes)
        raise BadArgument(f"{first_name} has dtype {first.dtype}; convert it to one of {known}")
    sizes: dict[str, tuple[int, str]] = {}
    for name, tensor in operands.items():
        if tensor is None and name == "h0":
            continue
        if not isinstance(tensor, Tensor):
            raise BadArgument(f"{name} is {type(tensor).__name__}; give a torch tensor")
        if tensor.dtype not in family:
            raise BadArgument(f"{name} has dtype {tensor.dtype} and {first_name} {first.dtype}; convert one")
        if tensor.device != first.device:
            raise BadArgument(f"{name} is on {tensor.device} and {first_name} on {first.device}; move one")
        wanted = axes[name].split()
        shape = tuple(tensor.shape)
        if len(shape) != len(wanted):
            raise BadArgument(f"{name} has shape {shape}; its axes are ({' '.join(wanted)})")
        for axis, size in zip(wanted, shape, strict=True):
            expected, source = sizes.setdefault(axis, (size, name))
            if size != expected or size == 0:
                need = f"{expected} in {source}" if expected else "empty"
                raise BadArgument(f"{name} has shape {shape}; its {axis} is {size}, and {need}")
    compute = torch.float32 if family is _SINGLE else first.dtype
    # one tensor in two places stays one: delta_decay is delta_write tells the CUDA path that Δ has one role
    cast = {id(tensor): tensor.to(compute) for tensor in operands.values() if isinstance(tensor, Tensor)}
    return [cast.get(id(tensor)) for tensor in operands.values()]
