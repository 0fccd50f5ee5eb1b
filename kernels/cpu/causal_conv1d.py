"""The causal depthwise convolution along scan paths with its bias and SiLU, fused, for CPUs: forward and backward.

One task walks all directions of one batch element for a block of 16 channels. The window of the last W taps slides
along the path in registers. Backward slides a second window, of the gradients of those taps: a tap's gradient is
complete when it leaves the window, so backward is one walk in the forward order, too.
"""

from __future__ import annotations

from collections import namedtuple

import numpy as np
from numba import carray, njit

from .vector import (
    LANES,
    extract,
    fetch_add,
    insert,
    load_float,
    load_int32,
    load_int64,
    load_lanes,
    multiply_add,
    sigmoid,
    splat,
    store_float,
    store_lanes,
)

_STRIDED = ("x", "out", "dout", "dx")
CALL = np.dtype(
    [
        (name, np.int64)
        for name in (
            # address of the counter that the threads share: the next task
            "counters", "tasks",
            "batch", "tokens", "directions", "channels", "width", "silu", "covered",
            # (K, P) int32 tokens, (K,) int64 number of steps, (B, L) int32 sequence of each token or 0
            "token_table", "step_counts", "steps", "sequence",
            # tensors that may be views: address, then the strides of batch, token and direction
            *(f"{name}{part}" for name in _STRIDED for part in ("", "_batch", "_token", "_direction")),
            # contiguous (K, D, W), (K, D), (B, K, D, W - 1) and (B, K, D, W - 1)
            "weight", "bias", "initial", "final",
            # gradients: partial sums over a batch element (B, K, D, W) and (B, K, D), then (B, K, D, W - 1) twice
            "dweight", "dbias", "dfinal", "dinitial",
        )
    ]
)  # fmt: skip

# Taps are named by how many steps they lie back; filters shorter than four have zero weights for the oldest taps.
Taps = namedtuple("Taps", "now back_1 back_2 back_3")


@njit
def _column(base, index, stride, lanes):
    """Lane i holds the float at ``base[i * stride + index]``; 0 beyond ``lanes`` and where ``index`` is negative."""
    column = splat(0.0)
    if base != 0 and index >= 0:
        for lane in range(lanes):
            column = insert(column, lane, load_float(base + 4 * (lane * stride + index)))
    return column


@njit
def _write_column(base, index, stride, lanes, column):
    """The inverse of :func:`_column`."""
    if base != 0 and index >= 0:
        for lane in range(lanes):
            store_float(base + 4 * (lane * stride + index), extract(column, lane))


@njit
def _weights(call, k, first, lanes):
    base, width = call.weight + 4 * (k * call.channels + first) * call.width, call.width
    return Taps(
        _column(base, width - 1, width, lanes),
        _column(base, width - 2, width, lanes),
        _column(base, width - 3, width, lanes),
        _column(base, width - 4, width, lanes),
    )


@njit
def _state_columns(call, states, b, k, first, lanes):
    """The values one, two and three steps before the first; ``states`` is (B, K, D, W - 1), oldest first."""
    past = call.width - 1
    if states != 0:
        states += 4 * ((b * call.directions + k) * call.channels + first) * past
    zero = splat(0.0)
    return Taps(
        zero,
        _column(states, past - 1, past, lanes),
        _column(states, past - 2, past, lanes),
        _column(states, past - 3, past, lanes),
    )


@njit
def _write_state_columns(call, states, b, k, first, lanes, taps):
    past = call.width - 1
    states += 4 * ((b * call.directions + k) * call.channels + first) * past
    _write_column(states, past - 1, past, lanes, taps.back_1)
    _write_column(states, past - 2, past, lanes, taps.back_2)
    _write_column(states, past - 3, past, lanes, taps.back_3)


@njit
def _sequence_of(call, b, token):
    return load_int32(call.sequence + 4 * (b * call.tokens + token))


@njit
def _within(call, b, tokens, t, taps):
    """The taps (or their weights), 0 where they lie in another sequence than step ``t``."""
    if call.sequence == 0:
        return taps
    here = _sequence_of(call, b, load_int32(tokens + 4 * t))
    one, two, three = taps.back_1, taps.back_2, taps.back_3
    # Values before the first step belong to the first step's sequence.
    if _sequence_of(call, b, load_int32(tokens + 4 * max(t - 1, 0))) != here:
        one = splat(0.0)
    if _sequence_of(call, b, load_int32(tokens + 4 * max(t - 2, 0))) != here:
        two = splat(0.0)
    if _sequence_of(call, b, load_int32(tokens + 4 * max(t - 3, 0))) != here:
        three = splat(0.0)
    return Taps(taps.now, one, two, three)


@njit
def _filter(bias, weights, taps):
    total = multiply_add(weights.now, taps.now, bias)
    total = multiply_add(weights.back_1, taps.back_1, total)
    total = multiply_add(weights.back_2, taps.back_2, total)
    return multiply_add(weights.back_3, taps.back_3, total)


@njit
def _slide(taps):
    return Taps(splat(0.0), taps.now, taps.back_1, taps.back_2)


@njit
def _bias(call, k, first, lanes):
    if call.bias == 0:
        return splat(0.0)
    return load_lanes(call.bias + 4 * (k * call.channels + first), lanes)


@njit
def _zero_rows(address, token_bytes, tokens, lanes):
    for token in range(tokens):
        store_lanes(address + token * token_bytes, splat(0.0), lanes)


