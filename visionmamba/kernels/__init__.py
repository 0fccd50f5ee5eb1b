"""Kernel sources: ``visionmamba.kernels.cpu``, ``.cuda`` and ``.triton``.

An installed package holds them here; a plain checkout keeps them in the top-level ``kernels/`` folder, which has no
``__init__.py`` so that it never shadows Hugging Face's ``kernels`` package.
"""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[2] / "kernels"
if not (Path(__file__).parent / "cpu").is_dir() and (_checkout / "cpu").is_dir():
    __path__.append(str(_checkout))
