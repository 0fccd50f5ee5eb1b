"""Causal depthwise convolution along scan paths, and causal_conv1d's drop-in functions."""

from . import cpu, cuda, pytorch  # noqa: F401  (register the backends)
from .interface import causal_conv1d_fn, causal_conv1d_update, causal_conv1d_varlen_states
from .op import causal_conv1d
from .reference import causal_conv1d_reference

__all__ = [
    "causal_conv1d",
    "causal_conv1d_fn",
    "causal_conv1d_reference",
    "causal_conv1d_update",
    "causal_conv1d_varlen_states",
]
