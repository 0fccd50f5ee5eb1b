"""Between official layouts and this project's: what concerns every family with Mamba's own tensor names."""

from __future__ import annotations

import math

import torch

from ..layers.grid_embed import resize_grid_embed
from ._checkpoint import CheckpointError

__all__ = ["embed_to_grid", "rename", "stack_directions", "unstack_directions"]

_STACKED = {
    "conv1d.weight": "ssm.conv_weight",
    "conv1d.bias": "ssm.conv_bias",
    "x_proj.weight": "ssm.x_proj_weight",
    "dt_proj.weight": "ssm.dt_proj_weight",
    "dt_proj.bias": "ssm.dt_proj_bias",
    "A_log": "ssm.A_log",
    "D": "ssm.D",
}
_UNSTACKED = {ours: official for official, ours in _STACKED.items()}
_MIXER = "mixer."


def rename(name: str, pairs: list[tuple[str, str]], inverse: bool = False) -> str:
    """Replace the first occurrence of each pair's first part by its second, in order; the inverse undoes it."""
    for old, new in reversed(pairs) if inverse else pairs:
        name = name.replace(new, old, 1) if inverse else name.replace(old, new, 1)
    return name


def stack_directions(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Give a tensor of a Mamba mixer the name and the direction axis that :class:`SelectiveSSM` has."""
    prefix, mixer, leaf = name.partition(_MIXER)
    if not mixer or leaf not in _STACKED:
        return name, tensor
    tensor = tensor.transpose(0, 1) if leaf == "conv1d.weight" else tensor.unsqueeze(0)  # (D, 1, W) to (1, D, W)
    return prefix + mixer + _STACKED[leaf], tensor


def unstack_directions(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Undo :func:`stack_directions`."""
    prefix, mixer, leaf = name.partition(_MIXER)
    if not mixer or leaf not in _UNSTACKED:
        return name, tensor
    official = _UNSTACKED[leaf]
    tensor = tensor.transpose(0, 1) if official == "conv1d.weight" else tensor.squeeze(0)
    return prefix + mixer + official, tensor


def embed_to_grid(embed: torch.Tensor, grid: tuple[int, ...], published: tuple[int, ...]) -> torch.Tensor:
    """Lay a checkpoint's position embedding over a model's grid, interpolating it if its own grid is another.

    Args:
        embed: ``(1, L, C)`` as the authors have it, or ``(1, *grid, C)``. The grid of L tokens is taken to be the
            published model's, else this model's, else square (with this model's frames): whichever they fill.
        grid: The model's grid.
        published: The published model's grid.

    Returns:
        ``(1, *grid, C)``.

    Raises:
        CheckpointError: The tokens of ``embed`` fill no such grid.
    """
    if embed.dim() == 3:
        _, tokens, channels = embed.shape
        frames = tuple(grid[:-2])
        side = math.isqrt(tokens // math.prod(frames))
        fitting = [source for source in (published, grid, (*frames, side, side)) if math.prod(source) == tokens]
        if not fitting:
            raise CheckpointError(f"pos_embed: {tokens} tokens fill neither {tuple(grid)}, {published} nor squares")
        embed = embed.reshape(1, *fitting[0], channels)
    return resize_grid_embed(embed, list(grid))
