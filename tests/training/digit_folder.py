"""The digits as a folder of PNG files, one sub-folder a class: what ``tools/train.py`` reads."""

from pathlib import Path

from PIL import Image

from visionmamba.data import load_digits


def write_digits(root: Path, train: int | None = None, held_out: int | None = None) -> Path:
    """Write ``root/train`` and ``root/val`` with so many digits each, all by default."""
    for split, digits, count in zip(("train", "val"), load_digits(0), (train, held_out), strict=True):
        images = (255 * (1 - digits.images)).round().byte().numpy()
        for index, (image, label) in enumerate(zip(images[:count], digits.labels.tolist(), strict=False)):
            path = root / split / f"{label}" / f"{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return root
