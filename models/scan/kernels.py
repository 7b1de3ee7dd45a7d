"""Compiled loops of the selective scan and of the materialised scan, forward and backward (numba).

**Layout.** A *lane block* is LANES neighbouring channels, and the innermost loop runs over its lanes: vector
instructions for any d_state, one compilation for all of them, and a read-out whose sum over d_state is vertical.
A block's states stay in the first-level cache as (d_state, LANES) while time runs outside, so nothing 4-D
exists. Channels beyond d_inner in the last block are padding.

**Units.** A unit is one sequence and one group of neighbouring blocks; a function takes the range of units that
it is to do. How many groups there are depends on shapes alone, each unit writes memory of its own, and what has
to be summed over units is summed afterwards in a fixed order: the same bits for any number of threads.

**Guarded** rows let a zero win against inf, as `reference.py` does. The plain rows are exact while nothing
overflows and make a NaN of each such meeting, which stays in the last state (forward) and reaches a gradient
(backward): the caller sees it there and runs the guarded ones. Optional arrays are absent when their size is 0.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from models.scan.exponential import compiled, exp, stack

LANES = 32
CHUNK = 16  # steps from one saved state to the next; the backward recomputes one chunk's states at a time


@compiled()
def forward(first, last, groups, x, delta_decay, delta_write, A, B, C, h0, y, h_last, saved, states, guarded):  # type: ignore[no-untyped-def]  # noqa: E501
    """y, h_last and, where given room, the states at chunk starts and all states, for units first … last − 1.

    A is (d_state, padded d_inner), saved (batch, chunks − 1, d_state, padded d_inner); the rest as in `reference`.
    """
    length, d_inner = x.shape[1], x.shape[2]
    d_state = A.shape[0]
    blocks = A.shape[1] // LANES
    h = np.empty((d_state, LANES), x.dtype)
    delta = carray(stack(x, LANES), (LANES,))
    dwx = carray(stack(x, LANES), (LANES,))
    out = carray(stack(x, LANES), (LANES,))
    row = carray(stack(x, LANES), (LANES,))
    zero = x.dtype.type(0)
    for unit in range(first, last):
        b = unit // groups
        group = unit % groups
        for block in range(blocks):  # from 0, so that the compiler knows that no index below is negative
            if block * groups // blocks != group:
                continue
            start = block * LANES
            width = min(LANES, d_inner - start)
            for j in range(LANES):
                delta[j] = zero
                dwx[j] = zero
            for n in range(d_state):
                for j in range(LANES):
                    h[n, j] = zero
            if h0.size > 0:
                for j in range(width):
                    for n in range(d_state):
                        h[n, j] = h0[b, start + j, n]
            for t in range(length):
                if saved.size > 0 and t > 0 and t % CHUNK == 0:
                    for n in range(d_state):
                        for j in range(LANES):
                            saved[b, t // CHUNK - 1, n, start + j] = h[n, j]
                for j in range(width):
                    delta[j] = delta_decay[b, t, start + j]
                    dwx[j] = delta_write[b, t, start + j] * x[b, t, start + j]
                for j in range(LANES):
                    out[j] = zero
                for n in range(d_state):
                    write = B[b, t, n]
                    read = zero
                    if C.size > 0:
                        read = C[b, t, n]
                    if guarded:
                        for j in range(LANES):
                            decay = exp(delta[j] * A[n, start + j])
                            carried = decay * h[n, j]
                            if decay == zero or (h[n, j] == zero and decay == decay):
                                carried = zero
                            row[j] = carried + dwx[j] * write
                            out[j] += row[j] * read
                    else:
                        for j in range(LANES):
                            row[j] = exp(delta[j] * A[n, start + j]) * h[n, j] + dwx[j] * write
                            out[j] += row[j] * read
                    for j in range(LANES):
                        h[n, j] = row[j]
                if y.size > 0:
                    for j in range(width):
                        y[b, t, start + j] = out[j]
                if states.size > 0:
                    for j in range(width):
                        for n in range(d_state):
                            states[b, t, start + j, n] = h[n, j]
            for j in range(width):
                for n in range(d_state):
                    h_last[b, start + j, n] = h[n, j]


@compiled()
def wins(a, b, zero):  # type: ignore[no-untyped-def]
    """a · b, and exactly 0 wherever either is 0."""
    return zero if (a == zero or b == zero) else a * b


@compiled()
def backward(first, last, groups, x, delta_decay, delta_write, A, B, C, h0, saved, g_y, g_last, g_states, g_x, g_delta_decay, g_delta_write, g_A, g_B, g_C, g_h0, guarded):  # type: ignore[no-untyped-def]  # noqa: E501
    """Gradients of every operand from those of y, of the last state and of all states, for a range of units.

    With λ_t the gradient of h_t, everything that comes later included: λ_t = C_t g_y + decay_{t+1} λ_{t+1}. The
    states of a chunk are computed again from the saved one before it; dividing a decay out of the next state to
    go backwards would be unstable, and impossible at decay 0. g_A is (batch, d_state, padded d_inner), g_B and
    g_C (groups, batch, pos, d_state), both zero on entry and summed by the caller; g_h0 is always there.
    """
    length, d_inner = x.shape[1], x.shape[2]
    d_state = A.shape[0]
    blocks = A.shape[1] // LANES
    chunks = (length + CHUNK - 1) // CHUNK
    h = np.empty((CHUNK + 1, d_state, LANES), x.dtype)
    decays = np.empty((CHUNK, d_state, LANES), x.dtype)
    adjoint = np.empty((d_state, LANES), x.dtype)
    sum_A = np.empty((d_state, LANES), x.dtype)
    delta = carray(stack(x, LANES), (LANES,))
    dwx = carray(stack(x, LANES), (LANES,))
    grad = carray(stack(x, LANES), (LANES,))
    sum_delta = carray(stack(x, LANES), (LANES,))
    sum_dwx = carray(stack(x, LANES), (LANES,))
    row = carray(stack(x, LANES), (LANES,))
    kept = carray(stack(x, LANES), (LANES,))
    zero = x.dtype.type(0)
    for unit in range(first, last):
        b = unit // groups
        group = unit % groups
        for block in range(blocks):  # from 0, so that the compiler knows that no index below is negative
            if block * groups // blocks != group:
                continue
            start = block * LANES
            width = min(LANES, d_inner - start)
            for j in range(LANES):
                delta[j] = zero
                dwx[j] = zero
                grad[j] = zero
            for n in range(d_state):
                for j in range(LANES):
                    adjoint[n, j] = zero
                    sum_A[n, j] = zero
            if g_last.size > 0:
                for j in range(width):
                    for n in range(d_state):
                        adjoint[n, j] = g_last[b, start + j, n]
            for chunk in range(chunks - 1, -1, -1):
                begin = chunk * CHUNK
                end = min(begin + CHUNK, length)
                for n in range(d_state):
                    for j in range(LANES):
                        h[0, n, j] = saved[b, chunk - 1, n, start + j] if chunk > 0 else zero
                if chunk == 0 and h0.size > 0:
                    for j in range(width):
                        for n in range(d_state):
                            h[0, n, j] = h0[b, start + j, n]
                for t in range(begin, end):
                    s = t - begin
                    for j in range(width):
                        delta[j] = delta_decay[b, t, start + j]
                        dwx[j] = delta_write[b, t, start + j] * x[b, t, start + j]
                    for n in range(d_state):
                        write = B[b, t, n]
                        if guarded:
                            for j in range(LANES):
                                decay = exp(delta[j] * A[n, start + j])
                                carried = decay * h[s, n, j]
                                if decay == zero or (h[s, n, j] == zero and decay == decay):
                                    carried = zero
                                kept[j] = decay
                                row[j] = carried + dwx[j] * write
                        else:
                            for j in range(LANES):
                                kept[j] = exp(delta[j] * A[n, start + j])
                                row[j] = kept[j] * h[s, n, j] + dwx[j] * write
                        for j in range(LANES):
                            decays[s, n, j] = kept[j]
                        for j in range(LANES):
                            h[s + 1, n, j] = row[j]
                for t in range(end - 1, begin - 1, -1):
                    s = t - begin
                    for j in range(width):
                        delta[j] = delta_decay[b, t, start + j]
                        dwx[j] = delta_write[b, t, start + j] * x[b, t, start + j]
                    if g_y.size > 0:
                        for j in range(width):
                            grad[j] = g_y[b, t, start + j]
                    for j in range(LANES):
                        sum_delta[j] = zero
                        sum_dwx[j] = zero
                    if g_states.size > 0:
                        for j in range(width):
                            for n in range(d_state):
                                adjoint[n, j] += g_states[b, t, start + j, n]
                    for n in range(d_state):
                        write = B[b, t, n]
                        read = zero
                        if C.size > 0:
                            read = C[b, t, n]
                        sum_B = zero
                        sum_C = zero
                        if guarded:
                            for j in range(LANES):
                                lam = adjoint[n, j] + wins(grad[j], read, zero)
                                decay = decays[s, n, j]
                                exponent = wins(wins(lam, h[s, n, j], zero), decay, zero)
                                sum_C += wins(grad[j], h[s + 1, n, j], zero)
                                sum_B += wins(lam, dwx[j], zero)
                                sum_dwx[j] += wins(lam, write, zero)
                                sum_delta[j] += exponent * A[n, start + j]
                                row[j] = wins(decay, lam, zero)
                                kept[j] = sum_A[n, j] + exponent * delta[j]
                        else:
                            for j in range(LANES):
                                lam = adjoint[n, j] + grad[j] * read
                                carried = decays[s, n, j] * lam
                                exponent = carried * h[s, n, j]
                                sum_C += grad[j] * h[s + 1, n, j]
                                sum_B += lam * dwx[j]
                                sum_dwx[j] += lam * write
                                sum_delta[j] += exponent * A[n, start + j]
                                row[j] = carried
                                kept[j] = sum_A[n, j] + exponent * delta[j]
                        for j in range(LANES):
                            adjoint[n, j] = row[j]
                        for j in range(LANES):
                            sum_A[n, j] = kept[j]
                        g_B[group, b, t, n] += sum_B
                        if C.size > 0:
                            g_C[group, b, t, n] += sum_C
                    for j in range(width):
                        g_delta_decay[b, t, start + j] = sum_delta[j]
                        if guarded:
                            g_delta_write[b, t, start + j] = wins(sum_dwx[j], x[b, t, start + j], zero)
                            g_x[b, t, start + j] = wins(sum_dwx[j], delta_write[b, t, start + j], zero)
                        else:
                            g_delta_write[b, t, start + j] = sum_dwx[j] * x[b, t, start + j]
                            g_x[b, t, start + j] = sum_dwx[j] * delta_write[b, t, start + j]
            for n in range(d_state):
                for j in range(LANES):
                    g_A[b, n, start + j] = sum_A[n, j]
            for j in range(width):
                for n in range(d_state):
                    g_h0[b, start + j, n] = adjoint[n, j]


@compiled()
def scan_forward(first, last, groups, decay, write, h0, states):  # type: ignore[no-untyped-def]
    """All states of the materialised recurrence; every array is (batch, pos, lanes), h0 (batch, lanes) or empty.

    Bound by memory, so the rule that a zero wins is always on.
    """
    length, lanes = decay.shape[1], decay.shape[2]
    zero = decay.dtype.type(0)
    for unit in range(first, last):
        b = unit // groups
        group = unit % groups
        begin = group * lanes // groups
        end = (group + 1) * lanes // groups
        past = np.zeros(end - begin, decay.dtype)
        if h0.size > 0:
            past[:] = h0[b, begin:end]
        for t in range(length):
            for j in range(end - begin):
                a = decay[b, t, begin + j]
                carried = a * past[j]
                if a == zero or (past[j] == zero and a == a):
                    carried = zero
                past[j] = carried + write[b, t, begin + j]
                states[b, t, begin + j] = past[j]


@compiled()
def scan_backward(first, last, groups, decay, h0, states, g_states, g_decay, g_write, g_h0):  # type: ignore[no-untyped-def]  # noqa: E501
    """g_write_t = λ_t, g_decay_t = λ_t h_{t−1} with λ_t = g_states_t + decay_{t+1} λ_{t+1}; g_h0 is always there."""
    length, lanes = decay.shape[1], decay.shape[2]
    zero = decay.dtype.type(0)
    for unit in range(first, last):
        b = unit // groups
        group = unit % groups
        begin = group * lanes // groups
        end = (group + 1) * lanes // groups
        carried = np.zeros(end - begin, decay.dtype)
        start = np.zeros(end - begin, decay.dtype)
        if h0.size > 0:
            start[:] = h0[b, begin:end]
        for t in range(length - 1, -1, -1):
            for j in range(end - begin):
                lam = carried[j] + g_states[b, t, begin + j]
                past = states[b, t - 1, begin + j] if t > 0 else start[j]
                a = decay[b, t, begin + j]
                g_write[b, t, begin + j] = lam
                g_decay[b, t, begin + j] = wins(lam, past, zero)
                if a == zero and not np.isfinite(past):
                    g_decay[b, t, begin + j] = zero
                carried[j] = wins(a, lam, zero)
        g_h0[b, begin:end] = carried
