"""A plain model with an adapter beside it, which gives dense predictions the scales that the model lacks.

ViT-Adapter (Chen et al. 2023, "Vision Transformer Adapter for Dense Predictions"), as PlainMamba's detectors use it: a
convolutional stem makes maps of strides 4 to 32; before each quarter of the model's blocks its tokens attend to them
(injector), and after it they attend to the tokens (extractor), both by multi-scale deformable attention.

Shapes: B batch, C channels of the tokens, N tokens of the model (stride 16), M tokens of strides 8, 16 and 32 together.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmengine.registry import MODELS
from timm.layers import DropPath
from timm.models import checkpoint

from .backbone import VisionMambaBackbone
from .mmcv_ext.attention import multi_scale_deformable_attention

__all__ = ["DeformableAttention", "VisionMambaAdapter"]

_STRIDE = 32
_QUARTERS = 4


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    known = torch.amp.is_autocast_available(device_type)  # the meta device is not
    return torch.autocast(device_type, enabled=False) if known else contextlib.nullcontext()


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (Zhu et al. 2021, Deformable DETR, eq. 3), in float32 under autocast too.

    Args:
        dim: Channels, C.
        num_levels: Maps that are sampled.
        num_heads: Heads, a divisor of ``dim``.
        num_points: Samples of each head, query and map.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.
    """

    def __init__(self, dim: int, num_levels: int, num_heads: int, num_points: int = 4) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of {dim} channels, got {num_heads}")
        self.shape = (num_heads, num_levels, num_points)
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(dim, 2 * samples)
        self.attention_weights = nn.Linear(dim, samples)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with uniform weights and points in a star around each query: one ray a head, one step a point."""
        heads, levels, points = self.shape
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        angle = torch.arange(heads) * (2 * math.pi / heads)
        ray = torch.stack([angle.cos(), angle.sin()], dim=-1)
        ray = ray / ray.abs().amax(-1, keepdim=True)
        star = ray[:, None, None] * torch.arange(1, points + 1)[:, None]  # (heads, 1, points, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(star.expand(-1, levels, -1, -1).flatten())
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, query: torch.Tensor, centres: torch.Tensor, value: torch.Tensor, sizes: Sequence[tuple[int, int]]
    ) -> torch.Tensor:
        """Let queries ``(B, Q, C)`` attend to maps.

        Args:
            query: ``(B, Q, C)``.
            centres: Where each query stands, ``(Q, 2)`` in [0, 1], x before y.
            value: The maps' tokens, one map after the other, ``(B, sum of H W, C)``.
            sizes: Each map's (H, W).

        Returns:
            ``(B, Q, C)``.
        """
        dtype = query.dtype
        with _without_autocast(query.device.type):
            query, value = query.float(), value.float()
            heads, levels, points = self.shape
            value = self.value_proj(value).unflatten(-1, (heads, -1))
            offsets = self.sampling_offsets(query).unflatten(-1, (heads, levels, points, 2))
            weights = self.attention_weights(query).unflatten(-1, (heads, levels * points)).softmax(-1)
            steps = query.new_tensor([[width, height] for height, width in sizes])[:, None]  # (levels, 1, 2)
            locations = centres[:, None, None, None] + offsets / steps
            out = multi_scale_deformable_attention(value, sizes, locations, weights.unflatten(-1, (levels, points)))
            return self.output_proj(out).to(dtype)


class ConvFeedForward(nn.Module):
    """Two linear layers with a depthwise convolution over each map between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor, sizes: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Map tokens ``(B, M, C)`` of maps of some sizes to the same."""
        parts = self.fc1(x).split([height * width for height, width in sizes], dim=1)
        maps = [part.transpose(1, 2).unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]
        x = torch.cat([self.dwconv(part).flatten(2).transpose(1, 2) for part in maps], dim=1)
        return self.fc2(F.gelu(x))


class Injector(nn.Module):
    """The model's tokens attend to the adapter's; the update starts at zero."""

    def __init__(self, dim: int, num_heads: int, num_points: int) -> None:
        super().__init__()
        self.query_norm, self.feat_norm = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = DeformableAttention(dim, 3, num_heads, num_points)
        self.gamma = nn.Parameter(torch.zeros(dim))

    def forward(self, x: torch.Tensor, c: torch.Tensor, places: Places) -> torch.Tensor:
        """Update tokens ``(B, N, C)`` from the adapter's ``(B, M, C)``."""
        return x + self.gamma * self.attn(self.query_norm(x), places.tokens, self.feat_norm(c), places.sizes)


