"""What the hierarchical families share: stages of blocks over maps that halve, a norm, a pooled linear head.

Maps are channels-last, ``(B, H, W, C)``, from the patch embedding to the pooling; a stage takes and returns such a map.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from timm.layers import ClassifierHead, get_device_dtype, trunc_normal_
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size

__all__ = ["HierarchicalModel", "Stage", "stage_dims"]

LayerNorm = partial(nn.LayerNorm, eps=1e-5)
_WITHOUT_DECAY = ("pos_embed", "A_log", "D", "dt_proj_bias")


def stage_dims(dims: int | Sequence[int], depths: Sequence[int]) -> list[int]:
    """Return the channels of each stage.

    Args:
        dims: One for each stage, or the first one's (they double then).
        depths: Blocks of each stage.

    Raises:
        ValueError: Their numbers differ.
    """
    dims = [dims * 2**i for i in range(len(depths))] if isinstance(dims, int) else list(dims)
    if len(dims) != len(depths):
        raise ValueError(f"dims: expected one for each of the {len(depths)} stages, got {len(dims)}")
    return dims


class Stage(nn.Module):
    """Blocks at one resolution, after the downsampling that leads to it.

    Args:
        downsample: Maps the previous stage's features to this stage's.
        blocks: The blocks.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward_blocks(self, x: torch.Tensor) -> torch.Tensor:
        """Run the blocks, recomputing them in backward if so set."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform ``(B, H, W, C)``."""
        return self.forward_blocks(self.downsample(x))


class HierarchicalModel(nn.Module):
    """A classifier and backbone of stages.

    Args:
        patch_embed: Images to ``(B, H, W, C)``.
        stages: The stages; each halves the map, but for the first.
        dims: Channels of each stage.
        patch_size: Stride of the patch embedding.
        in_chans: Channels of the image.
        num_classes: Classes; 0 for no classifier.
        global_pool: Pooling before the classifier, as in timm.
        drop_rate: Dropout before the classifier.
        norm_layer: Norm over channels, after the last stage.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(
        self,
        patch_embed: nn.Module,
        stages: Sequence[nn.Module],
        dims: Sequence[int],
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        norm_layer=LayerNorm,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, global_pool
        self.output_fmt, self.patch_size = "NHWC", patch_size
        self.num_features = self.head_hidden_size = dims[-1]
        self.patch_embed = patch_embed
        self.stages = nn.Sequential(*stages)
        self.feature_info = [
            dict(num_chs=dim, reduction=patch_size * 2**i, module=f"stages.{i}") for i, dim in enumerate(dims)
        ]
        self.norm = norm_layer(dims[-1], **dd)
        self.head = ClassifierHead(
            dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt="NHWC", **dd
        )

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as the authors do: linear layers truncated normal of 0.02, everything else by its own default.

        Args:
            needs_reset: Also reset what initialises itself when it is constructed (after a model was made on ``meta``).
        """
        for module in self.modules():
            if needs_reset and hasattr(module, "reset_parameters"):
                module.reset_parameters()
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the parameters that describe dynamics, not filters."""
        return {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in _WITHOUT_DECAY}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters for layer-wise learning rates."""
        return dict(
            stem=r"^patch_embed|^pos_embed",
            blocks=r"^stages\.(\d+)"
            if coarse
            else [(r"^stages\.(\d+).downsample", (0,)), (r"^stages\.(\d+)\.\w+\.(\d+)", None), (r"^norm", (99999,))],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: Classes; 0 for no classifier.
            global_pool: Pooling; unchanged if absent.
        """
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool, in_features=self.num_features, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features
        if global_pool is not None:
            self.global_pool = global_pool

    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Make the model's own image size another one; the model itself takes images of any size.

        Args:
            img_size: Height and width.
        """
        if img_size is not None:
            update_model_input_size(self, img_size)

    def forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        """Embed images ``(B, in_chans, height, width)`` as ``(B, H, W, C)``."""
        return self.patch_embed(x)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the stages' outputs, as timm does.

        Args:
            x: Images.
            indices: Last n stages if an int, these stages if a list, all if absent.
            norm: Apply the final norm to the last stage's output.
            stop_early: Do not compute stages after the last one asked for.
            output_fmt: ``"NCHW"`` or ``"NHWC"``.
            intermediates_only: Return the list alone.

        Returns:
            The list of features, or the final features ``(B, H, W, C)`` and the list.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt: expected NCHW or NHWC, got {output_fmt}")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1
        if torch.jit.is_scripting() or not stop_early:
            stages = self.stages
        else:
            stages = self.stages[: max_index + 1]
        x = self.forward_stem(x)
        intermediates, i = [], 0
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                feature = self.norm(x) if norm and i == last else x
                intermediates.append(feature.permute(0, 3, 1, 2) if output_fmt == "NCHW" else feature)
        if intermediates_only:
            return intermediates
        if i == last:
            x = self.norm(x)
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the wanted intermediates do not need.

        Args:
            indices: As for :meth:`forward_intermediates`.
            prune_norm: Remove the final norm.
            prune_head: Remove the classifier.

        Returns:
            The indices of the stages that are taken.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        shortened = max_index < len(self.stages) - 1
        if prune_norm or shortened:
            self.norm = nn.Identity()
        self.stages = self.stages[: max_index + 1]
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalised last feature map, ``(B, H, W, C)``."""
        return self.norm(self.stages(self.forward_stem(x)))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool and classify ``(B, H, W, C)``."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify images ``(B, in_chans, height, width)``."""
        return self.forward_head(self.forward_features(x))
