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

from ..ops.channel_norm import channel_norm, has_kernel
from .fusion import fuses, unwatched

__all__ = ["LayerNorm", "add_norm", "add_stream_norm", "before_linear", "conv_norm"]


def _runs_kernel(x: torch.Tensor) -> bool:
    """Whether a norm of these rows is one kernel."""
    return fuses(x, compiled=not torch.is_grad_enabled()) and has_kernel(x.shape[-1])


def _narrowed(dtype: torch.dtype, narrow: bool) -> torch.dtype:
    """Return the autocast dtype if it is wanted and there is one."""
    return torch.get_autocast_dtype("cuda") if narrow and torch.is_autocast_enabled("cuda") else dtype


def _layer_norm_dtype(x: torch.Tensor, weight: torch.Tensor, narrow: bool) -> torch.dtype | None:
    """Return what PyTorch's layer norm returns on a GPU, narrowed; None where it takes no such arguments."""
    autocast = x.device.type == "cuda" and torch.is_autocast_enabled("cuda")
    if not autocast and x.dtype != weight.dtype:
        return None
    return _narrowed(torch.promote_types(x.dtype, torch.float32) if autocast else x.dtype, narrow)


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
        dtype = _layer_norm_dtype(x, weight, narrow) if _runs_kernel(x) else None
        if dtype is not None:
            return channel_norm(x, weight, bias, eps, dtype=dtype)[0]
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
        if not torch.compiler.is_compiling() and _runs_kernel(x):  # the compiler joins it with the addition before it
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


def conv_norm(x: torch.Tensor, conv: nn.Conv2d, norm: nn.Module) -> torch.Tensor:
    """Return ``norm(conv(x))`` of ``(B, H, W, C)``; where that can be, the norm's operator adds the convolution's bias.

    Args:
        x: The convolution's input.
        conv: A convolution of channels-last maps.
        norm: What follows it.
    """
    joins = type(norm) is LayerNorm and conv.bias is not None and unwatched(conv, norm)
    joins = joins and fuses(x, compiled=not torch.is_grad_enabled())
    if not joins or norm.weight is None or not has_kernel(conv.out_channels):
        return norm(conv(x))
    x = conv._conv_forward(x.permute(0, 3, 1, 2), conv.weight, None).permute(0, 2, 3, 1)
    dtype = _layer_norm_dtype(x, norm.weight, norm.narrow)
    if dtype is None:
        return norm(x + conv.bias)
    return channel_norm(x, norm.weight, norm.bias, norm.eps, dtype=dtype, shift=conv.bias)[0]


def _joins(x: torch.Tensor, added: torch.Tensor, norm: nn.Module) -> bool:
    """Whether an addition to a stream and the norm after it are one operator."""
    if type(norm) is not LayerNorm or not unwatched(norm) or not _runs_kernel(x):
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
