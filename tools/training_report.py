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


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("works", type=Path, nargs="+", metavar="work_dir")
    options = parser.parse_args()
    summary, trainings = {}, {}
    figure, (loss_axes, metric_axes) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for work in options.works:
        try:
            losses, metrics = read_log(work)
        except FileNotFoundError as error:
            parser.error(str(error))
        trainings[work.name] = losses, metrics
        summary[work.name] = summarise(losses, metrics)
        loss_axes.plot(sorted(losses), [losses[step] for step in sorted(losses)], label=work.name)
        for name, values in metrics.items():
            metric_axes.plot(
                sorted(values), [values[s] for s in sorted(values)], marker="o", label=f"{work.name} {name}"
            )
    loss_axes.set(xlabel="step", ylabel="loss")
    metric_axes.set(xlabel="step")
    for axes in (loss_axes, metric_axes):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    options.out.mkdir(parents=True, exist_ok=True)
    with replacing(options.out / "curves.png") as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    write_csv(options.out / "curves.csv", trainings)
    with replacing(options.out / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
