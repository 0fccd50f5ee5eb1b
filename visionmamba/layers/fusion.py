"""When a layer runs several steps as one operator."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn as nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..ops import cuda_runtime
from ..ops.backend import requested_backend

__all__ = ["fuses", "unwatched"]


@cache
def _kernels_run() -> bool:
    return cuda_runtime.usable() is None


def _is_exporting() -> bool:
    # not torch.compiler.is_exporting(): up to 2.11 the compiler takes that for true wherever it traces
    return torch.compiler._is_exporting_flag


def fuses(x: torch.Tensor, compiled: bool = True) -> bool:
    """Whether a layer's fused operators run: on NVIDIA GPUs, in eager and compiled models.

    What traces, exports or counts a model sees the separate operators; any other device runs them, and so does whoever
    asks for another backend than ``cuda``.

    Args:
        x: The layer's input.
        compiled: Whether in compiled models too; where not, the compiler fuses as well, and its launches wait less for
            Python.
    """
    if not isinstance(x, torch.Tensor) or x.device.type != "cuda" or torch.jit.is_tracing() or _is_exporting():
        return False
    if torch.compiler.is_compiling():
        return compiled
    return _get_current_dispatch_mode() is None and requested_backend() in (None, "cuda") and _kernels_run()


def unwatched(*modules: nn.Module) -> bool:
    """Whether no hook waits for what these modules return, so that they need not run by themselves."""
    return not any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules
    )
