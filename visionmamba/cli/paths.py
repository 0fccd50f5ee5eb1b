"""``visionmamba paths``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._common import CommandError, check_model_name, check_writable, one_line

_NAMED_LAYERS = 4


def _layers(name: str) -> dict[str, list[str]]:
    """Return the paths of a model and the layers that walk them; of a scan order, the order without layers."""
    import timm

    from visionmamba.analysis.scan_paths import layers_by_path
    from visionmamba.ops.scan_path import padded_grid
    from visionmamba.zoo import model_names

    if name.split(".")[0] in model_names():
        return layers_by_path(timm.create_model(name, device="meta"))
    for rank in (1, 2, 3):  # is it an order for any grid?
        try:
            padded_grid(name, (4,) * rank)
            return {name: []}
        except ValueError as error:
            problem = error
    if "_" not in name or "," in name or name.endswith("_flip"):
        raise CommandError(one_line(problem))
    check_model_name(name, model_names())
    return {}


def _grid(text: str | None, orders: set[str]) -> tuple[int, ...]:
    if text is None:
        is_volume = any(set("thw") == set(name.split(",")[0].removesuffix("_flip")) for name in orders)
        return (3, 4, 4) if is_volume else (6, 6)
    try:
        sizes = tuple(int(size) for size in text.lower().split("x"))
    except ValueError:
        sizes = ()
    if not 1 <= len(sizes) <= 3 or min(sizes, default=0) < 1:
        raise CommandError(f"--grid: expected HxW or TxHxW, such as 14x14, got {text!r}")
    return sizes


def _label(layers: list[str], several: bool) -> str:
    if not several:
        return f"all {len(layers)} layers" if layers else ""
    named = "\n".join(layers[:_NAMED_LAYERS])
    return named + (f"\n... ({len(layers)} layers)" if len(layers) > _NAMED_LAYERS else "")


def paths(
    names: Annotated[
        list[str], typer.Argument(help="A model, or a scan order such as 'h,v_flip' or 'w7'; several: side by side.")
    ],
    out: Annotated[Path, typer.Option(help="Picture to write: .png, .pdf or .svg.")],
    grid: Annotated[str | None, typer.Option(help="Size of the token grid, HxW or TxHxW.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Of several: draw this many directions of each.")] = None,
) -> None:
    """Draw the scan orders that a model uses, layer by layer where they differ, or those of several side by side."""
    from visionmamba.analysis.scan_paths import draw_paths, side_by_side, write_figure

    layers = {name: _layers(name) for name in names}
    check_writable(out)
    size = _grid(grid, {path for walked in layers.values() for path in walked})
    try:
        if len(layers) > 1:
            figure = side_by_side({name: list(walked) for name, walked in layers.items()}, size, limit)
        else:
            (walked,) = layers.values()
            labels = {_label(blocks, several=len(walked) > 1): path for path, blocks in walked.items()}
            figure = draw_paths(labels, size)
        write_figure(figure, out)
    except (ValueError, OSError) as error:
        raise CommandError(one_line(error)) from error
    for name, walked in layers.items():
        for path, blocks in walked.items():
            typer.echo(f"{name}: {path}" + (f" in {', '.join(blocks)}" if blocks and len(walked) > 1 else ""))
    typer.echo(f"picture  {out}")
