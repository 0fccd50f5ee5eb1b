"""EfficientVMamba: a light hierarchical backbone that scans strided sub-grids, and convolves where maps are small.

Paper: "EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba", Pei et al. 2024,
https://arxiv.org/abs/2403.09977

Written from the paper and from published facts about the official models (names, shapes, hyperparameters); the official
repository carries no licence, and none of it is used. The weights are the authors'.

The token mixer is VMamba's SS2D with another path: each direction visits one of the four sub-grids of stride 2, so that
together they visit every token once (paper, section 3.2). Stages 3 and 4 hold inverted residuals instead (section 3.4).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model
from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite

from ..layers import (
    SS2D,
    ChannelAttention,
    ChannelsLastConv2d,
    DepthwiseConv2d,
    LayerNorm,
    SelectiveSSM,
    before_linear,
)
from ..layers.norm import add_norm
from ..layers.recompute import Enter, ScanInputs
from ._builder import build_model
from ._hierarchical import HierarchicalModel, Stage
from ._layout import from_official

__all__ = ["EfficientVMamba", "EfficientVMambaBlock", "checkpoint_filter_fn", "official_state_dict"]

ATROUS_SCAN = "sub_200,subT_210,sub_201,subT_211"
"""The four sub-grids of stride 2, along rows and columns in turn."""

Tensors = dict[str, torch.Tensor]


class AtrousSSM(SelectiveSSM):
    """Four state space models, each over its own sub-grid of stride 2; arguments are SelectiveSSM's.

    A token belongs to one direction, so only that one's step size, B and C are computed for it. The scan reads each
    direction's at its own tokens alone: all directions are given the same tensor.

    Maps of odd size are padded with zeros at the bottom and right, after the convolution, as the published models do:
    a padding token adds nothing to the state, but time passes.
    """

    def even(self, grid: list[int]) -> list[int]:
        """Return the padded grid."""
        return [grid[0] + grid[0] % 2, grid[1] + grid[1] % 2]

    def project_own(self, x: torch.Tensor, weight: torch.Tensor, grid: list[int]) -> torch.Tensor:
        """Map ``(B, L, D)`` to ``(B, L, C)`` by the weight, of ``(K, C, D)``, of each token's own direction."""
        x = x.unflatten(1, [grid[0] // 2, 2, grid[1] // 2, 2])
        weight = weight.unflatten(0, [2, 2])  # direction k starts at row k % 2 and column k // 2: see ATROUS_SCAN
        return torch.einsum("bhiwjd,jicd->bhiwjc", x, weight).flatten(1, 4)

    def scan_inputs(self, x: torch.Tensor, z: torch.Tensor | None, grid: list[int]) -> ScanInputs:
        """Return the scan's tensor arguments for tokens ``(B, L, D)`` in raster order of an even ``grid``."""
        dt, B, C = self.project_own(x, self.x_proj_weight, grid).split([self.dt_rank, self.d_state, self.d_state], -1)
        delta = self.project_own(dt, self.dt_proj_weight, grid)
        delta, B, C = (value.unsqueeze(2).expand(-1, -1, self.num_directions, -1) for value in (delta, B, C))
        A = -torch.exp(self.A_log.float())
        return x, delta, A, B, C, self.D, z, self.dt_proj_bias, None

    def pad(self, x: torch.Tensor, grid: list[int]) -> torch.Tensor:
        """Pad tokens ``(B, L, D)`` to the even grid."""
        x = x.unflatten(1, [grid[0], grid[1]])
        return F.pad(x, (0, 0, 0, grid[1] % 2, 0, grid[0] % 2)).flatten(1, 2)

    def crop(self, y: torch.Tensor, grid: list[int]) -> torch.Tensor:
        """Undo :meth:`pad`."""
        return y.unflatten(1, self.even(grid))[:, : grid[0], : grid[1]].flatten(1, 2)

    @torch.jit.unused
    def recomputed(
        self, tokens: torch.Tensor, enter: Enter, modules: Sequence[nn.Module], grid: list[int]
    ) -> torch.Tensor:
        """Do what :meth:`forward` does with what is made of tokens; see :meth:`SelectiveSSM.recomputed`."""
        y = super().recomputed(tokens, lambda t: (self.pad(enter(t)[0], grid), None), modules, self.even(grid))
        return self.crop(y, grid)

    def forward(self, x: torch.Tensor, z: torch.Tensor | None, grid: list[int]) -> torch.Tensor:
        """Scan tokens ``(B, L, D)`` in raster order; ``z`` is not used."""
        return self.crop(self.scan(self.pad(x, grid), None, self.even(grid)), grid)


class AtrousSS2D(SS2D):
    """SS2D over the four sub-grids of stride 2, each scanned once; arguments are SS2D's."""

    keeps_little = True

    def __init__(self, dim: int, device=None, dtype=None, **kwargs: Any) -> None:
        super().__init__(dim, path=ATROUS_SCAN, device=device, dtype=dtype, **kwargs)

    def create_ssm(self, ssm: str, d_inner: int, d_state: int, dt_rank: int, path: str, **dd) -> nn.Module:
        """Return the state space models of the four sub-grids."""
        return AtrousSSM(d_inner, d_state, dt_rank, path, **dd)


class ConvBranch(nn.Module):
    """The local branch: a depthwise convolution, a norm, GELU, and a mix of the channels.

    Args:
        dim: Channels.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv = DepthwiseConv2d(dim, 3, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.proj = ChannelsLastConv2d(dim, dim, 1, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform ``(B, H, W, C)``."""
        x = self.norm(self.conv(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj(F.gelu(x))


class EfficientVMambaBlock(nn.Module):
    """A global branch (the scan) and a local one (convolutions), weighed by one channel attention that they share.

    Args:
        dim: Channels.
        d_state: States a channel, N.
        ssm_ratio: Channels inside the scan relative to ``dim``.
        drop_path: Rate of stochastic depth.
        norm_layer: Norm over channels.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        drop_path: float = 0.0,
        norm_layer=LayerNorm,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = before_linear(norm_layer(dim, **dd))
        self.mixer = AtrousSS2D(dim, d_state=d_state, ssm_ratio=ssm_ratio, norm_layer=norm_layer, **dd)
        self.conv_branch = ConvBranch(dim, **dd)
        self.attention = ChannelAttention(dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        """Run both branches over normalised ``(B, H, W, C)``."""
        return self.attention(self.mixer(x)) + self.attention(self.conv_branch(x))

    @torch.jit.unused
    def step(self, x: torch.Tensor, pending: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the stream without this block's addition, and that addition; see ``layers/joined_blocks.py``."""
        x, normed = add_norm(x, pending, self.norm)
        return x, self.drop_path(self.mix(normed))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform ``(B, H, W, C)``."""
        return x + self.drop_path(self.mix(self.norm(x)))


class ConvStage(Stage):
    """Inverted residuals at one resolution; they work channels first, so the map is viewed so once for all of them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform ``(B, H, W, C)``."""
        return self.forward_blocks(self.downsample(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class EfficientVMamba(HierarchicalModel):
    """EfficientVMamba; defaults are those of ``efficient_vmamba_tiny``.

    Args:
        depths: Blocks of each stage.
        dims: Channels of each stage, or of the first (they double then).
        num_scan_stages: Stages that scan; those after them convolve.
        d_state: States a channel, N.
        ssm_ratio: Channels inside the token mixer relative to its input's.
        expand_ratio: Channels inside an inverted residual relative to its input's.
        norm_layer: Norm over channels.
        device: Where to create the parameters.
        dtype: Their dtype.
        **kwargs: Arguments of :class:`._hierarchical.HierarchicalModel`: ``patch_size``, ``in_chans``, ``num_classes``,
            ``global_pool``, ``drop_rate``, ``drop_path_rate``.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 4, 2),
        dims: int | Sequence[int] = 48,
        num_scan_stages: int = 2,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        expand_ratio: float = 4.0,
        norm_layer=LayerNorm,
        device=None,
        dtype=None,
        **kwargs: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        squeeze = partial(SqueezeExcite, rd_ratio=0.125, rd_round_fn=int)

        def create_block(stage: int, dim: int, rate: float) -> nn.Module:
            if stage < num_scan_stages:
                return EfficientVMambaBlock(dim, d_state, ssm_ratio, rate, norm_layer, **dd)
            return InvertedResidual(dim, dim, exp_ratio=expand_ratio, se_layer=squeeze, drop_path_rate=rate, **dd)

        super().__init__(
            create_block, depths, dims, stage_layer=lambda stage: Stage if stage < num_scan_stages else ConvStage,
            norm_layer=norm_layer, **kwargs, **dd,
        )  # fmt: skip
        self.init_unless_meta()


_BLOCK_NAMES = {
    "mixer.ssm.x_proj_weight": "op.x_proj_weight",
    "mixer.ssm.dt_proj_weight": "op.dt_projs_weight",
    "mixer.ssm.dt_proj_bias": "op.dt_projs_bias",
    "mixer.ssm.A_log": "op.A_logs",
    "mixer.ssm.D": "op.Ds",
    "mixer.conv": "op.conv2d",
    "mixer": "op",
    "conv_branch.conv": "conv_branch.0",
    "conv_branch.norm": "conv_branch.1",
    "conv_branch.proj": "conv_branch.3",
    "attention.norm": "se.norm",
    "attention.reduce": "se.global_reduce",
    "attention.expand": "se.channel_select",
    "conv_pwl": "conv_pw2.0",
    "conv_pw": "conv_pw.0",
    "conv_dw": "conv_dw.0",
    "bn1": "conv_pw.1",
    "bn2": "conv_dw.1",
    "bn3": "conv_pw2.1",
}
"""Our names inside a block (the first prefix that fits counts), and the official ones."""


def _official_block_name(name: str) -> str:
    for ours, official in _BLOCK_NAMES.items():
        if name == ours or name.startswith(f"{ours}."):
            return official + name.removeprefix(ours)
    return name


def _official_name(name: str, model: EfficientVMamba) -> str:
    """Return the official name of one of our parameters or buffers."""
    if name.startswith("stages."):
        _, index, part, inner = name.split(".", 3)
        stage = int(index)
        if part == "downsample":  # ours opens a stage, theirs closes the one before
            before = model.stages[stage - 1]
            place = f"{len(before.blocks) + 2}" if isinstance(before, ConvStage) else "downsample"
            return f"layers.{stage - 1}.{place}.{inner}"
        block, inner = inner.split(".", 1)
        # a stage that convolves is one sequence, which a permutation opens
        place = f"{int(block) + 1}" if isinstance(model.stages[stage], ConvStage) else f"blocks.{block}"
        return f"layers.{stage}.{place}.{_official_block_name(inner)}"
    for ours, official in (
        ("patch_embed.proj.", "patch_embed.0."),
        ("patch_embed.norm.", "patch_embed.2."),
        ("norm.", "classifier.norm."),
        ("head.fc.", "classifier.head."),
    ):
        if name.startswith(ours):
            return official + name.removeprefix(ours)
    return name


def official_state_dict(state_dict: Mapping[str, torch.Tensor], model: EfficientVMamba) -> Tensors:
    """Convert our state dict (or gradients by parameter name) to the authors' names and shapes.

    Args:
        state_dict: Ours.
        model: The model it belongs to.

    Returns:
        Theirs; the inverse of :func:`checkpoint_filter_fn`.
    """
    official = {}
    for name, value in state_dict.items():
        folded = name.endswith(("ssm.A_log", "ssm.D"))  # theirs fold directions into channels
        official[_official_name(name, model)] = value.flatten(0, 1) if folded else value
    return official


def checkpoint_filter_fn(state_dict: Tensors, model: EfficientVMamba) -> Tensors:
    """Convert a checkpoint to the model's state dict.

    Args:
        state_dict: The authors', or this project's own.
        model: The model it is for.

    Returns:
        Our names and shapes; what is not known is passed on as it is.
    """
    if any(key.startswith("stages.") for key in state_dict):
        return state_dict
    return from_official(state_dict, model, official_state_dict, "head.fc", "classifier.head")


def _cfg(hf_hub_id: str | None = None, top1: float | None = None, **kwargs: Any) -> dict[str, Any]:
    return {
        "url": "", "hf_hub_id": hf_hub_id, "num_classes": 1000, "input_size": (3, 224, 224), "pool_size": (7, 7),
        "crop_pct": 0.875, "interpolation": "bicubic", "fixed_input_size": False, "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD, "first_conv": "patch_embed.proj", "classifier": "head.fc",
        "paper_name": "EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba",
        "paper_ids": "arXiv:2403.09977", "origin_url": "https://github.com/TerryPei/EfficientVMamba",
        "notes": () if top1 is None else (f"top1: {top1}",),
        **kwargs,
    }  # fmt: skip


default_cfgs = generate_default_cfgs({
    "efficient_vmamba_tiny.in1k": _cfg("TerryPei/EfficientVMamba-Tiny", 76.5),
    "efficient_vmamba_small.in1k": _cfg("TerryPei/EfficientVMamba-Small", 78.7),
    "efficient_vmamba_base.in1k": _cfg("TerryPei/EfficientVMamba-Base", 81.8),
    "test_efficient_vmamba.untrained": _cfg(input_size=(3, 64, 64), pool_size=(2, 2)),
})  # fmt: skip


def _create_efficient_vmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    every_stage = tuple(range(len(kwargs["depths"])))
    return build_model(
        EfficientVMamba, variant, pretrained, checkpoint_filter_fn, **{"out_indices": every_stage, **kwargs}
    )


@register_model
def efficient_vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    """EfficientVMamba-T: 6.5 M parameters, 0.8 G, 76.5 % top-1."""
    model_args = dict(depths=(2, 2, 4, 2), dims=48)
    return _create_efficient_vmamba("efficient_vmamba_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def efficient_vmamba_small(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    """EfficientVMamba-S: 11 M parameters, 1.3 G, 78.7 % top-1; 64 channels wide, as it was trained."""
    model_args = dict(depths=(2, 2, 4, 2), dims=64)
    return _create_efficient_vmamba("efficient_vmamba_small", pretrained, **dict(model_args, **kwargs))


@register_model
def efficient_vmamba_base(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    """EfficientVMamba-B: 34 M parameters, 4.0 G, 81.8 % top-1."""
    model_args = dict(depths=(2, 2, 9, 2), dims=96)
    return _create_efficient_vmamba("efficient_vmamba_base", pretrained, **dict(model_args, **kwargs))


@register_model
def test_efficient_vmamba(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    """A micro model for tests and demonstrations: 0.3 M parameters."""
    model_args = dict(depths=(1, 1, 1, 1), dims=(24, 48, 64, 96), d_state=4)
    return _create_efficient_vmamba("test_efficient_vmamba", pretrained, **dict(model_args, **kwargs))
