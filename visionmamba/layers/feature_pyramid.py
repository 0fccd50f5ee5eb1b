"""Maps of four strides from a plain backbone's maps of one stride."""

from __future__ import annotations

import torch
import torch.nn as nn

__all__ = ["SimpleFeaturePyramid"]


class SimpleFeaturePyramid(nn.Module):
    """Resample four maps of one stride: up by 4, up by 2, unchanged, down by 2.

    Args:
        channels: Channels of the maps; the outputs have as many.
        norm_layer: Norm between the two upsamplings of the first map; ``nn.SyncBatchNorm`` where it is trained on
            several devices.
        device: Where to create the parameters.
        dtype: Their dtype.

    Source:
        Vim's segmentation backbone; the same as BEiT's (Bao et al. 2022), for stride 16: strides 4, 8, 16 and 32.
    """

    def __init__(self, channels: int, norm_layer=nn.BatchNorm2d, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()

        def upsample() -> nn.Module:
            return nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2, **dd)

        self.fpn1 = nn.Sequential(upsample(), norm_layer(channels, **dd), nn.GELU(), upsample())
        self.fpn2 = nn.Sequential(upsample())
        self.fpn3 = nn.Identity()
        self.fpn4 = nn.MaxPool2d(kernel_size=2, stride=2)

    def forward(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Resample four maps ``(B, C, H, W)``."""
        levels = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        return [level(feature) for level, feature in zip(levels, features, strict=True)]
