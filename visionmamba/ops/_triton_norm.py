"""The norms on GPUs that Triton compiles for: ``kernels/triton/norm.py``, launched."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _triton
from .backend import Implementation, register_implementation

__all__ = ["add_backward", "add_forward", "gated_backward", "gated_forward"]

_PROGRAMS = 512
"""Most programs that share the rows of a backward pass; each writes its own sum of the weights' gradients."""
_MAX_CHANNELS = 16384


def _rows(tensor: Tensor | None, like: Tensor) -> tuple[Tensor, int]:
    """A tensor as rows with contiguous channels, and the stride between them; ``like`` stands in for an absent one."""
    if tensor is None:
        return like, 0
    rows = tensor.reshape(-1, tensor.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    return rows, rows.stride(0)


def _warps(block: int) -> int:
    return min(8, max(1, block // 256))


def _supports_gated(x, weight, bias, z, eps, group_size, norm_before_gate, rms) -> str | None:
    if x.dtype == torch.float64:
        return "float64"
    if x.numel() == 0:
        return "no rows"
    return f"groups of {group_size} channels" if group_size > _MAX_CHANNELS else None


def gated_forward(x, weight, bias, z, eps, group_size, norm_before_gate, rms):
    """Compute the op ``visionmamba::gated_norm``."""
    from visionmamba.kernels.triton.norm import gated_norm

    (rows, x_row), (gate, z_row) = _rows(x, x), _rows(z, x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = _triton.power_of_two(group_size)
    gated_norm[rows.shape[0], x.shape[-1] // group_size](
        rows, gate, weight, weight if bias is None else bias, out, x_row, z_row, x.shape[-1], group_size, eps,
        BLOCK=block, GATE=z is not None, BEFORE=norm_before_gate, BIAS=bias is not None, RMS=rms,
        num_warps=_warps(block),
    )  # fmt: skip
    return out


def gated_backward(dout, x, weight, bias, z, eps, group_size, norm_before_gate, rms):
    """Compute the gradients of x, weight, bias and z; None for absent ones."""
    from visionmamba.kernels.triton.norm import gated_norm_backward

    channels = x.shape[-1]
    (rows, x_row), (gate, z_row), (dout, dout_row) = _rows(x, x), _rows(z, x), _rows(dout, x)
    programs = min(rows.shape[0], _PROGRAMS)
    share = -(-rows.shape[0] // programs)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dz = dx if z is None else torch.empty(z.shape, dtype=z.dtype, device=x.device)
    dweight = x.new_empty((programs, channels), dtype=torch.float32)
    dbias = dweight if bias is None else torch.empty_like(dweight)
    block = _triton.power_of_two(group_size)
    gated_norm_backward[programs, channels // group_size](
        dout, rows, gate, weight, weight if bias is None else bias, dx, dz, dweight, dbias, dout_row, x_row, z_row,
        rows.shape[0], share, channels, group_size, eps,
        BLOCK=block, GATE=z is not None, BEFORE=norm_before_gate, BIAS=bias is not None, RMS=rms,
        num_warps=_warps(block),
    )  # fmt: skip
    return dx, dweight.sum(0), None if bias is None else dbias.sum(0), None if z is None else dz


def _supports_add(x, residual, weight, bias, eps, rms, residual_in_fp32) -> str | None:
    if x.dtype == torch.float64 or (residual is not None and residual.dtype == torch.float64):
        return "float64"
    if x.numel() == 0:
        return "no rows"
    return f"{x.shape[-1]} channels" if x.shape[-1] > _MAX_CHANNELS else None


def add_forward(x, residual, weight, bias, eps, rms, residual_in_fp32):
    """Compute the op ``visionmamba::add_norm``."""
    from visionmamba.kernels.triton.norm import add_norm

    from .norm import residual_dtype

    size = x.shape[-1]
    (rows, x_row), (stream, residual_row) = _rows(x, x), _rows(residual, x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(x.shape, dtype=residual_dtype(x, residual, residual_in_fp32), device=x.device)
    block = _triton.power_of_two(size)
    add_norm[(rows.shape[0],)](
        rows, stream, weight, weight if bias is None else bias, out, total, x_row, residual_row, size, eps,
        BLOCK=block, RESIDUAL=residual is not None, BIAS=bias is not None, RMS=rms, num_warps=_warps(block),
    )  # fmt: skip
    return out, total


def add_backward(dout, dtotal, x, residual, weight, bias, eps, rms, residual_in_fp32):
    """Compute the gradients of the sum x + residual, weight and bias; None for an absent one."""
    from visionmamba.kernels.triton.norm import add_norm_backward

    size = x.shape[-1]
    (rows, x_row), (stream, residual_row) = _rows(x, x), _rows(residual, x)
    (dout, dout_row), (total, total_row) = _rows(dout, x), _rows(dtotal, x)
    programs = min(rows.shape[0], _PROGRAMS)
    share = -(-rows.shape[0] // programs)
    dsum = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    dweight = x.new_empty((programs, size), dtype=torch.float32)
    dbias = dweight if bias is None else torch.empty_like(dweight)
    block = _triton.power_of_two(size)
    add_norm_backward[(programs,)](
        dout, total, rows, stream, weight, dsum, dweight, dbias, dout_row, total_row, x_row, residual_row,
        rows.shape[0], share, size, eps,
        BLOCK=block, RESIDUAL=residual is not None, TOTAL=dtotal is not None, BIAS=bias is not None, RMS=rms,
        num_warps=_warps(block),
    )  # fmt: skip
    return dsum, dweight.sum(0), None if bias is None else dbias.sum(0)


for _op, _forward, _backward, _supports in (
    ("gated_norm", gated_forward, gated_backward, _supports_gated),
    ("add_norm", add_forward, add_backward, _supports_add),
):
    register_implementation(
        Implementation(_op, "triton", _triton.device_types(), _forward, _backward, _triton.probe, _supports)
    )
