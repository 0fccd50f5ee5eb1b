"""Norm modules of the language models, on the fused norms of :mod:`visionmamba.ops`."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from ..ops import layer_norm_fn, rmsnorm_fn

__all__ = ["LayerNorm", "RMSNorm", "RMSNormGated", "add_norm"]


class RMSNorm(nn.Module):
    """RMSNorm of ``(..., dim)`` with a weight (Zhang & Sennrich 2019)."""

    is_rms_norm = True

    def __init__(self, dim: int, eps: float = 1e-5, device=None, dtype=None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        return add_norm(x, None, self)[0]


class LayerNorm(nn.Module):
    """LayerNorm of ``(..., dim)`` with weight and bias."""

    is_rms_norm = False

    def __init__(self, dim: int, eps: float = 1e-5, device=None, dtype=None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return add_norm(x, None, self)[0]


def add_norm(
    x: Tensor, residual: Tensor | None, norm: RMSNorm | LayerNorm, residual_in_fp32: bool = False
) -> tuple[Tensor, Tensor]:
    """Add ``x`` to the residual stream and normalise the sum.

    Args:
        x: ``(..., D)``.
        residual: Residual stream; None at the first layer.
        norm: The norm module.
        residual_in_fp32: Begin the residual stream in float32.

    Returns:
        The normalised sum in the dtype of ``x``, and the sum.
    """
    return layer_norm_fn(
        x, norm.weight, norm.bias, residual, eps=norm.eps, prenorm=True, residual_in_fp32=residual_in_fp32,
        is_rms_norm=norm.is_rms_norm,
    )  # fmt: skip


class RMSNormGated(nn.Module):
    """RMSNorm gated by silu(z), before or after the norm (Mamba-2).

    Args:
        dim: Channels.
        eps: Added to the mean square.
        group_size: Statistics over groups of this many channels; all if absent.
        norm_before_gate: ``norm(x) * silu(z)`` instead of ``norm(x * silu(z))``.
        device: Where to create the weight.
        dtype: Its dtype.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return rmsnorm_fn(x, self.weight, None, z, self.eps, self.group_size, self.norm_before_gate)
