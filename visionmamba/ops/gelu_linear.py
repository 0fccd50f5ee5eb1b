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
from ._block_products import weight_gradient
from ._operator import differentiable, operator, register_fake
from .backend import Implementation, register_implementation, select
from .cuda_runtime import Arguments, pointer
from .selective_scan.cuda_call import ACT, sum_rows

__all__ = ["gelu_linear"]

_BLOCKS_WANTED = 4  # a multiprocessor

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def recompute(x: Tensor, dy: Tensor, dout: Tensor) -> Gradients:
    """Return what the backward pass needs of a hidden layer.

    Args:
        x: The hidden layer before GELU, ``(rows, N)``.
        dy: The gradient of GELU(x).
        dout: The gradient of what a linear layer makes of it, ``(rows, M)``.

    Returns:
        GELU(x), the gradient of x, and the sums of the gradients of x and of the linear layer over the rows, in float32
        (float64).
    """
    dx = torch.ops.aten.gelu_backward(dy, x)
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.gelu(x), dx, dx.sum(0, dtype=wide), dout.sum(0, dtype=wide)


def macros(dtype: torch.dtype, vec: int) -> dict[str, int]:
    """Return the macros of a specialisation of ``kernels/cuda/activation.cu``."""
    return {"ACT": ACT[dtype], "VEC": vec, "AHEAD": 4}


def _run(name: str, x: Tensor, dy: Tensor | None = None) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Launch a kernel over rows; return what it computes of them, and the sums of columns."""
    (rows, columns), launcher = x.shape, cuda_runtime.launcher(x.device)
    y, dx = (None, None) if dy is None else (torch.empty_like(x), torch.empty_like(x))
    aligned = all(t is None or t.data_ptr() % (4 * t.element_size()) == 0 for t in (x, dy, y, dx))
    vec = 4 if aligned and columns % 4 == 0 else 1
    tiles = -(-columns // (32 * vec))
    parts = max(1, min(-(-rows // 8), _BLOCKS_WANTED * launcher.multiprocessors // tiles))
    sums = torch.empty((parts, columns), device=x.device)
    arguments = Arguments((*map(pointer, (x, dy, y, dx, sums)), rows), (columns, tiles, parts, 0))
    launcher.run("activation.cu", name, macros(x.dtype, vec), tiles * parts, 256, arguments)
    return y, dx, sum_rows(launcher, sums, x.dtype, (columns,))[0]


def recompute_on_gpu(x: Tensor, dy: Tensor, dout: Tensor) -> Gradients:
    """Do what :func:`recompute` does, in two passes over memory."""
    return *_run("gelu_recompute", x.contiguous(), dy.contiguous()), _run("column_sums", dout.contiguous())[2]


def _supports(x: Tensor, *_others) -> str | None:
    return None if x.dtype in ACT else f"takes float32, float16 and bfloat16, not {str(x.dtype).removeprefix('torch.')}"


register_implementation(Implementation("gelu_linear", "torch", (), recompute))
register_implementation(
    Implementation(
        "gelu_linear", "cuda", ("cuda",), recompute_on_gpu, None, cuda_runtime.usable, _supports,
        (cuda_runtime.KernelError,),
    )
)  # fmt: skip


@operator("gelu_linear", "(Tensor x, Tensor weight, Tensor? bias, Tensor? x_bias) -> Tensor", planned=True)
def _gelu_linear(x, weight, bias, x_bias):
    return F.linear(F.gelu(x), weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


@register_fake("gelu_linear")
def _(x, weight, bias, x_bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@operator(
    "gelu_linear_backward", "(Tensor dout, Tensor x, Tensor weight) -> (Tensor, Tensor, Tensor, Tensor)", planned=True
)
def _gelu_linear_backward(dout, x, weight):
    rows, hidden_rows = dout.reshape(-1, dout.shape[-1]), x.reshape(-1, x.shape[-1])
    dhidden = rows @ weight.to(x.dtype)
    arguments = (hidden_rows, dhidden, rows)
    hidden, dx, dx_bias, dbias = select("gelu_linear", x.device.type, *arguments).forward(*arguments)
    dweight = weight_gradient(rows, hidden)
    return dx.view(x.shape), dweight.to(weight.dtype), dbias.to(weight.dtype), dx_bias.to(weight.dtype)


@register_fake("gelu_linear_backward")
def _(dout, x, weight):
    return x.new_empty(x.shape), torch.empty_like(weight), *(weight.new_empty(size) for size in weight.shape)


def _setup_context(ctx, inputs, output):
    x, weight, *biases = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_biases = [bias is not None for bias in biases]


def _autograd(ctx, dout):
    dx, dweight, *dbiases = torch.ops.visionmamba.gelu_linear_backward(dout, *ctx.saved_tensors)
    return dx, dweight, *(db if has else None for db, has in zip(dbiases, ctx.has_biases, strict=True))


differentiable("gelu_linear", _autograd, _setup_context)


@register_flop_formula(torch.ops.visionmamba.gelu_linear)
def _flops(x_shape, weight_shape, *_args, out_shape=None, **_kwargs) -> int:
    return 2 * prod(x_shape[:-1]) * prod(weight_shape)


@register_flop_formula(torch.ops.visionmamba.gelu_linear_backward)
def _flops_backward(dout_shape, x_shape, weight_shape, *_args, out_shape=None, **_kwargs) -> int:
    return 4 * prod(x_shape[:-1]) * prod(weight_shape)


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, x_bias: Tensor | None = None) -> Tensor:
    """Compute ``linear(gelu(x))``.

    Args:
        x: ``(..., N)``.
        weight: ``(M, N)``; cast to the dtype of ``x``.
        bias: ``(M,)``; likewise.
        x_bias: ``(N,)``: a bias that was added to ``x`` already, by an operator that does not compute its gradient.
            That is the sum of the gradient of ``x``, which is at hand here.

    Returns:
        ``(..., M)``.
    """
    return torch.ops.visionmamba.gelu_linear(x, weight, bias, x_bias)
