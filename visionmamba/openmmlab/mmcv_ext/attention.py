"""Multi-scale deformable attention (Zhu et al. 2021, Deformable DETR, eq. 3) by bilinear grid sampling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

__all__ = ["ms_deform_attn_backward", "ms_deform_attn_forward", "multi_scale_deformable_attention"]


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
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    grids = 2 * locations - 1
    samples = []
    for level, (maps, size) in enumerate(zip(value.split([h * w for h, w in sizes], dim=1), sizes, strict=True)):
        maps = maps.permute(0, 2, 3, 1).reshape(batch * heads, channels, *size)
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)  # (B heads, queries, points, 2)
        samples.append(F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    sampled = torch.stack(samples, dim=-2).flatten(-2)  # (B heads, channels, queries, levels points)
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1)
    out = (sampled * weights).sum(-1).view(batch, heads * channels, queries)
    return out.transpose(1, 2).contiguous()


def ms_deform_attn_forward(
    value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights, im2col_step
):
    """Return :func:`multi_scale_deformable_attention` under mmcv's calling convention."""
    sizes = value_spatial_shapes.tolist()
    return multi_scale_deformable_attention(value, sizes, sampling_locations, attention_weights)


def ms_deform_attn_backward(
    value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights, grad_output,
    grad_value, grad_sampling_loc, grad_attn_weight, im2col_step,
):  # fmt: skip
    """Write the gradients of the values, the sampling locations and the weights."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (value, sampling_locations, attention_weights)]
        sizes = value_spatial_shapes.tolist()
        out = multi_scale_deformable_attention(leaves[0], sizes, leaves[1], leaves[2])
        gradients = torch.autograd.grad(out, leaves, grad_output)
    for target, gradient in zip((grad_value, grad_sampling_loc, grad_attn_weight), gradients, strict=True):
        target.copy_(gradient)
