"""VMamba's official layouts: what the authors call our parameters and arguments.

Written from the names, shapes and configurations that the authors published; the shapes of stacked parameters differ
only in that theirs fold directions into channels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from timm.models.swin_transformer import PatchMerging

from ..layers import SS2D, ConvDownsample, MultiHeadSSM
from ..layers.grid_embed import resize_grid_embed

if TYPE_CHECKING:
    from .vmamba import VMamba

__all__ = ["checkpoint_filter_fn", "official_arguments", "official_state_dict"]

Tensors = dict[str, torch.Tensor]


_LEGACY_NAMES = (
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    (r"^norm\.", "classifier.norm."),
    (r"^head\.", "classifier.head."),
)
"""Names of the authors' earlier checkpoints, and what they became."""

_PATCH_EMBED_NAMES = dict(proj=0, norm=2, conv1=0, norm1=2, conv2=5, norm2=7)

_BLOCK_NAMES = {
    "norm1": "norm",
    "mixer.conv": "op.conv2d",
    "mixer.ssm.x_proj_weight": "op.x_proj_weight",
    "mixer.ssm.dt_proj_weight": "op.dt_projs_weight",
    "mixer.ssm.dt_proj_bias": "op.dt_projs_bias",
    "mixer.ssm.A_log": "op.A_logs",
    "mixer.ssm.D": "op.Ds",
    "mixer": "op",
}
"""Our names inside a block (the longest prefix counts), and the official ones."""


def _official_block_name(name: str, mixer: SS2D) -> str:
    """Return the official name of a parameter inside a block."""
    ours = next((prefix for prefix in _BLOCK_NAMES if name == prefix or name.startswith(f"{prefix}.")), None)
    if ours is not None:
        name = _BLOCK_NAMES[ours] + name.removeprefix(ours)
    if isinstance(mixer.out_norm, nn.Conv2d):
        name = name.replace("out_norm.", "out_norm.1.")
    elif isinstance(mixer.out_norm, nn.Sequential):
        name = name.replace("out_norm.1.", "out_norm.2.")
    if isinstance(mixer.ssm, MultiHeadSSM):  # theirs stands between two permutations
        name = name.replace("op.conv2d.", "op.conv2d.1.")
    return name


def _official_name(name: str, model: VMamba) -> str:
    """Return the official name of one of our parameters."""
    module, _, leaf = name.rpartition(".")
    part, *rest = module.split(".")
    if part == "patch_embed":
        return f"patch_embed.{_PATCH_EMBED_NAMES[rest[0]]}.{leaf}"
    if part == "stages" and rest[1] == "downsample":  # ours opens a stage, theirs closes the one before
        numbered = isinstance(model.stages[int(rest[0])].downsample, ConvDownsample)
        layer = dict(conv="1", norm="3")[rest[2]] if numbered else rest[2]
        return f"layers.{int(rest[0]) - 1}.downsample.{layer}.{leaf}"
    if part == "stages":
        stage, _, block, inner = name.removeprefix("stages.").split(".", 3)
        mixer = model.stages[int(stage)].blocks[int(block)].mixer
        return f"layers.{stage}.blocks.{block}.{_official_block_name(inner, mixer)}"
    return {"norm": f"classifier.norm.{leaf}", "head.fc": f"classifier.head.{leaf}"}.get(module, name)


def official_state_dict(state_dict: Mapping[str, torch.Tensor], model: VMamba) -> Tensors:
    """Convert our state dict (or gradients by parameter name) to the authors' names and shapes.

    Args:
        state_dict: Ours.
        model: The model it belongs to.

    Returns:
        Theirs; the inverse of :func:`checkpoint_filter_fn`.
    """
    official = {}
    for name, value in state_dict.items():
        if name == "pos_embed":
            value = value.permute(0, 3, 1, 2)
        elif (name.endswith("ssm.A_log") and value.dim() == 3) or (name.endswith("ssm.D") and value.dim() == 2):
            value = value.flatten(0, 1)
        official[_official_name(name, model)] = value
    return official


def _our_names(model: VMamba) -> dict[str, str]:
    """Return our name of every official parameter of a model, in any of the authors' layouts."""
    names = {_official_name(name, model): name for name in model.state_dict()}
    names.update({f"classifier.head.{leaf}": f"head.fc.{leaf}" for leaf in ("weight", "bias")})
    if isinstance(model.stages[-1].downsample, PatchMerging):  # the single-file layout numbers what the other names
        for name, number in (("norm", 1), ("reduction", 2)):
            names.update({k.replace(f"downsample.{name}", f"downsample.{number}"): v for k, v in names.items()})
    return names


