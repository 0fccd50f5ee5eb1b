"""One decoding step of a selective SSM in Triton: reading and writing the state is all the time it takes.

h <- exp(Delta A) h + Delta x B^T;  y = (h C + D x) silu(z)
"""

import triton
import triton.language as tl

__all__ = ["state_update"]


@triton.jit
def state_update(
    state_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, slots_ptr, out_ptr,
    heads, heads_per_group, P, N,
    state_b, state_h, state_p, state_n, x_b, x_h, x_p, dt_b, dt_h, dt_p, A_h, A_p, A_n, B_b, B_g, B_n, C_b, C_g, C_n,
    D_h, D_p, z_b, z_h, z_p, bias_h, bias_p,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SKIP: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr,
    SLOTS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """BLOCK_P channels of a head of a batch entry."""
    b = tl.program_id(1).to(tl.int64)
    h = tl.program_id(2)
    g = h // heads_per_group
    p, n = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    present = p < P
    slot = b
    if SLOTS:
        slot = tl.load(slots_ptr + b).to(tl.int64)
    width = tl.where(slot >= 0, N, 0)  # a padding entry has no state
    live = present[:, None] & (n < width)[None, :]
    mask = present[:, None] & (n < N)[None, :]
    place = state_ptr + tl.maximum(slot, 0) * state_b + h * state_h + p[:, None] * state_p + n[None, :] * state_n
    state = tl.load(place, mask=live, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + b * x_b + h * x_h + p * x_p, mask=present, other=0.0).to(tl.float32)
    dt = tl.load(dt_ptr + b * dt_b + h * dt_h + p * dt_p, mask=present, other=0.0).to(tl.float32)
    if BIAS:
        dt += tl.load(bias_ptr + h * bias_h + p * bias_p, mask=present, other=0.0).to(tl.float32)
    if SOFTPLUS:
        e = tl.exp(tl.minimum(dt, 20.0))
        u = 1.0 + e
        exact = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
        dt = tl.where(dt > 20.0, dt, exact)
    A = tl.load(A_ptr + h * A_h + p[:, None] * A_p + n[None, :] * A_n, mask=mask, other=0.0).to(tl.float32)
    B = tl.load(B_ptr + b * B_b + g * B_g + n * B_n, mask=n < N, other=0.0).to(tl.float32)
    C = tl.load(C_ptr + b * C_b + g * C_g + n * C_n, mask=n < N, other=0.0).to(tl.float32)
    state = tl.exp(dt[:, None] * A) * state + (dt * x)[:, None] * B[None, :]
    rounded = state.to(state_ptr.dtype.element_ty)
    tl.store(place, rounded, mask=live)
    y = tl.sum(rounded.to(tl.float32) * C[None, :], axis=1)
    if SKIP:
        y += tl.load(D_ptr + h * D_h + p * D_p, mask=present, other=0.0).to(tl.float32) * x
    if GATE:
        z = tl.load(z_ptr + b * z_b + h * z_h + p * z_p, mask=present, other=0.0).to(tl.float32)
        y *= z / (1.0 + tl.exp(-z))
    y = tl.where(slot >= 0, y, 0.0)
    tl.store(out_ptr + (b * heads + h) * P + p, y.to(out_ptr.dtype.element_ty), mask=present)
