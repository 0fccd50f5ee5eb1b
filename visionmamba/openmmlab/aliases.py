"""Backbones under the names and with the arguments of the authors' own configs.

What they build is :class:`VisionMambaBackbone`; new configs say that. ``PlainMambaAdapter`` is a name of
:class:`VisionMambaAdapter`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmcv.cnn import build_norm_layer
from mmengine.registry import MODELS

from ..layers import SimpleFeaturePyramid
from ..models import vim, vmamba
from .backbone import VisionMambaBackbone

__all__ = ["MM_VSSM", "PlainMambaSeg", "VisionMambaSeg"]


def _init_cfg(pretrained: str | None, init_cfg: dict | None) -> dict | None:
    return dict(type="Pretrained", checkpoint=pretrained) if pretrained else init_cfg


@MODELS.register_module()
class MM_VSSM(VisionMambaBackbone):  # noqa: N801
    """VMamba by the authors' constructor arguments.

    Args:
        out_indices: Stages to return.
        pretrained: Path or URL of a checkpoint.
        use_checkpoint: Recompute activations in the backward pass.
        init_cfg: As for :class:`VisionMambaBackbone`.
        **config: The authors' arguments, see :func:`visionmamba.models.vmamba.official_arguments`. Without a
            ``forward_type`` they describe vanilla VMamba. Unknown ones are ignored, as the authors' class does: its
            configs inherit Swin's.
    """

    def __init__(
        self,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        pretrained: str | None = None,
        use_checkpoint: bool = False,
        init_cfg: dict | None = None,
        **config: Any,
    ) -> None:
        base = "vmamba_tiny_s1l8"
        if "forward_type" not in config:
            base, config["forward_type"] = "vanilla_vmamba_tiny", "v0"
        config.pop("num_classes", None)
        if isinstance(config.get("dims"), int):
            config["dims"] = tuple(config["dims"] * 2**i for i in range(len(config.get("depths", range(4)))))
        arguments = vmamba.official_arguments(**config)
        super().__init__(
            base, out_indices, with_cp=use_checkpoint, init_cfg=_init_cfg(pretrained, init_cfg), **arguments
        )


@MODELS.register_module()
class PlainMambaSeg(VisionMambaBackbone):
    """PlainMamba by the authors' name of its size.

    Args:
        arch: ``"L1"``, ``"L2"`` or ``"L3"``.
        pretrained: Path or URL of a checkpoint.
        convert_syncbn: Nothing here: mmengine's ``sync_bn`` converts a whole model.
        init_cfg: As for :class:`VisionMambaBackbone`.
        **kwargs: Other arguments of :class:`VisionMambaBackbone`.

    Raises:
        ValueError: The size is another.
    """

    def __init__(
        self,
        arch: str = "L1",
        pretrained: str | None = None,
        convert_syncbn: bool = False,
        init_cfg: dict | None = None,
        **kwargs: Any,
    ) -> None:
        if arch not in ("L1", "L2", "L3"):
            raise ValueError(f"arch: expected L1, L2 or L3, got {arch!r}")
        super().__init__(f"plainmamba_{arch.lower()}", init_cfg=_init_cfg(pretrained, init_cfg), **kwargs)


@MODELS.register_module()
class VisionMambaSeg(VisionMambaBackbone):
    """Vim's segmentation backbone by the authors' constructor arguments: the pyramid is a part of it.

    Args:
        out_indices: Four blocks, for the maps of strides 4, 8, 16 and 32.
        use_residual_as_feature: Return the residual stream instead of the mixers' outputs.
        last_layer_process: ``"add"`` with the residual stream, ``"none"`` otherwise: what it already is.
        pretrained: Path or URL of a checkpoint.
        img_size: Size in pixels of the position embedding.
        norm_cfg: Norm of the pyramid; ``SyncBN`` as the authors have it.
        init_cfg: As for :class:`VisionMambaBackbone`.
        **flags: The authors' arguments, see :func:`visionmamba.models.vim.official_arguments`.

    Raises:
        ValueError: The number of outputs is not four.
    """

    adapter_parts = ("fpn1.", "fpn2.")

    def __init__(
        self,
        out_indices: Sequence[int] = (5, 11, 17, 23),
        use_residual_as_feature: bool = False,
        last_layer_process: str = "none",
        pretrained: str | None = None,
        img_size: int = 224,
        norm_cfg: dict | None = None,
        init_cfg: dict | None = None,
        **flags: Any,
    ) -> None:
        if len(out_indices) != 4:
            raise ValueError(f"out_indices: expected 4 blocks, got {out_indices!r}")
        flags.pop("num_classes", None)
        super().__init__(
            "vim_tiny_patch16_224",
            out_indices,
            img_size=img_size,
            init_cfg=_init_cfg(pretrained, init_cfg),
            feature_stream="residual" if use_residual_as_feature else "mixer",
            **vim.official_arguments(**flags),
        )
        norm_cfg = norm_cfg or dict(type="SyncBN")
        pyramid = SimpleFeaturePyramid(
            self.num_features[0], norm_layer=lambda size, **_: build_norm_layer(norm_cfg, size)[1]
        )
        self.fpn1, self.fpn2, self.fpn3, self.fpn4 = pyramid.fpn1, pyramid.fpn2, pyramid.fpn3, pyramid.fpn4

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return maps ``(B, C, H, W)`` of strides 4, 8, 16 and 32 of images ``(B, in_chans, height, width)``."""
        levels = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        return tuple(level(feature) for level, feature in zip(levels, super().forward(x), strict=True))
