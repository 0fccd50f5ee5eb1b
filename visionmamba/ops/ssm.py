"""Convolution, projections and scan of a selective state space model as one operator that keeps little for backward.

``visionmamba::ssm`` calls the operators that it is made of. Its backward pass computes the input projection, the
convolution and SiLU anew, which saves K + 2 activations of the layer's width, and adds the gradient of the projections
to the scan's inside their product.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from ._autocast import autocast_activations
from ._block_products import block_diagonal, diagonal_blocks, weight_gradient
from ._operator import differentiable, fake_gradients, operator, present_gradients, register_fake
from .causal_conv1d import causal_conv1d
from .selective_scan import selective_scan

__all__ = ["selective_ssm"]

_SCHEMA = (
    "Tensor x, Tensor? z, Tensor? in_proj_weight, Tensor? conv_weight, Tensor? conv_bias, Tensor x_proj_weight, "
    "Tensor A, Tensor? D, Tensor dt_bias, Tensor dt_weight, str path, SymInt[] grid, bool merge, bool silu"
)
_TENSORS = 10


def _projection(weight: Tensor, u: Tensor) -> Tensor:
    """Return the weight ``(K, C, D)`` as a matrix for the tokens' rows of ``(B, L, D)`` or ``(B, L, K, D)``."""
    return weight.to(u.dtype).flatten(0, 1) if u.dim() == 3 else block_diagonal(weight, dtype=u.dtype)


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, 1).flatten(1)


def _enter(x: Tensor, z: Tensor | None, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the layer's input and its gate, from their own projection if there is one."""
    return (x, z) if weight is None else F.linear(x, weight.to(x.dtype)).chunk(2, dim=-1)


def _scan_input(x, conv_weight, conv_bias, path, grid, silu):
    if conv_weight is None:
        return F.silu(x) if silu else x
    return causal_conv1d(x, conv_weight, conv_bias, path=path, grid=grid, silu=silu)[0]


def _split(projected: Tensor, A: Tensor, dt_weight: Tensor) -> tuple[Tensor, ...]:
    return projected.split([dt_weight.shape[2], A.shape[2], A.shape[2]], dim=-1)


@operator("ssm", f"({_SCHEMA}) -> (Tensor, Tensor)", planned=True)
def _ssm(
    x, z, in_proj_weight, conv_weight, conv_bias, x_proj_weight, A, D, dt_bias, dt_weight, path, grid, merge, silu
):  # fmt: skip
    x, z = _enter(x, z, in_proj_weight)
    u = _scan_input(x, conv_weight, conv_bias, path, grid, silu)
    projected = _rows(u) @ _projection(x_proj_weight, u).t()
    projected = projected.view(*x.shape[:2], *x_proj_weight.shape[:2])
    dt, B, C = _split(projected, A, dt_weight)
    y, _ = selective_scan(u, dt, A, B, C, D, z, dt_bias, dt_weight, path=path, grid=grid, merge=merge)
    return y, projected


@register_fake("ssm")
def _(
    x, z, in_proj_weight, conv_weight, conv_bias, x_proj_weight, A, D, dt_bias, dt_weight, path, grid, merge, silu
):  # fmt: skip
    directions, width, channels = x_proj_weight.shape
    middle = () if merge else (directions,)
    return x.new_empty((*x.shape[:2], *middle, channels)), x.new_empty((*x.shape[:2], directions, width))


@operator(
    "ssm_backward", f"(Tensor dy, Tensor projected, {_SCHEMA}) -> ({', '.join(['Tensor'] * _TENSORS)})", planned=True
)
def _ssm_backward(
    dy, projected, x, z, in_proj_weight, conv_weight, conv_bias, x_proj_weight, A, D, dt_bias, dt_weight, path, grid,
    merge, silu,
):  # fmt: skip
    tokens = x
    x, z = _enter(x, z, in_proj_weight)
    u = _scan_input(x, conv_weight, conv_bias, path, grid, silu)
    dt, B, C = _split(projected, A, dt_weight)
    du, ddt, dA, dB, dC, dD, dz, ddt_bias, ddt_weight, _ = torch.ops.visionmamba.selective_scan_backward(
        dy, None, u, dt, A, B, C, D, z, dt_bias, dt_weight, None, path, grid, True, merge, False
    )
    dprojected = _rows(torch.cat([ddt, dB, dC], dim=-1))
    _rows(du).addmm_(dprojected, _projection(x_proj_weight, u))
    dx_proj = weight_gradient(dprojected, _rows(u))
    dx_proj = dx_proj.view(x_proj_weight.shape) if u.dim() == 3 else diagonal_blocks(dx_proj, *x_proj_weight.shape)
    dconv_weight, dconv_bias = x.new_empty(0), x.new_empty(0)
    if conv_weight is not None:
        du, dconv_weight, dconv_bias, _ = torch.ops.visionmamba.causal_conv1d_backward(
            du, None, x, conv_weight, conv_bias, None, None, path, grid, silu
        )
    elif silu:
        du = torch.ops.aten.silu_backward(du, x)
    dx_proj = dx_proj.to(x_proj_weight.dtype).contiguous()
    din_proj = x.new_empty(0)
    if in_proj_weight is not None:
        dxz = _rows(torch.cat([du, dz], dim=-1))
        din_proj = weight_gradient(dxz, _rows(tokens)).to(in_proj_weight.dtype)
        du, dz = (dxz @ in_proj_weight.to(dxz.dtype)).view(tokens.shape), x.new_empty(0)
    return du, dz, din_proj, dconv_weight, dconv_bias, dx_proj, dA, dD, ddt_bias, ddt_weight


@register_fake("ssm_backward")
def _(dy, projected, *arguments):
    return fake_gradients(arguments[:_TENSORS])


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *inputs[:_TENSORS])
    ctx.options = inputs[_TENSORS:]


