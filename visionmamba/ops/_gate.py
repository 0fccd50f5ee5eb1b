"""The gate that closes a scan, out = y silu(z), and its gradients, in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["apply_gate", "gate_backward"]


def _like(z: Tensor, y: Tensor) -> Tensor:
    """Return z in the dtype of y, with an axis of directions if y has one."""
    return (z if z.dim() == y.dim() else z.unsqueeze(2)).to(y.dtype)


def apply_gate(y: Tensor, z: Tensor) -> Tensor:
    """Return ``y silu(z)`` in the dtype of y, ``(B, L, D)`` or ``(B, L, K, D)``; z may lack the axis K."""
    return y * F.silu(_like(z, y))


def gate_backward(dy: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of y and z from that of :func:`apply_gate`'s result; all in the dtype of ``dy``."""
    gate = _like(z, dy)
    sigmoid = torch.sigmoid(gate)
    dz = dy * y * sigmoid * (1 + gate * (1 - sigmoid))
    return dy * gate * sigmoid, dz if z.dim() == dy.dim() else dz.sum(2)
