"""The same recurrence as a convolution, for models whose decay, write and read-out are constant in time.

With h_t = decay ⊙ h_{t−1} + write x_t from h = 0 and y_t = Σ_n read[n] h_t[n], the output is

    y_t = Σ_{l ≥ 0} K[l] x_{t−l},     K[l] = Σ_n read[n] decay[n]^l write[n]

(Gu et al. 2022, S4, equation 5): no loop over positions, and O(pos log pos) for long sequences by FFT.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Inexact
from torch import Tensor
from torch.nn import functional as F

from hooks.errors import BadArgument
from hooks.precision import exact
from hooks.transforms import every_order

DIRECT = 256
"""Longest sequence that is convolved as a matrix product, whose cost grows with the square of the length."""


def kernel(
    decay: Inexact[Tensor, "channels d_state"],
    write: Inexact[Tensor, "channels d_state"],
    read: Inexact[Tensor, "channels d_state"],
    length: int,
) -> Float[Tensor, "channels length"]:
    """Impulse response K[d, l] = Re Σ_n read[d, n] decay[d, n]^l write[d, n] for l = 0 … length − 1.

    Complex operands (a diagonal S4) give the real part of the sum. A model that keeps one state of each
    conjugate pair reads 2 Re(·): put that factor into ``read``. The ``write`` is the discretised one, such as
    (e^{ΔA} − 1)/A · B. Powers of 0 are 1, 0, 0, …: a zero decay leaves the write alone. Builds channels ·
    d_state · length numbers. Raises BadArgument if the shapes differ or ``length`` is below 1.
    """
    shapes = {name: tuple(value.shape) for name, value in (("decay", decay), ("write", write), ("read", read))}
    if len(set(shapes.values())) > 1 or decay.ndim != 2:
        raise BadArgument(f"decay, write and read must share one (channels, d_state) shape; found {shapes}")
    if length < 1:
        raise BadArgument(f"length is {length}; a kernel has at least one tap")
    # repeated multiplication rather than decay ** l: exact at 0, and no logarithm whose phase loses digits with l
    powers = torch.cat([torch.ones_like(decay)[..., None], decay[..., None].expand(-1, -1, length - 1)], -1)
    taps = exact(partial(torch.einsum, "dn,dnl->dl"), read * write, torch.cumprod(powers, -1))
    return taps.real if taps.is_complex() else taps


def convolution(
    x: Float[Tensor, "batch pos channels"], kernel: Float[Tensor, "channels pos"]
) -> Float[Tensor, "batch pos channels"]:
    """Causal convolution of each channel with its own kernel, y_t = Σ_{l=0}^{t} kernel[l] x_{t−l}.

    Up to DIRECT positions as one matrix product for each channel (there three times as fast as the FFT, forward and
    backward), above that by FFT over 2 pos − 1 points or more, so that nothing wraps around. Computed in float32
    (float64 for float64 operands) and returned in the dtype of x. The FFT's error is relative to the largest output
    of the channel, not to each output. Taps past pos are not used. Raises BadArgument if channels differ or the
    kernel is shorter than the sequence.
    """
    if x.ndim != 3 or kernel.ndim != 2 or x.shape[2] != kernel.shape[0]:
        found = f"found {tuple(x.shape)} and {tuple(kernel.shape)}"
        raise BadArgument(f"x is (batch, pos, channels) and kernel (channels, pos); {found}")
    if kernel.shape[1] < x.shape[1]:
        raise BadArgument(f"a kernel of {kernel.shape[1]} taps is too short for {x.shape[1]} positions")
    if x.device != kernel.device or not x.is_floating_point() or not kernel.is_floating_point():
        found = f"x is {x.dtype} on {x.device}, kernel {kernel.dtype} on {kernel.device}"
        raise BadArgument(f"x and kernel must be real floating-point numbers on one device; {found}")
    if not x.numel():
        raise BadArgument(f"x has shape {tuple(x.shape)}; there is nothing to convolve")
    length = x.shape[1]
    compute = torch.promote_types(torch.promote_types(x.dtype, kernel.dtype), torch.float32)
    run = _direct if length <= DIRECT else _by_fft
    return run(x.to(compute), kernel[:, :length].to(compute)).to(x.dtype)


def _direct(x: Float[Tensor, "batch pos channels"], kernel: Float[Tensor, "channels pos"]) -> Tensor:
    """Product with the lower-triangular Toeplitz matrix T[t, s] = kernel[t − s]: a window sliding over the taps."""
    windows = F.pad(kernel, (kernel.shape[1] - 1, 0)).unfold(1, kernel.shape[1], 1)
    toeplitz = rearrange(windows.flip(2), "channels t s -> channels s t")
    y = exact(_Product.apply, rearrange(x, "batch s channels -> channels batch s").contiguous(), toeplitz)
    return rearrange(y, "channels batch t -> batch t channels").contiguous()


class _Product(torch.autograd.Function):
    """Batched matrix product that is handed its gradient contiguous: it copies a strided operand channel by channel."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (a, b), wanted = ctx.saved_tensors, ctx.needs_input_grad
        grad = grad.contiguous()
        return torch.bmm(grad, b.mT) if wanted[0] else None, torch.bmm(a.mT, grad) if wanted[1] else None

    @staticmethod
    @every_order
    def jvp(ctx: Any, saved: Any, change_a: Tensor, change_b: Tensor) -> Tensor:
        a, b = saved
        return torch.bmm(change_a, b) + torch.bmm(a, change_b)


def _by_fft(x: Float[Tensor, "batch pos channels"], kernel: Float[Tensor, "channels pos"]) -> Tensor:
    length = x.shape[1]
    points = 1 << (2 * length - 1).bit_length()
    signal, response = torch.fft.rfft(x, n=points, dim=1), torch.fft.rfft(kernel, n=points, dim=1)
    return torch.fft.irfft(signal * response.t(), n=points, dim=1)[:, :length]
