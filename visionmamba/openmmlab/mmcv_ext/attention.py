"""Multi-scale deformable attention (Zhu et al. 2021, Deformable DETR, eq. 3).

PyTorch's bilinear grid sampling everywhere; on GPUs that Triton compiles for, kernels that keep no samples
(``kernels/triton/deformable_attention.py``).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ...ops import _triton

__all__ = ["ms_deform_attn_backward", "ms_deform_attn_forward", "multi_scale_deformable_attention"]

_ELEMENTS = 1024
"""Queries times channels that a program of the kernels takes."""
_MAX_CHANNELS = 256

_logger = logging.getLogger("visionmamba.openmmlab")


@functools.cache
def _problem(device: torch.device) -> str | None:
    """Return why the kernels cannot run there, or None; the first call tries them on one pixel."""
    reason = _triton.probe()
    if reason is None:
        value, weights = torch.ones(1, 1, 1, 8, device=device), torch.ones(1, 1, 1, 1, 1, device=device)
        inputs = value, *_tables(((1, 1),), device), torch.ones(1, 1, 1, 1, 1, 2, device=device) / 2, weights
        try:
            _fused_backward(_fused_forward(*inputs), *inputs)
        except Exception as error:  # whatever a compiler or a driver raises: grid sampling does the same
            reason = f"{type(error).__name__}: {error}"
            _logger.warning(
                "the kernels of deformable attention do not run on %s, grid sampling does: %s", device, reason
            )
    return reason


def _fuses(value: torch.Tensor) -> bool:
    """Whether the kernels take these values; their backward pass adds up in no fixed order."""
    return (
        value.device.type in _triton.device_types()
        and _problem(value.device) is None
        and value.dtype != torch.float64
        and value.numel() > 0
        and value.shape[-1] <= _MAX_CHANNELS
        and not torch.are_deterministic_algorithms_enabled()
    )


@functools.lru_cache(64)
def _tables(sizes: tuple[tuple[int, int], ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the maps' sizes ``(levels, 2)`` and where each map's tokens start ``(levels,)``."""
    table = torch.tensor(sizes)
    starts = table.prod(1).cumsum(0) - table.prod(1)
    return table.to(device), starts.to(device)


def _launch(kernel: Any, tensors: Sequence[torch.Tensor], value: torch.Tensor, locations: torch.Tensor) -> None:
    _, tokens, heads, channels = value.shape
    batch, queries, _, levels, points, _ = locations.shape
    width = _triton.power_of_two(channels)
    block = max(1, _ELEMENTS // width)
    kernel[-(-queries // block), heads, batch](
        *tensors, tokens, queries, channels, BLOCK=block, CHANNELS=width, LEVELS=levels, POINTS=points, num_warps=4
    )


def _fused_forward(value, sizes, starts, locations, weights) -> torch.Tensor:
    from visionmamba.kernels.triton.deformable_attention import deformable_attention

    inputs = [tensor.contiguous() for tensor in (value, sizes, starts, locations, weights)]
    out = value.new_empty(*locations.shape[:3], value.shape[-1])
    if out.numel():
        _launch(deformable_attention, [*inputs, out], value, locations)
    return out.flatten(2)


def _fused_backward(dout, value, sizes, starts, locations, weights) -> tuple[torch.Tensor, ...]:
    from visionmamba.kernels.triton.deformable_attention import deformable_attention_backward

    inputs = [tensor.contiguous() for tensor in (dout, value, sizes, starts, locations, weights)]
    like = (value, locations, weights)
    gradients = [torch.zeros(tensor.shape, dtype=torch.float32, device=value.device) for tensor in like]
    if dout.numel():
        _launch(deformable_attention_backward, [*inputs, *gradients], value, locations)
    return tuple(gradient.to(tensor.dtype) for gradient, tensor in zip(gradients, like, strict=True))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, sizes, starts, locations, weights):
        ctx.save_for_backward(value, sizes, starts, locations, weights)
        return _fused_forward(value, sizes, starts, locations, weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        dvalue, dlocations, dweights = _fused_backward(dout, *ctx.saved_tensors)
        return dvalue, None, None, dlocations, dweights


def multi_scale_deformable_attention(
    value: torch.Tensor, sizes: Sequence[tuple[int, int]], locations: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Sample multi-scale feature maps around each query and average the samples.

    Args:
        value: Flattened maps of all levels, ``(B, sum of H W, heads, channels)``.
        sizes: Height and width of each level's map.
        locations: Sampling points in [0, 1], x before y, ``(B, queries, heads, levels, points, 2)``.
        weights: ``(B, queries, heads, levels, points)``.

    Returns:
        ``(B, queries, heads * channels)``.
    """
    if _fuses(value):
        return _Fused.apply(value, *_tables(tuple(map(tuple, sizes)), value.device), locations, weights)
    return _by_grid_sampling(value, sizes, locations, weights)


def _by_grid_sampling(value, sizes, locations, weights) -> torch.Tensor:
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    grids = 2 * locations - 1
    samples = []
    for level, (maps, size) in enumerate(zip(value.split([h * w for h, w in sizes], dim=1), sizes, strict=True)):
        maps = maps.permute(0, 2, 3, 1).reshape(batch * heads, channels, *size)
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)  # (B heads, queries, points, 2)
        samples.append(F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    sampled = torch.stack(samples, dim=-2).flatten(-2)  # (B heads, channels, queries, levels points)
    weights = weights.transpose(1, 2).flatten(3).flatten(0, 1)[:, None]
    out = (sampled * weights).sum(-1).view(batch, heads * channels, queries)
    return out.transpose(1, 2).contiguous()


def ms_deform_attn_forward(
    value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights, im2col_step
):
    """Return :func:`multi_scale_deformable_attention` under mmcv's calling convention."""
    if _fuses(value):
        tables = value_spatial_shapes, value_level_start_index
        return _fused_forward(value, *tables, sampling_locations, attention_weights)
    return _by_grid_sampling(value, value_spatial_shapes.tolist(), sampling_locations, attention_weights)


def ms_deform_attn_backward(
    value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights, grad_output,
    grad_value, grad_sampling_loc, grad_attn_weight, im2col_step,
):  # fmt: skip
    """Write the gradients of the values, the sampling locations and the weights."""
    if _fuses(value):
        tables = value_spatial_shapes, value_level_start_index
        gradients = _fused_backward(grad_output, value, *tables, sampling_locations, attention_weights)
    else:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (value, sampling_locations, attention_weights)]
            out = _by_grid_sampling(leaves[0], value_spatial_shapes.tolist(), leaves[1], leaves[2])
            gradients = torch.autograd.grad(out, leaves, grad_output)
    for target, gradient in zip((grad_value, grad_sampling_loc, grad_attn_weight), gradients, strict=True):
        target.copy_(gradient)
