"""The selective scan along a path in Triton: a program walks a direction of BLOCK_D channels, states in registers.

    h_t = exp(Delta A) h_{t-1} + Delta B u,   y_t = C h_t + D u
    g_t = C_t dy_t + a_{t+1} g_{t+1}          (the adjoint, walked backwards)

The backward checkpoints the state every SEGMENT steps and computes a segment's states again before it walks it back.
Steps without a token (order -1) have Delta = 0, which leaves the state as it is. Everything is float32 inside.
"""

import triton
import triton.language as tl

__all__ = ["scan_backward", "scan_forward"]


@triton.jit
def _softplus(x):
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def _exp(x):
    """Return exp(x) as 2^(x log2 e), with what the product's rounding leaves out: it grows with x."""
    power = x * 1.4426950408889634
    rest = tl.fma(x, 1.4426950408889634, -power) + x * 1.925963033500011e-08  # log2 e less its float32
    return tl.exp2(power) * (1.0 + rest * 0.6931471805599453)


@triton.jit
def _visit(order_ptr, t, STEP_ORDER: tl.constexpr):
    """Return the token of step t, the row of Delta, B and C that belongs to it, and whether there is a token."""
    token = tl.load(order_ptr + t)
    valid = token >= 0
    at = tl.maximum(token, 0).to(tl.int64)
    row = at
    if STEP_ORDER:
        row = tl.where(valid, t, 0).to(tl.int64)
    return at, row, valid


@triton.jit
def _load_step(delta_ptr, bias, d, D, valid, SOFTPLUS: tl.constexpr):
    """Return Delta, 0 where there is no token or channel, and d Delta / d delta."""
    step = tl.load(delta_ptr + d, mask=d < D, other=0.0).to(tl.float32) + bias
    slope = tl.full(step.shape, 1.0, tl.float32)
    if SOFTPLUS:
        slope = tl.sigmoid(step)
        step = _softplus(step)
    return tl.where(d < tl.where(valid, D, 0), step, 0.0), slope


@triton.jit
def _advance(h, A, step, u, B):
    """Return the next state and its decay."""
    a = _exp(step[:, None] * A)
    return a * h + (step * u)[:, None] * B[None, :], a


@triton.jit
def _load_channels(ptr, d, D, GIVEN: tl.constexpr):
    """Return a parameter of each channel, or zeros where there is none."""
    return tl.load(ptr + d, mask=d < D, other=0.0) if GIVEN else tl.zeros(d.shape, tl.float32)


@triton.jit
def _load_states(ptr, mask, GIVEN: tl.constexpr):
    """Return a value of each state, or zeros where there is none."""
    return tl.load(ptr, mask=mask, other=0.0) if GIVEN else tl.zeros(mask.shape, tl.float32)


@triton.jit
def _walk_step(h, A, bias, u_ptr, delta_ptr, B_ptr, order_ptr, t, u_l, delta_l, B_l, d, n, D, N,
               SOFTPLUS: tl.constexpr, STEP_ORDER: tl.constexpr):  # fmt: skip
    """Walk step t; return the state after it, u, and where the step was: token, row, whether there is a token."""
    at, row, valid = _visit(order_ptr, t, STEP_ORDER)
    u = tl.load(u_ptr + at * u_l + d, mask=d < D, other=0.0).to(tl.float32)
    step, _ = _load_step(delta_ptr + row * delta_l, bias, d, D, valid, SOFTPLUS)
    B = tl.load(B_ptr + row * B_l + n, mask=n < N, other=0.0).to(tl.float32)
    h, _ = _advance(h, A, step, u, B)
    return h, u, at, row, valid


