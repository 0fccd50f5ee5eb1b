"""The zoo's models as backbones of OpenMMLab's detectors and segmentors; importing this registers them.

In a config::

    custom_imports = dict(imports=["visionmamba.openmmlab"], allow_failed_imports=False)
    model = dict(backbone=dict(type="VisionMambaBackbone", model_name="vmamba_tiny_s1l8", ...), ...)

mmcv's compiled operators are replaced where they are missing, see :mod:`visionmamba.openmmlab.mmcv_ext`. Configs that
inherit ``mmseg::...`` are read after importing this, see :func:`find_mmseg_configs`.
"""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("mmengine") is None:
    raise ImportError('OpenMMLab is not installed; pip install "visionmamba[openmmlab]"')

from .checkpoints import allow_runner_checkpoints
from .mmcv_ext import install


def find_mmseg_configs() -> None:
    """Let configs inherit ``mmseg::...`` where mmseg is installed under another name than mmsegmentation's.

    mmengine looks for the distribution ``mmsegmentation``, which the maintained one (``onedl-mmsegmentation``) is not
    called; by the name of the module it finds both.
    """
    from mmengine.config.utils import MODULE2PACKAGE

    MODULE2PACKAGE["mmseg"] = "mmseg"


find_mmseg_configs()
allow_runner_checkpoints()
install()  # before anything imports mmcv.ops

from .adapter import VisionMambaAdapter  # noqa: E402
from .aliases import MM_VSSM, PlainMambaSeg, VisionMambaSeg  # noqa: E402
from .backbone import VisionMambaBackbone  # noqa: E402
from .hooks import BackgroundWeightHook, CudaGraphHook, TimeBudgetHook  # noqa: E402
from .neck import VisionMambaFeaturePyramid, ViTDetFeaturePyramid  # noqa: E402
from .optim import LayerDecayOptimWrapperConstructor  # noqa: E402

__all__ = [
    "MM_VSSM",
    "BackgroundWeightHook",
    "CudaGraphHook",
    "LayerDecayOptimWrapperConstructor",
    "PlainMambaSeg",
    "TimeBudgetHook",
    "ViTDetFeaturePyramid",
    "VisionMambaAdapter",
    "VisionMambaBackbone",
    "VisionMambaFeaturePyramid",
    "VisionMambaSeg",
    "allow_runner_checkpoints",
    "find_mmseg_configs",
    "install",
]
