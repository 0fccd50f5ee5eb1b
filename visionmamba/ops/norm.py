"""Gated norms, and norms with a fused residual addition, under mamba_ssm's names.

Two dispatcher ops lie below. ``visionmamba::gated_norm`` is the norm after Mamba-2's scan; ``visionmamba::add_norm`` is
the norm at a block's entry, which also adds the block's input to the residual stream. Statistics are float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _triton_norm  # noqa: F401  (registers the backend)
from ._checks import check_dtype, check_same_device, check_shape
from ._operator import differentiable, fake_gradients, gradients_as_results, operator, present_gradients, register_fake
from .backend import Implementation, register_implementation, select

__all__ = ["layer_norm_fn", "layernorm_fn", "rms_norm_fn", "rmsnorm_fn"]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def normalise(x: Tensor, eps: float, rms: bool) -> tuple[Tensor, Tensor]:
    """Return x normalised over its last dimension, and the reciprocal deviation."""
    if not rms:
        x = x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * rstd, rstd


def normalise_backward(dnormal: Tensor, normal: Tensor, rstd: Tensor, rms: bool) -> Tensor:
    """Return dx of :func:`normalise`."""
    dx = dnormal - normal * (dnormal * normal).mean(-1, keepdim=True)
    return rstd * (dx if rms else dx - dnormal.mean(-1, keepdim=True))


def gated_forward(x, weight, bias, z, eps, group_size, norm_before_gate, rms):
    """Compute the op ``visionmamba::gated_norm``."""
    wide = x.to(_wide(x))
    gate = None if z is None else F.silu(z.to(wide.dtype))
    if gate is not None and not norm_before_gate:
        wide = wide * gate
    normal, _ = normalise(wide.unflatten(-1, (-1, group_size)), eps, rms)
    out = normal.flatten(-2) * weight.to(wide.dtype)
    if bias is not None:
        out = out + bias.to(wide.dtype)
    if gate is not None and norm_before_gate:
        out = out * gate
    return out.to(x.dtype)


def gated_backward(dout, x, weight, bias, z, eps, group_size, norm_before_gate, rms):
    """Compute the gradients of x, weight, bias and z; None for absent ones."""
    wide, dout, weight = x.to(_wide(x)), dout.to(_wide(x)), weight.to(_wide(x))
    dgate = sigmoid = gate = None
    scaled = wide
    if z is not None:
        pre = z.to(wide.dtype)
        sigmoid = torch.sigmoid(pre)
        gate = pre * sigmoid
        if not norm_before_gate:
            scaled = wide * gate
    normal, rstd = normalise(scaled.unflatten(-1, (-1, group_size)), eps, rms)
    flat = normal.flatten(-2)
    if gate is not None and norm_before_gate:
        affine = flat * weight if bias is None else flat * weight + bias.to(wide.dtype)
        dgate = dout * affine
        dout = dout * gate
    rows = tuple(range(x.dim() - 1))
    dweight = (dout * flat).sum(rows)
    dbias = None if bias is None else dout.sum(rows)
    dx = normalise_backward((dout * weight).unflatten(-1, (-1, group_size)), normal, rstd, rms).flatten(-2)
    if gate is not None and not norm_before_gate:
        dgate = dx * wide
        dx = dx * gate
    dz = None if z is None else dgate * sigmoid * (1 + pre * (1 - sigmoid))
    return dx, dweight, dbias, dz


def add_forward(x, residual, weight, bias, eps, rms, residual_in_fp32):
    """Compute the op ``visionmamba::add_norm``."""
    total = x.to(_wide(x))
    if residual is not None:
        total = total + residual.to(total.dtype)
    normal, _ = normalise(total, eps, rms)
    out = normal * weight.to(total.dtype)
    if bias is not None:
        out = out + bias.to(total.dtype)
    return out.to(x.dtype), total.to(residual_dtype(x, residual, residual_in_fp32), copy=True)


def add_backward(dout, dtotal, x, residual, weight, bias, eps, rms, residual_in_fp32):
    """Compute the gradients of the sum x + residual, weight and bias; None for an absent one."""
    total = x.to(_wide(x))
    if residual is not None:
        total = total + residual.to(total.dtype)
    normal, rstd = normalise(total, eps, rms)
    dout = dout.to(total.dtype)
    rows = tuple(range(x.dim() - 1))
    dx = normalise_backward(dout * weight.to(total.dtype), normal, rstd, rms)
    if dtotal is not None:
        dx = dx + dtotal.to(dx.dtype)
    return dx, (dout * normal).sum(rows), None if bias is None else dout.sum(rows)


register_implementation(Implementation("gated_norm", "torch", (), gated_forward, gated_backward))
register_implementation(Implementation("add_norm", "torch", (), add_forward, add_backward))


def residual_dtype(x: Tensor, residual: Tensor | None, residual_in_fp32: bool) -> torch.dtype:
    """Return the dtype of the sum that ``add_norm`` hands on."""
    if residual is not None:
        return residual.dtype
    return _wide(x) if residual_in_fp32 else x.dtype


_GATED = "Tensor x, Tensor weight, Tensor? bias, Tensor? z, float eps, int group_size, bool norm_before_gate, bool rms"


def _check_affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_dtype("x", x)
    check_shape("weight", weight, (x.shape[-1],))
    if bias is not None:
        check_shape("bias", bias, (x.shape[-1],))


@operator("gated_norm", f"({_GATED}) -> Tensor")
def _gated_norm(x, weight, bias, z, eps, group_size, norm_before_gate, rms):
    _check_affine(x, weight, bias)
    if z is not None:
        check_shape("z", z, x.shape)
    if group_size < 1 or x.shape[-1] % group_size:
        raise ValueError(f"group_size: expected a divisor of {x.shape[-1]} channels, got {group_size}")
    check_same_device(x=x, weight=weight, bias=bias, z=z)
    arguments = (x, weight, bias, z, eps, group_size, norm_before_gate, rms)
    return select("gated_norm", x.device.type, *arguments).forward(*arguments)


@register_fake("gated_norm")
def _(x, weight, bias, z, eps, group_size, norm_before_gate, rms):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@operator("gated_norm_backward", f"(Tensor dout, {_GATED}) -> (Tensor, Tensor, Tensor, Tensor)")
def _gated_norm_backward(dout, *arguments):
    x = arguments[0]
    gradients = select("gated_norm", x.device.type, *arguments).backward(dout, *arguments)
    return gradients_as_results(gradients, arguments[:4])


@register_fake("gated_norm_backward")
def _(dout, *arguments):
    return fake_gradients(arguments[:4])


def _gated_setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _gated_autograd(ctx, dout):
    gradients = torch.ops.visionmamba.gated_norm_backward(dout, *ctx.saved_tensors, *ctx.options)
    return (*present_gradients(gradients, ctx.saved_tensors), *[None] * len(ctx.options))


differentiable("gated_norm", _gated_autograd, _gated_setup_context)


_ADD = "Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, bool rms, bool residual_in_fp32"


@operator("add_norm", f"({_ADD}) -> (Tensor, Tensor)")
def _add_norm(x, residual, weight, bias, eps, rms, residual_in_fp32):
    _check_affine(x, weight, bias)
    if residual is not None:
        check_shape("residual", residual, x.shape)
    check_same_device(x=x, residual=residual, weight=weight, bias=bias)
    arguments = (x, residual, weight, bias, eps, rms, residual_in_fp32)
    return select("add_norm", x.device.type, *arguments).forward(*arguments)


@register_fake("add_norm")
def _(x, residual, weight, bias, eps, rms, residual_in_fp32):
    total = torch.empty(x.shape, dtype=residual_dtype(x, residual, residual_in_fp32), device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), total


@operator("add_norm_backward", f"(Tensor dout, Tensor? dtotal, {_ADD}) -> (Tensor, Tensor, Tensor, Tensor)")
def _add_norm_backward(dout, dtotal, *arguments):
    x = arguments[0]
    implementation = select("add_norm", x.device.type, *arguments)
    dsum, dweight, dbias = implementation.backward(dout, dtotal, *arguments)
    # x and residual have one gradient, but results must not share memory
    return gradients_as_results((dsum.to(x.dtype, copy=True), dsum, dweight, dbias), arguments[:4])


@register_fake("add_norm_backward")
def _(dout, dtotal, *arguments):
    return fake_gradients(arguments[:4])


def _add_setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _add_autograd(ctx, dout, dtotal):
    if dout is None:
        dout = torch.zeros_like(ctx.saved_tensors[0])
    gradients = torch.ops.visionmamba.add_norm_backward(dout, dtotal, *ctx.saved_tensors, *ctx.options)
    return (*present_gradients(gradients, ctx.saved_tensors), *[None] * len(ctx.options))


differentiable("add_norm", _add_autograd, _add_setup_context)


def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """Normalise, and gate by silu(z) after or before the norm.

    Args:
        x: ``(..., D)``.
        weight: ``(D,)``.
        bias: ``(D,)``.
        z: Gate, the shape of ``x``.
        eps: Added to the mean square.
        group_size: Statistics over consecutive groups of this many channels; all channels if absent.
        norm_before_gate: ``norm(x) * silu(z)`` if set, else ``norm(x * silu(z))``.
        is_rms_norm: RMSNorm instead of LayerNorm.

    Returns:
        The shape and dtype of ``x``.

    Raises:
        ValueError: A shape does not fit, or ``group_size`` does not divide D.

    Source:
        mamba_ssm 2.3, ``ops/triton/layernorm_gated.py`` (interface).
    """
    group_size = x.shape[-1] if group_size is None else group_size
    return torch.ops.visionmamba.gated_norm(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm)


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """Apply the gated RMSNorm of Mamba-2; see :func:`layernorm_fn` for the arguments."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm=True)


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Add to the residual stream and normalise the sum.

    Args:
        x: Output of the previous block, ``(..., D)``.
        weight: ``(D,)``.
        bias: ``(D,)``.
        residual: Residual stream, the shape of ``x``.
        x1: A second branch that is added too.
        weight1: Weight of a second norm of the same sum (parallel blocks).
        bias1: Bias of the second norm.
        eps: Added to the variance (mean square).
        dropout_p: Dropout of ``x`` (and ``x1``) before the addition.
        rowscale: Factor of each row of ``x``, ``(...)``.
        prenorm: Also return the sum.
        residual_in_fp32: Keep the sum in float32 where there is no ``residual`` to take the dtype from.
        zero_centered_weight: The stored weights are the weights minus one.
        is_rms_norm: RMSNorm instead of LayerNorm.

    Returns:
        The normalised sum in the dtype of ``x``; with ``weight1`` the second norm's result; with ``prenorm`` the sum.

    Raises:
        ValueError: A shape does not fit.

    Source:
        mamba_ssm 2.3, ``ops/triton/layer_norm.py`` (interface).
    """
    if rowscale is not None:
        x = x * rowscale.unsqueeze(-1)
    if dropout_p > 0.0:
        x = F.dropout(x, dropout_p)
        x1 = None if x1 is None else F.dropout(x1, dropout_p)
    if x1 is not None:
        x = x + x1
    if zero_centered_weight:
        weight, weight1 = weight + 1.0, None if weight1 is None else weight1 + 1.0
    out, total = torch.ops.visionmamba.add_norm(x, residual, weight, bias, eps, is_rms_norm, residual_in_fp32)
    results = [out]
    if weight1 is not None:
        results.append(
            torch.ops.visionmamba.add_norm(total, None, weight1, bias1, eps, is_rms_norm, False)[0].to(x.dtype)
        )
    if prenorm:
        results.append(total)
    return results[0] if len(results) == 1 else tuple(results)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Apply :func:`layer_norm_fn` with RMSNorm; see there for the arguments."""
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32,
        zero_centered_weight, is_rms_norm=True,
    )  # fmt: skip
