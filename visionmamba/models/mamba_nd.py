"""Mamba-ND: plain one-directional Mamba layers on images and videos, whose axis order alternates from layer to layer.

Paper: "Mamba-ND: Selective State Space Modeling for Multi-Dimensional Data", Li et al., ECCV 2024, arXiv:2402.05892.
Weights: https://huggingface.co/jacklishufan/Mamba-ND (without a licence; this file is written from published facts).

What the paper is about: no layer scans in more than one direction; each walks the whole grid in one order of its axes,
and the next layer in another: rows forwards, rows backwards, columns forwards, columns backwards (2-D, a cycle of
four); frames-rows-columns, frames-columns-rows, columns-rows-frames, each forwards and backwards (3-D, a cycle of six).
The published weights were trained with a quirk of the code: the skip starts from the normalised tokens,

    y = LayerNorm(x),    block(x) = y + Mamba(y),

see ``skip_from_input``. :mod:`.mamba_nd_btcv` has the model for the segmentation of volumes.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, calculate_drop_path_rates, to_2tuple, trunc_normal_
from timm.models import generate_default_cfgs, register_model

from ..layers import GatedMixer, GridPatchEmbed, LayerNorm, SelectiveSSM, before_linear
from ..layers.norm import add_norm
from ..ops.scan_path import scan_path
from ._builder import build_model
from ._isotropic import GridModel, quarter_indices
from ._mamba_nd_official import adapt_input_channels, checkpoint_filter_fn, inflate, official_state_dict

__all__ = ["MambaND", "checkpoint_filter_fn", "inflate", "official_state_dict"]

IMAGE_PATHS = ("h", "h_flip", "v", "v_flip")
VIDEO_PATHS = ("thw", "thw_flip", "twh", "twh_flip", "wht", "wht_flip")


class MambaMixer(GatedMixer):
    """Mamba's gated scan along one path.

    Args:
        dim: Channels of the tokens, C.
        path: Scan path.
        d_state: States a channel, N.
        d_conv: Taps of the causal convolution.
        expand: The scan runs over ``expand * dim`` channels.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(
        self, dim: int, path: str, d_state: int = 16, d_conv: int = 4, expand: int = 2, device=None, dtype=None
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        dt_rank = math.ceil(dim / 16)
        super().__init__(dim, lambda d_inner: SelectiveSSM(d_inner, d_state, dt_rank, path, d_conv, **dd), expand, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix tokens ``(B, *grid, C)``."""
        grid = x.shape[1:-1]
        return self.mix(x.flatten(1, -2), grid).unflatten(1, grid)


class PatchMerging(nn.Module):
    """Halve a 2-D grid, keeping the channels: each token is a norm and a projection of a 2x2 neighbourhood.

    Args:
        dim: Channels, C.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.norm = before_linear(LayerNorm(4 * dim, eps=1e-5, device=device, dtype=dtype))
        self.reduction = nn.Linear(4 * dim, dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(B, H, W, C)`` to ``(B, ceil(H/2), ceil(W/2), C)``, padding an odd side with zeros."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, H/2, 2, W/2, 2, C)
        x = x.permute(0, 1, 3, 5, 2, 4).flatten(3)  # neighbourhoods are channel-major, (C, 2, 2), unlike Swin's
        return self.reduction(self.norm(x))


class MambaNDBlock(nn.Module):
    """Norm, one-directional mixer, skip.

    Args:
        dim: Channels, C.
        path: Scan path of this block.
        skip_from_input: The skip takes the block's input, as in a usual pre-norm block; by default it takes the
            normalised input, which the published weights need.
        proj_drop: Dropout after the mixer.
        drop_path: Probability of skipping the mixer.
        downsample: Halve the grid after this block.
        device: Where to create the parameters.
        dtype: Their dtype.
        **mixer_kwargs: Further arguments of :class:`MambaMixer`.
    """

    def __init__(
        self,
        dim: int,
        path: str,
        skip_from_input: bool = False,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        downsample: bool = False,
        device=None,
        dtype=None,
        **mixer_kwargs: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.skip_from_input = skip_from_input
        self.norm = LayerNorm(dim, eps=1e-5, **dd)
        self.mixer = MambaMixer(dim, path, **mixer_kwargs, **dd)
        self.drop = nn.Dropout(proj_drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.downsample = PatchMerging(dim, **dd) if downsample else nn.Identity()

    @torch.jit.unused
    def step(self, x: torch.Tensor, pending: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the stream and what this block has still to add to it; see ``layers/joined_blocks.py``."""
        x, y = add_norm(x, pending, self.norm)
        skip, mixed = x if self.skip_from_input else y, self.drop_path(self.drop(self.mixer(y)))
        return (skip, mixed) if isinstance(self.downsample, nn.Identity) else (self.downsample(skip + mixed), None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens ``(B, *grid, C)`` to the same, or to half the grid."""
        y = self.norm(x)
        skip = x if self.skip_from_input else y
        return self.downsample(skip + self.drop_path(self.drop(self.mixer(y))))


class MambaND(GridModel):
    """Mamba-ND on images ``(B, C, H, W)`` or, with ``num_frames``, on clips ``(B, C, T, H, W)``.

    Args:
        img_size: Nominal image size; others are taken as well, by interpolating the position embedding.
        num_frames: Nominal number of frames; likewise. None for images.
        patch_size: Side of a patch.
        tubelet_size: Frames of a patch.
        in_chans: Channels of the input.
        num_classes: Classes; 0 for no classifier.
        global_pool: ``avg``, ``max``, ``avgmax`` or empty for none.
        embed_dim: Channels of the tokens, C.
        depth: Number of blocks.
        paths: Scan path of each block, or a cycle of them that divides ``depth``; the family's cycle if absent.
        downsample_layers: Blocks after which the grid is halved (images only).
        d_state: States a channel, N.
        pad_input: Pad the input's end to whole patches; otherwise what does not fill a patch is not read. The authors
            pad images and do not pad clips, which is the default.
        final_norm: Norm of the tokens after the last block.
        fc_norm_eps: Epsilon of a norm after the pooling; None for no such norm.
        skip_from_input: See :class:`MambaNDBlock`; the published weights need the default.
        inflate_copies: When weights of a 2-D model are loaded into a 3-D one, whose cycle has two blocks more: fill
            them from the cycle's two blocks before. By default they keep their initial values.
        head_init_std: Standard deviation of the classifier's initial weights.
        drop_rate: Dropout before the classifier.
        pos_drop_rate: Dropout after the position embedding.
        proj_drop_rate: Dropout after each mixer.
        drop_path_rate: Stochastic depth of the last block; the blocks before it rise to it linearly.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        num_frames: int | None = None,
        patch_size: int = 8,
        tubelet_size: int = 1,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 384,
        depth: int = 24,
        paths: tuple[str, ...] | None = None,
        downsample_layers: tuple[int, ...] = (),
        d_state: int = 16,
        pad_input: bool | None = None,
        final_norm: bool = True,
        fc_norm_eps: float | None = 1e-6,
        skip_from_input: bool = False,
        inflate_copies: bool = False,
        head_init_std: float = 2e-5,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        rank = 2 if num_frames is None else 3
        if downsample_layers and rank != 2:
            raise ValueError(f"downsample_layers: expected none for clips, got {downsample_layers}")
        block = partial(
            MambaNDBlock, embed_dim, skip_from_input=skip_from_input, proj_drop=proj_drop_rate, d_state=d_state, **dd
        )
        rates = calculate_drop_path_rates(drop_path_rate, depth)
        paths = _block_paths(paths, depth, rank)
        patch = (tubelet_size, patch_size, patch_size)[-rank:]
        pad = rank == 2 if pad_input is None else pad_input
        frames = () if num_frames is None else (num_frames,)
        super().__init__(
            patch_embed=GridPatchEmbed(patch, in_chans, embed_dim, pad, **dd),
            blocks=[block(paths[i], drop_path=rates[i], downsample=i in downsample_layers) for i in range(depth)],
            reductions=[patch_size * 2 ** sum(layer <= i for layer in downsample_layers) for i in range(depth)],
            input_size=(*frames, *to_2tuple(img_size)),
            embed_dim=embed_dim,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            norm=LayerNorm(embed_dim, eps=1e-6, **dd) if final_norm else nn.Identity(),
            fc_norm=nn.Identity() if fc_norm_eps is None else nn.LayerNorm(embed_dim, eps=fc_norm_eps, **dd),
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            **dd,
        )
        self.num_frames, self.inflate_copies = num_frames, inflate_copies
        if rank == 2:
            self.output_fmt = "NHWC"
        self.head_init_std = head_init_std
        self.init_unless_meta()

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as the authors do: Mamba's and PyTorch's defaults, and a classifier that starts near zero."""
        if needs_reset:
            self.reset_modules()
        self.init_embeddings()
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=self.head_init_std)
            nn.init.zeros_(self.head.bias)

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int] | None = None, num_frames: int | None = None) -> None:
        """Resize the position embedding for another nominal input size; other sizes are interpolated on the fly.

        Args:
            img_size: (height, width) in pixels.
            num_frames: Frames of a clip.
        """
        if num_frames is not None and self.num_frames is None:
            raise ValueError(f"num_frames: expected None for a model of images, got {num_frames}")
        self.num_frames = num_frames or self.num_frames
        size = self.input_size[-2:] if img_size is None else to_2tuple(img_size)
        frames = () if self.num_frames is None else (self.num_frames,)
        self._resize((*frames, *size), num_frames=self.num_frames)


def _block_paths(paths: tuple[str, ...] | None, depth: int, rank: int) -> list[str]:
    """Return the path of each block from a list or a cycle of them; the family's own cycle may end anywhere."""
    if paths is None:
        paths = IMAGE_PATHS if rank == 2 else VIDEO_PATHS
    elif not paths or depth % len(paths):
        raise ValueError(f"paths: expected {depth} (one a block) or a cycle that divides {depth}, got {len(paths)}")
    for path in paths:
        if scan_path(path, (3,) * rank).num_tokens != 3**rank:
            raise ValueError(f"paths: expected directions that need no padding, got {path!r}")
    return [paths[i % len(paths)] for i in range(depth)]


def _cfg(file: str = "", **kwargs: Any) -> dict[str, Any]:
    source = {"hf_hub_id": "jacklishufan/Mamba-ND", "hf_hub_filename": file} if file else {}
    return {
        **source,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (14, 14),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.projection",
        "classifier": "head",
        "origin_url": "https://github.com/jacklishufan/Mamba-ND",
        "paper_name": "Mamba-ND: Selective State Space Modeling for Multi-Dimensional Data",
        "paper_ids": "arXiv:2402.05892",
        **kwargs,
    }


def _video_cfg(file: str = "", **kwargs: Any) -> dict[str, Any]:
    # no first_conv: timm adapts 2-D convolutions to other channels, adapt_input_channels those of clips
    return _cfg(file, **{"first_conv": (), "pool_size": None, "num_classes": 400, **kwargs})


default_cfgs = generate_default_cfgs(
    {
        "mamba2d_small_patch8_224.in1k": _cfg("in1k/mamba2d_s.pth", notes=("top1: 81.7",)),
        "mamba2d_base_patch8_224.in1k": _cfg("in1k/mamba2d_b.pth", notes=("top1: 83.0",)),
        "mamba2d_small_patch16_224.in1k": _cfg("video/mamba_2d_s_16_pretrained.pth"),
        "mamba3d_small_ucf101.ucf101": _video_cfg("video/ucf101/ucf101.pth", notes=("top1: 89.6",)),
        "mamba3d_small_hmdb51.hmdb51": _video_cfg(
            "video/hmdb51/hmdb51.pth", num_classes=60, mean=(0.45,) * 3, std=(0.225,) * 3, notes=("top1: 60.9",)
        ),
        "mamba3d_small_k400.k400": _video_cfg(
            description="Weights in https://huggingface.co/jacklishufan/Mamba-ND/tree/main/k400", notes=("top1: 81.9",)
        ),
        "test_mamba2d.untrained": _cfg(input_size=(3, 64, 64), pool_size=(4, 4)),
        "test_mamba3d.untrained": _video_cfg(input_size=(3, 32, 32), num_classes=1000),
    }
)


def _create_mamba_nd(variant: str, pretrained: bool, model_args: dict[str, Any], **kwargs: Any) -> nn.Module:
    published = {"num_frames": model_args.get("num_frames"), **kwargs.pop("pretrained_model_args", {})}
    quarters = quarter_indices(kwargs.get("depth", model_args["depth"]))
    return build_model(
        MambaND,
        variant,
        pretrained,
        lambda state_dict, model: adapt_input_channels(checkpoint_filter_fn(state_dict, model), model),
        pretrained_model_args=published,
        **{"out_indices": quarters, **model_args, **kwargs},
    )


@register_model
def mamba2d_small_patch8_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mamba-2D-S/8: 25 M parameters."""
    model_args = {"patch_size": 8, "embed_dim": 384, "depth": 24, "downsample_layers": (9,)}
    return _create_mamba_nd("mamba2d_small_patch8_224", pretrained, model_args, **kwargs)


@register_model
def mamba2d_base_patch8_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mamba-2D-B/8: 94 M parameters."""
    model_args = {"patch_size": 8, "embed_dim": 768, "depth": 24, "downsample_layers": (9,)}
    return _create_mamba_nd("mamba2d_base_patch8_224", pretrained, model_args, **kwargs)


@register_model
def mamba2d_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mamba-2D-S/16, the start of the video models: 24 M parameters."""
    model_args = {"patch_size": 16, "embed_dim": 384, "depth": 24}
    return _create_mamba_nd("mamba2d_small_patch16_224", pretrained, model_args, **kwargs)


_VIDEO = {"patch_size": 16, "embed_dim": 384, "depth": 36, "final_norm": False, "fc_norm_eps": None}
_VIDEO |= {"head_init_std": 0.01}


@register_model
def mamba3d_small_ucf101(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mamba-3D-S for UCF-101, 32 frames: 37 M parameters; the authors' head has 400 classes."""
    model_args = {**_VIDEO, "num_frames": 32, "tubelet_size": 2}
    return _create_mamba_nd("mamba3d_small_ucf101", pretrained, model_args, **kwargs)


@register_model
def mamba3d_small_hmdb51(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mamba-3D-S for HMDB-51, 32 frames: 37 M parameters; the authors' head has 60 classes."""
    model_args = {**_VIDEO, "num_frames": 32, "tubelet_size": 2}
    return _create_mamba_nd("mamba3d_small_hmdb51", pretrained, model_args, **kwargs)


@register_model
def mamba3d_small_k400(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Mamba-3D-S for Kinetics-400, 16 frames: 36 M parameters."""
    model_args = {**_VIDEO, "num_frames": 16, "fc_norm_eps": 1e-5}
    return _create_mamba_nd("mamba3d_small_k400", pretrained, model_args, **kwargs)


@register_model
def test_mamba2d(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A Mamba-2D small enough for tests."""
    model_args = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 4, "downsample_layers": (1,), "d_state": 4}
    return _create_mamba_nd("test_mamba2d", pretrained, model_args, **kwargs)


@register_model
def test_mamba3d(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A Mamba-3D small enough for tests, of clips of 8 frames."""
    model_args = {**_VIDEO, "img_size": 32, "num_frames": 8, "tubelet_size": 2, "patch_size": 8}
    model_args |= {"embed_dim": 48, "depth": 6, "d_state": 4}
    return _create_mamba_nd("test_mamba3d", pretrained, model_args, **kwargs)
