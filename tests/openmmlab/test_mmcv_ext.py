"""Every operator of the stand-in for mmcv's compiled extension, called as mmcv itself calls it.

The references are plain loops written for these tests, torchvision's documented operators, or finite differences.
"""

import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("mmengine", reason='needs OpenMMLab: pip install "visionmamba[openmmlab]"')
pytest.importorskip("mmcv", reason='needs OpenMMLab: pip install "visionmamba[openmmlab]"')

from visionmamba.openmmlab import mmcv_ext

if not mmcv_ext.install():
    pytest.skip("mmcv's compiled operators are installed: nothing stands in for them", allow_module_level=True)

import mmcv
import torchvision
from mmcv import ops
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch


def random(*size, seed=0, dtype=torch.float64):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniform(*size, seed=0, dtype=torch.float64):
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_boxes(count, size=20.0, seed=0, dtype=torch.float32):
    start = uniform(count, 2, seed=seed, dtype=dtype) * size
    return torch.cat([start, start + 1 + uniform(count, 2, seed=seed + 100, dtype=dtype) * size / 2], dim=1)


def gradcheck(function, *inputs):
    """Compare the backward operator with finite differences of the forward one, in float64."""
    assert torch.autograd.gradcheck(function, tuple(tensor.requires_grad_() for tensor in inputs))


# Boxes


