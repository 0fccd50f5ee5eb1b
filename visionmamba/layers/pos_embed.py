"""Resizing a learned position embedding that holds rows for patch tokens and class tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed

from .class_token import class_token_indices, insert_class_token, remove_class_token

__all__ = ["resize_pos_embed_aligned", "resize_pos_embed_official"]


def resize_pos_embed_official(
    pos_embed: torch.Tensor, grid: tuple[int, int], num_class_tokens: int, old_grid: tuple[int, int] | None = None
) -> torch.Tensor:
    """Resize a position embedding as the authors of Vim do when they fine-tune at another resolution.

    The first rows are kept as the class tokens' and all the others are resized as the grid, bicubically and without
    antialiasing, wherever the class tokens really are. With a middle class token, row 0 is the first patch's and the
    class token's row lies amid the grid, so that every row is shifted; the published fine-tuned models were made so.

    Args:
        pos_embed: ``(1, class tokens + patches, C)``.
        grid: New size of the patch grid, (rows, columns).
        num_class_tokens: Class tokens.
        old_grid: Its present size; square if absent.

    Returns:
        ``(1, class tokens + rows * columns, C)``.

    Raises:
        ValueError: The number of rows does not fit the present grid.
    """
    kept, patches = pos_embed[:, :num_class_tokens], pos_embed[:, num_class_tokens:]
    rows, columns = old_grid or _square(patches.shape[1])
    patches = patches.float().unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=tuple(grid), mode="bicubic", align_corners=False)
    return torch.cat([kept, patches.flatten(2).transpose(1, 2).to(pos_embed.dtype)], dim=1)


def resize_pos_embed_aligned(
    pos_embed: torch.Tensor, grid: tuple[int, int], class_token: str = "", old_grid: tuple[int, int] | None = None
) -> torch.Tensor:
    """Resize the patches' rows of a position embedding and keep the class tokens', each where it belongs.

    Bicubic with antialiasing, timm's convention.

    Args:
        pos_embed: ``(1, class tokens + patches, C)``.
        grid: New size of the patch grid, (rows, columns).
        class_token: Position of the class tokens, see :mod:`visionmamba.layers.class_token`.
        old_grid: Its present size; square if absent.

    Returns:
        ``(1, class tokens + rows * columns, C)``.

    Raises:
        ValueError: The number of rows does not fit the present grid.
    """
    patches = remove_class_token(pos_embed, class_token)
    rows, columns = old_grid or _square(patches.shape[1])
    resized = resample_abs_pos_embed(patches, list(grid), [rows, columns], num_prefix_tokens=0)
    indices = class_token_indices(class_token, patches.shape[1])
    return insert_class_token(resized, pos_embed[:, indices], class_token) if indices else resized


def _square(num_patches: int) -> tuple[int, int]:
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(f"pos_embed: expected rows for a square grid of patches, got {num_patches}")
    return side, side
