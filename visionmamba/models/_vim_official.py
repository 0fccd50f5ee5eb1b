"""Vim's official layouts and flags, and what they are here."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn

from ..layers import resize_pos_embed_aligned, resize_pos_embed_official

__all__ = ["checkpoint_filter_fn", "official_arguments", "official_state_dict"]

Tensors = dict[str, torch.Tensor]

_SSM_NAMES = {
    "A_log": "A{}_log",
    "D": "D{}",
    "conv_weight": "conv1d{}.weight",
    "conv_bias": "conv1d{}.bias",
    "x_proj_weight": "x_proj{}.weight",
    "dt_proj_weight": "dt_proj{}.weight",
    "dt_proj_bias": "dt_proj{}.bias",
}
"""Our stacked parameters, and the official names of the forward (``{}`` empty) and backward (``_b``) direction's."""

_BLOCK_NAME = re.compile(r"blocks\.(\d+)\.(?:(first|second)\.)?(.+)")


def _official_names(name: str, parameter: torch.Tensor) -> list[str]:
    """Return the official names of one of our parameters: several, in order, if it is stacked."""
    if name == "cls_token":
        return ["cls_token"] if parameter.shape[1] == 1 else ["cls_token_head", "cls_token_tail"]
    match = _BLOCK_NAME.fullmatch(name)
    if match is None:
        return [re.sub(r"^norm\.", "norm_f.", name)]
    index, half, inner = int(match[1]), match[2], match[3]
    if half:
        index = 2 * index + (half == "second")
    if inner.startswith("mixer.ssm."):
        template = _SSM_NAMES[inner.removeprefix("mixer.ssm.")]
        inner_names = [f"mixer.{template.format(suffix)}" for suffix in ("", "_b")[: parameter.shape[0]]]
    else:
        inner_names = [inner.replace("mixer.layer_scale.", "mixer.")]
    return [f"layers.{index}.{inner}" for inner in inner_names]


def official_state_dict(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> Tensors:
    """Convert our state dict (or gradients by parameter name) to the authors' names and shapes.

    Args:
        state_dict: Ours.
        model: The model it belongs to.

    Returns:
        Theirs; the inverse of :func:`checkpoint_filter_fn`.
    """
    official = {}
    for name, value in state_dict.items():
        names = _official_names(name, value)
        if "mixer.ssm." in name:
            parts = list(value.unsqueeze(2) if name.endswith("conv_weight") else value)
        else:
            parts = value.split(1, dim=1) if len(names) > 1 else [value]
        official.update(zip(names, parts, strict=True))
    return official


def _from_official(state_dict: Tensors, model: nn.Module) -> Tensors:
    """Convert an official state dict; what has no counterpart keeps its name."""
    remaining, converted = dict(state_dict), {}
    for name, parameter in model.state_dict().items():
        names = _official_names(name, parameter)
        if not all(key in remaining for key in names):
            continue
        parts = [remaining.pop(key) for key in names]
        if "mixer.ssm." in name:
            parts = [part.squeeze(1) for part in parts] if name.endswith("conv_weight") else parts
            converted[name] = torch.stack(parts)
        else:
            converted[name] = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
    return {**remaining, **converted}


def _resize_loaded(embed: torch.Tensor, model: nn.Module) -> torch.Tensor:
    grid = model.patch_embed.grid_size
    if model.pos_embed_resize == "official":
        return resize_pos_embed_official(embed, grid, model.num_class_tokens)
    return resize_pos_embed_aligned(embed, grid, model.class_token)


def checkpoint_filter_fn(state_dict: Tensors, model: nn.Module) -> Tensors:
    """Convert a checkpoint of the authors, or of this project, to the model's state dict.

    Tables of the rotary embedding are dropped: the model computes them. A position embedding of another grid is
    resized as the model's ``pos_embed_resize`` says.
    """
    state_dict = {key: value for key, value in state_dict.items() if not key.startswith("rope.")}
    if any(key.startswith("layers.") for key in state_dict):
        state_dict = _from_official(state_dict, model)
    embed = state_dict.get("pos_embed")
    if embed is not None and model.pos_embed is not None and embed.shape[1:2] != model.pos_embed.shape[1:2]:
        with contextlib.suppress(ValueError):  # rows of no square grid do not fit: reported with all other misfits
            state_dict["pos_embed"] = _resize_loaded(embed, model)
    return state_dict


_OFFICIAL_ARGUMENTS = dict(
    img_size="img_size", patch_size="patch_size", stride="stride", depth="depth", embed_dim="embed_dim",
    d_state="d_state", channels="in_chans", num_classes="num_classes", drop_rate="pos_drop_rate",
    drop_path_rate="drop_path_rate", norm_epsilon="norm_eps", residual_in_fp32="residual_in_float32",
    init_layer_scale="layer_scale", if_abs_pos_embed="pos_embed", if_bidirectional="paired",
    pt_hw_seq_len="rope_reference_size",
)  # fmt: skip
_OFFICIAL_IRRELEVANT = ("fused_add_norm", "ft_seq_len", "initializer_cfg", "device", "dtype")


def official_arguments(**flags: Any) -> dict[str, Any]:
    """Translate the official constructor's flags to this project's arguments.

    Args:
        **flags: Those that describe the function: ``if_rope``, ``if_rope_residual``, ``bimamba_type``,
            ``if_divide_out``, ``if_cls_token``, ``use_middle_cls_token``, ``use_double_cls_token``,
            ``final_pool_type``, ``rms_norm``, sizes and rates; absent ones have the official defaults.

    Returns:
        Arguments of :class:`visionmamba.models.vim.Vim`.

    Raises:
        ValueError: A flag is unknown, or an experiment that was never published (random class token positions).
    """
    flags = {name: value for name, value in flags.items() if name not in _OFFICIAL_IRRELEVANT}
    arguments = {ours: flags.pop(theirs) for theirs, ours in _OFFICIAL_ARGUMENTS.items() if theirs in flags}
    both, divide = flags.pop("bimamba_type", "v2"), flags.pop("if_divide_out", True)
    directions = {"none": "forward", None: "forward", "v1": "tied", "v2": "mean" if divide else "sum"}
    rope, rope_residual = flags.pop("if_rope", False), flags.pop("if_rope_residual", False)
    middle, double = flags.pop("use_middle_cls_token", True), flags.pop("use_double_cls_token", False)
    class_token = ("double" if double else "middle" if middle else "head") if flags.pop("if_cls_token", True) else ""
    pool = flags.pop("final_pool_type", "none")
    pools = {"none": "last", "mean": "avg", "max": "max", "all": ""}
    arguments.update(
        directions=directions[both],
        rope=("stream" if rope_residual else "mixer") if rope else "",
        class_token=class_token,
        global_pool="token" if class_token else pools[pool],
        norm="rms" if flags.pop("rms_norm", True) else "layer",
    )
    unknown = [name for name, value in flags.items() if value]
    if unknown:
        raise ValueError(f"{unknown[0]}: not a flag of the official Vim that this package knows")
    return arguments
