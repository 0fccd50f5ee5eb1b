"""SSD (the scan of Mamba-2) along scan paths, in Triton: matrix units inside chunks of steps, states between them.

Layouts as in ``visionmamba.ops.ssd_scan``; a *row* is one (batch, direction, head), a *chunk* is Q steps of the path.
With Delta the step sizes and s the running sum of Delta A within a chunk (Dao & Gu 2024, section 6)::

    y = (C B^T * exp(s_i - s_j) * Delta_j) x + exp(s) C h^T          i >= j
    h <- exp(s_Q) h + (exp(s_Q - s) Delta x)^T B

``ssd_forward`` keeps h (P x N) in registers and walks the chunks of a row: one launch, and nothing but inputs and
outputs touches memory. Where there are too few rows, the path is cut into segments: ``ssd_states`` computes what each
adds to the state, ``ssd_pass`` hands states on, and the segments then run in parallel.

Backward: ``ssd_states`` walks every row twice at once, forward with x and B for the state before each chunk, and from
the end with dy and C for the gradient of the state after it; in segments, too, where there are too few rows. With these
every chunk is on its own: ``ssd_gradients`` takes one head, ``ssd_shared_gradients`` sums dB and dC over heads of a
group in registers. (One kernel for both would spill.) States are stored in the activations' dtype, in which matrix
units take them. Nothing is accumulated with atomics, so results do not depend on the run.
"""

import triton
import triton.language as tl

__all__ = ["ssd_forward", "ssd_gradients", "ssd_pass", "ssd_shared_gradients", "ssd_states"]


@triton.jit
def _log1p_exp(x):
    """log(1 + exp(x)) to full precision also where exp(x) is tiny."""
    e = tl.exp(tl.minimum(x, 20.0))
    u = 1.0 + e
    exact = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(x > 20.0, x, exact)


