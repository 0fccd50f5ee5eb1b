"""Norm modules of the language models, on the fused norms of :mod:`visionmamba.ops`."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from ..ops import layer_norm_fn, rmsnorm_fn

__all__ = ["RMSNorm", "RMSNormGated", "add_norm"]


class RMSNorm(nn.Module):
    """RMSNorm with a weight, and the addition to the residual stream before it (Zhang & Sennrich 2019).

    Args:
        hidden_size: Channels, D.
        eps: Added to the mean square.
        dropout_p: Dropout of the input before the addition, in training.
        zero_centered_weight: Store the weight minus one.
        device: Where to create the weight.
        dtype: Its dtype.

    Source:
        Interface of mamba_ssm 2.3, ``ops/triton/layer_norm.py``.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        zero_centered_weight: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.eps, self.dropout_p, self.zero_centered_weight = eps, dropout_p, zero_centered_weight
        initial = torch.zeros if zero_centered_weight else torch.ones
        self.weight = nn.Parameter(initial(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise ``x``, or its sum with the residual stream.

        Args:
            x: ``(..., D)``.
            residual: Residual stream, the shape of ``x``.
            prenorm: Also return the sum.
            residual_in_fp32: Begin the residual stream in float32.

        Returns:
            The shape and dtype of ``x``; with ``prenorm`` also the sum.
        """
        return layer_norm_fn(
            x, self.weight, None, residual, eps=self.eps, dropout_p=self.dropout_p if self.training else 0.0,
            prenorm=prenorm, residual_in_fp32=residual_in_fp32, zero_centered_weight=self.zero_centered_weight,
            is_rms_norm=True,
        )  # fmt: skip


def add_norm(
    x: Tensor, residual: Tensor | None, norm: nn.Module, residual_in_fp32: bool = False
) -> tuple[Tensor, Tensor]:
    """Add ``x`` to the residual stream and normalise the sum.

    Args:
        x: ``(..., D)``.
        residual: Residual stream; None at the first layer.
        norm: :class:`RMSNorm`, ``nn.LayerNorm``, or any other module that maps ``(..., D)`` to itself.
        residual_in_fp32: Begin the residual stream in float32.

    Returns:
        The normalised sum in the dtype of ``x``, and the sum.
    """
    if isinstance(norm, RMSNorm):
        return norm(x, residual, prenorm=True, residual_in_fp32=residual_in_fp32)
    if isinstance(norm, nn.LayerNorm) and norm.elementwise_affine:
        return layer_norm_fn(
            x, norm.weight, norm.bias, residual, eps=norm.eps, prenorm=True, residual_in_fp32=residual_in_fp32
        )
    total = x if residual is None else x + residual
    return norm(total.to(x.dtype)), total.float() if residual_in_fp32 else total


class RMSNormGated(nn.Module):
    """RMSNorm gated by silu(z), before or after the norm (Mamba-2).

    Args:
        hidden_size: Channels.
        eps: Added to the mean square.
        group_size: Statistics over groups of this many channels; all if absent.
        norm_before_gate: ``norm(x) * silu(z)`` instead of ``norm(x * silu(z))``.
        device: Where to create the weight.
        dtype: Its dtype.

    Source:
        Interface of mamba_ssm 2.3, ``RMSNorm`` of ``ops/triton/layernorm_gated.py``.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return rmsnorm_fn(x, self.weight, None, z, self.eps, self.group_size, self.norm_before_gate)
