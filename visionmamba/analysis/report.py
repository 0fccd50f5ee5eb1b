"""A report on the zoo: one HTML page that opens offline, and the same in Markdown with its pictures."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm

from .._files import replacing
from ..inference import input_size
from ..zoo import model_names, published_top1
from .bench import MODES, PEERS, RUNS, Setting, cost_at_size
from .cost import ModelCost
from .published import PUBLISHED, agrees

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Measurement", "Plan", "default_models", "plan", "read_accuracy", "sweep_models", "write_report"]

PEERS_TOP1 = {"deit_small_patch16_224": 79.8, "swin_tiny_patch4_window7_224": 81.3, "convnext_tiny": 82.1}
"""Published top-1 of the peers (their papers)."""

_COLUMNS = (
    "Model", "Input", "Params (M)", "Params published", "GFLOPs", "GFLOPs published", "GFLOPs differ", "Scan's share",
    "Images/s", "Images/s compiled", "Images/s CUDA graph", "Training images/s", "Training images/s compiled",
    "Training images/s CUDA graph", "Energy (mJ)", "Memory (MiB)", "Training memory (MiB)", "Top-1 published (%)",
    "Top-1 ours (%)", "Top-1 differs",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What a report measures.

    Args:
        table: Settings of the table: a forward and perhaps a training step of every model.
        sweep: Settings of the plots over the resolution.
    """

    table: list[Setting]
    sweep: list[Setting]


@dataclass
class Measurement:
    """What was measured, by setting: rows of :class:`visionmamba.analysis.bench.Results`.

    Args:
        rows: The rows.
        environment: What they were measured with.
    """

    rows: dict[Setting, dict[str, str]] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    def number(self, setting: Setting, column: str) -> float | None:
        """Return a figure, or None if there is none."""
        row = self.rows.get(setting)
        return float(row[column]) if row and row.get(column) else None


def default_models() -> list[str]:
    """Return the zoo's models of 224-pixel images, and their peers of timm."""
    names = [name for name in model_names() if _takes_images(name) and _own_size(name) == (224, 224)]
    return [*names, *PEERS]


def _takes_images(name: str) -> bool:
    try:
        size = input_size(timm.create_model(name, device="meta"))
    except ImportError:  # it needs a package that is not installed
        return False
    return len(size) == size[0] == 3  # colours, height, width


_PEERS_FAMILY = "timm"


def _family(name: str) -> str:
    base = name.split(".")[0]
    return timm.model_entrypoint(base).__module__.rpartition(".")[2] if base in model_names() else _PEERS_FAMILY


def _own_size(name: str) -> tuple[int, int]:
    return tuple(timm.get_pretrained_cfg(name).input_size[-2:])


def sweep_models(models: Sequence[str]) -> list[str]:
    """Return what the plots over the resolution compare: each family's smallest with a published accuracy, and DeiT-S.

    Args:
        models: The report's models.
    """
    families: dict[str, list[str]] = {}
    for name in models:
        if name in model_names() and _takes_images(name):
            families.setdefault(_family(name), []).append(name)
    smallest = [
        min(members, key=lambda name: (_top1(name) is None, _cost(name).params)) for members in families.values()
    ]
    return [*smallest, PEERS[0]]


def _cost(name: str) -> ModelCost:
    return cost_at_size(name, _own_size(name))


def plan(
    models: Sequence[str], sweep: Sequence[str], sizes: Sequence[tuple[int, int]], batch: int, training: bool,
    precision: str, runs: Sequence[str] = ("eager",), channels_last: bool = False,
) -> Plan:  # fmt: skip
    """Return what is to be measured.

    Args:
        models: Models of the table.
        sweep: Models of the plots over the resolution.
        sizes: Resolutions of those.
        batch: Batch of the table; the plots are of single images.
        training: Whether training steps are measured too.
        precision: One of :data:`visionmamba.analysis.bench.PRECISIONS`.
        runs: How the table's models run, some of :data:`visionmamba.analysis.bench.RUNS`; the plots' as the last one.
        channels_last: Layout of input and weights.
    """
    modes = ("infer", "train") if training else ("infer",)
    rest = (precision, channels_last)
    return Plan(
        [Setting(name, mode, _own_size(name), batch, run, *rest) for run in runs for mode in modes for name in models],
        [Setting(name, "infer", tuple(size), 1, runs[-1], *rest) for name in sweep for size in sizes],
    )


