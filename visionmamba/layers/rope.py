"""Rotary position embedding over two axes, for token features rather than for queries and keys."""

from __future__ import annotations

import torch

__all__ = ["apply_rope", "axial_rope_table"]


def axial_rope_table(
    dim: int,
    grid: list[int],
    identity_rows: list[int] | None = None,
    reference_size: int = 14,
    theta: float = 10000.0,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Compute the rotation of each pair of channels at each token.

    The first half of the channels is rotated by the row, the second by the column. Positions are scaled to
    ``reference_size``, the grid of pretraining, so that a larger grid reads the same angles more finely.

    Args:
        dim: Channels, C, a multiple of 4.
        grid: (rows, columns).
        identity_rows: Rows of the table, in ascending order, that belong to class tokens: these are not rotated.
        reference_size: Side of the grid that positions are scaled to.
        theta: Base of the frequencies.
        device: Where the table is needed.

    Returns:
        ``(2, rows * columns + class tokens, C / 2)`` float32: cosines and sines.

    Source:
        EVA-02's 2-D rotary embedding (Fang et al. 2023), as Vim and LocalVim use it.
    """
    half = dim // 2
    frequencies = theta ** (-torch.arange(0, half, 2, dtype=torch.float32, device=device) / half)  # (C / 4,)
    rows = torch.arange(grid[0], dtype=torch.float32, device=device) / grid[0] * reference_size
    columns = torch.arange(grid[1], dtype=torch.float32, device=device) / grid[1] * reference_size
    by_row = torch.outer(rows, frequencies).unsqueeze(1).expand(-1, grid[1], -1)
    by_column = torch.outer(columns, frequencies).unsqueeze(0).expand(grid[0], -1, -1)
    angles = torch.cat([by_row, by_column], dim=-1).flatten(0, 1)
    if identity_rows is not None:
        for row in identity_rows:
            angles = torch.cat([angles[:row], torch.zeros_like(angles[:1]), angles[row:]])
    return torch.stack([angles.cos(), angles.sin()])


def apply_rope(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring pairs of channels.

    Args:
        x: Tokens, ``(B, L, C)``.
        table: Cosines and sines, ``(2, L, C / 2)``.

    Returns:
        ``(B, L, C)`` in the dtype of ``x``.
    """
    cos, sin = table[0].to(x.dtype), table[1].to(x.dtype)
    first, second = x.unflatten(-1, [-1, 2]).unbind(-1)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
