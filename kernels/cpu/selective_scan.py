"""The selective scan along scan paths, fused, for CPUs: forward and backward.

One task walks all directions of one batch element for a block of 16 channels, the lanes of a vector. Its states stay in
a small buffer in the L1 cache; nothing of size (L, D, N) exists. Steps are taken in segments: a segment's step sizes
Delta = softplus(delta + bias) come first (independent of each other), then the recurrence (one after the other).

Backward keeps the state at the beginning of each segment, then takes the segments in reverse: it recomputes a segment's
states and walks it back with the adjoint g_t = C_t dy_t + a_{t+1} g_{t+1}. Sums over steps are taken segment by
segment, which keeps their rounding errors small. See ``kernels/cpu/README.md`` for the maths.

All state of a call is in one record of integers (sizes, flags, addresses and strides in bytes), see :data:`CALL`.
"""

from __future__ import annotations

from collections import namedtuple

import numpy as np
from numba import carray, njit

from .vector import (
    LANES,
    VECTOR_BYTES,
    broadcast,
    exp,
    fetch_add,
    load,
    load_float,
    load_int32,
    load_int64,
    load_lanes,
    multiply_add,
    sigmoid,
    softplus,
    splat,
    store,
    store_float,
    store_lanes,
    sum_lanes_of_16,
)

_STRIDED = ("u", "delta", "B", "C", "z", "y", "dy", "du", "dz")
CALL = np.dtype(
    [
        (name, np.int64)
        for name in (
            # address of two counters that the threads share: the next task and the next slot of scratch memory
            "counters", "tasks",
            "batch", "tokens", "directions", "channels", "states", "rank", "softplus", "merge", "covered",
            # (K, P) int32 tables of tokens and of rows of delta, B and C; (K,) int64 number of steps
            "token_table", "row_table", "step_counts", "steps", "segment", "segments",
            # tensors that may be views: address, then the strides of batch, token and direction; 0 where absent
            *(f"{name}{part}" for name in _STRIDED for part in ("", "_batch", "_token", "_direction")),
            # contiguous (K, D, N), (K, D), (K, D), (K, D, R), (B, K, D, N), (B, K, D, N)
            "A", "D", "bias", "dt_weight", "initial", "last",
            # gradients: partial sums over a group of channel blocks (G, B, L, K, N or R) ...
            "groups", "dB", "dC", "ddelta_low_rank",
            # ... the full delta's (B, L, K, D), and partial sums over a batch element (B, K, D, ...)
            "ddelta", "dA", "dD", "dbias", "ddt_weight", "dlast", "dinitial",
            # a thread's scratch memory and the places of the buffers in it
            "scratch", "scratch_bytes",
            "rates", "weights", "state", "step", "drive", "decay", "slope", "adjoint", "segment_gradient",
            "rate_gradient", "weight_gradient", "history", "checkpoints", "outputs", "products", "sums",
        )
    ]
)  # fmt: skip

Walk = namedtuple(
    "Walk",
    "token_table row_table steps lanes states rank softplus u u_token delta delta_token B B_token C C_token "
    "rates weights bias skip state step drive decay slope",
)
"""One direction of one batch element for one block of channels, every address resolved."""


