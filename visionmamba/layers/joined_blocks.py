"""Residual blocks in a row, each of which leaves its last addition to the norm of the block after it.

Such a block has ``step(x, pending) -> (x, pending)``: it takes the residual stream and what is still to be added to it
(None for nothing), and returns the same. On GPUs an addition and the norm after it are one kernel: see
:func:`visionmamba.layers.norm.add_norm`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn as nn

from .fusion import fuses, unwatched

__all__ = ["blocks_join", "run_joined"]


def blocks_join(blocks: Iterable[nn.Module], x: torch.Tensor) -> bool:
    """Whether :func:`run_joined` may stand in for the blocks: nothing else waits for what one of them returns.

    Args:
        blocks: The blocks.
        x: The first one's input.
    """
    if not fuses(x, compiled=not torch.is_grad_enabled()):
        return False
    blocks = list(blocks)
    return all(hasattr(block, "step") for block in blocks) and unwatched(*blocks)


def run_joined(blocks: Iterable[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """Run the blocks over a residual stream.

    Args:
        blocks: Blocks with ``step``.
        x: The stream, ``(..., C)``.
    """
    pending = None
    for block in blocks:
        x, pending = block.step(x, pending)
    return x if pending is None else x + pending
