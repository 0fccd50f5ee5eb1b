"""What a run writes down: one CSV row an epoch, and TensorBoard's event files where asked for."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from .._files import replacing

__all__ = ["RunLog"]


class RunLog:
    """The log of a run; rows of epochs that a resumed run repeats are dropped.

    Args:
        folder: Where ``log.csv`` is written.
        step: Step from which the run goes on.
        tensorboard: Write event files too.

    Raises:
        ImportError: TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool) -> None:
        self.path = folder / "log.csv"
        self.rows: list[dict[str, Any]] = []
        if self.path.is_file():
            with self.path.open(newline="", encoding="utf-8") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        self.writer = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError("tensorboard=true needs TensorBoard: pip install tensorboard") from error
            self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Add an epoch's figures; ``step`` is among them."""
        self.rows.append(row)
        columns = list(dict.fromkeys(column for line in self.rows for column in line))
        with replacing(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, columns)
            table.writeheader()
            table.writerows(self.rows)
        if self.writer is not None:
            for name, value in row.items():
                self.writer.add_scalar(name, float(value), int(row["step"]))
            self.writer.flush()
