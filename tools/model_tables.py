"""The tables of ``benchmarks/PERFORMANCE.md``, from the rows that ``tools/bench_models.py`` wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from visionmamba._files import replacing

__all__ = ["TABLES", "update"]

OFFICIAL = {  # img/s of inference and training, GiB of training; then the goals for img/s
    "vmamba_tiny_s1l8": (3021, 1135, 11.97, 7800, 2700),
    "vmamba_small_s1l20": (2053, 664, 18.04, 5000, 1600),
    "vmamba_base_s1l20": (1657, 590, 24.09, 3600, 1200),
    "vim_tiny_patch16_224": (4265, 883, 4.66, 12000, 3500),
    "vim_small_patch16_224": (2285, 574, 8.81, 6500, 2000),
}
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end table -->)", re.DOTALL)

Row = dict
Rows = list[Row]


def _find(rows: Rows, **wanted) -> Row:
    """Return the row that has these values, or an empty one."""
    return next((row for row in rows if wanted.items() <= row.items()), {})


def _best(rows: Rows, **wanted) -> Row:
    """Return the fastest of the rows that have these values, or an empty one."""
    return min(
        (row for row in rows if wanted.items() <= row.items() and "ms" in row), key=lambda r: r["ms"], default={}
    )


def _names(rows: Rows, key: str = "model") -> list:
    return list(dict.fromkeys(row[key] for row in rows))


def _number(row: Row, key: str, form: str = ",.0f") -> str:
    """Return one figure of a row, or why there is none."""
    if key in row:
        return format(row[key], form)
    return "out of memory" if "OutOfMemory" in row.get("error", "") else "failed" if "error" in row else "-"


def _table(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def zoo(rows: Rows, others: dict[str, Rows]) -> str:
    """Images a second beside the official figures and the goals."""
    lines = []
    for model in _names(rows):
        cells = []
        for mode in ("infer", "train"):
            runs = [_find(rows, model=model, mode=mode, run=run) for run in ("eager", "graph")]
            cells.append(", ".join(_number(row, "images_per_second") for row in runs))
        gib = _find(rows, model=model, mode="train", run="eager").get("peak_gib")
        official, goal, memory = "", "", "-" if gib is None else f"{gib:.2f}"
        if model in OFFICIAL:
            infer, train, most, goal_infer, goal_train = OFFICIAL[model]
            official, goal = f"{infer:,} / {train:,}", f"{goal_infer:,} / {goal_train:,}"
            memory += "" if gib is None else f" ({most}: {100 * gib / most:.0f} %)"
        lines.append([model, official, *cells, goal, memory])
    return _table(
        ["model", "official infer / train, img/s", "infer: eager, graph", "train: eager, graph", "goal infer / train",
         "training memory, GiB (official)"],
        lines,
    )  # fmt: skip


def detection(rows: Rows, others: dict[str, Rows]) -> str:
    """Forward and backward of a detector's images."""
    lines = []
    for model in _names(rows):
        runs = [_find(rows, model=model, run=run) for run in ("eager", "graph")]
        lines.append([model, *(_number(row, "ms", ".1f") for row in runs), _number(runs[0], "peak_gib", ".2f")])
    return _table(["backbone", "eager, ms", "graph, ms", "memory, GiB"], lines)


def resolution(rows: Rows, others: dict[str, Rows]) -> str:
    """Two models on large images, and from which size on the first is ahead."""
    models, lines, ahead = _names(rows), [], {}
    for size in _names(rows, "size"):
        cells = [f"{size} x {size}, {_find(rows, size=size).get('batch', '?')} images"]
        for mode in ("infer", "train"):
            best = [_best(rows, size=size, mode=mode, model=model) for model in models]
            eager = [_find(rows, size=size, mode=mode, model=model, run="eager") for model in models]
            cells.append(" / ".join(_number(row, "ms", ".1f") for row in best))
            cells.append(" / ".join(_number(row, "peak_gib", ".2f") for row in eager))
            if all(best) and best[0]["ms"] < best[1]["ms"]:
                ahead.setdefault(mode, size)
        lines.append(cells)
    said = [
        f"In {name} {models[0]} is faster from {ahead[mode]} pixels on."
        if mode in ahead
        else f"In {name} {models[-1]} is faster at every size."
        for mode, name in (("infer", "inference"), ("train", "training"))
    ]
    table = _table(["size", "inference, ms", "memory, GiB", "training, ms", "memory, GiB"], lines)
    return f"{table}\n{' / '.join(models)}, the faster of eager and graph. {' '.join(said)}\n"


