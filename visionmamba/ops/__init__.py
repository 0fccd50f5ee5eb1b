"""Operators: the selective scan along paths and its relatives, beside mamba_ssm's and causal_conv1d's names."""

from .backend import BACKENDS, backend, explain
from .causal_conv1d import (
    causal_conv1d,
    causal_conv1d_fn,
    causal_conv1d_reference,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
)
from .mamba_inner import mamba_inner_fn
from .norm import layer_norm_fn, layernorm_fn, rms_norm_fn, rmsnorm_fn
from .scan_path import ScanPath, padded_grid, scan_path
from .selective_scan import path_scan_reference, selective_scan, selective_scan_fn, selective_scan_ref
from .ssd import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined, ssd_scan
from .state_update import selective_state_update

__all__ = [
    "BACKENDS",
    "ScanPath",
    "backend",
    "causal_conv1d",
    "causal_conv1d_fn",
    "causal_conv1d_reference",
    "causal_conv1d_update",
    "causal_conv1d_varlen_states",
    "explain",
    "layer_norm_fn",
    "layernorm_fn",
    "mamba_chunk_scan_combined",
    "mamba_inner_fn",
    "mamba_split_conv1d_scan_combined",
    "padded_grid",
    "path_scan_reference",
    "rms_norm_fn",
    "rmsnorm_fn",
    "scan_path",
    "selective_scan",
    "selective_scan_fn",
    "selective_scan_ref",
    "selective_state_update",
    "ssd_scan",
]
