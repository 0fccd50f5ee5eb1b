"""The training loop."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import Mixup, resolve_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2

from .._text import near_names, one_line
from ..cuda_graph import graph_training
from ..inference import checkpoint_cfg
from .checkpoint import CheckpointFolder, full_state, load_full_state, save_weights
from .config import ConfigError, TrainConfig
from .data import DataError, Source, open_source, seed_everything
from .distributed import World, check_world, parallelize, synchronizing

__all__ = ["Interrupted", "Trainer", "TrainingError", "create_model", "evaluate"]

_AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_COUNTERS = ("step", "nonfinite", "nonfinite_in_a_row", "best")
_STEP = 1 << 20  # tells the seeds of steps from those of images


class TrainingError(RuntimeError):
    """A run that cannot go on; one sentence."""


class Interrupted(RuntimeError):  # noqa: N818 (asked for, not a fault)
    """SIGTERM or Ctrl-C came; the run was saved.

    Args:
        message: One sentence.
        signal: The signal's number.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def create_model(config: TrainConfig, num_classes: int | None = None) -> nn.Module:
    """Build the recipe's model with the weights it starts from.

    Args:
        config: The recipe.
        num_classes: Classes; by default the model's.

    Returns:
        The model, on the CPU; with ``linear_probe`` only the classifier takes gradients.

    Raises:
        ConfigError: The model does not take these arguments.
    """
    arguments = dict(config.model_args)
    optional = dict(
        num_classes=num_classes, in_chans=config.in_chans, img_size=config.img_size, drop_path_rate=config.drop_path
    )
    arguments.update({name: value for name, value in optional.items() if value is not None})
    if config.checkpoint:
        overlay = {**checkpoint_cfg(config.checkpoint), "file": config.checkpoint}
        arguments["pretrained_cfg_overlay"] = overlay
    try:
        model = timm.create_model(config.model, pretrained=config.pretrained or bool(config.checkpoint), **arguments)
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"model: {config.model} cannot be made as the recipe says ({one_line(error)})") from error
    if config.grad_checkpointing:
        model.set_grad_checkpointing()
    if config.linear_probe:
        model.requires_grad_(False)
        model.get_classifier().requires_grad_(True)
    return model


def data_settings(config: TrainConfig, model: nn.Module) -> dict[str, Any]:
    """Return timm's data configuration: the model's published preprocessing, changed where the recipe says."""
    height, width = (config.img_size,) * 2 if config.img_size else model.pretrained_cfg["input_size"][-2:]
    given = {"input_size": (model.in_chans, height, width)}
    if model.in_chans == 1 and config.mean is None:
        given.update(mean=(0.5,), std=(0.5,))
    for name in ("interpolation", "crop_pct", "mean", "std"):
        if getattr(config, name) is not None:
            given[name] = getattr(config, name)
    return resolve_data_config(given, pretrained_cfg=model.pretrained_cfg)


def create_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Group the parameters by weight decay and depth, and build the optimiser.

    Raises:
        ConfigError: There is no such optimiser, or it does not take the recipe's values.
    """
    if config.opt.lower().split("_")[-1] not in list_optimizers():
        raise ConfigError(f"opt: unknown optimiser {config.opt!r}{near_names(config.opt, list_optimizers())}")
    patterns = config.no_weight_decay
    if patterns is None:
        patterns = tuple(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else ()
    if config.layer_decay is None:
        groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=patterns)
    else:
        groups = param_groups_layer_decay(
            model, config.weight_decay, no_weight_decay_list=patterns, layer_decay=config.layer_decay
        )
    groups = _slower_backbone(groups, model, config.backbone_lr)
    kwargs = {"betas": config.betas, "eps": config.opt_eps}
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    try:
        return create_optimizer_v2(
            groups, config.opt, lr=config.lr * _lr_scale(config), weight_decay=0.0, momentum=config.momentum, **kwargs
        )
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"opt: {config.opt} does not take the recipe's values ({one_line(error)})") from error


def _slower_backbone(groups: list[dict[str, Any]], model: nn.Module, factor: float) -> list[dict[str, Any]]:
    """Part each group into the classifier's parameters and the others, whose learning rate is scaled."""
    if factor == 1:
        return groups
    classifier = {id(parameter) for parameter in model.get_classifier().parameters()}
    parted = []
    for group in groups:
        for scale, is_classifier in ((1.0, True), (factor, False)):
            members = [parameter for parameter in group["params"] if (id(parameter) in classifier) == is_classifier]
            if members:
                parted.append({**group, "params": members, "lr_scale": scale * group.get("lr_scale", 1.0)})
    return parted


