"""Mamba-ND's official layouts, of images, of clips and from the one to the other."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
from timm.models._manipulate import adapt_input_conv

from ._checkpoint import strip_prefixes
from ._layout import embed_to_grid, rename, stack_directions, unstack_directions

if TYPE_CHECKING:
    from .mamba_nd import MambaND

__all__ = ["adapt_input_channels", "checkpoint_filter_fn", "inflate", "official_state_dict"]

_logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]

_TRUNK = [("layers.", "blocks."), ("down_sample_layer.", "downsample."), ("ln1.", "norm."), ("ln2.", "fc_norm.")]
_HEADS = [("cls_head.fc_cls.", "head."), ("head.fc.", "head."), ("head.0.", "fc_norm."), ("head.1.", "head.")]
_PATCH_WEIGHT = "patch_embed.projection.weight"


def checkpoint_filter_fn(state_dict: Tensors, model: MambaND) -> Tensors:
    """Convert an official checkpoint, or one of this project's, to a model's layout.

    Args:
        state_dict: Official keys (of mmpretrain's, mmaction's or the Kinetics models), or ours. Its position embedding
            is interpolated to the model's grid; a 2-D model's weights are inflated for a 3-D model.
        model: The model it is for.

    Returns:
        The model's state dict.
    """
    converted = {}
    for name, tensor in strip_prefixes(state_dict).items():
        name, tensor = stack_directions(rename(name, _TRUNK + _HEADS), tensor)
        converted[name] = tensor
    patch = converted.get(_PATCH_WEIGHT)
    if patch is not None and patch.dim() == 4 and model.num_frames is not None:
        return inflate(converted, model)
    if "pos_embed" in converted:
        converted["pos_embed"] = embed_to_grid(converted["pos_embed"], model.nominal_grid(), model.published_grid())
    return converted


def adapt_input_channels(
    state_dict: Tensors, model: MambaND, convolutions: tuple[str, ...] = ("patch_embed.projection",)
) -> Tensors:
    """Fit the first convolutions of a model of clips to its input channels, as timm fits those of models of images.

    Args:
        state_dict: In this project's layout.
        model: The model it is for.
        convolutions: The modules that read the input.

    Returns:
        The state dict; weights ``(out, in, depth, height, width)`` of other channels are summed or repeated.
    """
    adapted = dict(state_dict)
    for name in convolutions:
        weight = state_dict.get(f"{name}.weight")
        if weight is None or weight.dim() != 5 or weight.shape[1] == model.in_chans:
            continue
        slices = weight.transpose(1, 2).flatten(0, 1)  # timm adapts (out, in, height, width)
        slices = adapt_input_conv(model.in_chans, slices, base_chans=weight.shape[1])
        adapted[f"{name}.weight"] = slices.unflatten(0, (weight.shape[0], weight.shape[2])).transpose(1, 2)
    return adapted


def inflate(image_weights: Tensors, model: MambaND) -> Tensors:
    """Turn the weights of a 2-D model into a start for a 3-D model of the same width.

    Block 4 b + j of the 2-D model becomes block 6 b + j, for the cycle's first four orders; the other two keep the
    model's values (or copy blocks 6 b + 2 and 6 b + 3, with the model's ``inflate_copies``). A patch's weights are
    spread evenly over its frames, so that a still clip embeds as its image does; the position embedding is repeated
    for each frame. The final norms and the classifier have no counterpart and keep the model's values.

    Args:
        image_weights: In this project's layout.
        model: The 3-D model.

    Returns:
        The 3-D model's state dict.
    """
    from .mamba_nd import IMAGE_PATHS, VIDEO_PATHS

    image_cycle, cycle = len(IMAGE_PATHS), len(VIDEO_PATHS)
    inflated = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in image_weights.items():
        if not name.startswith("blocks."):
            continue
        _, index, leaf = name.split(".", 2)
        group, step = divmod(int(index), image_cycle)
        targets = [step]
        if model.inflate_copies and step + 2 >= image_cycle:
            targets.append(step + 2)
        for target in targets:
            inflated[f"blocks.{group * cycle + target}.{leaf}"] = tensor
    frames = model.patch_embed.patch_size[0]
    inflated[_PATCH_WEIGHT] = image_weights[_PATCH_WEIGHT].unsqueeze(2).repeat(1, 1, frames, 1, 1) / frames
    inflated["patch_embed.projection.bias"] = image_weights["patch_embed.projection.bias"]
    embed = embed_to_grid(image_weights["pos_embed"], model.nominal_grid()[1:], model.published_grid()[1:])
    inflated["pos_embed"] = embed.unsqueeze(1).repeat(1, model.nominal_grid()[0], 1, 1, 1)
    _logger.warning(
        "Inflated the weights of a 2-D model: the classifier%s keep their initial values.",
        "" if model.inflate_copies else " and the blocks of the third axis order",
    )
    return inflated


def official_state_dict(state_dict: Tensors, model: MambaND) -> Tensors:
    """Convert a model's state dict (or the gradients of its parameters) to the official names and shapes.

    Args:
        state_dict: In this project's layout.
        model: The model it is of: images have mmpretrain's layout, clips mmaction's, or the Kinetics models' own if
            there is a norm between the pooling and the classifier.

    Returns:
        Theirs; the inverse of :func:`checkpoint_filter_fn`.
    """
    kinetics = model.num_frames is not None and isinstance(model.fc_norm, nn.LayerNorm)
    backbone = "" if kinetics else "backbone."
    head = "head.1." if kinetics else "head.fc." if model.num_frames is None else "cls_head.fc_cls."
    official = {}
    for name, tensor in state_dict.items():
        if name.startswith("head."):
            official[name.replace("head.", head, 1)] = tensor
        elif name.startswith(("norm.", "fc_norm.")):
            norm = "head.0." if kinetics else "backbone.ln1." if name.startswith("norm.") else "backbone.ln2."
            official[norm + name.partition(".")[2]] = tensor
        else:
            tensor = tensor.flatten(1, -2) if name == "pos_embed" else tensor
            name, tensor = unstack_directions(name, tensor)
            official[backbone + rename(name, _TRUNK[:2], inverse=True)] = tensor
    return official
