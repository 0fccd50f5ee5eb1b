"""Mamba vision backbones for timm, on one selective-scan core."""

__version__ = "0.1.0"
