"""Time the training of detectors on made-up images, side by side: ``python tools/bench_det.py CONFIG [CONFIG ...]``.

One step is the preprocessing of a batch on the device, forward, backward and the optimizer's update; reading images is
not in it. Every config starts from random weights and runs in the same process, one after the other. By default the
zoo's VMamba-T beside mmdetection's Swin-T, Mask R-CNN at 800x1280 with two images, in float32 and in mixed precision.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import logging
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.structures import InstanceData

from visionmamba._files import replacing
from visionmamba.openmmlab.runner import build_model, load_config

_DEFAULT = (
    "configs/detection/vmamba/mask-rcnn_vmamba-t-s1l8_fpn_1x_coco.py",
    "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py",
)
_OBJECTS = 8


def make_batch(count: int, height: int, width: int) -> dict:
    """Return a batch of noise with boxes and masks, as a data loader gives it.

    Args:
        count: Images.
        height: Of the images, in pixels.
        width: Of the images, in pixels.
    """
    from mmdet.structures import DetDataSample  # after mmcv's operators are in place
    from mmdet.structures.mask import BitmapMasks

    rng = np.random.default_rng(0)
    samples, images = [], []
    for _ in range(count):
        corners = rng.uniform(0, 0.7, (_OBJECTS, 2)) * (width, height)
        sizes = rng.uniform(0.1, 0.3, (_OBJECTS, 2)) * (width, height)
        boxes = np.concatenate([corners, corners + sizes], axis=1).astype(np.float32)
        masks = np.zeros((_OBJECTS, height, width), np.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.astype(int), strict=True):
            mask[y1:y2, x1:x2] = 1
        shape = (height, width)
        meta = dict(img_shape=shape, ori_shape=shape, pad_shape=shape, scale_factor=(1.0, 1.0))
        sample = DetDataSample(metainfo=meta)
        sample.gt_instances = InstanceData(
            bboxes=torch.from_numpy(boxes), labels=torch.arange(_OBJECTS), masks=BitmapMasks(masks, height, width)
        )
        samples.append(sample)
        images.append(torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8)))
    return {"inputs": images, "data_samples": samples}


def build_optimizer(model: torch.nn.Module, settings: dict, precision: str) -> OptimWrapper:
    """Return a config's optimizer for a precision.

    Args:
        model: The detector.
        settings: The config's ``optim_wrapper``.
        precision: ``float32``, or ``float16`` or ``bfloat16`` for mixed precision.
    """
    mixed = {} if precision == "float32" else {"type": "AmpOptimWrapper", "dtype": precision}
    return build_optim_wrapper(model, {**settings, "type": "OptimWrapper", **mixed})


def time_training(name: str, precision: str, options: argparse.Namespace) -> dict:
    """Time one config's training steps.

    Args:
        name: Of the config.
        precision: As for :func:`build_optimizer`.
        options: The command line's.

    Returns:
        Images a second, and the most memory allocated in MiB on a GPU.
    """
    config = load_config(name)
    config.model.backbone.init_cfg = None
    device = torch.device(options.device)
    model = revert_sync_batchnorm(build_model(config)).train()
    model.init_weights()
    model.to(device)
    optimizer = build_optimizer(model, config.optim_wrapper, precision)
    batch = make_batch(options.batch_size, *options.shape)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    for _ in range(options.warmup + options.steps):
        data = copy.deepcopy(batch)
        if cuda:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        model.train_step(data, optimizer)
        if cuda:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[options.warmup :])
    result = {
        "config": name,
        "precision": precision,
        "img_per_s": options.batch_size / seconds,
        "step_ms": 1000 * seconds,
    }
    if cuda:
        result["max_memory_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    return result


def main() -> None:
    """Parse the command line, print a line for each config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", default=_DEFAULT, metavar="config")
    parser.add_argument("--shape", nargs=2, type=int, default=(800, 1280), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=8)
    parser.add_argument(
        "--precision", nargs="+", choices=("float32", "float16", "bfloat16"), default=("float32", "bfloat16"),
        help="float32, or mixed precision of a type (float32 bfloat16)",
    )  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    MMLogger.get_instance("bench_det", logger_name="mmengine", log_level=logging.WARNING)
    on_gpu = options.device.startswith("cuda")
    content = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu", "torch": torch.__version__,
        "shape": list(options.shape), "batch_size": options.batch_size,
        "tf32": torch.backends.cuda.matmul.allow_tf32, "results": [],
    }  # fmt: skip
    for precision, name in itertools.product(options.precision, options.configs):
        result = time_training(name, precision, options)
        content["results"].append(result)
        print(f"{result['img_per_s']:8.2f} img/s {result['step_ms']:9.1f} ms/step  {precision:8}  {name}", flush=True)
        if options.output:
            with replacing(options.output) as temporary:
                temporary.write_text(json.dumps(content, indent=1))
        if on_gpu:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
