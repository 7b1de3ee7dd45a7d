"""Compiled loops of the selective scan and of the materialised scan, forward and backward (numba).

**Layout.** A *tile* is LANES neighbouring channels by up to STATES of their states. The innermost loop runs over
lanes: vector instructions for any d_state, one compilation for all of them, and a read-out whose sum over d_state
is vertical. What a tile keeps lives on the stack, in the first caches, while time runs outside, so nothing 4-D
exists. Channels beyond d_inner in the last tile are padding.

**Units.** A unit is one sequence and one group of neighbouring tiles; a function takes the range of units that
it is to do. How many groups there are depends on shapes alone, each unit writes memory of its own, and what has
to be summed over units is summed afterwards in a fixed order: the same bits for any number of threads.

**Guarded** rows let a zero win against inf, as `reference.py` does. The plain rows are exact while nothing
overflows and make a NaN of each such meeting, which stays in the last state (forward) and reaches a gradient
(backward): the caller sees it there and runs the guarded ones. Optional arrays are absent when their size is 0.

Two habits that look odd are for the compiler. Blocks are counted from 0 and those of other units skipped, because
of an index that might be negative it makes a gather. And what is written in a loop over lanes is on the stack,
where it is known to overlap with nothing; otherwise a scalar loop, whose sums round differently, may run.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from hooks.machine.native import compiled, inlined, stack
from models.scan.exponential import exp
from models.scan.streaming import fence, stream

LANES = 32
STATES = 16
WIDTH = 256  # lanes of one unit of the materialised scan
CHUNK = 16  # steps from one saved state to the next; the backward recomputes one chunk's states at a time
_TILE = STATES * LANES
_CHUNK_TILE = CHUNK * _TILE


@compiled
def forward(first, last, groups, x, delta_decay, delta_write, A, B, C, h0, y, h_last, saved, states, streamed, guarded):  # type: ignore[no-untyped-def]
    """y, h_last and, where given room, the states at chunk starts and all states, for units first … last − 1.

    A is (d_state, padded d_inner), saved (batch, chunks − 1, d_state, padded d_inner); the rest as in `reference`.
    ``streamed`` (of all states, where d_state ≤ STATES): they go past the caches; see `streaming.py`.
    """
    length, d_inner = x.shape[1], x.shape[2]
    d_state = A.shape[0]
    blocks = A.shape[1] // LANES
    h = carray(stack(x, _TILE), (STATES, LANES))
    delta = carray(stack(x, LANES), (LANES,))
    dwx = carray(stack(x, LANES), (LANES,))
    out = carray(stack(x, LANES), (LANES,))
    room = stack(x, _TILE)
    turned = carray(room, (_TILE,))
    zero = x.dtype.type(0)
    for unit in range(first, last):
        b = unit // groups
        for block in range(blocks):
            if block * groups // blocks != unit % groups:
                continue
            start = block * LANES
            width = min(LANES, d_inner - start)
            for j in range(LANES):
                delta[j] = zero
                dwx[j] = zero
            for n0 in range(0, d_state, STATES):
                rows = min(STATES, d_state - n0)
                for n in range(rows):
                    for j in range(LANES):
                        h[n, j] = zero
                if h0.size > 0:
                    for j in range(width):
                        for n in range(rows):
                            h[n, j] = h0[b, start + j, n0 + n]
                for t in range(length):
                    if saved.size > 0 and t > 0 and t % CHUNK == 0:
                        for n in range(rows):
                            for j in range(LANES):
                                saved[b, t // CHUNK - 1, n0 + n, start + j] = h[n, j]
                    for j in range(width):
                        delta[j] = delta_decay[b, t, start + j]
                        dwx[j] = delta_write[b, t, start + j] * x[b, t, start + j]
                    for j in range(LANES):
                        out[j] = zero
                    for n in range(rows):
                        write = B[b, t, n0 + n]
                        read = C[b, t, n0 + n] if C.size > 0 else zero
                        if guarded:
                            for j in range(LANES):
                                decay = exp(delta[j] * A[n0 + n, start + j])
                                carried = decay * h[n, j]
                                if decay == zero or (h[n, j] == zero and decay == decay):
                                    carried = zero
                                h[n, j] = carried + dwx[j] * write
                                out[j] += h[n, j] * read
                        else:
                            for j in range(LANES):
                                decay = exp(delta[j] * A[n0 + n, start + j])
                                h[n, j] = decay * h[n, j] + dwx[j] * write
                                out[j] += h[n, j] * read
                    if y.size > 0:
                        for j in range(width):
                            y[b, t, start + j] = out[j] + (y[b, t, start + j] if n0 > 0 else zero)
                    if states.size > 0 and streamed:
                        for j in range(width):
                            for n in range(rows):
                                turned[j * rows + n] = h[n, j]
                        stream(states, ((b * length + t) * d_inner + start) * d_state, room, width * d_state)
                    elif states.size > 0:
                        for j in range(width):
                            for n in range(rows):
                                states[b, t, start + j, n0 + n] = h[n, j]
                for j in range(width):
                    for n in range(rows):
                        h_last[b, start + j, n0 + n] = h[n, j]
    if streamed:
        fence()


@inlined
def wins(a, b, zero):  # type: ignore[no-untyped-def]
    """a · b, and exactly 0 wherever either is 0."""
    return zero if (a == zero or b == zero) else a * b


@compiled
def backward(  # type: ignore[no-untyped-def]
    first,
    last,
    groups,
    x,
    delta_decay,
    delta_write,
    A,
    B,
    C,
    h0,
    saved,
    g_y,
    g_last,
    g_states,
    g_x,
    g_delta_decay,
    g_delta_write,
    g_A,
    g_B,
    g_C,
    g_h0,
    guarded,
):
    """Gradients of every operand from those of y, of the last state and of all states, for a range of units.

    With λ_t the gradient of h_t, everything that comes later included: λ_t = C_t g_y + decay_{t+1} λ_{t+1}. The
    states of a chunk are computed again from the saved one before it; dividing a decay out of the next state to
    go backwards would be unstable, and impossible at decay 0. g_A is (batch, d_state, padded d_inner), g_B and
    g_C (groups, batch, pos, d_state), the latter two zero on entry; the caller sums them over their first axis.
    """
    length, d_inner = x.shape[1], x.shape[2]
    d_state = A.shape[0]
    blocks = A.shape[1] // LANES
    chunks = (length + CHUNK - 1) // CHUNK
    h = carray(stack(x, _TILE), (STATES, LANES))
    befores = carray(stack(x, _CHUNK_TILE), (CHUNK * STATES, LANES))
    decays = carray(stack(x, _CHUNK_TILE), (CHUNK * STATES, LANES))
    adjoint = carray(stack(x, _TILE), (STATES, LANES))
    sum_A = carray(stack(x, _TILE), (STATES, LANES))
    delta = carray(stack(x, LANES), (LANES,))
    dwx = carray(stack(x, LANES), (LANES,))
    grad = carray(stack(x, LANES), (LANES,))
    sum_delta = carray(stack(x, LANES), (LANES,))
    sum_dwx = carray(stack(x, LANES), (LANES,))
    zero = x.dtype.type(0)
    for unit in range(first, last):
        b = unit // groups
        group = unit % groups
        for block in range(blocks):
            if block * groups // blocks != group:
                continue
            start = block * LANES
            width = min(LANES, d_inner - start)
            for j in range(LANES):
                delta[j] = zero
                dwx[j] = zero
                grad[j] = zero
            for n0 in range(0, d_state, STATES):
                rows = min(STATES, d_state - n0)
                for n in range(rows):
                    for j in range(LANES):
                        adjoint[n, j] = zero
                        sum_A[n, j] = zero
                if g_last.size > 0:
                    for j in range(width):
                        for n in range(rows):
                            adjoint[n, j] = g_last[b, start + j, n0 + n]
                for chunk in range(chunks - 1, -1, -1):
                    steps = min(CHUNK, length - chunk * CHUNK)
                    for n in range(rows):
                        for j in range(LANES):
                            h[n, j] = saved[b, chunk - 1, n0 + n, start + j] if chunk > 0 else zero
                    if chunk == 0 and h0.size > 0:
                        for j in range(width):
                            for n in range(rows):
                                h[n, j] = h0[b, start + j, n0 + n]
                    for s in range(steps):
                        t = chunk * CHUNK + s
                        for j in range(width):
                            delta[j] = delta_decay[b, t, start + j]
                            dwx[j] = delta_write[b, t, start + j] * x[b, t, start + j]
                        for n in range(rows):
                            row = s * STATES + n
                            write = B[b, t, n0 + n]
                            for j in range(LANES):
                                befores[row, j] = h[n, j]
                            if guarded:
                                for j in range(LANES):
                                    decay = exp(delta[j] * A[n0 + n, start + j])
                                    carried = decay * h[n, j]
                                    if decay == zero or (h[n, j] == zero and decay == decay):
                                        carried = zero
                                    decays[row, j] = decay
                                    h[n, j] = carried + dwx[j] * write
                            else:
                                for j in range(LANES):
                                    decay = exp(delta[j] * A[n0 + n, start + j])
                                    decays[row, j] = decay
                                    h[n, j] = decay * h[n, j] + dwx[j] * write
                    for s in range(steps - 1, -1, -1):
                        t = chunk * CHUNK + s
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
                                for n in range(rows):
                                    adjoint[n, j] += g_states[b, t, start + j, n0 + n]
                        for n in range(rows):
                            row = s * STATES + n
                            write = B[b, t, n0 + n]
                            read = C[b, t, n0 + n] if C.size > 0 else zero
                            sum_B = zero
                            sum_C = zero
                            if guarded:
                                for j in range(LANES):
                                    lam = adjoint[n, j] + wins(grad[j], read, zero)
                                    decay = decays[row, j]
                                    before = befores[row, j]
                                    carried = decay * before
                                    if decay == zero or (before == zero and decay == decay):
                                        carried = zero
                                    sum_C += wins(grad[j], carried + dwx[j] * write, zero)
                                    sum_B += wins(lam, dwx[j], zero)
                                    sum_dwx[j] += wins(lam, write, zero)
                                    exponent = wins(wins(lam, before, zero), decay, zero)
                                    sum_delta[j] += wins(exponent, A[n0 + n, start + j], zero)
                                    sum_A[n, j] += wins(exponent, delta[j], zero)
                                    adjoint[n, j] = wins(decay, lam, zero)
                            else:
                                for j in range(LANES):
                                    lam = adjoint[n, j] + grad[j] * read
                                    carried = decays[row, j] * befores[row, j]
                                    sum_C += grad[j] * (carried + dwx[j] * write)
                                    sum_B += lam * dwx[j]
                                    sum_dwx[j] += lam * write
                                    exponent = carried * lam
                                    sum_delta[j] += exponent * A[n0 + n, start + j]
                                    sum_A[n, j] += exponent * delta[j]
                                    adjoint[n, j] = decays[row, j] * lam
                            g_B[group, b, t, n0 + n] += sum_B
                            if C.size > 0:
                                g_C[group, b, t, n0 + n] += sum_C
                        for j in range(width):
                            value, step = x[b, t, start + j], delta_write[b, t, start + j]
                            to_step = sum_dwx[j] * value
                            to_value = sum_dwx[j] * step
                            if guarded:
                                to_step = wins(sum_dwx[j], value, zero)
                                to_value = wins(sum_dwx[j], step, zero)
                            if n0 > 0:
                                sum_delta[j] += g_delta_decay[b, t, start + j]
                                to_step += g_delta_write[b, t, start + j]
                                to_value += g_x[b, t, start + j]
                            g_delta_decay[b, t, start + j] = sum_delta[j]
                            g_delta_write[b, t, start + j] = to_step
                            g_x[b, t, start + j] = to_value
                for n in range(rows):
                    for j in range(LANES):
                        g_A[b, n0 + n, start + j] = sum_A[n, j]
                for j in range(width):
                    for n in range(rows):
                        g_h0[b, start + j, n0 + n] = adjoint[n, j]


@compiled
def scan_forward(first, last, groups, decay, write, h0, states):  # type: ignore[no-untyped-def]
    """All states of the materialised recurrence; every array is (batch, pos, lanes), h0 (batch, lanes) or empty.

    One group for every WIDTH lanes. Bound by memory, so the rule that a zero wins is always on.
    """
    length, lanes = decay.shape[1], decay.shape[2]
    past = carray(stack(decay, WIDTH), (WIDTH,))
    zero = decay.dtype.type(0)
    for unit in range(first, last):
        b = unit // groups
        for group in range(groups):
            if group != unit % groups:
                continue
            start = group * WIDTH
            width = min(WIDTH, lanes - start)
            for j in range(width):
                past[j] = h0[b, start + j] if h0.size > 0 else zero
            for t in range(length):
                for j in range(width):
                    a = decay[b, t, start + j]
                    carried = a * past[j]
                    if a == zero or (past[j] == zero and a == a):
                        carried = zero
                    past[j] = carried + write[b, t, start + j]
                for j in range(width):
                    states[b, t, start + j] = past[j]


@compiled
def scan_backward(first, last, groups, decay, h0, states, g_states, g_decay, g_write, g_h0):  # type: ignore[no-untyped-def]
    """g_write_t = λ_t, g_decay_t = λ_t h_{t−1} with λ_t = g_states_t + decay_{t+1} λ_{t+1}; g_h0 is always there."""
    length, lanes = decay.shape[1], decay.shape[2]
    adjoint = carray(stack(decay, WIDTH), (WIDTH,))
    past = carray(stack(decay, WIDTH), (WIDTH,))
    out = carray(stack(decay, WIDTH), (WIDTH,))
    zero = decay.dtype.type(0)
    for unit in range(first, last):
        b = unit // groups
        for group in range(groups):
            if group != unit % groups:
                continue
            start = group * WIDTH
            width = min(WIDTH, lanes - start)
            for j in range(width):
                adjoint[j] = zero
            for t in range(length - 1, -1, -1):
                if t > 0:
                    for j in range(width):
                        past[j] = states[b, t - 1, start + j]
                else:
                    for j in range(width):
                        past[j] = h0[b, start + j] if h0.size > 0 else zero
                for j in range(width):
                    adjoint[j] += g_states[b, t, start + j]
                for j in range(width):
                    g_write[b, t, start + j] = adjoint[j]
                for j in range(width):
                    a = decay[b, t, start + j]
                    lam = adjoint[j]
                    # at a cut the derivative λ h_{t−1} of an infinite past counts as 0 (see `reference._Carry`)
                    lost = a == zero and not np.isfinite(past[j])
                    out[j] = zero if lost else wins(lam, past[j], zero)
                    adjoint[j] = wins(a, lam, zero)
                for j in range(width):
                    g_decay[b, t, start + j] = out[j]
            for j in range(width):
                g_h0[b, start + j] = adjoint[j]
