"""Learning rates that decay from a backbone's last layer to its first."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from timm.models._manipulate import group_parameters

__all__ = ["LayerDecayOptimWrapperConstructor"]


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Multiplies a backbone's learning rates by a power of ``layer_decay`` that grows towards the input.

    With n blocks, the rate of block i of 1 .. n is multiplied by ``layer_decay ** (n + 1 - i)``, that of what comes
    before the blocks (patch and position embedding, class token) by ``layer_decay ** (n + 1)``. The model's own
    grouping of its parameters (timm's ``group_matcher``) says what a block is. Everything else is as with mmengine's
    constructor, ``custom_keys`` of the backbone's parameters included (BEiT, Bao et al. 2022; as in ViTDet).

    Args:
        optim_wrapper_cfg: As for mmengine's constructor.
        paramwise_cfg: As for mmengine's constructor, and ``layer_decay``.

    Raises:
        ValueError: There is no ``layer_decay`` in ``paramwise_cfg``.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        settings = dict(paramwise_cfg or {})
        if not 0 < settings.get("layer_decay", 0) <= 1:
            raise ValueError(f"paramwise_cfg: expected a layer_decay above 0, at most 1, got {paramwise_cfg!r}")
        self.layer_decay = settings.pop("layer_decay")
        super().__init__(optim_wrapper_cfg, settings)

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the wrapper around the optimizer.

        Args:
            model: With a ``backbone`` of :class:`VisionMambaBackbone`.
        """
        keys = self.paramwise_cfg.get("custom_keys", {})
        self.paramwise_cfg = {**self.paramwise_cfg, "custom_keys": {**keys, **self._backbone_keys(model, keys)}}
        return super().__call__(model)

    def _backbone_keys(self, model: nn.Module, keys: dict[str, dict]) -> dict[str, dict[str, Any]]:
        """Return an entry for each of the model's parameters in the backbone, by its full name."""
        backbone = getattr(model, "module", model).backbone.model
        layer_of = group_parameters(backbone, backbone.group_matcher(), reverse=True)
        count = max(layer_of.values()) + 1
        prefix = next(name for name, module in model.named_modules() if module is backbone)
        entries = {}
        for name, layer in layer_of.items():
            full_name = f"{prefix}.{name}"
            fitting = sorted((key for key in keys if key in full_name), key=lambda key: (-len(key), key))
            entry = dict(keys[fitting[0]]) if fitting else {}
            entry["lr_mult"] = entry.get("lr_mult", 1.0) * self.layer_decay ** (count - layer)
            entries[full_name] = entry
        return entries
