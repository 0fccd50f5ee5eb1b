"""Mamba's token mixer: project to a gated, wider space, scan it, project back (Gu & Dao 2023, Mamba, section 3.4)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn as nn

from .fusion import fuses, unwatched
from .selective_ssm import SelectiveSSM

__all__ = ["GatedMixer"]


class GatedMixer(nn.Module):
    """``out_proj(ssm(x, z))`` of ``x, z = in_proj(tokens)``; a family brings its scan.

    Args:
        dim: Channels of the tokens, C.
        create_ssm: ``(channels) -> module`` that scans ``(x, z, grid)``, see :class:`SelectiveSSM`.
        expand: Channels inside relative to C.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(
        self, dim: int, create_ssm: Callable[[int], nn.Module], expand: int = 2, device=None, dtype=None
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        d_inner = expand * dim
        self.in_proj = nn.Linear(dim, 2 * d_inner, bias=False, **dd)
        self.ssm = create_ssm(d_inner)
        self.out_proj = nn.Linear(d_inner, dim, bias=False, **dd)

    @torch.jit.unused
    def _joins(self, x: torch.Tensor) -> bool:
        """Whether the input projection is computed anew in backward, inside the scan's operator."""
        if type(self.ssm) is not SelectiveSSM or type(self.in_proj) is not nn.Linear or not torch.is_grad_enabled():
            return False
        return self.in_proj.bias is None and unwatched(self.in_proj, self.ssm) and fuses(x)

    @torch.jit.unused
    def _joined(self, x: torch.Tensor, grid: list[int]) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return self.ssm.fused(x, None, grid, self.in_proj.weight)

    def mix(self, x: torch.Tensor, grid: list[int]) -> torch.Tensor:
        """Mix tokens ``(B, L, C)`` of a grid."""
        if not torch.jit.is_scripting():
            if self._joins(x):
                return self.out_proj(self._joined(x, grid))
        x, z = self.in_proj(x).chunk(2, dim=-1)
        return self.out_proj(self.ssm(x, z, grid))

    def forward(self, x: torch.Tensor, grid: list[int]) -> torch.Tensor:
        """Mix tokens ``(B, L, C)`` of a grid; a family whose tokens are laid out otherwise overrides this."""
        return self.mix(x, grid)
