"""Patches of images and tubelets of clips, as a grid of tokens of any rank."""

# no "from __future__ import annotations": FX copies forward's annotations into the code that TorchScript then reads

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from .checks import check_input
from .disjoint_patches import is_product_of_patches, product_of_patches

__all__ = ["GridPatchEmbed"]

torch.fx.wrap("check_input")  # FX looks for leaf functions where forward is defined


class GridPatchEmbed(nn.Module):
    """Patches of an image or tubelets of a clip, by one convolution.

    Args:
        patch_size: Size of a patch along each axis: (rows, columns) or (frames, rows, columns).
        in_chans: Channels of the input.
        embed_dim: Channels of the tokens, C.
        pad: Pad the end of each axis with zeros to whole patches; otherwise what does not fill a patch is not read.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(
        self, patch_size: tuple[int, ...], in_chans: int, embed_dim: int, pad: bool, device=None, dtype=None
    ) -> None:
        super().__init__()
        convolution = nn.Conv2d if len(patch_size) == 2 else nn.Conv3d
        self.patch_size, self.pad = list(patch_size), pad
        self.minimum = [1] * len(patch_size) if pad else self.patch_size
        self.layout = "(B, channels, height, width)" if len(patch_size) == 2 else "(B, channels, frames, height, width)"
        self.projection = convolution(in_chans, embed_dim, patch_size, patch_size, device=device, dtype=dtype)

    @torch.jit.ignore
    def grid_size(self, input_size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the grid of tokens of an input size."""
        whole = math.ceil if self.pad else math.floor
        grid = tuple(whole(size / patch) for size, patch in zip(input_size, self.patch_size, strict=True))
        if min(grid) < 1:
            raise ValueError(f"input size: expected at least {self.patch_size}, got {list(input_size)}")
        return grid

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embed ``(B, in_chans, *input_size)`` as ``(B, *grid, C)``."""
        x = check_input(x, self.layout, self.minimum)
        if self.pad:
            padding: list[int] = []
            for i in range(len(self.patch_size)):  # from the last axis to the first
                patch = self.patch_size[-1 - i]
                padding += [0, (patch - x.shape[-1 - i] % patch) % patch]
            x = F.pad(x, padding)
        if not torch.jit.is_scripting():
            if is_product_of_patches(x, self.projection):
                return product_of_patches(x, self.projection)
        return self.projection(x).movedim(1, -1)
