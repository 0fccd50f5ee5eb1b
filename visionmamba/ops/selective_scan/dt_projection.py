"""The step sizes' low-rank projection and its gradients on NVIDIA GPUs: ``kernels/cuda/dt_projection.cu``.

Everything is float32 but the low-rank values and their gradient, so a step size is as accurate with 16-bit activations
as without. The products are too narrow for a matrix product's kernels; they take as long as moving the step sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cuda_runtime
from ..cuda_runtime import Arguments, pointer
from .cuda_call import ACT

__all__ = ["MAX_RANK", "expand_delta", "expand_delta_backward", "macros"]

MAX_RANK = 64
"""Of what the kernels take; PyTorch does the rest."""
_FILE = "dt_projection.cu"
_THREADS = 256
_LEAST_ROWS = 64  # of a block: its weights want to be used
_BLOCKS_WANTED = 4  # a multiprocessor


def _vector(channels: int, rank: int) -> int:
    """Return the channels of a thread: R of its values or gradients for each stay in registers."""
    widest = 4 if rank <= 24 else 2 if rank <= 48 else 1
    return next(width for width in (4, 2, 1) if width <= widest and channels % width == 0)


def macros(dtype: torch.dtype, channels: int, rank: int) -> dict[str, int]:
    """Return the macros of a specialisation of the kernel file."""
    return {"ACT": ACT[dtype], "RANK": rank, "VEC": _vector(channels, rank)}


class _Projection:
    """One call: rows, tiles, chunks and the argument struct."""

    def __init__(self, delta: Tensor, weight: Tensor) -> None:
        one_stride = delta.shape[0] == 1 or delta.stride(0) == delta.shape[1] * delta.stride(1)
        self.x = delta if one_stride and delta.stride(-1) == 1 else delta.contiguous()
        self.weight = weight.float().contiguous()
        self.directions, self.channels, self.rank = weight.shape
        self.rows = delta.shape[0] * delta.shape[1]
        self.macros = macros(delta.dtype, self.channels, self.rank)
        self.tiles = -(-self.channels // (32 * self.macros["VEC"]))
        self.launcher = cuda_runtime.launcher(delta.device)
        wanted = max(1, _BLOCKS_WANTED * self.launcher.multiprocessors // (self.directions * self.tiles))
        self.chunk = max(_LEAST_ROWS, -(-self.rows // wanted))
        self.chunks = -(-self.rows // self.chunk)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=self.x.device)

    def run(self, name: str, delta: Tensor, dx: Tensor | None = None, dweight: Tensor | None = None) -> None:
        tensors = map(pointer, (self.x, self.weight, delta, dx, dweight))
        wide = (*tensors, self.rows, self.x.stride(1), self.x.stride(2))
        narrow = (self.directions, self.channels, self.tiles, self.chunk)
        blocks = self.chunks * self.directions * self.tiles
        self.launcher.run(_FILE, name, self.macros, blocks, _THREADS, Arguments(wide, narrow))


def expand_delta(delta: Tensor, weight: Tensor | None) -> Tensor:
    """Expand low-rank step sizes to the channels.

    Args:
        delta: ``(B, L, K, R)``.
        weight: ``(K, D, R)``; None if ``delta`` has all channels already.

    Returns:
        ``(B, L, K, D)``, in float32 where there was something to expand.
    """
    if weight is None:
        return delta
    if weight.shape[2] > MAX_RANK:
        return torch.einsum("blkr,kdr->blkd", delta.float(), weight.float())
    call = _Projection(delta, weight)
    expanded = call.empty(*delta.shape[:3], call.channels)
    call.run("dt_expand", expanded)
    return expanded


def expand_delta_backward(dexpanded: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of :func:`expand_delta`'s arguments in float32.

    Sums over tiles of channels and over chunks of tokens come first, then those of the tiles and chunks, in a fixed
    order.

    Args:
        dexpanded: Gradient of the result, ``(B, L, K, D)`` in float32, contiguous.
        delta: As in the forward.
        weight: As in the forward.
    """
    if weight.shape[2] > MAX_RANK:
        ddelta = torch.einsum("blkd,kdr->blkr", dexpanded, weight.float())
        return ddelta, torch.einsum("blkd,blkr->kdr", dexpanded, delta.float())
    call = _Projection(delta, weight)
    dx, dweight = call.empty(call.tiles, *delta.shape), call.empty(call.chunks, *weight.shape)
    call.run("dt_backward", dexpanded, dx, dweight)
    return dx[0] if call.tiles == 1 else dx.sum(0), dweight.sum(0)