def read_accuracy(path: Path) -> dict[str, float]:
    """Return our top-1 by model from a table with timm's columns ``model`` and ``top1``.

    Raises:
        ValueError: It is not such a table.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return {row["model"].split(".")[0]: float(row["top1"]) for row in csv.DictReader(file)}
    except (KeyError, ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a CSV table with columns model and top1 ({error!r})") from error


def _top1(name: str) -> float | None:
    base = name.split(".")[0]
    return PEERS_TOP1.get(base) if base in PEERS_TOP1 else published_top1(timm.get_pretrained_cfg(name).to_dict())


def _text(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _cells(name: str, measured: Measurement, settings: list[Setting], ours: dict[str, float]) -> list[str]:
    """Return a model's row of the table."""
    cost, published = _cost(name), PUBLISHED.get(name.split(".")[0])
    gflops = published.gflops if published else None
    difference = ""
    if gflops:
        flops = cost.flops / 1e9
        difference = "0" if agrees(flops, gflops) else f"{flops / float(gflops) - 1:+.1%}"
    top1, own = _top1(name), ours.get(name.split(".")[0])
    return [
        name, "x".join(map(str, cost.input_size[2:])), f"{cost.params / 1e6:.2f}",
        (published.params or "") if published else "", f"{cost.flops / 1e9:.2f}", gflops or "", difference,
        f"{cost.scan / cost.flops:.0%}", *_measured_cells(measured, settings), _text(top1, 1), _text(own, 2),
        "" if own is None or top1 is None else f"{own - top1:+.2f}",
    ]  # fmt: skip


def _measured_cells(measured: Measurement, settings: list[Setting]) -> list[str]:
    """Return throughput of inference and training by run, energy of inference, and memory of both."""

    def figure(mode: str, column: str, runs: Sequence[str] = RUNS) -> float | None:
        """Return the figure of the first of the runs that has one."""
        chosen = [setting for run in runs for setting in settings if (setting.mode, setting.run) == (mode, run)]
        return next(filter(None, (measured.number(setting, column) for setting in chosen)), None)

    speeds = [_text(figure(mode, f"{mode}_samples_per_sec", [run]), 1) for mode in MODES for run in RUNS]
    joules = figure("infer", "joules_per_sample")
    memory = [_text(figure(mode, "peak_memory_mib"), 0) for mode in MODES]
    return [*speeds, _text(joules and 1e3 * joules, 1), *memory]


def _table(planned: Plan, measured: Measurement, accuracy: dict[str, float]) -> dict[str, Any]:
    """Return the table's columns and rows, without columns that are empty."""
    rows = _rows(planned, measured, accuracy)
    columns, cells = _without_empty(_COLUMNS, [row["cells"] for row in rows])
    return {"columns": columns, "rows": [{**row, "cells": used} for row, used in zip(rows, cells, strict=True)]}


