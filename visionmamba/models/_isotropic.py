"""What the isotropic families share: patches, a position embedding, blocks of one width, a pooled linear head."""

# no "from __future__ import annotations": FX copies forward's annotations into the code that TorchScript then reads

from typing import Any

import torch
import torch.nn as nn
from timm.layers import get_device_dtype, global_pool_nlc, trunc_normal_
from timm.models import checkpoint
from timm.models._input import update_model_input_size

from ..layers import check_choice
from ..layers.grid_embed import resize_grid_embed
from ..layers.joined_blocks import blocks_join, run_joined
from ._base import VisionModel

__all__ = ["GridModel", "IsotropicModel", "quarter_indices"]

torch.fx.wrap("resize_grid_embed")  # FX looks for leaf functions where forward is defined, and that is the base's


def quarter_indices(depth: int) -> tuple[int, int, int, int]:
    """Return the last block of each quarter of the trunk: what stands for four levels where there is one."""
    return tuple(round(depth * part / 4) - 1 for part in (1, 2, 3, 4))


class IsotropicModel(VisionModel):
    """Blocks of one width over tokens, and a linear classifier of the pooled tokens.

    Args:
        patch_embed: Input to patch tokens.
        blocks: The blocks, in a container.
        reductions: Stride of the tokens after each block, in pixels.
        embed_dim: Channels of the tokens, C.
        num_classes: Classes; 0 for no classifier.
        in_chans: Channels of the input.
        global_pool: One of ``pools``.
        norm: Applied to the tokens after the last block.
        fc_norm: Applied after the pooling.
        pos_embed_shape: Shape of the position embedding; None for none.
        num_class_tokens: Class tokens.
        drop_rate: Dropout before the classifier.
        pos_drop_rate: Dropout after the position embedding.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    pools = ("", "avg", "avgmax", "max")

    def __init__(
        self,
        patch_embed: nn.Module,
        blocks: nn.ModuleList | nn.Sequential,
        reductions: list[int],
        embed_dim: int,
        num_classes: int,
        in_chans: int,
        global_pool: str,
        norm: nn.Module,
        fc_norm: nn.Module,
        pos_embed_shape: tuple[int, ...] | None,
        num_class_tokens: int = 0,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_class_tokens = num_class_tokens
        self.global_pool = self.check_pool(global_pool)
        self.grad_checkpointing = False

        self.patch_embed = patch_embed
        self.cls_token = nn.Parameter(torch.empty(1, num_class_tokens, embed_dim, **dd)) if num_class_tokens else None
        self.pos_embed = None if pos_embed_shape is None else nn.Parameter(torch.empty(pos_embed_shape, **dd))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.blocks = blocks
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": reduction, "module": f"blocks.{i}"}
            for i, reduction in enumerate(reductions)
        ]
        self.norm = norm
        self.fc_norm = fc_norm
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()

    def check_pool(self, global_pool: str) -> str:
        """Return a pooling that the model has; raise otherwise."""
        return check_choice("global_pool", global_pool, self.pools)

    def init_embeddings(self) -> None:
        """Initialise the position embedding and the class tokens, truncated normal of 0.02."""
        for embedding in (self.pos_embed, self.cls_token):
            if embedding is not None:
                trunc_normal_(embedding, std=0.02)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return the regular expressions that group parameters by depth."""
        blocks = r"^blocks\.(\d+)"
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": blocks if coarse else [(blocks, None), (r"^norm", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.head

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: Classes; 0 for no classifier.
            global_pool: New pooling; None keeps the present one.
        """
        if global_pool is not None:
            self.global_pool = self.check_pool(global_pool)
        dd = get_device_dtype(self)
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the wanted intermediates do not need, see :meth:`VisionModel.prune_intermediate_layers`."""
        take_indices = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:
            self.fc_norm = nn.Identity()
        return take_indices

    def num_levels(self) -> int:
        """Return the number of blocks."""
        return len(self.blocks)


