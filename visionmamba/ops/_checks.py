"""Argument checks that operators share: one sentence each, with the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_shape(name: str, tensor: torch.Tensor, expected: Sequence[int]) -> None:
    """Raise ValueError unless ``tensor`` has the expected shape."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name}: expected shape {tuple(expected)}, got {tuple(tensor.shape)}")


def check_dtype(name: str, tensor: torch.Tensor, expected: Sequence[torch.dtype] | None = None) -> None:
    """Raise TypeError unless ``tensor`` has one of the expected dtypes (default: any floating dtype)."""
    expected = _FLOATING if expected is None else expected
    if tensor.dtype not in expected:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in expected)
        raise TypeError(f"{name}: expected dtype {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_same_device(**tensors: torch.Tensor | None) -> None:
    """Raise ValueError unless all given tensors are on one device."""
    first, device = None, None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise ValueError(f"{name}: expected device {device} (that of {first}), got {tensor.device}")
