"""What the hierarchical families share: stages of blocks over maps that halve, a norm, a pooled linear head.

Maps are channels-last, ``(B, H, W, C)``, from the patch embedding to the pooling; a stage takes and returns such a map.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
from timm.layers import ClassifierHead, PatchEmbed, calculate_drop_path_rates, get_device_dtype, trunc_normal_
from timm.models import checkpoint_seq
from timm.models._input import update_model_input_size
from timm.models.swin_transformer import PatchMerging

from ..layers import LayerNorm, check_input
from ..layers.fusion import unwatched
from ..layers.joined_blocks import blocks_join, run_joined
from ._base import VisionModel

__all__ = ["DisjointPatchEmbed", "HierarchicalModel", "Stage"]

torch.fx.wrap("check_input")  # FX looks for leaf functions where forward is defined


def _stage_dims(dims: int | Sequence[int], depths: Sequence[int]) -> list[int]:
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
        if not torch.jit.is_scripting():
            if not self.grad_checkpointing and blocks_join(self.blocks, x) and unwatched(self.blocks):
                return run_joined(self.blocks, x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform ``(B, H, W, C)``."""
        return self.forward_blocks(self.downsample(x))


class DisjointPatchEmbed(PatchEmbed):
    """One convolution of disjoint patches, from images of any size to ``(B, H, W, C)``.

    Args:
        patch_size: Side of a patch.
        in_chans: Channels of the image.
        dim: Channels of the map.
        **kwargs: Further arguments of timm's ``PatchEmbed``.
    """

    def __init__(self, patch_size: int, in_chans: int, dim: int, **kwargs: Any) -> None:
        super().__init__(None, patch_size, in_chans, dim, output_fmt="NHWC", strict_img_size=False, **kwargs)
        self.minimum = [patch_size, patch_size]


class HierarchicalModel(VisionModel):
    """Stages of blocks over maps that halve, and a linear classifier of the pooled last map.

    Args:
        create_block: ``(stage, channels, drop_path) -> block``, called from the first block to the last.
        depths: Blocks of each stage.
        dims: Channels of each stage, or of the first (they double then).
        stage_layer: ``(stage) -> class`` of the stage; :class:`Stage` for all by default.
        patch_embed: ``(patch_size, in_chans, channels, norm_layer, **dd)`` to the embedding of images as
            ``(B, H, W, C)``, whose ``minimum`` is the smallest size; one convolution of disjoint patches by default.
        downsample: ``(channels, next channels, norm_layer, **dd)`` to what halves the map before each further stage.
        patch_size: Stride of the patch embedding.
        in_chans: Channels of the image.
        num_classes: Classes; 0 for no classifier.
        global_pool: Pooling before the classifier, as in timm.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth, growing linearly over the blocks.
        norm_layer: Norm over channels, of the embeddings and after the last stage.
        patch_norm: Whether the patch embedding has norms.
        img_size: Nominal image size, which every family takes; it changes nothing here: any size will do.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    trunk = "stages"

    def __init__(
        self,
        create_block: Callable[[int, int, float], nn.Module],
        depths: Sequence[int],
        dims: int | Sequence[int],
        stage_layer: Callable[[int], type[Stage]] = lambda stage: Stage,
        patch_embed: Callable[..., nn.Module] = DisjointPatchEmbed,
        downsample: Callable[..., nn.Module] = PatchMerging,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer=LayerNorm,
        patch_norm: bool = True,
        img_size: int | tuple[int, int] = 224,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        dims = _stage_dims(dims, depths)
        stages = []
        for i, rates in enumerate(calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)):
            down = downsample(dims[i - 1], dims[i], norm_layer=norm_layer, **dd) if i else nn.Identity()
            stages.append(stage_layer(i)(down, [create_block(i, dims[i], rate) for rate in rates]))
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, global_pool
        self.output_fmt, self.patch_size = "NHWC", patch_size
        self.num_features = self.head_hidden_size = dims[-1]
        self.patch_embed = patch_embed(
            patch_size, in_chans, dims[0], norm_layer=norm_layer if patch_norm else None, **dd
        )
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
        if needs_reset:
            self.reset_modules()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters for layer-wise learning rates."""
        return dict(
            stem=r"^pos_embed|^patch_embed",
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

    def num_levels(self) -> int:
        """Return the number of stages."""
        return len(self.stages)

    def forward_trunk(
        self, x: torch.Tensor, take: list[int], levels: int, norm: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """Run the stem and the first stages; see :meth:`VisionModel.forward_trunk`."""
        if torch.jit.is_scripting() or levels == len(self.stages):
            stages = self.stages
        else:
            stages = self.stages[:levels]
        x = self.forward_stem(check_input(x, "(B, channels, height, width)", self.patch_embed.minimum))
        features: list[torch.Tensor] = []
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take:
                features.append(self.finish(x, i + 1) if norm else x)
        return x, features, []

    def finish(self, x: torch.Tensor, levels: int) -> torch.Tensor:
        """Apply the final norm to the last stage's output; it fits no other."""
        return self.norm(x) if levels == len(self.stages) else x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool and classify ``(B, H, W, C)``."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)
