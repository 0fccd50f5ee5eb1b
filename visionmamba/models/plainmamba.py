"""PlainMamba: a non-hierarchical Mamba whose scan snakes through the image and knows which way it is going.

Paper: "PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition", Yang et al., BMVC 2024, arXiv:2403.17695.
Weights: https://github.com/ChenhongyiYang/PlainMamba

What the paper is about: (1) *continuous 2D scanning*: four snake paths, so that each step goes to a neighbour; (2)
*direction-aware updating*: B depends on the move by which the scan arrived at a token,

    h_t = exp(Delta_t A) h_{t-1} + Delta_t (B_t + Theta[move_t]) u_t                                   (section 3.3)

All else is shared by the four directions: one projection, one A, one D. The published weights were trained with two
quirks of the code, which :class:`DirectionAwareSSM` names.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, calculate_drop_path_rates, to_2tuple, trunc_normal_
from timm.models import generate_default_cfgs, register_model

from ..layers import LayerNorm, SelectiveSSM, before_linear, check_input
from ..layers.norm import add_norm
from ..layers.patch import DepthwiseConv2d
from ..layers.recompute import ScanInputs, recomputed, recomputes, repeatable_norm
from ..ops.scan_moves import NUM_MOVES, scan_moves
from ._builder import build_model
from ._checkpoint import strip_prefixes
from ._isotropic import GridModel, quarter_indices
from ._layout import embed_to_grid, rename, stack_directions, unstack_directions

__all__ = ["DirectionAwareSSM", "PlainMamba", "checkpoint_filter_fn", "official_state_dict"]

torch.fx.wrap("check_input")  # FX looks for leaf functions where forward is defined

SNAKES = "snake_h,snake_h_flip,snake_v,snake_v_flip"


class DirectionAwareSSM(SelectiveSSM):
    """A selective SSM shared by the directions of a path, with a B for each kind of move.

    Args:
        d_inner: Channels, D.
        d_state: States a channel, N.
        dt_rank: Rank of the step size's projection, R.
        path: Scan path whose directions go from each token to a neighbour.
        permute_projections: Delta, B and C follow each direction's path, as the paper has it. By default step t of
            every direction reads them from token t in raster order, and only the input is permuted: what the published
            code does.
        add_dt_bias_once: By default the step size's bias is added twice before the softplus (in the projection and
            again in the scan): what the published code does.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(
        self,
        d_inner: int,
        d_state: int = 16,
        dt_rank: int = 12,
        path: str = SNAKES,
        permute_projections: bool = False,
        add_dt_bias_once: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(d_inner, d_state, dt_rank, path, shared=True, device=device, dtype=dtype)
        self.in_step_order = not permute_projections
        self.dt_bias_scale = 1.0 if add_dt_bias_once else 2.0
        self.direction_B = nn.Parameter(torch.empty(NUM_MOVES, d_state, device=device, dtype=dtype))
        if not self.direction_B.is_meta:
            trunc_normal_(self.direction_B, std=0.02)

    def scan_inputs(self, x: torch.Tensor, z: torch.Tensor | None, grid: list[int]) -> ScanInputs:
        """Return the scan's tensor arguments for tokens ``(B, L, D)`` in raster order and a gate of their shape."""
        dt, B, C = self.project(x)
        moves = scan_moves(self.direction_B, self.path, grid, self.in_step_order)  # (L, K, 5)
        B = B + (moves @ self.direction_B).to(B.dtype)
        A = self.each(-torch.exp(self.A_log.float()))
        dt_bias = self.each(self.dt_bias_scale * self.dt_proj_bias)
        return x, dt, A, B, C, self.each(self.D), z, dt_bias, self.each(self.dt_proj_weight)


class PlainMambaMixer(nn.Module):
    """Gated direction-aware scan after a depthwise convolution.

    Args:
        dim: Channels of the tokens, C.
        d_state: States a channel, N.
        expand: The scan runs over ``expand * dim`` channels.
        d_conv: Side of the depthwise filters.
        device: Where to create the parameters.
        dtype: Their dtype.
        **ssm_kwargs: Further arguments of :class:`DirectionAwareSSM`.
    """

    def __init__(
        self, dim: int, d_state: int = 16, expand: int = 2, d_conv: int = 7, device=None, dtype=None, **ssm_kwargs
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        d_inner = expand * dim
        self.in_proj = nn.Linear(dim, 2 * d_inner, **dd)
        self.conv2d = DepthwiseConv2d(d_inner, d_conv, **dd)
        self.ssm = DirectionAwareSSM(d_inner, d_state, dt_rank=math.ceil(dim / 16), **ssm_kwargs, **dd)
        self.out_proj = nn.Linear(d_inner, dim, **dd)

    def enter(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map tokens ``(B, H, W, C)`` to the scan's input and gate, ``(B, L, D)``."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        return F.silu(self.conv2d(x)).flatten(1, 2), z.flatten(1, 2)

    @torch.jit.unused
    def _recomputes(self, x: torch.Tensor) -> bool:
        """Whether what the scan reads is computed anew in backward."""
        if not recomputes(x, self.in_proj, self.conv2d, self.ssm):
            return False
        return type(self.in_proj) is nn.Linear and type(self.conv2d) is DepthwiseConv2d

    @torch.jit.unused
    def _recomputed(self, x: torch.Tensor) -> torch.Tensor:
        y = self.ssm.recomputed(x, self.enter, [self.in_proj, self.conv2d], x.shape[1:-1])
        return self.out_proj(y.unflatten(1, x.shape[1:-1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix tokens ``(B, H, W, C)``."""
        if not torch.jit.is_scripting():
            if self._recomputes(x):
                return self._recomputed(x)
        grid = x.shape[1:-1]
        u, z = self.enter(x)
        return self.out_proj(self.ssm(u, z, grid).unflatten(1, grid))


class PlainMambaBlock(nn.Module):
    """Pre-norm residual mixer, optionally followed by a depthwise convolution that is not residual.

    Args:
        dim: Channels of the tokens, C.
        drop_path: Probability of skipping the mixer.
        local_conv: Append the depthwise convolution (the first layer of L1).
        device: Where to create the parameters.
        dtype: Their dtype.
        **mixer_kwargs: Further arguments of :class:`PlainMambaMixer`.
    """

    def __init__(
        self, dim: int, drop_path: float = 0.0, local_conv: bool = False, device=None, dtype=None, **mixer_kwargs: Any
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = before_linear(LayerNorm(dim, eps=1e-5, **dd))
        self.mixer = PlainMambaMixer(dim, **mixer_kwargs, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.dw = nn.Identity()
        if local_conv:
            conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False, **dd)
            self.dw = nn.Sequential(conv, nn.BatchNorm2d(dim, **dd), nn.GELU())
        self.local_conv = local_conv

    def convolve(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the last convolution, if there is one."""
        return self.dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if self.local_conv else x

    @torch.jit.unused
    def step(self, x: torch.Tensor, pending: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the stream and what this block has still to add to it; see ``layers/joined_blocks.py``."""
        x, normed = add_norm(x, pending, self.norm)
        added = self.drop_path(self.mixer(normed))
        return (self.convolve(x + added), None) if self.local_conv else (x, added)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens ``(B, H, W, C)`` to the same."""
        return self.convolve(x + self.drop_path(self.mixer(self.norm(x))))


class ConvStemEmbed(nn.Module):
    """Convolutional stem at half resolution, then a strided projection to tokens.

    Images are padded at the bottom and the right with zeros, after the stem, to whole patches.

    Args:
        patch_size: Total stride, even.
        in_chans: Channels of the image.
        embed_dim: Channels of the tokens, C.
        stem_dim: Channels of the stem.
        num_convs: 3x3 convolutions of the stem.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(
        self,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 192,
        stem_dim: int = 64,
        num_convs: int = 1,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.stride = patch_size // 2
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, stem_dim, 7, stride=2, padding=3, bias=False, **dd),
            nn.BatchNorm2d(stem_dim, **dd),
            nn.ReLU(),
        )
        convs = []
        for _ in range(num_convs):
            convs.append(nn.Conv2d(stem_dim, stem_dim, 3, padding=1, bias=False, **dd))
            convs += [nn.BatchNorm2d(stem_dim, **dd), nn.ReLU()]
        self.convs = nn.Sequential(*convs)
        self.projection = nn.Conv2d(stem_dim, embed_dim, self.stride, stride=self.stride, **dd)

    @torch.jit.ignore
    def grid_size(self, img_size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the grid of tokens of an image."""
        return tuple(-(-size // (2 * self.stride)) for size in img_size)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """Pad a map of the stem to whole patches, and project these."""
        right = (self.stride - x.shape[3] % self.stride) % self.stride
        bottom = (self.stride - x.shape[2] % self.stride) % self.stride
        return self.projection(F.pad(x, (0, right, 0, bottom)))

    @torch.jit.unused
    def _recomputes(self, x: torch.Tensor) -> bool:
        """Whether the stem's largest maps, those after its norms, are computed anew in backward."""
        if not recomputes(x, self.stem, self.convs, self.projection):
            return False
        layers = [*self.stem, *self.convs, self.projection]
        return all(type(layer) in (nn.Conv2d, nn.BatchNorm2d, nn.ReLU) for layer in layers)

    @torch.jit.unused
    def _recomputed(self, x: torch.Tensor) -> torch.Tensor:
        layers = [*self.stem, *self.convs]
        x = layers[0](x)
        whole = all(size % self.stride == 0 for size in x.shape[2:])  # padding by nothing would copy
        for norm, conv in zip(layers[1::3], [*layers[3::3], self.projection], strict=True):
            then = conv if whole or conv is not self.projection else self.project
            x = recomputed(repeatable_norm(norm, lambda x, then=then: then(F.relu(x))), [norm, conv], x)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embed images ``(B, in_chans, height, width)`` as ``(B, H, W, C)``."""
        x = check_input(x, "(B, channels, height, width)", [1, 1])
        if not torch.jit.is_scripting():
            if self._recomputes(x):
                return self._recomputed(x).permute(0, 2, 3, 1)
        return self.project(self.convs(self.stem(x))).permute(0, 2, 3, 1)


class PlainMamba(GridModel):
    """PlainMamba.

    Args:
        img_size: Nominal image size; others are taken as well, by interpolating the position embedding.
        patch_size: Stride of the tokens in pixels.
        in_chans: Channels of the image.
        num_classes: Classes; 0 for no classifier.
        global_pool: ``avg``, ``max``, ``avgmax`` or empty for none.
        embed_dim: Channels of the tokens, C.
        depth: Number of blocks.
        stem_dim: Channels of the stem.
        num_stem_convs: 3x3 convolutions of the stem.
        local_conv_layers: Blocks that end in a depthwise convolution.
        d_state: States a channel, N.
        path: Scan path.
        permute_projections: See :class:`DirectionAwareSSM`; the published weights need the default.
        add_dt_bias_once: See :class:`DirectionAwareSSM`; the published weights need the default.
        mamba_dt_init: Keep Mamba's careful initial step sizes. The authors' classifier overwrites them, with those of
            all linear layers, by a truncated normal and a zero bias; that is the default.
        drop_rate: Dropout before the classifier.
        pos_drop_rate: Dropout after the position embedding.
        drop_path_rate: Stochastic depth of the last block; the blocks before it rise to it linearly.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    output_fmt = "NHWC"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 192,
        depth: int = 24,
        stem_dim: int = 64,
        num_stem_convs: int = 1,
        local_conv_layers: tuple[int, ...] = (),
        d_state: int = 16,
        path: str = SNAKES,
        permute_projections: bool = False,
        add_dt_bias_once: bool = False,
        mamba_dt_init: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        rates = calculate_drop_path_rates(drop_path_rate, depth)
        blocks = [
            PlainMambaBlock(
                embed_dim,
                drop_path=rates[i],
                local_conv=i in local_conv_layers,
                d_state=d_state,
                path=path,
                permute_projections=permute_projections,
                add_dt_bias_once=add_dt_bias_once,
                **dd,
            )
            for i in range(depth)
        ]
        super().__init__(
            patch_embed=ConvStemEmbed(patch_size, in_chans, embed_dim, stem_dim, num_stem_convs, **dd),
            blocks=blocks,
            reductions=[patch_size] * depth,
            input_size=to_2tuple(img_size),
            embed_dim=embed_dim,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            norm=LayerNorm(embed_dim, eps=1e-6, **dd),
            fc_norm=nn.Identity(),
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            **dd,
        )
        self.mamba_dt_init = mamba_dt_init
        self.init_unless_meta()

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as the authors do: every linear layer, the scan's too, by a truncated normal without bias."""
        if needs_reset:
            self.reset_modules()
        self.init_embeddings()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.01 if module is self.head else 0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, DirectionAwareSSM):
                trunc_normal_(module.direction_B, std=0.02)
                trunc_normal_(module.x_proj_weight, std=0.02)
                if not self.mamba_dt_init:
                    trunc_normal_(module.dt_proj_weight, std=0.02)
                    nn.init.zeros_(module.dt_proj_bias)


_RENAMED = [("layers.", "blocks."), (".mamba.", ".mixer."), ("ln1.", "norm."), ("head.fc.", "head.")]
_DIRECTION_B = ("mixer.direction_Bs", "mixer.ssm.direction_B")


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: PlainMamba) -> dict[str, torch.Tensor]:
    """Convert an official checkpoint, or one of this project's, to a model's layout.

    Args:
        state_dict: Official keys, with or without ``backbone.``, or ours. Its position embedding is interpolated to the
            model's grid.
        model: The model it is for.

    Returns:
        The model's state dict.
    """
    converted = {}
    for name, tensor in strip_prefixes(state_dict).items():
        name, tensor = stack_directions(rename(name, _RENAMED), tensor)
        converted[name.replace(*_DIRECTION_B) if name.endswith(_DIRECTION_B[0]) else name] = tensor
    if "pos_embed" in converted:
        converted["pos_embed"] = embed_to_grid(converted["pos_embed"], model.nominal_grid(), model.published_grid())
    return converted


def official_state_dict(state_dict: dict[str, torch.Tensor], model: PlainMamba) -> dict[str, torch.Tensor]:
    """Convert a model's state dict (or the gradients of its parameters) to the official names and shapes."""
    official = {}
    for name, tensor in state_dict.items():
        if name.startswith("head."):
            official[name.replace("head.", "head.fc.", 1)] = tensor
            continue
        if name == "pos_embed":
            tensor = tensor.flatten(1, 2)
        name, tensor = unstack_directions(name.replace(*reversed(_DIRECTION_B)), tensor)
        name = rename(name, _RENAMED[:2], inverse=True)
        official["backbone." + ("ln1." + name.removeprefix("norm.") if name.startswith("norm.") else name)] = tensor
    return official


def _cfg(file: str = "", **kwargs: Any) -> dict[str, Any]:
    source = {"hf_hub_id": "ChenhongyiYang/PlainMamba", "hf_hub_filename": file} if file else {}
    return {
        **source,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (14, 14),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.stem.0",
        "classifier": "head",
        "origin_url": "https://github.com/ChenhongyiYang/PlainMamba",
        "paper_name": "PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition",
        "paper_ids": "arXiv:2403.17695",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "plainmamba_l1.in1k": _cfg("l1.pth", notes=("top1: 77.9", "top5: 94.0")),
        "plainmamba_l2.in1k": _cfg("l2.pth", notes=("top1: 81.6", "top5: 95.6")),
        "plainmamba_l3.in1k": _cfg("l3.pth", notes=("top1: 82.3", "top5: 95.9")),
        "test_plainmamba.untrained": _cfg(input_size=(3, 64, 64), pool_size=(8, 8)),
    }
)


def _create_plainmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    quarters = quarter_indices(kwargs["depth"])
    return build_model(PlainMamba, variant, pretrained, checkpoint_filter_fn, **{"out_indices": quarters, **kwargs})


@register_model
def plainmamba_l1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PlainMamba-L1: 7 M parameters."""
    model_args = {"embed_dim": 192, "depth": 24, "local_conv_layers": (0,)}
    return _create_plainmamba("plainmamba_l1", pretrained, **{**model_args, **kwargs})


@register_model
def plainmamba_l2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PlainMamba-L2: 26 M parameters."""
    model_args = {"embed_dim": 384, "depth": 24, "num_stem_convs": 2}
    return _create_plainmamba("plainmamba_l2", pretrained, **{**model_args, **kwargs})


@register_model
def plainmamba_l3(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PlainMamba-L3: 51 M parameters."""
    model_args = {"embed_dim": 448, "depth": 36, "num_stem_convs": 2}
    return _create_plainmamba("plainmamba_l3", pretrained, **{**model_args, **kwargs})


@register_model
def test_plainmamba(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A PlainMamba small enough for tests."""
    model_args = {
        "img_size": 64,
        "patch_size": 8,
        "embed_dim": 48,
        "depth": 4,
        "stem_dim": 16,
        "local_conv_layers": (0,),
        "d_state": 4,
        "mamba_dt_init": True,
    }
    return _create_plainmamba("test_plainmamba", pretrained, **{**model_args, **kwargs})
