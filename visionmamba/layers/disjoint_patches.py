"""A convolution whose patches do not overlap, as the matrix product that it is."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from .fusion import fuses, unwatched

__all__ = ["is_product_of_patches", "product_of_patches"]


def _dtype(x: torch.Tensor) -> torch.dtype:
    """Return what a convolution of ``x`` is computed in."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def is_product_of_patches(x: torch.Tensor, conv: nn.Module) -> bool:
    """Whether :func:`product_of_patches` may stand in for a convolution: in 16 bits, on GPUs.

    The libraries' convolutions of 16 x 16 pixels with three channels take several times as long. In float32 a
    convolution may use TF32 where a product may not.

    Args:
        x: The convolution's input.
        conv: The convolution.
    """
    if type(conv) not in (nn.Conv2d, nn.Conv3d) or not fuses(x) or not unwatched(conv):
        return False
    disjoint = conv.stride == conv.kernel_size and not any(conv.padding) and conv.groups == 1
    fits = x.dim() == conv.weight.dim() and x.shape[1] == conv.in_channels and x.is_floating_point()
    return disjoint and fits and set(conv.dilation) == {1} and _dtype(x) in (torch.float16, torch.bfloat16)


def product_of_patches(x: torch.Tensor, conv: nn.Module) -> torch.Tensor:
    """Project disjoint patches; values that do not fill a patch are not read.

    Args:
        x: ``(B, in_chans, *input_size)``.
        conv: Has the weights.

    Returns:
        ``(B, *grid, C)``.
    """
    rank = len(conv.kernel_size)
    for i, patch in enumerate(conv.kernel_size):
        axis = 2 + 2 * i  # every axis before it has become two, the grid's and the patch's
        size = x.shape[axis] // patch
        x = x.narrow(axis, 0, size * patch).unflatten(axis, (size, patch))
    grid, patches = range(2, 2 + 2 * rank, 2), range(3, 3 + 2 * rank, 2)
    x = x.permute(0, *grid, 1, *patches).to(_dtype(x), memory_format=torch.contiguous_format)
    return F.linear(x.flatten(-1 - rank), conv.weight.flatten(1), conv.bias)
