"""The families, one file each; importing this package registers their models with timm."""

from . import vmamba

FAMILIES: tuple[str, ...] = ("vmamba",)
"""Names of the modules that register models."""

__all__ = ["FAMILIES", "vmamba"]