@triton.jit
def _place(row, directions, heads, heads_per_group):
    """Batch, direction, head and group of a row, and the place of its direction and head in (K, H)."""
    b = (row // (directions * heads)).to(tl.int64)
    kh = row % (directions * heads)
    k = kh // heads
    h = kh % heads
    return b, k, h, h // heads_per_group, kh


@triton.jit
def _decay_and_bias(A_ptr, bias_ptr, kh, BIAS: tl.constexpr):
    """A of a head, and the bias of its step sizes."""
    A = tl.load(A_ptr + kh)
    bias = 0.0
    if BIAS:
        bias = tl.load(bias_ptr + kh)
    return A, bias


@triton.jit
def _tokens(order_ptr, rows, steps):
    """Tokens that a direction visits at the given steps, and whether there are any."""
    token = tl.load(order_ptr + rows, mask=rows < steps, other=-1)
    return tl.maximum(token, 0).to(tl.int64), token >= 0


@triton.jit
def _step_sizes(dt_ptr, stride, token, valid, bias, dt_min, dt_max, SOFTPLUS: tl.constexpr):
    """Delta (0 where there is no token), dt + bias, and the derivative of the clamp."""
    pre = tl.load(dt_ptr + token * stride, mask=valid, other=0.0).to(tl.float32) + bias
    raw = pre
    if SOFTPLUS:
        raw = _log1p_exp(pre)
    free = valid & (raw >= dt_min) & (raw <= dt_max)
    step = tl.where(valid, tl.minimum(tl.maximum(raw, dt_min), dt_max), 0.0)
    return step, pre, free


@triton.jit
def _rows_of(ptr, token, stride, columns, valid, width):
    """Rows of a matrix whose columns are contiguous, 0 outside."""
    mask = valid[:, None] & (columns < width)[None, :]
    return tl.load(ptr + token[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _store_rows(ptr, token, stride, columns, valid, width, values):
    """Write rows of a matrix whose columns are contiguous, in its dtype."""
    mask = valid[:, None] & (columns < width)[None, :]
    tl.store(ptr + token[:, None] * stride + columns[None, :], values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _state_layout(p, n, P, N):
    """Offsets of a state (P, N), and which of them there are."""
    mask = (p < P)[:, None] & (n < N)[None, :]
    return p[:, None] * N + n[None, :], mask


@triton.jit
def _skip_weight(D_ptr, kh, p, P, SKIP: tl.constexpr):
    """D of a head: one number (SKIP 1), or one a channel (SKIP 2)."""
    if SKIP == 1:
        return tl.load(D_ptr + kh)
    else:
        return tl.load(D_ptr + kh * P + p, mask=p < P, other=0.0)[None, :]


@triton.jit
def _sum_and_last(sum1, last1, sum2, last2):
    return sum1 + sum2, last2


@triton.jit
def _decays(step, A, segment_ptr, rows, start, steps, Q: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr):
    """Running log-decay, decays into, out of and through a chunk, and the step size and sequence of each step.

    Neighbours in a long running sum differ by few of its digits: float32 inputs take it in float64.
    """
    log_decay = step * A
    if PRECISION == "ieee":
        log_decay = log_decay.to(tl.float64)
        total = tl.cumsum(log_decay, axis=0)
    else:
        # The step sizes go through the scan unchanged: without it the compiler loads them and takes their softplus
        # again in the layout of the matrix's columns, in every thread
        total, step = tl.associative_scan((log_decay, step), 0, _sum_and_last)
    last = tl.sum(log_decay, axis=0)
    entry = tl.exp(total.to(tl.float32))
    leaving = tl.exp((last - total).to(tl.float32))
    through = tl.exp(last.to(tl.float32))
    sequence = tl.zeros([Q], tl.int32)
    if PACKED:
        sequence = tl.load(segment_ptr + tl.minimum(rows, steps - 1))
        before = tl.load(segment_ptr + tl.maximum(tl.minimum(start, steps) - 1, 0))
        before = tl.where(start > 0, before, 0)
        final = tl.load(segment_ptr + tl.minimum(start + Q, steps) - 1)
        entry = tl.where(sequence == before, entry, 0.0)
        leaving = tl.where(sequence == final, leaving, 0.0)
        through = tl.where(final == before, through, 0.0)
    return total, entry, leaving, through, step, sequence


@triton.jit
def _decay_matrix(total, sequence, Q: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr):
    """exp(s_i - s_j) for i >= j within a sequence, else 0; a float64 sum is taken as two float32 numbers."""
    offsets = tl.arange(0, Q)
    seen = offsets[:, None] >= offsets[None, :]
    if PACKED:
        seen = seen & (sequence[:, None] == sequence[None, :])
    high = total.to(tl.float32)
    difference = high[:, None] - high[None, :]
    if PRECISION == "ieee":
        low = (total - high).to(tl.float32)
        difference += low[:, None] - low[None, :]
    return tl.exp(tl.where(seen, difference, float("-inf")))


@triton.jit
def _chunk(
    order_ptr, segment_ptr, dt_ptr, dt_l, A, bias, start, q, steps, dt_min, dt_max,
    Q: tl.constexpr, SOFTPLUS: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tokens of a chunk, and its step sizes and decays for one head as :func:`_decays` gives them."""
    rows = start + q
    token, valid = _tokens(order_ptr, rows, steps)
    step, _pre, _free = _step_sizes(dt_ptr, dt_l, token, valid, bias, dt_min, dt_max, SOFTPLUS)
    total, entry, leaving, through, step, sequence = _decays(
        step, A, segment_ptr, rows, start, steps, Q, PACKED, PRECISION
    )
    return token, valid, total, entry, leaving, through, step, sequence


@triton.jit
def _advance(state, scores, x, B, C, step, entry, leaving, through, PRECISION: tl.constexpr):
    """Outputs of a chunk, without the skip, and the state after it, given the decayed C B^T."""
    weights = scores * step[None, :]
    y = tl.dot(weights.to(x.dtype), x, input_precision=PRECISION)
    y += entry[:, None] * tl.dot(C, tl.trans(state).to(C.dtype), input_precision=PRECISION)
    weighted = x.to(tl.float32) * (leaving * step)[:, None]
    state = through * state + tl.dot(tl.trans(weighted).to(B.dtype), B, input_precision=PRECISION)
    return y, state


@triton.jit
def ssd_forward(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, order_ptr, segment_ptr, initial_ptr, y_ptr, final_ptr,
    steps, directions, heads, heads_per_group, chunks_per_segment, segments,
    x_b, x_l, x_k, x_h, dt_b, dt_l, dt_k, dt_h, B_b, B_l, B_k, B_g, C_b, C_l, C_k, C_g, z_b, z_l, z_k, z_h,
    y_b, y_l, y_k, y_h, dt_min, dt_max,
    P, N, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SKIP: tl.constexpr, GATE: tl.constexpr,
    BIAS: tl.constexpr, STATE: tl.constexpr, PACKED: tl.constexpr, SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs and last state of one segment of a row, BLOCK_P channels. SKIP: 0 none, 1 D (K, H), 2 D (K, H, P)."""
    row, part = tl.program_id(0), tl.program_id(1)
    b, k, h, g, kh = _place(row, directions, heads, heads_per_group)
    q, p, n = tl.arange(0, Q), tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    x_ptr += b * x_b + k * x_k + h * x_h
    dt_ptr += b * dt_b + k * dt_k + h * dt_h
    B_ptr += b * B_b + k * B_k + g * B_g
    C_ptr += b * C_b + k * C_k + g * C_g
    y_ptr += b * y_b + k * y_k + h * y_h
    order_ptr += k * steps
    segment_ptr += (b * directions + k) * steps
    A, bias = _decay_and_bias(A_ptr, bias_ptr, kh, BIAS)
    state_offsets, state_mask = _state_layout(p, n, P, N)
    state = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    if STATE:
        place = (row.to(tl.int64) * segments + part) * P * N
        state = tl.load(initial_ptr + place + state_offsets, mask=state_mask, other=0.0)
    for c in range(0, chunks_per_segment):
        start = (part * chunks_per_segment + c) * Q
        token, valid, total, entry, leaving, through, step, sequence = _chunk(
            order_ptr, segment_ptr, dt_ptr, dt_l, A, bias, start, q, steps, dt_min, dt_max, Q, SOFTPLUS, PACKED,
            PRECISION,
        )  # fmt: skip
        x = _rows_of(x_ptr, token, x_l, p, valid, P)
        B = _rows_of(B_ptr, token, B_l, n, valid, N)
        C = _rows_of(C_ptr, token, C_l, n, valid, N)
        scores = tl.dot(C, tl.trans(B), input_precision=PRECISION)
        scores *= _decay_matrix(total, sequence, Q, PACKED, PRECISION)
        y, state = _advance(state, scores, x, B, C, step, entry, leaving, through, PRECISION)
        if SKIP > 0:
            y += _skip_weight(D_ptr, kh, p, P, SKIP) * x.to(tl.float32)
        if GATE:
            z = _rows_of(z_ptr + b * z_b + k * z_k + h * z_h, token, z_l, p, valid, P).to(tl.float32)
            y *= z / (1.0 + tl.exp(-z))
        _store_rows(y_ptr, token, y_l, p, valid, P, y)
    if part == segments - 1:
        tl.store(final_ptr + row.to(tl.int64) * P * N + state_offsets, state, mask=state_mask)


@triton.jit
def ssd_states(
    x_ptr, dy_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, bias_ptr, order_ptr, segment_ptr, initial_ptr, dfinal_ptr,
    before_ptr, after_ptr, dinitial_ptr, through_ptr,
    steps, directions, heads, heads_per_group, chunks_per_segment, segments, chunks, blocks_p,
    dy_b, dy_l, dy_k, dy_h, x_b, x_l, x_k, x_h, dt_b, dt_l, dt_k, dt_h, B_b, B_l, B_k, B_g, C_b, C_l, C_k, C_g,
    dt_min, dt_max,
    P, N, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr, PACKED: tl.constexpr,
    SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr, EACH: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """States along one segment of a row, forward from x and B; in programs of the second half backward from dy and C.

    With EACH the states before the chunks and the gradients of those after them, given what enters the segment from
    either end, and the gradient of the initial state. Else what the segment adds to each, and its decay.
    """
    row, part = tl.program_id(0), tl.program_id(1)
    reverse = tl.program_id(2) >= blocks_p
    b, k, h, g, kh = _place(row, directions, heads, heads_per_group)
    q, n = tl.arange(0, Q), tl.arange(0, BLOCK_N)
    p = tl.program_id(2) % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    dt_ptr += b * dt_b + k * dt_k + h * dt_h
    order_ptr += k * steps
    segment_ptr += (b * directions + k) * steps
    if reverse:
        value_ptr = dy_ptr + b * dy_b + k * dy_k + h * dy_h
        key_ptr = C_ptr + b * C_b + k * C_k + g * C_g
        enters_ptr, state_ptr, v_l, key_l = dfinal_ptr, after_ptr, dy_l, C_l
    else:
        value_ptr = x_ptr + b * x_b + k * x_k + h * x_h
        key_ptr = B_ptr + b * B_b + k * B_k + g * B_g
        enters_ptr, state_ptr, v_l, key_l = initial_ptr, before_ptr, x_l, B_l
    enters = tl.where(reverse, FINAL, INITIAL) > 0
    A, bias = _decay_and_bias(A_ptr, bias_ptr, kh, BIAS)
    state_offsets, state_mask = _state_layout(p, n, P, N)
    base = row.to(tl.int64) * segments + part
    state = tl.load(enters_ptr + base * P * N + state_offsets, mask=tl.where(enters, state_mask, False), other=0.0)
    decay = 1.0
    for c in range(0, chunks_per_segment):
        chunk = part * chunks_per_segment + tl.where(reverse, chunks_per_segment - 1 - c, c)
        token, valid, _total, entry, leaving, through, step, _sequence = _chunk(
            order_ptr, segment_ptr, dt_ptr, dt_l, A, bias, chunk * Q, q, steps, dt_min, dt_max, Q, SOFTPLUS, PACKED,
            PRECISION,
        )  # fmt: skip
        if EACH:
            place = state_ptr + (row.to(tl.int64) * chunks + chunk) * P * N + state_offsets
            tl.store(place, state.to(state_ptr.dtype.element_ty), mask=tl.where(chunk < chunks, state_mask, False))
        weight = tl.where(reverse, entry, leaving * step)
        value = _rows_of(value_ptr, token, v_l, p, valid, P).to(tl.float32) * weight[:, None]
        key = _rows_of(key_ptr, token, key_l, n, valid, N)
        state = through * state + tl.dot(tl.trans(value).to(key.dtype), key, input_precision=PRECISION)
        decay *= through
    if EACH:
        if reverse & (part == 0):
            tl.store(dinitial_ptr + row.to(tl.int64) * P * N + state_offsets, state, mask=state_mask)
    else:
        tl.store(state_ptr + base * P * N + state_offsets, state, mask=state_mask)
        tl.store(through_ptr + base, decay)


@triton.jit
def ssd_pass(
    before_ptr, after_ptr, through_ptr, initial_ptr, dfinal_ptr, segments, size,
    BLOCK: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """Replace each segment's contribution by the state that enters it, or its gradient, which enters from the end."""
    row = tl.program_id(0).to(tl.int64)
    reverse = tl.program_id(2) == 1
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    if reverse:
        enters_ptr, state_ptr = dfinal_ptr, after_ptr
    else:
        enters_ptr, state_ptr = initial_ptr, before_ptr
    enters = tl.where(reverse, FINAL, INITIAL) > 0
    state = tl.load(enters_ptr + row * size + offsets, mask=tl.where(enters, mask, False), other=0.0)
    for c in tl.range(0, segments, num_stages=4):  # loads run ahead of the sum
        part = tl.where(reverse, segments - 1 - c, c)
        place = state_ptr + (row * segments + part) * size + offsets
        added = tl.load(place, mask=mask, other=0.0)
        through = tl.load(through_ptr + row * segments + part)
        tl.store(place, state, mask=mask)
        state = through * state + added


@triton.jit
def _within_chunk(weights, x, dy, step, Q: tl.constexpr, PRECISION: tl.constexpr):
    """Gradients of x, step sizes and log-decays from pairs of steps within a chunk, given the decayed C B^T."""
    q = tl.arange(0, Q)
    by_step = tl.dot(dy, tl.trans(x), input_precision=PRECISION) * weights
    dstep = tl.sum(by_step, axis=0)
    weights *= step[None, :]
    dx = tl.dot(tl.trans(weights).to(dy.dtype), dy, input_precision=PRECISION)
    # Step j decays the pairs l < j <= i: sums over l, then over i
    pairs = tl.where(q[:, None] > q[None, :], by_step * step[None, :], 0.0)
    pairs = tl.where(q[:, None] >= q[None, :], tl.cumsum(pairs, axis=1) - pairs, 0.0)
    return dx, dstep, tl.sum(pairs, axis=0)


@triton.jit
def _add_states(dx, dstep, dlog, x, dy, B, C, before, after, step, entry, leaving, through, PRECISION: tl.constexpr):
    """Add what comes from the state before a chunk, and from its part in the state after it."""
    dlog += through * tl.sum(tl.sum(before.to(tl.float32) * after.to(tl.float32), axis=1), axis=0)
    reached = tl.dot(C, tl.trans(before), input_precision=PRECISION)
    entering = tl.sum(dy.to(tl.float32) * reached, axis=1) * entry
    dlog += tl.cumsum(entering, axis=0, reverse=True)
    stored = tl.dot(B, tl.trans(after), input_precision=PRECISION)
    kept = tl.sum(x.to(tl.float32) * stored, axis=1) * leaving
    dx += (leaving * step)[:, None] * stored
    dstep += kept
    dlog += tl.cumsum(kept * step, axis=0) - kept * step
    return dx, dstep, dlog


@triton.jit
def ssd_gradients(
    dy_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, order_ptr, segment_ptr, before_ptr, after_ptr,
    dx_ptr, ddt_ptr, dA_ptr, dbias_ptr, dD_ptr,
    steps, num_tokens, directions, heads, heads_per_group, chunks,
    dy_b, dy_l, dy_k, dy_h, x_b, x_l, x_k, x_h, dt_b, dt_l, dt_k, dt_h, B_b, B_l, B_k, B_g, C_b, C_l, C_k, C_g,
    dt_min, dt_max,
    P, N, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SKIP: tl.constexpr, BIAS: tl.constexpr,
    PACKED: tl.constexpr, SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of x, dt, A, the bias and D in a chunk of a row, given the state before it and that after's gradient.

    Those of A, bias and D are a chunk's part: (batch and chunk, direction and head).
    """
    row, chunk = tl.program_id(0), tl.program_id(1)
    b, k, h, g, kh = _place(row, directions, heads, heads_per_group)
    q, p, n = tl.arange(0, Q), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    start = chunk * Q
    rows = start + q
    segment_ptr += (b * directions + k) * steps
    token, valid = _tokens(order_ptr + k * steps, rows, steps)
    A, bias = _decay_and_bias(A_ptr, bias_ptr, kh, BIAS)
    step, pre, free = _step_sizes(
        dt_ptr + b * dt_b + k * dt_k + h * dt_h, dt_l, token, valid, bias, dt_min, dt_max, SOFTPLUS
    )
    total, entry, leaving, through, step, sequence = _decays(
        step, A, segment_ptr, rows, start, steps, Q, PACKED, PRECISION
    )
    x = _rows_of(x_ptr + b * x_b + k * x_k + h * x_h, token, x_l, p, valid, P)
    dy = _rows_of(dy_ptr + b * dy_b + k * dy_k + h * dy_h, token, dy_l, p, valid, P)
    B = _rows_of(B_ptr + b * B_b + k * B_k + g * B_g, token, B_l, n, valid, N)
    C = _rows_of(C_ptr + b * C_b + k * C_k + g * C_g, token, C_l, n, valid, N)

    weights = tl.dot(C, tl.trans(B), input_precision=PRECISION) * _decay_matrix(total, sequence, Q, PACKED, PRECISION)
    dx, dstep, dlog = _within_chunk(weights, x, dy, step, Q, PRECISION)
    state_base = (row.to(tl.int64) * chunks + chunk) * P * N
    state_offsets, state_mask = _state_layout(p, n, P, N)
    before = tl.load(before_ptr + state_base + state_offsets, mask=state_mask, other=0.0)
    after = tl.load(after_ptr + state_base + state_offsets, mask=state_mask, other=0.0)
    dx, dstep, dlog = _add_states(dx, dstep, dlog, x, dy, B, C, before, after, step, entry, leaving, through, PRECISION)
    part = (b * chunks + chunk) * directions * heads + kh
    if SKIP > 0:
        per_channel = tl.sum(dy.to(tl.float32) * x.to(tl.float32), axis=0)
        if SKIP == 1:
            tl.store(dD_ptr + part, tl.sum(per_channel, axis=0))
        else:
            tl.store(dD_ptr + part * P + p, per_channel, mask=p < P)
        dx += _skip_weight(D_ptr, kh, p, P, SKIP) * dy.to(tl.float32)
    tl.store(dA_ptr + part, tl.sum(dlog * step, axis=0))
    dpre = tl.where(free, dstep + dlog * A, 0.0)
    if SOFTPLUS:
        dpre = dpre / (1.0 + tl.exp(-pre))
    if BIAS:
        tl.store(dbias_ptr + part, tl.sum(dpre, axis=0))
    token_row = (b * num_tokens + token) * directions * heads + kh
    tl.store(ddt_ptr + token_row, dpre.to(ddt_ptr.dtype.element_ty), mask=valid)
    _store_rows(dx_ptr, token_row, P, p, valid, P, dx)


@triton.jit
def ssd_shared_gradients(
    dy_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, bias_ptr, order_ptr, segment_ptr, before_ptr, after_ptr, dB_ptr, dC_ptr,
    steps, num_tokens, directions, heads, groups, heads_per_group, heads_per_program, splits, chunks,
    dy_b, dy_l, dy_k, dy_h, x_b, x_l, x_k, x_h, dt_b, dt_l, dt_k, dt_h, B_b, B_l, B_k, B_g, C_b, C_l, C_k, C_g,
    dt_min, dt_max,
    P, N, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr, PACKED: tl.constexpr,
    SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of B and C in one chunk, summed over some heads of a group."""
    program, chunk = tl.program_id(0), tl.program_id(1)
    split = program % splits
    g = (program // splits) % groups
    k = (program // (splits * groups)) % directions
    b = (program // (splits * groups * directions)).to(tl.int64)
    q, p, n = tl.arange(0, Q), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    start = chunk * Q
    rows = start + q
    segment_ptr += (b * directions + k) * steps
    token, valid = _tokens(order_ptr + k * steps, rows, steps)
    dscores = tl.zeros([Q, Q], tl.float32)
    dB = tl.zeros([Q, BLOCK_N], tl.float32)
    dC = tl.zeros([Q, BLOCK_N], tl.float32)
    state_offsets, state_mask = _state_layout(p, n, P, N)
    for i in range(0, heads_per_program):
        within = split * heads_per_program + i
        if within < heads_per_group:
            h = g * heads_per_group + within
            kh = k * heads + h
            bias = 0.0
            if BIAS:
                bias = tl.load(bias_ptr + kh)
            step, _pre, _free = _step_sizes(
                dt_ptr + b * dt_b + k * dt_k + h * dt_h, dt_l, token, valid, bias, dt_min, dt_max, SOFTPLUS
            )
            total, entry, leaving, _through, step, sequence = _decays(
                step, tl.load(A_ptr + kh), segment_ptr, rows, start, steps, Q, PACKED, PRECISION
            )
            x = _rows_of(x_ptr + b * x_b + k * x_k + h * x_h, token, x_l, p, valid, P)
            dy = _rows_of(dy_ptr + b * dy_b + k * dy_k + h * dy_h, token, dy_l, p, valid, P)
            decay = _decay_matrix(total, sequence, Q, PACKED, PRECISION) * step[None, :]
            dscores += tl.dot(dy, tl.trans(x), input_precision=PRECISION) * decay
            state_base = ((b * directions * heads + kh) * chunks + chunk) * P * N
            before = tl.load(before_ptr + state_base + state_offsets, mask=state_mask, other=0.0)
            carried = (dy.to(tl.float32) * entry[:, None]).to(x.dtype)
            dC += tl.dot(carried, before, input_precision=PRECISION)
            after = tl.load(after_ptr + state_base + state_offsets, mask=state_mask, other=0.0)
            weighted = (x.to(tl.float32) * (leaving * step)[:, None]).to(x.dtype)
            dB += tl.dot(weighted, after, input_precision=PRECISION)
    B = _rows_of(B_ptr + b * B_b + k * B_k + g * B_g, token, B_l, n, valid, N)
    C = _rows_of(C_ptr + b * C_b + k * C_k + g * C_g, token, C_l, n, valid, N)
    dC += tl.dot(dscores.to(B.dtype), B, input_precision=PRECISION)
    dB += tl.dot(tl.trans(dscores.to(C.dtype)), C, input_precision=PRECISION)
    token_row = (((b * num_tokens + token) * splits + split) * directions + k) * groups + g
    _store_rows(dB_ptr, token_row, N, n, valid, N, dB)
    _store_rows(dC_ptr, token_row, N, n, valid, N, dC)
