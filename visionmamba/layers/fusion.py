"""When a layer runs several steps as one operator."""

from __future__ import annotations

import torch
import torch.nn as nn
from timm.layers import is_exporting
from torch.utils._python_dispatch import _get_current_dispatch_mode

__all__ = ["fuses", "unwatched"]


def fuses(x: torch.Tensor, compiled: bool = True) -> bool:
    """Whether a layer's fused operators run: on NVIDIA GPUs, in eager and compiled models.

    What traces, exports or counts a model sees the separate operators, and any other device runs them.

    Args:
        x: The layer's input.
        compiled: Whether in compiled models too; where not, the compiler fuses as well.
    """
    if not isinstance(x, torch.Tensor) or x.device.type != "cuda" or torch.jit.is_tracing() or is_exporting():
        return False
    return compiled if torch.compiler.is_compiling() else _get_current_dispatch_mode() is None


def unwatched(*modules: nn.Module) -> bool:
    """Whether no hook waits for what these modules return, so that they need not run by themselves."""
    return not any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules
    )