class GridModel(IsotropicModel):
    """An isotropic model of images or clips of any size, whose tokens are maps from end to end.

    Tokens are channels-last in raster order, ``(B, *grid, C)`` with a grid of any rank, from the patch embedding to the
    pooling; a block takes and returns such a map.

    Args:
        patch_embed: ``(B, in_chans, ...)`` to ``(B, *grid, C)``; has ``grid_size(input_size) -> grid``.
        blocks: Map ``(B, *grid, C)`` to the same, one may shrink the grid.
        input_size: Nominal size of the input, (height, width) or (frames, height, width).
        embed_dim: Channels of the tokens, C.
        **kwargs: Further arguments of :class:`IsotropicModel`, but for the embeddings.
    """

    feature_dim = -1  # of forward_features' output

    def __init__(
        self,
        patch_embed: nn.Module,
        blocks: list[nn.Module],
        input_size: tuple[int, ...],
        embed_dim: int,
        **kwargs: Any,
    ) -> None:
        pos_embed_shape = (1, *patch_embed.grid_size(input_size), embed_dim)
        super().__init__(
            patch_embed, nn.Sequential(*blocks), embed_dim=embed_dim, pos_embed_shape=pos_embed_shape, **kwargs
        )
        self.input_size = tuple(input_size)

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Resize the position embedding for another nominal image size; other sizes are interpolated on the fly.

        Args:
            img_size: (height, width) in pixels.
        """
        if img_size is not None:
            height_width = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
            self._resize((*self.input_size[:-2], *height_width))

    def _resize(self, input_size: tuple[int, ...], **model_args) -> None:
        self.input_size = input_size
        embed = resize_grid_embed(self.pos_embed.detach(), list(self.patch_embed.grid_size(input_size)))
        self.pos_embed = nn.Parameter(embed.clone(), requires_grad=self.pos_embed.requires_grad)
        update_model_input_size(self, input_size[-2:], **model_args)

    def nominal_grid(self) -> tuple[int, ...]:
        """Return the size of the token grid at the nominal input size."""
        return tuple(self.pos_embed.shape[1:-1])

    def published_grid(self) -> tuple[int, ...]:
        """Return the size of the token grid of the published weights."""
        frames = self.pretrained_model_args.get("num_frames")
        size = tuple(self.pretrained_cfg["input_size"][-2:])
        return self.patch_embed.grid_size(size if frames is None else (frames, *size))

    def forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        """Embed ``(B, in_chans, ...)`` as ``(B, *grid, C)``, positions included."""
        x = self.patch_embed(x)
        return self.pos_drop(x + resize_grid_embed(self.pos_embed, x.shape[1:-1]))

    def forward_trunk(
        self, x: torch.Tensor, take: list[int], levels: int, norm: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """Run the stem and the first blocks; see :meth:`VisionModel.forward_trunk`."""
        if torch.jit.is_scripting() or levels == len(self.blocks):
            blocks = self.blocks
        else:
            blocks = self.blocks[:levels]
        x = self.forward_stem(x)
        features: list[torch.Tensor] = []
        if not torch.jit.is_scripting():
            if len(take) == 0 and not self.grad_checkpointing and blocks_join(blocks, x):
                return run_joined(blocks, x), features, []
        for i, block in enumerate(blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
            if i in take:
                features.append(self.norm(x) if norm else x)
        return x, features, []

    def finish(self, x: torch.Tensor, levels: int) -> torch.Tensor:
        """Apply the final norm, which fits every block's output."""
        return self.norm(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool and classify tokens ``(B, *grid, C)``; with ``pre_logits`` return what the classifier is given."""
        if self.global_pool:
            x = global_pool_nlc(x.flatten(1, -2), pool_type=self.global_pool, num_prefix_tokens=0)
        x = self.head_drop(self.fc_norm(x))
        return x if pre_logits else self.head(x)
