"""Pictures of data sets and of predictions, drawn by mmdetection's and mmsegmentation's visualisers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS, VISUALIZERS
from PIL import Image, ImageOps

from .._files import replacing
from .runner import register

__all__ = ["IMAGE_SUFFIXES", "browse", "find_images", "predict_folder"]

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def _read(path: Path) -> np.ndarray:
    """Return an image ``(height, width, 3)``, RGB, upright."""
    with Image.open(path) as image:
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


def _visualizer(config: Config, dataset_meta: dict) -> Any:
    visualizer = VISUALIZERS.build({**config.visualizer, "name": "visionmamba_pictures", "vis_backends": []})
    if config.get("default_scope") == "mmseg":
        visualizer.set_dataset_meta(**{key: dataset_meta.get(key) for key in ("classes", "palette")})
    else:
        visualizer.dataset_meta = dataset_meta
    return visualizer


def browse(config: Config, out: Path, split: str = "train", count: int = 20) -> list[Path]:
    """Draw the first samples of a data set with their truth: those to train on after augmentation, others as they are.

    Args:
        config: Of a detector or segmentor.
        out: Folder for the pictures.
        split: ``train``, ``val`` or ``test``.
        count: How many.

    Returns:
        The pictures' paths.
    """
    register(config)
    dataset = DATASETS.build(config[f"{split}_dataloader"].dataset)
    visualizer = _visualizer(config, dataset.metainfo)
    paths = []
    for index in range(min(count, len(dataset))):
        sample = dataset[index]
        truth = sample["data_samples"]
        if split == "train":
            pixels = sample["inputs"].permute(1, 2, 0).numpy()[..., ::-1]  # OpenMMLab reads BGR
        else:  # the truth is that of the image as it is in the file
            pixels = _read(Path(truth.img_path))
        if "gt_instances" in truth:
            instances = truth.gt_instances
            instances.bboxes = instances.bboxes.tensor
            if "masks" in instances:
                instances.masks = instances.masks.to_ndarray().astype(bool)
        visualizer.add_datasample("sample", np.ascontiguousarray(pixels), truth, draw_pred=False)
        paths.append(out / f"{split}_{index:04d}.png")
        _save(paths[-1], visualizer.get_image())
    return paths


def find_images(source: Path) -> list[Path]:
    """Return an image, or all images in a folder, by name.

    Raises:
        FileNotFoundError: There are none.
    """
    if source.is_file():
        return [source]
    paths = (
        sorted(path for path in source.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES) if source.is_dir() else []
    )
    if not paths:
        raise FileNotFoundError(f"{source}: no images ({', '.join(IMAGE_SUFFIXES)}) there")
    return paths


def _run_length(mask: np.ndarray) -> dict:
    from pycocotools import mask as coco

    code = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": code["size"], "counts": code["counts"].decode()}


def _instances(sample: Any, score_thr: float) -> list[dict]:
    """Return a detector's predictions: boxes (x1, y1, x2, y2) in pixels, masks in COCO's run-length code."""
    found = sample.pred_instances[sample.pred_instances.scores >= score_thr].cpu()
    rows = [
        {"label": int(label), "score": float(score), "bbox": box.tolist()}
        for label, score, box in zip(found.labels, found.scores, found.bboxes, strict=True)
    ]
    for row, mask in zip(rows, found.get("masks", []), strict=False):
        row["mask"] = _run_length(mask.numpy())
    return rows


def _models(config: Config, checkpoint: str, device: str) -> tuple[Any, Any]:
    """Return a trained model and the function that applies it to an image."""
    if config.get("default_scope") == "mmseg":
        from mmseg.apis import inference_model, init_model

        return init_model(config, checkpoint, device=device), inference_model
    from mmdet.apis import inference_detector, init_detector

    return init_detector(config, checkpoint, palette="random", device=device), inference_detector


def predict_folder(
    config: Config, checkpoint: str, source: Path, out: Path, device: str = "cpu", score_thr: float = 0.3
) -> Iterator[tuple[Path, str | None]]:
    """Predict images and draw what is found.

    A detector's boxes and masks are drawn into ``pictures/`` and listed in ``predictions.json``; a segmentor's label
    maps are drawn into ``pictures/`` and saved, one byte a pixel, in ``labels/``.

    Args:
        config: Of a detector or segmentor.
        checkpoint: Its weights.
        source: An image or a folder, searched to any depth.
        out: Folder for the results.
        device: Where to run.
        score_thr: Least score of a detection.

    Yields:
        Each image's path, and None or why it was left out.

    Raises:
        FileNotFoundError: There are no images.
    """
    images = find_images(source)
    root = source if source.is_dir() else source.parent
    register(config)
    segmentation = config.get("default_scope") == "mmseg"
    model, infer = _models(config, checkpoint, device)
    visualizer = _visualizer(config, model.dataset_meta)
    predictions = {}
    for path in images:
        name = path.relative_to(root)
        png = name if name.suffix == ".png" else name.with_name(f"{name.name}.png")
        try:
            pixels = _read(path)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            yield path, f"not a readable image ({type(error).__name__})"
            continue
        sample = infer(model, np.ascontiguousarray(pixels[..., ::-1]))
        options = {} if segmentation else {"pred_score_thr": score_thr}
        visualizer.add_datasample("prediction", pixels, sample, draw_gt=False, **options)
        _save(out / "pictures" / png, visualizer.get_image())
        if segmentation:
            _save(out / "labels" / png, sample.pred_sem_seg.data[0].cpu().numpy().astype(np.uint8))
        else:
            predictions[str(name)] = _instances(sample, score_thr)
        yield path, None
    if not segmentation:
        with replacing(out / "predictions.json") as temporary:
            temporary.write_text(json.dumps({"classes": model.dataset_meta["classes"], "images": predictions}))
