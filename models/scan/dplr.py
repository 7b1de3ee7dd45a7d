"""S4's transition (Gu, Goel & Ré 2022): diagonal plus low rank; discrete factors, powers, convolution kernel.

A state is ``d_state`` complex numbers, each with its conjugate, so what acts on it is linear over the reals:

    A h = Λ ⊙ h − P · 2 Re(Pᴴ h)

which is Λ − P Pᴴ on all 2 · d_state numbers. With ⟨q, h⟩ = Re(qᴴ h), the dot product of real and imaginary parts, the
bilinear rule (section 2.3 of the paper) gives the same form again by Woodbury's identity:

    Ā = (I − Δ/2 A)⁻¹ (I + Δ/2 A)      Ā h = a ⊙ h + u ⟨q, h⟩       a = (1 + Δ/2 Λ) / (1 − Δ/2 Λ)
    B̄ = (I − Δ/2 A)⁻¹ Δ B

The impulse response K[l] = ⟨c, Āˡ B̄⟩, l < L, is exact for every L, in one of two ways. By the Cauchy kernel: its
discrete Fourier transform is the resolvent of A at L points of the imaginary axis, read by c − (Āᴸ)ᵀ c, which cuts the
response off at L. Or, for a few tokens, in blocks of T ≈ √L: Āᵏ is aᵏ plus k columns times k rows, so that the powers
of a block double and the blocks follow one another, in O(log T + L / T) steps of O(d_state · L) work in all; this is
also how the correction of the first way is made. No d_state × d_state matrix is ever formed.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Complex, Float
from torch import Tensor

from hooks.precision import exact

CAUCHY = 128
"""Longest response that is computed in blocks; a longer one is computed by the Cauchy kernel."""

Vectors = Complex[Tensor, "channels n"]


class System(NamedTuple):
    """The continuous A and B of every channel: ``diagonal`` Λ (negative real parts), ``low_rank`` P, ``B``."""

    diagonal: Vectors
    low_rank: Vectors
    B: Vectors


class Transition(NamedTuple):
    """Ā of every channel (any leading axes): h → ``diagonal`` ⊙ h + ``column`` · ⟨``row``, h⟩."""

    diagonal: Complex[Tensor, "*shape n"]
    column: Complex[Tensor, "*shape n"]
    row: Complex[Tensor, "*shape n"]

    def transposed(self) -> Transition:
        """The transition T with ⟨T r, h⟩ = ⟨r, Ā h⟩ for all r and h."""
        return Transition(self.diagonal.conj(), self.row, self.column)


def inner(q: Complex[Tensor, "*#shape n"], h: Complex[Tensor, "*#shape n"]) -> Float[Tensor, "*#shape"]:
    """⟨q, h⟩ = Re(qᴴ h)."""
    return (q.real * h.real + q.imag * h.imag).sum(-1)


def discretise(delta: Float[Tensor, "*shape channels"], system: System) -> Transition:
    """Ā of the bilinear rule at the step ``delta``."""
    return _resolved(delta, system)[0]


def discretise_input(delta: Float[Tensor, "*shape channels"], system: System) -> Complex[Tensor, "*shape channels n"]:
    """B̄ of the bilinear rule at the step ``delta``."""
    transition, resolvent = _resolved(delta, system)
    # (I − Δ/2 A)⁻¹ = G − G P κ ⟨conj(G) P, ·⟩, and the column of Ā is twice that of the inverse.
    solved = resolvent * system.B + transition.column / 2 * inner(transition.row, system.B)[..., None]
    return delta[..., None] * solved


def _resolved(delta: Tensor, system: System) -> tuple[Transition, Tensor]:
    """Ā, and G = 1 / (1 − Δ/2 Λ)."""
    half = delta[..., None] / 2 * system.diagonal
    resolvent = _reciprocal(1 - half)
    column, row = resolvent * system.low_rank, resolvent.conj() * system.low_rank
    gain = -2 * delta / (1 + delta * inner(system.low_rank, column))
    return Transition((1 + half) * resolvent, gain[..., None] * column, row), resolvent


@functools.cache
def _overflows() -> bool:
    """Whether torch's own reciprocal squares a complex number on the way, as that of 2.6 does: 1 / 1e20 is then 0."""
    large = torch.full((16,), 1e20, dtype=torch.complex64, device="cpu")
    return bool((1 / large == 0).any())


def _reciprocal(z: Complex[Tensor, "*shape n"]) -> Complex[Tensor, "*shape n"]:
    if not _overflows():
        return 1 / z
    size = torch.maximum(z.real.abs(), z.imag.abs()).detach()
    return 1 / (z / size) / size


