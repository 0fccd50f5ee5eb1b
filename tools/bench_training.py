"""Time whole training steps of recipes, eager and with ``cuda_graph``.

    python tools/bench_training.py configs/classification/vmamba_tiny.yaml configs/classification/vim_tiny.yaml \
        --output benchmarks/training.json

A step is the trainer's: the batch from pinned memory to the GPU, mixup, forward and backward in bf16, clipping,
optimiser, averaged weights. One random batch is used again and again; reading and augmenting images is not part of it.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from bench_ops import provenance
from PIL import Image

from visionmamba._files import replacing
from visionmamba.training import Trainer, load_config
from visionmamba.training.distributed import World


def _image_folder(root: Path, images: int) -> None:
    """Write two classes of random images, which a recipe asks for."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("0", "1"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for number in range(images // 2):
                pixels = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")


def measure(recipe: Path, cuda_graph: bool, batch: int, steps: int, root: Path) -> dict:
    """Return a row: the mean time of a step, after twelve others, and images a second."""
    words = [
        f"data={root}", f"out={root / 'run'}", f"batch_size={batch}", "precision=bf16", "workers=0",
        f"cuda_graph={str(cuda_graph).lower()}",
    ]  # fmt: skip
    config = load_config(recipe, words)
    trainer = Trainer(config, World(0, 1, torch.device("cuda", 0)))
    images = torch.randn(batch, *trainer.settings["input_size"]).pin_memory()
    labels = torch.randint(0, 2, (batch,))

    def step() -> None:
        trainer._take_step(images, labels, 0)
        trainer.step += 1

    for _ in range(12):
        step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    taken = (time.perf_counter() - began) / steps
    row = {"model": config.model, "cuda_graph": cuda_graph, "batch": batch, "step_ms": round(1e3 * taken, 1)}
    return row | {"images_per_second": round(batch / taken, 1)}


def main() -> None:
    """Measure recipes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        _image_folder(Path(folder), options.batch)
        for recipe in options.recipes:
            for cuda_graph in (True, False):
                rows.append(measure(recipe, cuda_graph, options.batch, options.steps, Path(folder)))
                print(json.dumps(rows[-1]), flush=True)
                gc.collect()
                torch.cuda.empty_cache()
    with replacing(options.output) as temporary:
        temporary.write_text(json.dumps({"environment": provenance(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