@triton.jit
def scan_forward(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, order_ptr, state_ptr, y_ptr, last_ptr,
    L, P, K, D, N, u_b, u_l, u_k, delta_b, delta_l, delta_k, B_b, B_l, B_k, C_b, C_l, C_k,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SKIP: tl.constexpr, BIAS: tl.constexpr, STATE: tl.constexpr,
    SOFTPLUS: tl.constexpr, STEP_ORDER: tl.constexpr,
):  # fmt: skip
    """Write y (B, L, K, D) and the last state (B, K, D, N), both in float32."""
    b, k = tl.program_id(2).to(tl.int64), tl.program_id(1)
    d, n = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    both = (d < D)[:, None] & (n < N)[None, :]
    own = (k * D + d)[:, None] * N + n[None, :]
    A = tl.load(A_ptr + own, mask=both, other=0.0)
    skip = _load_channels(D_ptr + k * D, d, D, SKIP)
    bias = _load_channels(bias_ptr + k * D, d, D, BIAS)
    h = _load_states(state_ptr + b * K * D * N + own, both, STATE)
    order_ptr += k * P
    u_ptr += b * u_b + k * u_k
    delta_ptr += b * delta_b + k * delta_k
    B_ptr += b * B_b + k * B_k
    C_ptr += b * C_b + k * C_k
    y_ptr += b * L * K * D + k * D
    for t in range(P):
        h, u, at, row, valid = _walk_step(
            h, A, bias, u_ptr, delta_ptr, B_ptr, order_ptr, t, u_l, delta_l, B_l, d, n, D, N, SOFTPLUS, STEP_ORDER
        )
        C = tl.load(C_ptr + row * C_l + n, mask=n < N, other=0.0).to(tl.float32)
        y = tl.sum(h * C[None, :], axis=1) + skip * u
        tl.store(y_ptr + at * K * D + d, y, mask=d < tl.where(valid, D, 0))
    tl.store(last_ptr + b * K * D * N + own, h, mask=both)


