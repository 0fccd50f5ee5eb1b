"""``visionmamba flops``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._arguments import parse_size, resolve_models
from ._common import CommandError, JsonOption, console, one_line, print_json

if TYPE_CHECKING:
    from visionmamba.analysis.cost import ModelCost

_EXPLANATION = (
    "Operations of one input in units of 1e9, 1 a multiply-accumulate. Layers: all but the scan. Scan: as the field's "
    "tables count it, 9BLDN + BLD, or as the recurrence is written, (7N + 3)BLD; with the expansion of the step sizes. "
    "Activations: millions of elements that convolutions, matrix products and scans put out. Memory in MiB: the "
    "parameters, and what a forward or a training step holds beside them at most."
)


def _cost(name: str, size: tuple[int, int] | None) -> ModelCost:
    import timm

    from visionmamba.analysis.bench import create_for_size
    from visionmamba.analysis.cost import model_cost

    try:
        model = timm.create_model(name, device="meta")
        try:
            return model_cost(model, size, name)
        except (AssertionError, RuntimeError):  # it must be made for its size, as timm's DeiT
            if size is None:
                raise
            return model_cost(create_for_size(name, size, "meta"), size, name)
    except Exception as error:
        where = f" at {size[0]}x{size[1]}" if size else ""
        raise CommandError(f"{name}: cannot be counted{where}: {one_line(error)}") from error


def _figures(cost: Any) -> list[str]:
    giga = (cost.layers, cost.scan, cost.scan_recurrence, cost.flops, cost.flops_recurrence)
    return [
        f"{cost.params / 1e6:.2f}", *(f"{number / 1e9:.4g}" for number in giga), f"{cost.activations / 1e6:.2f}"
    ]  # fmt: skip


_FIGURES = ("Params (M)", "Layers", "Scan 9BLDN", "Scan recur.", "Total 9BLDN", "Total recur.", "Act. (M)")


def _table(first: str, further: tuple[str, ...] = ()) -> Any:
    from rich.table import Table

    table = Table(first, box=None, header_style="bold")
    for column in (*_FIGURES, *further):
        table.add_column(column, justify="right")
    return table


def _models_table(costs: list[ModelCost]) -> Any:
    table = _table("Model", ("Input", "Params MiB", "Forward MiB", "Training MiB"))
    for cost in costs:
        size = "x".join(map(str, cost.input_size[1:]))
        memory = (cost.parameter_bytes, cost.inference_bytes, cost.training_bytes)
        table.add_row(cost.name, *_figures(cost), size, *(f"{number / 2**20:.1f}" for number in memory))
    return table


def _modules_table(cost: ModelCost, depth: int) -> Any:
    table = _table("Module")
    for module in cost.modules:
        level = module.name.count(".")
        if level < depth and (module.flops or module.params):
            table.add_row("  " * level + module.name, *_figures(module))
    return table


def flops(
    models: Annotated[list[str], typer.Argument(help="Models by name or pattern; timm's too.", show_default=False)],
    size: Annotated[str | None, typer.Option(help="Image size, HxW; the model's own by default.")] = None,
    by_module: Annotated[bool, typer.Option("--by-module", help="Show each module's share.")] = False,
    depth: Annotated[int, typer.Option(min=1, help="With --by-module: levels of modules to show.")] = 2,
    as_json: JsonOption = False,
) -> None:
    """Count a model's operations by both conventions, its activations, parameters and memory."""
    names = resolve_models(models)
    pixels = parse_size(size) if size else None
    costs = [_cost(name, pixels) for name in names]
    if as_json:
        rows = [cost.as_dict() for cost in costs]
        for row in rows:
            row["modules"] = [module for module in row["modules"] if by_module]
        print_json(rows)
        return
    out = console()
    out.print(_models_table(costs))
    for cost in costs if by_module else []:
        out.print(f"\n[bold]{cost.name}[/bold]")
        out.print(_modules_table(cost, depth))
    out.print(f"\n{_EXPLANATION}", highlight=False)
