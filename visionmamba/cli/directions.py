"""``visionmamba directions``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._common import CommandError, JsonOption, check_model_name, console, one_line, print_json

if TYPE_CHECKING:
    from torch import nn

_SUPERNETS = "*_search"
_SEARCH_WEIGHTS = ("merge.weights", "multi_scan.weights")  # of this project's checkpoints and of the authors'


def _supernet(name: str, checkpoint: Path, num_classes: int | None) -> nn.Module:
    from visionmamba.inference import create_classifier
    from visionmamba.models._checkpoint import load_checkpoint_file
    from visionmamba.zoo import model_names

    check_model_name(name, model_names())
    supernets = model_names(_SUPERNETS)
    if name.split(".")[0] not in supernets:
        raise CommandError(f"--model: expected the supernet of a direction search ({', '.join(supernets)}), got {name}")
    if not checkpoint.is_file():
        raise CommandError(f"no such file: {checkpoint}")
    try:
        if not any(key.endswith(_SEARCH_WEIGHTS) for key in load_checkpoint_file(checkpoint)):
            raise CommandError(f"{checkpoint}: not of a supernet, it holds no weights of scan directions")
        return create_classifier(name, checkpoint, num_classes)
    except (RuntimeError, ValueError, OSError) as error:
        raise CommandError(one_line(error)) from error


def directions(
    checkpoint: Annotated[Path, typer.Argument(help="Weights of a trained supernet.", show_default=False)],
    model: Annotated[str, typer.Option(help="The supernet's name, such as local_vim_tiny_search.", show_default=False)],
    number: Annotated[int, typer.Option(min=1, max=8, help="Directions to choose for each layer.")] = 4,
    num_classes: Annotated[
        int | None, typer.Option(min=1, help="Number of classes of the checkpoint, where it is not the model's own.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Read the scan directions that a LocalMamba search chose out of its trained supernet.

    Prints each layer's heaviest directions, and at last the list for the searched model's `directions` argument.
    """
    from visionmamba.layers import chosen_directions, search_weights

    supernet = _supernet(model, checkpoint, num_classes)
    try:
        weights, chosen = search_weights(supernet), chosen_directions(supernet, number)
    except ValueError as error:
        raise CommandError(f"{checkpoint}: {one_line(error)}") from error
    if as_json:
        layers = [
            {"layer": layer, "directions": path, "weights": weights[layer]}
            for layer, path in zip(weights, chosen, strict=True)
        ]
        print_json({"model": model, "checkpoint": str(checkpoint), "directions": chosen, "layers": layers})
        return
    out = console()
    for layer, path in zip(weights, chosen, strict=True):
        shares = ", ".join(f"{name} {weights[layer][name]:.1%}" for name in path.split(","))
        out.print(f"{layer}: {shares}")
    lines = "".join(f'    "{path}",\n' for path in chosen)
    typer.echo(f"directions=(\n{lines})")