def _our_shape(key: str, value: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Bring an official parameter to our shape, where the two are the same thing."""
    if key == "pos_embed":
        return resize_grid_embed(value.permute(0, 2, 3, 1), list(shape[1:3]))
    if key.endswith(("ssm.A_log", "ssm.D")) and value.shape == (shape[0] * shape[1], *shape[2:]):
        return value.unflatten(0, shape[:2])
    if value.dim() == 4 and len(shape) == 2 and value.shape[2:] == (1, 1):
        return value.flatten(1)  # a linear layer saved as a 1 x 1 convolution
    return value


def checkpoint_filter_fn(state_dict: Tensors, model: VMamba) -> Tensors:
    """Convert a checkpoint to the model's state dict.

    Args:
        state_dict: The authors', in any of their layouts, or this project's own.
        model: The model it is for; a position embedding is resized to it.

    Returns:
        Our names and shapes; what is not known is passed on as it is.
    """
    expected = model.state_dict()
    if any(key.startswith("stages.") for key in state_dict):
        converted = dict(state_dict)
        if "pos_embed" in converted and "pos_embed" in expected:
            converted["pos_embed"] = resize_grid_embed(converted["pos_embed"], list(expected["pos_embed"].shape[1:3]))
        return converted
    names, converted = _our_names(model), {}
    for key, value in state_dict.items():
        for pattern, replacement in _LEGACY_NAMES:
            key = re.sub(pattern, replacement, key)
        key = names.get(key, key)
        converted[key] = _our_shape(key, value, expected[key].shape) if key in expected else value
    return converted


_FORWARD_TYPES = {
    "v0": dict(gate="act", d_conv=3, conv_bias=True, ssm_act_layer="silu", ssm_init="mamba"),
    "v051d": dict(path="h,h,h,h"),
    "v052d": dict(path="h,h,h_flip,h_flip"),
    "v052dc": dict(ssm="cascade"),
    "m0": dict(ssm="multi_head"),
}
_FORWARD_TYPES["v0seq"] = _FORWARD_TYPES["v0"]
_FORWARD_TYPES.update({name: {} for name in ("v01", "v02", "v03", "v04", "v05", "v2", "v3")})
_POSTFIXES = {
    "_no32": {},
    "_oact": dict(out_act=True),
    "_noz": dict(gate="none"),
    "_nozact": dict(gate="linear"),
    "_onnone": dict(out_norm="none"),
    "_ondwconv3": dict(out_norm="dwconv"),
    "_oncnorm": dict(out_norm="layer_dwconv"),
    "_onsoftmax": dict(out_norm="softmax"),
    "_onsigmoid": dict(out_norm="sigmoid"),
}


def official_arguments(forward_type: str = "v05_noz", **config: Any) -> dict[str, Any]:
    """Translate an official configuration to this project's constructor arguments.

    Args:
        forward_type: The authors' description of the token mixer, e.g. ``"v05_ondwconv3_noz"``.
        **config: Their other constructor arguments: ``depths``, ``dims``, ``ssm_d_state``, ``ssm_ratio``,
            ``ssm_dt_rank``, ``ssm_act_layer``, ``ssm_conv``, ``ssm_conv_bias``, ``ssm_init``, ``mlp_ratio``,
            ``mlp_act_layer``, ``gmlp``, ``patchembed_version``, ``downsample_version``, ``posembed``, ``imgsize``,
            ``patch_size``, ``in_chans``, ``num_classes``, ``patch_norm``, ``drop_path_rate``, ``ssm_drop_rate``. Others
            (``norm_layer``, ``use_checkpoint``) do not change the function and are ignored.

    Returns:
        Arguments of :class:`VMamba`.

    Raises:
        ValueError: The forward type is not one of the authors'.
    """
    base, *postfixes = forward_type.split("_")
    postfixes = [f"_{postfix}" for postfix in postfixes]
    if base not in _FORWARD_TYPES or not set(postfixes) <= set(_POSTFIXES):
        raise ValueError(
            f"forward_type: expected one of {', '.join(_FORWARD_TYPES)} and any of {', '.join(_POSTFIXES)}, "
            f"got {forward_type!r}"
        )
    renamed = dict(
        depths="depths", dims="dims", ssm_d_state="d_state", ssm_ratio="ssm_ratio", ssm_act_layer="ssm_act_layer",
        ssm_conv="d_conv", ssm_conv_bias="conv_bias", mlp_ratio="mlp_ratio", mlp_act_layer="mlp_act_layer",
        gmlp="gated_mlp", posembed="pos_embed", imgsize="img_size", patch_size="patch_size", in_chans="in_chans",
        num_classes="num_classes", patch_norm="patch_norm", drop_path_rate="drop_path_rate",
        ssm_drop_rate="proj_drop_rate",
    )  # fmt: skip
    arguments: dict[str, Any] = {ours: config[theirs] for theirs, ours in renamed.items() if theirs in config}
    if config.get("ssm_dt_rank", "auto") != "auto":
        arguments["dt_rank"] = config["ssm_dt_rank"]
    if "ssm_init" in config:
        arguments["ssm_init"] = {"v0": "mamba", "v1": "normal", "v2": "uniform"}[config["ssm_init"]]
    if "patchembed_version" in config:
        arguments["patch_embed"] = {"v1": "patch", "v2": "conv"}[config["patchembed_version"]]
    if "downsample_version" in config:
        arguments["downsample"] = {"v1": "merge", "v2": "conv2", "v3": "conv3"}[config["downsample_version"]]
    arguments["gate"] = "act"
    arguments.update(_FORWARD_TYPES[base])
    for postfix in postfixes:
        arguments.update(_POSTFIXES[postfix])
    return arguments
