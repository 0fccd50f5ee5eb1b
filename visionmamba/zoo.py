"""What the registry says about the models of the zoo."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import timm

__all__ = ["ModelSummary", "model_names", "published_top1", "summarize", "weights_source"]


@dataclass(frozen=True)
class ModelSummary:
    """A row of ``visionmamba list``.

    Args:
        name: Name for ``timm.create_model``.
        family: Module of :mod:`visionmamba.models` that defines it.
        params: Number of parameters; None if the model needs a package that is not installed.
        top1: Published top-1 accuracy in per cent on the data that the weights were evaluated on, if any.
        weights: Where the authors publish the weights, if they do.
    """

    name: str
    family: str
    params: int | None
    top1: float | None
    weights: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return the row as a dictionary."""
        return asdict(self)


def model_names(pattern: str = "") -> list[str]:
    """Return the names of the zoo's models.

    Args:
        pattern: A shell pattern or a part of a name; all models by default.
    """
    from visionmamba.models import FAMILIES

    if pattern and not set(pattern) & set("*?["):
        pattern = f"*{pattern}*"
    return timm.list_models(pattern, module=list(FAMILIES)) if FAMILIES else []


def published_top1(cfg: dict[str, Any]) -> float | None:
    """Return the published top-1 accuracy in per cent: the note ``"top1: 82.6"`` of a pretrained cfg, if it has one."""
    for note in cfg.get("notes") or ():
        key, _, value = note.partition(":")
        if key == "top1":
            return float(value)
    return None


def weights_source(cfg: dict[str, Any]) -> str | None:
    """Return where a pretrained cfg's weights are fetched from, or None if its authors published none."""
    if cfg.get("hf_hub_id"):
        page, filename = f"https://huggingface.co/{cfg['hf_hub_id']}", cfg.get("hf_hub_filename")
        return f"{page}/resolve/main/{filename}" if filename else page
    return cfg.get("url") or None


def summarize(name: str) -> ModelSummary:
    """Return a model's row; it is built without memory for its weights.

    Args:
        name: Registered name.
    """
    cfg = timm.get_pretrained_cfg(name).to_dict()
    return ModelSummary(
        name=name,
        family=timm.model_entrypoint(name).__module__.rpartition(".")[2],
        params=_count_parameters(name),
        top1=published_top1(cfg),
        weights=weights_source(cfg),
    )


def _count_parameters(name: str) -> int | None:
    try:
        model = timm.create_model(name, device="meta")
    except ImportError:
        return None
    return sum(parameter.numel() for parameter in model.parameters())
