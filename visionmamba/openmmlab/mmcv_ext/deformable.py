"""Deformable convolutions on torchvision (Dai et al. 2017; Zhu et al. 2019 for the modulated form)."""

from __future__ import annotations

import torch
from torchvision.ops import deform_conv2d

__all__ = [
    "deform_conv_backward_input",
    "deform_conv_backward_parameters",
    "deform_conv_forward",
    "modulated_deform_conv_backward",
    "modulated_deform_conv_forward",
]


def _convolve(input, offset, weight, bias=None, mask=None, **geometry):
    """Convolve with torchvision; bfloat16, which it has no kernels for, in float32."""
    tensors = [input, offset, weight, bias, mask]
    if input.dtype == torch.bfloat16:
        tensors = [None if tensor is None else tensor.float() for tensor in tensors]
    x, offset, weight, bias, mask = tensors
    return deform_conv2d(x, offset, weight, bias, mask=mask, **geometry).to(input.dtype)


def _gradients(tensors, grad_output, convolve):
    """Gradients of ``convolve(*tensors)`` with respect to the tensors."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        return torch.autograd.grad(convolve(*leaves), leaves, grad_output)


def _geometry(dH, dW, padH, padW, dilationH, dilationW):
    return {"stride": (dH, dW), "padding": (padH, padW), "dilation": (dilationH, dilationW)}


def _inside(offset: torch.Tensor, input: torch.Tensor, kernel: tuple[int, int], geometry: dict) -> torch.Tensor:
    """Whether each sampling position lies in the open range (-1, size) of both axes, in the shape of ``offset``.

    The sample's derivative by its position is zero elsewhere. torchvision takes the one-sided derivative at exactly -1,
    where a zero offset puts the samples of the first row and column of a padded input.
    """
    batch, _, height, width = offset.shape
    pairs = offset.view(batch, -1, *kernel, 2, height, width)
    inside = True
    for axis, (taps, count) in enumerate(zip(kernel, (height, width), strict=True)):
        stride, padding, dilation = (geometry[name][axis] for name in ("stride", "padding", "dilation"))
        tap = torch.arange(taps, device=offset.device).view([taps if i == axis else 1 for i in range(4)])
        place = torch.arange(count, device=offset.device).view([count if i == axis + 2 else 1 for i in range(4)])
        position = pairs[:, :, :, :, axis] + (place * stride - padding + tap * dilation)
        inside = inside & (position > -1) & (position < input.shape[2 + axis])
    return inside.unsqueeze(4).expand_as(pairs).reshape(offset.shape)


def deform_conv_forward(
    input, weight, offset, output, _columns, _ones, kW, kH, dW, dH, padW, padH, dilationW, dilationH, group,
    deformable_group, im2col_step,
):  # fmt: skip
    """Convolve at offset positions into ``output``; groups follow from the tensors' shapes."""
    output.copy_(_convolve(input, offset, weight, **_geometry(dH, dW, padH, padW, dilationH, dilationW)))


def deform_conv_backward_input(
    input, offset, grad_output, grad_input, grad_offset, weight, _columns, kW, kH, dW, dH, padW, padH, dilationW,
    dilationH, group, deformable_group, im2col_step,
):  # fmt: skip
    """Write the gradients of the input and the offsets."""
    geometry = _geometry(dH, dW, padH, padW, dilationH, dilationW)
    gradients = _gradients((input, offset), grad_output, lambda x, o: _convolve(x, o, weight, **geometry))
    grad_input.copy_(gradients[0])
    grad_offset.copy_(gradients[1] * _inside(offset, input, (kH, kW), geometry))


def deform_conv_backward_parameters(
    input, offset, grad_output, grad_weight, _columns, _ones, kW, kH, dW, dH, padW, padH, dilationW, dilationH, group,
    deformable_group, scale, im2col_step,
):  # fmt: skip
    """Add the gradient of the weight, times ``scale``."""
    geometry = _geometry(dH, dW, padH, padW, dilationH, dilationW)
    weight = torch.zeros_like(grad_weight)
    (gradient,) = _gradients((weight,), grad_output, lambda w: _convolve(input, offset, w, **geometry))
    grad_weight.add_(gradient, alpha=scale)


def modulated_deform_conv_forward(
    input, weight, bias, _ones, offset, mask, output, _columns, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w,
    dilation_h, dilation_w, group, deformable_group, with_bias,
):  # fmt: skip
    """Convolve at offset positions with a weight for each sample into ``output``."""
    geometry = _geometry(stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w)
    output.copy_(_convolve(input, offset, weight, bias if with_bias else None, mask=mask, **geometry))


def modulated_deform_conv_backward(
    input, weight, bias, _ones, offset, mask, _columns, grad_input, grad_weight, grad_bias, grad_offset, grad_mask,
    grad_output, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group,
    with_bias,
):  # fmt: skip
    """Write the gradients of the input, the offsets, the sample weights, the weight and the bias."""
    geometry = _geometry(stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w)
    gradients = _gradients(
        (input, offset, mask, weight),
        grad_output,
        lambda x, o, m, w: _convolve(x, o, w, mask=m, **geometry),
    )
    for target, gradient in zip((grad_input, grad_offset, grad_mask, grad_weight), gradients, strict=True):
        target.copy_(gradient)
    grad_offset.mul_(_inside(offset, input, (kernel_h, kernel_w), geometry))
    if with_bias:
        grad_bias.copy_(grad_output.sum((0, 2, 3)))
