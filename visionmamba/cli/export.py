"""``visionmamba export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._arguments import parse_size
from ._common import CommandError, JsonOption, check_model_name, check_writable, console, one_line, print_json, progress

if TYPE_CHECKING:
    from torch import nn

_FORMATS = ("onnx", "pt2", "aoti")


def _check_model(name: str, checkpoint: Path | None) -> None:
    import timm

    from visionmamba.zoo import model_names

    if not timm.is_model(name.split(".")[0]):
        check_model_name(name, model_names())
    if checkpoint is not None and not checkpoint.is_file():
        raise CommandError(f"--checkpoint: no such file: {checkpoint}")


def _model(name: str, checkpoint: Path | None, num_classes: int | None, random_weights: bool) -> nn.Module:
    import timm

    from visionmamba.inference import create_classifier
    from visionmamba.models._builder import WeightsUnavailableError

    try:
        if random_weights:
            return timm.create_model(name, **({} if num_classes is None else {"num_classes": num_classes})).eval()
        return create_classifier(name, checkpoint, num_classes, "cpu")
    except WeightsUnavailableError as error:
        raise CommandError(f"{one_line(error)} --random-weights exports without any.") from error
    except Exception as error:
        raise CommandError(one_line(error)) from error


def _write(network: nn.Module, out: Path, format: str, shape: tuple[int, ...], batch: int | None, check: bool) -> float:
    """Export, and compare if asked to; return the greatest difference from the model."""
    from visionmamba.export import ExportError, compare_with_eager, export_model

    try:
        with progress(transient=True) as bar:
            task = bar.add_task(f"exporting to {format}", total=1 + check)
            export_model(network, out, format, shape, batch)
            bar.update(task, advance=1, description="checking")
            if not check:
                return 0.0
            return compare_with_eager(network, out, format, shape, (batch,) if batch else (1, 3))
    except (ExportError, OSError) as error:
        raise CommandError(one_line(error)) from error


def export(
    model: Annotated[str, typer.Argument(help="A model's name, as 'visionmamba list' shows it.", show_default=False)],
    format: Annotated[str, typer.Option(help=f"One of {', '.join(_FORMATS)}.")] = "onnx",
    size: Annotated[str | None, typer.Option(help="Height and width, HxW; by default the model's own.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="File with the weights; by default the published ones are fetched.")
    ] = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Export without trained weights.")] = False,
    num_classes: Annotated[int | None, typer.Option(min=1, help="Number of classes, if not the model's own.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Fix the batch size; by default any, but 1 for aoti.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; by default the model's name here.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Run the file and compare it with the model.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a model as ONNX, as a torch.export program or as an AOTInductor package.

    A file is for one image size. ONNX files and AOTInductor packages need nothing of this package to run.
    """
    if format not in _FORMATS:
        raise CommandError(f"--format: expected one of {', '.join(_FORMATS)}, got {format!r}")
    if random_weights and checkpoint is not None:
        raise CommandError("--random-weights and --checkpoint exclude each other")
    side = parse_size(size) if size else None
    from visionmamba.export import FORMATS, missing_requirement

    _check_model(model, checkpoint)
    out = check_writable(out or Path(f"{model}{FORMATS[format]}"))
    missing = missing_requirement(format)
    if missing:
        raise CommandError(missing)
    network = _model(model, checkpoint, num_classes, random_weights)
    from visionmamba.inference import input_size

    shape = (*input_size(network)[:-2], *(side or input_size(network)[-2:]))
    if side and hasattr(network, "set_input_size"):
        network.set_input_size(img_size=side)  # interpolates a position embedding once and for all
    result: dict[str, Any] = {"model": model, "format": format, "input": list(shape), "file": str(out)}
    result["batch_size"] = batch_size or (1 if format == "aoti" else None)
    difference = _write(network, out, format, shape, result["batch_size"], check)
    if check:
        result["difference"] = difference
    result["bytes"] = out.stat().st_size
    if as_json:
        print_json(result)
        return
    batch = result["batch_size"] or "any"
    console().print(f"{out}: {model} for inputs {'x'.join(map(str, shape))}, batch size {batch}")
    if check:
        console().print(f"equal to the model within {result['difference']:.1e}")
