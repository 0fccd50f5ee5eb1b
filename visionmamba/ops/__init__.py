"""Operators: the selective scan along paths and its relatives, beside mamba_ssm's and causal_conv1d's names."""

from .backend import BACKENDS, backend, explain
from .causal_conv1d import causal_conv1d, causal_conv1d_reference
from .scan_path import ScanPath, padded_grid, scan_path
from .selective_scan import path_scan_reference, selective_scan

__all__ = [
    "BACKENDS",
    "ScanPath",
    "backend",
    "causal_conv1d",
    "causal_conv1d_reference",
    "explain",
    "padded_grid",
    "path_scan_reference",
    "scan_path",
    "selective_scan",
]
