"""Channel attention that several branches share (EfficientVMamba's SE, LocalMamba's attention over directions)."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ["ChannelAttention"]


class ChannelAttention(nn.Module):
    """Weigh each channel of a branch by what the branch holds on average, ``x sigmoid(W2 gelu(W1 mean(norm(x))))``.

    Squeeze and excitation (Hu et al. 2018) on channels-last tokens, with a norm before the mean.

    Args:
        dim: Channels.
        reduction: Hidden channels are ``int(dim * reduction)``.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(self, dim: int, reduction: float = 0.125, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        hidden = int(dim * reduction)
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.reduce = nn.Linear(dim, hidden, **dd)
        self.expand = nn.Linear(hidden, dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Weigh ``(B, ..., C)``; the mean is over everything between."""
        pooled = self.norm(x).flatten(1, -2).mean(1)
        gate = torch.sigmoid(self.expand(F.gelu(self.reduce(pooled))))
        return x * gate.view([gate.shape[0]] + [1] * (x.dim() - 2) + [gate.shape[1]])
