"""The dispatcher op ``visionmamba::selective_scan``: schema, checks, fake kernel, autograd, FLOPs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .._autocast import autocast_activations
from .._checks import check_dtype, check_same_device, check_shape
from .._operator import differentiable, fake_gradients, gradients_as_results, operator, present_gradients, register_fake
from .._tracing import traceable_overload
from ..backend import select
from ..scan_path import scan_path
from . import flops

__all__ = ["selective_scan"]

_SCHEMA_ARGUMENTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "Tensor? dt_weight, Tensor? initial_state, str path, SymInt[] grid, bool delta_softplus, bool merge, "
    "bool projections_in_step_order"
)
_TENSOR_ARGUMENTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "dt_weight", "initial_state")


def _check(u, delta, A, B, C, D, z, delta_bias, dt_weight, initial_state, path, grid, merge):
    """Raise ValueError or TypeError, naming the argument, unless the arguments fit together."""
    if u.dim() not in (3, 4):
        raise ValueError(f"u: expected (B, L, D) or (B, L, K, D), got shape {tuple(u.shape)}")
    if A.dim() != 3:
        raise ValueError(f"A: expected (K, D, N), got shape {tuple(A.shape)}")
    batch, num_tokens = u.shape[:2]
    directions, channels, states = A.shape
    if u.dim() == 4:
        check_shape("u", u, (batch, num_tokens, directions, channels))
    else:
        check_shape("u", u, (batch, num_tokens, channels))
    rank = channels
    if dt_weight is not None:
        if dt_weight.dim() != 3:
            raise ValueError(f"dt_weight: expected (K, D, R), got shape {tuple(dt_weight.shape)}")
        rank = dt_weight.shape[2]
        check_shape("dt_weight", dt_weight, (directions, channels, rank))
    check_shape("delta", delta, (batch, num_tokens, directions, rank))
    check_shape("B", B, (batch, num_tokens, directions, states))
    check_shape("C", C, (batch, num_tokens, directions, states))
    for name, tensor in (("D", D), ("delta_bias", delta_bias)):
        if tensor is not None:
            check_shape(name, tensor, (directions, channels))
    if z is not None:
        shared = merge or z.dim() == 3
        check_shape("z", z, (batch, num_tokens, channels) if shared else (batch, num_tokens, directions, channels))
    if initial_state is not None:
        check_shape("initial_state", initial_state, (batch, directions, channels, states))
    check_dtype("u", u)
    for name, tensor in (("delta", delta), ("B", B), ("C", C), ("z", z)):
        if tensor is not None:
            check_dtype(name, tensor, (u.dtype,))
    parameters = (("A", A), ("D", D), ("delta_bias", delta_bias), ("dt_weight", dt_weight))
    for name, tensor in (*parameters, ("initial_state", initial_state)):
        if tensor is not None:
            check_dtype(name, tensor)
    check_same_device(
        u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, dt_weight=dt_weight,
        initial_state=initial_state,
    )  # fmt: skip


def _check_path(u, A, path, grid, projections_in_step_order):
    table = scan_path(path, tuple(grid))
    if table.num_directions != A.shape[0]:
        raise ValueError(f"path: {path!r} has {table.num_directions} directions, but A has {A.shape[0]}")
    if table.num_tokens != u.shape[1]:
        raise ValueError(
            f"grid: path {path!r} over {tuple(grid)} needs {table.num_tokens} tokens in memory, but u has {u.shape[1]}"
        )
    if projections_in_step_order and table.num_steps > u.shape[1]:
        raise ValueError(f"projections_in_step_order: {table.num_steps} steps but {u.shape[1]} rows of delta, B and C")


@operator("selective_scan", f"({_SCHEMA_ARGUMENTS}) -> (Tensor, Tensor)", planned=True)
def _selective_scan(
    u, delta, A, B, C, D, z, delta_bias, dt_weight, initial_state, path, grid, delta_softplus, merge,
    projections_in_step_order,
):  # fmt: skip
    _check(u, delta, A, B, C, D, z, delta_bias, dt_weight, initial_state, path, grid, merge)
    _check_path(u, A, path, grid, projections_in_step_order)
    arguments = (
        u, delta, A, B, C, D, z, delta_bias, dt_weight, initial_state, path, tuple(grid), delta_softplus, merge,
        projections_in_step_order,
    )  # fmt: skip
    return select("selective_scan", u.device.type, *arguments).forward(*arguments)


@register_fake("selective_scan")
def _(
    u, delta, A, B, C, D, z, delta_bias, dt_weight, initial_state, path, grid, delta_softplus, merge,
    projections_in_step_order,
):  # fmt: skip
    _check(u, delta, A, B, C, D, z, delta_bias, dt_weight, initial_state, path, grid, merge)
    batch, num_tokens = u.shape[:2]
    directions, channels, states = A.shape
    shape = (batch, num_tokens, channels) if merge else (batch, num_tokens, directions, channels)
    dtype = torch.promote_types(u.dtype, torch.float32)
    return u.new_empty(shape), u.new_empty((batch, directions, channels, states), dtype=dtype)


@operator(
    "selective_scan_backward",
    f"(Tensor dy, Tensor? dlast_state, {_SCHEMA_ARGUMENTS}) -> ({', '.join(['Tensor'] * 10)})",
    planned=True,
)
def _selective_scan_backward(dy, dlast_state, *arguments):
    u, grid_index = arguments[0], 11
    arguments = (*arguments[:grid_index], tuple(arguments[grid_index]), *arguments[grid_index + 1 :])
    implementation = select("selective_scan", u.device.type, *arguments)
    gradients = implementation.backward(dy, dlast_state, *arguments)
    return gradients_as_results(gradients, arguments[: len(_TENSOR_ARGUMENTS)])


@register_fake("selective_scan_backward")
def _(dy, dlast_state, *arguments):
    return fake_gradients(arguments[: len(_TENSOR_ARGUMENTS)])


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[: len(_TENSOR_ARGUMENTS)])
    ctx.options = inputs[len(_TENSOR_ARGUMENTS) :]


def _backward(ctx, dy, dlast_state):
    tensors = ctx.saved_tensors
    if dy is None:
        merge = ctx.options[3]
        u, directions = tensors[0], tensors[2].shape[0]
        shape = u.shape if (u.dim() == 3) == merge else (*u.shape[:2], *([] if merge else [directions]), u.shape[-1])
        dy = u.new_zeros(shape)
    gradients = torch.ops.visionmamba.selective_scan_backward(dy, dlast_state, *tensors, *ctx.options)
    return (*present_gradients(gradients, tensors), *[None] * len(ctx.options))


differentiable("selective_scan", _backward, _setup_context)


autocast_activations("selective_scan", [_TENSOR_ARGUMENTS.index(name) for name in ("u", "delta", "B", "C", "z")])
_traced = traceable_overload("selective_scan", _SCHEMA_ARGUMENTS)


@register_flop_formula(torch.ops.visionmamba.selective_scan)
def _flops(u, delta, A, *args, out_shape=None, **_kwargs) -> int:
    """Count for torch's FlopCounterMode: the scan by the field's convention, the dt projection as 2 ops a MAC."""
    steps = flops.steps_of(*args[7:9])  # path and grid
    return flops.scan_flops(u, A, steps) + 2 * flops.dt_projection_macs(u, delta, A, steps)


@register_flop_formula(torch.ops.visionmamba.selective_scan_backward)
def _flops_backward(dy_shape, dlast_shape, *args, out_shape=None, **_kwargs) -> int:
    return 2 * _flops(*args)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    dt_weight: Tensor | None = None,
    initial_state: Tensor | None = None,
    path: str = "h",
    grid: list[int] | None = None,
    delta_softplus: bool = True,
    merge: bool = True,
    projections_in_step_order: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scan channels-last tokens along the K directions of a path, and merge the directions.

    Tokens are in raster order; only the order of the walk differs between directions. Activations (``u``, ``delta``,
    ``B``, ``C``, ``z``) share one dtype, float32, float16, bfloat16 or float64, and may be views whose last dimension
    is contiguous; everything else is used in float32 (float64 for float64 activations).

    Args:
        u: Input, ``(B, L, D)`` read by all directions, or one input for each, ``(B, L, K, D)``.
        delta: Step sizes before bias and softplus, ``(B, L, K, D)``; or low-rank, ``(B, L, K, R)``, with ``dt_weight``.
        A: Diagonal of the state matrix (negative), ``(K, D, N)``.
        B: Input projection, ``(B, L, K, N)``.
        C: Output projection, ``(B, L, K, N)``.
        D: Skip weight, ``(K, D)``.
        z: Gate, ``(B, L, D)``; the output is multiplied by silu(z) after the merge. Without ``merge`` also
            ``(B, L, K, D)``.
        delta_bias: Added to ``delta``, ``(K, D)``.
        dt_weight: Expands a low-rank ``delta`` to the channels, ``(K, D, R)``.
        initial_state: State before the first step, ``(B, K, D, N)``.
        path: Scan path, see :mod:`visionmamba.ops.scan_path`.
        grid: Size of the token grid, slowest axis first; ``(L,)`` if absent.
        delta_softplus: Apply softplus to ``delta + delta_bias``.
        merge: Sum the outputs of the directions (in float32).
        projections_in_step_order: Step t reads row t of ``delta``, ``B`` and ``C``, while ``u``, ``z`` and the output
            still follow the path. PlainMamba's published weights need it.

    Returns:
        The output, ``(B, L, D)`` with ``merge`` else ``(B, L, K, D)``, in the dtype of ``u``; and the state after the
        last step, ``(B, K, D, N)``, in float32 (float64).

    Raises:
        ValueError: A shape does not fit, or the path does not fit the tokens.
        TypeError: A dtype does not fit.

    Source:
        Gu & Dao 2023, "Mamba", equation 2 and algorithm 2; the order of the tokens is the vision families' own.
    """
    if grid is None:
        grid = [u.shape[1]]
    if not torch.jit.is_scripting() and torch.jit.is_tracing():
        return _traced(
            u, delta, A, B, C, D, z, delta_bias, dt_weight, initial_state, path, [int(size) for size in grid],
            delta_softplus, merge, projections_in_step_order,
        )  # fmt: skip
    return torch.ops.visionmamba.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, dt_weight, initial_state, path, grid, delta_softplus, merge,
        projections_in_step_order,
    )  # fmt: skip
