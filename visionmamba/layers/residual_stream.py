"""Pre-norm blocks around a token mixer, with the residual stream in float32.

The authors of Vim and LocalVim write a block as "add, norm, mix": it takes the last mixer's output and the residual
stream, adds one to the other, and returns the next pair. Adding at a block's end instead of at the next one's beginning
is the same sum, and leaves an ordinary residual block, ``x = x + mixer(norm(x))``.
"""

from __future__ import annotations

import torch
import torch.nn as nn
from timm.layers import DropPath, register_notrace_function

from .fusion import fuses, unwatched
from .norm import add_stream_norm, before_linear, stream_norm
from .rope import apply_rope

__all__ = ["STREAM_NORMS", "BlockPair", "ResidualBlock", "StreamLayerNorm", "StreamRMSNorm", "widen"]

torch.fx.wrap("stream_norm")  # FX looks for leaf functions where forward is defined


@torch.fx.wrap
@register_notrace_function
def widen(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` in the residual stream's dtype: float32, or float64 for float64."""
    return x if x.dtype == torch.float64 else x.float()


class StreamRMSNorm(nn.RMSNorm):
    """RMSNorm of the residual stream: computed in the stream's dtype, returned in the parameters'."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.narrow = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``(..., C)``."""
        return stream_norm(x, self.weight, None, self.eps, True, self.narrow)


class StreamLayerNorm(nn.LayerNorm):
    """LayerNorm of the residual stream: computed in the stream's dtype, returned in the parameters'."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.narrow = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``(..., C)``."""
        return stream_norm(x, self.weight, self.bias, self.eps, False, self.narrow)


STREAM_NORMS = {"rms": StreamRMSNorm, "layer": StreamLayerNorm}


class ResidualBlock(nn.Module):
    """``x + scale * mixer(norm(x))`` over tokens ``(B, L, C)``, and a rotation of the sum where asked for.

    Args:
        mixer: Maps tokens ``(B, L, C)`` and the size of the patch grid to tokens.
        norm: Norm of the residual stream, see :data:`STREAM_NORMS`.
        drop_path: Rate of stochastic depth of the mixer's output.
        scale: Factor of the mixer's output; it costs nothing in the sum.
        rope: What to rotate before the next block: ``"stream"`` the sum, ``"mixer"`` only what this block adds to the
            stream, ``""`` nothing. The authors rotate a block's two inputs; the rotation is linear, so rotating the sum
            is the same.
    """

    def __init__(
        self, mixer: nn.Module, norm: nn.Module, drop_path: float = 0.0, scale: float = 1.0, rope: str = ""
    ) -> None:
        super().__init__()
        self.norm = before_linear(norm)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.scale, self.rope = scale, rope

    @torch.jit.unused
    def joins(self, x: torch.Tensor) -> bool:
        """Whether :meth:`enter` may stand in for :meth:`step`: nothing waits for what the block or its norm returns."""
        return self.rope == "" and unwatched(self, self.norm) and fuses(x, compiled=False)

    @torch.jit.unused
    def enter(
        self, x: torch.Tensor, pending: torch.Tensor | None, grid: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the stream without this block's addition, and what is to be added, without ``scale``.

        Args:
            x: Residual stream, ``(B, L, C)``.
            pending: What the block before this one, of the same ``scale``, has still to add; joined with the norm.
            grid: (rows, columns) of the patches.
        """
        x, normed = add_stream_norm(x, pending, self.scale, self.norm)
        return x, self.drop_path(self.mixer(normed, grid))

    def step(
        self, x: torch.Tensor, grid: list[int], table: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the residual stream after this block, and the mixer's output without ``scale``.

        Args:
            x: Residual stream, ``(B, L, C)``.
            grid: (rows, columns) of the patches.
            table: Rotation, see :func:`visionmamba.layers.apply_rope`.
        """
        mixed = self.mixer(self.norm(x), grid)
        added = self.drop_path(mixed)
        if table is not None and self.rope == "mixer":
            added = apply_rope(added, table)
        x = torch.add(x, added, alpha=self.scale)
        if table is not None and self.rope == "stream":
            x = apply_rope(x, table)
        return x, mixed

    def forward(self, x: torch.Tensor, grid: list[int], table: torch.Tensor | None = None) -> torch.Tensor:
        """Transform the residual stream ``(B, L, C)``; see :meth:`step`."""
        return self.step(x, grid, table)[0]


class BlockPair(nn.Module):
    """Two blocks over the same tokens, the second over their reversal, whose residual streams are summed.

    Args:
        first: Block over the sequence.
        second: Block over the reversed sequence.
    """

    def __init__(self, first: ResidualBlock, second: ResidualBlock) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.scale = first.scale

    def step(
        self, x: torch.Tensor, grid: list[int], table: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what :meth:`ResidualBlock.step` does, summed over both blocks."""
        first, first_h = self.first.step(x, grid, table)
        second, second_h = self.second.step(x, grid, table)
        return first + second, first_h + second_h

    def forward(self, x: torch.Tensor, grid: list[int], table: torch.Tensor | None = None) -> torch.Tensor:
        """Transform the residual stream ``(B, L, C)``."""
        return self.first(x, grid, table) + self.second(x, grid, table)
