"""The dispatcher op ``visionmamba::ssd``: schema, checks, fake kernel, autograd, FLOPs."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .._checks import check_dtype, check_same_device, check_shape
from .._operator import differentiable, fake_gradients, gradients_as_results, operator, present_gradients, register_fake
from .._tracing import traceable_overload
from ..backend import select
from ..scan_path import scan_path

__all__ = ["ssd_scan"]

_SCHEMA_ARGUMENTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor? initial_states, Tensor? seq_idx, str path, SymInt[] grid, bool dt_softplus, float dt_min, float dt_max, "
    "bool merge, int chunk_size"
)
_DIFFERENTIABLE = 9
"""x, dt, A, B, C, D, z, dt_bias and initial_states have gradients; ``seq_idx`` and the options follow them."""


def _check(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, merge):
    """Raise ValueError or TypeError, naming the argument, unless the arguments fit together."""
    if x.dim() not in (4, 5):
        raise ValueError(f"x: expected (B, L, H, P) or (B, L, K, H, P), got shape {tuple(x.shape)}")
    if A.dim() != 2:
        raise ValueError(f"A: expected (K, H), got shape {tuple(A.shape)}")
    if B.dim() != 5:
        raise ValueError(f"B: expected (B, L, K, G, N), got shape {tuple(B.shape)}")
    batch, num_tokens, head_dim = x.shape[0], x.shape[1], x.shape[-1]
    directions, heads = A.shape
    groups, states = B.shape[3:]
    one = (batch, num_tokens, heads, head_dim)
    each = (batch, num_tokens, directions, heads, head_dim)
    check_shape("x", x, one if x.dim() == 4 else each)
    check_shape("dt", dt, (batch, num_tokens, directions, heads))
    for name, tensor in (("B", B), ("C", C)):
        check_shape(name, tensor, (batch, num_tokens, directions, groups, states))
    if groups < 1 or heads % groups:
        raise ValueError(f"B: expected a number of groups that divides the {heads} heads, got {groups}")
    if D is not None:
        check_shape("D", D, (directions, heads, *([head_dim] if D.dim() == 3 else [])))
    if z is not None:
        check_shape("z", z, one if merge or z.dim() == 4 else each)
    if dt_bias is not None:
        check_shape("dt_bias", dt_bias, (directions, heads))
    if initial_states is not None:
        check_shape("initial_states", initial_states, (batch, directions, heads, head_dim, states))
    if seq_idx is not None:
        check_shape("seq_idx", seq_idx, (batch, num_tokens))
        check_dtype("seq_idx", seq_idx, (torch.int32, torch.int64))
    for name, tensor in {"x": x, "dt": dt, "B": B, "C": C, "z": z}.items():
        if tensor is not None:
            check_dtype(name, tensor)
    check_same_device(
        x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, initial_states=initial_states, seq_idx=seq_idx
    )


def _check_path(x, A, path, grid, chunk_size):
    table = scan_path(path, tuple(grid))
    if table.num_directions != A.shape[0]:
        raise ValueError(f"path: {path!r} has {table.num_directions} directions, but A has {A.shape[0]}")
    if table.num_tokens != x.shape[1]:
        raise ValueError(
            f"grid: path {path!r} over {tuple(grid)} needs {table.num_tokens} tokens in memory, but x has {x.shape[1]}"
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected a positive number, got {chunk_size}")


@operator("ssd", f"({_SCHEMA_ARGUMENTS}) -> (Tensor, Tensor)")
def _ssd(
    x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, path, grid, dt_softplus, dt_min, dt_max, merge, chunk_size
):
    _check(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, merge)
    _check_path(x, A, path, grid, chunk_size)
    arguments = (
        x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, path, tuple(grid), dt_softplus, dt_min, dt_max, merge,
        chunk_size,
    )  # fmt: skip
    return select("ssd", x.device.type, *arguments).forward(*arguments)


@register_fake("ssd")
def _(
    x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, path, grid, dt_softplus, dt_min, dt_max, merge, chunk_size
):
    _check(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, merge)
    batch, num_tokens, head_dim = x.shape[0], x.shape[1], x.shape[-1]
    directions, heads = A.shape
    middle = () if merge else (directions,)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty((batch, num_tokens, *middle, heads, head_dim)),
        x.new_empty((batch, directions, heads, head_dim, B.shape[-1]), dtype=dtype),
    )


@operator(
    "ssd_backward",
    f"(Tensor dy, Tensor? dfinal_states, {_SCHEMA_ARGUMENTS}) -> ({', '.join(['Tensor'] * _DIFFERENTIABLE)})",
)
def _ssd_backward(dy, dfinal_states, *arguments):
    x, grid_index = arguments[0], 11
    arguments = (*arguments[:grid_index], tuple(arguments[grid_index]), *arguments[grid_index + 1 :])
    gradients = select("ssd", x.device.type, *arguments).backward(dy, dfinal_states, *arguments)
    return gradients_as_results(gradients, arguments[:_DIFFERENTIABLE])


@register_fake("ssd_backward")
def _(dy, dfinal_states, *arguments):
    return fake_gradients(arguments[:_DIFFERENTIABLE])


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[: _DIFFERENTIABLE + 1])
    ctx.options = inputs[_DIFFERENTIABLE + 1 :]


def _backward(ctx, dy, dfinal_states):
    tensors = ctx.saved_tensors
    if dy is None:
        x, directions, merge = tensors[0], tensors[2].shape[0], ctx.options[5]
        dy = x.new_zeros((*x.shape[:2], *([] if merge else [directions]), *x.shape[-2:]))
    gradients = torch.ops.visionmamba.ssd_backward(dy, dfinal_states, *tensors, *ctx.options)
    return (*present_gradients(gradients, tensors[:_DIFFERENTIABLE]), None, *[None] * len(ctx.options))


differentiable("ssd", _backward, _setup_context)


_traced = traceable_overload("ssd", _SCHEMA_ARGUMENTS)


def _recurrence_flops(x_shape, A_shape, B_shape) -> int:
    """Count the recurrence as written: 5 a state (decay, drive, add; times C, add), 3 a channel, 2 a head and step.

    A chunked form does more arithmetic than this, on matrix units; how much is the backend's business.
    """
    tokens, head_dim, states = prod(x_shape[:2]), x_shape[-1], B_shape[-1]
    return tokens * prod(A_shape) * (5 * head_dim * states + 3 * head_dim + 2)


@register_flop_formula(torch.ops.visionmamba.ssd)
def _flops(x_shape, dt_shape, A_shape, B_shape, *_args, out_shape=None, **_kwargs) -> int:
    return _recurrence_flops(x_shape, A_shape, B_shape)


@register_flop_formula(torch.ops.visionmamba.ssd_backward)
def _flops_backward(
    dy_shape, dfinal_shape, x_shape, dt_shape, A_shape, B_shape, *_args, out_shape=None, **_kwargs
) -> int:
    return 2 * _recurrence_flops(x_shape, A_shape, B_shape)


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    path: str = "h",
    grid: list[int] | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    merge: bool = True,
    chunk_size: int = 256,
) -> tuple[Tensor, Tensor]:
    """Run SSD (the scan of Mamba-2) along the K directions of a path, and merge the directions.

    Tokens are in raster order; only the order of the walk differs between directions. Step sizes, decays, states and
    merges are float32 (float64 for float64 activations).

    Args:
        x: Input, ``(B, L, H, P)`` read by all directions, or one input for each, ``(B, L, K, H, P)``.
        dt: Step sizes before bias and softplus, ``(B, L, K, H)``.
        A: State matrix, one negative number a head, ``(K, H)``.
        B: Input projection, ``(B, L, K, G, N)``; group g serves heads ``g H / G`` up to ``(g + 1) H / G``.
        C: Output projection, ``(B, L, K, G, N)``.
        D: Skip weight, ``(K, H)`` or ``(K, H, P)``.
        z: Gate, ``(B, L, H, P)``; the output is multiplied by silu(z) after the merge. Without ``merge`` also
            ``(B, L, K, H, P)``.
        dt_bias: Added to ``dt``, ``(K, H)``.
        initial_states: State before the first step, ``(B, K, H, P, N)``.
        seq_idx: Packed sequences: the sequence each token belongs to, ``(B, L)``, integer, from 0. The state is reset
            where it changes from one step to the next; ``initial_states`` belong to sequence 0.
        path: Scan path, see :mod:`visionmamba.ops.scan_path`.
        grid: Size of the token grid, slowest axis first; ``(L,)`` if absent.
        dt_softplus: Apply softplus to ``dt + dt_bias``.
        dt_limit: The step sizes are clamped to this range afterwards, with or without softplus.
        merge: Sum the outputs of the directions (in float32).
        chunk_size: Most steps that plain PyTorch computes as one matrix product; kernels choose for themselves. The
            result does not depend on it.

    Returns:
        The output, ``(B, L, H, P)`` with ``merge`` else ``(B, L, K, H, P)``, in the dtype of ``x``; and the state
        after the last step, ``(B, K, H, P, N)``, in float32 (float64).

    Raises:
        ValueError: A shape does not fit, or the path does not fit the tokens.
        TypeError: A dtype does not fit.

    Source:
        Dao & Gu 2024, "Transformers are SSMs", equation 6 and section 6; clamping as in mamba_ssm.
    """
    if grid is None:
        grid = [x.shape[1]]
    options = (dt_softplus, float(dt_limit[0]), float(dt_limit[1]), merge, chunk_size)
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx)
    if not torch.jit.is_scripting() and torch.jit.is_tracing():
        return _traced(*tensors, path, [int(size) for size in grid], *options)
    return torch.ops.visionmamba.ssd(*tensors, path, grid, *options)
