"""Classifying images with a model of the zoo: its checkpoint, its preprocessing and the names of its classes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from PIL import Image, ImageSequence

__all__ = ["CFG_METADATA_KEY", "checkpoint_cfg", "class_names", "create_classifier", "create_reader", "input_size"]

CFG_METADATA_KEY = "pretrained_cfg"
"""Entry of a safetensors file's metadata: JSON of the part of timm's pretrained cfg in which a checkpoint differs."""


def checkpoint_cfg(path: str | os.PathLike) -> dict[str, Any]:
    """Return what a safetensors file's metadata says about its classes and input; empty for other files.

    Args:
        path: The checkpoint.

    Returns:
        The part of timm's pretrained cfg in which it differs from its model's own.
    """
    from safetensors import SafetensorError, safe_open

    if Path(path).suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {}).get(CFG_METADATA_KEY, "{}"))
    except (SafetensorError, OSError, ValueError):
        return {}  # reading the weights says what is wrong with the file


def create_classifier(
    name: str,
    checkpoint: str | os.PathLike | None = None,
    num_classes: int | None = None,
    device: torch.device | str | None = None,
    in_chans: int | None = None,
    img_size: tuple[int, int] | None = None,
) -> nn.Module:
    """Build a classifier with its weights.

    Args:
        name: Name of a timm model, with or without the tag of its weights.
        checkpoint: File with the weights, in any layout that the model's family accepts. By default the published ones.
        num_classes: Number of classes that the checkpoint has, where that is neither the model's own nor said in the
            checkpoint.
        device: Device for the model.
        in_chans: Input channels that the checkpoint has, likewise.
        img_size: Image size, (height, width), that the checkpoint's position embedding was made for, likewise.

    Returns:
        The model, in evaluation mode.

    Raises:
        visionmamba.models._builder.WeightsUnavailableError: There are no published weights, or they cannot be fetched.
        visionmamba.models._checkpoint.CheckpointError: The checkpoint cannot be read or does not fit.
    """
    overlay: dict[str, Any] = {}
    if checkpoint is not None:
        overlay = {**checkpoint_cfg(checkpoint), "file": os.fspath(checkpoint)}
    if num_classes is not None:
        overlay["num_classes"] = num_classes
    arguments = {"num_classes": overlay["num_classes"]} if "num_classes" in overlay else {}
    if in_chans is not None or img_size is not None or "input_size" in overlay:
        own_channels, *own_size = timm.get_pretrained_cfg(name).input_size
        channels, *size = overlay.get("input_size", (own_channels, *own_size))
        channels, size = in_chans or channels, list(img_size or size)
        overlay["input_size"] = (channels, *size)
        arguments["in_chans"] = channels
        if size != own_size:
            arguments["img_size"] = tuple(size)
        if channels != own_channels:  # whose statistics are of other channels
            overlay = {"mean": (0.5,) * channels, "std": (0.5,) * channels, **overlay}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    return model.to(device=device).eval()


def input_size(model: nn.Module) -> tuple[int, ...]:
    """Return the size of a model's input: (C, H, W) for images, (C, T, H, W) for clips.

    Args:
        model: A timm model; one that takes clips has a ``num_frames``.
    """
    _, height, width = model.pretrained_cfg["input_size"]
    frames = getattr(model, "num_frames", None)
    return (model.in_chans, *(() if frames is None else (frames,)), height, width)


def create_reader(model: nn.Module) -> Callable[[str | os.PathLike], torch.Tensor]:
    """Return the function that turns an image file into a model's input.

    Args:
        model: A timm model; its ``pretrained_cfg`` says how it was evaluated. If its input is a clip, the frames of an
            animated image are sampled evenly, and a still image stands still.

    Returns:
        Path to ``(1, C, H, W)`` or ``(1, C, T, H, W)`` float32 on the CPU. It raises what Pillow raises for a file that
        is not a readable image.
    """
    channels, *frames, _height, _width = input_size(model)
    cfg = timm.data.resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    transform = timm.data.create_transform(**cfg, is_training=False)
    mode = "L" if channels == 1 else "RGB"

    def read(path: str | os.PathLike) -> torch.Tensor:
        with Image.open(path) as image:
            if not frames:
                return transform(image.convert(mode))[None]
            shots = [transform(shot.convert(mode)) for shot in ImageSequence.Iterator(image)]
        positions = torch.linspace(0, len(shots) - 1, frames[0]).round().long().tolist()
        return torch.stack([shots[position] for position in positions], dim=1)[None]

    return read


def class_names(model: nn.Module) -> list[str]:
    """Return the names of a classifier's classes, by index.

    Args:
        model: A timm model.

    Returns:
        The names its checkpoint gives, else ImageNet's for 1000 (or 21841) classes, else the indices.
    """
    cfg = model.pretrained_cfg
    if cfg.get("label_names"):
        return [str(name) for name in cfg["label_names"]]
    subset = timm.data.infer_imagenet_subset(model)
    if subset is None:
        return [str(index) for index in range(model.num_classes)]
    return timm.data.ImageNetInfo(subset).label_descriptions()
