"""Position embeddings over a grid of tokens of any rank."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import is_exporting, register_notrace_function

__all__ = ["resize_grid_embed"]


@torch.fx.wrap
@register_notrace_function
def resize_grid_embed(embed: torch.Tensor, grid: list[int]) -> torch.Tensor:
    """Interpolate a position embedding to another grid; bicubic over rows and columns, linear over frames.

    Args:
        embed: ``(1, [T,] H, W, C)``.
        grid: The new ``([T,] H, W)``.

    Returns:
        ``(1, *grid, C)``, the embedding itself if the grid is its own.

    Source:
        Bicubic without antialiasing is OpenMMLab's (mmpretrain, mmcls) ``resize_pos_embed``.
    """
    if not is_exporting() and list(embed.shape[1:-1]) == list(grid):
        return embed
    dtype, rank = embed.dtype, len(grid)
    rows, columns, channels = embed.shape[-3], embed.shape[-2], embed.shape[-1]
    maps = embed.float().reshape(-1, rows, columns, channels).permute(0, 3, 1, 2)  # (T, C, H, W)
    maps = F.interpolate(maps, size=[grid[rank - 2], grid[rank - 1]], mode="bicubic", align_corners=False)
    if rank == 3:
        frames = maps.flatten(1).t().unsqueeze(0)  # (1, C H W, T)
        frames = F.interpolate(frames, size=[grid[0]], mode="linear", align_corners=False)
        maps = frames.squeeze(0).t().unflatten(1, [channels, grid[1], grid[2]])
    resized = maps.permute(0, 2, 3, 1)
    if rank == 3:
        resized = resized.unsqueeze(0)
    return resized.to(dtype)