def loop_iou(a, b, offset=0, over_first=False):
    width = max(min(a[2], b[2]) - max(a[0], b[0]) + offset, 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]) + offset, 0)
    area = [(box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (a, b)]
    return width * height / (area[0] if over_first else sum(area) - width * height)


def loop_soft_nms(boxes, scores, method, threshold, sigma, min_score, offset):
    """Soft-NMS of lists: pick the best, lower the others, drop those that fall below ``min_score``."""
    scores, left, kept = list(scores), list(range(len(boxes))), []
    while left:
        best = max(left, key=lambda i: scores[i])
        left.remove(best)
        kept.append((best, scores[best]))
        for i in list(left):
            iou = loop_iou(boxes[best], boxes[i], offset)
            if method == "gaussian":
                scores[i] *= math.exp(-iou * iou / sigma)
            elif iou >= threshold:
                scores[i] *= 1 - iou if method == "linear" else 0
            if scores[i] < min_score:
                left.remove(i)
    return kept


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("mode", ["iou", "iof"])
def test_bbox_overlaps(mode, offset):
    first, second = random_boxes(7), random_boxes(5, seed=1)
    expected = [[loop_iou(a, b, offset, mode == "iof") for b in second.tolist()] for a in first.tolist()]
    actual = ops.bbox_overlaps(first, second, mode=mode, offset=offset)
    torch.testing.assert_close(actual, torch.tensor(expected), atol=1e-5, rtol=1e-5)
    aligned = ops.bbox_overlaps(first[:5], second, mode=mode, aligned=True, offset=offset)
    torch.testing.assert_close(aligned, actual[:5].diagonal())
    assert actual.max() > 0
    assert ops.bbox_overlaps(first[:0], second).shape == (0, 5)


@pytest.mark.parametrize("offset", [0, 1])
def test_nms(offset):
    boxes, scores = random_boxes(40, size=12), uniform(40, dtype=torch.float32)
    kept = []
    for i in scores.argsort(descending=True).tolist():
        if all(loop_iou(boxes[i].tolist(), boxes[j].tolist(), offset) <= 0.3 for j in kept):
            kept.append(i)
    detections, indices = ops.nms(boxes, scores, 0.3, offset=offset)
    assert indices.tolist() == kept
    assert 1 < len(kept) < 40
    torch.testing.assert_close(detections, torch.cat([boxes, scores[:, None]], dim=1)[kept])
    assert ops.nms(boxes, scores, 0.3, offset=offset, max_num=2)[1].tolist() == kept[:2]
    above = ops.nms(boxes, scores, 0.3, offset=offset, score_threshold=0.5)[1].tolist()
    assert above == [i for i in kept if scores[i] > 0.5]


def test_nms_of_nothing():
    boxes = torch.zeros(0, 4)
    assert ops.nms(boxes, boxes[:, 0], 0.5)[0].shape == (0, 5)
    assert ops.soft_nms(boxes, boxes[:, 0])[0].shape == (0, 5)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
def test_soft_nms(method, offset):
    boxes, scores = random_boxes(25, size=8), uniform(25, dtype=torch.float32)
    kept = loop_soft_nms(boxes.tolist(), scores.tolist(), method, 0.3, 0.5, 0.05, offset)
    detections, indices = ops.soft_nms(
        boxes, scores, iou_threshold=0.3, sigma=0.5, min_score=0.05, method=method, offset=offset
    )
    assert indices.tolist() == [i for i, _ in kept]
    assert len(kept) < 25
    torch.testing.assert_close(detections[:, :4], boxes[indices])
    torch.testing.assert_close(detections[:, 4], torch.tensor([score for _, score in kept]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scores, uniform(25, dtype=torch.float32))  # the caller's are untouched


def test_nms_match():
    boxes, scores = random_boxes(20, size=8), uniform(20, dtype=torch.float32)
    groups = [group.tolist() for group in ops.nms_match(torch.cat([boxes, scores[:, None]], dim=1), 0.4)]
    assert sorted(i for group in groups for i in group) == list(range(20))
    left = scores.argsort(descending=True).tolist()
    for group in groups:
        overlapping = [i for i in left if loop_iou(boxes[left[0]].tolist(), boxes[i].tolist()) >= 0.4]
        assert group == overlapping
        left = [i for i in left if i not in group]
    assert any(len(group) > 1 for group in groups)


@pytest.mark.parametrize("split_thr", [10000, 3])
@pytest.mark.parametrize("kind", ["nms", "soft_nms"])
def test_batched_nms_keeps_classes_apart(kind, split_thr):
    boxes, scores = random_boxes(30, size=8), uniform(30, dtype=torch.float32)
    classes = torch.arange(30) % 3
    _, kept = ops.batched_nms(boxes, scores, classes, dict(type=kind, iou_threshold=0.3, split_thr=split_thr))
    function = getattr(ops, kind)
    expected = []
    for label in range(3):
        members = (classes == label).nonzero().flatten()
        expected += members[function(boxes[members], scores[members], iou_threshold=0.3)[1]].tolist()
    assert sorted(kept.tolist()) == sorted(expected)


def test_multiclass_nms():
    bbox_nms = pytest.importorskip("mmdet.models.layers.bbox_nms", reason="needs mmdet")
    boxes, scores = random_boxes(15, size=8), uniform(15, 4, dtype=torch.float32)
    detections, labels = bbox_nms.multiclass_nms(boxes, scores, 0.3, dict(type="nms", iou_threshold=0.3), max_num=-1)
    for label in range(3):  # the fourth is the background
        above = (scores[:, label] > 0.3).nonzero().flatten()
        expected, _ = ops.nms(boxes[above], scores[above, label], 0.3)
        torch.testing.assert_close(detections[labels == label], expected)


# Regions of interest

REGIONS = torch.tensor(
    [
        [0, 1.0, 2.0, 9.0, 7.5],
        [1, 0.0, 0.0, 15.0, 11.0],
        [1, -6.0, -4.0, 5.0, 3.0],  # partly outside
        [0, 12.3, 8.1, 30.0, 25.0],
        [0, 40.0, 40.0, 50.0, 50.0],  # wholly outside
        [1, 5.2, 5.3, 5.4, 5.5],  # smaller than a pixel
    ]
)


def loop_sample(image, y, x):
    """Bilinear sample of (H, W): zero more than a pixel outside, the border's value less than one outside."""
    height, width = image.shape
    if y < -1 or y > height or x < -1 or x > width:
        return image[0, 0] * 0
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    upper = image[top, left] * (1 - dx) + image[top, right] * dx
    return upper * (1 - dy) + (image[bottom, left] * (1 - dx) + image[bottom, right] * dx) * dy


def loop_roi_align(maps, regions, size, scale, ratio, mode, aligned):
    out = maps.new_zeros(len(regions), maps.shape[1], *size)
    for n, (index, *box) in enumerate(regions.tolist()):
        x1, y1, x2, y2 = (value * scale - (0.5 if aligned else 0) for value in box)
        width, height = x2 - x1, y2 - y1
        if not aligned:
            width, height = max(width, 1), max(height, 1)
        bin_y, bin_x = height / size[0], width / size[1]
        count_y, count_x = (ratio, ratio) if ratio > 0 else (math.ceil(bin_y), math.ceil(bin_x))
        for c in range(maps.shape[1]):
            for i in range(size[0]):
                for j in range(size[1]):
                    samples = [
                        loop_sample(
                            maps[int(index), c],
                            y1 + (i + (p + 0.5) / count_y) * bin_y,
                            x1 + (j + (q + 0.5) / count_x) * bin_x,
                        )
                        for p in range(count_y)
                        for q in range(count_x)
                    ]
                    values = torch.stack(samples)
                    out[n, c, i, j] = values.max() if mode == "max" else values.mean()
    return out


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_roi_align(mode, ratio, aligned):
    maps = random(2, 2, 6, 8)
    arguments = ((3, 2), 0.5, ratio, mode, aligned)
    regions = REGIONS.double()
    reference, leaf = maps.clone().requires_grad_(), maps.clone().requires_grad_()
    expected, actual = loop_roi_align(reference, regions, *arguments), ops.roi_align(leaf, regions, *arguments)
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)
    cotangent = random(*actual.shape, seed=1)
    for out in (expected, actual):
        out.backward(cotangent)
    torch.testing.assert_close(leaf.grad, reference.grad, atol=1e-9, rtol=1e-9)
    assert actual[4].abs().max() == 0
    assert leaf.grad.abs().sum() > 0


def test_roi_align_agrees_with_torchvision_in_float32():
    maps = random(2, 3, 6, 8, dtype=torch.float32)
    actual = ops.RoIAlign(4, 0.5, 0)(maps, REGIONS)
    torch.testing.assert_close(actual, torchvision.ops.roi_align(maps, REGIONS, 4, 0.5, aligned=True))


def loop_roi_pool(maps, regions, size, scale):
    out = maps.new_zeros(len(regions), maps.shape[1], *size)
    height, width = maps.shape[2:]
    for n, (index, x1, y1, x2, y2) in enumerate(regions.tolist()):
        x1, y1, x2, y2 = x1 * scale, y1 * scale, (x2 + 1) * scale, (y2 + 1) * scale
        for i in range(size[0]):
            for j in range(size[1]):
                rows = range(math.floor(y1 + i * (y2 - y1) / size[0]), math.ceil(y1 + (i + 1) * (y2 - y1) / size[0]))
                columns = range(math.floor(x1 + j * (x2 - x1) / size[1]), math.ceil(x1 + (j + 1) * (x2 - x1) / size[1]))
                pixels = [(y, x) for y in rows for x in columns if 0 <= y < height and 0 <= x < width]
                if pixels:
                    out[n, :, i, j] = torch.stack([maps[int(index), :, y, x] for y, x in pixels]).max(0).values
    return out


def test_roi_pool():
    maps = random(2, 3, 6, 8)
    reference, leaf = maps.clone().requires_grad_(), maps.clone().requires_grad_()
    expected = loop_roi_pool(reference, REGIONS.double(), (3, 2), 0.5)
    actual = ops.roi_pool(leaf, REGIONS.double(), (3, 2), 0.5)
    torch.testing.assert_close(actual, expected)
    cotangent = random(*actual.shape, seed=1)
    for out in (expected, actual):
        out.backward(cotangent)
    torch.testing.assert_close(leaf.grad, reference.grad)
    assert actual[4].abs().max() == 0


@pytest.mark.parametrize("pool", [ops.RoIAlign((3, 2), pool_mode="max"), ops.RoIAlign((3, 2)), ops.RoIPool((3, 2))])
def test_no_regions(pool):
    maps = random(1, 2, 4, 4).requires_grad_()
    out = pool(maps, torch.zeros(0, 5, dtype=maps.dtype))
    assert out.shape == (0, 2, 3, 2)
    out.sum().backward()
    assert maps.grad.abs().sum() == 0


# Focal losses


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_sigmoid_focal_loss(reduction, weighted):
    logits, target = random(6, 3), torch.tensor([0, 2, 3, 1, 3, 0])  # 3 is the background
    weight = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64) if weighted else None
    expected = torchvision.ops.sigmoid_focal_loss(logits, F.one_hot(target, 4)[:, :3].double(), 0.3, 1.7)
    if weighted:
        expected = expected * torch.cat([weight, weight.new_ones(1)])[target][:, None]
    expected = {"none": expected, "sum": expected.sum(), "mean": expected.sum() / 6}[reduction]

    def loss(x):
        return ops.sigmoid_focal_loss(x, target, 1.7, 0.3, weight, reduction)

    torch.testing.assert_close(loss(logits), expected)
    gradcheck(loss, logits)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_softmax_focal_loss(reduction, weighted):
    logits, target = random(6, 4), torch.tensor([0, 2, 3, 1, -1, 0])  # a negative one is ignored
    weight = torch.tensor([0.5, 2.0, 1.5, 1.0], dtype=torch.float64) if weighted else None
    expected = []
    for row, label in zip(logits.softmax(1).tolist(), target.tolist(), strict=True):
        p = row[label]
        scale = weight[label].item() if weighted else 1
        expected.append(-0.3 * scale * (1 - p) ** 1.7 * math.log(p) if label >= 0 else 0.0)
    expected = torch.tensor(expected, dtype=torch.float64)
    expected = {"none": expected, "sum": expected.sum(), "mean": expected.sum() / 6}[reduction]

    def loss(x):
        return ops.softmax_focal_loss(x, target, 1.7, 0.3, weight, reduction)

    torch.testing.assert_close(loss(logits), expected)
    if reduction != "none":  # mmcv multiplies (N, C) by the (N,) cotangent, so it has none to check
        gradcheck(loss, logits)


