"""Region of interest operators: RoIAlign (average and maximum) and RoIPool."""

from __future__ import annotations

import math

import torch
import torchvision

__all__ = ["roi_align_backward", "roi_align_forward", "roi_pool_backward", "roi_pool_forward"]

_MAX = 0


def _supported(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in a type that torchvision has kernels for: not bfloat16."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _samples(roi, height, width, spatial_scale, sampling_ratio, aligned):
    """Sampling coordinates of one region: y ``(height, n_y)`` and x ``(width, n_x)``."""
    start_x, start_y, end_x, end_y = (roi[1:] * spatial_scale - (0.5 if aligned else 0.0)).tolist()
    roi_width, roi_height = end_x - start_x, end_y - start_y
    if not aligned:
        roi_width, roi_height = max(roi_width, 1.0), max(roi_height, 1.0)

    def axis(start: float, size: float, bins: int) -> torch.Tensor:
        count = sampling_ratio if sampling_ratio > 0 else max(1, math.ceil(size / bins))
        bin_size = size / bins
        offsets = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        return start + (torch.arange(bins, dtype=torch.float64)[:, None] + offsets) * bin_size

    return axis(start_y, roi_height, height), axis(start_x, roi_width, width)


def _corners(coordinate: torch.Tensor, size: int):
    """Neighbouring indices and weights for linear interpolation; weight 0 outside [-1, size]."""
    inside = (coordinate >= -1.0) & (coordinate <= size)
    clamped = coordinate.clamp(0, size - 1)
    low = clamped.floor().long()
    high = (low + 1).clamp(max=size - 1)
    fraction = clamped - low
    return low, high, (1 - fraction) * inside, fraction * inside


def _bilinear(image: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Sample (C, H, W) at broadcast coordinates."""
    y0, y1, wy0, wy1 = (t.to(image.device) for t in _corners(y, image.shape[1]))
    x0, x1, wx0, wx1 = (t.to(image.device) for t in _corners(x, image.shape[2]))
    value = image[:, y0, x0] * (wy0 * wx0) + image[:, y0, x1] * (wy0 * wx1)
    return (value + image[:, y1, x0] * (wy1 * wx0) + image[:, y1, x1] * (wy1 * wx1)).to(image.dtype)


def _roi_align_max(input, rois, output, argmax_y, argmax_x, spatial_scale, sampling_ratio, aligned):
    height, width = output.shape[2:]
    for index, roi in enumerate(rois):
        y, x = _samples(roi, height, width, spatial_scale, sampling_ratio, aligned)
        grid_y = y[:, None, :, None].expand(-1, width, -1, x.shape[1])  # (height, width, n_y, n_x)
        grid_x = x[None, :, None, :].expand(height, -1, y.shape[1], -1)
        values = _bilinear(input[int(roi[0])], grid_y, grid_x).flatten(3)
        best, where = values.max(-1)
        output[index] = best
        for store, grid in ((argmax_y, grid_y), (argmax_x, grid_x)):
            coordinates = grid.flatten(2).to(output).expand(values.shape)
            store[index] = coordinates.gather(-1, where.unsqueeze(-1)).squeeze(-1)


def roi_align_forward(
    input, rois, output, argmax_y, argmax_x, aligned_height, aligned_width, spatial_scale, sampling_ratio, pool_mode,
    aligned,
):  # fmt: skip
    """Pool regions (index, x1, y1, x2, y2) of feature maps by interpolation (He et al. 2017, Mask R-CNN)."""
    if pool_mode == _MAX:
        _roi_align_max(input, rois, output, argmax_y, argmax_x, spatial_scale, sampling_ratio, aligned)
        return
    size = (aligned_height, aligned_width)
    input = _supported(input)
    output.copy_(torchvision.ops.roi_align(input, rois.to(input), size, spatial_scale, sampling_ratio, aligned))


def roi_align_backward(
    grad_output, rois, argmax_y, argmax_x, grad_input, aligned_height, aligned_width, spatial_scale, sampling_ratio,
    pool_mode, aligned,
):  # fmt: skip
    """Add the gradient of :func:`roi_align_forward` to ``grad_input``."""
    if pool_mode != _MAX:
        batch, channels, height, width = grad_input.shape
        grad_output = _supported(grad_output)
        grad_input += torch.ops.torchvision._roi_align_backward(
            grad_output, rois.to(grad_output), spatial_scale, aligned_height, aligned_width, batch, channels, height,
            width, sampling_ratio, aligned,
        )  # fmt: skip
        return
    channel = torch.arange(grad_input.shape[1], device=grad_input.device)[:, None, None]
    for index, roi in enumerate(rois):
        image = grad_input[int(roi[0])]
        y0, y1, wy0, wy1 = _corners(argmax_y[index], image.shape[1])
        x0, x1, wx0, wx1 = _corners(argmax_x[index], image.shape[2])
        for y, x, weight in ((y0, x0, wy0 * wx0), (y0, x1, wy0 * wx1), (y1, x0, wy1 * wx0), (y1, x1, wy1 * wx1)):
            image.index_put_((channel.expand_as(y), y, x), grad_output[index] * weight, accumulate=True)


def _bins(start: float, end: float, count: int, size: int) -> list[slice]:
    """Pixel ranges of RoIPool's bins along one axis."""
    step = (end - start) / count
    limits = [(math.floor(i * step + start), math.ceil((i + 1) * step + start)) for i in range(count)]
    return [slice(min(max(low, 0), size), min(max(high, 0), size)) for low, high in limits]


def roi_pool_forward(input, rois, output, argmax, pooled_height, pooled_width, spatial_scale):
    """Take the maximum of each bin of each region (Girshick 2015, Fast R-CNN), with mmcv's unrounded bins."""
    height, width = input.shape[2:]
    argmax.fill_(-1)
    output.zero_()
    for index, roi in enumerate(rois.tolist()):
        image = input[int(roi[0])]
        x1, y1, x2, y2 = roi[1] * spatial_scale, roi[2] * spatial_scale, (roi[3] + 1) * spatial_scale, 0.0
        y2 = (roi[4] + 1) * spatial_scale
        if x2 <= x1 or y2 <= y1:
            continue
        for i, rows in enumerate(_bins(y1, y2, pooled_height, height)):
            for j, columns in enumerate(_bins(x1, x2, pooled_width, width)):
                region = image[:, rows, columns]
                if region[0].numel() == 0:
                    continue
                best, where = region.flatten(1).max(1)
                output[index, :, i, j] = best
                span = columns.stop - columns.start
                row, column = rows.start + where // span, columns.start + where % span
                argmax[index, :, i, j] = (row * width + column).to(argmax.dtype)


def roi_pool_backward(grad_output, rois, argmax, grad_input, pooled_height, pooled_width, spatial_scale):
    """Add the gradient of :func:`roi_pool_forward` to ``grad_input``."""
    flat = grad_input.flatten(2)
    for index, roi in enumerate(rois):
        where = argmax[index].flatten(1).long()
        gradient = grad_output[index].flatten(1) * (where >= 0)
        flat[int(roi[0])].scatter_add_(1, where.clamp(min=0), gradient)
