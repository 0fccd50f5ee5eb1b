"""The step sizes' low-rank projection and its gradients on NVIDIA GPUs: ``kernels/cuda/dt_*.cu``.

Everything is float32 but the low-rank values and their gradient, so a step size is as accurate with 16-bit activations
as without. The products are too narrow for a matrix product's kernels; they take as long as moving the step sizes:
16-bit activations on the tensor cores, others (and odd numbers of channels) without them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import cuda_runtime
from ..cuda_runtime import Arguments, pointer
from .cuda_call import ACT, sum_rows

__all__ = ["LEAST_SHARED_BYTES", "MAX_RANK", "Cut", "cut", "expand_delta", "expand_delta_backward"]

MAX_RANK = 64
"""Of what the kernels take; PyTorch does the rest."""
_LEAST_ROWS = 64  # of a block: its weights want to be used

_FRAGMENT = 32 * 2 * 3  # registers of a weight's three parts, 16 channels by 8 values
LEAST_SHARED_BYTES = 99 * 1024
"""That a block may have on every device."""
_PRODUCTS_CUTS = {
    "dt_expand": [(49, 1, 6, 12), (25, 2, 6, 12), (17, 4, 6, 12), (9, 2, 6, 24), (0, 2, 6, 24)],
    "dt_backward": [(49, 1, 6, 6), (25, 2, 6, 6), (17, 3, 8, 8), (9, 3, 8, 16), (0, 3, 6, 12)],
}
"""From which rank on, and then: 16s of channels a warp, warps of a block, warps a multiprocessor; as measured."""


@dataclass(frozen=True)
class Cut:
    """How a kernel is cut.

    Args:
        file: Kernel file.
        macros: Its specialisation.
        channels: Channels of a block.
        threads: Threads of a block.
        shared_bytes: Dynamic shared memory.
        blocks: Blocks a multiprocessor that are wanted.
    """

    file: str
    macros: dict[str, int]
    channels: int
    threads: int
    shared_bytes: int
    blocks: int


def _vector(channels: int, rank: int) -> int:
    """Return the channels of a thread: R of its values or gradients for each stay in registers."""
    widest = 4 if rank <= 24 else 2 if rank <= 48 else 1
    return next(width for width in (4, 2, 1) if width <= widest and channels % width == 0)


def _plain_cut(dtype: torch.dtype, channels: int, rank: int) -> Cut:
    vec = _vector(channels, rank)
    return Cut("dt_projection.cu", {"ACT": ACT[dtype], "RANK": rank, "VEC": vec}, 32 * vec, 256, 0, 4)


def _products_cut(name: str, dtype: torch.dtype, channels: int, rank: int, pairs: bool, most_bytes: int) -> Cut:
    """Cut for the tensor cores: a warp's channels are what registers hold of the weight's gradient."""
    tiles, most_warps, resident = next(cut for least, *cut in _PRODUCTS_CUTS[name] if rank >= least)
    warps = min(most_warps, -(-channels // (16 * tiles)))
    macros = {"ACT": ACT[dtype], "RANK": rank, "TILES": tiles, "WARPS": warps, "X_PAIRS": int(pairs), "AHEAD": 0}
    shared = 0
    if name == "dt_backward":
        values = 8 * -(-rank // 8)
        shared = 4 * warps * (tiles * values // 8 * _FRAGMENT + 2 * 16 * values)
        ahead = 4 * warps * tiles * 16 * 16
        if shared + ahead <= most_bytes:
            macros["AHEAD"], shared = 1, shared + ahead
    return Cut("dt_products.cu", macros, 16 * tiles * warps, 32 * warps, shared, max(1, resident // warps))


def cut(
    name: str,
    dtype: torch.dtype,
    channels: int,
    rank: int,
    pairs: bool = True,
    most_bytes: int = LEAST_SHARED_BYTES,
) -> Cut:
    """Choose the kernel for a projection.

    Args:
        name: ``"dt_expand"`` or ``"dt_backward"``.
        dtype: Of the low-rank values.
        channels: D.
        rank: R.
        pairs: Whether two neighbouring low-rank values can be read at a time.
        most_bytes: Of shared memory that a block may have.
    """
    if dtype == torch.float32 or channels % 4:
        return _plain_cut(dtype, channels, rank)
    return _products_cut(name, dtype, channels, rank, pairs, most_bytes)


class _Projection:
    """One call of a kernel: rows, tiles, chunks and the argument struct."""

    def __init__(self, name: str, delta: Tensor, weight: Tensor) -> None:
        self.name = name
        one_stride = delta.shape[0] == 1 or delta.stride(0) == delta.shape[1] * delta.stride(1)
        self.x = delta if one_stride and delta.stride(-1) == 1 else delta.contiguous()
        self.weight = weight.float().contiguous()
        self.directions, self.channels, self.rank = weight.shape
        self.rows = delta.shape[0] * delta.shape[1]
        even = all(n % 2 == 0 for n in (self.rank, *self.x.stride()[1:3]))
        pairs = even and self.x.data_ptr() % (2 * self.x.element_size()) == 0
        self.launcher = cuda_runtime.launcher(delta.device)
        self.cut = cut(name, delta.dtype, self.channels, self.rank, pairs, self.launcher.shared_bytes)
        self.tiles = -(-self.channels // self.cut.channels)
        wanted = max(1, self.cut.blocks * self.launcher.multiprocessors // (self.directions * self.tiles))
        self.chunk = -(-max(_LEAST_ROWS, -(-self.rows // wanted)) // 16) * 16
        self.chunks = -(-self.rows // self.chunk)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=self.x.device)

    def run(self, delta: Tensor, dx: Tensor | None = None, dweight: Tensor | None = None) -> None:
        tensors = map(pointer, (self.x, self.weight, delta, dx, dweight))
        wide = (*tensors, self.rows, self.x.stride(1), self.x.stride(2))
        narrow = (self.directions, self.channels, self.tiles, self.chunk)
        blocks, cut, arguments = self.chunks * self.directions * self.tiles, self.cut, Arguments(wide, narrow)
        self.launcher.run(cut.file, self.name, cut.macros, blocks, cut.threads, arguments, cut.shared_bytes)


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
    call = _Projection("dt_expand", delta, weight)
    expanded = call.empty(*delta.shape[:3], call.channels)
    call.run(expanded)
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
    call = _Projection("dt_backward", delta, weight)
    dx, dweight = call.empty(call.tiles, *delta.shape), call.empty(call.chunks, *weight.shape)
    call.run(dexpanded, dx, dweight)
    (dweight,) = sum_rows(call.launcher, dweight.flatten(1), delta.dtype, [weight.numel()])
    return dx[0] if call.tiles == 1 else dx.sum(0), dweight.view(weight.shape)