def test_focal_losses_at_saturated_logits_and_without_samples():
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    for gamma in (0.0, 0.5, 2.0):
        for loss in (ops.sigmoid_focal_loss, ops.softmax_focal_loss):
            value = loss(logits, torch.tensor([0, 0]), gamma, 0.25, None, "sum")
            (gradient,) = torch.autograd.grad(value, logits)
            assert value.isfinite()
            assert gradient.isfinite().all()
    empty = ops.sigmoid_focal_loss(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), 2.0, 0.25, None, "sum")
    assert empty == 0


def test_sigmoid_focal_loss_takes_a_target_out_of_range_as_background():
    logits = random(2, 3)
    values = [ops.sigmoid_focal_loss(logits, torch.tensor([0, out]), 2.0, 0.25, None, "none") for out in (-1, 3)]
    torch.testing.assert_close(*values)


# Deformable convolutions and attention


def loop_deform_conv(x, offset, weight, mask, bias, stride, padding, dilation, groups, deform_groups):
    """Convolution that samples each tap at its own place; offsets are (y, x) pairs of each tap."""
    batch, channels, height, width = x.shape
    out_channels, group_channels, kernel_h, kernel_w = weight.shape
    rows = (height + 2 * padding - dilation * (kernel_h - 1) - 1) // stride + 1
    columns = (width + 2 * padding - dilation * (kernel_w - 1) - 1) // stride + 1
    taps = [(i, j) for i in range(kernel_h) for j in range(kernel_w)]
    result = []
    for b, o, r, c in [(b, o, r, c) for b in range(batch) for o in range(out_channels)
                       for r in range(rows) for c in range(columns)]:  # fmt: skip
        total = bias[o] if bias is not None else x.new_zeros(())
        for k in range(group_channels):
            channel = o // (out_channels // groups) * group_channels + k
            deform = channel // (channels // deform_groups)
            for t, (i, j) in enumerate(taps):
                place = deform * len(taps) + t
                y = r * stride - padding + i * dilation + offset[b, 2 * place, r, c]
                z = c * stride - padding + j * dilation + offset[b, 2 * place + 1, r, c]
                scale = mask[b, place, r, c] if mask is not None else 1
                total = total + weight[o, k, i, j] * scale * zero_padded_sample(x[b, channel], y, z)
        result.append(total)
    return torch.stack(result).view(batch, out_channels, rows, columns)