class Extractor(nn.Module):
    """The adapter's tokens attend to the model's, then pass a feed-forward network."""

    def __init__(self, dim: int, num_heads: int, num_points: int, ffn_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.query_norm, self.feat_norm = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = DeformableAttention(dim, 1, num_heads, num_points)
        self.ffn = ConvFeedForward(dim, int(dim * ffn_ratio))
        self.ffn_norm = nn.LayerNorm(dim, eps=1e-6)
        self.drop_path = DropPath(drop_path)

    def forward(self, c: torch.Tensor, x: torch.Tensor, places: Places) -> torch.Tensor:
        """Update the adapter's tokens ``(B, M, C)`` from the model's ``(B, N, C)``."""
        c = c + self.attn(self.query_norm(c), places.pyramid, self.feat_norm(x), [places.grid])
        return c + self.drop_path(self.ffn(self.ffn_norm(c), places.sizes))


class Places:
    """Where tokens stand: sizes of the maps, and centres of their cells.

    Args:
        grid: (H, W) of the model's tokens, of stride 16.
        sizes: (H, W) of strides 8, 16 and 32.
        device: Where to create the centres.
    """

    def __init__(self, grid: tuple[int, int], sizes: Sequence[tuple[int, int]], device: torch.device) -> None:
        self.grid, self.sizes = grid, list(sizes)
        self.tokens = self._centres(grid, device)
        self.pyramid = torch.cat([self._centres(size, device) for size in sizes])

    @staticmethod
    def _centres(size: tuple[int, int], device: torch.device) -> torch.Tensor:
        y, x = ((torch.arange(count, device=device) + 0.5) / count for count in size)
        return torch.stack([x.repeat(size[0]), y.repeat_interleave(size[1])], dim=-1)


class SpatialPrior(nn.Module):
    """A convolutional stem: maps of strides 4, 8, 16 and 32 with as many channels as the model's tokens."""

    def __init__(self, dim: int, width: int, norm_cfg: dict) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
            layer = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
            return [layer, build_norm_layer(norm_cfg, outputs)[1], nn.ReLU(inplace=True)]

        self.stem = nn.Sequential(
            *conv(3, width, 2), *conv(width, width, 1), *conv(width, width, 1), nn.MaxPool2d(3, stride=2, padding=1)
        )
        self.conv2 = nn.Sequential(*conv(width, 2 * width, 2))
        self.conv3 = nn.Sequential(*conv(2 * width, 4 * width, 2))
        self.conv4 = nn.Sequential(*conv(4 * width, 4 * width, 2))
        self.fc1, self.fc2 = nn.Conv2d(width, dim, 1), nn.Conv2d(2 * width, dim, 1)
        self.fc3, self.fc4 = nn.Conv2d(4 * width, dim, 1), nn.Conv2d(4 * width, dim, 1)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Map images ``(B, 3, height, width)`` to four maps."""
        c1 = self.stem(x)
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        return [self.fc1(c1), self.fc2(c2), self.fc3(c3), self.fc4(self.conv4(c3))]


class Interaction(nn.Module):
    """An injector before a quarter of the model's blocks, and one extractor or several after it."""

    def __init__(self, dim: int, num_heads: int, num_points: int, extractors: int, **ffn: float) -> None:
        super().__init__()
        self.injector = Injector(dim, num_heads, num_points)
        self.extractor = Extractor(dim, num_heads, num_points, **ffn)
        self.extra_extractors = nn.ModuleList(
            Extractor(dim, num_heads, num_points, **ffn) for _ in range(extractors - 1)
        )

    def inject(self, x: torch.Tensor, c: torch.Tensor, places: Places) -> torch.Tensor:
        """Update the model's tokens ``(B, H, W, C)``."""
        return self.injector(x.flatten(1, 2), c, places).view_as(x)

    def extract(self, c: torch.Tensor, x: torch.Tensor, places: Places) -> torch.Tensor:
        """Update the adapter's tokens ``(B, M, C)``."""
        for extractor in (self.extractor, *self.extra_extractors):
            c = extractor(c, x.flatten(1, 2), places)
        return c


@MODELS.register_module(name=["VisionMambaAdapter", "PlainMambaAdapter"])
class VisionMambaAdapter(VisionMambaBackbone):
    """A plain model with ViT-Adapter beside it: four maps of strides 4, 8, 16 and 32, all of the tokens' channels.

    Images are padded with zeros at the bottom and the right to multiples of 32.

    Args:
        model_name: Name in timm's registry, of a plain model whose tokens have stride 16 and no class token
            (``plainmamba_*``, ``mamba2d_small_patch16_224``).
        num_heads: Heads of the attentions.
        num_points: Samples of each head, query and map.
        conv_dim: Width of the convolutional stem.
        ffn_ratio: Width of the extractors' feed-forward networks over the channels.
        drop_path_rate: Stochastic depth of the last block and, as the authors have it, of every extractor.
        norm_cfg: Norm of the stem and of the outputs.
        **kwargs: Other arguments of :class:`VisionMambaBackbone`, but for ``out_indices`` and ``out_norm``.

    Raises:
        ValueError: The model is not a plain one of stride 16.

    Source:
        Chen et al. 2023, with the settings of PlainMamba's detectors.
    """

    adapter_parts = ("level_embed", "spm.", "interactions.", "up.", "ad_norm")

    def __init__(
        self,
        model_name: str,
        num_heads: int = 6,
        num_points: int = 4,
        conv_dim: int = 64,
        ffn_ratio: float = 0.25,
        drop_path_rate: float = 0.0,
        norm_cfg: dict | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model_name, out_norm=False, drop_path_rate=drop_path_rate, **kwargs)
        info = self.model.feature_info[-1]
        if hasattr(self.model, "stages") or not hasattr(self.model, "nominal_grid") or info["reduction"] != 16:
            raise ValueError(f"model_name: expected a plain model with tokens of stride 16, got {model_name!r}")
        norm_cfg = norm_cfg or dict(type="SyncBN")
        dim = info["num_chs"]
        self.num_features = [dim] * 4
        self.level_embed = nn.Parameter(torch.zeros(3, dim).normal_())
        self.spm = SpatialPrior(dim, conv_dim, norm_cfg)
        self.interactions = nn.ModuleList(
            Interaction(
                dim, num_heads, num_points, extractors=3 if i == _QUARTERS - 1 else 1, ffn_ratio=ffn_ratio,
                drop_path=drop_path_rate,
            )
            for i in range(_QUARTERS)
        )  # fmt: skip
        self.up = nn.ConvTranspose2d(dim, dim, 2, stride=2)
        for i in range(1, 5):
            self.add_module(f"ad_norm{i}", build_norm_layer(norm_cfg, dim)[1])
        for module in (*self.spm.modules(), self.up):
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _check_indices(self, out_indices: Sequence[int] | None, depth: int) -> tuple[int, ...]:
        if out_indices is not None or depth < _QUARTERS:
            raise ValueError(f"out_indices: the adapter reads four quarters of the blocks, got {out_indices!r}")
        return (depth - 1,)

    def _run_blocks(self, x: torch.Tensor, quarter: int) -> torch.Tensor:
        depth = len(self.model.blocks)
        for block in self.model.blocks[quarter * depth // _QUARTERS : (quarter + 1) * depth // _QUARTERS]:
            x = checkpoint(block, x) if self.model.grad_checkpointing else block(x)
        return x

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return feature maps.

        Args:
            x: Images ``(B, 3, height, width)`` of any size.

        Returns:
            Maps ``(B, C, H, W)`` of strides 4, 8, 16 and 32 of the padded images.
        """
        self._check_images(x)
        height, width = x.shape[2:]
        x = F.pad(x, (0, -width % _STRIDE, 0, -height % _STRIDE))
        first, *levels = self.spm(x)
        sizes = [(int(level.shape[2]), int(level.shape[3])) for level in levels]  # no tensors while traced
        c = torch.cat(
            [level.flatten(2).transpose(1, 2) + e for level, e in zip(levels, self.level_embed, strict=True)], 1
        )
        tokens = self.model.forward_stem(x)  # (B, H, W, C)
        places = Places((int(tokens.shape[1]), int(tokens.shape[2])), sizes, x.device)
        for quarter, interaction in enumerate(self.interactions):
            tokens = self._run_blocks(interaction.inject(tokens, c, places), quarter)
            c = interaction.extract(c, tokens, places)
        parts = c.split([rows * columns for rows, columns in sizes], dim=1)
        maps = [part.transpose(1, 2).unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]
        maps = [self.up(maps[0]) + first, *maps]
        tokens = tokens.permute(0, 3, 1, 2)
        outputs = []
        for i, feature in enumerate(maps):
            resized = F.interpolate(tokens, size=feature.shape[2:], mode="bilinear", align_corners=False)
            outputs.append(getattr(self, f"ad_norm{i + 1}")(feature + resized).contiguous())
        return tuple(outputs)