class Block(NamedTuple):
    """Āᵀ for T steps at once, h → ``diagonal`` ⊙ h + Σ_j ``columns``[j] ⟨``rows``[j], h⟩, and Āʲ s for j < T."""

    diagonal: Vectors
    columns: Complex[Tensor, "channels steps n"]
    rows: Complex[Tensor, "channels steps n"]
    powers: Complex[Tensor, "channels steps n"]
    """Āʲ s, the start s having been given."""

    def __call__(self, h: Complex[Tensor, "channels batch n"]) -> Complex[Tensor, "channels batch n"]:
        return self.diagonal[:, None] * h + _combine(_dots(h, self.rows), self.columns)

    def transposed(self, r: Complex[Tensor, "channels batch n"]) -> Complex[Tensor, "channels batch n"]:
        """The r' with ⟨r', h⟩ = ⟨r, Āᵀ h⟩ for every h."""
        return self.diagonal.conj()[:, None] * r + _combine(_dots(r, self.columns), self.rows)


def block(transition: Transition, start: Vectors, length: int) -> Block:
    """The block of T steps, T a power of 2 near √``length``, that starts in ``start``."""
    a, row = transition.diagonal, transition.row[:, None]
    # Both sequences of powers at once: Āʲ s and Āʲ u.
    powers = torch.stack([start, transition.column], 1)[:, :, None]
    while powers.shape[2] ** 2 < length:
        steps = powers.shape[2]
        done = Block(a, powers[:, 1], row, powers[:, 0])
        further = done(rearrange(powers, "channels two steps n -> channels (two steps) n"))
        further = rearrange(further, "channels (two steps) n -> channels two steps n", steps=steps)
        powers = torch.cat([powers, further], 2)
        # Āᵏ − aᵏ = Σ_j Āʲ u ⟨conj(a)^(k−1−j) q, ·⟩: the oldest row is the one that was turned most.
        row = torch.cat([a.conj()[:, None] * row, row], 1)
        a = a * a
    return Block(a, powers[:, 1], row, powers[:, 0])


def response(transition: Transition, write: Vectors, read: Vectors, length: int) -> Float[Tensor, "channels length"]:
    """K[l] = ⟨read, Āˡ write⟩ for l < ``length``, in blocks."""
    steps = block(transition, write, length)
    reads = [read[:, None]]
    while len(reads) * steps.powers.shape[1] < length:
        reads.append(steps.transposed(reads[-1]))
    taps = _dots(torch.cat(reads, 1), steps.powers)
    return rearrange(taps, "channels blocks steps -> channels (blocks steps)")[:, :length]


def left_over(
    transition: Transition, read: Vectors, start: Complex[Tensor, "channels batch n"], length: int
) -> Float[Tensor, "batch length channels"]:
    """⟨read, Ā^(t+1) h_0⟩ for t < ``length``: what an initial state ``start`` leaves in the read-out."""
    rows = block(transition.transposed(), read, length)
    states = [_once(transition, start)]
    while len(states) * rows.powers.shape[1] < length:
        states.append(rows.transposed(states[-1]))
    out = torch.stack([_dots(h, rows.powers) for h in states], 2)
    return rearrange(out, "channels batch blocks steps -> batch (blocks steps) channels")[:, :length]


def last_state(
    transition: Transition,
    write: Vectors,
    x: Float[Tensor, "batch pos channels"],
    start: Complex[Tensor, "channels batch n"] | None,
) -> Complex[Tensor, "channels batch n"]:
    """The state after the last token of ``x``, whole blocks first and then what is left, one by one."""
    steps = block(transition, write, x.shape[1])
    size = steps.powers.shape[1]
    tokens = rearrange(x, "batch pos channels -> channels batch pos")
    whole = x.shape[1] // size
    h = write.new_zeros(x.shape[2], x.shape[0], write.shape[1]) if start is None else start
    latest_last = steps.powers.flip(1)
    for k in range(whole):
        h = steps(h) + _combine(tokens[..., k * size : (k + 1) * size], latest_last)
    for t in range(whole * size, x.shape[1]):
        h = _once(transition, h) + tokens[..., t : t + 1] * write[:, None]
    return h


def after(transition: Transition, read: Vectors, length: int) -> Vectors:
    """The r with ⟨r, h⟩ = ⟨read, Ā^length h⟩ for every h."""
    steps = block(transition, read, length)
    count, rest = divmod(length, steps.powers.shape[1])
    r = read[:, None]
    for _ in range(count):
        r = steps.transposed(r)
    for _ in range(rest):
        r = _once(transition.transposed(), r)
    return r[:, 0]


