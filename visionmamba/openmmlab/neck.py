"""The pyramids that plain backbones need under heads made for four strides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d

from ..layers import SimpleFeaturePyramid

__all__ = ["ViTDetFeaturePyramid", "VisionMambaFeaturePyramid"]

_LEVELS = 4

MODELS.register_module(name="LayerNorm2d", module=LayerNorm2d)
"""ViTDet's norm of convolutional heads: ``norm_cfg=dict(type="LayerNorm2d")``."""


@MODELS.register_module()
class VisionMambaFeaturePyramid(BaseModule):
    """:class:`visionmamba.layers.SimpleFeaturePyramid` as a neck: maps of stride 16 to strides 4, 8, 16 and 32.

    Args:
        channels: Channels of the backbone's maps, and of the outputs.
        norm_cfg: Norm between the two upsamplings of the first level.
        init_cfg: As for every module of mmengine.
    """

    def __init__(self, channels: int, norm_cfg: dict | None = None, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg=init_cfg)
        norm_cfg = norm_cfg or dict(type="BN")
        self.pyramid = SimpleFeaturePyramid(channels, norm_layer=lambda size, **_: build_norm_layer(norm_cfg, size)[1])

    def forward(self, features: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Resample four maps ``(B, C, H, W)``, or one map to all four strides.

        Raises:
            ValueError: Neither one map is given nor four.
        """
        if len(features) == 1:
            features = [features[0]] * _LEVELS
        if len(features) != _LEVELS:
            raise ValueError(f"features: expected 1 or {_LEVELS} maps, got {len(features)}")
        return tuple(self.pyramid(list(features)))


@MODELS.register_module()
class ViTDetFeaturePyramid(BaseModule):
    """ViTDet's simple feature pyramid as a neck: one map of stride 16 to strides 4, 8, 16, 32 and 64.

    Args:
        in_channels: Channels of the map.
        out_channels: Channels of every output.
        init_cfg: As for every module of mmengine.

    Source:
        Li et al. 2022, "Exploring Plain Vision Transformer Backbones for Object Detection", section 3; the detectors of
        Vim and LocalVim.
    """

    def __init__(self, in_channels: int, out_channels: int = 256, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg=init_cfg)
        half, quarter = in_channels // 2, in_channels // 4
        upsample = [nn.ConvTranspose2d(in_channels, half, 2, stride=2)]
        further = [LayerNorm2d(half), nn.GELU(), nn.ConvTranspose2d(half, quarter, 2, stride=2)]
        resample = [[*upsample, *further], [nn.ConvTranspose2d(in_channels, half, 2, stride=2)], [], [nn.MaxPool2d(2)]]
        self.levels = nn.ModuleList(
            nn.Sequential(
                *layers,
                nn.Conv2d(channels, out_channels, 1, bias=False),
                LayerNorm2d(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                LayerNorm2d(out_channels),
            )
            for layers, channels in zip(resample, (quarter, half, in_channels, in_channels), strict=True)
        )

    def forward(self, features: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Resample the one map ``(B, C, H, W)`` that is given.

        Raises:
            ValueError: Another number of maps is given.
        """
        if len(features) != 1:
            raise ValueError(f"features: expected 1 map, got {len(features)}")
        maps = [level(features[0]) for level in self.levels]
        return (*maps, F.max_pool2d(maps[-1], kernel_size=1, stride=2))