def zero_padded_sample(image, y, x):
    """Bilinear sample of an image that is zero outside, differentiable in the place too: from the right at a pixel."""
    total = image.new_zeros(())
    if not (-1 < y < image.shape[0] and -1 < x < image.shape[1]):
        return total
    top, left = math.floor(float(y.detach())), math.floor(float(x.detach()))
    for row, near_row in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, near_column in ((left, 1 - (x - left)), (left + 1, x - left)):
            if 0 <= row < image.shape[0] and 0 <= column < image.shape[1]:
                total = total + image[row, column] * near_row * near_column
    return total


GEOMETRIES = [(1, 1, 1, 1, 1), (2, 1, 1, 2, 1), (1, 2, 2, 1, 2), (2, 0, 1, 2, 2)]
"""Stride, padding, dilation, groups, deformable groups."""


def deformable_inputs(stride, padding, dilation, groups, deform_groups):
    """Return input, offset, mask, weight and bias."""
    x, weight = random(2, 4, 3, 4), random(2, 4 // groups, 3, 2, seed=1)
    rows = (3 + 2 * padding - dilation * 2 - 1) // stride + 1
    columns = (4 + 2 * padding - dilation - 1) // stride + 1
    offset = random(2, deform_groups * 12, rows, columns, seed=2)
    mask = uniform(2, deform_groups * 6, rows, columns, seed=3)
    return x, offset, mask, weight, random(2, seed=4)


def check_same_gradients(functions, inputs):
    """Compare values and the gradients of a random projection."""
    results = []
    for function in functions:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        out = function(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, random(*out.shape, seed=9))])
    torch.testing.assert_close(results[0], results[1], atol=1e-9, rtol=1e-9)
    assert all(tensor.abs().sum() > 0 for tensor in results[0])