def cauchy(
    delta: Float[Tensor, " channels"], system: System, write: Vectors, read: Vectors, length: int
) -> Float[Tensor, "channels length"]:
    """K[l] = ⟨read, Āˡ write⟩ for l < ``length`` by the Cauchy kernel at the roots of unity (section 3 of the paper).

    At z = e^{−iφ}, (I − z Ā)⁻¹ = 2 [2 (1 − z) − (1 + z) Δ A]⁻¹ (I − Δ/2 A). Turned by half the angle, the bracket is
    4 i sin(φ/2) − 2 cos(φ/2) Δ A: nothing cancels near z = 1, and nothing is singular at z = −1, where the paper's
    2 (1 − z) / (1 + z) is. ``write`` need not be B̄ at the same ``delta``.
    """
    cut = read - after(discretise(delta, system), read, length)
    P, scale = system.low_rank, delta[:, None]
    source = write - scale / 2 * (system.diagonal * write - 2 * P * inner(P, write)[..., None])
    # Half the circle: K is real. The angles are made in float64, where L of them are all different.
    angle = math.pi / length * torch.arange(length // 2 + 1, device=read.device, dtype=torch.float64)
    real = delta.dtype
    sine, cosine, turn = (
        angle.sin().to(real),
        angle.cos().to(real),
        torch.polar(angle.new_ones(()), angle).to(read.dtype),
    )
    poles = 2 * scale * system.diagonal
    along, across = poles.real, poles.imag
    left = torch.stack([cut, P], 1)
    # Rows c and P against columns b and P, each with its conjugate: ½ Σ (conj(l) r R(Λ) + l conj(r) R(conj Λ)).
    weights = rearrange(
        left.conj()[:, :, None] * torch.stack([source, P], 1)[:, None], "channels l r n -> channels (l r) n"
    )
    # Not poles.conj().imag: torch.vmap cannot go through the lazy minus of that.
    sums = weights @ _inverse(sine, cosine, along, across) + weights.conj() @ _inverse(sine, cosine, along, -across)
    cb, cp, pb, pp = (sums / 2).unbind(1)
    gain = 4 * cosine * scale
    transform = 2 * turn * (cb - cp * gain * pb / (1 + gain * pp))
    return torch.fft.irfft(transform, n=length, dim=-1)


def _inverse(
    sine: Tensor, cosine: Tensor, along: Float[Tensor, "channels n"], across: Float[Tensor, "channels n"]
) -> Complex[Tensor, "channels n points"]:
    """The Cauchy matrix 1 / (4 i sin(φ/2) − cos(φ/2) · 2 Δ Λ), 2 Δ Λ = ``along`` + i ``across``."""
    return 1 / torch.complex(-cosine * along[..., None], 4 * sine - cosine * across[..., None])


def _once(transition: Transition, h: Complex[Tensor, "channels batch n"]) -> Complex[Tensor, "channels batch n"]:
    """Ā h."""
    overlap = inner(transition.row[:, None], h)
    return transition.diagonal[:, None] * h + transition.column[:, None] * overlap[..., None]


def _dots(
    h: Complex[Tensor, "channels left n"], q: Complex[Tensor, "channels right n"]
) -> Float[Tensor, "channels left right"]:
    """⟨q, h⟩ of every pair, as one real matrix product for each channel."""
    return exact(torch.matmul, _flat(h), _flat(q).mT)


def _combine(
    weights: Float[Tensor, "channels left right"], vectors: Complex[Tensor, "channels right n"]
) -> Complex[Tensor, "channels left n"]:
    """Σ_j weights[j] vectors[j]."""
    return torch.view_as_complex(exact(torch.matmul, weights, _flat(vectors)).unflatten(-1, (-1, 2)))


def _flat(z: Complex[Tensor, "channels m n"]) -> Float[Tensor, "channels m both"]:
    return torch.view_as_real(z.resolve_conj()).flatten(-2)


def legs(d_state: int, outline: bool = False) -> System:
    """HiPPO-LegS of order 2 · ``d_state`` in normal-plus-low-rank form, one channel (1, d_state), complex128.

    A + P Pᵀ is −½ plus a skew-symmetric matrix, so unitarily diagonal (Theorem 1 and appendix C.1 of the paper). Of
    each conjugate pair of eigenvectors the one whose value has a positive imaginary part is kept, in rising order, and
    turned so that its entry of P is real and positive: B is then √2 P.

    ``outline``: on the "meta" device, of the right shape without a number in it.
    """
    if outline:
        nothing = torch.empty(1, d_state, dtype=torch.complex128, device="meta")
        return System(nothing, nothing, nothing)
    return _legs(d_state)


@functools.lru_cache(maxsize=8)
def _legs(d_state: int) -> System:
    order = torch.arange(2 * d_state, dtype=torch.float64, device="cpu")
    weight = (2 * order + 1).sqrt()
    # Below the diagonal A + P Pᵀ is −½ of the product, above it ½, and −½ on it.
    skew = -torch.outer(weight, weight).tril(-1) / 2
    values, vectors = torch.linalg.eigh(-1j * (skew - skew.mT))
    P = (vectors[:, d_state:].conj().mT @ (order + 0.5).sqrt().to(vectors.dtype)).abs().to(vectors.dtype)[None]
    diagonal = torch.complex(order.new_full((d_state,), -0.5), values[d_state:])[None]
    return System(diagonal, P, math.sqrt(2) * P)
