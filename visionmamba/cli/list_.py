"""``visionmamba list``."""

from __future__ import annotations

from typing import Annotated

import typer

from ._common import CommandError, JsonOption, console, print_json, progress


def list_(
    pattern: Annotated[str, typer.Argument(help="Part of a name, or a shell pattern such as 'vim_*'.")] = "",
    as_json: JsonOption = False,
) -> None:
    """List the models: family, parameters, published top-1 and where the weights come from."""
    from rich.table import Table

    from visionmamba.zoo import model_names, summarize

    names = model_names(pattern)
    if not names:
        raise CommandError(f"no model's name matches {pattern!r}; 'visionmamba list' shows all")
    with progress(transient=True) as bar:
        rows = [summarize(name) for name in bar.track(names, description="counting parameters")]
    if as_json:
        print_json([row.as_dict() for row in rows])
        return
    table = Table("Name", "Family", box=None, header_style="bold")
    table.add_column("Params (M)", justify="right")
    table.add_column("Top-1 (%)", justify="right")
    table.add_column("Weights", overflow="fold")
    for row in rows:
        top1 = "-" if row.top1 is None else f"{row.top1:.1f}"
        params = "-" if row.params is None else f"{row.params / 1e6:.2f}"
        table.add_row(row.name, row.family, params, top1, row.weights or "-")
    console().print(table)
