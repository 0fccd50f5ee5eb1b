"""Kill a training in the middle, resume it, and see that nothing is lost but the steps since the last checkpoint.

``python tools/check_resume.py WORK`` trains a micro segmentor and a micro detector on a few digit scenes through the
project's own tools, on the CPU, in a minute or two. The segmentor's recipe has no chance in it beyond the order of the
images, so a resumed training has to end with the very weights of one that was never stopped. The detector samples its
regions at random: its resumed training has to start from the last whole epoch, to finish and to be validated.

It runs with whatever OpenMMLab is installed; ``tools/check_originals.py`` runs it with OpenMMLab's own packages.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from make_digit_scenes import make_digit_scenes

ROOT = Path(__file__).resolve().parents[1]
_DIMS = "[24,48,64,96]"
_COMMON = [
    "model.backbone.model_name=test_vmamba", "model.backbone.drop_path_rate=0", "train_dataloader.batch_size=2",
    "train_dataloader.num_workers=0", "train_dataloader.persistent_workers=False", "val_dataloader.num_workers=0",
    "val_dataloader.persistent_workers=False", "test_dataloader.num_workers=0",
    "test_dataloader.persistent_workers=False", "default_hooks.logger.interval=1",
]  # fmt: skip
_SEGMENTOR = [
    "model.data_preprocessor.size=(96,96)", f"model.decode_head.in_channels={_DIMS}", "model.decode_head.channels=16",
    "model.decode_head.dropout_ratio=0", "model.auxiliary_head.in_channels=64", "model.auxiliary_head.channels=16",
    "model.auxiliary_head.dropout_ratio=0", "train_cfg.max_iters=24", "train_cfg.val_interval=24",
    "default_hooks.checkpoint.interval=8",
    "param_scheduler.0.end=4", "param_scheduler.1.begin=4", "param_scheduler.1.end=24",
]  # fmt: skip
_DETECTOR = [
    f"model.neck.in_channels={_DIMS}", "model.neck.out_channels=16", "model.rpn_head.in_channels=16",
    "model.rpn_head.feat_channels=16", "model.roi_head.bbox_roi_extractor.out_channels=16",
    "model.roi_head.mask_roi_extractor.out_channels=16", "model.roi_head.bbox_head.in_channels=16",
    "model.roi_head.bbox_head.fc_out_channels=32", "model.roi_head.mask_head.in_channels=16",
    "model.roi_head.mask_head.conv_out_channels=16", "model.roi_head.mask_head.num_convs=1",
    "model.train_cfg.rpn_proposal.max_per_img=50", "model.train_cfg.rcnn.sampler.num=32",
    "train_dataloader.dataset.pipeline.2.scale=(96,96)", "val_dataloader.dataset.pipeline.1.scale=(96,96)",
    "train_cfg.max_epochs=2", "train_cfg.val_interval=1", "param_scheduler.0.end=4",
]  # fmt: skip
_CONFIGS = {
    "seg": ("segmentation/digit_scenes/vmamba-t-s1l8_upernet_1xb16-4k_digit-scenes-256x256.py", _SEGMENTOR),
    "det": ("detection/digit_scenes/mask-rcnn_vmamba-t-s1l8_fpn_1xb16-36e_digit-scenes.py", _DETECTOR),
}
_STEP = {"seg": r"Iter\(train\) \[ *(\d+)/", "det": r"Epoch\(train\) +\[2\]\[ *(\d+)/"}


def _command(kind: str, scenes: Path, work: Path, *extra: str) -> list[str]:
    config, options = _CONFIGS[kind]
    roots = [f"{name}_dataloader.dataset.data_root={scenes}/" for name in ("train", "val", "test")]
    if kind == "det":
        roots += [f"{name}_evaluator.ann_file={scenes}/val/annotations.json" for name in ("val", "test")]
    script = [sys.executable, str(ROOT / "tools" / f"{kind}_train.py"), str(ROOT / "configs" / config)]
    return [*script, "--work-dir", str(work), *extra, "--cfg-options", *_COMMON, *options, *roots]


def train(kind: str, scenes: Path, work: Path, *extra: str, kill_at: int | None = None) -> str:
    """Run a training and return what it printed.

    Args:
        kind: ``seg`` or ``det``.
        scenes: Folder of digit scenes.
        work: Folder for logs and checkpoints.
        *extra: Further arguments of the tool.
        kill_at: Stop it by SIGKILL at this step: of all, or of the second epoch.

    Raises:
        RuntimeError: It fails, or ends before it is killed.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        _command(kind, scenes, work, *extra),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        step = re.search(_STEP[kind], line)
        if kill_at is not None and step and int(step[1]) >= kill_at:
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    status = process.wait()
    if status != (0 if kill_at is None else -signal.SIGKILL):
        raise RuntimeError(f"{kind}_train ended with status {status}:\n{''.join(lines[-30:])}")
    return "".join(lines)


def _steps(kind: str, output: str) -> list[int]:
    return [int(step) for step in re.findall(_STEP[kind], output)]


def _load(path: Path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=False)  # written a moment ago, by ourselves


def check_segmentor(scenes: Path, work: Path) -> None:
    """Compare an interrupted and resumed training with one that was not interrupted.

    Raises:
        RuntimeError: They differ.
    """
    whole = train("seg", scenes, work / "seg_whole")
    train("seg", scenes, work / "seg_killed", kill_at=12)
    resumed = train("seg", scenes, work / "seg_killed", "--resume")
    if _steps("seg", resumed) != list(range(9, 25)) or _steps("seg", whole) != list(range(1, 25)):
        raise RuntimeError(f"segmentor: resumed at the wrong step: {_steps('seg', resumed)}")
    expected, actual = (_load(work / name / "iter_24.pth") for name in ("seg_whole", "seg_killed"))
    for key, value in expected["state_dict"].items():
        if not torch.equal(value, actual["state_dict"][key]):
            raise RuntimeError(f"segmentor: {key} differs between the resumed and the uninterrupted training")
    for output in (whole, resumed):
        if "mIoU" not in output:
            raise RuntimeError("segmentor: not validated")


def check_detector(scenes: Path, work: Path) -> None:
    """See an interrupted training go on from its last epoch, and be validated with pycocotools.

    Raises:
        RuntimeError: It does not.
    """
    train("det", scenes, work / "det", kill_at=5)
    resumed = train("det", scenes, work / "det", "--resume")
    if _steps("det", resumed)[0] != 1 or "Epoch(train)  [1]" in resumed:
        raise RuntimeError("detector: did not go on from the first epoch's end")
    meta = _load(work / "det" / "epoch_2.pth")["meta"]
    if meta["epoch"] != 2 or meta["iter"] != 2 * len(_steps("det", resumed)):
        raise RuntimeError(f"detector: wrong counters {meta['epoch']}, {meta['iter']}")
    if "coco/segm_mAP" not in resumed:
        raise RuntimeError("detector: not validated")


def check_resume(work: Path, kinds: tuple[str, ...] = ("seg", "det")) -> None:
    """Run the checks.

    Args:
        work: New folder, for scenes, logs and checkpoints.
        kinds: ``seg``, ``det`` or both.
    """
    scenes = work / "scenes"
    make_digit_scenes(scenes, train=24, val=4, size=96)
    for kind in kinds:
        start = time.perf_counter()
        {"seg": check_segmentor, "det": check_detector}[kind](scenes, work)
        print(f"{kind}: killed, resumed, nothing lost ({time.perf_counter() - start:.0f} s)")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder to create")
    check_resume(parser.parse_args().work.resolve())


if __name__ == "__main__":
    main()
