"""A small training loop for the synthetic tasks: a model, a task, AdamW, and a log that can be plotted and resumed."""

from __future__ import annotations

import json
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
from .synthetic import IGNORE, task

__all__ = ["Trainer", "TrainingRun", "create_model", "evaluate", "evaluate_lengths", "parameter_groups", "train"]

_COOLDOWN = 0.2
"""Share of the steps, the last ones, in which the learning rate falls to zero."""
_SOLVED = 3
"""Evaluations in a row at the accuracy asked for that end a run."""


@dataclass
class TrainingRun:
    """What to train on what, and for how long.

    Args:
        layer: ``"Mamba1"``, ``"Mamba2"`` or ``"S4D"``.
        task: Name of a synthetic task.
        options: The task's arguments.
        curriculum: Options that stages of the task begin with, in order, e.g. a shorter ``length``. The next stage,
            finally ``options`` alone, follows once an evaluation reaches ``advance_at``; at the latest after an equal
            share of the first half of the steps.
        advance_at: Accuracy at which the next stage is taken.
        d_model: Width.
        n_layer: Layers.
        ssm_cfg: Further arguments of the mixer.
        steps: Optimisation steps at most.
        batch: Sequences a step.
        lr: Peak learning rate.
        warmup: Share of the steps in which it rises.
        weight_decay: Of AdamW; not applied to state matrices, step sizes, norms and biases.
        eps: Of AdamW. Once every answer is right gradients are far below the usual 1e-8, which then ends learning; a
            smaller one keeps the steps at the learning rate's size.
        label_smoothing: Probability that the targets give to all tokens alike. The loss is then least where the
            answer's logit has one margin at every distance, so it goes on asking for memory after every answer is
            right; without it logits grow until the gradient is exactly 0, whatever the memory.
        seed: Of the weights and the data.
        stop_at: Stop when the accuracy of fresh batches reaches this three evaluations in a row.
        eval_every: Steps between evaluations.
        dtype: Autocast dtype, ``"float32"`` for none.
    """

    layer: str = "Mamba1"
    task: str = "selective_copying"
    options: dict[str, Any] = field(default_factory=dict)
    curriculum: Sequence[dict[str, Any]] = ()
    advance_at: float = 0.9
    d_model: int = 64
    n_layer: int = 2
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    steps: int = 1000
    batch: int = 64
    lr: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.1
    eps: float = 1e-8
    label_smoothing: float = 0.0
    seed: int = 0
    stop_at: float = 1.1
    eval_every: int = 100
    dtype: str = "float32"

    def learning_rate(self, step: int) -> float:
        """Return the rate of a step from 1: a linear rise, a plateau, and a linear fall to zero."""
        rise = step / max(1.0, self.warmup * self.steps)
        fall = (self.steps + 1 - step) / max(1.0, _COOLDOWN * self.steps)
        return self.lr * min(1.0, rise, fall)


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


Batch = tuple[Tensor, Tensor, Tensor]
"""Inputs ``(B, L)``; and, of the n positions that are asked in each row, places and answers, ``(B, n)``."""


def _batches(run: TrainingRun, generator: torch.Generator, **options: Any) -> Iterator[Batch]:
    make, count = task(run.task, **(run.options | options)), 0
    while True:
        inputs, targets = make(run.batch, generator=generator)
        asked = targets != IGNORE
        count = count or int(asked[0].sum())  # a task asks as much in every row
        places = asked.byte().topk(count, dim=1).indices
        yield inputs, places, targets.gather(1, places)


def _asked_logits(model: MambaLMHeadModel, inputs: Tensor, places: Tensor) -> Tensor:
    """Logits of the asked positions only, (B, n, V): the output layer never sees the others."""
    hidden = model.backbone(inputs)
    return model.lm_head(hidden.gather(1, places.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])))


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
    data = _batches(run, torch.Generator(model.lm_head.weight.device).manual_seed(seed), **options)
    scores = []
    for _ in range(batches):
        inputs, places, answers = next(data)
        scores.append((_asked_logits(model, inputs, places).argmax(-1) == answers).float().mean())
    return torch.stack(scores).mean().item()


def evaluate_lengths(
    model: MambaLMHeadModel, run: TrainingRun, lengths: Sequence[int], batches: int = 1
) -> dict[int, float]:
    """Return the accuracy at each length of the task's sequences."""
    return {length: evaluate(model, run, batches, length=length) for length in lengths}


