"""The digits as a folder of PNG files, one sub-folder a class: what ``tools/train.py`` reads."""

from collections import Counter
from pathlib import Path

from PIL import Image

from visionmamba.data import load_digits


def write_digits(root: Path, train: int | None = None, held_out: int | None = None) -> Path:
    """Write ``root/train`` and ``root/val`` with so many digits each, every class in turn; all by default."""
    for split, digits, count in zip(("train", "val"), load_digits(0), (train, held_out), strict=True):
        images = (255 * (1 - digits.images)).round().byte().numpy()
        labels, seen = digits.labels.tolist(), Counter()
        turns = []
        for index, label in enumerate(labels):
            turns.append((seen[label], index))
            seen[label] += 1
        for _, index in sorted(turns)[:count]:
            path = root / split / str(labels[index]) / f"{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[index]).save(path)
    return root
