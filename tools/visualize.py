"""Draw what models look at on your images: Grad-CAM, activations, receptive fields, and which tokens a scan connects.

python tools/visualize.py cat.jpg --model vmamba_tiny_s1l8 --model deit_small_patch16_224 --out pictures

A picture for each image and kind, OUT/cat_gradcam.png, with a row for each model. Weights are the published ones,
fetched at first use; --checkpoint FILE (as often as --model) takes one's own, --random none.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import timm
import torch
from PIL import Image

from visionmamba.analysis.pictures import KINDS, Subject, draw
from visionmamba.analysis.scan_paths import write_figure
from visionmamba.cli._arguments import resolve_models
from visionmamba.cli._common import CommandError, check_folder, one_line, progress
from visionmamba.inference import create_classifier, create_reader, input_size


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--model", action="append", required=True, help="a model's name; several: side by side")
    parser.add_argument("--checkpoint", action="append", type=Path, default=[], help="its weights, in the same order")
    parser.add_argument("--random", action="store_true", help="random weights instead of published ones")
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="what to draw; everything by default")
    parser.add_argument("--out", type=Path, default=Path("pictures"), help="folder for the pictures")
    parser.add_argument("--class", dest="target", type=int, help="class for Grad-CAM; the model's answer by default")
    parser.add_argument("--layer", help="module for Grad-CAM; the last stage or last but one block by default")
    parser.add_argument("--token", type=place, help="row,column of the token that reads; the centre by default")
    parser.add_argument("--scan", type=int, help="which scan of the model, from 0; the middle one by default")
    parser.add_argument("--decay-only", action="store_true", help="only what is left of the state after the steps")
    parser.add_argument("--device", help="device; by default the CPU")
    return parser.parse_args(words)


def place(text: str) -> tuple[int, int]:
    """Return (row, column) from ``3,7``."""
    try:
        row, column = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected row,column such as 3,7, got {text!r}") from None
    return row, column


def build(name: str, checkpoint: Path | None, random: bool, device: str | None) -> torch.nn.Module:
    """Return a model with its weights."""
    if checkpoint is not None and not checkpoint.is_file():
        raise CommandError(f"--checkpoint: no such file: {checkpoint}")
    try:
        if random:
            torch.manual_seed(0)
            model = timm.create_model(name).to(device).eval()
        else:
            model = create_classifier(name, checkpoint, device=device)
    except Exception as error:
        raise CommandError(f"{name}: {one_line(error)}") from error
    if len(input_size(model)) != 3 or model.in_chans != 3:
        raise CommandError(f"{name} does not take colour images")
    return model


def read(model: torch.nn.Module, path: Path, device: str | None) -> torch.Tensor:
    """Return an image as a model reads it."""
    try:
        return create_reader(model)(path).to(device)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "no such file" if not path.exists() else f"not a readable image ({one_line(error)})"
        raise CommandError(f"{path}: {reason}") from error


def prefixes(images: list[Path]) -> list[str]:
    """Return the images' names for their pictures, with a number where two are the same."""
    stems = [path.stem for path in images]
    return [stem if stems.count(stem) == 1 else f"{stem}_{i}" for i, stem in enumerate(stems)]


def run(options: argparse.Namespace) -> int:
    """Draw everything; return 1 if some image could not be drawn."""
    names = resolve_models(options.model)
    if options.checkpoint and len(options.checkpoint) != len(names):
        raise CommandError(f"--checkpoint: expected one for each of {len(names)} models, got {len(options.checkpoint)}")
    files = options.checkpoint or [None] * len(names)
    check_folder(options.out)
    models = {name: build(name, file, options.random, options.device) for name, file in zip(names, files, strict=True)}
    drawn = {key: getattr(options, key) for key in ("target", "layer", "token", "scan", "decay_only")}
    kinds, failed = options.kind or list(KINDS), 0
    with progress(transient=True) as bar:
        task = bar.add_task("drawing", total=len(options.images) * len(kinds))
        for prefix, image in zip(prefixes(options.images), options.images, strict=True):
            try:
                subjects = [Subject(name, model, read(model, image, options.device)) for name, model in models.items()]
                for kind in kinds:
                    chosen = [subject for subject in subjects if kind != "scan" or has_scan(subject.model)]
                    if chosen:
                        path = options.out / f"{prefix}_{kind}.png"
                        write_figure(draw(kind, chosen, **drawn), path)
                        print(path)
                    bar.advance(task)
            except (CommandError, ValueError) as error:
                failed += 1
                print(f"error: {one_line(error)}", file=sys.stderr)
    return min(failed, 1)


def has_scan(model: torch.nn.Module) -> bool:
    """Whether a model has selective scans; timm's have none."""
    return any(hasattr(module, "A_log") for module in model.modules())


def main(words: list[str] | None = None) -> int:
    """Run the tool; errors are one sentence."""
    try:
        return run(arguments(words))
    except (CommandError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
