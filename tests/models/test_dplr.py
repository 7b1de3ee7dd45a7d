"""The kernels of a diagonal-plus-low-rank system, by the Cauchy kernel and in blocks, against dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import models
from models.scan import dplr
from tests.models.dense_s4 import by_powers, operands, small
from tests.tolerances import assert_matches

pytestmark = pytest.mark.definition

LONG = dplr.CAUCHY + 2
"""A length whose response is computed by the Cauchy kernel."""


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 33, 64, 129, 200])
def test_both_kernels_are_powers_of_the_dense_matrix(length: int) -> None:
    mixer = small(n_layers=1).blocks[0].mixer
    step, system, transition, write, read = operands(mixer)
    wanted = by_powers(mixer, length)
    assert_matches(dplr.response(transition, write, read, length), wanted)
    assert_matches(dplr.cauchy(step, system, write, read, length), wanted)
    assert wanted.abs().max() > 0.1


@pytest.mark.parametrize("length", [41, LONG, 1000])
def test_kernels_at_the_published_start_in_single_precision(length: int) -> None:
    mixer = models.build("s4", d_model=5, n_layers=1, d_state=32).blocks[0].mixer
    step, system, transition, write, read = operands(mixer)
    wanted = by_powers(mixer, length)
    assert_matches(dplr.response(transition, write, read, length), wanted)
    assert_matches(dplr.cauchy(step, system, write, read, length), wanted)


def test_the_low_rank_part_and_the_cut_at_the_length_both_matter() -> None:
    """Without either the kernel is another one: the comparison above sees both."""
    mixer = small(n_layers=1).blocks[0].mixer
    step, system, _, _, read = operands(mixer)
    wanted = by_powers(mixer, 9)
    diagonal = system._replace(low_rank=torch.zeros_like(system.low_rank))
    alone = dplr.cauchy(step, diagonal, dplr.discretise_input(step, diagonal), read, 9)
    assert (alone - wanted).abs().max() > 0.05
    # Uncut, the response that goes on wraps around: the taps of nine times as many tokens fold into nine.
    longer = by_powers(mixer, 81).unflatten(-1, (9, 9)).sum(1)
    assert (longer - wanted).abs().max() > 0.05


def test_without_low_rank_the_kernel_is_the_diagonal_closed_form() -> None:
    mixer = small(n_layers=1).blocks[0].mixer
    with torch.no_grad():
        mixer.A_low_rank.zero_()
    step, system, transition, write, read = operands(mixer)
    half = step[:, None] / 2 * system.diagonal
    a, b = (1 + half) / (1 - half), step[:, None] * system.B / (1 - half)
    taps = 2 * (torch.view_as_complex(mixer.C)[..., None] * b[..., None] * a[..., None] ** torch.arange(11)).sum(1).real
    assert_matches(dplr.cauchy(step, system, write, read, 11), taps)
    assert_matches(dplr.response(transition, write, read, 11), taps)


def test_the_start_is_hippo_legs() -> None:
    """The same spectrum, −1 … −N, and the same Bᵀ Aᵏ B as the real matrix, which no change of basis alters."""
    order = np.arange(8)
    root = np.sqrt(2 * order + 1)
    A = -np.tril(np.outer(root, root), -1) - np.diag(order + 1.0)
    diagonal, P, B = (np.concatenate([z[0], z[0].conj()]) for z in (part.numpy() for part in dplr.legs(4)))
    ours = np.diag(diagonal) - np.outer(P, P.conj())
    assert_close(np.sort(np.linalg.eigvals(ours).real), -np.arange(8.0, 0, -1), rtol=1e-9, atol=1e-9)
    assert (diagonal[:4].imag > 0).all()
    for power in range(5):
        wanted = root @ np.linalg.matrix_power(A, power) @ root
        got = B.conj() @ np.linalg.matrix_power(ours, power) @ B
        assert_close(np.real(got), wanted, rtol=1e-9, atol=1e-9)
    mixer = models.build("s4", d_model=500, n_layers=1, d_state=4, dt_min=0.01, dt_max=0.02).blocks[0].mixer
    assert_close(-mixer.log_A_real.exp(), torch.full((500, 4), -0.5))
    step = mixer.log_dt.exp()
    assert 0.01 <= step.min() < 0.0105 and 0.0195 < step.max() <= 0.02


def test_gradients_against_finite_differences() -> None:
    mixer = small(n_layers=1, d_model=2, d_state=2).blocks[0].mixer
    parts = [mixer.log_A_real, mixer.A_imag, mixer.A_low_rank, mixer.B, mixer.C]
    leaves = [mixer.log_dt.detach().exp(), *(part.detach() for part in parts)]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def kernel(step: Tensor, log_real: Tensor, imag: Tensor, P: Tensor, B: Tensor, C: Tensor) -> Tensor:
        P, B, C = (torch.view_as_complex(z) for z in (P, B, C))
        system = dplr.System(torch.complex(-log_real.exp(), imag), P, B)
        write = dplr.discretise_input(step, system)
        blocks = dplr.response(dplr.discretise(step, system), write, C, 5)
        return torch.cat([blocks, dplr.cauchy(step, system, write, C, 6)], 1)

    assert torch.autograd.gradcheck(kernel, leaves, fast_mode=True)
