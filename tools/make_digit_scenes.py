"""Compose a detection and segmentation set from scikit-learn's scanned digits on textured backgrounds.

``python tools/make_digit_scenes.py data/digit_scenes`` writes, in a few seconds and without a download::

    {train,val}/images/000000.png                 scenes
    {train,val}/labels/000000.png                 label maps: 0 background, 1 + digit otherwise
    {train,val}/annotations.json                  COCO's format: boxes, areas, masks in run-length code

Digits of the two sets are different scans. The same arguments give the same files, byte for byte. The folder appears
when it is complete, never in part.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from visionmamba.data.digits import DIGIT_NAMES, Digits, load_digits

_INK = 0.35  # an interpolated digit's pixels above this belong to it
_MIN_VISIBLE = 0.5  # a digit of which less is seen is no object
_TRIES = 20
_CHUNK = 50  # scenes that a process draws at a time


def texture(size: int, rng: np.random.Generator) -> np.ndarray:
    """Return a background ``(size, size, 3)`` in [0, 1]: smooth noise of three scales in two colours.

    Args:
        size: Side in pixels.
        rng: Source of chance.
    """
    field = np.zeros((size, size), np.float32)
    for cells in (4, 12, 40):
        noise = torch.from_numpy(rng.standard_normal((1, 1, cells, cells)).astype(np.float32))
        smooth = F.interpolate(noise, size=(size, size), mode="bicubic", align_corners=False)
        field += smooth[0, 0].numpy() / cells**0.5
    mix = 1 / (1 + np.exp(-2 * field[..., None]))
    first, second = rng.uniform(0.0, 0.55, size=(2, 3)).astype(np.float32)
    return mix * first + (1 - mix) * second


def _place(digit: torch.Tensor, size: int, rng: np.random.Generator) -> tuple[np.ndarray, int, int]:
    """Return a digit's ink ``(side, side)`` at a random scale, and where its corner goes."""
    side = int(rng.integers(size // 8, size // 3))
    ink = F.interpolate(digit[None, None], size=(side, side), mode="bicubic", align_corners=False)[0, 0]
    top, left = rng.integers(0, size - side + 1, size=2)
    return ink.clamp(0, 1).numpy(), int(top), int(left)


def compose(digits: Digits, size: int, rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Draw one scene of one to six digits; a later one may hide a part of an earlier one.

    Args:
        digits: To choose from.
        size: Side of the scene in pixels.
        rng: Source of chance.

    Returns:
        The scene ``(size, size, 3)`` uint8, and each visible digit's value and mask ``(size, size)`` bool.
    """
    scene = texture(size, rng)
    placed: list[tuple[int, np.ndarray, int]] = []
    for _ in range(int(rng.integers(1, 7))):
        index = int(rng.integers(len(digits.labels)))
        for _ in range(_TRIES):
            ink, top, left = _place(digits.images[index], size, rng)
            mask = np.zeros((size, size), bool)
            mask[top : top + len(ink), left : left + len(ink)] = ink > _INK
            if all((other & ~mask).sum() >= _MIN_VISIBLE * area for _, other, area in placed):
                break
        else:
            continue
        colour = rng.uniform(0.6, 1.0, size=3).astype(np.float32)
        window = scene[top : top + len(ink), left : left + len(ink)]
        window[:] = ink[..., None] * colour + (1 - ink[..., None]) * window
        placed = [(label, other & ~mask, area) for label, other, area in placed]
        placed.append((int(digits.labels[index]), mask, int(mask.sum())))
    noisy = scene + rng.normal(0, 0.03, scene.shape)
    return (noisy.clip(0, 1) * 255).round().astype(np.uint8), [(label, mask) for label, mask, _ in placed]


def _run_lengths(mask: np.ndarray) -> dict:
    """Return COCO's uncompressed run-length code: column by column, starting with the length of a run of zeros."""
    flat = mask.flatten(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], ends, [flat.size]])).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def _annotation(label: int, mask: np.ndarray, image_id: int) -> dict:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return {
        "image_id": image_id,
        "category_id": label + 1,
        "bbox": [
            int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1),
        ],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": _run_lengths(mask),
    }  # fmt: skip


def _write_scene(image_id: int, digits: Digits, folder: Path, size: int, seed: Sequence[int]) -> list[dict]:
    """Write one scene and its label map; return its annotations, without their numbers."""
    scene, objects = compose(digits, size, np.random.default_rng([*seed, image_id]))
    labels = np.zeros((size, size), np.uint8)
    for label, mask in objects:
        labels[mask] = label + 1
    for kind, image in (("images", scene), ("labels", labels)):
        Image.fromarray(image).save(folder / kind / f"{image_id:06d}.png", compress_level=1)
    return [_annotation(label, mask, image_id) for label, mask in objects]


def write_split(
    digits: Digits, folder: Path, count: int, size: int, seed: Sequence[int], executor: Executor | None = None
) -> None:
    """Write the scenes, label maps and annotations of one split.

    Args:
        digits: To choose from.
        folder: New folder.
        count: Number of scenes.
        size: Their side in pixels.
        seed: Of the split; a scene's own is this and its number, so that the order of work does not matter.
        executor: Draws several scenes at a time.
    """
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    write = partial(_write_scene, digits=digits, folder=folder, size=size, seed=seed)
    scenes = executor.map(write, range(count), chunksize=_CHUNK) if executor else map(write, range(count))
    annotations = [{"id": number, **annotation} for number, annotation in enumerate(chain.from_iterable(scenes), 1)]
    images = [{"id": i, "file_name": f"{i:06d}.png", "height": size, "width": size} for i in range(count)]
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(DIGIT_NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))


def make_digit_scenes(
    out: Path, train: int = 2000, val: int = 300, size: int = 256, seed: int = 0, workers: int = 0
) -> None:
    """Write the whole set.

    Args:
        out: New folder.
        train: Scenes to train on.
        val: Scenes to validate on.
        size: Their side in pixels, at least 64.
        seed: The same seed gives the same files.
        workers: Processes to draw with; 0: this one.

    Raises:
        FileExistsError: The folder exists.
        ValueError: The size is below 64, or there is no scene.
    """
    if out.exists():
        raise FileExistsError(f"{out}: exists already; remove it or choose another folder")
    if size < 64 or min(train, val) < 1:
        raise ValueError(f"size, train and val: expected at least 64, 1 and 1, got {size}, {train} and {val}")
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    executor = ProcessPoolExecutor(workers, get_context("spawn")) if workers else None
    try:
        for i, (name, digits, count) in enumerate(zip(("train", "val"), load_digits(seed), (train, val), strict=True)):
            write_split(digits, unfinished / name, count, size, [seed, i], executor)
        unfinished.rename(out)
    finally:
        if executor:
            executor.shutdown()
        shutil.rmtree(unfinished, ignore_errors=True)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to create")
    parser.add_argument("--train", type=int, default=2000, help="scenes to train on (2000)")
    parser.add_argument("--val", type=int, default=300, help="scenes to validate on (300)")
    parser.add_argument("--size", type=int, default=256, help="side of the scenes in pixels (256)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="processes to draw with (0: this one)")
    options = parser.parse_args()
    try:
        make_digit_scenes(**vars(options))
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
