"""Checkpoints between the authors' layouts, this project's, and a folder for the Hugging Face Hub."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.models._input import get_model_input_config

from ._files import replacing
from .inference import CFG_METADATA_KEY, checkpoint_cfg, create_classifier
from .models._checkpoint import load_checkpoint_file
from .zoo import published_top1

__all__ = ["write_hub_folder", "write_official", "write_ours"]

_NESTING = {"vim": "model", "vmamba": "model"}
_CARD = """\
---
tags:
- image-classification
- timm
- mamba
pipeline_tag: image-classification
library_name: timm
license: {license}
---
# {name}

{description}

```python
import timm
import visionmamba  # registers the model: pip install visionmamba

model = timm.create_model("hf-hub:ORGANISATION/{name}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

{table}
"""


def _load(name: str, checkpoint: str | os.PathLike, img_size: tuple[int, int] | None) -> nn.Module:
    """Build the model that a checkpoint is of, with as many classes and input channels as its tensors have."""
    weights = load_checkpoint_file(checkpoint)
    size = img_size or checkpoint_cfg(checkpoint).get("input_size", ())[1:]
    model = timm.create_model(name, device="meta", **({"img_size": tuple(size)} if size else {}))
    _check_img_size(weights, model)
    converted, cfg = _family(name).checkpoint_filter_fn(dict(weights), model), model.pretrained_cfg
    stem = converted.get(f"{cfg['first_conv'] or 'patch_embed.projection'}.weight")  # timm is told of no clips' stem
    classifier = converted.get(f"{cfg['classifier']}.weight")
    found = {}
    if stem is not None:  # otherwise the checkpoint is of another model, which loading it says
        found = {"num_classes": 0 if classifier is None else classifier.shape[0], "in_chans": stem.shape[1]}
    return create_classifier(name, checkpoint, img_size=img_size, **found)


def _check_img_size(weights: dict[str, torch.Tensor], model: nn.Module) -> None:
    """Raise ValueError if reading the position embedding would interpolate it: conversion keeps every bit."""
    given = next((value for key, value in weights.items() if key.endswith("pos_embed")), None)
    expected = getattr(model, "pos_embed", None)
    if given is None or expected is None or given.numel() == expected.numel():
        return
    if getattr(model, "size_of_checkpoint", False) or given.shape[-1] != expected.shape[-1]:
        return  # takes its size from the checkpoint; or the checkpoint is of another model, which loading it says
    rows, nominal = (value.numel() // value.shape[-1] for value in (given, expected))
    height, width = get_model_input_config(model)["input_size"][-2:]
    raise ValueError(
        f"img_size: expected the size for which a position embedding has {rows} rows, got {height} x {width}, where "
        f"it has {nominal}"
    )


def _family(name: str) -> Any:
    return sys.modules[timm.model_entrypoint(name.split(".")[0]).__module__]


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.detach().contiguous() for key, value in model.state_dict().items()}


def _overlay(model: nn.Module) -> dict[str, Any]:
    """Return what tells a reader how many classes there are and how images are prepared."""
    settings = timm.data.resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    names = ("mean", "std", "crop_pct", "interpolation")
    size = get_model_input_config(model)["input_size"][1:]
    overlay = {"num_classes": model.num_classes, "input_size": [model.in_chans, *size]}
    overlay.update({name: settings[name] for name in names})
    if model.pretrained_cfg.get("label_names"):
        overlay["label_names"] = list(model.pretrained_cfg["label_names"])
    return overlay


def write_ours(
    name: str, checkpoint: str | os.PathLike, out: Path, img_size: tuple[int, int] | None = None
) -> nn.Module:
    """Write a checkpoint as safetensors in this project's layout.

    Args:
        name: The model's timm name.
        checkpoint: The weights, in any layout that the model's family accepts.
        out: File to write.
        img_size: Image size, (height, width), of the checkpoint's position embedding, where it is neither the model's
            nor said in the checkpoint.

    Returns:
        The model with the weights.

    Raises:
        visionmamba.models._checkpoint.CheckpointError: The checkpoint cannot be read or does not fit.
        ValueError: Its position embedding is another image size's.
    """
    from safetensors.torch import save_file

    model = _load(name, checkpoint, img_size)
    with replacing(out) as temporary:
        save_file(_tensors(model), temporary, metadata={"model": name, CFG_METADATA_KEY: json.dumps(_overlay(model))})
    return model


def write_official(
    name: str, checkpoint: str | os.PathLike, out: Path, img_size: tuple[int, int] | None = None
) -> nn.Module:
    """Write a checkpoint with its authors' names and shapes, nested as they nest it.

    Args:
        name: The model's timm name.
        checkpoint: The weights, in any layout that the model's family accepts.
        out: File to write with ``torch.save``.
        img_size: Image size, (height, width), of the checkpoint's position embedding, where it is neither the model's
            nor said in the checkpoint.

    Returns:
        The model with the weights.

    Raises:
        visionmamba.models._checkpoint.CheckpointError: The checkpoint cannot be read or does not fit.
        ValueError: Its position embedding is another image size's, or what would be written does not give the same
            weights when it is read.
    """
    model, family = _load(name, checkpoint, img_size), _family(name)
    tensors = _tensors(model)
    official = {key: value.contiguous() for key, value in family.official_state_dict(tensors, model).items()}
    back = family.checkpoint_filter_fn(dict(official), model)
    lost = [key for key, value in tensors.items() if key not in back or not torch.equal(back[key], value)]
    if lost:
        raise ValueError(f"{name}: the authors' layout has no place for {', '.join(lost[:5])}")
    nesting = _NESTING.get(family.__name__.rpartition(".")[2], "state_dict")
    with replacing(out) as temporary:
        torch.save({nesting: official}, temporary)
    return model


def write_hub_folder(
    name: str, checkpoint: str | os.PathLike, out: Path, img_size: tuple[int, int] | None = None
) -> nn.Module:
    """Write a folder in timm's layout on the Hugging Face Hub: weights, ``config.json`` and a model card.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` reads it, and ``hf-hub:...`` does once it is uploaded.

    Args:
        name: The model's timm name.
        checkpoint: The weights, in any layout that the model's family accepts.
        out: Folder to write to.
        img_size: Image size, (height, width), of the checkpoint's position embedding, where it is neither the model's
            nor said in the checkpoint.

    Returns:
        The model with the weights.

    Raises:
        visionmamba.models._checkpoint.CheckpointError: The checkpoint cannot be read or does not fit.
        ValueError: Its position embedding is another image size's.
    """
    from timm.models._hub import save_config_for_hf

    model = write_ours(name, checkpoint, _made(out) / "model.safetensors", img_size)
    with replacing(out / "config.json") as temporary:
        save_config_for_hf(model, str(temporary), model_config=_labels(model))
    with replacing(out / "README.md") as temporary:
        temporary.write_text(_card(name, model), encoding="utf-8")
    return model


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _labels(model: nn.Module) -> dict[str, Any]:
    names = model.pretrained_cfg.get("label_names")
    return {"label_names": list(names)} if names else {}


def _card(name: str, model: nn.Module) -> str:
    cfg = model.pretrained_cfg
    published = cfg.get("num_classes") == model.num_classes
    papers = cfg.get("paper_ids") or ()
    rows = {
        "Parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "Classes": model.num_classes,
        "Input": " x ".join(map(str, _overlay(model)["input_size"])),
        "Paper": cfg.get("paper_name"),
        "Paper's identifier": papers if isinstance(papers, str) else ", ".join(papers),
        "Authors' code": cfg.get("origin_url"),
        "Published top-1 of the authors' weights": published and published_top1(cfg),
    }  # fmt: skip
    table = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items() if value)]
    family = (_family(name).__doc__ or "").strip().splitlines()[0]
    license = cfg.get("license") or "other"
    return _CARD.format(name=name, description=family, table="\n".join(table), license=license)
