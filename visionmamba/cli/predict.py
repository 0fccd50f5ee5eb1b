"""``visionmamba predict``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._common import CommandError, JsonOption, check_model_name, console, one_line, print_json, progress

if TYPE_CHECKING:
    import torch

_BATCH_SIZE = 8


def _classifier(name: str, checkpoint: Path | None, num_classes: int | None, device: str | None) -> torch.nn.Module:
    import timm
    import torch

    from visionmamba.inference import create_classifier
    from visionmamba.zoo import model_names

    if not timm.is_model(name.split(".")[0]):
        check_model_name(name, model_names())
    if checkpoint is not None and not checkpoint.is_file():
        raise CommandError(f"--checkpoint: no such file: {checkpoint}")
    try:
        target = torch.device(device) if device else torch.accelerator.current_accelerator(check_available=True)
        return create_classifier(name, checkpoint, num_classes, target or "cpu")
    except Exception as error:
        raise CommandError(one_line(error)) from error


def _batches(
    images: list[Path], read: Callable[[Path], torch.Tensor], failed: dict[Path, str]
) -> Iterator[tuple[list[Path], torch.Tensor]]:
    """Yield batches of the images that can be read, and note the others."""
    import torch
    from PIL import Image

    for start in range(0, len(images), _BATCH_SIZE):
        good = {}
        for path in images[start : start + _BATCH_SIZE]:
            try:
                good[path] = read(path)
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                failed[path] = "no such file" if not path.exists() else f"not a readable image ({one_line(error)})"
        if good:
            yield list(good), torch.cat(list(good.values()))


def _predict(model: torch.nn.Module, images: list[Path], topk: int) -> list[dict[str, Any]]:
    import torch

    from visionmamba.inference import class_names, create_reader

    names, read = class_names(model), create_reader(model)
    device = next(model.parameters()).device
    failed: dict[Path, str] = {}
    top: dict[Path, list[dict[str, Any]]] = {}
    with progress(transient=True) as bar, torch.inference_mode():
        task = bar.add_task("classifying", total=len(images))
        for paths, batch in _batches(images, read, failed):
            shares, indices = model(batch.to(device)).float().softmax(-1).topk(topk)
            for path, row, classes in zip(paths, shares.tolist(), indices.tolist(), strict=True):
                top[path] = [
                    {"class": index, "name": names[index], "probability": share}
                    for index, share in zip(classes, row, strict=True)
                ]
            bar.update(task, completed=len(top) + len(failed))
    return [
        {"image": str(path), "error": failed[path]} if path in failed else {"image": str(path), "top": top[path]}
        for path in images
    ]


def predict(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.", show_default=False)],
    model: Annotated[str, typer.Option(help="A model's name, as 'visionmamba list' shows it.", show_default=False)],
    checkpoint: Annotated[
        Path | None, typer.Option(help="File with the weights; by default the published ones are fetched.")
    ] = None,
    topk: Annotated[int, typer.Option(min=1, help="Number of classes to show.")] = 5,
    num_classes: Annotated[
        int | None, typer.Option(min=1, help="Number of classes of the checkpoint, where it is not the model's own.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Device; by default a GPU if there is one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Classify images."""
    images = list(dict.fromkeys(images))
    classifier = _classifier(model, checkpoint, num_classes, device)
    results = _predict(classifier, images, min(topk, classifier.num_classes))
    failed = [result for result in results if "error" in result]
    if as_json:
        print_json(results)
    else:
        out = console()
        for result in results:
            if "top" in result:
                out.print(f"[bold]{result['image']}[/bold]")
                for guess in result["top"]:
                    out.print(f"  {guess['probability']:7.2%}  {guess['name']}")
    for result in failed:
        typer.echo(f"error: {result['image']}: {result['error']}", err=True)
    if failed:
        raise typer.Exit(1)