def scratch_layout(call: np.ndarray, backward: bool) -> int:
    """Place the buffers of a thread's scratch memory.

    Args:
        call: A :data:`CALL` record whose sizes are filled in; receives the buffers' offsets in bytes.
        backward: Also place what only backward needs.

    Returns:
        The bytes that one thread needs.
    """
    states, rank, segment = int(call["states"]), int(call["rank"]), int(call["segment"])
    vectors = {"rates": states, "weights": rank, "state": states, "step": segment + 4, "drive": segment}
    if not backward:
        vectors["decay"] = segment
    else:
        directions = int(call["directions"])
        vectors |= {
            "decay": segment * states + LANES,
            "slope": segment,
            "adjoint": states,
            "segment_gradient": states,
            "rate_gradient": states,
            "weight_gradient": rank,
            "history": (segment + 1) * states + LANES,
            "checkpoints": directions * int(call["segments"]) * states,
            "outputs": int(call["tokens"]) * (1 if call["merge"] else directions) if call["z"] else 0,
            "products": LANES * rank,
            "sums": max(segment * states // LANES, rank) + 1,
        }
    offset = 0
    for name, count in vectors.items():
        call[name] = offset
        offset += VECTOR_BYTES * count
    return offset


@njit
def _transpose_in(source, count, lanes, target):
    """Write column n of a (lanes, count) matrix as vector n of ``target``."""
    for n in range(count):
        store(target + VECTOR_BYTES * n, splat(0.0))
        for lane in range(lanes):
            store_float(target + VECTOR_BYTES * n + 4 * lane, load_float(source + 4 * (lane * count + n)))


@njit
def _transpose_out(source, count, lanes, target):
    """Write vector n of ``source`` as column n of a (lanes, count) matrix."""
    for n in range(count):
        for lane in range(lanes):
            store_float(target + 4 * (lane * count + n), load_float(source + VECTOR_BYTES * n + 4 * lane))


@njit
def _fill_zero(target, count):
    for i in range(count):
        store(target + VECTOR_BYTES * i, splat(0.0))


@njit
def _optional(address, index, lanes):
    """The vector at float ``index`` of an array, or 0 if there is no array."""
    if address == 0:
        return splat(0.0)
    return load_lanes(address + 4 * index, lanes)


@njit
def _walk(call, scratch, b, k, first, lanes):
    """Resolve the addresses of direction ``k`` and bring its weights into lane order."""
    states, rank = call.states, call.rank
    channel = k * call.channels + first
    _transpose_in(call.A + 4 * channel * states, states, lanes, scratch + call.rates)
    if rank > 0:
        _transpose_in(call.dt_weight + 4 * channel * rank, rank, lanes, scratch + call.weights)
    delta = call.delta + b * call.delta_batch + k * call.delta_direction
    if rank == 0:
        delta += 4 * first
    return Walk(
        call.token_table + 4 * k * call.steps,
        call.row_table + 4 * k * call.steps,
        load_int64(call.step_counts + 8 * k),
        lanes,
        states,
        rank,
        call.softplus,
        call.u + b * call.u_batch + k * call.u_direction + 4 * first,
        call.u_token,
        delta,
        call.delta_token,
        call.B + b * call.B_batch + k * call.B_direction,
        call.B_token,
        call.C + b * call.C_batch + k * call.C_direction,
        call.C_token,
        scratch + call.rates,
        scratch + call.weights,
        _optional(call.bias, channel, lanes),
        _optional(call.D, channel, lanes),
        scratch + call.state,
        scratch + call.step,
        scratch + call.drive,
        scratch + call.decay,
        scratch + call.slope,
    )


@njit
def _start_state(call, walk, b, k, first):
    if call.initial == 0:
        _fill_zero(walk.state, walk.states)
    else:
        place = ((b * call.directions + k) * call.channels + first) * walk.states
        _transpose_in(call.initial + 4 * place, walk.states, walk.lanes, walk.state)


@njit
def _expand_delta(walk, start, count):
    """Write delta + bias of a segment to the step buffer: W delta for a low-rank delta, four steps at a time."""
    rows = walk.row_table + 4 * start
    if walk.rank == 0:
        for t in range(count):
            delta = load_lanes(walk.delta + load_int32(rows + 4 * t) * walk.delta_token, walk.lanes)
            store(walk.step + VECTOR_BYTES * t, delta + walk.bias)
        return
    for t in range(0, count, 4):
        # Beyond the end the last step is repeated; the buffer has room for it.
        delta_0 = walk.delta + load_int32(rows + 4 * t) * walk.delta_token
        delta_1 = walk.delta + load_int32(rows + 4 * min(t + 1, count - 1)) * walk.delta_token
        delta_2 = walk.delta + load_int32(rows + 4 * min(t + 2, count - 1)) * walk.delta_token
        delta_3 = walk.delta + load_int32(rows + 4 * min(t + 3, count - 1)) * walk.delta_token
        step_0, step_1, step_2, step_3 = walk.bias, walk.bias, walk.bias, walk.bias
        for r in range(walk.rank):
            weight = load(walk.weights + VECTOR_BYTES * r)
            step_0 = multiply_add(weight, broadcast(delta_0 + 4 * r), step_0)
            step_1 = multiply_add(weight, broadcast(delta_1 + 4 * r), step_1)
            step_2 = multiply_add(weight, broadcast(delta_2 + 4 * r), step_2)
            step_3 = multiply_add(weight, broadcast(delta_3 + 4 * r), step_3)
        place = walk.step + VECTOR_BYTES * t
        store(place, step_0)
        store(place + VECTOR_BYTES, step_1)
        store(place + 2 * VECTOR_BYTES, step_2)
        store(place + 3 * VECTOR_BYTES, step_3)


@njit
def _take_steps(walk, start, count, with_slope):
    """Compute Delta, Delta u and, for one state, the decay exp(Delta A) of a segment; optionally dDelta/ddelta."""
    _expand_delta(walk, start, count)
    tokens = walk.token_table + 4 * start
    rate = load(walk.rates)
    for t in range(count):
        place = VECTOR_BYTES * t
        step = load(walk.step + place)
        if walk.softplus != 0:
            if with_slope:
                store(walk.slope + place, sigmoid(step))
            step = softplus(step)
            store(walk.step + place, step)
        u = load_lanes(walk.u + load_int32(tokens + 4 * t) * walk.u_token, walk.lanes)
        store(walk.drive + place, step * u)
        if walk.states == 1:
            store(walk.decay + place, exp(step * rate))


@njit
def _write(address, value, lanes, accumulate):
    if accumulate:
        value = value + load_lanes(address, lanes)
    store_lanes(address, value, lanes)


@njit
def _recur_single(walk, start, count, y, y_token, accumulate):
    """The recurrence and the output of a segment with one state, which stays in a register."""
    tokens, rows = walk.token_table + 4 * start, walk.row_table + 4 * start
    h = load(walk.state)
    for t in range(count):
        token, row = load_int32(tokens + 4 * t), load_int32(rows + 4 * t)
        place = VECTOR_BYTES * t
        drive = load(walk.drive + place) * broadcast(walk.B + row * walk.B_token)
        h = multiply_add(load(walk.decay + place), h, drive)
        out = walk.skip * load_lanes(walk.u + token * walk.u_token, walk.lanes)
        out = multiply_add(h, broadcast(walk.C + row * walk.C_token), out)
        _write(y + token * y_token, out, walk.lanes, accumulate)
    store(walk.state, h)


@njit
def _recur(walk, start, count, y, y_token, accumulate):
    """The recurrence and the output of a segment."""
    tokens, rows = walk.token_table + 4 * start, walk.row_table + 4 * start
    for t in range(count):
        token, row = load_int32(tokens + 4 * t), load_int32(rows + 4 * t)
        B, C = walk.B + row * walk.B_token, walk.C + row * walk.C_token
        step, drive = load(walk.step + VECTOR_BYTES * t), load(walk.drive + VECTOR_BYTES * t)
        out = walk.skip * load_lanes(walk.u + token * walk.u_token, walk.lanes)
        for n in range(walk.states):
            place = VECTOR_BYTES * n
            decay = exp(step * load(walk.rates + place))
            h = multiply_add(decay, load(walk.state + place), drive * broadcast(B + 4 * n))
            store(walk.state + place, h)
            out = multiply_add(h, broadcast(C + 4 * n), out)
        _write(y + token * y_token, out, walk.lanes, accumulate)


@njit
def _accumulate(address, value):
    store(address, load(address) + value)


@njit
def _zero_rows(address, token_bytes, tokens, lanes):
    for token in range(tokens):
        store_lanes(address + token * token_bytes, splat(0.0), lanes)


@njit
def _gate_rows(call, y, z, lanes):
    """Multiply the rows of one output by silu(z)."""
    for token in range(call.tokens):
        gate = load_lanes(z + token * call.z_token, lanes)
        place = y + token * call.y_token
        store_lanes(place, load_lanes(place, lanes) * gate * sigmoid(gate), lanes)


@njit
def _forward_block(call, scratch, b, first, lanes):
    """All directions of one batch element for the channels from ``first`` on."""
    outputs = 1 if call.merge != 0 else call.directions
    for k in range(call.directions):
        walk = _walk(call, scratch, b, k, first, lanes)
        _start_state(call, walk, b, k, first)
        y = call.y + b * call.y_batch + k * call.y_direction + 4 * first
        accumulate = k >= outputs or call.covered == 0
        if k < outputs and call.covered == 0:
            _zero_rows(y, call.y_token, call.tokens, lanes)
        for start in range(0, walk.steps, call.segment):
            count = min(call.segment, walk.steps - start)
            _take_steps(walk, start, count, False)
            if walk.states == 1:
                _recur_single(walk, start, count, y, call.y_token, accumulate)
            else:
                _recur(walk, start, count, y, call.y_token, accumulate)
        place = ((b * call.directions + k) * call.channels + first) * walk.states
        _transpose_out(walk.state, walk.states, lanes, call.last + 4 * place)
    if call.z != 0:
        for k in range(outputs):
            y = call.y + b * call.y_batch + k * call.y_direction + 4 * first
            _gate_rows(call, y, call.z + b * call.z_batch + k * call.z_direction + 4 * first, lanes)


def forward(pointer):
    """Take tasks (batch element, block of 16 channels) until none is left; any number of threads may run it."""
    call = carray(pointer, 1, CALL)[0]
    scratch = call.scratch + fetch_add(call.counters + 8) * call.scratch_bytes
    blocks = (call.channels + LANES - 1) // LANES
    task = fetch_add(call.counters)
    while task < call.tasks:
        first = task % blocks * LANES
        _forward_block(call, scratch, task // blocks, first, min(LANES, call.channels - first))
        task = fetch_add(call.counters)


@njit
def _checkpoint(call, scratch, b, k, first, lanes):
    """Walk direction ``k`` forward, keeping the state before each segment and, where there is a gate, the output."""
    walk = _walk(call, scratch, b, k, first, lanes)
    _start_state(call, walk, b, k, first)
    gated = call.z != 0
    outputs = scratch + call.outputs
    if call.merge == 0:
        outputs += VECTOR_BYTES * k * call.tokens
    if gated and (k == 0 or call.merge == 0):
        _fill_zero(outputs, call.tokens)
    kept = scratch + call.checkpoints + VECTOR_BYTES * k * call.segments * walk.states
    for start in range(0, walk.steps, call.segment):
        for n in range(walk.states):
            store(kept, load(walk.state + VECTOR_BYTES * n))
            kept += VECTOR_BYTES
        count = min(call.segment, walk.steps - start)
        if gated:
            _take_steps(walk, start, count, False)
            if walk.states == 1:
                _recur_single(walk, start, count, outputs, VECTOR_BYTES, True)
            else:
                _recur(walk, start, count, outputs, VECTOR_BYTES, True)
        elif start + count < walk.steps:
            _take_steps(walk, start, count, False)
            _advance(walk, start, count)


@njit
def _advance(walk, start, count):
    """The recurrence of a segment without its output."""
    rows = walk.row_table + 4 * start
    for n in range(walk.states):
        place = VECTOR_BYTES * n
        rate, h = load(walk.rates + place), load(walk.state + place)
        for t in range(count):
            drive = load(walk.drive + VECTOR_BYTES * t)
            B = broadcast(walk.B + load_int32(rows + 4 * t) * walk.B_token + 4 * n)
            if walk.states == 1:
                decay = load(walk.decay + VECTOR_BYTES * t)
            else:
                decay = exp(load(walk.step + VECTOR_BYTES * t) * rate)
            h = multiply_add(decay, h, drive * B)
        store(walk.state + place, h)


@njit
def _gate_backward(call, scratch, b, first, lanes):
    """Turn the buffer of outputs y into that of their gradients, dy silu(z), and write dz = dy y silu'(z)."""
    outputs = 1 if call.merge != 0 else call.directions
    z = call.z + b * call.z_batch + 4 * first
    dz = call.dz + b * call.dz_batch + 4 * first
    dy = call.dy + b * call.dy_batch + 4 * first
    for k in range(outputs):
        for token in range(call.tokens):
            place = scratch + call.outputs + VECTOR_BYTES * (k * call.tokens + token)
            gradient = load_lanes(dy + token * call.dy_token + k * call.dy_direction, lanes)
            gate = load_lanes(z + token * call.z_token + k * call.z_direction, lanes)
            open_ = sigmoid(gate)
            dgate = gradient * load(place) * open_ * (splat(1.0) + gate * (splat(1.0) - open_))
            # A gate that the directions share (stride 0) collects their gradients.
            shared = k > 0 and call.dz_direction == 0
            _write(dz + token * call.dz_token + k * call.dz_direction, dgate, lanes, shared)
            store(place, gradient * gate * open_)


@njit
def _replay(walk, start, count, history):
    """Recompute a segment's states, ``history[t + 1, n]`` = h_t, and its decays from the state before it."""
    rows = walk.row_table + 4 * start
    for t in range(count):
        B = walk.B + load_int32(rows + 4 * t) * walk.B_token
        step, drive = load(walk.step + VECTOR_BYTES * t), load(walk.drive + VECTOR_BYTES * t)
        for n in range(walk.states):
            place = VECTOR_BYTES * (t * walk.states + n)
            if walk.states > 1:
                store(walk.decay + place, exp(step * load(walk.rates + VECTOR_BYTES * n)))
            h = multiply_add(load(walk.decay + place), load(history + place), drive * broadcast(B + 4 * n))
            store(history + place + VECTOR_BYTES * walk.states, h)


@njit
def _adjoint_step(walk, t, row, dy, step, drive, adjoint, rate_gradient, history):
    """Walk one step back, over its states.

    Returns:
        dL/d(Delta u) and the decays' part of dL/d(Delta), summed over the states. The products whose lane sums are
        dC_t and dB_t take the places of h_t and of the decay.
    """
    B, C = walk.B + row * walk.B_token, walk.C + row * walk.C_token
    ddrive, dstep = splat(0.0), splat(0.0)
    for n in range(walk.states):
        lane_place = VECTOR_BYTES * n
        place = VECTOR_BYTES * (t * walk.states + n)
        after = history + place + VECTOR_BYTES * walk.states
        # g_t = C_t dy_t + a_{t+1} g_{t+1}
        g = multiply_add(broadcast(C + 4 * n), dy, load(adjoint + lane_place))
        ddrive = multiply_add(g, broadcast(B + 4 * n), ddrive)
        carried = g * load(walk.decay + place)
        dexponent = carried * load(history + place)  # dL/d(Delta A) = g_t a_t h_{t-1}
        dstep = multiply_add(dexponent, load(walk.rates + lane_place), dstep)
        store(rate_gradient + lane_place, multiply_add(dexponent, step, load(rate_gradient + lane_place)))
        store(after, load(after) * dy)
        store(walk.decay + place, g * drive)
        store(adjoint + lane_place, carried)
    return ddrive, dstep


@njit
def _add_lane_sums(vectors, sums, rows, count, width, target, target_row):
    """Add the lane sums of a (count, width) matrix of vectors to the rows of a (rows, width) matrix."""
    for i in range(0, count * width, LANES):
        store(sums + 4 * i, sum_lanes_of_16(vectors + VECTOR_BYTES * i))
    for t in range(count):
        row = target + load_int32(rows + 4 * t) * target_row
        for n in range(width):
            place = row + 4 * n
            store_float(place, load_float(place) + load_float(sums + 4 * (t * width + n)))


@njit
def _low_rank_gradients(call, walk, scratch, start, count, target):
    """Gradients of the low-rank delta, W' dpre, and of W, dpre delta', from dpre in the drive buffer."""
    rows = walk.row_table + 4 * start
    products, gradient = scratch + call.products, scratch + call.weight_gradient
    for r in range(walk.rank):
        total = splat(0.0)
        for t in range(count):
            delta = broadcast(walk.delta + load_int32(rows + 4 * t) * walk.delta_token + 4 * r)
            total = multiply_add(load(walk.drive + VECTOR_BYTES * t), delta, total)
        _accumulate(gradient + VECTOR_BYTES * r, total)
    for some in range(0, count, LANES):
        part = min(LANES, count - some)
        for t in range(part):
            dpre = load(walk.drive + VECTOR_BYTES * (some + t))
            for r in range(walk.rank):
                product = dpre * load(walk.weights + VECTOR_BYTES * r)
                store(products + VECTOR_BYTES * (t * walk.rank + r), product)
        row_bytes = 4 * call.directions * walk.rank
        _add_lane_sums(products, scratch + call.sums, rows + 4 * some, part, walk.rank, target, row_bytes)


@njit
def _reverse_segment(call, walk, scratch, start, count, dy, dy_token, du, fresh, ddelta):
    """Walk a replayed segment back; returns its part of the gradients of D and bias."""
    tokens, rows = walk.token_table + 4 * start, walk.row_table + 4 * start
    history, adjoint = scratch + call.history, scratch + call.adjoint
    dskip, dbias = splat(0.0), splat(0.0)
    segment_gradient = scratch + call.segment_gradient
    _fill_zero(segment_gradient, walk.states)
    for t in range(count - 1, -1, -1):
        token, row = load_int32(tokens + 4 * t), load_int32(rows + 4 * t)
        place = VECTOR_BYTES * t
        step = load(walk.step + place)
        u = load_lanes(walk.u + token * walk.u_token, walk.lanes)
        dout = load_lanes(dy + token * dy_token, walk.lanes)
        ddrive, dstep = _adjoint_step(walk, t, row, dout, step, step * u, adjoint, segment_gradient, history)
        _write(du + token * call.du_token, multiply_add(ddrive, step, walk.skip * dout), walk.lanes, not fresh)
        dskip = multiply_add(dout, u, dskip)
        dpre = multiply_add(ddrive, u, dstep)
        if walk.softplus != 0:
            dpre = dpre * load(walk.slope + place)
        dbias = dbias + dpre
        store(walk.drive + place, dpre)
        if walk.rank == 0:
            store_lanes(ddelta + row * 4 * call.directions * call.channels, dpre, walk.lanes)
    for n in range(walk.states):
        place = VECTOR_BYTES * n
        _accumulate(scratch + call.rate_gradient + place, load(segment_gradient + place))
    return dskip, dbias


@njit
def _reverse(call, scratch, b, k, group, first, lanes):
    """Walk direction ``k`` back, segment by segment, and write its gradients."""
    walk = _walk(call, scratch, b, k, first, lanes)
    states, rank = walk.states, walk.rank
    place = (b * call.directions + k) * call.channels + first
    adjoint = scratch + call.adjoint
    if call.dlast == 0:
        _fill_zero(adjoint, states)
    else:
        _transpose_in(call.dlast + 4 * place * states, states, lanes, adjoint)
    _fill_zero(scratch + call.rate_gradient, states)
    _fill_zero(scratch + call.weight_gradient, rank)
    if call.z != 0:
        dy, dy_token = scratch + call.outputs, VECTOR_BYTES
        if call.merge == 0:
            dy += VECTOR_BYTES * k * call.tokens
    else:
        dy, dy_token = call.dy + b * call.dy_batch + k * call.dy_direction + 4 * first, call.dy_token
    du = call.du + b * call.du_batch + k * call.du_direction + 4 * first
    own_u = k == 0 or call.du_direction != 0
    if own_u and call.covered == 0:
        _zero_rows(du, call.du_token, call.tokens, lanes)
    row_of_k = ((group * call.batch + b) * call.tokens) * call.directions + k
    dB, dC = call.dB + 4 * row_of_k * states, call.dC + 4 * row_of_k * states
    ddelta_low_rank = call.ddelta_low_rank + 4 * row_of_k * rank
    ddelta = call.ddelta + 4 * ((b * call.tokens * call.directions + k) * call.channels + first)
    sums, history = scratch + call.sums, scratch + call.history
    dskip, dbias = splat(0.0), splat(0.0)
    for segment in range((walk.steps + call.segment - 1) // call.segment - 1, -1, -1):
        start = segment * call.segment
        count = min(call.segment, walk.steps - start)
        kept = scratch + call.checkpoints + VECTOR_BYTES * (k * call.segments + segment) * states
        for n in range(states):
            store(history + VECTOR_BYTES * n, load(kept + VECTOR_BYTES * n))
        _take_steps(walk, start, count, True)
        _replay(walk, start, count, history)
        fresh = own_u and call.covered != 0
        parts = _reverse_segment(call, walk, scratch, start, count, dy, dy_token, du, fresh, ddelta)
        dskip, dbias = dskip + parts[0], dbias + parts[1]
        rows, row_bytes = walk.row_table + 4 * start, 4 * call.directions * states
        _add_lane_sums(history + VECTOR_BYTES * states, sums, rows, count, states, dC, row_bytes)
        _add_lane_sums(walk.decay, sums, rows, count, states, dB, row_bytes)
        if rank > 0:
            _low_rank_gradients(call, walk, scratch, start, count, ddelta_low_rank)
    _transpose_out(scratch + call.rate_gradient, states, lanes, call.dA + 4 * place * states)
    if call.dD != 0:
        store_lanes(call.dD + 4 * place, dskip, lanes)
    if call.dbias != 0:
        store_lanes(call.dbias + 4 * place, dbias, lanes)
    if rank > 0:
        _transpose_out(scratch + call.weight_gradient, rank, lanes, call.ddt_weight + 4 * place * rank)
    if call.dinitial != 0:
        _transpose_out(adjoint, states, lanes, call.dinitial + 4 * place * states)


def backward(pointer):
    """Take tasks (batch element, group of channel blocks) until none is left; any number of threads may run it.

    The blocks of a group come one after the other and add to the same partial sums of dB, dC and the low-rank ddelta,
    so the order of every sum is fixed by the shapes alone.
    """
    call = carray(pointer, 1, CALL)[0]
    scratch = call.scratch + fetch_add(call.counters + 8) * call.scratch_bytes
    blocks = (call.channels + LANES - 1) // LANES
    task = fetch_add(call.counters)
    while task < call.tasks:
        b, group = task // call.groups, task % call.groups
        for block in range(group * blocks // call.groups, (group + 1) * blocks // call.groups):
            first = block * LANES
            lanes = min(LANES, call.channels - first)
            for k in range(call.directions):
                _checkpoint(call, scratch, b, k, first, lanes)
            if call.z != 0:
                _gate_backward(call, scratch, b, first, lanes)
            for k in range(call.directions):
                _reverse(call, scratch, b, k, group, first, lanes)
        task = fetch_add(call.counters)
