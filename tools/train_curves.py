"""Train a model on a few fixed random images, in float32 and under autocast, and compare the loss curves.

python tools/train_curves.py vim_tiny_patch16_224 --precision bf16 --output curves.csv
python tools/train_curves.py --compare curves.csv
"""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

import visionmamba  # noqa: F401  registers the models


def train(name: str, precision: str, steps: int, batch: int) -> list[float]:
    """Return the losses of a training run; the same seed, data and order for every precision."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, drop_path_rate=0.0).cuda().train()
    images = torch.randn(4 * batch, 3, 224, 224, device="cuda")
    labels = torch.randint(10, (4 * batch,), device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
    scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    losses = []
    for step in range(steps):
        part = slice(step % 4 * batch, (step % 4 + 1) * batch)
        with torch.autocast("cuda", dtype, enabled=precision != "fp32"):
            loss = F.cross_entropy(model(images[part]).float(), labels[part])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    return [float(loss) for loss in losses]


def compare(path: Path, window: int = 20, tolerance: float = 0.1) -> bool:
    """Print how far each curve is from float32's; False if one is not finite or strays.

    Curves are moving averages over ``window`` steps; they may differ by ``tolerance`` of the first loss.
    """
    with path.open(newline="") as file:
        curves = {(name, precision): [float(x) for x in losses] for name, precision, *losses in csv.reader(file)}
    good = True
    for (name, precision), losses in curves.items():
        finite = all(map(math.isfinite, losses))
        text = f"{name:24s} {precision}: {losses[0]:.3f} to {sum(losses[-window:]) / window:.4f}"
        if precision != "fp32" and finite and (name, "fp32") in curves:
            exact = curves[name, "fp32"]
            smooth = [[sum(x[i : i + window]) / window for i in range(len(x) - window + 1)] for x in (losses, exact)]
            apart = max(abs(a - b) for a, b in zip(*smooth, strict=True)) / exact[0]
            text += f", at most {100 * apart:.1f} % of the first loss from float32"
            good &= apart <= tolerance
        good &= finite
        print(text if finite else text + ", NOT FINITE")
    return good


def main() -> None:
    """Train and write the losses, or compare those of a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--output", type=Path, help="CSV to append the losses to")
    parser.add_argument("--compare", type=Path, help="compare the curves of a CSV instead")
    arguments = parser.parse_args()
    if arguments.compare:
        if not arguments.compare.is_file():
            parser.error(f"--compare: no such file: {arguments.compare}")
        raise SystemExit(0 if compare(arguments.compare) else 1)
    if arguments.model is None or not timm.is_model(arguments.model):
        parser.error(f"model: expected the name of a timm model, got {arguments.model!r}")
    if not torch.cuda.is_available():
        parser.error("training needs a CUDA device")
    losses = train(arguments.model, arguments.precision, arguments.steps, arguments.batch)
    print(arguments.model, arguments.precision, losses[0], losses[-1])
    if arguments.output:
        with arguments.output.open("a", newline="") as file:
            csv.writer(file).writerow([arguments.model, arguments.precision, *losses])


if __name__ == "__main__":
    main()
