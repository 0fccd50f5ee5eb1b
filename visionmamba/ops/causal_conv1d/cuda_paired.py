"""The causal convolutions along a direction and its reverse, from one reading: ``kernels/cuda/conv_paired.cu``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import cuda_runtime
from ..cuda_runtime import Arguments, pointer
from ..scan_path import scan_order
from ..selective_scan.cuda_call import ACT, is_there_and_back, rows, strides, sum_rows

__all__ = ["CUTS", "Cut", "backward", "forward", "macros", "takes"]

_FILE = "conv_paired.cu"
_WARPS = 4


@dataclass(frozen=True)
class Cut:
    """How a kernel is cut.

    Args:
        vec: Channels of a thread.
        ahead: Steps whose rows are read together.
        chunk: Steps of a warp.
        min_blocks: Blocks a multiprocessor that registers must suffice for.
        most_blocks: Blocks a multiprocessor up to which it is preferred to the cut after it.
    """

    vec: int
    ahead: int
    chunk: int
    min_blocks: int = 1
    most_blocks: float = math.inf

    def blocks(self, batch: int, num_tokens: int, channels: int) -> int:
        """Blocks of a launch."""
        return batch * -(-channels // (32 * self.vec)) * -(-num_tokens // (self.chunk * _WARPS))


CUTS = {
    "paired_forward": [Cut(2, 4, 25)],
    "paired_backward": [Cut(4, 1, 50, most_blocks=3), Cut(2, 2, 50)],  # three of the first run at a time
}
"""As measured on an H200, for channels that allow it."""


def takes(x: Tensor, weight: Tensor, seq_idx: Tensor | None, initial: Tensor | None, path: str, grid) -> bool:
    """Whether both directions read the same tokens, all of them, with nothing before the first."""
    plain = x.dim() == 3 and weight.shape[0] == 2 and seq_idx is None and initial is None
    return plain and x.numel() > 0 and is_there_and_back(path, tuple(grid))


def macros(dtype: torch.dtype, width: int, cut: Cut, *, silu: bool) -> dict[str, int]:
    """Return the macros of a specialisation of the kernel file."""
    return {
        "ACT": ACT[dtype],
        "WIDTH": width,
        "VEC": cut.vec,
        "AHEAD": cut.ahead,
        "WARPS": _WARPS,
        "MIN_BLOCKS": cut.min_blocks,
        "SILU": int(silu),
    }


def _fit(cut: Cut, channels: int, tensors: list[Tensor]) -> Cut:
    """Narrow a cut to the channels that every row lets a thread read at a time."""

    def aligned(t: Tensor, vec: int) -> bool:
        return t.data_ptr() % (vec * t.element_size()) == 0 and all(n % vec == 0 for n in t.stride()[:-1])

    if channels % cut.vec == 0 and all(aligned(t, cut.vec) for t in tensors):
        return cut
    return Cut(1, cut.ahead, cut.chunk, 1)


def _run(name: str, x, weight, bias, path, grid, silu, dout=None, **results: Tensor) -> Tensor | None:
    """Launch a kernel; the backward's sums for the parameters, a row for each block, are returned."""
    batch, num_tokens, channels = x.shape
    width = weight.shape[2]
    weight, bias = (t if t is None else t.float().contiguous() for t in (weight, bias))
    order, launcher = scan_order(path, tuple(grid), x.device), cuda_runtime.launcher(x.device)
    sizes = (batch, num_tokens, channels)
    cut = next(cut for cut in CUTS[name] if cut.blocks(*sizes) <= cut.most_blocks * launcher.multiprocessors)
    cut = _fit(cut, channels, [t for t in (x, dout) if t is not None])
    tiles, groups = -(-channels // (32 * cut.vec)), -(-num_tokens // (cut.chunk * _WARPS))
    dparams = None
    if dout is not None:
        dparams = torch.empty((batch * groups, 2 * channels * (width + 1)), device=x.device)
    tensors = (x, dout, weight, bias, order, *map(results.get, ("out", "final_states", "dx")), dparams)
    all_strides = [strides(t) for t in (x, dout, results.get("dx"))]
    wide = (*map(pointer, tensors), *(stride[0] for stride in all_strides))
    narrow = (all_strides[0][1], *all_strides[1][1:], all_strides[2][1])
    narrow = (*narrow, num_tokens, channels, tiles, groups, cut.chunk, 0)
    specialisation = macros(x.dtype, width, cut, silu=silu)
    launcher.run(_FILE, name, specialisation, cut.blocks(*sizes), 32 * _WARPS, Arguments(wide, narrow))
    return dparams


def forward(x, weight, bias, path, grid, silu) -> tuple[Tensor, Tensor]:
    """Return the output, ``(B, L, 2, D)``, and the last inputs of each direction."""
    x = rows(x)
    batch, num_tokens, channels = x.shape
    out = x.new_empty((batch, num_tokens, 2, channels))
    final = x.new_empty((batch, 2, channels, weight.shape[2] - 1))
    _run("paired_forward", x, weight, bias, path, grid, silu, out=out, final_states=final)
    return out, final


def backward(dout, x, weight, bias, path, grid, silu) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias."""
    x, dout, split = rows(x), rows(dout), 2 * x.shape[2]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dparams = _run("paired_backward", x, weight, bias, path, grid, silu, dout, dx=dx)
    launcher = cuda_runtime.launcher(x.device)
    dweight, dbias = sum_rows(launcher, dparams, x.dtype, (split * weight.shape[2], split))
    return dx, dweight.view(weight.shape), dbias.view(weight.shape[:2])
