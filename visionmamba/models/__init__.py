"""The families, one file each; importing this package registers their models with timm."""

from . import mamba_nd, plainmamba, vim, vmamba

FAMILIES: tuple[str, ...] = (
    "mamba_nd",
    "plainmamba",
    "vim",
    "vmamba",
)
"""Names of the modules that register models."""

__all__ = ["FAMILIES", "mamba_nd", "plainmamba", "vim", "vmamba"]
