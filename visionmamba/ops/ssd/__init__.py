"""State space duality (the scan of Mamba-2) along scan paths: one operator, several backends, mamba_ssm's drop-ins."""

from . import pytorch, triton  # noqa: F401  (register the backends)
from .interface import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined
from .op import ssd_scan
from .reference import path_ssd_reference

__all__ = ["mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined", "path_ssd_reference", "ssd_scan"]
