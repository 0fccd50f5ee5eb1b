"""Scratch memory of the plain PyTorch operators."""

from __future__ import annotations

import math
import threading

import torch

__all__ = ["scratch"]

_KEPT_ELEMENTS = 1 << 22
"""The largest buffer that is kept from call to call."""

_kept = threading.local()


def scratch(name: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return uninitialised memory, valid until the same thread asks for the same name again.

    On a CPU the memory is kept from call to call: an allocator gives large buffers back to the system, and touching
    fresh pages can cost more than the arithmetic. Elsewhere PyTorch's caching allocators do the same.

    Args:
        name: Name of the buffer.
        shape: Its shape.
        device: Its device.
        dtype: Its dtype.

    Returns:
        A contiguous tensor.
    """
    size = math.prod(shape)
    if device.type != "cpu" or size > _KEPT_ELEMENTS:
        return torch.empty(shape, device=device, dtype=dtype)
    buffers = _kept.__dict__
    if (name, dtype) not in buffers or buffers[name, dtype].numel() < size:
        with torch.inference_mode(False):  # the buffer outlives the caller's mode
            buffers[name, dtype] = torch.empty(size, dtype=dtype)
    return buffers[name, dtype][:size].view(shape)
