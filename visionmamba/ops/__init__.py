"""Operators: the selective scan along paths and its relatives, with mamba_ssm's and causal_conv1d's names beside them."""

from .backend import BACKENDS, backend, explain
from .scan_path import ScanPath, padded_grid, scan_path
from .selective_scan import path_scan_reference, selective_scan

__all__ = [
    "BACKENDS",
    "ScanPath",
    "backend",
    "explain",
    "padded_grid",
    "path_scan_reference",
    "scan_path",
    "selective_scan",
]
