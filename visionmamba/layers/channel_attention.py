"""Channel attention that several branches share (EfficientVMamba's SE, LocalMamba's attention over directions)."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from .norm import LayerNorm, before_linear

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
        self.norm = before_linear(LayerNorm(dim, eps=1e-5, **dd))  # a linear layer reads its mean
        self.reduce = nn.Linear(dim, hidden, **dd)
        self.expand = nn.Linear(hidden, dim, **dd)

    def gate(self, x: torch.Tensor, dims: list[int]) -> torch.Tensor:
        """Return the weights of ``(B, ..., C)`` from its mean over ``dims``, which are kept with size 1."""
        pooled = self.norm(x).mean(dims, keepdim=True)
        return torch.sigmoid(self.expand(F.gelu(self.reduce(pooled))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Weigh maps ``(B, H, W, C)``."""
        return x * self.gate(x, [1, 2])
