"""GELU and the linear layer after it as one operator, ``visionmamba::gelu_linear``, that keeps one activation.

PyTorch keeps the input of the GELU for the GELU's gradient and its output for the weight's: the two largest activations
of a block with an MLP. Here the output is computed anew, in the kernel that computes the GELU's gradient.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import cuda_runtime
from ._autocast import autocast_activations
from ._block_products import weight_gradient
from .backend import Implementation, register_implementation, select
from .cuda_runtime import Arguments, pointer
from .selective_scan.cuda_call import ACT

__all__ = ["gelu_linear"]


def recompute(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Return GELU(x) and the gradient of x for a gradient dy of it."""
    return F.gelu(x), torch.ops.aten.gelu_backward(dy, x)


def macros(dtype: torch.dtype, vec: int) -> dict[str, int]:
    """Return the macros of a specialisation of ``kernels/cuda/activation.cu``."""
    return {"ACT": ACT[dtype], "VEC": vec}


def recompute_on_gpu(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Do what :func:`recompute` does, in one pass over memory."""
    x, dy = x.contiguous(), dy.contiguous()
    y, dx = torch.empty_like(x), torch.empty_like(x)
    tensors = (x, dy, y, dx)
    aligned = all(t.data_ptr() % (4 * t.element_size()) == 0 for t in tensors)
    vec = 4 if aligned and x.numel() % 4 == 0 else 1
    count = x.numel() // vec
    launcher = cuda_runtime.launcher(x.device)
    arguments = Arguments((*map(pointer, tensors), count), ())
    launcher.run("activation.cu", "gelu_recompute", macros(x.dtype, vec), -(-count // 256), 256, arguments)
    return y, dx


def _supports(x: Tensor, *_others) -> str | None:
    return None if x.dtype in ACT else f"takes float32, float16 and bfloat16, not {str(x.dtype).removeprefix('torch.')}"


register_implementation(Implementation("gelu_linear", "torch", (), recompute))
register_implementation(
    Implementation(
        "gelu_linear", "cuda", ("cuda",), recompute_on_gpu, None, cuda_runtime.usable, _supports,
        (cuda_runtime.KernelError,),
    )
)  # fmt: skip


@torch.library.custom_op("visionmamba::gelu_linear", mutates_args=())
def _gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(F.gelu(x), weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


@_gelu_linear.register_fake
def _(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("visionmamba::gelu_linear_backward", mutates_args=())
def _gelu_linear_backward(dout: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, x = dout.reshape(-1, dout.shape[-1]), x.contiguous()
    dhidden = rows @ weight.to(x.dtype)
    hidden, dx = select("gelu_linear", x.device.type, x).forward(x, dhidden.view(x.shape))
    dweight = weight_gradient(rows, hidden.view(-1, x.shape[-1]))
    return dx, dweight.to(weight.dtype), rows.sum(0, dtype=torch.float32).to(weight.dtype)


@_gelu_linear_backward.register_fake
def _(dout, x, weight):
    return x.new_empty(x.shape), torch.empty_like(weight), weight.new_empty(weight.shape[0])


def _setup_context(ctx, inputs, output):
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _autograd(ctx, dout):
    dx, dweight, dbias = torch.ops.visionmamba.gelu_linear_backward(dout, *ctx.saved_tensors)
    return dx, dweight, dbias if ctx.has_bias else None


_gelu_linear.register_autograd(_autograd, setup_context=_setup_context)
autocast_activations("gelu_linear")
autocast_activations("gelu_linear_backward")


@register_flop_formula(torch.ops.visionmamba.gelu_linear)
def _flops(x_shape, weight_shape, *_args, out_shape=None, **_kwargs) -> int:
    return 2 * prod(x_shape[:-1]) * prod(weight_shape)


@register_flop_formula(torch.ops.visionmamba.gelu_linear_backward)
def _flops_backward(dout_shape, x_shape, weight_shape, *_args, out_shape=None, **_kwargs) -> int:
    return 4 * prod(x_shape[:-1]) * prod(weight_shape)


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``linear(gelu(x))``.

    Args:
        x: ``(..., N)``.
        weight: ``(M, N)``; cast to the dtype of ``x``.
        bias: ``(M,)``; likewise.

    Returns:
        ``(..., M)``.
    """
    return torch.ops.visionmamba.gelu_linear(x, weight, bias)
