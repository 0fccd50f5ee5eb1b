"""The families, one file each; importing this package registers their models with timm."""

FAMILIES: tuple[str, ...] = ()
"""Names of the modules that register models."""

__all__ = ["FAMILIES"]
