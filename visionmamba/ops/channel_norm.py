"""LayerNorm and RMSNorm over channels, with the addition to a residual stream and the cast of the result.

The dispatcher op ``visionmamba::channel_norm``. A stream is often float32 while the layers around it run in 16 bits:
what one kernel reads and writes here are four otherwise (add, norm, cast, and the gradient's sum).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_dtype, check_same_device, check_shape
from ._cuda_norm import has_kernel  # registers the backend, too
from ._operator import differentiable, operator, register_fake
from .backend import Implementation, register_implementation, select
from .norm import normalise, normalise_backward

__all__ = ["channel_norm", "has_kernel"]


def forward(x, added, weight, bias, shift, eps, rms, scale, dtype):
    """Compute the op in plain PyTorch; see :func:`channel_norm`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x, added = x.contiguous(), None if added is None else added.contiguous()  # whatever x is, the results are
    total = x.to(wide) if shift is None else x.to(wide) + shift.to(wide)
    if added is not None:
        total = torch.add(total, added.to(wide), alpha=scale)
    out = normalise(total, eps, rms)[0] * weight.to(wide)
    if bias is not None:
        out = out + bias.to(wide)
    return out.to(dtype, copy=True), None if added is None else total.to(x.dtype)


def backward(dout, dtotal, total, weight, bias, shift, eps, rms, scale, added_dtype):
    """Compute the gradients of x, added, weight, bias and shift; None for absent ones."""
    wide = torch.promote_types(total.dtype, torch.float32)
    total, dout = total.contiguous(), dout.contiguous()
    normal, rstd = normalise(total.to(wide) if shift is None else total.to(wide) + shift.to(wide), eps, rms)
    dout = dout.to(wide)
    dx = normalise_backward(dout * weight.to(wide), normal, rstd, rms)
    if dtotal is not None:
        dx = dx + dtotal.to(wide)
    rows = tuple(range(total.dim() - 1))
    dadded = None if added_dtype is None else (scale * dx).to(added_dtype)
    dweight, dbias = (dout * normal).sum(rows), None if bias is None else dout.sum(rows)
    return dx.to(total.dtype), dadded, dweight, dbias, None if shift is None else dx.sum(rows)


register_implementation(Implementation("channel_norm", "torch", (), forward, backward))

_SCHEMA = (
    "Tensor x, Tensor? added, Tensor weight, Tensor? bias, Tensor? shift, float eps, bool rms, float scale, "
    "ScalarType dtype"
)


@operator("channel_norm", f"({_SCHEMA}) -> (Tensor, Tensor)", planned=True)
def _channel_norm(x, added, weight, bias, shift, eps, rms, scale, dtype):
    check_dtype("x", x)
    for name, parameter in (("weight", weight), ("bias", bias), ("shift", shift)):
        if parameter is not None:
            check_shape(name, parameter, (x.shape[-1],))
    if added is not None:
        check_shape("added", added, x.shape)
        if shift is not None:
            raise ValueError("shift: expected none where something is added")
    check_same_device(x=x, added=added, weight=weight, bias=bias, shift=shift)
    arguments = (x, added, weight, bias, shift, eps, rms, scale, dtype)
    out, total = select("channel_norm", x.device.type, *arguments).forward(*arguments)
    return out, x.new_empty(0) if total is None else total


@register_fake("channel_norm")
def _(x, added, weight, bias, shift, eps, rms, scale, dtype):
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    return out, x.new_empty(0) if added is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)


@operator(
    "channel_norm_backward",
    "(Tensor dout, Tensor? dtotal, Tensor total, Tensor weight, Tensor? bias, Tensor? shift, float eps, bool rms, "
    "float scale, ScalarType? added_dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    planned=True,
)
def _channel_norm_backward(dout, dtotal, total, weight, bias, shift, eps, rms, scale, added_dtype):
    arguments = (total, weight, bias, shift, eps, rms, scale, added_dtype)
    implementation = select("channel_norm", total.device.type, *arguments)
    dx, dadded, dweight, dbias, dshift = implementation.backward(dout, dtotal, *arguments)
    # An absent input's gradient is an empty tensor: an op's outputs cannot be None.
    dadded = total.new_empty(0) if dadded is None else dadded
    dbias = total.new_empty(0) if dbias is None else dbias.to(bias.dtype)
    dshift = total.new_empty(0) if dshift is None else dshift.to(shift.dtype)
    return dx, dadded, dweight.to(weight.dtype), dbias, dshift


@register_fake("channel_norm_backward")
def _(dout, dtotal, total, weight, bias, shift, eps, rms, scale, added_dtype):
    absent = total.new_empty(0)
    dadded = absent if added_dtype is None else torch.empty(total.shape, dtype=added_dtype, device=total.device)
    dbias, dshift = (total.new_empty(0) if t is None else torch.empty_like(t) for t in (bias, shift))
    dx = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    return dx, dadded, torch.empty_like(weight), dbias, dshift


def _setup_context(ctx, inputs, output):
    x, added, weight, bias, shift, *options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if added is None else output[1], weight, bias, shift)
    ctx.options = (*options[:3], None if added is None else added.dtype)


def _autograd(ctx, dout, dtotal):
    total, weight, bias, shift = ctx.saved_tensors
    added_dtype = ctx.options[-1]
    if dout is None:
        dout = torch.zeros_like(total)
    dtotal = None if added_dtype is None else dtotal
    arguments = (dout, dtotal, total, weight, bias, shift, *ctx.options)
    dx, dadded, dweight, dbias, dshift = torch.ops.visionmamba.channel_norm_backward(*arguments)
    dadded, dbias = None if added_dtype is None else dadded, None if bias is None else dbias
    return dx, dadded, dweight, dbias, None if shift is None else dshift, None, None, None, None


differentiable("channel_norm", _autograd, _setup_context)


def channel_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    rms: bool = False,
    added: Tensor | None = None,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalise the last dimension of ``x + scale * added``, or of ``x + shift``. Sums are float32 (float64).

    Args:
        x: ``(..., C)``, in any floating dtype.
        weight: ``(C,)``.
        bias: ``(C,)``.
        eps: Added to the variance (mean square).
        rms: RMSNorm instead of LayerNorm.
        added: What a block adds to the stream ``x``; it may have another dtype.
        scale: Its factor.
        dtype: Of the result; that of ``x`` if absent.
        shift: ``(C,)``: the bias of what computed ``x``, which saves an addition of its own. Not with ``added``.

    Returns:
        The normalised rows, and the sum in the dtype of ``x``: ``x`` itself where nothing is added.

    Raises:
        ValueError: A shape does not fit.
        TypeError: A dtype does not fit.
    """
    dtype = x.dtype if dtype is None else dtype
    out, total = torch.ops.visionmamba.channel_norm(x, added, weight, bias, shift, eps, rms, scale, dtype)
    return out, x if added is None else total
