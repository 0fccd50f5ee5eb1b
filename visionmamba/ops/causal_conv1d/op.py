"""The dispatcher op ``visionmamba::causal_conv1d``: schema, checks, fake kernel, autograd, FLOPs."""

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

__all__ = ["causal_conv1d"]

_SCHEMA_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? initial_states, str path, SymInt[] grid, bool silu"
)


def _check(x, weight, bias, seq_idx, initial_states):
    """Raise ValueError or TypeError, naming the argument, unless the arguments fit together."""
    if weight.dim() != 3 or not 2 <= weight.shape[2] <= 4:
        raise ValueError(f"weight: expected (K, D, W) with W from 2 to 4, got shape {tuple(weight.shape)}")
    if x.dim() not in (3, 4):
        raise ValueError(f"x: expected (B, L, D) or (B, L, K, D), got shape {tuple(x.shape)}")
    directions, channels, width = weight.shape
    batch, num_tokens = x.shape[:2]
    middle = (directions,) if x.dim() == 4 else ()
    check_shape("x", x, (batch, num_tokens, *middle, channels))
    if bias is not None:
        check_shape("bias", bias, (directions, channels))
    if seq_idx is not None:
        check_shape("seq_idx", seq_idx, (batch, num_tokens))
        check_dtype("seq_idx", seq_idx, (torch.int32, torch.int64))
    if initial_states is not None:
        check_shape("initial_states", initial_states, (batch, directions, channels, width - 1))
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("initial_states", initial_states)):
        if tensor is not None:
            check_dtype(name, tensor)
    check_same_device(x=x, weight=weight, bias=bias, seq_idx=seq_idx, initial_states=initial_states)


@operator("causal_conv1d", f"({_SCHEMA_ARGUMENTS}) -> (Tensor, Tensor)", planned=True)
def _causal_conv1d(x, weight, bias, seq_idx, initial_states, path, grid, silu):
    _check(x, weight, bias, seq_idx, initial_states)
    table = scan_path(path, tuple(grid))
    if table.num_directions != weight.shape[0]:
        raise ValueError(f"path: {path!r} has {table.num_directions} directions, but weight has {weight.shape[0]}")
    if table.num_tokens != x.shape[1]:
        raise ValueError(
            f"grid: path {path!r} over {tuple(grid)} needs {table.num_tokens} tokens in memory, but x has {x.shape[1]}"
        )
    arguments = (x, weight, bias, seq_idx, initial_states, path, tuple(grid), silu)
    return select("causal_conv1d", x.device.type, *arguments).forward(*arguments)


@register_fake("causal_conv1d")
def _(x, weight, bias, seq_idx, initial_states, path, grid, silu):
    _check(x, weight, bias, seq_idx, initial_states)
    directions, channels, width = weight.shape
    batch, num_tokens = x.shape[:2]
    return (
        x.new_empty((batch, num_tokens, directions, channels)),
        x.new_empty((batch, directions, channels, width - 1)),
    )


@operator(
    "causal_conv1d_backward",
    f"(Tensor dout, Tensor? dfinal_states, {_SCHEMA_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    planned=True,
)
def _causal_conv1d_backward(dout, dfinal_states, x, weight, bias, seq_idx, initial_states, path, grid, silu):
    arguments = (x, weight, bias, seq_idx, initial_states, path, tuple(grid), silu)
    gradients = select("causal_conv1d", x.device.type, *arguments).backward(dout, dfinal_states, *arguments)
    return gradients_as_results(gradients, (x, weight, bias, initial_states))


@register_fake("causal_conv1d_backward")
def _(dout, dfinal_states, x, weight, bias, seq_idx, initial_states, path, grid, silu):
    return fake_gradients((x, weight, bias, initial_states))


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _backward(ctx, dout, dfinal_states):
    x, weight, bias, seq_idx, initial_states = ctx.saved_tensors
    if dout is None:
        dout = x.new_zeros((*x.shape[:2], *weight.shape[:2]))
    gradients = torch.ops.visionmamba.causal_conv1d_backward(
        dout, dfinal_states, x, weight, bias, seq_idx, initial_states, *ctx.options
    )
    dx, dweight, dbias, dinitial = present_gradients(gradients, (x, weight, bias, initial_states))
    return dx, dweight, dbias, None, dinitial, *[None] * len(ctx.options)


differentiable("causal_conv1d", _backward, _setup_context)


_traced = traceable_overload("causal_conv1d", _SCHEMA_ARGUMENTS)


@register_flop_formula(torch.ops.visionmamba.causal_conv1d)
def _flops(x_shape, weight_shape, *_args, out_shape=None, **_kwargs) -> int:
    return 2 * prod(x_shape[:2]) * prod(weight_shape)


@register_flop_formula(torch.ops.visionmamba.causal_conv1d_backward)
def _flops_backward(dout_shape, dfinal_shape, x_shape, weight_shape, *_args, out_shape=None, **_kwargs) -> int:
    return 4 * prod(x_shape[:2]) * prod(weight_shape)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    path: str = "h",
    grid: list[int] | None = None,
    silu: bool = True,
) -> tuple[Tensor, Tensor]:
    """Convolve channels-last tokens, depthwise and causally, along each direction of a path.

    Args:
        x: Input, ``(B, L, D)`` read by all directions, or one input for each, ``(B, L, K, D)``; may be a view whose
            last dimension is contiguous.
        weight: Filters, ``(K, D, W)`` with W from 2 to 4; the last tap weighs the current step.
        bias: ``(K, D)``.
        seq_idx: Sequence each token belongs to, ``(B, L)`` int32 or int64; taps in another sequence read 0.
        initial_states: The W - 1 values before the first step, oldest first, ``(B, K, D, W - 1)``; zero if absent.
        path: Scan path, see :mod:`visionmamba.ops.scan_path`.
        grid: Size of the token grid, slowest axis first; ``(L,)`` if absent.
        silu: Apply SiLU to the output.

    Returns:
        The output in raster order, ``(B, L, K, D)``, zero at tokens that a direction does not visit; and the last
        W - 1 inputs of each direction, ``(B, K, D, W - 1)``. Both in the dtype of ``x``.

    Raises:
        ValueError: A shape does not fit, or the path does not fit the tokens.
        TypeError: A dtype does not fit.

    Source:
        Gu & Dao 2023, "Mamba", section 3.4 (the short convolution before the SSM).
    """
    if grid is None:
        grid = [x.shape[1]]
    if not torch.jit.is_scripting() and torch.jit.is_tracing():
        return _traced(x, weight, bias, seq_idx, initial_states, path, [int(size) for size in grid], silu)
    return torch.ops.visionmamba.causal_conv1d(x, weight, bias, seq_idx, initial_states, path, grid, silu)
