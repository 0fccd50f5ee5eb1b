"""Parameters and operations of detectors and segmentors, without running them.

The convention is that of the published tables, see :mod:`visionmamba.analysis.flops`: a whole model on one image. A
detector's second stage depends on the image, so it is counted as OpenMMLab's own tool does at most: for 1000 proposals,
the first 100 of them for the masks. Interpolating regions out of maps and suppressing boxes count nothing. A segmentor
is counted without the auxiliary head, which only training needs.

Everything happens on the meta device: nothing is computed, and the counts do not depend on weights.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn as nn
from mmengine.config import Config

from ..analysis.flops import count_flops
from .runner import build_model

__all__ = ["NUM_MASKS", "NUM_PROPOSALS", "complexity"]

NUM_PROPOSALS, NUM_MASKS = 1000, 100


class _FromImages(nn.Module):
    """What a model does with the pixels: all of a segmentor, a detector's first stage."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor):
        features = self.model.extract_feat(x)
        heads = [getattr(self.model, name, None) for name in ("rpn_head", "bbox_head", "decode_head")]
        return [head(features) for head in heads if head is not None]


def _modules(module: nn.Module | None) -> Iterable[nn.Module]:
    if module is None:
        return []
    return module if isinstance(module, nn.ModuleList) else [module]


def _roi_flops(roi_head: nn.Module) -> int:
    """Count a detector's second stage: each stage of a cascade refines all proposals."""
    total = 0
    for part, count in (("bbox", NUM_PROPOSALS), ("mask", NUM_MASKS)):
        extractors = _modules(getattr(roi_head, f"{part}_roi_extractor", None))
        for extractor, head in zip(extractors, _modules(getattr(roi_head, f"{part}_head", None)), strict=True):
            size = extractor.roi_layers[0].output_size
            total += count_flops(head, (count, extractor.out_channels, *size))
    return total


def complexity(config: Config, input_size: tuple[int, int]) -> dict[str, int]:
    """Count a config's parameters and operations.

    Args:
        config: Of a detector or segmentor.
        input_size: (height, width) of the image in pixels.

    Returns:
        ``parameters``, ``backbone_parameters`` and ``flops``. Parameters are all that are trained, the auxiliary head's
        too.
    """
    try:
        with torch.device("meta"):
            model = build_model(config).eval()
    except RuntimeError:  # some constructors read values, as Swin's does
        model = build_model(config).eval().to("meta")
    flops = count_flops(_FromImages(model), (1, 3, *input_size))
    if hasattr(model, "roi_head"):
        flops += _roi_flops(model.roi_head)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "backbone_parameters": sum(parameter.numel() for parameter in model.backbone.parameters()),
        "flops": flops,
    }