def _without_empty(columns: Sequence[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    used = [index for index in range(len(columns)) if any(row[index] for row in rows)]
    return [columns[index] for index in used], [[row[index] for index in used] for row in rows]


def _rows(planned: Plan, measured: Measurement, accuracy: dict[str, float]) -> list[dict[str, Any]]:
    by_model: dict[str, list[Setting]] = {}
    for setting in planned.table:
        by_model.setdefault(setting.model, []).append(setting)
    rows = []
    for name, settings in by_model.items():
        failed = any(measured.rows.get(setting, {}).get("error") for setting in settings)
        try:
            cells = _cells(name, measured, settings, accuracy)
        except Exception:  # the same failure is listed by name; a model that cannot be built has no figures
            cells, failed = [name] + [""] * (len(_COLUMNS) - 1), True
        kind = "failed" if failed else "peer" if name.split(".")[0] not in model_names() else ""
        rows.append({"cells": cells, "kind": kind})
    return rows


def _failures(measured: Measurement) -> list[dict[str, str]]:
    return [
        {
            "model": setting.model,
            "what": f"{setting.mode}, {setting.run}, {setting.img_size} pixels, batch {setting.batch}",
            "error": row["error"],
        }
        for setting, row in measured.rows.items()
        if row["error"]
    ]


_LOOKS = {
    "vim": ("#0072B2", "o"),
    "vmamba": ("#D55E00", "^"),
    "plainmamba": ("#009E73", "D"),
    "local_vim": ("#56B4E9", "v"),
    "local_vmamba": ("#CC79A7", "P"),
    "efficient_vmamba": ("#E69F00", "X"),
    "mamba_nd": ("#000000", "*"),
    _PEERS_FAMILY: ("0.45", "s"),
}
"""Colour and marker of each family, the same in every plot: Okabe and Ito's colours, apart for the colour-blind too."""


def _look(name: str) -> dict[str, str]:
    color, marker = _LOOKS.get(_family(name), ("#882255", "h"))  # beside the families of image classifiers
    return {"color": color, "marker": marker}


def _new_figure() -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _logarithmic(axis: Any) -> None:
    """Make an axis logarithmic, with ticks that are written out: at 1, 2 and 5, or more where they would be few."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 20 * low else (1, 1.5, 2, 3, 4, 5, 7)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:,g}")


def _accuracy_figure(planned: Plan, measured: Measurement) -> Figure | None:
    fastest: dict[str, float] = {}
    for setting in planned.table:
        if setting.mode == "infer":
            speed = measured.number(setting, "infer_samples_per_sec") or 0.0
            fastest[setting.model] = max(speed, fastest.get(setting.model, 0.0))
    points = [(name, speed, _top1(name)) for name, speed in fastest.items() if speed and _top1(name) is not None]
    if not points:
        return None
    figure, axes = _new_figure()
    for family in dict.fromkeys(_family(name) for name, _, _ in points):
        names, speeds, accuracies = zip(*(point for point in points if _family(point[0]) == family), strict=True)
        axes.scatter(speeds, accuracies, label=family, s=36, **_look(names[0]))
    axes.set(xlabel="images a second", ylabel="published top-1 (%)")
    _logarithmic(axes.xaxis)
    axes.legend(frameon=False, fontsize=8)
    _name_points(figure, axes, points)
    return figure


def _name_points(figure: Figure, axes: Any, points: list[tuple[str, float, float]]) -> None:
    """Name points, each where its name hides no point and no other name; far from it with a line to it."""
    figure.draw_without_rendering()  # settles where the data are
    to_points = 72 / figure.dpi
    places = [axes.transData.transform(point[1:]) * to_points for point in points]
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in places]
    shifts = sorted(((dx, 7 * row - 2) for row in range(-9, 10) for dx in (5, -5)), key=lambda shift: abs(shift[1]))
    for (name, *where), (x, y) in zip(points, places, strict=True):
        width = 3.4 * len(name)
        for dx, dy in shifts:
            left = x + dx - (width if dx < 0 else 0)
            box = (left, y + dy, left + width, y + dy + 6)
            if not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
                break
        taken.append(box)
        line = dict(arrowstyle="-", linewidth=0.3, color="0.6", shrinkA=0, shrinkB=2) if abs(dy) > 7 else None
        options = dict(fontsize=6, ha="right" if dx < 0 else "left", arrowprops=line)
        axes.annotate(name, where, xytext=(dx, dy), textcoords="offset points", **options)


def _sweep_figure(planned: Plan, measured: Measurement, column: str, label: str) -> Figure | None:
    lines = _lines(planned, measured, column)
    if not lines:
        return None
    figure, axes = _new_figure()
    for name, points in lines.items():
        line = "--" if _family(name) == _PEERS_FAMILY else "-"
        axes.plot(*zip(*points, strict=True), markersize=6, linestyle=line, label=name, **_look(name))
    sides = sorted({side for points in lines.values() for side, _ in points})
    axes.set(xlabel="side of the image (pixels)", ylabel=label)
    _logarithmic(axes.xaxis)
    _logarithmic(axes.yaxis)
    axes.set_xticks(sides, [f"{side:.0f}" for side in sides], fontsize=8)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _lines(planned: Plan, measured: Measurement, column: str) -> dict[str, list[tuple[float, float]]]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for setting in planned.sweep:
        value = measured.number(setting, column)
        if value:
            lines.setdefault(setting.model, []).append((math.sqrt(math.prod(setting.size)), value))
    return {name: sorted(points) for name, points in lines.items()}


_SWEEPS = (("infer_step_time", "milliseconds an image"), ("peak_memory_mib", "memory (MiB)"))


def _growth(planned: Plan, measured: Measurement) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of each model's exponents over the number of pixels, between the two largest images."""
    exponents: dict[str, list[str]] = {}
    for place, (column, _) in enumerate(_SWEEPS):
        for name, points in _lines(planned, measured, column).items():
            if len(points) > 1:
                (side, value), (larger, more) = points[-2:]
                exponent = math.log(more / value) / (2 * math.log(larger / side))
                exponents.setdefault(name, [""] * len(_SWEEPS))[place] = f"{exponent:.2f}"
    return _without_empty(("Model", "Time", "Memory"), [[name, *figures] for name, figures in exponents.items()])


def _svg(figure: Figure, name: str) -> str:
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _figures(planned: Plan, measured: Measurement) -> list[dict[str, str]]:
    run = _run_words(planned.table[-1].run)
    drawn = [
        ("accuracy", "Accuracy against throughput", _accuracy_figure(planned, measured),
         "Published top-1 on ImageNet-1k against the throughput measured here, of each model as it runs "
         "fastest; up and to the right is better."),
        ("time", "Time against resolution", _sweep_figure(planned, measured, *_SWEEPS[0]),
         f"One image, forward{run}. A scan's time grows in proportion to the pixels, attention's with their square."),
        ("memory", "Memory against resolution", _sweep_figure(planned, measured, *_SWEEPS[1]),
         f"One image, forward{run}, with the parameters. Attention that never stores its matrix takes memory in "
         "proportion to the pixels too."),
    ]  # fmt: skip
    return [
        {"name": name, "title": title, "svg": _svg(figure, name), "caption": caption}
        for name, title, figure, caption in drawn
        if figure is not None
    ]


def _run_words(run: str) -> str:
    return {"eager": "", "compile": ", compiled", "graph": ", in a CUDA graph"}[run]


def _context(planned: Plan, measured: Measurement, accuracy: dict[str, float]) -> dict[str, Any]:
    first, run_of_plots = planned.table[0], _run_words(planned.table[-1].run)
    growth_columns, growth = _growth(planned, measured)
    where = measured.environment
    sources = {row.get("memory_from") for row in measured.rows.values()} - {"", None}
    memory = "the allocator's peak" if sources == {"allocator"} else "counted from the tensors' shapes"
    table = _table(planned, measured, accuracy)
    energy = f"; energy is the whole device's, for an image at inference{run_of_plots}"
    return {
        "title": "The zoo on " + str(where.get("device", "this machine")),
        "summary": f"{len({s.model for s in planned.table})} models, {first.precision}, batch {first.batch}, "
        f"PyTorch {where.get('torch')}, commit {where.get('commit') or 'unknown'}.",
        "caption": "GFLOPs: 1 a multiply-accumulate, scans as 9BLDN + BLD; benchmarks/flops.md explains differences "
        f"from published figures. Images a second from the median step; memory is {memory}"
        f"{energy if 'Energy (mJ)' in table['columns'] else ''}. A training step is forward and backward.",
        **table,
        "failures": _failures(measured),
        "figures": _figures(planned, measured),
        "growth_columns": growth_columns,
        "growth": growth,
        "environment": [(key, value) for key, value in where.items() if value is not None],
    }


def _markdown(context: dict[str, Any]) -> str:
    lines = [f"# {context['title']}", "", context["summary"], "", *_markdown_head(context["columns"])]
    lines += ["| " + " | ".join(map(_escape, row["cells"])) + " |" for row in context["rows"]]
    lines += ["", context["caption"]]
    if context["failures"]:
        lines += ["", "## Failed", ""]
        lines += [f"- `{fail['model']}` ({fail['what']}): {_escape(fail['error'])}" for fail in context["failures"]]
    for figure in context["figures"]:
        lines += ["", f"## {figure['title']}", "", f"![{figure['title']}]({figure['name']}.svg)", "", figure["caption"]]
    if context["growth"]:
        lines += ["", "Exponent of the growth with the number of pixels over the largest step of the resolution:", ""]
        lines += _markdown_head(context["growth_columns"])
        lines += ["| " + " | ".join(row) + " |" for row in context["growth"]]
    lines += ["", "## Measured with", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {_escape(str(value))} |" for key, value in context["environment"]]
    return "\n".join(lines) + "\n"


def _markdown_head(columns: list[str]) -> list[str]:
    return ["| " + " | ".join(columns) + " |", "|---" + "|--:" * (len(columns) - 1) + "|"]


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def write_report(
    folder: Path, planned: Plan, measured: Measurement, accuracy: dict[str, float] | None = None
) -> list[Path]:
    """Write ``report.html``, ``report.md`` and the pictures of the latter.

    Args:
        folder: Where to.
        planned: What was to be measured.
        measured: What was measured; what is missing stays empty.
        accuracy: Our own top-1 by model.

    Returns:
        The files.

    Raises:
        ImportError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("a report needs jinja2: pip install jinja2") from error
    context = _context(planned, measured, accuracy or {})
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    inline = [{**figure, "svg": figure["svg"][figure["svg"].index("<svg") :]} for figure in context["figures"]]
    page = jinja2.Environment(autoescape=True).from_string(template).render({**context, "figures": inline})
    files = {"report.html": page, "report.md": _markdown(context)}
    files |= {f"{figure['name']}.svg": figure["svg"] for figure in context["figures"]}
    for name, text in files.items():
        with replacing(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [folder / name for name in files]
