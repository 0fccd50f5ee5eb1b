"""Box operators: overlaps and the non-maximum suppressions."""

from __future__ import annotations

import torch
import torchvision

__all__ = ["bbox_overlaps", "nms", "nms_match", "softnms"]

_LINEAR, _GAUSSIAN = 1, 2


def _grown(boxes: torch.Tensor, offset: int) -> torch.Tensor:
    """Boxes whose plain width and height are those of the pixel convention (x2 - x1 + offset)."""
    return boxes + boxes.new_tensor([0, 0, offset, offset])


def _overlaps(boxes1: torch.Tensor, boxes2: torch.Tensor, mode: int = 0, offset: int = 0) -> torch.Tensor:
    """Intersection over union (mode 0) or over the first box (mode 1), broadcast over leading dimensions."""
    boxes1, boxes2 = _grown(boxes1, offset), _grown(boxes2, offset)
    size = (torch.minimum(boxes1[..., 2:], boxes2[..., 2:]) - torch.maximum(boxes1[..., :2], boxes2[..., :2])).clamp(0)
    intersection = size.prod(-1)
    base = (boxes1[..., 2:] - boxes1[..., :2]).prod(-1)
    if mode == 0:
        base = base + (boxes2[..., 2:] - boxes2[..., :2]).prod(-1) - intersection
    return intersection / base


def bbox_overlaps(bboxes1, bboxes2, ious, mode, aligned, offset):
    """Write the overlaps of two sets of boxes (x1, y1, x2, y2) into ``ious``."""
    ious.copy_(_overlaps(bboxes1 if aligned else bboxes1[:, None], bboxes2, mode, offset))


def nms(boxes, scores, iou_threshold, offset):
    """Return the indices that greedy suppression keeps, best first."""
    return torchvision.ops.nms(_grown(boxes.float(), offset), scores.float(), iou_threshold)


def softnms(boxes, scores, dets, iou_threshold, sigma, min_score, method, offset):
    """Suppress by lowering scores (Bodla et al. 2017, Soft-NMS); fill ``dets`` and return the kept indices, best first.

    Methods: 0 drops overlapping boxes, 1 scales their scores by 1 - IoU, 2 by exp(-IoU^2 / sigma).
    """
    scores = scores.clone()
    remaining = torch.arange(scores.numel(), device=scores.device)
    kept: list[int] = []
    while remaining.numel():
        best = int(remaining[scores[remaining].argmax()])
        dets[len(kept), :4] = boxes[best]
        dets[len(kept), 4] = scores[best]
        kept.append(best)
        remaining = remaining[remaining != best]
        iou = _overlaps(boxes[best], boxes[remaining], offset=offset)
        if method == _GAUSSIAN:
            weight = torch.exp(-(iou * iou) / sigma)
        else:
            reduced = 1 - iou if method == _LINEAR else torch.zeros_like(iou)
            weight = torch.where(iou >= iou_threshold, reduced, torch.ones_like(iou))
        scores[remaining] *= weight
        remaining = remaining[scores[remaining] >= min_score]
    return torch.tensor(kept, dtype=torch.long, device=scores.device)


def nms_match(dets, iou_threshold):
    """Group boxes (N, 5) with scores: each kept box followed by the boxes it suppresses, in score order."""
    remaining = dets[:, 4].argsort(descending=True, stable=True)
    groups = []
    while remaining.numel():
        iou = _overlaps(dets[remaining[0], :4], dets[remaining, :4])
        matched = iou >= iou_threshold
        matched[0] = True
        groups.append(remaining[matched].tolist())
        remaining = remaining[~matched]
    return groups
