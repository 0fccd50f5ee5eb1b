"""``visionmamba report``."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._arguments import parse_size, resolve_models
from ._common import CommandError, check_folder, measurements_stay, one_line, progress
from .bench import RepeatsOption, SecondsOption, WarmupOption, parse_choices, pick_device

if TYPE_CHECKING:
    import torch

    from visionmamba.analysis.bench import Results, Setting, Timing
    from visionmamba.analysis.report import Measurement, Plan

_SIZES = "224,384,512,768,1024,1536,2048"


def _accuracy(path: Path | None) -> dict[str, float]:
    from visionmamba.analysis.report import read_accuracy

    if path is None:
        return {}
    try:
        return read_accuracy(path)
    except (ValueError, OSError) as error:
        raise CommandError(f"--accuracy: {one_line(error)}") from error


def report(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Models by name or pattern; by default all of 224 pixels and three of timm's."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.html, report.md and the measurements.")] = Path("report"),
    batch: Annotated[int | None, typer.Option(min=1, help="Batch of the table; 128 on a GPU, 1 on a CPU.")] = None,
    sizes: Annotated[str, typer.Option(help="Resolutions of the plots.")] = _SIZES,
    sweep: Annotated[
        str | None, typer.Option(help="Models of those plots; by default one of each family and DeiT-S.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, tf32, bf16, fp16; bf16 on a GPU, fp32 on a CPU.")] = None,
    training: Annotated[bool, typer.Option("--training/--no-training", help="Measure training steps too.")] = True,
    accuracy: Annotated[
        Path | None, typer.Option(help="CSV table of our own top-1: timm's columns model and top1.")
    ] = None,
    runs: Annotated[
        str | None,
        typer.Option(help="How models run: eager, compile, graph; the plots' as the last. eager,graph on NVIDIA GPUs."),
    ] = None,
    warmup: WarmupOption = 10,
    repeats: RepeatsOption = 20,
    seconds: SecondsOption = 2.0,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Or show what is there already.")] = True,
    device: Annotated[str | None, typer.Option(help="Device; by default a GPU if there is one.")] = None,
) -> None:
    """Measure the zoo and write a report: a page that opens offline, and Markdown; an interrupted run is resumed."""
    import torch

    from visionmamba.analysis.bench import PRECISIONS, RUNS, Timing
    from visionmamba.analysis.report import default_models, plan, sweep_models, write_report

    names = resolve_models(models) if models else default_models()
    resolutions = [parse_size(word, "--sizes") for word in sizes.split(",")]
    where = pick_device(device)
    gpu = where.type == "cuda"
    precision = precision or ("bf16" if gpu else "fp32")
    if precision not in PRECISIONS:
        raise CommandError(f"--precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    how = parse_choices(runs or ("eager,graph" if gpu and not torch.version.hip else "eager"), RUNS, "--runs")
    ours = _accuracy(accuracy)
    swept = resolve_models(sweep.split(",")) if sweep else sweep_models(names)
    planned = plan(names, swept, resolutions, batch or (128 if gpu else 1), training, precision, how)
    timing = Timing(warmup, repeats, seconds, energy_seconds=min(seconds, 1.0))
    measured = _measure(planned, out, where, timing) if measure else _read(planned, out)
    for path in write_report(out, planned, measured, ours)[:2]:
        typer.echo(f"report  {path}")
    if all(row["error"] for row in measured.rows.values()):
        raise typer.Exit(1)


def _open(out: Path, device: torch.device | None) -> Results:
    from visionmamba.analysis.bench import Results

    if device is None and not (out / "measurements" / "environment.json").exists():
        raise CommandError(f"--out: {out} holds no measurements to show")
    try:
        return Results(check_folder(out) / "measurements", device)
    except ValueError as error:
        raise CommandError(f"--out: {one_line(error)}") from error


def _read(planned: Plan, out: Path) -> Measurement:
    """Return what was measured before of what is planned."""
    from visionmamba.analysis.report import Measurement

    results = _open(out, None)
    found = {setting: results.find(setting, failed=True) for setting in planned.table + planned.sweep}
    return Measurement({setting: row for setting, row in found.items() if row}, results.environment)


def _measure(planned: Plan, out: Path, device: torch.device, timing: Timing) -> Measurement:
    """Measure what is planned; energy of the table's inference only, in the last of the runs."""
    from visionmamba.analysis.report import Measurement

    results = _open(out, device)
    measured = Measurement(environment=results.environment)
    first = [setting for setting in planned.table if setting.run == planned.table[0].run]
    settings = list(dict.fromkeys([*first, *planned.sweep, *planned.table]))
    with measurements_stay(out), progress(transient=True) as bar, _what_is_loaded_is_no_garbage():
        task = bar.add_task("measuring", total=len(settings))

        def notify(setting: Setting, row: dict[str, Any]) -> None:
            measured.rows[setting] = row
            bar.update(task, advance=1, description=f"{setting.model} {setting.mode} {setting.img_size}")
            if row["error"]:
                typer.echo(f"error: {setting.model} at {setting.img_size}: {row['error']}", err=True)

        for setting in settings:
            energy = (setting.mode, setting.run) == ("infer", planned.table[-1].run) and setting in planned.table
            results.measure([setting], device, timing if energy else replace(timing, energy_seconds=0.0), notify)
    return measured


@contextlib.contextmanager
def _what_is_loaded_is_no_garbage() -> Iterator[None]:
    """Leave what is loaded by now out of the garbage collection before each setting, which would go through it all."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
