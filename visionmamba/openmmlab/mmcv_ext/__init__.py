"""A stand-in for mmcv's compiled operators (``mmcv._ext``) on torchvision and PyTorch.

mmcv publishes compiled operators for some combinations of torch and CUDA only; everywhere else ``import mmcv.ops``
fails. The operators that detection and segmentation with this zoo need exist in torchvision or are short in PyTorch, on
CPU and GPU, forward and backward. They carry the names and calling conventions that ``mmcv.ops`` uses (outputs are
written into given tensors). Every other operator raises when it is called, naming itself.

The compiled extension is always preferred: nothing is replaced where it exists.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import logging
import sys
import types
from collections.abc import Callable

from . import attention, boxes, deformable, losses, roi

__all__ = ["OPERATORS", "install"]

_logger = logging.getLogger("visionmamba.openmmlab")
_NAME = "mmcv._ext"

OPERATORS: dict[str, Callable] = {
    function.__name__: function
    for function in (
        attention.ms_deform_attn_backward,
        attention.ms_deform_attn_forward,
        boxes.bbox_overlaps,
        boxes.nms,
        boxes.nms_match,
        boxes.softnms,
        deformable.deform_conv_backward_input,
        deformable.deform_conv_backward_parameters,
        deformable.deform_conv_forward,
        deformable.modulated_deform_conv_backward,
        deformable.modulated_deform_conv_forward,
        losses.sigmoid_focal_loss_backward,
        losses.sigmoid_focal_loss_forward,
        losses.softmax_focal_loss_backward,
        losses.softmax_focal_loss_forward,
        roi.roi_align_backward,
        roi.roi_align_forward,
        roi.roi_pool_backward,
        roi.roi_pool_forward,
    )
}
"""The operators that exist here, by the name under which ``mmcv.ops`` calls them."""


def _missing(name: str) -> Callable:
    def operator(*_args, **_kwargs):
        raise NotImplementedError(
            f"mmcv operator {name!r} has no stand-in in visionmamba; install a compiled mmcv for this torch and CUDA "
            "(onedl-mmcv publishes wheels for some) to use it"
        )

    operator.__name__ = name
    return operator


class _ExtensionModule(types.ModuleType):
    """``mmcv.ops`` checks at import that every operator it knows exists, so every name is answered."""

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("__"):
            raise AttributeError(name)
        return OPERATORS.get(name) or _missing(name)


def install() -> bool:
    """Put the stand-in in place of ``mmcv._ext`` where the compiled one is missing.

    Returns:
        Whether the stand-in is in use.

    Raises:
        ImportError: mmcv itself is not installed.
    """
    loaded = sys.modules.get(_NAME)
    if loaded is not None:
        return isinstance(loaded, _ExtensionModule)
    if importlib.util.find_spec("mmcv") is None:
        raise ImportError('mmcv is not installed; pip install "visionmamba[openmmlab]"')
    if importlib.util.find_spec(_NAME) is not None:
        return False
    module = _ExtensionModule(_NAME, __doc__)
    module.__spec__ = importlib.machinery.ModuleSpec(_NAME, loader=None)
    sys.modules[_NAME] = module
    _logger.warning(
        "mmcv has no compiled operators here: %d of them run on torchvision and PyTorch instead", len(OPERATORS)
    )
    return True
