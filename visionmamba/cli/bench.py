"""``visionmamba bench``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._arguments import parse_size, resolve_models
from ._common import CommandError, JsonOption, check_folder, console, measurements_stay, one_line, print_json, progress

if TYPE_CHECKING:
    import torch

WarmupOption = Annotated[int, typer.Option(min=0, help="Steps before those that are timed.")]
RepeatsOption = Annotated[int, typer.Option(min=1, help="Steps that are timed; the median counts.")]
SecondsOption = Annotated[
    float, typer.Option(min=0.0, help="Time for these; where they take longer, fewer do, but no fewer than five.")
]


def parse_choices(text: str, known: Sequence[str], option: str) -> list[str]:
    """Return the words of a list such as ``eager,graph``.

    Raises:
        CommandError: One of them is not known.
    """
    chosen = [word.strip() for word in text.split(",")]
    for word in chosen:
        if word not in known:
            raise CommandError(f"{option}: expected some of {', '.join(known)}, got {word!r}")
    return chosen


def _numbers(text: str, option: str) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise CommandError(f"{option}: expected positive numbers such as 1,64, got {text!r}")
    return numbers


def pick_device(text: str | None) -> torch.device:
    """Return the device that the user named, or the machine's accelerator, or the CPU.

    Raises:
        CommandError: There is no such device.
    """
    import torch

    try:
        device = torch.device(text) if text else torch.accelerator.current_accelerator(check_available=True)
        device = device or torch.device("cpu")
        torch.empty(1, device=device)
    except Exception as error:
        raise CommandError(f"--device: {one_line(error)}") from error
    return device


def _show(rows: list[dict[str, str]]) -> None:
    from rich.table import Table

    columns = ("Model", "Mode", "Size", "Batch", "Run", "Precision", "Images/s", "ms", "p99 ms", "MiB", "J/image")
    table = Table(*columns[:6], box=None, header_style="bold")
    for column in columns[6:]:
        table.add_column(column, justify="right")
    for row in rows:
        mode = "infer" if "infer_batch_size" in row else "train"
        where = [row["model"], mode, row[f"{mode}_img_size"], row[f"{mode}_batch_size"], row["run"], row["precision"]]
        figures = [row[f"{mode}_samples_per_sec"], row[f"{mode}_step_time"], row["latency_p99"]]
        figures += [row["peak_memory_mib"], row["joules_per_sample"]]
        table.add_row(*where, *(["failed"] if row["error"] else figures))
    console().print(table)


def bench(
    models: Annotated[list[str], typer.Argument(help="Models by name or pattern; timm's too.", show_default=False)],
    out: Annotated[
        Path, typer.Option(help="Folder for infer.csv, train.csv and environment.json; what is there is kept.")
    ] = Path("benchmark"),
    mode: Annotated[str, typer.Option(help="infer, train or both: infer,train.")] = "infer",
    batch: Annotated[str, typer.Option(help="Batch sizes: 1,64.")] = "1",
    size: Annotated[str, typer.Option(help="Image sizes: 224,512,384x1024.")] = "224",
    run: Annotated[str, typer.Option(help="eager, compile, graph (a CUDA graph); several: eager,compile.")] = "eager",
    precision: Annotated[str, typer.Option(help="fp32, tf32, bf16, fp16 (autocast); several: fp32,bf16.")] = "fp32",
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Channels-last input and weights.")] = False,
    peers: Annotated[bool, typer.Option("--peers", help="Also DeiT-S, Swin-T and ConvNeXt-T.")] = False,
    warmup: WarmupOption = 10,
    repeats: RepeatsOption = 20,
    seconds: SecondsOption = 10.0,
    device: Annotated[str | None, typer.Option(help="Device; by default a GPU if there is one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure throughput, latency, memory and energy, in timm's own columns; an interrupted run is resumed."""
    from visionmamba.analysis.bench import MODES, PEERS, PRECISIONS, RUNS, Results, Setting, Timing

    names = resolve_models([*models, *(PEERS if peers else ())])
    choices = (
        names, parse_choices(mode, MODES, "--mode"), [parse_size(word) for word in size.split(",")],
        _numbers(batch, "--batch"), parse_choices(run, RUNS, "--run"),
        parse_choices(precision, PRECISIONS, "--precision"),
    )  # fmt: skip
    settings = [Setting(*choice, channels_last) for choice in itertools.product(*choices)]
    where = pick_device(device)
    try:
        results = Results(check_folder(out), where)
    except ValueError as error:
        raise CommandError(f"--out: {one_line(error)}") from error
    with measurements_stay(out), progress(transient=True) as bar:
        task = bar.add_task("measuring", total=len(settings))

        def notify(setting: Setting, row: dict[str, Any]) -> None:
            bar.update(task, advance=1, description=f"{setting.model} {setting.mode} {setting.img_size}")
            if row["error"]:
                typer.echo(f"error: {setting.model}: {row['error']}", err=True)

        rows = results.measure(settings, where, Timing(warmup, repeats, seconds), notify)
    if as_json:
        print_json({"environment": results.environment, "rows": rows})
    else:
        _show(rows)
        typer.echo(f"results  {out}")
    if all(row["error"] for row in rows):
        raise typer.Exit(1)