@njit
def _forward_direction(call, b, k, first, lanes):
    x = call.x + b * call.x_batch + k * call.x_direction + 4 * first
    out = call.out + b * call.out_batch + k * call.out_direction + 4 * first
    if call.covered == 0:
        _zero_rows(out, call.out_token, call.tokens, lanes)
    tokens = call.token_table + 4 * k * call.steps
    bias, weights = _bias(call, k, first, lanes), _weights(call, k, first, lanes)
    taps = _state_columns(call, call.initial, b, k, first, lanes)
    for t in range(load_int64(call.step_counts + 8 * k)):
        token = load_int32(tokens + 4 * t)
        taps = Taps(load_lanes(x + token * call.x_token, lanes), taps.back_1, taps.back_2, taps.back_3)
        total = _filter(bias, weights, _within(call, b, tokens, t, taps))
        if call.silu != 0:
            total = total * sigmoid(total)
        store_lanes(out + token * call.out_token, total, lanes)
        taps = _slide(taps)
    _write_state_columns(call, call.final, b, k, first, lanes, taps)


def forward(pointer):
    """Take tasks (batch element, block of 16 channels) until none is left; any number of threads may run it."""
    call = carray(pointer, 1, CALL)[0]
    blocks = (call.channels + LANES - 1) // LANES
    task = fetch_add(call.counters)
    while task < call.tasks:
        first = task % blocks * LANES
        for k in range(call.directions):
            _forward_direction(call, task // blocks, k, first, min(LANES, call.channels - first))
        task = fetch_add(call.counters)


@njit
def _leave(call, b, k, first, lanes, tokens, t, gradient, accumulate):
    """Write the complete gradient of the input of step ``t``, or of an initial state where ``t`` is negative."""
    if t >= 0:
        address = call.dx + b * call.dx_batch + k * call.dx_direction + 4 * first
        address += load_int32(tokens + 4 * t) * call.dx_token
        if accumulate:
            gradient = gradient + load_lanes(address, lanes)
        store_lanes(address, gradient, lanes)
    elif call.dinitial != 0:
        past = call.width - 1
        states = call.dinitial + 4 * ((b * call.directions + k) * call.channels + first) * past
        _write_column(states, past + t, past, lanes, gradient)


@njit
def _dtotal(call, total, gradient):
    """The gradient of the filter's sum from that of the output."""
    if call.silu == 0:
        return gradient
    gate = sigmoid(total)
    return gradient * gate * (splat(1.0) + total * (splat(1.0) - gate))


@njit
def _accumulate(sums, factors, scale):
    return Taps(
        multiply_add(factors.now, scale, sums.now),
        multiply_add(factors.back_1, scale, sums.back_1),
        multiply_add(factors.back_2, scale, sums.back_2),
        multiply_add(factors.back_3, scale, sums.back_3),
    )


@njit
def _write_weight_gradients(call, b, k, first, lanes, dweight, dbias):
    place, width = (b * call.directions + k) * call.channels + first, call.width
    base = call.dweight + 4 * place * width
    _write_column(base, width - 1, width, lanes, dweight.now)
    _write_column(base, width - 2, width, lanes, dweight.back_1)
    _write_column(base, width - 3, width, lanes, dweight.back_2)
    _write_column(base, width - 4, width, lanes, dweight.back_3)
    if call.dbias != 0:
        store_lanes(call.dbias + 4 * place, dbias, lanes)


@njit
def _backward_direction(call, b, k, first, lanes):
    x = call.x + b * call.x_batch + k * call.x_direction + 4 * first
    dout = call.dout + b * call.dout_batch + k * call.dout_direction + 4 * first
    own_x = k == 0 or call.dx_direction != 0
    if own_x and call.covered == 0:
        dx = call.dx + b * call.dx_batch + k * call.dx_direction + 4 * first
        _zero_rows(dx, call.dx_token, call.tokens, lanes)
    accumulate = call.covered == 0 or not own_x
    tokens = call.token_table + 4 * k * call.steps
    steps = load_int64(call.step_counts + 8 * k)
    zero = splat(0.0)
    bias, weights = _bias(call, k, first, lanes), _weights(call, k, first, lanes)
    taps = _state_columns(call, call.initial, b, k, first, lanes)
    gradients, dweight, dbias = Taps(zero, zero, zero, zero), Taps(zero, zero, zero, zero), zero
    for t in range(steps):
        token = load_int32(tokens + 4 * t)
        taps = Taps(load_lanes(x + token * call.x_token, lanes), taps.back_1, taps.back_2, taps.back_3)
        visible = _within(call, b, tokens, t, taps)
        total = _filter(bias, weights, visible)
        dtotal = _dtotal(call, total, load_lanes(dout + token * call.dout_token, lanes))
        dbias = dbias + dtotal
        dweight = _accumulate(dweight, visible, dtotal)
        gradients = _accumulate(gradients, _within(call, b, tokens, t, weights), dtotal)
        _leave(call, b, k, first, lanes, tokens, t - 3, gradients.back_3, accumulate)
        taps, gradients = _slide(taps), _slide(gradients)
    final = _state_columns(call, call.dfinal, b, k, first, lanes)
    _leave(call, b, k, first, lanes, tokens, steps - 3, gradients.back_3 + final.back_3, accumulate)
    _leave(call, b, k, first, lanes, tokens, steps - 2, gradients.back_2 + final.back_2, accumulate)
    _leave(call, b, k, first, lanes, tokens, steps - 1, gradients.back_1 + final.back_1, accumulate)
    _write_weight_gradients(call, b, k, first, lanes, dweight, dbias)


def backward(pointer):
    """Take tasks (batch element, block of 16 channels) until none is left; any number of threads may run it."""
    call = carray(pointer, 1, CALL)[0]
    blocks = (call.channels + LANES - 1) // LANES
    task = fetch_add(call.counters)
    while task < call.tasks:
        first = task % blocks * LANES
        for k in range(call.directions):
            _backward_direction(call, task // blocks, k, first, min(LANES, call.channels - first))
        task = fetch_add(call.counters)