def _lr_scale(config: TrainConfig) -> float:
    return config.batch_size / config.lr_batch if config.lr_batch else 1.0


class _Average:
    """The moving average of a model's floating-point tensors, of shards where they are sharded.

    timm's ``ModelEmaV3`` copies the module, which a sharded one does not allow.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool) -> None:
        self.decay, self.warmup = decay, warmup
        self.values = {name: value.detach().clone() for name, value in self._tensors(model).items()}

    @staticmethod
    def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
        return {name: value for name, value in model.state_dict().items() if value.is_floating_point()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after an optimiser step."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        current = self._tensors(model)
        torch._foreach_lerp_(list(self.values.values()), [current[name] for name in self.values], weight=1 - decay)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Give the model the averaged weights for a while."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        current = self._tensors(model)
        for name, value in self.values.items():
            kept = current[name].detach().clone()
            current[name].copy_(value)
            value.copy_(kept)


@torch.inference_mode()
def evaluate(
    model: nn.Module, source: Source, world: World, autocast: Callable[[], Any] = contextlib.nullcontext
) -> dict[str, float]:
    """Classify a split.

    Args:
        model: The classifier.
        source: The split.
        world: The processes; each does its share.
        autocast: Makes the context to compute in.

    Returns:
        ``loss``, ``top1`` and ``top5`` in per cent, and ``images``.

    Raises:
        DataError: An image cannot be read, or a label is beyond the model's classes.
    """
    model.eval()
    loss = top1 = top5 = images = 0.0
    for inputs, labels in source.loader():
        inputs, labels = inputs.to(world.device), labels.to(world.device)
        real = labels >= 0
        with autocast():
            logits = model(inputs)
        logits, labels = logits.float()[real], labels[real]
        if not len(labels):
            continue
        _check_labels(labels, logits.shape[-1])
        guesses = logits.topk(min(5, logits.shape[-1])).indices == labels[:, None]
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        top1 += guesses[:, 0].sum().item()
        top5 += guesses.any(1).sum().item()
        images += len(labels)
    loss, top1, top5, images = world.sum(loss, top1, top5, images)
    if not images:
        raise DataError(f"data: the split {source.split!r} has no images")
    return {"loss": loss / images, "top1": 100 * top1 / images, "top5": 100 * top5 / images, "images": images}


def _check_labels(labels: torch.Tensor, num_classes: int) -> None:
    if labels.max() >= num_classes:
        raise DataError(f"data: label {labels.max().item()} for a model of {num_classes} classes")


class Trainer:
    """A run: it trains, evaluates, saves and resumes.

    Args:
        config: The recipe.
        world: The processes.
        say: Called by the main process with lines for the user.

    Raises:
        ConfigError: The recipe does not fit the processes.
        DataError: The images or the classes cannot be used.
    """

    def __init__(self, config: TrainConfig, world: World, say: Callable[[str], None] = lambda line: None) -> None:
        self.config, self.world = config, world
        self.say = say if world.is_main else lambda line: None
        check_world(config, world)
        self.device_type = world.device.type
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, before its first product
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        seed_everything(config.seed)
        self._open_data()
        self.folder = _writable(config.out)
        self.model = create_model(config, self.num_classes).to(world.device)
        if config.cuda_graph:
            self._graph()
        self.module = parallelize(self.model, world, config.parallel, config.precision)
        if config.compile:
            self.module = torch.compile(self.module)
        self.optimizer = create_optimizer(config, self.model)
        scale = _lr_scale(config)
        self.schedule, _ = create_scheduler_v2(
            self.optimizer, sched=config.sched, num_epochs=config.epochs, warmup_epochs=config.warmup_epochs,
            warmup_lr=config.warmup_lr * scale, min_lr=config.min_lr * scale, step_on_epochs=False,
            updates_per_epoch=self.train.batches,
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=config.precision == "fp16")
        self.ema = _Average(self.model, config.ema_decay, config.ema_warmup) if config.ema_decay else None
        self.mixup = None
        if config.mixup or config.cutmix:
            self.mixup = Mixup(
                config.mixup, config.cutmix, prob=config.mixup_prob, switch_prob=config.mixup_switch_prob,
                label_smoothing=config.smoothing, num_classes=self.num_classes,
            )  # fmt: skip
        self.checkpoints = CheckpointFolder(self.folder, config.keep)
        self.step, self.nonfinite, self.nonfinite_in_a_row, self.best = 0, 0, 0, -1.0
        self.loss_sum, self.loss_count = 0.0, 0
        self._stop_asked, self._stopping = 0, False  # the signal that came here; whether one came in any process

    def _open_data(self) -> None:
        config, world = self.config, self.world
        with torch.device("meta"):
            probe = create_model(_without_weights(config))
        settings, frames = data_settings(config, probe), getattr(probe, "num_frames", None)
        per_pass = config.batch_size // config.accumulate
        self.train = open_source(config, world, settings, frames, True, config.batch_size)
        self.val = open_source(config, world, settings, frames, False, per_pass)
        self.settings, self.frames = settings, frames
        classes = self.train.classes
        if classes and len(classes) < 2:
            raise DataError(
                f"data: the training split has one class only, {next(iter(classes))!r}; a classifier needs two"
            )
        if classes and self.val.classes and classes != self.val.classes:
            odd = sorted(set(classes) ^ set(self.val.classes))
            raise DataError(
                f"data: the two splits have different classes, such as {', '.join(odd[:3]) or 'another order'}"
            )
        if classes and config.num_classes is not None and config.num_classes != len(classes):
            raise DataError(f"num_classes: the recipe says {config.num_classes}, the training split has {len(classes)}")
        self.num_classes = config.num_classes or len(classes) or None
        if self.num_classes is None:
            raise ConfigError("num_classes: this dataset does not say its number of classes; the recipe must")

    def _graph(self) -> None:
        """Capture a training pass before the processes share the model and before a loader's thread pins memory."""
        config, (channels, *size) = self.config, self.settings["input_size"]
        images = config.batch_size // config.accumulate // self.world.size
        shape = [images, channels, *([] if self.frames is None else [self.frames]), *size]
        self._set_mode()
        try:
            with self._autocast():
                graph_training(self.model, torch.zeros(shape, device=self.world.device))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = one_line(error, 200)
            raise ConfigError(f"cuda_graph: {config.model} cannot be captured ({reason}); leave the key out") from error

    def _set_mode(self) -> None:
        # with a linear probe, running statistics and stochastic depth belong to training the backbone
        self.model.train(not self.config.linear_probe)

    def _autocast(self) -> Any:
        dtype = _AMP_DTYPES.get(self.config.precision)
        return torch.autocast(self.device_type, dtype) if dtype else contextlib.nullcontext()

    def _loss(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with self._autocast():
            logits = self.module(inputs)
        logits = logits.float()
        if labels.dim() > 1:
            return SoftTargetCrossEntropy()(logits, labels)
        return F.cross_entropy(logits, labels, label_smoothing=self.config.smoothing)

    def _agree(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is set in any process."""
        return [value > 0 for value in self.world.sum(*map(float, flags))]

    def _backward(self, inputs: torch.Tensor, labels: torch.Tensor, mixing: bool) -> list[torch.Tensor]:
        """Accumulate the gradients of a step's passes; return their shares of its loss, without waiting for them."""
        shares, passes = [], self.config.accumulate
        _check_labels(labels, self.num_classes)
        for number, (x, y) in enumerate(zip(inputs.chunk(passes), labels.chunk(passes), strict=True)):
            x, y = x.to(self.world.device, non_blocking=True), y.to(self.world.device, non_blocking=True)
            if mixing:
                x, y = self.mixup(x, y)
            with synchronizing(self.module, last=number == passes - 1):
                loss = self._loss(x, y) / passes
                self.scaler.scale(loss).backward()
            shares.append(loss.detach())
        return shares

    def _take_step(self, inputs: torch.Tensor, labels: torch.Tensor, epoch: int) -> float | None:
        """Do one optimiser step; return its loss, or None if it was left out."""
        config = self.config
        seed_everything(config.seed, _STEP, self.step, self.world.rank)
        self._set_mode()
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        self.schedule.step_update(self.step)
        self.optimizer.zero_grad()
        mixing = self.mixup is not None and not (config.mixup_off_epoch and epoch >= config.mixup_off_epoch)
        shares = self._backward(inputs, labels, mixing)
        self.scaler.unscale_(self.optimizer)
        norm = self._gradient_norm()
        total = sum(share.item() for share in shares)
        # float16's scaler leaves out steps with an overflow itself, and lowers its scale
        gradient_counts = config.precision != "fp16"
        here = not math.isfinite(total) or (gradient_counts and not math.isfinite(norm))
        bad, self._stopping = self._agree(here, self._stop_asked > 0)
        if bad:
            for name, buffer in self.model.named_buffers():
                buffer.copy_(buffers[name])
            self.scaler.update(self.scaler.get_scale() / 2 if self.scaler.is_enabled() else None)
            self._note_nonfinite()
            return None
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.nonfinite_in_a_row = 0
        if self.ema is not None:
            self.ema.update(self.model, self.step)
        return total

    def _gradient_norm(self) -> float:
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, self.config.clip_grad or math.inf)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _note_nonfinite(self) -> None:
        self.nonfinite += 1
        self.nonfinite_in_a_row += 1
        where = f"step {self.step}: the loss or its gradient is not finite"
        if self.config.nonfinite == "stop":
            raise TrainingError(f"{where}; nonfinite=skip leaves such steps out")
        if self.nonfinite_in_a_row > self.config.max_nonfinite:
            raise TrainingError(f"{where}, {self.nonfinite_in_a_row} times in a row")
        self.say(f"{where}; left out ({self.nonfinite} so far)")

    def save(self) -> Path | None:
        """Write a checkpoint.

        Returns:
            Its path, in the main process.
        """
        state = full_state(self.model, self.optimizer, self.world)
        if self.ema is not None:
            with self.ema.applied(self.model):
                state["ema"] = copy.deepcopy(full_state(self.model, self.optimizer, self.world)["model"])
        loss_sum, loss_count = self.world.sum(self.loss_sum, self.loss_count)
        path = None
        if self.world.is_main:
            state.update({name: getattr(self, name) for name in _COUNTERS}, scaler=self.scaler.state_dict())
            state.update(loss_sum=loss_sum / self.world.size, loss_count=loss_count / self.world.size)
            path = self.checkpoints.save(self.step, state)
        self.world.barrier()
        return path

    def resume(self) -> bool:
        """Go on from the newest checkpoint; return whether there was one.

        Raises:
            ReadError: There are checkpoints, and none can be read.
            TrainingError: It is of another model.
        """
        state = self.checkpoints.load(self.say)
        if state is None:
            return False
        for name in (*_COUNTERS, "loss_sum", "loss_count"):
            setattr(self, name, state[name])
        try:
            if self.ema is not None and "ema" in state:
                load_full_state(self.model, self.optimizer, {**state, "model": state["ema"]}, self.world)
                self.ema = _Average(self.model, self.config.ema_decay, self.config.ema_warmup)
            load_full_state(self.model, self.optimizer, state, self.world)
        except (RuntimeError, KeyError, ValueError) as error:
            reason = one_line(error, 200)
            raise TrainingError(f"{self.folder} holds a run of another recipe ({reason}); give another out") from error
        self.scaler.load_state_dict(state["scaler"])
        return True

    def _save_weights(self, name: str) -> None:
        """Write the weights to use, the averaged ones where there are such."""
        averaged = contextlib.nullcontext() if self.ema is None else self.ema.applied(self.model)
        with averaged:
            tensors = full_state(self.model, self.optimizer, self.world)["model"]
            if self.world.is_main:
                settings = self.settings
                overlay = {
                    "num_classes": self.num_classes,
                    "input_size": settings["input_size"],
                    **{key: settings[key] for key in ("mean", "std", "crop_pct", "interpolation")},
                }
                if self.train.classes:
                    overlay["label_names"] = sorted(self.train.classes, key=self.train.classes.get)
                save_weights(self.folder / name, self.config.model, tensors, overlay)

    def _evaluate(self) -> dict[str, float]:
        averaged = contextlib.nullcontext() if self.ema is None else self.ema.applied(self.model)
        with averaged:
            return evaluate(self.model, self.val, self.world, self._autocast)

    def _end_epoch(self, epoch: int, log: Any, seconds: float) -> dict[str, float]:
        loss, count = self.world.sum(self.loss_sum, self.loss_count)
        row = {"epoch": epoch, "step": self.step, "lr": self.optimizer.param_groups[0]["lr"]}
        row["train_loss"] = loss / count if count else math.nan
        if (epoch + 1) % self.config.eval_every == 0 or epoch + 1 == self.config.epochs:
            result = self._evaluate()
            row.update({f"eval_{key}": result[key] for key in ("loss", "top1", "top5")})
            if result["top1"] > self.best:
                self.best = result["top1"]
                self._save_weights("best.safetensors")
        row.update(nonfinite=self.nonfinite, seconds=round(seconds, 2))
        self.loss_sum, self.loss_count = 0.0, 0
        self._save_weights("last.safetensors")
        self.save()
        if log is not None:
            log.write(row)
        figures = [f"{name} {row[name]:.4g}" for name in ("train_loss", "eval_loss", "eval_top1") if name in row]
        self.say(f"epoch {epoch + 1}/{self.config.epochs}: {', '.join(figures)}, {row['seconds']} s")
        return row

    def run(self) -> dict[str, float]:
        """Train to the end, from the beginning or from where the run was left.

        Returns:
            The last epoch's figures.

        Raises:
            Interrupted: SIGTERM or Ctrl-C came; the run was saved.
            TrainingError: The run cannot go on.
        """
        from .log import RunLog

        if self.config.resume and self.resume():
            total = self.config.epochs * self.train.batches
            ended = f"the run in {self.folder} has ended, after {self.step} steps; more epochs or another out go on"
            self.say(ended if self.step >= total else f"going on from step {self.step} of {total}")
        log = RunLog(self.folder, self.step, self.config.tensorboard) if self.world.is_main else None
        row: dict[str, float] = {}
        with self._stopping_at_signals():
            for epoch in range(self.step // self.train.batches, self.config.epochs):
                started = time.perf_counter()
                self._train_epoch(epoch)
                row = self._end_epoch(epoch, log, time.perf_counter() - started)
        return row or dict(log.rows[-1] if log is not None and log.rows else {})

    @contextlib.contextmanager
    def _stopping_at_signals(self) -> Iterator[None]:
        """Let SIGTERM and the first Ctrl-C ask for a checkpoint and an end after the step that is under way."""

        def ask(number: int, _frame: Any) -> None:
            self._stop_asked = number
            if number == signal.SIGINT:
                signal.signal(signal.SIGINT, previous[signal.SIGINT])
                if self.world.is_main:
                    os.write(2, b"\nstopping after the next step and saving; Ctrl-C again stops at once\n")

        previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        if previous[signal.SIGINT] == signal.SIG_IGN:  # as shells start what runs in the background
            del previous[signal.SIGINT]
        try:
            for number in previous:
                signal.signal(number, ask)
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _train_epoch(self, epoch: int) -> None:
        start = self.step - epoch * self.train.batches
        pace = _Pace(self.config.log_every, self.config.batch_size)
        for inputs, labels in self.train.loader(epoch, start):
            loss = self._take_step(inputs, labels, epoch)
            self.step += 1
            if loss is not None:
                self.loss_sum, self.loss_count = self.loss_sum + loss, self.loss_count + 1
            ended = self.step % self.train.batches == 0
            speed = pace.step()
            if speed is not None and not ended:
                where = f"step {self.step - epoch * self.train.batches}/{self.train.batches}"
                last = "left out" if loss is None else f"loss {loss:.4g}"
                self.say(f"epoch {epoch + 1}/{self.config.epochs}, {where}: {last}, {speed:.0f} images/s")
            if self._stopping:
                path = self.save()
                number = self._stop_asked or signal.SIGTERM  # the default: it came to another process
                name = signal.Signals(number).name
                raise Interrupted(f"stopped by {name} after step {self.step}; saved {path}", number)
            if self.config.save_every and self.step % self.config.save_every == 0 and not ended:
                self.save()


class _Pace:
    """Tells the images a second, every so many steps.

    Args:
        every: Number of steps; 0 for never.
        batch_size: Images a step.
    """

    def __init__(self, every: int, batch_size: int) -> None:
        self.every, self.batch_size = every, batch_size
        self.steps, self.since = 0, time.perf_counter()

    def step(self) -> float | None:
        """Count a step; return the images a second of the last ones if it is time to tell them."""
        self.steps += 1
        if not self.every or self.steps % self.every:
            return None
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        return self.every * self.batch_size / seconds


def _without_weights(config: TrainConfig) -> TrainConfig:
    from dataclasses import replace

    return replace(config, pretrained=False, checkpoint=None, linear_probe=False, grad_checkpointing=False)


def _writable(out: str) -> Path:
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ConfigError(f"out: cannot write to the folder {out} ({error.strerror})") from error
