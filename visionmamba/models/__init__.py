"""The families, one file each; importing this package registers their models with timm."""

from . import efficient_vmamba, local_vim, local_vmamba, mamba_nd, mamba_nd_btcv, plainmamba, vim, vmamba

FAMILIES: tuple[str, ...] = (
    "efficient_vmamba",
    "local_vim",
    "local_vmamba",
    "mamba_nd",
    "mamba_nd_btcv",
    "plainmamba",
    "vim",
    "vmamba",
)
"""Names of the modules that register models."""

__all__ = [
    "FAMILIES",
    "efficient_vmamba",
    "local_vim",
    "local_vmamba",
    "mamba_nd",
    "mamba_nd_btcv",
    "plainmamba",
    "vim",
    "vmamba",
]
