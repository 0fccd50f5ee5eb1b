"""Layers that keep their tokens alone and compute what they make of them anew in the backward pass.

What a mixer makes of its tokens before and after the scan (projections, a convolution, activations, a norm) is cheap
beside the scan and large beside the tokens. PyTorch's own checkpointing would run the scan anew as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .fusion import fuses, unwatched

__all__ = ["Enter", "ScanInputs", "recomputed", "recomputed_scan", "recomputes", "repeatable_norm"]

ScanInputs = tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor | None,
    torch.Tensor,
    torch.Tensor | None,
]
"""``u``, ``delta``, ``A``, ``B``, ``C``, ``D``, ``z``, ``delta_bias``, ``dt_weight`` of the selective scan."""

Enter = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
"""What a layer makes of its tokens: the scan's input and its gate, ``(B, L, D)`` each."""

Function = Callable[..., Any]


def _parameters(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    return [parameter for module in modules for parameter in module.parameters()]


def recomputes(x: torch.Tensor, *modules: nn.Module) -> bool:
    """Whether a layer computes anew: in training, where its kernels run, unless a hook waits inside the modules.

    Nor does it where other tensors stand for the parameters while it runs (``torch.func.functional_call``,
    ``DataParallel``, the first FSDP): they would be gone by the backward pass.

    Args:
        x: The layer's input.
        modules: What is run a second time, or not as a module.
    """
    if not torch.is_grad_enabled() or not fuses(x, compiled=False):
        return False
    parameters = _parameters(modules)
    own = bool(parameters) and all(isinstance(parameter, nn.Parameter) for parameter in parameters)
    return own and unwatched(*(inner for module in modules for inner in module.modules()))


class _Recomputed(torch.autograd.Function):
    """A function of tensors that keeps its inputs alone; or the scan of what it returns, which keeps the same."""

    @staticmethod
    def forward(ctx: Any, function: Function, options, modules, count: int, *tensors: torch.Tensor) -> torch.Tensor:
        kind = tensors[0].device.type
        ctx.function, ctx.options, ctx.modules, ctx.count = function, options, modules, count
        ctx.autocast = dict(
            device_type=kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind),
            cache_enabled=torch.is_autocast_cache_enabled(),
        )  # fmt: skip
        ctx.save_for_backward(*tensors)  # the modules' parameters, too: that nothing changes them until backward
        outputs = function(*tensors[:count])
        return outputs if options is None else torch.ops.visionmamba.selective_scan(*outputs, None, *options)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor):
        needed = ctx.needs_input_grad[4:]
        kept = ctx.saved_tensors[: ctx.count]
        tensors = [t.detach().requires_grad_(n) for t, n in zip(kept, needed, strict=False)]
        leaves = [*tensors, *_parameters(ctx.modules)]  # read again: where they are sharded, they are others by now
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            outputs = ctx.function(*tensors)
        if ctx.options is None:
            pairs = [(outputs, dy)]
        else:
            detached = [None if t is None else t.detach() for t in outputs]
            cotangents = torch.ops.visionmamba.selective_scan_backward(dy, None, *detached, None, *ctx.options)
            pairs = [(t, g) for t, g in zip(outputs, cotangents, strict=False) if t is not None and t.requires_grad]
        wanted = [leaf for leaf, n in zip(leaves, needed, strict=True) if n]
        outputs, cotangents = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True))
        return (None, None, None, None, *(next(found) if n else None for n in needed))


def recomputed(function: Function, modules: Sequence[nn.Module], *tensors: torch.Tensor) -> torch.Tensor:
    """Return ``function(*tensors)``, and keep the tensors alone for the backward pass.

    Args:
        function: It must return the same again: no dropout, no statistics that move.
        modules: What holds the parameters that the function reads.
        *tensors: Its arguments.
    """
    return _Recomputed.apply(function, None, modules, len(tensors), *tensors, *_parameters(modules))


def repeatable_norm(norm: nn.BatchNorm2d, then: Function) -> Function:
    """Return the function ``then(norm(x))``, whose first call alone moves the norm's running statistics.

    Args:
        norm: A batch norm; in training, further calls give the same from the batch's own statistics.
        then: What follows it.
    """
    moved = False

    def function(x: torch.Tensor) -> torch.Tensor:
        nonlocal moved
        if moved and norm.training:
            return then(F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps))
        moved = True
        return then(norm(x))

    return function


def recomputed_scan(
    inputs_of: Callable[[torch.Tensor], ScanInputs],
    options: tuple[Any, ...],
    modules: Sequence[nn.Module],
    x: torch.Tensor,
) -> torch.Tensor:
    """Scan what a function makes of tokens, and keep the tokens alone for the backward pass.

    Args:
        inputs_of: Maps the tokens to the scan's tensor arguments, the activations among them of one dtype; as the
            function of :func:`recomputed`.
        options: The scan's other arguments, from ``path`` to ``projections_in_step_order``.
        modules: What holds the parameters that ``inputs_of`` reads.
        x: The tokens.

    Returns:
        The scan's output; see :func:`visionmamba.ops.selective_scan`.
    """
    return _Recomputed.apply(inputs_of, options, modules, 1, x, *_parameters(modules))
