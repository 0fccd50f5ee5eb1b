"""Norms over the channels of channels-last tokens: PyTorch's, run by one kernel on GPUs that have it.

Under autocast PyTorch's norms return float32, which a linear layer then casts. A norm that says what reads it leaves
that copy out: see :func:`before_linear`. Compiled, exported and scripted models keep PyTorch's own operators: compilers
fuse them with their surroundings.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import is_exporting, register_notrace_function

from ..ops.channel_norm import channel_norm

__all__ = ["LayerNorm", "before_linear"]


def _fuses(x: torch.Tensor) -> bool:
    """Whether the operator runs in place of PyTorch's."""
    if x.device.type != "cuda" or torch.compiler.is_compiling() or torch.jit.is_tracing() or is_exporting():
        return False
    return x.dim() > 1


def _narrowed(dtype: torch.dtype, narrow: bool) -> torch.dtype:
    """Return the autocast dtype if it is wanted and there is one."""
    return torch.get_autocast_dtype("cuda") if narrow and torch.is_autocast_enabled("cuda") else dtype


@torch.fx.wrap
@register_notrace_function
def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, narrow: bool
) -> torch.Tensor:
    """Normalise ``(..., C)``.

    Args:
        x: Rows.
        weight: ``(C,)``.
        bias: ``(C,)``.
        eps: Added to the variance.
        narrow: Under autocast, return its dtype and not float32.
    """
    if not torch.jit.is_scripting():
        autocast = x.device.type == "cuda" and torch.is_autocast_enabled("cuda")
        if _fuses(x) and (autocast or x.dtype == weight.dtype):
            dtype = torch.promote_types(x.dtype, torch.float32) if autocast else x.dtype
            return channel_norm(x, weight, bias, eps, dtype=_narrowed(dtype, narrow))[0]
    return F.layer_norm(x, [x.shape[-1]], weight, bias, eps)


@torch.fx.wrap
@register_notrace_function
def stream_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, rms: bool, narrow: bool
) -> torch.Tensor:
    """Normalise a residual stream ``(..., C)``; returns the weight's dtype.

    Args:
        x: Rows.
        weight: ``(C,)``.
        bias: ``(C,)``.
        eps: Added to the variance (mean square).
        rms: By the mean square alone.
        narrow: Under autocast, return its dtype.
    """
    if not torch.jit.is_scripting() and _fuses(x):
        return channel_norm(x, weight, bias, eps, rms, dtype=_narrowed(weight.dtype, narrow))[0]
    if rms:
        return F.rms_norm(x, [x.shape[-1]], weight.to(x.dtype), eps).to(weight.dtype)
    wide_bias = None if bias is None else bias.to(x.dtype)
    return F.layer_norm(x, [x.shape[-1]], weight.to(x.dtype), wide_bias, eps).to(weight.dtype)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension; arguments and parameters are ``nn.LayerNorm``'s."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.narrow = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``(..., C)``."""
        return layer_norm(x, self.weight, self.bias, self.eps, self.narrow)


def before_linear(norm: nn.Module) -> nn.Module:
    """Let a norm return what a linear layer reads: under autocast, the autocast dtype. Other modules stay as they are.

    Args:
        norm: A norm, or anything else.

    Returns:
        The module given.
    """
    if hasattr(norm, "narrow"):
        norm.narrow = True
    return norm
