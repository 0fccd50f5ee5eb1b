"""Norms of rows on NVIDIA GPUs: ``kernels/cuda/norm.cu``."""

from __future__ import annotations

import struct
from functools import lru_cache

import torch
from torch import Tensor

from . import cuda_runtime
from .backend import Implementation, register_implementation
from .cuda_runtime import Arguments, pointer
from .selective_scan.cuda_call import ACT, sum_rows

__all__ = ["backward", "forward", "macros", "row_layout"]

_FILE = "norm.cu"
_THREADS = 256
_MAX_ITERATIONS = 8
_BLOCKS = {"norm_forward": 8, "norm_backward": 3}  # a multiprocessor


def _vector(channels: int) -> int:
    return 4 if channels % 4 == 0 else 2 if channels % 2 == 0 else 1


def has_kernel(channels: int) -> bool:
    """Whether the kernels take rows of so many channels; others are computed in plain PyTorch, in several passes."""
    return channels <= _MAX_ITERATIONS * 32 * _vector(channels)


@lru_cache(maxsize=1024)
def row_layout(channels: int) -> tuple[int, int, int]:
    """Choose how threads share a row.

    Args:
        channels: C, of which there is a kernel.

    Returns:
        Threads a row, values of a thread at a time, and how many times. As few values as can be lie past the row's end,
        and each thread has several loads under way.
    """
    vec = _vector(channels)
    layouts = [(lanes, vec, -(-channels // (lanes * vec))) for lanes in (32, 16, 8, 4)]
    layouts = [layout for layout in layouts if layout[2] <= _MAX_ITERATIONS]
    return min(layouts, key=lambda layout: (layout[0] * layout[1] * layout[2], abs(layout[2] - 3)))


@lru_cache(maxsize=1024)
def macros(
    channels: int, x: torch.dtype, added: torch.dtype | None, out: torch.dtype, *, rms: bool, shift: bool = False
) -> dict[str, int]:
    """Return the macros of a specialisation of the kernel file."""
    lanes, vec, iterations = row_layout(channels)
    dtypes = {"X_FLOAT": x, "ADDED_FLOAT": added or torch.float32, "OUT_FLOAT": out}
    narrow = [dtype for dtype in dtypes.values() if dtype != torch.float32]
    return {
        "ACT": ACT[narrow[0] if narrow else torch.float32],
        **{name: int(dtype == torch.float32) for name, dtype in dtypes.items()},
        "ROW_LANES": lanes,
        "VEC": vec,
        "ITERS": iterations,
        "ADD": int(added is not None),
        "SHIFT": int(shift),
        "RMS": int(rms),
    }


def _bits(value: float) -> int:
    return struct.unpack("i", struct.pack("f", value))[0]


def _run(
    name: str, specialisation: dict[str, int], x: Tensor, eps: float, scale: float, bias: Tensor | None, **tensors
) -> Tensor | None:
    """Launch a kernel and return its partial sums; ``tensors`` are the other pointers of ``NormArgs``."""
    launcher = cuda_runtime.launcher(x.device)
    channels = x.shape[-1]
    rows = x.numel() // channels
    blocks = min(-(-rows // (_THREADS // specialisation["ROW_LANES"])), _BLOCKS[name] * launcher.multiprocessors)
    partial = None
    if name == "norm_backward":
        sums = (1 if specialisation["RMS"] else 2) + specialisation["SHIFT"]
        partial = torch.empty((blocks, sums * channels), device=x.device)
    names = ("out", "total", "dout", "dtotal", "dx", "dadded")
    inputs = (x, tensors.get("added"), tensors["weight"], bias, tensors.get("shift"))
    wide = (*map(pointer, (*inputs, *map(tensors.get, names), partial)), rows, blocks)
    narrow = (channels, _bits(eps), _bits(scale), int(bias is not None))
    launcher.run(_FILE, name, specialisation, blocks, _THREADS, Arguments(wide, narrow))
    return partial


def _aligned_rows(x: Tensor | None) -> Tensor | None:
    """Return rows that follow one another and can be read 16 bytes at a time: a copy where ``x`` begins in between."""
    if x is None:
        return None
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _parameters(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else _aligned_rows(tensor.float()) for tensor in tensors]


def forward(x, added, weight, bias, shift, eps, rms, scale, dtype):
    """Compute the op ``visionmamba::channel_norm``."""
    x, added = _aligned_rows(x), _aligned_rows(added)
    weight, bias, shift = _parameters(weight, bias, shift)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    total = None if added is None else torch.empty_like(x)
    added_dtype, shifted = None if added is None else added.dtype, shift is not None
    specialisation = macros(x.shape[-1], x.dtype, added_dtype, dtype, rms=rms, shift=shifted)
    tensors = dict(added=added, weight=weight, shift=shift, out=out, total=total)
    _run("norm_forward", specialisation, x, eps, scale, bias, **tensors)
    return out, total


def backward(dout, dtotal, total, weight, bias, shift, eps, rms, scale, added_dtype):
    """Compute the gradients of x, added, weight, bias and shift; None for absent ones."""
    dout, total, dtotal = map(_aligned_rows, (dout, total, dtotal))
    wide_weight, wide_shift = _parameters(weight, shift)
    dx = torch.empty_like(total)
    dadded = None if added_dtype is None else torch.empty(total.shape, dtype=added_dtype, device=total.device)
    shifted = shift is not None
    specialisation = macros(total.shape[-1], total.dtype, added_dtype, dout.dtype, rms=rms, shift=shifted)
    partial = _run(
        "norm_backward", specialisation, total, eps, scale, None, weight=wide_weight, shift=wide_shift, dout=dout,
        dtotal=dtotal, dx=dx, dadded=dadded,
    )  # fmt: skip
    channels = total.shape[-1]
    launcher = cuda_runtime.launcher(total.device)
    dweight, *others = sum_rows(launcher, partial, torch.float32, [channels] * (partial.shape[1] // channels))
    dshift = others.pop() if shifted else None
    if bias is not None and rms:
        others = [dout.flatten(0, -2).sum(0, dtype=torch.float32)]
    return dx, dadded, dweight, None if bias is None else others[0], dshift


def _supports(x, *others) -> str | None:
    dtypes = {t.dtype for t in (x, *others[:1]) if isinstance(t, Tensor)}
    dtypes |= {value for value in others if isinstance(value, torch.dtype)}
    if not dtypes <= set(ACT):
        return f"takes float32, float16 and bfloat16, not {', '.join(str(d).removeprefix('torch.') for d in dtypes)}"
    if len(dtypes - {torch.float32}) > 1:
        return "takes one 16-bit dtype at a time"
    return None if has_kernel(x.shape[-1]) else "takes fewer channels"


register_implementation(
    Implementation(
        "channel_norm", "cuda", ("cuda",), forward, backward, cuda_runtime.usable, _supports,
        (cuda_runtime.KernelError,),
    )
)  # fmt: skip