class Trainer:
    """A run in progress.

    Args:
        run: What to train.
        device: Where.
        graph: Replay a step as one CUDA graph: small models are limited by launches.
    """

    def __init__(self, run: TrainingRun, device: str | torch.device = "cpu", graph: bool = False) -> None:
        self.run, self.device, self.graph = run, torch.device(device), graph
        self.model = create_model(run, device).train()
        self.rate = torch.tensor(0.0, device=self.device)  # a tensor, so that a captured step reads the present one
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, run.weight_decay), lr=self.rate if graph else 0.0, betas=(0.9, 0.98),
            eps=run.eps, capturable=graph,
        )  # fmt: skip
        self.step = self.stage = self.solved = 0
        self.seconds = 0.0
        self._generator = torch.Generator(self.device).manual_seed(run.seed)
        self._enter_stage()

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The task's options that each stage of the curriculum changes."""
        return [*self.run.curriculum, {}]

    def _enter_stage(self) -> None:
        self._data = _batches(self.run, self._generator, **self.stages[self.stage])
        self._step = self._captured() if self.graph else self._plain

    def _optimise(self, inputs: Tensor, places: Tensor, answers: Tensor) -> Tensor:
        """Take one step; returns the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, getattr(torch, self.run.dtype), enabled=self.run.dtype != "float32"):
            logits = _asked_logits(self.model, inputs, places)
        loss = F.cross_entropy(
            logits.flatten(0, 1).float(), answers.flatten(), label_smoothing=self.run.label_smoothing
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()

    def _plain(self, batch: Batch, rate: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return self._optimise(*batch)

    def _captured(self) -> Callable[[Batch, float], Tensor]:
        """Capture a step at the present stage's shapes; leaves weights, optimizer and data as they were."""
        example = torch.Generator(self.device).manual_seed(0)
        places = next(_batches(self.run, example, **self.stages[self.stage]))
        before = {p: {name: t.clone() for name, t in state.items()} for p, state in self.optimizer.state.items()}
        weights = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.rate.fill_(self.run.lr)  # not 0: a captured AdamW divides by it
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                self._optimise(*places)
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self._optimise(*places)
        for parameter, state in self.optimizer.state.items():
            for name, tensor in state.items():
                tensor.copy_(before[parameter][name]) if before else tensor.zero_()
        with torch.no_grad():
            for parameter, weight in zip(self.model.parameters(), weights, strict=True):
                parameter.copy_(weight)

        def replay(batch: Batch, rate: float) -> Tensor:
            for place, tensor in zip(places, batch, strict=True):
                place.copy_(tensor)
            self.rate.fill_(rate)
            graph.replay()
            return loss

        return replay

    def advance(self) -> dict[str, Any]:
        """Train up to the next evaluation; returns its entry of the log."""
        began = time.perf_counter()
        target = min(self.run.steps, self.step + self.run.eval_every)
        while self.step < target:
            self.step += 1
            loss = self._step(next(self._data), self.run.learning_rate(self.step))
        options = self.stages[self.stage]
        score = evaluate(self.model, self.run, seed=10**6 + self.step, **options)
        self.seconds += time.perf_counter() - began
        entry = {"step": self.step, "loss": loss.item(), "accuracy": score, "seconds": round(self.seconds, 1)}
        self._judge(score)
        return entry | options

    def _judge(self, score: float) -> None:
        """Count evaluations that solve the task, or take the next stage."""
        if self.stage == len(self.stages) - 1:
            self.solved = self.solved + 1 if score >= self.run.stop_at else 0
            return
        latest = (self.stage + 1) * self.run.steps / (2 * len(self.run.curriculum))
        if score >= self.run.advance_at or self.step >= latest:
            self.stage += 1
            self._enter_stage()

    @property
    def finished(self) -> bool:
        """Whether the steps are done or the task is solved."""
        return self.step >= self.run.steps or self.solved >= _SOLVED

    def state_dict(self) -> dict[str, Any]:
        """Return all that it takes to go on."""
        progress = {name: getattr(self, name) for name in ("step", "stage", "solved", "seconds")}
        states = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return progress | states | {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same run."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups if self.graph else ():
            group["lr"] = self.rate
        for name in ("step", "stage", "solved", "seconds"):
            setattr(self, name, state[name])
        self._enter_stage()
        self._generator.set_state(state["generator"])


def train(
    run: TrainingRun,
    device: str | torch.device = "cpu",
    log: Path | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
    graph: bool = False,
    seconds: float = float("inf"),
    checkpoint: Path | None = None,
) -> tuple[MambaLMHeadModel, list[dict[str, Any]]]:
    """Train a model on a synthetic task.

    Args:
        run: What to train.
        device: Where.
        log: JSON Lines file: the run, then one entry an evaluation.
        report: Called with each entry.
        graph: Replay steps as CUDA graphs.
        seconds: Stop after the evaluation at which this much time has passed.
        checkpoint: File to go on from if it exists, and to write at the end.

    Returns:
        The model in evaluation mode, and the log's entries.
    """
    began, trainer = time.perf_counter(), Trainer(run, device, graph)
    resumed = checkpoint is not None and checkpoint.exists()
    if resumed:
        trainer.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
    if log is not None and not resumed:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(json.dumps({"run": asdict(run)}) + "\n", encoding="utf-8")
    entries: list[dict[str, Any]] = []
    while not trainer.finished:
        entries.append(trainer.advance())
        if log is not None:
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entries[-1]) + "\n")
        if report is not None:
            report(entries[-1])
        if time.perf_counter() - began >= seconds:
            break
    if checkpoint is not None:
        torch.save(trainer.state_dict(), checkpoint)
    return trainer.model.eval(), entries
