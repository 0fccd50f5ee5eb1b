"""Selective scan (S6) along scan paths: one operator, several backends, and mamba_ssm's drop-in function."""

from . import cpu, cuda, pytorch, triton  # noqa: F401  (register the backends)
from .interface import selective_scan_fn, selective_scan_ref
from .op import selective_scan
from .reference import path_scan_reference

__all__ = ["path_scan_reference", "selective_scan", "selective_scan_fn", "selective_scan_ref"]
