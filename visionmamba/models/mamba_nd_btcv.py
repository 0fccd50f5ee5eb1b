"""Mamba-ND for the segmentation of volumes (BTCV: 14 classes of abdominal CT): a 3-D trunk under UNETR's decoder.

The decoder is MONAI's (``pip install "visionmamba[medical]"``), of UNETR, Hatamizadeh et al., WACV 2022,
arXiv:2103.10504. See :mod:`.mamba_nd` for the trunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import get_device_dtype
from timm.models import generate_default_cfgs, register_model

from ..layers import check_input
from . import mamba_nd
from ._builder import build_model
from ._checkpoint import strip_prefixes
from ._isotropic import quarter_indices
from ._mamba_nd_official import adapt_input_channels
from .mamba_nd import MambaND

__all__ = ["MambaNDUNETR", "checkpoint_filter_fn", "official_state_dict"]

_NOMINAL_SIZE = 96


def _monai_blocks() -> Any:
    try:
        from monai.networks import blocks
    except ImportError as error:
        raise ImportError(
            'mamba3d_small_btcv needs MONAI for its decoder: pip install "visionmamba[medical]"'
        ) from error
    return blocks


def _placed(module: nn.Module, device, dtype) -> nn.Module:
    return module.to(device=device, dtype=dtype) if device is not None or dtype is not None else module


class UNETRDecoder(nn.Module):
    """UNETR's convolutional decoder for a trunk of stride 16.

    Args:
        in_chans: Channels of the volume.
        embed_dim: Channels of the trunk's features.
        feature_size: Channels at full resolution; they double with each halving.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(self, in_chans: int, embed_dim: int, feature_size: int, device=None, dtype=None) -> None:
        super().__init__()
        blocks = _monai_blocks()
        common = {"spatial_dims": 3, "kernel_size": 3, "norm_name": "instance", "res_block": True}
        lift = {**common, "stride": 1, "upsample_kernel_size": 2, "conv_block": True}
        up = {**common, "upsample_kernel_size": 2}
        size = feature_size
        with torch.device(device or "cpu"):
            self.encoder1 = blocks.UnetrBasicBlock(in_channels=in_chans, out_channels=size, stride=1, **common)
            self.encoder2 = blocks.UnetrPrUpBlock(in_channels=embed_dim, out_channels=2 * size, num_layer=2, **lift)
            self.encoder3 = blocks.UnetrPrUpBlock(in_channels=embed_dim, out_channels=4 * size, num_layer=1, **lift)
            self.encoder4 = blocks.UnetrPrUpBlock(in_channels=embed_dim, out_channels=8 * size, num_layer=0, **lift)
            self.decoder5 = blocks.UnetrUpBlock(in_channels=embed_dim, out_channels=8 * size, **up)
            self.decoder4 = blocks.UnetrUpBlock(in_channels=8 * size, out_channels=4 * size, **up)
            self.decoder3 = blocks.UnetrUpBlock(in_channels=4 * size, out_channels=2 * size, **up)
            self.decoder2 = blocks.UnetrUpBlock(in_channels=2 * size, out_channels=size, **up)
        _placed(self, device, dtype)

    def forward(self, x: torch.Tensor, features: list[torch.Tensor]) -> torch.Tensor:
        """Decode.

        Args:
            x: Volume, ``(B, in_chans, depth, height, width)``, its sizes multiples of 16.
            features: Four of the trunk's, from shallow to deep, ``(B, C, depth/16, height/16, width/16)``.

        Returns:
            ``(B, feature_size, depth, height, width)``.
        """
        shallow, middle, deep, deepest = features
        y = self.decoder5(deepest, self.encoder4(deep))
        y = self.decoder4(y, self.encoder3(middle))
        y = self.decoder3(y, self.encoder2(shallow))
        return self.decoder2(y, self.encoder1(x))


