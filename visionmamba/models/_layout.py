"""Between official layouts and this project's: what concerns every family with Mamba's own tensor names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn as nn

from ..layers.grid_embed import resize_grid_embed
from ._checkpoint import CheckpointError

__all__ = ["embed_to_grid", "from_official", "rename", "stack_directions", "unstack_directions"]

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


def from_official(
    state_dict: Mapping[str, torch.Tensor],
    model: nn.Module,
    official_state_dict: Callable[[Mapping[str, torch.Tensor], nn.Module], Mapping[str, torch.Tensor]],
    classifier: str,
    official_classifier: str,
) -> dict[str, torch.Tensor]:
    """Convert an official state dict, for families whose layouts differ only by name and by folded axes.

    Args:
        state_dict: The authors'.
        model: The model it is for.
        official_state_dict: The family's conversion of ours to theirs; it is inverted.
        classifier: Our classifier's name; a model without one still recognises a checkpoint's.
        official_classifier: The authors' name of it.

    Returns:
        Our names and shapes; what is not known is passed on as it is.
    """
    ours = model.state_dict()
    official = official_state_dict(ours, model)
    names = dict(zip(official, ours, strict=True))
    names.update({f"{official_classifier}.{leaf}": f"{classifier}.{leaf}" for leaf in ("weight", "bias")})
    converted = {}
    for key, value in state_dict.items():
        name = names.get(key, key)
        folded = key in official and value.shape == official[key].shape
        converted[name] = value.reshape(ours[name].shape) if folded else value
    return converted


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