@triton.jit
def scan_backward(
    dy_ptr, dlast_ptr, u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, order_ptr, state_ptr,
    du_ptr, ddelta_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dbias_ptr, dstate_ptr, scratch_ptr,
    L, P, K, D, N, dy_b, dy_l, dy_k, u_b, u_l, u_k, delta_b, delta_l, delta_k, B_b, B_l, B_k, C_b, C_l, C_k,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SEGMENT: tl.constexpr, SKIP: tl.constexpr, BIAS: tl.constexpr,
    STATE: tl.constexpr, LAST: tl.constexpr, SOFTPLUS: tl.constexpr, STEP_ORDER: tl.constexpr,
):  # fmt: skip
    """Gradients in float32: du, ddelta (B, L, K, D); dB, dC (blocks, B, L, K, N); dA, dD, dbias of each b."""
    b, k = tl.program_id(2).to(tl.int64), tl.program_id(1)
    d, n = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    both = (d < D)[:, None] & (n < N)[None, :]
    own = (k * D + d)[:, None] * N + n[None, :]
    A = tl.load(A_ptr + own, mask=both, other=0.0)
    skip = _load_channels(D_ptr + k * D, d, D, SKIP)
    bias = _load_channels(bias_ptr + k * D, d, D, BIAS)
    h = _load_states(state_ptr + b * K * D * N + own, both, STATE)
    order_ptr += k * P
    dy_ptr += b * dy_b + k * dy_k
    u_ptr += b * u_b + k * u_k
    delta_ptr += b * delta_b + k * delta_k
    B_ptr += b * B_b + k * B_k
    C_ptr += b * C_b + k * C_k
    du_ptr += b * L * K * D + k * D
    ddelta_ptr += b * L * K * D + k * D
    images = tl.num_programs(2).to(tl.int64)
    dB_ptr += ((tl.program_id(0) * images + b) * L * K + k) * N
    dC_ptr += ((tl.program_id(0) * images + b) * L * K + k) * N
    segments = tl.cdiv(P, SEGMENT)
    program = (b * K + k) * tl.num_programs(0) + tl.program_id(0)
    tile = tl.arange(0, BLOCK_D)[:, None] * BLOCK_N + n[None, :]
    scratch_ptr += program * (segments + SEGMENT) * BLOCK_D * BLOCK_N
    before_ptr = scratch_ptr + segments * BLOCK_D * BLOCK_N  # the state before each step of the segment at hand

    for t in range(P):
        if t % SEGMENT == 0:
            tl.store(scratch_ptr + t // SEGMENT * BLOCK_D * BLOCK_N + tile, h)
        h, _u, _at, _row, _valid = _walk_step(
            h, A, bias, u_ptr, delta_ptr, B_ptr, order_ptr, t, u_l, delta_l, B_l, d, n, D, N, SOFTPLUS, STEP_ORDER
        )
    tl.debug_barrier()

    carried = _load_states(dlast_ptr + b * K * D * N + own, both, LAST)  # a_{t+1} g_{t+1}
    dA = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    dD = tl.zeros([BLOCK_D], tl.float32)
    dbias = tl.zeros([BLOCK_D], tl.float32)
    for back in range(segments):
        segment = segments - 1 - back
        h = tl.load(scratch_ptr + segment * BLOCK_D * BLOCK_N + tile)
        length = tl.minimum(P - segment * SEGMENT, SEGMENT)
        # Sums over the steps are taken a segment at a time: errors grow with the terms of a sum.
        part_dA = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
        part_dD = tl.zeros([BLOCK_D], tl.float32)
        part_dbias = tl.zeros([BLOCK_D], tl.float32)
        for i in range(length):
            t = segment * SEGMENT + i
            tl.store(before_ptr + i * BLOCK_D * BLOCK_N + tile, h)
            h, _u, _at, _row, _valid = _walk_step(
                h, A, bias, u_ptr, delta_ptr, B_ptr, order_ptr, t, u_l, delta_l, B_l, d, n, D, N, SOFTPLUS, STEP_ORDER
            )
        tl.debug_barrier()
        for i in range(length):
            j = length - 1 - i
            t = segment * SEGMENT + j
            before = tl.load(before_ptr + j * BLOCK_D * BLOCK_N + tile)
            at, row, valid = _visit(order_ptr, t, STEP_ORDER)
            u = tl.load(u_ptr + at * u_l + d, mask=d < D, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + at * dy_l + d, mask=d < tl.where(valid, D, 0), other=0.0).to(tl.float32)
            step, slope = _load_step(delta_ptr + row * delta_l, bias, d, D, valid, SOFTPLUS)
            B = tl.load(B_ptr + row * B_l + n, mask=n < tl.where(valid, N, 0), other=0.0).to(tl.float32)
            C = tl.load(C_ptr + row * C_l + n, mask=n < tl.where(valid, N, 0), other=0.0).to(tl.float32)
            h, a = _advance(before, A, step, u, B)
            g = dy[:, None] * C[None, :] + carried
            dB = tl.sum(g * (step * u)[:, None], axis=0)
            dC = tl.sum(h * dy[:, None], axis=0)
            through = tl.sum(g * B[None, :], axis=1)  # dL/d(Delta u)
            carried = a * g
            decay = carried * before  # dL/d(Delta A)
            part_dA += decay * step[:, None]
            ddelta = tl.where(valid, (tl.sum(decay * A, axis=1) + through * u) * slope, 0.0)
            part_dD += dy * u
            part_dbias += ddelta
            tl.store(du_ptr + at * K * D + d, through * step + skip * dy, mask=d < tl.where(valid, D, 0))
            tl.store(ddelta_ptr + row * K * D + d, ddelta, mask=d < tl.where(valid, D, 0))
            tl.store(dB_ptr + row * K * N + n, dB, mask=n < tl.where(valid, N, 0))
            tl.store(dC_ptr + row * K * N + n, dC, mask=n < tl.where(valid, N, 0))
        dA += part_dA
        dD += part_dD
        dbias += part_dbias
        tl.debug_barrier()
    tl.store(dA_ptr + b * K * D * N + own, dA, mask=both)
    tl.store(dD_ptr + (b * K + k) * D + d, dD, mask=d < D)
    tl.store(dbias_ptr + (b * K + k) * D + d, dbias, mask=d < D)
    if STATE:
        tl.store(dstate_ptr + b * K * D * N + own, carried, mask=both)