@pytest.mark.parametrize("scale", [1.0, 0.0], ids=["moved", "at_pixels"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_deform_conv(geometry, scale):
    """Also where every sample lies on a pixel, as in a new layer: on the border -1, the derivative is zero."""
    x, offset, _, weight, _ = deformable_inputs(*geometry)
    offset = offset * scale
    check_same_gradients(
        (
            lambda x, offset, weight: ops.deform_conv2d(x, offset, weight, *geometry),
            lambda x, offset, weight: loop_deform_conv(x, offset, weight, None, None, *geometry),
        ),
        (x, offset, weight),
    )


@pytest.mark.parametrize("scale", [1.0, 0.0], ids=["moved", "at_pixels"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_modulated_deform_conv(geometry, with_bias, scale):
    x, offset, mask, weight, bias = deformable_inputs(*geometry)
    offset = offset * scale
    check_same_gradients(
        (
            lambda x, o, m, w, b=None: ops.modulated_deform_conv2d(x, o, m, w, b, *geometry),
            lambda x, o, m, w, b=None: loop_deform_conv(x, o, w, m, b, *geometry),
        ),
        (x, offset, mask, weight, bias) if with_bias else (x, offset, mask, weight),
    )


def loop_attention(value, shapes, locations, weights):
    batch, queries, heads, _levels, points = weights.shape
    rows = []
    for b, q, h in [(b, q, h) for b in range(batch) for q in range(queries) for h in range(heads)]:
        total = value.new_zeros(value.shape[-1])
        start = 0
        for level, (height, width) in enumerate(shapes.tolist()):
            maps = value[b, start : start + height * width, h].view(height, width, -1)
            start += height * width
            for p in range(points):
                x, y = locations[b, q, h, level, p, 0] * width - 0.5, locations[b, q, h, level, p, 1] * height - 0.5
                sample = torch.stack([zero_padded_sample(maps[..., c], y, x) for c in range(maps.shape[-1])])
                total = total + weights[b, q, h, level, p] * sample
        rows.append(total)
    return torch.stack(rows).view(batch, queries, -1)


def test_ms_deform_attn():
    shapes = torch.tensor([[4, 3], [2, 2]])
    starts = torch.tensor([0, 12])
    inputs = (
        random(2, 16, 2, 3),
        uniform(2, 5, 2, 2, 2, 2, seed=1) * 1.4 - 0.2,  # some outside
        uniform(2, 5, 2, 2, 2, seed=2),
    )
    check_same_gradients(
        (
            lambda v, xy, w: MultiScaleDeformableAttnFunction.apply(v, shapes, starts, xy, w, 64),
            lambda v, xy, w: loop_attention(v, shapes, xy, w),
        ),
        inputs,
    )
    own = multi_scale_deformable_attn_pytorch(inputs[0], shapes, *inputs[1:])
    torch.testing.assert_close(MultiScaleDeformableAttnFunction.apply(inputs[0], shapes, starts, *inputs[1:], 64), own)


# The module


def test_operator_without_a_stand_in_names_itself():
    with pytest.raises(NotImplementedError, match=r"'nms_rotated'.*install a compiled mmcv"):
        ops.nms_rotated(torch.zeros(1, 5), torch.zeros(1), 0.5)
    assert not hasattr(sys.modules["mmcv._ext"], "__path__")


def test_stand_in_says_so_once(monkeypatch, caplog):
    monkeypatch.delitem(sys.modules, "mmcv._ext")
    with caplog.at_level("WARNING", logger="visionmamba.openmmlab"):
        assert mmcv_ext.install()
        assert mmcv_ext.install()
    assert [record.message for record in caplog.records] == [
        "mmcv has no compiled operators here: 19 of them run on torchvision and PyTorch instead"
    ]


def test_compiled_extension_is_preferred(monkeypatch, tmp_path):
    (tmp_path / "_ext.py").write_text("")
    monkeypatch.delitem(sys.modules, "mmcv._ext")
    monkeypatch.setattr(mmcv, "__path__", [*mmcv.__path__, str(tmp_path)])
    assert not mmcv_ext.install()
    assert "mmcv._ext" not in sys.modules


def test_loaded_extension_stays(monkeypatch):
    loaded = types.ModuleType("mmcv._ext")
    monkeypatch.setitem(sys.modules, "mmcv._ext", loaded)
    assert not mmcv_ext.install()
    assert sys.modules["mmcv._ext"] is loaded


@pytest.mark.parametrize("operator", ["roi_align", "deform_conv", "modulated_deform_conv"])
def test_bfloat16_is_rounded_once(operator):
    """torchvision has no such kernels: the same as in float32, values and gradients rounded."""
    x, offset, mask, weight, _ = deformable_inputs(*GEOMETRIES[0])
    rois = torch.tensor([[0, 0.5, 0.5, 2.5, 2.0], [1, 0.0, 1.0, 3.0, 2.5]])
    functions = {
        "roi_align": (lambda x: ops.roi_align(x, rois.to(x), (2, 2), 1.0, 2, "avg", True), (x,)),
        "deform_conv": (lambda x, o, w: ops.deform_conv2d(x, o, w, 1, 1), (x, offset, weight)),
        "modulated_deform_conv": (
            lambda x, o, m, w: ops.modulated_deform_conv2d(x, o, m, w, None, 1, 1), (x, offset, mask, weight)
        ),
    }  # fmt: skip
    function, inputs = functions[operator]
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [tensor.bfloat16().to(dtype).requires_grad_() for tensor in inputs]
        out = function(*leaves)
        assert out.dtype == dtype
        grad = random(*out.shape, seed=9).bfloat16().to(dtype)
        results.append([out.float(), *(g.float() for g in torch.autograd.grad(out, leaves, grad))])
    torch.testing.assert_close(results[1], results[0], rtol=2**-8, atol=2**-8)
