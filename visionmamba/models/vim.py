"""Vim: a plain backbone whose token mixer scans the sequence of patches both ways.

Paper: "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model", Zhu et al. 2024,
https://arxiv.org/abs/2401.09417
Official code and weights (Apache-2.0): https://github.com/hustvl/Vim

Written from the paper and from published facts about the official models (names, shapes, hyperparameters); the weights
are the authors'. Patches stay a sequence in raster order with the class token in its middle; the two directions are
the path ``"h,h_flip"`` over that sequence, so a class token is visited like any other token. Both directions share one
gate: gating each before turning it round is gating their sum.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerScale, calculate_drop_path_rates, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, register_model, register_model_deprecations
from timm.models._input import update_model_input_size

from ..layers import (
    CLASS_TOKEN_POSITIONS,
    STREAM_NORMS,
    BlockPair,
    GatedMixer,
    ResidualBlock,
    SelectiveSSM,
    StridedPatchEmbed,
    apply_rope,
    axial_rope_table,
    check_choice,
    class_token_indices,
    insert_class_token,
    remove_class_token,
    resize_pos_embed_aligned,
    take_class_token,
    widen,
)
from ..layers.recompute import ScanInputs
from ..ops import causal_conv1d
from ._builder import build_model
from ._isotropic import IsotropicModel
from ._vim_official import checkpoint_filter_fn, official_arguments, official_state_dict

__all__ = ["Vim", "checkpoint_filter_fn", "official_arguments", "official_state_dict"]

_DIRECTIONS = ("mean", "sum", "tied", "forward")
_FEATURE_STREAMS = ("residual", "mixer")

torch.fx.wrap("widen")  # FX looks for leaf functions where forward is defined, and that is the base's


class TiedSSM(SelectiveSSM):
    """Both directions of a sequence with one set of parameters, except for A.

    The convolution runs forwards only, and both scans read its output, step sizes, B and C.

    Args:
        d_inner: Channels, D.
        d_state: States a channel, N.
        dt_rank: Rank of the step size's projection, R.
        path: The two directions.
        d_conv: Taps of the convolution.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(
        self,
        d_inner: int,
        d_state: int = 16,
        dt_rank: int = 12,
        path: str = "h,h_flip",
        d_conv: int = 4,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(d_inner, d_state, dt_rank, path.split(",")[0], d_conv, device=device, dtype=dtype)
        self.conv_path, self.path = self.path, path
        self.A_log = nn.Parameter(self.A_log.detach().repeat(2, 1, 1))

    def scan_inputs(self, x: torch.Tensor, z: torch.Tensor | None, grid: list[int]) -> ScanInputs:
        """Return the scan's tensor arguments for tokens ``(B, L, D)`` and a gate of their shape."""
        x, _ = causal_conv1d(x, self.conv_weight, self.conv_bias, path=self.conv_path, grid=grid)
        dt, B, C = (projected.expand(-1, -1, 2, -1) for projected in self.project(x))
        A = -torch.exp(self.A_log.float())
        D, dt_bias = self.D.expand(2, -1), self.dt_proj_bias.expand(2, -1)
        return x.squeeze(2), dt, A, B, C, D, z, dt_bias, self.dt_proj_weight.expand(2, -1, -1)


class VimMixer(GatedMixer):
    """Vim's token mixer: a gated scan along the sequence, both ways.

    Args:
        dim: Channels of the tokens, C.
        expand: Channels inside relative to C.
        d_state: States a channel, N.
        d_conv: Taps of the causal convolution.
        dt_rank: Rank of the step sizes; ``ceil(C / 16)`` if absent.
        directions: See :class:`Vim`.
        reverse: Scan the reversed sequence.
        layer_scale: Initial scale of each output channel; None for no scale.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(
        self,
        dim: int,
        expand: int = 2,
        d_state: int = 16,
        d_conv: int = 4,
        dt_rank: int | None = None,
        directions: str = "mean",
        reverse: bool = False,
        layer_scale: float | None = None,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        path = "h_flip,h" if reverse else "h,h_flip"
        if directions == "forward":
            path = path.split(",")[0]
        ssm = TiedSSM if directions == "tied" else SelectiveSSM
        dt_rank = dt_rank or math.ceil(dim / 16)
        super().__init__(dim, lambda d_inner: ssm(d_inner, d_state, dt_rank, path, d_conv, **dd), expand, **dd)
        self.layer_scale = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)

    def forward(self, x: torch.Tensor, grid: list[int]) -> torch.Tensor:
        """Mix tokens ``(B, L, C)``, a sequence whatever their ``grid`` is."""
        return self.layer_scale(self.mix(x, [x.shape[1]]))


class Vim(IsotropicModel):
    """Vision Mamba; defaults are those of the published ``vim_tiny_patch16_224``.

    Args:
        img_size: Image size, (height, width) or one for both.
        patch_size: Side of a patch.
        stride: Distance of neighbouring patches; ``patch_size`` if absent.
        in_chans: Channels of the image.
        num_classes: Classes; 0 for no classifier.
        global_pool: ``"token"`` the class token; ``"avg"`` or ``"last"`` of the patch tokens; ``"max"`` the largest
            logit over the patch tokens, as in the authors' code (the pooling comes after the classifier); ``""`` none.
        embed_dim: Channels of the tokens, C.
        depth: Number of blocks.
        class_token: ``"middle"`` (published), ``"head"`` (as in the paper's first version), ``"double"`` (one at each
            end, averaged at last) or ``""`` for none.
        pos_embed: Learn an absolute position embedding, with rows for the class tokens too.
        pos_embed_resize: How a checkpoint's position embedding of another grid is made to fit: ``"official"``, which
            the published fine-tuned models were made with and which mistakes the middle class token's row for a
            patch's, or ``"aligned"``. Sizes that change after construction are always aligned.
        dynamic_img_size: Take images of any size, resizing the position embedding on the fly.
        dynamic_img_pad: Pad images with zeros at the right and the bottom to whole patches, instead of cropping them.
        rope: Rotary embedding before each block, ``"stream"`` of the residual stream, ``"mixer"`` of what the last
            block added to it, or ``""``.
        rope_skip: Tokens without rotation: ``"first"``, as many first tokens as there are class tokens, which is wrong
            for a middle class token but what the authors' models do, or ``"class"``, the class tokens.
        rope_reference_size: Side of the grid that the rotary embedding's positions are scaled to.
        expand: Channels inside the mixer relative to C.
        d_state: States a channel, N.
        d_conv: Taps of the causal convolution.
        dt_rank: Rank of the step sizes; ``ceil(C / 16)`` if absent.
        directions: ``"mean"`` both ways with parameters of their own, averaged (published); ``"sum"``, the same
            without halving the sum; ``"tied"`` both ways with shared parameters except for A, summed; ``"forward"``
            one way only.
        paired: Blocks work in pairs on the same tokens, the second on their reversal, and their streams are summed
            (that doubles the residual).
        norm: ``"rms"`` or ``"layer"``.
        norm_eps: Added to the mean square (the variance).
        final_norm: Norm after the last block; the authors' detection backbones go without.
        residual_in_float32: Keep the residual stream in float32 whatever the parameters' dtype.
        layer_scale: Initial scale of each channel of the mixers' outputs; None for no scale.
        init_backward_dt: Initialise the backward direction's step sizes as the forward's. The published models begin
            with a bias of 0 there, a step of about 0.69 instead of 0.001 to 0.1.
        feature_stream: What intermediate features are: ``"residual"`` the stream after a block, as the next block's
            norm sees it, or ``"mixer"`` the block's mixer output alone.
        drop_rate: Dropout before the classifier.
        pos_drop_rate: Dropout after the position embedding.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    pools = ("", "token", "avg", "last", "max")

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 24,
        class_token: str = "middle",
        pos_embed: bool = True,
        pos_embed_resize: str = "official",
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        rope: str = "",
        rope_skip: str = "first",
        rope_reference_size: int = 14,
        expand: int = 2,
        d_state: int = 16,
        d_conv: int = 4,
        dt_rank: int | None = None,
        directions: str = "mean",
        paired: bool = False,
        norm: str = "rms",
        norm_eps: float = 1e-5,
        final_norm: bool = True,
        residual_in_float32: bool = True,
        layer_scale: float | None = None,
        init_backward_dt: bool = False,
        feature_stream: str = "residual",
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        check_choice("class_token", class_token, CLASS_TOKEN_POSITIONS)
        check_choice("pos_embed_resize", pos_embed_resize, ("official", "aligned"))
        check_choice("rope", rope, ("", "mixer", "stream"))
        check_choice("rope_skip", rope_skip, ("first", "class"))
        check_choice("directions", directions, _DIRECTIONS)
        check_choice("norm", norm, STREAM_NORMS)
        check_choice("feature_stream", feature_stream, _FEATURE_STREAMS)
        if paired and depth % 2:
            raise ValueError(f"depth: expected an even number of paired blocks, got {depth}")
        self.class_token = class_token  # before the rest: the pooling and a family's mixers depend on it
        self.pos_embed_resize, self.dynamic_img_size = pos_embed_resize, dynamic_img_size
        self.rope, self.rope_skip, self.rope_reference_size = rope, rope_skip, rope_reference_size
        self.residual_in_float32, self.init_backward_dt = residual_in_float32, init_backward_dt
        self.feature_stream = feature_stream

        patch_embed = StridedPatchEmbed(
            img_size, patch_size, stride, in_chans, embed_dim, not dynamic_img_size, dynamic_img_pad, **dd
        )
        mixer = dict(
            dim=embed_dim, expand=expand, d_state=d_state, d_conv=d_conv, dt_rank=dt_rank, directions=directions,
            layer_scale=layer_scale, **dd,
        )  # fmt: skip
        norm_layer = partial(STREAM_NORMS[norm], embed_dim, eps=norm_eps, **dd)
        blocks = self._create_blocks(depth, paired, rope, norm_layer, drop_path_rate, mixer)
        tokens = len(class_token_indices(class_token, 1))
        super().__init__(
            patch_embed,
            blocks,
            reductions=[patch_embed.feat_ratio()] * len(blocks),
            embed_dim=embed_dim,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            norm=norm_layer() if final_norm else nn.Identity(),
            fc_norm=nn.Identity(),
            pos_embed_shape=(1, patch_embed.num_patches + tokens, embed_dim) if pos_embed else None,
            num_class_tokens=tokens,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            **dd,
        )
        self.init_unless_meta()

    def _create_blocks(
        self, depth: int, paired: bool, rope: str, norm_layer: Callable[[], nn.Module], drop_path_rate: float,
        mixer: dict[str, Any],
    ) -> nn.ModuleList:  # fmt: skip
        last = depth - (2 if paired else 1)  # nothing reads the stream's rotation after the last block
        blocks = [
            ResidualBlock(
                self.create_mixer(i, reverse=paired and i % 2 == 1, **mixer),
                norm_layer(),
                drop_path=rate,
                scale=0.5 if mixer["directions"] == "mean" else 1.0,
                rope=rope if i < last else "",
            )
            for i, rate in enumerate(calculate_drop_path_rates(drop_path_rate, depth))
        ]
        return nn.ModuleList(
            [BlockPair(*pair) for pair in zip(blocks[::2], blocks[1::2], strict=True)] if paired else blocks
        )

    def create_mixer(self, index: int, **mixer: Any) -> nn.Module:
        """Return the token mixer of a block; families with their own override this."""
        return VimMixer(**mixer)

    def check_pool(self, global_pool: str) -> str:
        """Return a pooling that the model has; raise otherwise."""
        if global_pool == "token" and not self.class_token:
            raise ValueError('global_pool: expected "avg", "last", "max" or "" without a class token, got "token"')
        return super().check_pool(global_pool)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as the authors do.

        Args:
            needs_reset: Also reset what initialises itself when it is constructed (after a model was made on ``meta``).
        """
        mixers = [module for module in self.modules() if isinstance(module, VimMixer)]
        if needs_reset:
            self.reset_modules()
        self.patch_embed.init_weights()
        for mixer in mixers:
            with torch.no_grad():
                mixer.out_proj.weight /= len(mixers) ** 0.5
                if mixer.ssm.dt_proj_bias.shape[0] == 2 and not self.init_backward_dt:
                    mixer.ssm.dt_proj_bias[1].zero_()
        self.init_embeddings()
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Make another image size the model's own; the position embedding is resized, every row where it belongs.

        Args:
            img_size: Height and width.
        """
        if img_size is None:
            return
        old_grid = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size)
        grid = self.patch_embed.grid_size
        if self.pos_embed is not None and grid != old_grid:
            resized = resize_pos_embed_aligned(self.pos_embed.detach(), grid, self.class_token, old_grid)
            self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)
        update_model_input_size(self, self.patch_embed.img_size)

    def _grid_and_pos_embed(self, x: torch.Tensor) -> tuple[list[int], torch.Tensor | None]:
        """Return the patch grid of images and its position embedding; a scripted model takes only its own size."""
        if self.dynamic_img_size and not torch.jit.is_scripting():
            rows, columns = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
            return [rows, columns], self._pos_embed_for((rows, columns))
        rows, columns = self.patch_embed.grid_size
        return [rows, columns], self.pos_embed

    def _embed(self, x: torch.Tensor) -> tuple[torch.Tensor, list[int], torch.Tensor | None]:
        """Return the first block's input ``(B, L, C)``, the patch grid, and the rotary embedding's table if any."""
        image, x = x, self.patch_embed(x)
        grid, pos_embed = self._grid_and_pos_embed(image)
        if self.cls_token is not None:
            x = insert_class_token(x, self.cls_token, self.class_token)
        if pos_embed is not None:
            x = x + pos_embed
        x = self.pos_drop(x)
        if self.residual_in_float32:
            x = widen(x)
        if self.rope == "":
            return x, grid, None
        table = self._rope_table(grid, x.device)
        return apply_rope(x, table), grid, table

    def _rope_table(self, grid: list[int], device: torch.device) -> torch.Tensor:
        """Return the rotary embedding's table for a patch grid, see :func:`visionmamba.layers.axial_rope_table`."""
        unrotated = class_token_indices(self.class_token, grid[0] * grid[1])
        if self.rope_skip == "first":
            unrotated = list(range(len(unrotated)))
        return axial_rope_table(self.embed_dim, grid, unrotated, self.rope_reference_size, device=device)

    def _pos_embed_for(self, grid: tuple[int, int]) -> torch.Tensor | None:
        if self.pos_embed is None or grid == self.patch_embed.grid_size:
            return self.pos_embed
        return resize_pos_embed_aligned(self.pos_embed, grid, self.class_token, self.patch_embed.grid_size)

    @torch.jit.unused
    def _joins(self, x: torch.Tensor, blocks: nn.Module) -> bool:
        """Whether each block leaves its addition to the norm of the next one."""
        plain = all(type(block) is ResidualBlock and block.joins(x) for block in blocks)
        return plain and self.residual_in_float32 and not self.grad_checkpointing

    @torch.jit.unused
    def _joined(self, x: torch.Tensor, blocks: nn.Module, grid: list[int]) -> torch.Tensor:
        """Return the residual stream after the blocks."""
        pending: torch.Tensor | None = None
        for block in blocks:
            x, pending = block.enter(x, pending, grid)
        return x if pending is None else torch.add(x, pending, alpha=block.scale)

    def forward_trunk(
        self, x: torch.Tensor, take: list[int], levels: int, norm: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """Run the stem and the first blocks; see :meth:`VisionModel.forward_trunk`.

        The constructor's ``feature_stream`` says what a block's feature is. The stream after the last block, without
        the norm, is what the authors' detection and segmentation backbones call the sum of the last hidden state and
        the residual.
        """
        if torch.jit.is_scripting() or levels == len(self.blocks):
            blocks = self.blocks
        else:
            blocks = self.blocks[:levels]
        x, grid, table = self._embed(x)
        features: list[torch.Tensor] = []
        class_tokens: list[torch.Tensor] = []
        if not torch.jit.is_scripting():
            if len(take) == 0 and self._joins(x, blocks):
                return self._joined(x, blocks, grid), features, class_tokens
        for i, block in enumerate(blocks):
            if self.feature_stream == "residual":
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x = checkpoint(block, x, grid, table)
                else:
                    x = block(x, grid, table)
                feature = x
            else:
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x, mixed = checkpoint(block.step, x, grid, table)
                else:
                    x, mixed = block.step(x, grid, table)
                feature = mixed * block.scale
            if i in take:
                feature = self.finish(feature, i + 1) if norm else self._narrow(feature)
                features.append(remove_class_token(feature, self.class_token).unflatten(1, grid))
                if not torch.jit.is_scripting() and self.num_class_tokens:
                    class_tokens.append(feature[:, class_token_indices(self.class_token, grid[0] * grid[1])])
        return x, features, class_tokens

    def _narrow(self, x: torch.Tensor) -> torch.Tensor:
        """Return the residual stream in the dtype of activations outside it, the parameters'."""
        return x.to(self.patch_embed.proj.weight.dtype)

    def finish(self, x: torch.Tensor, levels: int) -> torch.Tensor:
        """Leave the residual stream ``(B, L, C)`` through the final norm, if there is one."""
        return self._narrow(x) if isinstance(self.norm, nn.Identity) else self.norm(x)

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """Pool tokens ``(B, L, C)`` to ``(B, C)``; tokens that are not pooled pass."""
        if self.global_pool == "token":
            return take_class_token(x, self.class_token)
        if self.global_pool == "":
            return x
        x = remove_class_token(x, self.class_token)
        if self.global_pool == "avg":
            return x.mean(dim=1)
        return x[:, -1] if self.global_pool == "last" else x.amax(dim=1)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool and classify tokens ``(B, L, C)``; with ``pre_logits`` only pool."""
        if self.global_pool == "max" and not pre_logits:
            return self.pool(self.head(self.head_drop(x)))
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)


def _cfg(hf_hub_id: str | None = None, filename: str | None = None, top1: float = 0, top5: float = 0, **kwargs):
    return {
        "url": "", "hf_hub_id": hf_hub_id, "hf_hub_filename": filename, "num_classes": 1000,
        "input_size": (3, 224, 224), "pool_size": None, "crop_pct": 0.875, "interpolation": "bicubic",
        "fixed_input_size": True, "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj", "classifier": "head", "license": "apache-2.0",
        "paper_name": "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
        "paper_ids": "arXiv:2401.09417", "origin_url": "https://github.com/hustvl/Vim",
        "notes": (f"top1: {top1}", f"top5: {top5}") if top1 else (),
        **kwargs,
    }  # fmt: skip


default_cfgs = generate_default_cfgs({
    "vim_tiny_patch16_224.in1k": _cfg("hustvl/Vim-tiny-midclstok", "vim_t_midclstok_76p1acc.pth", 76.1, 93.0),
    "vim_tiny_patch16_stride8_224.in1k": _cfg(
        "hustvl/Vim-tiny-midclstok", "vim_t_midclstok_ft_78p3acc.pth", 78.3, 94.2
    ),
    "vim_small_patch16_224.in1k": _cfg("hustvl/Vim-small-midclstok", "vim_s_midclstok_80p5acc.pth", 80.5, 95.1),
    "vim_small_patch16_stride8_224.in1k": _cfg(
        "hustvl/Vim-small-midclstok", "vim_s_midclstok_ft_81p6acc.pth", 81.6, 95.4
    ),
    "vim_base_patch16_224.in1k": _cfg("hustvl/Vim-base-midclstok", "vim_b_midclstok_81p9acc.pth", 81.9, 95.8),
    "test_vim.untrained": _cfg(input_size=(3, 64, 64)),
})  # fmt: skip


def _create_vim(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return build_model(Vim, variant, pretrained, checkpoint_filter_fn, **{"out_indices": 3, **kwargs})


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti, 7 M parameters, 196 patches."""
    return _create_vim("vim_tiny_patch16_224", pretrained, **dict(dict(embed_dim=192), **kwargs))


@register_model
def vim_tiny_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti+, Vim-Ti fine-tuned on overlapping patches, 729 of them."""
    return _create_vim("vim_tiny_patch16_stride8_224", pretrained, **dict(dict(embed_dim=192, stride=8), **kwargs))


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S, 26 M parameters, 196 patches."""
    return _create_vim("vim_small_patch16_224", pretrained, **dict(dict(embed_dim=384), **kwargs))


@register_model
def vim_small_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S+, Vim-S fine-tuned on overlapping patches, 729 of them."""
    return _create_vim("vim_small_patch16_stride8_224", pretrained, **dict(dict(embed_dim=384, stride=8), **kwargs))


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-B, 98 M parameters, 196 patches."""
    return _create_vim("vim_base_patch16_224", pretrained, **dict(dict(embed_dim=768), **kwargs))


@register_model
def test_vim(pretrained: bool = False, **kwargs: Any) -> Vim:
    """A model small enough for tests: 0.2 M parameters."""
    model_args = dict(img_size=64, patch_size=8, embed_dim=64, depth=3, d_state=8)
    return _create_vim("test_vim", pretrained, **dict(model_args, **kwargs))


_PUBLISHED = "bimambav2_final_pool_mean_abs_pos_embed_with"
register_model_deprecations(
    __name__,
    {
        f"vim_tiny_patch16_224_{_PUBLISHED}_midclstok_div2": "vim_tiny_patch16_224",
        f"vim_tiny_patch16_stride8_224_{_PUBLISHED}_midclstok_div2": "vim_tiny_patch16_stride8_224",
        f"vim_small_patch16_224_{_PUBLISHED}_midclstok_div2": "vim_small_patch16_224",
        f"vim_small_patch16_stride8_224_{_PUBLISHED}_midclstok_div2": "vim_small_patch16_stride8_224",
        f"vim_base_patch16_224_{_PUBLISHED}_middle_cls_token_div2": "vim_base_patch16_224",
    },
)
