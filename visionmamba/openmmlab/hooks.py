"""Training within a given time."""

from __future__ import annotations

import math
import time
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner

__all__ = ["TimeBudgetHook"]


@HOOKS.register_module()
class TimeBudgetHook(Hook):
    """Ends a training by iterations when its time is over, the learning rates annealed to zero by then.

    The rates follow a cosine of the time that has passed, after a linear warmup, in place of the config's schedulers.
    What happens at a training's end (validation, the last checkpoint) happens then. For one process.

    Args:
        seconds: Time from the first iteration to the last.
        warmup: Iterations over which the learning rates rise from zero.

    Raises:
        ValueError: The time is not above zero.
        TypeError: The training is not by iterations.
    """

    priority = "VERY_LOW"

    def __init__(self, seconds: float, warmup: int = 200) -> None:
        if seconds <= 0:
            raise ValueError(f"seconds: expected more than 0, got {seconds}")
        self.seconds, self.warmup = seconds, warmup

    def before_train(self, runner: Runner) -> None:
        """Start the clock."""
        if not isinstance(runner.train_loop, IterBasedTrainLoop):
            raise TypeError(f"TimeBudgetHook: expected an IterBasedTrainLoop, got {type(runner.train_loop).__name__}")
        for group in runner.optim_wrapper.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self._start = time.monotonic()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Set the learning rates; make the iteration after the end of the time the last one."""
        progress = min(1.0, (time.monotonic() - self._start) / self.seconds)
        factor = 0.5 * (1 + math.cos(math.pi * progress)) * min(1.0, (runner.iter + 1) / max(1, self.warmup))
        for group in runner.optim_wrapper.param_groups:
            group["lr"] = group["initial_lr"] * factor
        if progress == 1.0:
            runner.train_loop._max_iters = runner.iter + 1
