"""A small training loop for the synthetic tasks: a model, a task, AdamW, and a log that can be plotted."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import MambaConfig
from .model import MambaLMHeadModel
from .synthetic import IGNORE, accuracy, task

__all__ = ["TrainingRun", "create_model", "evaluate", "parameter_groups", "train"]


@dataclass
class TrainingRun:
    """What to train on what, and for how long.

    Args:
        layer: ``"Mamba1"``, ``"Mamba2"`` or ``"S4D"``.
        task: Name of a synthetic task.
        options: The task's arguments.
        d_model: Width.
        n_layer: Layers.
        ssm_cfg: Further arguments of the mixer.
        steps: Optimisation steps at most.
        batch: Sequences a step.
        lr: Peak learning rate.
        warmup: Share of the steps in which it rises.
        weight_decay: Of AdamW; not applied to state matrices, step sizes, norms and biases.
        seed: Of the weights and the data.
        stop_at: Stop when the accuracy of a fresh batch reaches this three evaluations in a row.
        eval_every: Steps between evaluations.
        dtype: Autocast dtype, ``"float32"`` for none.
    """

    layer: str = "Mamba1"
    task: str = "selective_copying"
    options: dict[str, Any] = field(default_factory=dict)
    d_model: int = 64
    n_layer: int = 2
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    steps: int = 1000
    batch: int = 64
    lr: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.1
    seed: int = 0
    stop_at: float = 1.1
    eval_every: int = 100
    dtype: str = "float32"


def create_model(run: TrainingRun, device: str | torch.device = "cpu") -> MambaLMHeadModel:
    """Return the run's model with a vocabulary for its task."""
    vocabulary = run.options.get("vocab_size", 8192 if run.task == "mqar" else 16) + (run.task == "induction_heads")
    torch.manual_seed(run.seed)
    config = MambaConfig(
        d_model=run.d_model, n_layer=run.n_layer, vocab_size=vocabulary, ssm_cfg={"layer": run.layer} | run.ssm_cfg
    )
    return MambaLMHeadModel(config).to(device)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters into those with weight decay, and state matrices, step sizes, norms and biases without."""
    decayed, others = [], []
    for parameter in model.parameters():
        exempt = parameter.dim() < 2 or getattr(parameter, "_no_weight_decay", False)
        (others if exempt else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _batches(
    run: TrainingRun, device: str | torch.device, seed: int, **options: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    make = task(run.task, **(run.options | options))
    generator = torch.Generator().manual_seed(seed)
    while True:
        inputs, targets = make(run.batch, generator=generator)
        yield inputs.to(device), targets.to(device)


def _asked_logits(model: MambaLMHeadModel, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and targets of the asked positions only: the output layer never sees the others."""
    hidden = model.backbone(inputs)
    asked = targets != IGNORE
    return model.lm_head(hidden[asked]), targets[asked]


@torch.no_grad()
def evaluate(model: MambaLMHeadModel, run: TrainingRun, batches: int = 1, seed: int = 10**6, **options: Any) -> float:
    """Return the accuracy on fresh data.

    Args:
        model: The model.
        run: Its run.
        batches: Batches to average.
        seed: Of the data.
        **options: Arguments of the task that differ from the run's, e.g. a longer ``length``.
    """
    device = model.lm_head.weight.device
    data = _batches(run, device, seed, **options)
    correct = total = 0
    for _ in range(batches):
        logits, targets = _asked_logits(model, *next(data))
        correct += accuracy(logits.unsqueeze(0), targets.unsqueeze(0)) * targets.numel()
        total += targets.numel()
    return correct / total


def train(
    run: TrainingRun,
    device: str | torch.device = "cpu",
    log: Path | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[MambaLMHeadModel, list[dict[str, Any]]]:
    """Train a model on a synthetic task.

    Args:
        run: What to train.
        device: Where.
        log: JSON Lines file: the run, then one entry an evaluation.
        report: Called with each entry.

    Returns:
        The model in evaluation mode, and the log's entries.
    """
    model = create_model(run, device).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, run.weight_decay), lr=run.lr, betas=(0.9, 0.98))
    warmup = max(1, int(run.warmup * run.steps))

    def schedule(step: int) -> float:
        rising = (step + 1) / warmup
        return min(rising, 0.5 * (1 + math.cos(math.pi * min(1.0, step / run.steps))) * 0.99 + 0.01)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    autocast = torch.autocast(torch.device(device).type, getattr(torch, run.dtype), enabled=run.dtype != "float32")
    entries: list[dict[str, Any]] = []
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(json.dumps({"run": asdict(run)}) + "\n", encoding="utf-8")
    data, began, solved = _batches(run, device, run.seed), time.perf_counter(), 0
    for step in range(1, run.steps + 1):
        with autocast:
            logits, targets = _asked_logits(model, *next(data))
            loss = F.cross_entropy(logits.float(), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % run.eval_every == 0 or step == run.steps:
            score = evaluate(model, run, seed=10**6 + step)
            seconds = round(time.perf_counter() - began, 1)
            entries.append({"step": step, "loss": loss.item(), "accuracy": score, "seconds": seconds})
            if log is not None:
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entries[-1]) + "\n")
            if report is not None:
                report(entries[-1])
            solved = solved + 1 if score >= run.stop_at else 0
            if solved == 3:
                break
    return model.eval(), entries


def evaluate_lengths(
    model: MambaLMHeadModel, run: TrainingRun, lengths: Sequence[int], batches: int = 1
) -> dict[int, float]:
    """Return the accuracy at each length of the task's sequences."""
    return {length: evaluate(model, run, batches, length=length) for length in lengths}
