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

from ._files import replacing
from .inference import CFG_METADATA_KEY, create_classifier
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


def _load(name: str, checkpoint: str | os.PathLike, num_classes: int | None) -> nn.Module:
    return create_classifier(name, checkpoint, num_classes, device="cpu")


def _family(name: str) -> Any:
    return sys.modules[timm.model_entrypoint(name.split(".")[0]).__module__]


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.detach().contiguous() for key, value in model.state_dict().items()}


def _overlay(model: nn.Module) -> dict[str, Any]:
    """Return what tells a reader how many classes there are and how images are prepared."""
    settings = timm.data.resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    names = ("mean", "std", "crop_pct", "interpolation")
    overlay = {"num_classes": model.num_classes, "input_size": [model.in_chans, *settings["input_size"][1:]]}
    overlay.update({name: settings[name] for name in names})
    if model.pretrained_cfg.get("label_names"):
        overlay["label_names"] = list(model.pretrained_cfg["label_names"])
    return overlay


def write_ours(name: str, checkpoint: str | os.PathLike, out: Path, num_classes: int | None = None) -> nn.Module:
    """Write a checkpoint as safetensors in this project's layout.

    Args:
        name: The model's timm name.
        checkpoint: The weights, in any layout that the model's family accepts.
        out: File to write.
        num_classes: Classes of the checkpoint, where they are neither the model's nor said in it.

    Returns:
        The model with the weights.

    Raises:
        visionmamba.models.CheckpointError: The checkpoint cannot be read or does not fit.
    """
    from safetensors.torch import save_file

    model = _load(name, checkpoint, num_classes)
    with replacing(out) as temporary:
        save_file(_tensors(model), temporary, metadata={"model": name, CFG_METADATA_KEY: json.dumps(_overlay(model))})
    return model


def write_official(name: str, checkpoint: str | os.PathLike, out: Path, num_classes: int | None = None) -> nn.Module:
    """Write a checkpoint with its authors' names and shapes, nested as they nest it.

    Args:
        name: The model's timm name.
        checkpoint: The weights, in any layout that the model's family accepts.
        out: File to write with ``torch.save``.
        num_classes: Classes of the checkpoint, where they are neither the model's nor said in it.

    Returns:
        The model with the weights.

    Raises:
        visionmamba.models.CheckpointError: The checkpoint cannot be read or does not fit.
        ValueError: What would be written does not give the same weights when it is read.
    """
    model, family = _load(name, checkpoint, num_classes), _family(name)
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


def write_hub_folder(name: str, checkpoint: str | os.PathLike, out: Path, num_classes: int | None = None) -> nn.Module:
    """Write a folder in timm's layout on the Hugging Face Hub: weights, ``config.json`` and a model card.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` reads it, and ``hf-hub:...`` does once it is uploaded.

    Args:
        name: The model's timm name.
        checkpoint: The weights, in any layout that the model's family accepts.
        out: Folder to write to.
        num_classes: Classes of the checkpoint, where they are neither the model's nor said in it.

    Returns:
        The model with the weights.

    Raises:
        visionmamba.models.CheckpointError: The checkpoint cannot be read or does not fit.
    """
    from timm.models._hub import save_config_for_hf

    model = write_ours(name, checkpoint, _made(out) / "model.safetensors", num_classes)
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