class MambaNDUNETR(MambaND):
    """Segments volumes ``(B, C, depth, height, width)``, of any size: the end is padded to whole patches and cropped.

    The published weights were trained with a quirk of the code: the decoder's deepest feature is the last but one
    block's output, so the last block is never trained. It is kept, frozen, for the checkpoints.

    Args:
        img_size: Nominal size, one number or (height, width). None: that of the loaded checkpoint, 96 without one.
        num_frames: Nominal depth of the volume; the height if absent.
        in_chans: Channels of the volume.
        num_classes: Classes; 0 returns the decoder's features.
        feature_size: Channels of the decoder at full resolution.
        patch_size: Side of a patch; the decoder is made for 16.
        skip_features: Blocks whose outputs the decoder's skip connections take.
        use_last_block: Decode the last block's output; the published weights need the default, the last but one's.
        device: Where to create the parameters.
        dtype: Their dtype.
        **kwargs: Further arguments of :class:`MambaND`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = None,
        num_frames: int | None = None,
        in_chans: int = 1,
        num_classes: int = 14,
        feature_size: int = 32,
        patch_size: int = 16,
        skip_features: tuple[int, int, int] = (6, 12, 18),
        use_last_block: bool = False,
        global_pool: str = "",
        device=None,
        dtype=None,
        **kwargs: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        if patch_size != 16:
            raise ValueError(f"patch_size: expected 16, for which UNETR's decoder is made, got {patch_size}")
        if global_pool:
            raise ValueError(f"global_pool: expected none for segmentation, got {global_pool!r}")
        size = img_size or _NOMINAL_SIZE
        super().__init__(
            img_size=size,
            num_frames=num_frames or (size if isinstance(size, int) else size[0]),
            patch_size=patch_size,
            tubelet_size=patch_size,
            in_chans=in_chans,
            num_classes=0,
            global_pool="",
            pad_input=True,
            final_norm=False,
            fc_norm_eps=None,
            **dd,
            **kwargs,
        )
        self.size_of_checkpoint = img_size is None
        self.feature_size = self.head_hidden_size = feature_size
        depth = len(self.blocks)
        deepest = depth - 1 if use_last_block else depth - 2
        self.taps = [*skip_features, deepest]
        if sorted(set(self.taps)) != self.taps or skip_features[0] < 0:
            raise ValueError(f"skip_features: expected increasing blocks before block {deepest}, got {skip_features}")
        self.blocks[deepest + 1 :].requires_grad_(False)
        self.decoder = UNETRDecoder(in_chans, self.embed_dim, feature_size, **dd)
        self.reset_classifier(num_classes)

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last convolution; 0 classes return the decoder's features."""
        if global_pool:
            raise ValueError(f"global_pool: expected none for segmentation, got {global_pool!r}")
        self.num_classes = num_classes
        head = nn.Identity()
        if num_classes > 0:
            head = _monai_blocks().UnetOutBlock(3, self.feature_size, num_classes)
            head = head.to(**get_device_dtype(self))
        self.head = head
        self.head.train(self.training)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what certain intermediates do not need; with ``prune_head`` also the decoder."""
        take_indices = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.blocks.requires_grad_(True)
        if prune_head:
            self.decoder = None
        return take_indices

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Refuse: the decoder takes the volume and several blocks' features; call the model."""
        raise TypeError("forward_head: segmentation needs the volume and several features, call the model instead")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits ``(B, num_classes, depth, height, width)`` of a volume ``(B, in_chans, ...)``."""
        if self.decoder is None:
            return self.forward_features(x)
        x = check_input(x, "(B, channels, depth, height, width)", [1, 1, 1])
        depth, height, width = x.shape[2:]
        x = F.pad(x, [side for size in (width, height, depth) for side in (0, (16 - size % 16) % 16)])
        features = self.forward_intermediates(x, indices=self.taps, stop_early=True, intermediates_only=True)
        return self.head(self.decoder(x, features))[:, :, :depth, :height, :width]


_TRUNK, _HEAD, _DECODER = "vit.", "out.", ("encoder", "decoder")


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: MambaNDUNETR) -> dict[str, torch.Tensor]:
    """Convert an official checkpoint, or one of this project's, to a model's layout.

    Args:
        state_dict: Official keys (of MONAI's UNETR), or ours.
        model: The model it is for. If it was created without a size it takes the checkpoint's, a cube's.

    Returns:
        The model's state dict.
    """
    state_dict = strip_prefixes(state_dict)
    if any(name.startswith(_TRUNK) for name in state_dict):
        state_dict = {_converted_name(name): tensor for name, tensor in state_dict.items()}
    embed = state_dict.get("pos_embed")
    if embed is not None and model.size_of_checkpoint:
        tokens = embed.shape[1:-1].numel()
        side = 16 * round(tokens ** (1 / 3))
        if (side // 16) ** 3 == tokens:
            model.set_input_size((side, side), num_frames=side)
    return mamba_nd.checkpoint_filter_fn(state_dict, model)


def _fit_input_channels(state_dict: dict[str, torch.Tensor], model: MambaNDUNETR) -> dict[str, torch.Tensor]:
    """Convert a checkpoint, and fit the trunk's and the decoder's first convolutions to other input channels."""
    encoder = "decoder.encoder1.layer"
    convolutions = ("patch_embed.projection", f"{encoder}.conv1.conv", f"{encoder}.conv3.conv")
    return adapt_input_channels(checkpoint_filter_fn(state_dict, model), model, convolutions)


def _converted_name(name: str) -> str:
    if name.startswith(_HEAD):
        return "head." + name.removeprefix(_HEAD)
    return f"decoder.{name}" if name.startswith(_DECODER) else name.removeprefix(_TRUNK)


def official_state_dict(state_dict: dict[str, torch.Tensor], model: MambaNDUNETR) -> dict[str, torch.Tensor]:
    """Convert a model's state dict (or the gradients of its parameters) to the official names and shapes."""
    decoder = {
        name.removeprefix("decoder."): value for name, value in state_dict.items() if name.startswith("decoder.")
    }
    head = {name.replace("head.", _HEAD, 1): value for name, value in state_dict.items() if name.startswith("head.")}
    trunk = {name: value for name, value in state_dict.items() if not name.startswith(("decoder.", "head."))}
    trunk = mamba_nd.official_state_dict(trunk, model)
    return {_TRUNK + name.removeprefix("backbone."): value for name, value in trunk.items()} | decoder | head


default_cfgs = generate_default_cfgs(
    {
        "mamba3d_small_btcv.btcv": {
            "hf_hub_id": "jacklishufan/Mamba-ND",
            "hf_hub_filename": "btcv/mamband-s.pt",
            "num_classes": 14,
            "input_size": (1, _NOMINAL_SIZE, _NOMINAL_SIZE),
            "pool_size": None,
            "mean": (0.0,),
            "std": (1.0,),
            "first_conv": (),  # timm adapts no 3-D convolution: adapt_input_channels does
            "classifier": "head.conv.conv",
            "origin_url": "https://github.com/jacklishufan/Mamba-ND",
            "paper_name": "Mamba-ND: Selective State Space Modeling for Multi-Dimensional Data",
            "paper_ids": "arXiv:2402.05892",
            "description": "CT intensities [-175, 250] scaled to [0, 1], spacing 1.5 x 1.5 x 2 mm",
            "notes": ("dice: 83.1",),
        }
    }
)


@register_model
def mamba3d_small_btcv(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mamba-3D-S with UNETR's decoder for volumes of 96 x 96 x 96: 36 M parameters; ``img_size`` may be 3-D."""
    img_size = kwargs.pop("img_size", None)
    if isinstance(img_size, (tuple, list)) and len(img_size) == 3:  # timm knows two-dimensional sizes
        kwargs["num_frames"], img_size = img_size[0], tuple(img_size[1:])
    if img_size is not None:
        kwargs["img_size"] = img_size
    return build_model(
        MambaNDUNETR,
        "mamba3d_small_btcv",
        pretrained,
        _fit_input_channels,
        pretrained_model_args={"num_frames": _NOMINAL_SIZE, **kwargs.pop("pretrained_model_args", {})},
        **{"embed_dim": 384, "depth": 24, "out_indices": quarter_indices(kwargs.get("depth", 24)), **kwargs},
    )