def _autograd(ctx, dy, _):
    projected, *tensors = ctx.saved_tensors
    gradients = torch.ops.visionmamba.ssm_backward(dy, projected, *tensors, *ctx.options)
    return (*present_gradients(gradients, tensors), *[None] * len(ctx.options))


differentiable("ssm", _autograd, _setup_context)
autocast_activations("ssm", [0, 1])


@register_flop_formula(torch.ops.visionmamba.ssm)
def _flops(
    x, z, in_proj_weight, conv_weight, conv_bias, x_proj_weight, A, D, dt_bias, dt_weight, path, grid, *_args, **_kwargs
) -> int:
    scan = flop_registry[torch.ops.visionmamba.selective_scan]
    low_rank, macs = (*x[:2], A[0], dt_weight[2]), 0
    for weight in (in_proj_weight, conv_weight, x_proj_weight):
        macs += 0 if weight is None else prod(x[:2]) * prod(weight)
    return 2 * macs + scan(x, low_rank, A, None, None, D, z, dt_bias, dt_weight, None, path, grid, out_val=None)


@register_flop_formula(torch.ops.visionmamba.ssm_backward)
def _flops_backward(dy, projected, *args, **kwargs) -> int:
    return 2 * _flops(*args)


def selective_ssm(
    x: Tensor,
    z: Tensor | None,
    in_proj_weight: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    x_proj_weight: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor,
    dt_weight: Tensor,
    path: str,
    grid: list[int],
    merge: bool = True,
    silu: bool = True,
) -> Tensor:
    """Convolve along each direction, project, and scan: see :class:`visionmamba.layers.SelectiveSSM`.

    Args:
        x: Tokens, ``(B, L, D)``; with ``in_proj_weight`` ``(B, L, C)``.
        z: Gate, ``(B, L, D)``.
        in_proj_weight: Projects C channels to those of the input and the gate, ``(2 D, C)``; cast to the dtype of
            ``x``.
        conv_weight: Filters of the causal convolution, ``(K, D, W)``; None for no convolution.
        conv_bias: ``(K, D)``.
        x_proj_weight: ``(K, R + 2 N, D)``; cast to the dtype of ``x``.
        A: ``(K, D, N)``.
        D: ``(K, D)``.
        dt_bias: ``(K, D)``.
        dt_weight: ``(K, D, R)``.
        path: Scan path.
        grid: Its grid.
        merge: Sum the directions' outputs.
        silu: Apply SiLU after the convolution, or to ``x`` where there is none.

    Returns:
        ``(B, L, D)`` with ``merge`` else ``(B, L, K, D)``.
    """
    return torch.ops.visionmamba.ssm(
        x, z, in_proj_weight, conv_weight, conv_bias, x_proj_weight, A, D, dt_bias, dt_weight, path, grid, merge, silu
    )[0]
