"""The MLP of a block: timm's, with less to keep for the backward pass on GPUs."""

from __future__ import annotations

import timm.layers
import torch
import torch.nn as nn
import torch.nn.functional as F

from ..ops.gelu_linear import gelu_linear
from .fusion import fuses, unwatched

__all__ = ["Mlp"]


def _is_gelu(act: nn.Module) -> bool:
    """Whether an activation is the exact GELU, PyTorch's or timm's."""
    if type(act) is nn.GELU:
        return act.approximate == "none"
    return type(act) is timm.layers.get_act_layer("gelu")


class Mlp(timm.layers.Mlp):
    """``fc2(act(fc1(x)))``; arguments are ``timm.layers.Mlp``'s.

    While gradients are wanted, an exact GELU and the second layer are one operator where it runs: see
    :func:`visionmamba.ops.gelu_linear.gelu_linear`.
    """

    @torch.jit.unused
    def _joins(self, x: torch.Tensor) -> bool:
        """Whether the activation and the second layer are one operator."""
        linear = type(self.fc1) is nn.Linear and type(self.fc2) is nn.Linear
        if not torch.is_grad_enabled() or not linear or not _is_gelu(self.act):
            return False
        dropped = self.training and self.drop1.p > 0
        if dropped or not isinstance(self.norm, nn.Identity):
            return False
        return unwatched(self.fc1, self.act, self.drop1, self.norm, self.fc2) and fuses(x, compiled=False)

    @torch.jit.unused
    def _joined(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.fc1.bias  # its gradient is a sum that the next operator has at hand
        x = F.linear(x, self.fc1.weight, None if bias is None else bias.detach())
        return gelu_linear(x, self.fc2.weight, self.fc2.bias, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform ``(..., C)``."""
        if not torch.jit.is_scripting():
            if self._joins(x):
                return self.drop2(self._joined(x))
        x = self.norm(self.drop1(self.act(self.fc1(x))))
        return self.drop2(self.fc2(x))