def single(rows: Rows, others: dict[str, Rows]) -> str:
    """One image."""
    lines = []
    for model in _names(rows):
        runs = [_find(rows, model=model, run=run) for run in ("eager", "graph")]
        lines.append([model, *(_number(row, "ms", ".2f") for row in runs)])
    return _table(["model", "eager, ms", "graph, ms"], lines)


def same(rows: Rows, others: dict[str, Rows]) -> str:
    """Whether results are equal to the bit."""

    def said(row: Row, key: str) -> str:
        return "yes" if row.get(key) else "no" if key in row else row.get("error", "-")

    keys = ("graph_equals_eager", "two_training_steps_are_equal")
    lines = [[row["model"], *(said(row, key) for key in keys)] for row in rows]
    return _table(["model", "a graph's output is the eager model's", "two training steps' gradients are equal"], lines)


def families(rows: Rows, others: dict[str, Rows]) -> str:
    """Each family beside its plain PyTorch form."""
    lines = []
    for model in _names(rows):
        cells = []
        for mode in ("infer", "train"):
            plain = _find(rows, model=model, mode=mode, backend="torch")
            runs = [_find(rows, model=model, mode=mode, backend="best", run=run) for run in ("eager", "graph")]
            best = _best(rows, model=model, mode=mode, backend="best")
            factor = f"{plain['ms'] / best['ms']:.1f}" if best and "ms" in plain else "-"
            cells += [*(_number(row, "images_per_second") for row in (plain, *runs)), factor]
            share = "-"
            if "peak_gib" in plain and "peak_gib" in runs[0]:
                share = f"{100 * runs[0]['peak_gib'] / plain['peak_gib']:.0f} % of {plain['peak_gib']:.2f}"
            cells.append(share)
        lines.append([model, *cells])
    header = ["plain, img/s", "eager", "graph", "factor", "memory, GiB"]
    return _table(["model", *(f"{mode}: {name}" for mode in ("infer", "train") for name in header)], lines)


def compiled(rows: Rows, others: dict[str, Rows]) -> str:
    """Models through torch.compile."""
    lines = []
    for model in _names(rows):
        runs = [
            _find(rows, model=model, mode=mode, run="compile") or _find(rows, model=model)
            for mode in ("infer", "train")
        ]
        graphs = [_find(rows, model=model, mode=mode, run="compile graph") for mode in ("infer", "train")]
        speeds = [_number(row, "images_per_second") for pair in zip(runs, graphs, strict=True) for row in pair]
        lines.append([
            model, *speeds, _number(runs[1], "peak_gib", ".2f"), _number(runs[0], "difference_from_eager", ".1e"),
        ])  # fmt: skip
    header = [
        "model",
        "infer, img/s",
        "infer as a graph",
        "train, img/s",
        "train as a graph",
        "training memory, GiB",
        "output's difference from eager, relative",
    ]
    return _table(header, lines)


TABLES: dict[str, Callable[[Rows, dict[str, Rows]], str]] = {
    "zoo": zoo, "detection": detection, "resolution": resolution, "single": single, "same": same,
    "families": families, "compiled": compiled,
}  # fmt: skip


def update(page: Path, folder: Path) -> None:
    """Write the tables of a page anew, between ``<!-- table: NAME -->`` and ``<!-- end table -->``.

    Args:
        page: A Markdown file.
        folder: Where the sections' JSON files are; a section without one keeps its table.
    """
    records = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    rows = {name: records.get(name, {}).get("rows", []) for name in TABLES}

    def replace(match: re.Match[str]) -> str:
        head, name, end = match.groups()
        if not rows[name]:
            return match[0]
        where = records[name]["environment"]
        gpu, commit = where.get("device") or where.get("gpu"), where.get("commit") or "of an unknown commit"
        return f"{head}\n{TABLES[name](rows[name], rows)}\n{gpu}, torch {where.get('torch')}, {commit}.\n\n{end}"

    with replacing(page) as temporary:
        temporary.write_text(_BLOCK.sub(replace, page.read_text()))
