"""The pyramid that plain backbones need under heads made for four strides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from mmengine.registry import MODELS

from ..layers import SimpleFeaturePyramid

__all__ = ["VisionMambaFeaturePyramid"]

_LEVELS = 4


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
