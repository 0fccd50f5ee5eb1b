"""VMamba: a hierarchical backbone whose token mixer scans the feature map in four directions.

Paper: "VMamba: Visual State Space Model", Liu et al. 2024, https://arxiv.org/abs/2401.10166
Official code and weights (MIT): https://github.com/MzeroMiko/VMamba

Written from the paper and from published facts about the official models (names, shapes, hyperparameters); the weights
are the authors'. ``vanilla_vmamba_*`` is the paper's first version (no MLP, gated, 16 states), ``vmamba_*_s1l8`` and
its like the second (MLP, no gate, 1 state; ratio 1, 8 blocks in stage 3), ``vmamba_*_m2`` scans with Mamba-2's heads.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, GluMlp, get_act_layer, to_2tuple, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from timm.models.swin_transformer import PatchMerging

from ..layers import CROSS_SCAN, SS2D, ConvDownsample, ConvPatchEmbed, LayerNorm, Mlp, before_linear, check_choice
from ..layers.grid_embed import resize_grid_embed
from ..layers.norm import add_norm
from ._builder import build_model
from ._hierarchical import DisjointPatchEmbed, HierarchicalModel
from ._vmamba_official import checkpoint_filter_fn, official_arguments, official_state_dict

__all__ = ["VMamba", "VMambaBlock", "checkpoint_filter_fn", "official_arguments", "official_state_dict"]


class VMambaBlock(nn.Module):
    """Pre-norm block: SS2D, then an MLP unless ``mlp_ratio`` is 0.

    Args:
        dim: Channels.
        mixer: Arguments of :class:`SS2D`.
        mlp_ratio: Hidden size of the MLP relative to ``dim``; 0 for no MLP.
        gated_mlp: The MLP's hidden half is multiplied by the activation of another half.
        mlp_act_layer: Its activation.
        proj_drop: Dropout in the MLP.
        drop_path: Rate of stochastic depth.
        norm_layer: Norm over channels.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(
        self,
        dim: int,
        mixer: dict[str, Any],
        mlp_ratio: float = 4.0,
        gated_mlp: bool = False,
        mlp_act_layer=nn.GELU,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer=LayerNorm,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1 = before_linear(norm_layer(dim, **dd))
        self.mixer = SS2D(dim, norm_layer=norm_layer, **mixer, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.has_mlp = mlp_ratio > 0
        if self.has_mlp:
            hidden = int(dim * mlp_ratio)
            mlp_layer, hidden = (GluMlp, 2 * hidden) if gated_mlp else (Mlp, hidden)
            self.norm2 = before_linear(norm_layer(dim, **dd))
            self.mlp = mlp_layer(dim, hidden_features=hidden, act_layer=mlp_act_layer, drop=proj_drop, **dd)
        else:
            self.norm2, self.mlp = nn.Identity(), nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    @torch.jit.unused
    def step(self, x: torch.Tensor, pending: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the stream without this block's last addition, and that addition.

        Args:
            x: Stream, ``(B, H, W, C)``.
            pending: What the block before this one has still to add to it.
        """
        x, normed = add_norm(x, pending, self.norm1)
        added = self.drop_path1(self.mixer(normed))
        if self.has_mlp:
            x, normed = add_norm(x, added, self.norm2)
            added = self.drop_path2(self.mlp(normed))
        return x, added

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform ``(B, H, W, C)``."""
        if not torch.jit.is_scripting():
            x, added = self.step(x)
            return x + added
        x = x + self.drop_path1(self.mixer(self.norm1(x)))
        if self.has_mlp:
            x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x


torch.fx.wrap("resize_grid_embed")  # FX looks for leaf functions where forward is defined, and that is the base's

_PATCH_EMBED = {"conv": ConvPatchEmbed, "patch": DisjointPatchEmbed}
_DOWNSAMPLE = {
    "merge": PatchMerging,
    "conv2": partial(ConvDownsample, kernel_size=2),
    "conv3": partial(ConvDownsample, kernel_size=3),
}


class VMamba(HierarchicalModel):
    """VMamba; defaults are those of ``vmamba_tiny_s1l8``.

    Args:
        img_size: Image size that ``pos_embed`` is made for; without one, images of any size will do.
        patch_size: Stride of the patch embedding.
        depths: Blocks of each stage.
        dims: Channels of each stage, or of the first (they double then).
        d_state: States a channel, N.
        ssm_ratio: Channels inside the token mixer relative to its input's.
        dt_rank: Rank of the step sizes (heads with ``ssm="multi_head"``); ``ceil(channels / 16)`` if absent.
        path: Scan path.
        ssm: ``"selective"``, ``"multi_head"`` or ``"cascade"``, see :class:`SS2D`.
        ssm_init: ``"mamba"``, ``"normal"`` or ``"uniform"``.
        d_conv: Side of the token mixer's depthwise convolution; below 2 for none.
        conv_bias: Whether it has a bias.
        ssm_act_layer: Activation after it, and of the gate.
        gate: ``"act"``, ``"linear"`` or ``"none"``.
        out_norm: What follows the scan, one of :data:`visionmamba.layers.OUT_NORMS`.
        out_act: GELU after that.
        mlp_ratio: Hidden size of the MLP relative to its input's; 0 for no MLP.
        gated_mlp: Whether the MLP is gated.
        mlp_act_layer: Its activation.
        patch_embed: ``"conv"`` (two overlapping convolutions) or ``"patch"`` (one of disjoint patches).
        downsample: ``"conv3"``, ``"conv2"`` or ``"merge"`` (2 x 2 patches).
        pos_embed: Add an absolute position embedding, resized for other image sizes.
        proj_drop_rate: Dropout in token mixers and MLPs.
        norm_layer: Norm over channels.
        device: Where to create the parameters.
        dtype: Their dtype.
        **kwargs: Arguments of :class:`._hierarchical.HierarchicalModel`: ``in_chans``, ``num_classes``,
            ``global_pool``, ``patch_norm``, ``drop_rate``, ``drop_path_rate``.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: int | Sequence[int] = 96,
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        dt_rank: int | None = None,
        path: str = CROSS_SCAN,
        ssm: str = "selective",
        ssm_init: str = "mamba",
        d_conv: int = 3,
        conv_bias: bool = False,
        ssm_act_layer: str = "silu",
        gate: str = "none",
        out_norm: str = "layer",
        out_act: bool = False,
        mlp_ratio: float = 4.0,
        gated_mlp: bool = False,
        mlp_act_layer: str = "gelu",
        patch_embed: str = "conv",
        downsample: str = "conv3",
        pos_embed: bool = False,
        proj_drop_rate: float = 0.0,
        norm_layer=LayerNorm,
        device=None,
        dtype=None,
        **kwargs: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        check_choice("patch_embed", patch_embed, _PATCH_EMBED)
        check_choice("downsample", downsample, _DOWNSAMPLE)
        mixer = dict(
            d_state=d_state, ssm_ratio=ssm_ratio, dt_rank=dt_rank, path=path, ssm=ssm, ssm_init=ssm_init, d_conv=d_conv,
            conv_bias=conv_bias, act_layer=get_act_layer(ssm_act_layer), gate=gate, out_norm=out_norm, out_act=out_act,
            drop=proj_drop_rate,
        )  # fmt: skip
        block = partial(
            VMambaBlock, mixer=mixer, mlp_ratio=mlp_ratio, gated_mlp=gated_mlp,
            mlp_act_layer=get_act_layer(mlp_act_layer), proj_drop=proj_drop_rate, norm_layer=norm_layer, **dd,
        )  # fmt: skip
        super().__init__(
            lambda stage, dim, rate: block(dim, drop_path=rate), depths, dims,
            patch_embed=_PATCH_EMBED[patch_embed], downsample=_DOWNSAMPLE[downsample], patch_size=patch_size,
            norm_layer=norm_layer, **kwargs, **dd,
        )  # fmt: skip
        self.pos_embed = None
        if pos_embed:
            grid = [size // patch_size for size in to_2tuple(img_size)]
            self.pos_embed = nn.Parameter(torch.empty(1, *grid, self.feature_info[0]["num_chs"], **dd))
        self.init_unless_meta()

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as the authors do; see :meth:`HierarchicalModel.init_weights`."""
        super().init_weights(needs_reset)
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.02)

    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Make the model's own image size another one; a position embedding is resized.

        Args:
            img_size: Height and width.
        """
        if img_size is None:
            return
        if self.pos_embed is not None:
            grid = [size // self.patch_size for size in to_2tuple(img_size)]
            resized = resize_grid_embed(self.pos_embed.detach(), grid)
            self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)
        super().set_input_size(img_size)

    def forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        """Embed images ``(B, in_chans, height, width)`` as ``(B, H, W, C)``."""
        x = self.patch_embed(x)
        if self.pos_embed is not None:
            x = x + resize_grid_embed(self.pos_embed, [x.shape[1], x.shape[2]])
        return x


def _cfg(url: str = "", top1: float | None = None, **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url, "num_classes": 1000, "input_size": (3, 224, 224), "pool_size": (7, 7), "crop_pct": 0.875,
        "interpolation": "bicubic", "fixed_input_size": False, "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD, "first_conv": "patch_embed.conv1", "classifier": "head.fc", "license": "mit",
        "paper_name": "VMamba: Visual State Space Model", "paper_ids": "arXiv:2401.10166",
        "origin_url": "https://github.com/MzeroMiko/VMamba",
        "notes": () if top1 is None else (f"top1: {top1}",),
        **kwargs,
    }  # fmt: skip


_RELEASES = "https://github.com/MzeroMiko/VMamba/releases/download"
_vanilla_cfg = partial(_cfg, first_conv="patch_embed.proj")

default_cfgs = generate_default_cfgs({
    "vanilla_vmamba_tiny.in1k": _vanilla_cfg(f"{_RELEASES}/%23v0cls/vssmtiny_dp01_ckpt_epoch_292.pth", 82.2),
    "vanilla_vmamba_small.in1k": _vanilla_cfg(f"{_RELEASES}/%23v0cls/vssmsmall_dp03_ckpt_epoch_238.pth", 83.5),
    "vanilla_vmamba_base.in1k": _vanilla_cfg(f"{_RELEASES}/%23v0cls/vssmbase_dp06_ckpt_epoch_241.pth", 83.7),
    "vmamba_tiny_s2l5.in1k": _cfg(f"{_RELEASES}/%23v2cls/vssm_tiny_0230_ckpt_epoch_262.pth", 82.5),
    "vmamba_small_s2l15.in1k": _cfg(f"{_RELEASES}/%23v2cls/vssm_small_0229_ckpt_epoch_222.pth", 83.6),
    "vmamba_base_s2l15.in1k": _cfg(f"{_RELEASES}/%23v2cls/vssm_base_0229_ckpt_epoch_237.pth", 83.9),
    "vmamba_tiny_s1l8.in1k": _cfg(f"{_RELEASES}/%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth", 82.6),
    "vmamba_small_s1l20.in1k": _cfg(f"{_RELEASES}/%23v2cls/vssm1_small_0229s_ckpt_epoch_240.pth", 83.3),
    "vmamba_base_s1l20.in1k": _cfg(f"{_RELEASES}/%23v2cls/vssm1_base_0229s_ckpt_epoch_225.pth", 83.8),
    "vmamba_tiny_m2.untrained": _cfg(),
    "vmamba_small_m2.untrained": _cfg(),
    "vmamba_base_m2.untrained": _cfg(),
    "test_vmamba.untrained": _cfg(input_size=(3, 32, 32), pool_size=(1, 1)),
})  # fmt: skip


def _create_vmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    every_stage = tuple(range(len(kwargs["depths"])))
    return build_model(VMamba, variant, pretrained, checkpoint_filter_fn, **{"out_indices": every_stage, **kwargs})


def _vanilla(**kwargs: Any) -> dict[str, Any]:
    """Return the arguments of the paper's first version."""
    vanilla = dict(
        d_state=16, ssm_ratio=2.0, conv_bias=True, gate="act", mlp_ratio=0.0, patch_embed="patch", downsample="merge"
    )
    return {**vanilla, **kwargs}


def _multi_head(**kwargs: Any) -> dict[str, Any]:
    """Return the arguments of the models on Mamba-2's state space model."""
    return {**dict(d_state=64, ssm="multi_head", ssm_init="uniform", ssm_act_layer="gelu"), **kwargs}


@register_model
def vanilla_vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T, first version: 23 M parameters, 5.6 G, 82.2 % top-1."""
    model_args = _vanilla(depths=(2, 2, 9, 2), dims=96)
    return _create_vmamba("vanilla_vmamba_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def vanilla_vmamba_small(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S, first version: 44 M parameters, 11.2 G, 83.5 % top-1."""
    model_args = _vanilla(depths=(2, 2, 27, 2), dims=96)
    return _create_vmamba("vanilla_vmamba_small", pretrained, **dict(model_args, **kwargs))


@register_model
def vanilla_vmamba_base(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B, first version: 76 M parameters, 18.0 G, 83.7 % top-1."""
    model_args = _vanilla(depths=(2, 2, 27, 2), dims=128)
    return _create_vmamba("vanilla_vmamba_base", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T, ratio 2, 5 blocks in stage 3: 31 M parameters, 4.9 G, 82.5 % top-1."""
    model_args = dict(depths=(2, 2, 5, 2), dims=96, ssm_ratio=2.0)
    return _create_vmamba("vmamba_tiny_s2l5", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_small_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S, ratio 2, 15 blocks in stage 3: 50 M parameters, 8.7 G, 83.6 % top-1."""
    model_args = dict(depths=(2, 2, 15, 2), dims=96, ssm_ratio=2.0)
    return _create_vmamba("vmamba_small_s2l15", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_base_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B, ratio 2, 15 blocks in stage 3: 89 M parameters, 15.4 G, 83.9 % top-1."""
    model_args = dict(depths=(2, 2, 15, 2), dims=128, ssm_ratio=2.0)
    return _create_vmamba("vmamba_base_s2l15", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_tiny_s1l8(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T, ratio 1, 8 blocks in stage 3: 30 M parameters, 4.9 G, 82.6 % top-1."""
    model_args = dict(depths=(2, 2, 8, 2), dims=96)
    return _create_vmamba("vmamba_tiny_s1l8", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_small_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S, ratio 1, 20 blocks in stage 3: 49 M parameters, 8.6 G, 83.3 % top-1."""
    model_args = dict(depths=(2, 2, 20, 2), dims=96)
    return _create_vmamba("vmamba_small_s1l20", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_base_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B, ratio 1, 20 blocks in stage 3: 87 M parameters, 15.2 G, 83.8 % top-1."""
    model_args = dict(depths=(2, 2, 20, 2), dims=128)
    return _create_vmamba("vmamba_base_s1l20", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_tiny_m2(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T on Mamba-2 heads: 25 M parameters; no published weights."""
    model_args = _multi_head(depths=(2, 2, 4, 2), dims=96)
    return _create_vmamba("vmamba_tiny_m2", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_small_m2(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S on Mamba-2 heads: 39 M parameters; no published weights."""
    model_args = _multi_head(depths=(2, 2, 12, 2), dims=96)
    return _create_vmamba("vmamba_small_m2", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_base_m2(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B on Mamba-2 heads: 68 M parameters; no published weights."""
    model_args = _multi_head(depths=(2, 2, 12, 2), dims=128)
    return _create_vmamba("vmamba_base_m2", pretrained, **dict(model_args, **kwargs))


@register_model
def test_vmamba(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """A micro model of the second version, for tests and demonstrations: 0.3 M parameters."""
    model_args = dict(depths=(1, 1, 2, 1), dims=(24, 48, 64, 96))
    return _create_vmamba("test_vmamba", pretrained, **dict(model_args, **kwargs))
