"""Compiled loops of the complex recurrence over pairs (numba); habits and units as in `kernels.py`.

A pair has its real and its imaginary parts apart, (…, 2, n). A unit is one sequence and TOGETHER neighbouring channels.
Time runs outside; what is carried lies on the stack, for STATES complex states of each channel at a time. How long the
innermost loops are is known at run time only: short ones of known length would be unrolled into scalar code.

**Guarded** loops let a zero win: where a decay is 0 nothing of the past arrives, and where the past is 0 no decay makes
anything of it, though a NaN decay does. The plain ones make a NaN of each such meeting with inf, which stays in what is
computed last.
"""

from __future__ import annotations

from numba import carray

from hooks.machine.native import compiled, inlined, stack

STATES = 64
TOGETHER = 8
_ROOM = TOGETHER * STATES
_WEIGHTS = 6 * _ROOM


@inlined
def times(a, e, p, q, guarded, zero):  # type: ignore[no-untyped-def]
    """(a + i e)(p + i q); if ``guarded`` 0 by the rule that a zero wins."""
    if guarded and ((a == zero and e == zero) or (p == zero and q == zero and a == a and e == e)):
        return zero, zero
    return a * p - e * q, a * q + e * p


@compiled
def scan(first, last, groups, decay, write, start, states, backwards, guarded):  # type: ignore[no-untyped-def]
    """All states of h_t = ā_t h_{t−1} + w_t; decay is (1 or batch, 1 or pos, d_inner, 2, n), start may be empty.

    ``backwards`` all of λ_t = w_t + conj(ā_{t+1}) λ_{t+1}, from the last position to the first.
    """
    length, width, n = write.shape[1], write.shape[2], write.shape[4]
    real = carray(stack(write, _ROOM), (TOGETHER, STATES))
    imag = carray(stack(write, _ROOM), (TOGETHER, STATES))
    zero = write.dtype.type(0)
    sign = write.dtype.type(-1 if backwards else 1)
    for unit in range(first, last):
        b = unit // groups
        row = b if decay.shape[0] > 1 else 0
        for group in range(groups):
            if group != unit % groups:
                continue
            channel = group * TOGETHER
            some = min(TOGETHER, width - channel)
            for n0 in range(0, n, STATES):
                part = min(STATES, n - n0)
                for c in range(some):
                    for j in range(part):
                        real[c, j] = start[b, channel + c, 0, n0 + j] if start.size > 0 else zero
                        imag[c, j] = start[b, channel + c, 1, n0 + j] if start.size > 0 else zero
                for i in range(length):
                    t = length - 1 - i if backwards else i
                    step = 0
                    if decay.shape[1] > 1:  # nothing comes after the last position: there any decay will do
                        step = min(t + 1, length - 1) if backwards else t
                    for c in range(some):
                        for j in range(part):
                            a = decay[row, step, channel + c, 0, n0 + j]
                            e = sign * decay[row, step, channel + c, 1, n0 + j]
                            kept, turned = times(a, e, real[c, j], imag[c, j], guarded, zero)
                            real[c, j] = write[b, t, channel + c, 0, n0 + j] + kept
                            imag[c, j] = write[b, t, channel + c, 1, n0 + j] + turned
                        for j in range(part):
                            states[b, t, channel + c, 0, n0 + j] = real[c, j]
                        for j in range(part):
                            states[b, t, channel + c, 1, n0 + j] = imag[c, j]


@compiled
def constant(first, last, groups, x, decay, gain, read, start, y, states, guarded):  # type: ignore[no-untyped-def]
    """All states and y of h_t = ā h_{t−1} + gain x_t, y_t = Σ read h_t; decay, gain and read are (d_inner, 2, n)."""
    length, width, n = x.shape[1], x.shape[2], decay.shape[2]
    real = carray(stack(x, _ROOM), (TOGETHER, STATES))
    imag = carray(stack(x, _ROOM), (TOGETHER, STATES))
    weights = carray(stack(x, _WEIGHTS), (6, TOGETHER, STATES))
    zero = x.dtype.type(0)
    for unit in range(first, last):
        b = unit // groups
        for group in range(groups):
            if group != unit % groups:
                continue
            channel = group * TOGETHER
            some = min(TOGETHER, width - channel)
            for n0 in range(0, n, STATES):
                part = min(STATES, n - n0)
                for c in range(some):
                    for j in range(part):
                        real[c, j] = start[b, channel + c, 0, n0 + j] if start.size > 0 else zero
                        imag[c, j] = start[b, channel + c, 1, n0 + j] if start.size > 0 else zero
                    for k in range(2):
                        for j in range(part):
                            weights[k, c, j] = decay[channel + c, k, n0 + j]
                            weights[2 + k, c, j] = gain[channel + c, k, n0 + j]
                            weights[4 + k, c, j] = read[channel + c, k, n0 + j]
                for t in range(length):
                    for c in range(some):
                        value = x[b, t, channel + c]
                        total = zero
                        for j in range(part):
                            kept, turned = times(
                                weights[0, c, j], weights[1, c, j], real[c, j], imag[c, j], guarded, zero
                            )
                            real[c, j] = weights[2, c, j] * value + kept
                            imag[c, j] = weights[3, c, j] * value + turned
                            total += weights[4, c, j] * real[c, j] + weights[5, c, j] * imag[c, j]
                        for j in range(part):
                            states[b, t, channel + c, 0, n0 + j] = real[c, j]
                        for j in range(part):
                            states[b, t, channel + c, 1, n0 + j] = imag[c, j]
                        y[b, t, channel + c] = total + (y[b, t, channel + c] if n0 > 0 else zero)
