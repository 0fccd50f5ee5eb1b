"""The single steps of decoding on NVIDIA GPUs: ``kernels/cuda/state_update.cu`` and ``conv_update.cu``."""

from __future__ import annotations

import torch
from torch import Tensor

from . import cuda_runtime
from .cuda_runtime import Arguments, pointer

__all__ = [
    "CODES",
    "conv_update",
    "conv_update_macros",
    "conv_update_supports",
    "state_update",
    "state_update_macros",
    "state_update_supports",
]

CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""The kernels' macros ACT and STATE."""


def state_update_macros(
    dtype: torch.dtype, state_dtype: torch.dtype, states: int, vec: int, softplus: bool
) -> dict[str, int]:
    """Return the macros of a specialisation of ``state_update.cu``."""
    lanes = 1
    while lanes < 32 and lanes * vec < states:
        lanes *= 2
    codes = {"ACT": CODES[dtype], "STATE": CODES[state_dtype]}
    return {**codes, "ROW_LANES": lanes, "VEC": vec, "SOFTPLUS": int(softplus)}


def conv_update_macros(dtype: torch.dtype, state_dtype: torch.dtype, width: int, silu: bool) -> dict[str, int]:
    """Return the macros of a specialisation of ``conv_update.cu``."""
    return {"ACT": CODES[dtype], "STATE": CODES[state_dtype], "WIDTH": width, "SILU": int(silu)}


def _strides(x: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if x is None else tuple(x.stride()[:count])


def _vector(states: int, rows: tuple[Tensor, ...]) -> int:
    """Return 4 where four neighbouring values of every row can be read at a time, else 1."""
    aligned = all(
        x.data_ptr() % (4 * x.element_size()) == 0 and all(stride % 4 == 0 for stride in x.stride()[:-1]) for x in rows
    )
    return 4 if states % 4 == 0 and aligned else 1


def state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices):
    """Compute the op ``visionmamba::selective_state_update`` with heads: ``state`` is (B, H, P, N)."""
    batch, heads, head_dim = x.shape
    states = state.shape[-1]
    B, C = (y if y.stride(-1) == 1 else y.contiguous() for y in (B, C))
    A, D, dt_bias = (y if y is None else y.float() for y in (A, D, dt_bias))
    slots = None if state_batch_indices is None else state_batch_indices.int()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    vec = _vector(states, (state, B, C))
    macros = state_update_macros(x.dtype, state.dtype, states, vec, dt_softplus)
    rows = batch * heads * head_dim
    wide = (
        *map(pointer, (state, x, dt, z, B, C, A, D, dt_bias, slots, out)), rows,
        *_strides(state, 3), *_strides(x, 3), *_strides(dt, 3), *_strides(z, 3), *_strides(B, 2), *_strides(C, 2),
        *_strides(A, 3), *_strides(D, 2), *_strides(dt_bias, 2),
    )  # fmt: skip
    narrow = (heads, head_dim, states, heads // B.shape[1])
    blocks = -(-rows * macros["ROW_LANES"] // 128)
    launcher = cuda_runtime.launcher(x.device)
    launcher.run("state_update.cu", "state_update", macros, blocks, 128, Arguments(wide, narrow))
    return out


def state_update_supports(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices) -> str | None:
    """Return why the kernel cannot take a call, or None."""
    if state.dtype not in CODES or x.dtype not in CODES:
        return f"takes float32, float16 and bfloat16, not {state.dtype} and {x.dtype}"
    if any(y is not None and y.dtype != x.dtype for y in (dt, B, C, z)):
        return "takes dt, B, C and z of the dtype of x"
    if state.stride(-1) != 1 and state.shape[-1] != 1:
        return "takes states whose last dimension is contiguous"
    return "takes fewer than 2^31 channels" if x.numel() >= 2**31 else None


def conv_update(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices):
    """Compute the op ``visionmamba::causal_conv1d_update``: ``x`` is (B, D, L)."""
    batch, channels, steps = x.shape
    weight, bias = (y if y is None else y.float().contiguous() for y in (weight, bias))
    seen, slots = (y if y is None else y.int() for y in (cache_seqlens, conv_state_indices))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    macros = conv_update_macros(x.dtype, conv_state.dtype, weight.shape[1], silu)
    rows = batch * channels
    wide = (*map(pointer, (x, conv_state, weight, bias, seen, slots, out)), rows, *x.stride(), *conv_state.stride())
    narrow = (channels, steps, conv_state.shape[2], 0)
    launcher = cuda_runtime.launcher(x.device)
    launcher.run("conv_update.cu", "conv_update", macros, -(-rows // 128), 128, Arguments(wide, narrow))
    return out


def conv_update_supports(x, conv_state, *_arguments) -> str | None:
    """Return why the kernel cannot take a call, or None."""
    if x.dtype not in CODES or conv_state.dtype not in CODES:
        return f"takes float32, float16 and bfloat16, not {x.dtype} and {conv_state.dtype}"
    return None
