"""Training within a given time, classes before their background, and backbones as CUDA graphs."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner

from ..cuda_graph import graph_training

__all__ = ["BackgroundWeightHook", "CudaGraphHook", "TimeBudgetHook"]


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

    def progress(self) -> float:
        """Return the share of the time that has passed, at most 1."""
        return min(1.0, (time.monotonic() - self._start) / self.seconds)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Set the learning rates; make the iteration after the end of the time the last one."""
        progress = self.progress()
        factor = 0.5 * (1 + math.cos(math.pi * progress)) * min(1.0, (runner.iter + 1) / max(1, self.warmup))
        for group in runner.optim_wrapper.param_groups:
            group["lr"] = group["initial_lr"] * factor
        if progress == 1.0:
            runner.train_loop._max_iters = runner.iter + 1


def _progress(runner: Runner) -> float:
    """Return the share of a training that is done: of its time where that is given, of its iterations otherwise."""
    for hook in runner.hooks:
        if isinstance(hook, TimeBudgetHook):
            return hook.progress()
    return min(1.0, runner.iter / runner.max_iters)


@HOOKS.register_module()
class BackgroundWeightHook(Hook):
    """Trains a segmentor on classes first and on their background later.

    Where nearly every pixel is background, a network from random weights first learns to tell it from everything else.
    Its features are then the same for all other classes, a saddle of the loss that takes long to leave. Here the
    background's class weight is small at first, so that the classes are told apart, and then rises to 1 geometrically:
    what is minimised in the end is the plain cross entropy. For mmsegmentation's cross entropy, class 0 the background.

    Args:
        start: The weight at first, above 0.
        begin: Share of the training after which it rises, from 0.
        end: Share of the training at which it is 1.

    Raises:
        ValueError: The weight is not above 0, or not 0 <= begin < end <= 1.
        TypeError: A head's loss has no class weight.
    """

    def __init__(self, start: float = 0.01, begin: float = 0.4, end: float = 0.5) -> None:
        if start <= 0:
            raise ValueError(f"start: expected a weight above 0, got {start}")
        if not 0 <= begin < end <= 1:
            raise ValueError(f"begin and end: expected 0 <= begin < end <= 1, got {begin} and {end}")
        self.start, self.begin, self.end = start, begin, end

    def before_train(self, runner: Runner) -> None:
        """Find the losses of the segmentor's heads."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self._losses = [(head.loss_decode, head.num_classes) for head in _heads(model)]
        for loss, _ in self._losses:
            if not hasattr(loss, "class_weight"):
                raise TypeError(f"BackgroundWeightHook: expected heads of CrossEntropyLoss, got {type(loss).__name__}")

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Set the background's weight in every loss; none where all classes count alike."""
        rest = (self.end - _progress(runner)) / (self.end - self.begin)
        weight = self.start ** min(1.0, rest) if rest > 0 else None
        for loss, classes in self._losses:
            loss.class_weight = None if weight is None else [weight] + [1.0] * (classes - 1)


def _heads(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    for name in ("decode_head", "auxiliary_head"):
        heads = getattr(model, name, None)
        if heads is not None:
            yield from heads if isinstance(heads, torch.nn.ModuleList) else [heads]


@HOOKS.register_module()
class CudaGraphHook(Hook):
    """Replays a backbone's forward and backward passes in training as CUDA graphs.

    Small images, or few, leave a GPU waiting for the launches of hundreds of kernels from Python; a graph is launched
    at once. It is captured at the first iteration, in the precision of the optimizer's wrapper, for batches of that
    shape; others, and validation, run without graphs (:func:`visionmamba.cuda_graph.graph_training`). Without a CUDA
    device it says so and does nothing.

    Raises:
        RuntimeError: Several processes train.
    """

    def before_train(self, runner: Runner) -> None:
        """Check that the training can be captured."""
        if is_model_wrapper(runner.model):
            raise RuntimeError(f"CudaGraphHook: expected one process, got a {type(runner.model).__name__}")
        self._captured = not torch.cuda.is_available()
        if self._captured:
            print_log("CudaGraphHook: no CUDA device, training without graphs", "current", logging.WARNING)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Capture the backbone at the first iteration."""
        if self._captured:
            return
        model = runner.model
        inputs = model.data_preprocessor(data_batch, training=True)["inputs"]
        with runner.optim_wrapper.optim_context(model):
            graph_training(model.backbone, inputs)
        self._captured = True
