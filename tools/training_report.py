"""Curves and last metrics of trainings: ``python tools/training_report.py OUT WORK_DIR [WORK_DIR ...]``.

Reads the logs that the Runner leaves in its working folders (several of one folder are one training that was resumed)
and writes ``OUT/curves.png``, the same numbers in ``OUT/curves.csv``, and ``OUT/summary.json``.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import matplotlib

from visionmamba._files import replacing

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

_METRICS = ("coco/bbox_mAP", "coco/segm_mAP", "mIoU")
_WINDOW = 20


def read_log(work: Path) -> tuple[dict[int, float], dict[str, dict[int, float]]]:
    """Return a training's loss by step, and its metrics by name and step.

    Args:
        work: The Runner's working folder.

    Raises:
        FileNotFoundError: It has no log.
    """
    logs = sorted(work.glob("*/vis_data/scalars.json"))
    if not logs:
        raise FileNotFoundError(f"{work}: no */vis_data/scalars.json there")
    losses: dict[int, float] = {}
    metrics: dict[str, dict[int, float]] = {}
    for row in (json.loads(line) for log in logs for line in log.read_text().splitlines()):
        if "loss" in row:
            losses[row["step"]] = row["loss"]
        for name in _METRICS:
            if name in row:
                metrics.setdefault(name, {})[row["step"]] = row[name]
    return losses, metrics


def summarise(losses: dict[int, float], metrics: dict[str, dict[int, float]]) -> dict:
    """Return the number of steps, the mean loss of the first and the last logged steps, and the last metrics."""
    values = [losses[step] for step in sorted(losses)]
    window = max(1, min(_WINDOW, len(values) // 4))
    return {
        "steps": max(losses),
        "first_loss": sum(values[:window]) / window,
        "last_loss": sum(values[-window:]) / window,
        "metrics": {name: by_step[max(by_step)] for name, by_step in metrics.items()},
    }


def write_csv(path: Path, trainings: dict[str, tuple[dict[int, float], dict[str, dict[int, float]]]]) -> None:
    """Write a row for each value: the training's name, the step, what it is, the value.

    Args:
        path: File to write.
        trainings: What :func:`read_log` returns, by name.
    """
    with replacing(path) as temporary, temporary.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["training", "step", "quantity", "value"])
        for name, (losses, metrics) in trainings.items():
            for quantity, values in {"loss": losses, **metrics}.items():
                writer.writerows([name, step, quantity, f"{values[step]:.5g}"] for step in sorted(values))


def draw(trainings: dict[str, tuple[dict[int, float], dict[str, dict[int, float]]]]) -> Figure:
    """Draw the losses, and the metrics beside them where there are some.

    Args:
        trainings: What :func:`read_log` returns, by name.
    """
    measured = any(metrics for _, metrics in trainings.values())
    figure, axes = plt.subplots(
        1, 2 if measured else 1, figsize=(11 if measured else 6, 4), layout="constrained", squeeze=False
    )
    loss_axes, metric_axes = axes[0, 0], axes[0, -1]
    for name, (losses, metrics) in trainings.items():
        loss_axes.plot(sorted(losses), [losses[step] for step in sorted(losses)], label=name)
        for quantity, values in metrics.items():
            steps = sorted(values)
            metric_axes.plot(steps, [values[step] for step in steps], marker="o", label=f"{name} {quantity}")
    for panel in axes[0]:
        panel.set_xlabel("step")
        panel.legend(fontsize=7)
    if measured:
        metric_axes.set_ylabel("metric (mAP from 0 to 1, mIoU in %)")
    loss_axes.set_ylabel("loss")
    return figure


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("works", type=Path, nargs="+", metavar="work_dir")
    options = parser.parse_args()
    try:
        trainings = {work.name: read_log(work) for work in options.works}
    except FileNotFoundError as error:
        parser.error(str(error))
    summary = {name: summarise(*training) for name, training in trainings.items()}
    figure = draw(trainings)
    options.out.mkdir(parents=True, exist_ok=True)
    with replacing(options.out / "curves.png") as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    write_csv(options.out / "curves.csv", trainings)
    with replacing(options.out / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
