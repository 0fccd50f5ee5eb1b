"""State space duality (the scan of Mamba-2) along scan paths: one operator, several backends, mamba_ssm's drop-ins."""

from . import pytorch  # noqa: F401  (registers the backend)
from .interface import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined
from .op import ssd_scan
from .reference import path_ssd_reference

__all__ = ["mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined", "path_ssd_reference", "ssd_scan"]
