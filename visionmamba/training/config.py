"""A training run's recipe: a flat dataclass, read from YAML and overridden by ``key=value`` words."""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from .._text import near_names, one_line

__all__ = ["ConfigError", "TrainConfig", "load_config"]


class ConfigError(ValueError):
    """A recipe that cannot be used; one sentence."""


@dataclass(frozen=True)
class TrainConfig:
    """What is trained, on what, and how.

    Args:
        model: Name of a timm model.
        data: Root folder of the images.
        dataset: timm's dataset name: empty for folders of images a class, ``wds/NAME``, ``hfds/NAME``, ``torch/NAME``.
        train_split: Split to train on; for folders the sub-folder of that name, if there is one.
        val_split: Split to evaluate on.
        num_train_samples: Images of a streamed training split that does not say its length.
        num_val_samples: The same of the evaluation split.
        out: Folder of checkpoints, logs and weights.
        resume: Go on from the last checkpoint in ``out``, if there is one.
        num_classes: Classes; by default the training set's.
        model_args: Further arguments of the model.
        pretrained: Start from the published weights.
        checkpoint: File with weights to start from; a classifier with another number of classes is dropped.
        linear_probe: Train the classifier only.
        img_size: Height and width; by default the model's.
        in_chans: Channels of the images; by default the model's.
        frame_stride: Distance of the frames of a clip, for models of videos; by default they are spread over the video.
        drop_path: Rate of stochastic depth; by default the model's.
        grad_checkpointing: Recompute blocks in backward.
        compile: Compile the model.
        cuda_graph: Replay the model's forward and backward passes as CUDA graphs, so that a GPU does not wait for
            Python; the memory of a pass stays taken.
        epochs: Passes over the training set.
        batch_size: Images an optimiser step, over all processes and accumulation steps.
        accumulate: Forward and backward passes an optimiser step.
        opt: timm's name of the optimiser.
        lr: Peak learning rate.
        lr_batch: Batch size that the three learning rates are for; they are scaled to ``batch_size``. None: as given.
        betas: The optimiser's; by default its own.
        opt_eps: The optimiser's; by default its own.
        momentum: The optimiser's, where it has one.
        weight_decay: Weight decay.
        no_weight_decay: Shell patterns of parameters without weight decay, beside biases and 1-D ones; by default those
            that the model names.
        backbone_lr: Factor of the learning rate of all but the classifier.
        layer_decay: Factor of the learning rate from each layer to the one before it.
        sched: timm's name of the schedule.
        warmup_epochs: Epochs of linear warm-up, inside ``epochs``.
        warmup_lr: Learning rate at its start.
        min_lr: Learning rate at the end.
        clip_grad: Greatest norm of the gradient; None for no clipping.
        smoothing: Label smoothing.
        mixup: Mixup's alpha; 0 for none.
        cutmix: CutMix's alpha; 0 for none.
        mixup_prob: Probability of either, a batch.
        mixup_switch_prob: Probability of CutMix where both are on.
        mixup_off_epoch: Epoch from which on neither is used; 0 for never.
        repeats: Repeated augmentation: views of an image in a row, each in another process.
        auto_augment: timm's augmentation policy, such as ``rand-m9-mstd0.5-inc1``.
        color_jitter: Strength of colour jitter (where ``auto_augment`` is not used).
        scale: Range of a random crop's area.
        ratio: Range of its aspect ratio.
        hflip: Probability of a horizontal flip.
        reprob: Probability of random erasing.
        remode: Its fill, ``pixel``, ``rand`` or ``const``.
        train_interpolation: ``random``, ``bicubic`` or ``bilinear``.
        interpolation: The evaluation's; by default the model's.
        crop_pct: The evaluation's share of the resized image; by default the model's.
        mean: Of the normalisation; by default the model's.
        std: Of the normalisation; by default the model's.
        ema_decay: Decay of the weights' moving average; 0 for none.
        ema_warmup: Raise the decay from 0 as the average fills.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        workers: Processes that read images, a training process.
        unreadable: ``error`` stops at an image that cannot be read, ``skip`` takes the next one.
        nonfinite: ``skip`` leaves out an optimiser step whose loss or gradient is not finite, ``stop`` ends the run.
        max_nonfinite: Steps in a row that may be skipped.
        parallel: ``ddp`` or ``fsdp``, where there are several processes.
        seed: Seeds everything.
        deterministic: Use deterministic kernels only.
        device: Device; by default the accelerator if there is one.
        save_every: Steps between checkpoints, beside those at each epoch's end; 0 for none.
        keep: Checkpoints to keep.
        eval_every: Epochs between evaluations.
        log_every: Steps between lines that tell how an epoch goes; 0 for none.
        tensorboard: Write TensorBoard's event files too.
    """

    model: str = "vmamba_tiny_s1l8"
    data: str = ""
    dataset: str = ""
    train_split: str = "train"
    val_split: str = "validation"
    num_train_samples: int | None = None
    num_val_samples: int | None = None
    out: str = "runs/train"
    resume: bool = True
    num_classes: int | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    checkpoint: str | None = None
    linear_probe: bool = False
    img_size: int | None = None
    in_chans: int | None = None
    frame_stride: int | None = None
    drop_path: float | None = None
    grad_checkpointing: bool = False
    compile: bool = False
    cuda_graph: bool = False
    epochs: int = 300
    batch_size: int = 1024
    accumulate: int = 1
    opt: str = "adamw"
    lr: float = 1e-3
    lr_batch: int | None = None
    betas: tuple[float, ...] | None = None
    opt_eps: float | None = None
    momentum: float = 0.9
    weight_decay: float = 0.05
    no_weight_decay: tuple[str, ...] | None = None
    backbone_lr: float = 1.0
    layer_decay: float | None = None
    sched: str = "cosine"
    warmup_epochs: float = 20
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    clip_grad: float | None = None
    smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_off_epoch: int = 0
    repeats: int = 1
    auto_augment: str | None = None
    color_jitter: float | None = None
    scale: tuple[float, ...] = (0.08, 1.0)
    ratio: tuple[float, ...] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    reprob: float = 0.0
    remode: str = "pixel"
    train_interpolation: str = "bicubic"
    interpolation: str | None = None
    crop_pct: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    ema_decay: float = 0.0
    ema_warmup: bool = False
    precision: str = "fp32"
    workers: int = 8
    unreadable: str = "error"
    nonfinite: str = "skip"
    max_nonfinite: int = 20
    parallel: str = "ddp"
    seed: int = 0
    deterministic: bool = False
    device: str | None = None
    save_every: int = 0
    keep: int = 3
    eval_every: int = 1
    log_every: int = 50
    tensorboard: bool = False

    def __post_init__(self) -> None:
        """Raise ConfigError unless the values make sense together."""
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ConfigError(f"{name}: expected at least {least}, got {value}")
        for name in ("scale", "ratio"):
            if len(getattr(self, name)) != 2:
                raise ConfigError(f"{name}: expected the two ends of a range, got {list(getattr(self, name))}")
        if self.pretrained and self.checkpoint:
            raise ConfigError("pretrained and checkpoint exclude each other: both say which weights to start from")
        for name, reason in _NOT_IN_GRAPHS.items():
            if self.cuda_graph and getattr(self, name):
                raise ConfigError(f"cuda_graph and {name} exclude each other: {reason}")
        if (self.mixup or self.cutmix) and self.batch_size // self.accumulate % 2:
            raise ConfigError(
                f"batch_size: mixup and cutmix pair images, and a pass has {self.batch_size // self.accumulate}"
            )


