"""The norms that a backbone for detection or segmentation puts on each of its feature maps."""

from __future__ import annotations

import torch
import torch.nn as nn

__all__ = ["OutputNorms"]


class OutputNorms(nn.Module):
    """One norm over channels for each feature map of a backbone.

    Args:
        channels: Channels of the maps.
        norm_layer: Norm over the last dimension.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(self, channels: list[int], norm_layer=nn.LayerNorm, device=None, dtype=None):
        super().__init__()
        self.norms = nn.ModuleList([norm_layer(size, device=device, dtype=dtype) for size in channels])

    def forward(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Normalise maps ``(B, C, H, W)``, which may be views of channels-last ones; returns them contiguous."""
        return [
            norm(feature.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()
            for norm, feature in zip(self.norms, features, strict=True)
        ]
