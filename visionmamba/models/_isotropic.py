"""What the isotropic families share: patches, a position embedding, blocks over one grid, a pooled linear head.

Tokens are channels-last maps in raster order, ``(B, *grid, C)`` with a grid of any rank, from the patch embedding to
the pooling; a block takes and returns such a map.
"""

# no "from __future__ import annotations": FX copies forward's annotations into the code that TorchScript then reads

import torch
import torch.nn as nn
from timm.layers import get_device_dtype, global_pool_nlc, register_notrace_function, trunc_normal_
from timm.models import checkpoint, checkpoint_seq
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size

from ..layers.grid_embed import resize_grid_embed

__all__ = ["IsotropicModel", "check_input"]

_POOLS = ("", "avg", "avgmax", "max")
_WITHOUT_DECAY = ("pos_embed", "A_log", "D", "direction_B", "dt_proj_bias", "conv_bias")


@torch.fx.wrap
@register_notrace_function
def check_input(x: torch.Tensor, layout: str, minimum: list[int]) -> torch.Tensor:
    """Return ``x`` if its rank and sizes fit.

    Args:
        x: Input of a model.
        layout: Its expected layout, for the error.
        minimum: Smallest size of each dimension after the channels.

    Raises:
        ValueError: The rank is another, or a dimension is smaller than one patch.
    """
    if x.dim() != len(minimum) + 2:
        raise ValueError(f"x: expected {layout}, got shape {list(x.shape)}")
    for i, size in enumerate(minimum):
        if x.shape[i + 2] < size:
            raise ValueError(f"x: expected {layout} of at least {minimum} after the channels, got {list(x.shape)}")
    return x


class IsotropicModel(nn.Module):
    """A classifier and backbone of blocks over one grid of tokens.

    Args:
        patch_embed: ``(B, in_chans, ...)`` to ``(B, *grid, C)``; has ``grid_size(input_size) -> grid``.
        blocks: Map ``(B, *grid, C)`` to the same, one may shrink the grid.
        reductions: Stride of the tokens after each block, in pixels.
        input_size: Nominal size of the input, (height, width) or (frames, height, width).
        embed_dim: Channels of the tokens, C.
        num_classes: Classes; 0 for no classifier.
        in_chans: Channels of the input.
        global_pool: ``avg``, ``max``, ``avgmax`` or empty for none.
        norm: Applied to the tokens after the last block.
        fc_norm: Applied after the pooling.
        drop_rate: Dropout before the classifier.
        pos_drop_rate: Dropout after the position embedding.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    feature_dim = -1  # of forward_features' output

    def __init__(
        self,
        patch_embed: nn.Module,
        blocks: list[nn.Module],
        reductions: list[int],
        input_size: tuple[int, ...],
        embed_dim: int,
        num_classes: int,
        in_chans: int,
        global_pool: str,
        norm: nn.Module,
        fc_norm: nn.Module,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.global_pool = _check_pool(global_pool)
        self.grad_checkpointing = False
        self.input_size = tuple(input_size)

        self.patch_embed = patch_embed
        self.pos_embed = nn.Parameter(torch.empty(1, *patch_embed.grid_size(input_size), embed_dim, **dd))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.blocks = nn.Sequential(*blocks)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": reduction, "module": f"blocks.{i}"}
            for i, reduction in enumerate(reductions)
        ]
        self.norm = norm
        self.fc_norm = fc_norm
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        if not self.pos_embed.is_meta:
            trunc_normal_(self.pos_embed, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that the authors train without weight decay, beside norms and biases."""
        return {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in _WITHOUT_DECAY}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return the regular expressions that group parameters by depth."""
        blocks = [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^pos_embed|patch_embed", "blocks": r"^blocks\.(\d+)" if coarse else blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in backward instead of keeping their activations."""
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
            self.global_pool = _check_pool(global_pool)
        dd = get_device_dtype(self)
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

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

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x)
        return self.pos_drop(x + resize_grid_embed(self.pos_embed, x.shape[1:-1]))

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Run the model and return features of its blocks.

        Args:
            x: Input.
            indices: Blocks to take: a list, the last n, or all.
            norm: Apply the final norm to them.
            stop_early: Do not run the blocks after the last one taken.
            output_fmt: ``NCHW`` for channels first, ``(B, C, *grid)``; ``NHWC`` for channels last; ``NLC`` for tokens.
            intermediates_only: Return only the features.

        Returns:
            The features, or ``(final features, features)``.
        """
        if output_fmt not in ("NCHW", "NHWC", "NLC"):
            raise ValueError(f"output_fmt: expected NCHW, NHWC or NLC, got {output_fmt}")
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        x = self._embed(x)
        if torch.jit.is_scripting() or not stop_early:
            blocks = self.blocks
        else:
            blocks = self.blocks[: max_index + 1]
        for i, block in enumerate(blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
            if i in take_indices:
                feature = self.norm(x) if norm else x
                if output_fmt == "NCHW":
                    feature = feature.movedim(-1, 1).contiguous()
                elif output_fmt == "NLC":
                    feature = feature.flatten(1, -2)
                intermediates.append(feature)
        if intermediates_only:
            return intermediates
        return self.norm(x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what certain intermediates do not need.

        Args:
            indices: As in :meth:`forward_intermediates`.
            prune_norm: Drop the final norm.
            prune_head: Drop the classifier.

        Returns:
            The indices, counted from the first block.
        """
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalised tokens of the last block, ``(B, *grid, C)``."""
        x = self._embed(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool and classify tokens ``(B, *grid, C)``; with ``pre_logits`` return what the classifier is given."""
        if self.global_pool:
            x = global_pool_nlc(x.flatten(1, -2), pool_type=self.global_pool, num_prefix_tokens=0)
        x = self.head_drop(self.fc_norm(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits ``(B, num_classes)``, or pooled features without a classifier."""
        return self.forward_head(self.forward_features(x))


def _check_pool(global_pool: str) -> str:
    if global_pool not in _POOLS:
        raise ValueError(f"global_pool: expected one of {_POOLS}, got {global_pool!r}")
    return global_pool
