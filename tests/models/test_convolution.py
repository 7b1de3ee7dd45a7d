"""The recurrence with constant coefficients as a convolution, against the recurrence and against sums by hand."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hooks.errors import BadArgument
from models.scan import convolution, kernel, reference
from tests.tolerances import assert_matches


def coefficients(channels: int, d_state: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """decay (of modulus below 1), write and read."""
    decay, write, read = (torch.randn(channels, d_state, dtype=dtype) for _ in range(3))
    return decay / (1 + decay.abs()), write, read


@pytest.mark.definition
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128, torch.complex64], ids=str)
@pytest.mark.parametrize("length", [1, 2, 33, 130])
def test_convolution_is_the_recurrence_with_constant_coefficients(length: int, dtype: torch.dtype) -> None:
    decay, write, read = coefficients(5, 4, dtype)
    x = torch.randn(3, length, 5, dtype=torch.empty(0, dtype=dtype).real.dtype)
    states = reference.scan(decay.expand(3, length, 5, 4), x[..., None] * write)
    expected = (states * read).sum(-1)
    assert_matches(convolution(x, kernel(decay, write, read, length)), expected.real)


@pytest.mark.definition
def test_both_halves_of_a_conjugate_pair_are_twice_the_real_part() -> None:
    decay, write, read = coefficients(3, 4, torch.complex128)
    both = (torch.cat([value, value.conj()], -1) for value in (decay, write, read))
    assert_matches(kernel(decay, write, 2 * read, 20), kernel(*both, 20))


@pytest.mark.definition
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_zero_decay_leaves_the_write_alone(dtype: torch.dtype) -> None:
    decay = torch.zeros(1, 1, dtype=dtype)
    two, three = decay + 2, decay + 3
    assert_close(kernel(decay, two, three, 3), torch.tensor([[6.0, 0, 0]], dtype=torch.float64))


@pytest.mark.definition
def test_gradients_of_kernel_and_convolution() -> None:
    x = torch.randn(1, 4, 2, dtype=torch.float64, requires_grad=True)
    for dtype in (torch.float64, torch.complex128):
        given = [value.detach().requires_grad_() for value in coefficients(2, 2, dtype)]
        assert torch.autograd.gradcheck(lambda x, *given: convolution(x, kernel(*given, 4)), [x, *given])


@pytest.mark.law
def test_convolution_is_causal() -> None:
    x, taps = torch.randn(1, 12, 2, dtype=torch.float64), torch.randn(2, 12, dtype=torch.float64)
    other = x.clone()
    other[:, 7] += 1
    before, after = convolution(x, taps), convolution(other, taps)
    assert_matches(after[:, :7], before[:, :7])
    assert_matches(after[:, 7:] - before[:, 7:], taps[None, :, :5].transpose(1, 2))


@pytest.mark.contract
def test_refusals() -> None:
    unchecked, unchecked_kernel = inspect.unwrap(convolution), inspect.unwrap(kernel)
    x, taps = torch.zeros(2, 5, 3), torch.zeros(3, 5)
    unchecked(x, taps)
    for wrong_x, wrong_taps in [
        (x[0], taps),
        (x, taps[0]),
        (x, taps[:2]),
        (x, taps[:, :4]),
        (x.to("meta"), taps),
        (x, taps.to(torch.complex64)),
        (x[:, :0], taps),
        (x.long(), taps),
    ]:
        with pytest.raises(BadArgument, match=r"^[^\n]+$"):
            unchecked(wrong_x, wrong_taps)
    decay = torch.zeros(3, 2)
    unchecked_kernel(decay, decay, decay, 4)
    for given in [(decay, decay[:2], decay, 4), (decay[0], decay[0], decay[0], 4), (decay, decay, decay, 0)]:
        with pytest.raises(BadArgument, match=r"^[^\n]+$"):
            unchecked_kernel(*given)
