"""The families, one file each; importing this package registers their models with timm."""

from . import plainmamba, vmamba

FAMILIES: tuple[str, ...] = (
    "plainmamba",
    "vmamba",
)
"""Names of the modules that register models."""

__all__ = ["FAMILIES", "plainmamba", "vmamba"]
