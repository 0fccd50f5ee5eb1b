"""Norms over the channels of channels-last tokens: PyTorch's, run by one kernel on GPUs that have it.

Under autocast PyTorch's norms return float32, which a linear layer then casts. A norm that says what reads it leaves
that copy out: see :func:`before_linear`. Compiled, exported and scripted models keep PyTorch's own operators: compilers
fuse them with their surroundings.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_function

from ..ops.channel_norm import channel_norm
from .fusion import fuses, unwatched

__all__ = ["LayerNorm", "add_norm", "add_stream_norm", "before_linear"]


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
        if fuses(x, compiled=False) and (autocast or x.dtype == weight.dtype):
            dtype = torch.promote_types(x.dtype, torch.float32) if autocast else x.dtype
            return channel_norm(x, weight, bias, eps, dtype=_narrowed(dtype, narrow))[0]
    return F.layer_norm(x, [x.shape[-1]], weight, bias, eps)


@torch.fx.wrap
@register_notrace_function
def stream_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float | None, rms: bool, narrow: bool
) -> torch.Tensor:
    """Normalise a residual stream ``(..., C)``; returns the weight's dtype.

    Args:
        x: Rows.
        weight: ``(C,)``.
        bias: ``(C,)``.
        eps: Added to the variance (mean square); the precision of ``x`` if absent.
        rms: By the mean square alone.
        narrow: Under autocast, return its dtype.
    """
    if not torch.jit.is_scripting():
        if fuses(x, compiled=False):
            eps = torch.finfo(x.dtype).eps if eps is None else eps
            return channel_norm(x, weight, bias, eps, rms, dtype=_narrowed(weight.dtype, narrow))[0]
    if rms:
        return F.rms_norm(x, [x.shape[-1]], weight.to(x.dtype), eps).to(weight.dtype)
    wide_bias = None if bias is None else bias.to(x.dtype)
    return F.layer_norm(x, [x.shape[-1]], weight.to(x.dtype), wide_bias, 1e-5 if eps is None else eps).to(weight.dtype)


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


def _joins(x: torch.Tensor, added: torch.Tensor, norm: nn.Module) -> bool:
    """Whether an addition to a stream and the norm after it are one operator."""
    if type(norm) is not LayerNorm or not unwatched(norm) or not fuses(x, compiled=False):
        return False
    return x.shape == added.shape and x.dtype == torch.promote_types(x.dtype, added.dtype)


def add_norm(x: torch.Tensor, added: torch.Tensor | None, norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``x + added`` and its norm, from one operator where that can be.

    Args:
        x: Residual stream, ``(..., C)``.
        added: What a block adds to it; None for nothing.
        norm: The norm.
    """
    if added is None:
        return x, norm(x)
    if not _joins(x, added, norm):
        x = x + added
        return x, norm(x)
    dtype = _narrowed(x.dtype, norm.narrow)
    out, total = channel_norm(x, norm.weight, norm.bias, norm.eps, added=added, dtype=dtype)
    return total, out


def add_stream_norm(
    x: torch.Tensor, added: torch.Tensor | None, scale: float, norm: nn.Module
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``x + scale * added`` and its norm from one operator.

    Args:
        x: Residual stream, ``(..., C)``.
        added: What a block adds to it, no wider; None for nothing.
        scale: Its factor.
        norm: A norm of residual streams, see :data:`visionmamba.layers.STREAM_NORMS`.
    """
    if added is None:
        return x, norm(x)
    rms, dtype = isinstance(norm, nn.RMSNorm), _narrowed(norm.weight.dtype, norm.narrow)
    eps, bias = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps, None if rms else norm.bias
    out, total = channel_norm(x, norm.weight, bias, eps, rms, added, scale, dtype)
    return total, out
