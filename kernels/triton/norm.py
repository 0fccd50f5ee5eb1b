"""Norms of Mamba-2 and of residual blocks in Triton: one pass over memory each way, statistics in float32.

``gated_norm`` is norm(x silu(z)) w + b or (norm(x) w + b) silu(z) over groups of channels; ``add_norm`` adds to the
residual stream first. A program of a backward kernel takes several rows and writes its share of the weights' gradients:
their sum is left to the caller, so no atomics are needed.
"""

import triton
import triton.language as tl

__all__ = ["add_norm", "add_norm_backward", "gated_norm", "gated_norm_backward"]


@triton.jit
def _normalise(x, mask, size, eps, RMS: tl.constexpr):
    """Return x normalised over the block, and the reciprocal deviation."""
    if not RMS:
        x = tl.where(mask, x - tl.sum(x, axis=0) / size, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / size + eps)
    return x * rstd, rstd


@triton.jit
def _normalise_backward(dnormal, normal, rstd, mask, size, RMS: tl.constexpr):
    dx = dnormal - normal * (tl.sum(dnormal * normal, axis=0) / size)
    if not RMS:
        dx -= tl.sum(dnormal, axis=0) / size
    return tl.where(mask, rstd * dx, 0.0)


@triton.jit
def gated_norm(
    x_ptr, z_ptr, weight_ptr, bias_ptr, out_ptr, x_row, z_row, out_row, size, eps,
    BLOCK: tl.constexpr, GATE: tl.constexpr, BEFORE: tl.constexpr, BIAS: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    """One group of one row. BEFORE: the norm comes before the gate."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    channel = tl.program_id(1) * size + columns
    x = tl.load(x_ptr + row * x_row + channel, mask=mask, other=0.0).to(tl.float32)
    gate = 1.0
    if GATE:
        z = tl.load(z_ptr + row * z_row + channel, mask=mask, other=0.0).to(tl.float32)
        gate = z / (1.0 + tl.exp(-z))
    if not BEFORE:
        x *= gate
    normal, _rstd = _normalise(x, mask, size, eps, RMS)
    out = normal * tl.load(weight_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        out += tl.load(bias_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    if BEFORE:
        out *= gate
    tl.store(out_ptr + row * out_row + channel, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gated_norm_backward(
    dout_ptr, x_ptr, z_ptr, weight_ptr, bias_ptr, dx_ptr, dz_ptr, dweight_ptr, dbias_ptr,
    dout_row, x_row, z_row, rows, rows_per_program, channels, size, eps,
    BLOCK: tl.constexpr, GATE: tl.constexpr, BEFORE: tl.constexpr, BIAS: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    """Several rows of one group."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    channel = tl.program_id(1) * size + columns
    weight = tl.load(weight_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    bias = tl.zeros([BLOCK], tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    for i in range(0, rows_per_program):
        row = (program * rows_per_program + i).to(tl.int64)
        if row < rows:
            x = tl.load(x_ptr + row * x_row + channel, mask=mask, other=0.0).to(tl.float32)
            dout = tl.load(dout_ptr + row * dout_row + channel, mask=mask, other=0.0).to(tl.float32)
            scaled = x
            if GATE:
                z = tl.load(z_ptr + row * z_row + channel, mask=mask, other=0.0).to(tl.float32)
                sigmoid = 1.0 / (1.0 + tl.exp(-z))
                gate = z * sigmoid
                if not BEFORE:
                    scaled = x * gate
            normal, rstd = _normalise(scaled, mask, size, eps, RMS)
            if GATE and BEFORE:
                dgate = dout * (normal * weight + bias)
                dout *= gate
            dweight += dout * normal
            dbias += dout
            dx = _normalise_backward(dout * weight, normal, rstd, mask, size, RMS)
            if GATE:
                if not BEFORE:
                    dgate = dx * x
                    dx *= gate
                dz = dgate * sigmoid * (1.0 + z * (1.0 - sigmoid))
                tl.store(dz_ptr + row * channels + channel, dz.to(dz_ptr.dtype.element_ty), mask=mask)
            tl.store(dx_ptr + row * channels + channel, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    place = program.to(tl.int64) * channels + channel
    tl.store(dweight_ptr + place, dweight, mask=mask)
    if BIAS:
        tl.store(dbias_ptr + place, dbias, mask=mask)


@triton.jit
def add_norm(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, total_ptr, x_row, residual_row, size, eps,
    BLOCK: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    total = tl.load(x_ptr + row * x_row + columns, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        total += tl.load(residual_ptr + row * residual_row + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(total_ptr + row * size + columns, total.to(total_ptr.dtype.element_ty), mask=mask)
    normal, _rstd = _normalise(total, mask, size, eps, RMS)
    out = normal * tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        out += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * size + columns, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_norm_backward(
    dout_ptr, dtotal_ptr, x_ptr, residual_ptr, weight_ptr, dsum_ptr, dweight_ptr, dbias_ptr,
    dout_row, dtotal_row, x_row, residual_row, rows, rows_per_program, size, eps,
    BLOCK: tl.constexpr, RESIDUAL: tl.constexpr, TOTAL: tl.constexpr, BIAS: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    """Several rows. TOTAL: the sum itself has a gradient."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    for i in range(0, rows_per_program):
        row = (program * rows_per_program + i).to(tl.int64)
        if row < rows:
            total = tl.load(x_ptr + row * x_row + columns, mask=mask, other=0.0).to(tl.float32)
            if RESIDUAL:
                total += tl.load(residual_ptr + row * residual_row + columns, mask=mask, other=0.0).to(tl.float32)
            dout = tl.load(dout_ptr + row * dout_row + columns, mask=mask, other=0.0).to(tl.float32)
            normal, rstd = _normalise(total, mask, size, eps, RMS)
            dweight += dout * normal
            dbias += dout
            dsum = _normalise_backward(dout * weight, normal, rstd, mask, size, RMS)
            if TOTAL:
                dsum += tl.load(dtotal_ptr + row * dtotal_row + columns, mask=mask, other=0.0).to(tl.float32)
            tl.store(dsum_ptr + row * size + columns, dsum, mask=mask)
    place = program.to(tl.int64) * size + columns
    tl.store(dweight_ptr + place, dweight, mask=mask)
    if BIAS:
        tl.store(dbias_ptr + place, dbias, mask=mask)