_CHOICES = {
    "precision": ("fp32", "bf16", "fp16"),
    "unreadable": ("error", "skip"),
    "nonfinite": ("skip", "stop"),
    "parallel": ("ddp", "fsdp"),
    "remode": ("pixel", "rand", "const"),
    "sched": ("cosine", "tanh", "step", "constant", "multistep", "poly", "wsd", "rsqrt"),
}
_NOT_IN_GRAPHS = {
    "compile": "a graph replays what the model itself launches",
    "grad_checkpointing": "recomputing a block sets the random numbers back, which a graph cannot",
}
_LEAST = {
    **dict.fromkeys(("epochs", "batch_size", "accumulate", "repeats", "keep", "eval_every"), 1),
    **dict.fromkeys(("num_classes", "img_size", "in_chans", "frame_stride", "lr_batch"), 1),
    **dict.fromkeys(("lr", "warmup_lr", "min_lr", "weight_decay", "warmup_epochs", "workers", "save_every"), 0),
    **dict.fromkeys(("seed", "ema_decay", "mixup", "cutmix", "log_every", "mixup_off_epoch", "max_nonfinite"), 0),
}
_TYPES = get_type_hints(TrainConfig)
_NAMES = [item.name for item in fields(TrainConfig)]


def _unknown(key: str, where: str) -> ConfigError:
    hint = near_names(key, _NAMES, f"known keys are {', '.join(_NAMES)}")
    return ConfigError(f"{where}: unknown key {key!r}{hint}")


def _name(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"a list of {get_args(kind)[0].__name__}"
    return "nothing" if kind is types.NoneType else getattr(kind, "__name__", str(kind))


def _fit(key: str, value: Any, where: str) -> Any:
    """Return a YAML value as the key's type."""
    kinds = get_args(_TYPES[key]) if isinstance(_TYPES[key], types.UnionType) else (_TYPES[key],)
    for kind in kinds:
        base = get_origin(kind) or kind
        if value is None and base is types.NoneType:
            return None
        if base is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                return float(value)  # YAML 1.1 reads 1e-3 as text
            except ValueError:
                continue
        if base is tuple and isinstance(value, (list, tuple)):
            item = get_args(kind)[0]
            try:
                return tuple(item(element) for element in value)
            except (TypeError, ValueError):
                continue
        if base is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, base) and (base is bool or not isinstance(value, bool)):
            return value
    expected = " or ".join(_name(kind) for kind in kinds)
    raise ConfigError(f"{where}: {key} expects {expected}, got {value!r}")


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a recipe.

    Args:
        path: YAML file with some of :class:`TrainConfig`'s keys; by default none.
        overrides: Words ``key=value``, the value in YAML; they come last.

    Returns:
        The recipe.

    Raises:
        ConfigError: The file cannot be read, a key is unknown (with near ones), or a value does not fit.
    """
    import yaml

    values: dict[str, Any] = {}
    sources: list[tuple[str, Any]] = []
    try:
        if path is not None:
            sources.append((str(path), yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}))
        for word in overrides:
            key, equals, text = word.partition("=")
            if not equals:
                raise ConfigError(f"expected key=value, got {word!r}")
            sources.append((f"{key}=", {key: yaml.safe_load(text)}))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path or 'overrides'}: not valid YAML ({one_line(error)})") from error
    for where, given in sources:
        if not isinstance(given, dict):
            raise ConfigError(f"{where}: expected keys and values, got {type(given).__name__}")
        for key, value in given.items():
            if key not in _NAMES:
                raise _unknown(str(key), where)
            values[key] = _fit(key, value, where)
    return replace(TrainConfig(), **values)
