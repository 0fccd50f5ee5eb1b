"""The whole Mamba block between its two outer projections as one function: mamba_ssm's ``mamba_inner_fn``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .causal_conv1d import causal_conv1d
from .norm import rms_norm_fn
from .selective_scan import selective_scan_fn

__all__ = ["mamba_inner_fn"]


def _projection(rows: Tensor, bias: Tensor | None, norm_weight: Tensor | None, eps: float, is_complex: bool) -> Tensor:
    """Turn rows of B or C, (B, L, N), into (B, 1, N, L); of complex ones, (B, L, 2N), into (B, 1, N, 2L)."""
    if bias is not None:
        rows = rows + bias.to(rows.dtype)
    if norm_weight is not None:
        rows = rms_norm_fn(rows, norm_weight, None, eps=eps)
    if is_complex:
        rows = rows.unflatten(-1, (-1, 2)).transpose(1, 2).flatten(2)  # (B, N, 2L): real and imaginary interleaved
        return rows.unsqueeze(1)
    return rows.transpose(1, 2).unsqueeze(1)


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """Convolve, project, scan, gate and project out: mamba_ssm's function of the same name.

    With R the rank of the step size's projection and N the number of states::

        x        = silu(causal depthwise convolution of x)
        dt, B, C = x_proj x                                   (R, N, N; B and C only where they are not given)
        y        = selective scan of x with delta_proj dt, gated by silu(z)
        out      = out_proj y

    Args:
        xz: Input and gate, ``(B, 2 D, L)``; a transposed view of ``(B, L, 2 D)`` is not copied.
        conv1d_weight: Filters, ``(D, 1, W)``.
        conv1d_bias: ``(D,)``.
        x_proj_weight: ``(R + 2 N, D)``; without N rows for each of ``B`` and ``C`` that is given, and with twice as
            many for a complex ``A``.
        delta_proj_weight: ``(D, R)``.
        out_proj_weight: ``(d_model, D)``.
        out_proj_bias: ``(d_model,)``.
        A: Diagonal of the state matrix, ``(D, N)``, real or complex.
        B: Input projection in a form of :func:`visionmamba.ops.selective_scan_fn`; computed from x if absent.
        C: Output projection, in the same way.
        D: Skip weight, ``(D,)``.
        delta_bias: ``(D,)``.
        B_proj_bias: Added to the computed B, ``(N,)``.
        C_proj_bias: Added to the computed C, ``(N,)``.
        delta_softplus: Apply softplus to the step sizes.
        checkpoint_lvl: Kept for compatibility: what is saved for backward does not depend on it.
        b_rms_weight: RMSNorm of the computed B, ``(N,)``.
        c_rms_weight: RMSNorm of the computed C, ``(N,)``.
        dt_rms_weight: RMSNorm of dt: ``(R,)`` before ``delta_proj_weight`` or ``(D,)`` after it.
        b_c_dt_rms_eps: Epsilon of these norms.

    Returns:
        ``(B, L, d_model)``.

    Raises:
        ValueError: A shape does not fit.

    Source:
        mamba_ssm 2.3, ``ops/selective_scan_interface.py`` (interface).
    """
    rank, is_complex = delta_proj_weight.shape[1], A.is_complex()
    width = A.shape[1] * (2 if is_complex else 1)
    sizes = [rank, 0 if B is not None else width, 0 if C is not None else width]
    if x_proj_weight.shape[0] != sum(sizes):
        raise ValueError(
            f"x_proj_weight: expected {sum(sizes)} rows (dt, B, C: {sizes}), got shape {tuple(x_proj_weight.shape)}"
        )
    x, z = xz.transpose(1, 2).chunk(2, dim=-1)  # (B, L, D) each
    bias = None if conv1d_bias is None else conv1d_bias.unsqueeze(0)
    x = causal_conv1d(x, conv1d_weight.squeeze(1).unsqueeze(0), bias)[0].squeeze(2)  # K = 1 direction
    dt, rows_B, rows_C = F.linear(x, x_proj_weight).split(sizes, dim=-1)
    if dt_rms_weight is not None and dt_rms_weight.shape[0] == rank:
        dt = rms_norm_fn(dt, dt_rms_weight, None, eps=b_c_dt_rms_eps)
    delta = F.linear(dt, delta_proj_weight)
    if dt_rms_weight is not None and dt_rms_weight.shape[0] != rank:
        delta = rms_norm_fn(delta, dt_rms_weight, None, eps=b_c_dt_rms_eps)
    if B is None:
        B = _projection(rows_B, B_proj_bias, b_rms_weight, b_c_dt_rms_eps, is_complex)
    if C is None:
        C = _projection(rows_C, C_proj_bias, c_rms_weight, b_c_dt_rms_eps, is_complex)
    y = selective_scan_fn(
        x.transpose(1, 2), delta.transpose(1, 2), A, B, C, D, z.transpose(1, 2), delta_bias, delta_softplus
    )
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)
