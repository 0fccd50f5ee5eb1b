"""The causal depthwise convolution along a path on NVIDIA GPUs: ``kernels/cuda/causal_conv1d.cu``."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .. import cuda_runtime
from ..backend import Implementation, register_implementation
from ..cuda_runtime import Arguments, pointer
from ..scan_path import scan_order
from ..selective_scan.cuda_call import ACT, merge_directions, rows, strides, sum_rows, visits
from . import cuda_paired

__all__ = ["backward", "forward", "macros"]

_FILE = "causal_conv1d.cu"
_CHUNK = 16
_INT32 = 2**31 - 1


@lru_cache(maxsize=1024)
def _counts(path: str, grid: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the number of steps of each direction, (K,) int32."""
    return (scan_order(path, grid, device) >= 0).sum(1, dtype=torch.int32)


def macros(
    dtype: torch.dtype, width: int, vec: int, *, silu: bool, sequences: bool = False, partial: bool = False
) -> dict[str, int]:
    """Return the macros of a specialisation of the kernel file."""
    return {
        "ACT": ACT[dtype],
        "WIDTH": width,
        "VEC": vec,
        "CHUNK": _CHUNK,
        "SILU": int(silu),
        "SEQUENCES": int(sequences),
        "PARTIAL": int(partial),
    }


class _Conv:
    """One call: shapes, float32 parameters and the argument struct."""

    def __init__(self, x, weight, bias, seq_idx, initial_states, path, grid, silu, dout=None):
        self.batch, self.num_tokens = x.shape[:2]
        self.directions, self.channels, self.width = weight.shape
        self.x, self.dout = rows(x), rows(dout)
        self.weight, self.bias, self.initial = (
            t if t is None else t.float().contiguous() for t in (weight, bias, initial_states)
        )
        self.sequence = None if seq_idx is None else seq_idx.int().contiguous()
        self.order = scan_order(path, grid, x.device)
        self.counts = _counts(path, grid, x.device)
        self.visits = visits(path, grid)
        self.chunks = -(-self.order.shape[1] // _CHUNK)
        self.launcher = cuda_runtime.launcher(x.device)
        self.silu = silu
        read = [t for t in (self.x, self.dout) if t is not None]
        aligned = all(
            t.data_ptr() % (2 * t.element_size()) == 0 and all(stride % 2 == 0 for stride in t.stride()[:-1])
            for t in read
        )
        self.vec = 2 if aligned and self.channels % 2 == 0 else 1
        self.total = self.batch * self.directions * self.chunks * (self.channels // self.vec)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32, zero: bool = False) -> Tensor:
        return (torch.zeros if zero else torch.empty)(shape, dtype=dtype, device=self.x.device)

    def run(self, name: str, partial: bool = False, **tensors: Tensor | None) -> None:
        names = ("out", "final_states", "dx", "dinitial", "dparams")
        dx = tensors.get("dx")
        all_strides = [strides(t) for t in (self.x, self.dout, dx)]
        inputs = (self.x, self.dout, self.weight, self.bias, self.order, self.counts, self.sequence, self.initial)
        pointers = map(pointer, (*inputs, tensors.get("dfinal"), *map(tensors.get, names)))
        wide = (*pointers, *(stride[0] for stride in all_strides), self.total)
        narrow = [value for stride in all_strides for value in stride[1:]]
        narrow += [self.num_tokens, self.order.shape[1], self.channels, self.directions, self.chunks, 0]
        specialisation = macros(
            self.x.dtype, self.width, self.vec, silu=self.silu, sequences=self.sequence is not None, partial=partial
        )
        blocks = -(-self.total // 128)
        self.launcher.run(_FILE, name, specialisation, blocks, 128, Arguments(wide, tuple(narrow)))


def forward(x, weight, bias, seq_idx, initial_states, path, grid, silu):
    """Compute the op ``visionmamba::causal_conv1d``; see :func:`visionmamba.ops.causal_conv1d`."""
    if cuda_paired.takes(x, weight, seq_idx, initial_states, path, grid):
        return cuda_paired.forward(x, weight, bias, path, grid, silu)
    conv = _Conv(x, weight, bias, seq_idx, initial_states, path, tuple(grid), silu)
    tokens = (conv.batch, conv.num_tokens, conv.directions, conv.channels)
    out = conv.empty(*tokens, dtype=x.dtype, zero=not conv.visits.complete)
    final = conv.empty(conv.batch, conv.directions, conv.channels, conv.width - 1, dtype=x.dtype)
    conv.run("conv_forward", out=out, final_states=final)
    return out, final


def backward(dout, dfinal, x, weight, bias, seq_idx, initial_states, path, grid, silu):
    """Compute the gradients of x, weight, bias and initial_states; None for absent ones."""
    if dfinal is None and cuda_paired.takes(x, weight, seq_idx, initial_states, path, grid):
        dx, dweight, dbias = cuda_paired.backward(dout, x, weight, bias, path, grid, silu)
        return dx, dweight, None if bias is None else dbias, None
    conv = _Conv(x, weight, bias, seq_idx, initial_states, path, tuple(grid), silu, dout)
    shared = x.dim() == 3
    direct = not shared or conv.directions == 1 or conv.visits.disjoint
    middle = () if shared and direct else (conv.directions,)
    filled = conv.visits.covers if shared and direct else conv.visits.complete
    dtype = x.dtype if direct else torch.float32
    dx = conv.empty(conv.batch, conv.num_tokens, *middle, conv.channels, dtype=dtype, zero=not filled)
    dinitial = None if conv.initial is None else torch.empty_like(conv.initial)
    split = conv.directions * conv.channels
    dparams = conv.empty(conv.batch * conv.chunks, split * (conv.width + 1))
    dfinal = None if dfinal is None else dfinal.float().contiguous()
    conv.run("conv_backward", partial=not direct, dx=dx, dinitial=dinitial, dparams=dparams, dfinal=dfinal)
    if not direct:
        dx = merge_directions(conv.launcher, dx, x.dtype)
    dweight, dbias = sum_rows(conv.launcher, dparams, x.dtype, (split * conv.width, split))
    return dx, dweight.view(weight.shape), None if bias is None else dbias.view(weight.shape[:2]), dinitial


def _supports(x, weight, bias, seq_idx, initial_states, path, grid, silu) -> str | None:
    if x.dtype not in ACT:
        return f"takes float32, float16 and bfloat16, not {str(x.dtype).removeprefix('torch.')}"
    if any(stride * x.element_size() > _INT32 for stride in x.stride()[1:]):
        return "takes strides up to 2^31 bytes between tokens"
    if visits(path, tuple(grid)).repeats:
        return "takes paths whose directions visit a token at most once"
    return None


register_implementation(
    Implementation(
        "causal_conv1d",
        "cuda",
        ("cuda",),
        forward,
        backward,
        cuda_runtime.usable,
        _supports,
        (cuda_runtime.KernelError,),
    )
)
