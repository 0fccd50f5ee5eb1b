"""The families, one file each; importing this package registers their models with timm."""

from . import plainmamba, vim, vmamba

FAMILIES: tuple[str, ...] = (
    "plainmamba",
    "vim",
    "vmamba",
)
"""Names of the modules that register models."""

__all__ = ["FAMILIES", "plainmamba", "vim", "vmamba"]
