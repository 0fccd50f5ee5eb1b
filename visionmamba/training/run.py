"""The programs ``tools/train.py`` and ``tools/validate.py``."""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from .._text import near_names, one_line
from ..models._builder import WeightsUnavailableError
from ..models._checkpoint import CheckpointError
from .checkpoint import ReadError, WriteError
from .config import ConfigError, TrainConfig, load_config
from .data import DataError, open_source
from .distributed import World, join_world, leave_world
from .engine import Interrupted, Trainer, TrainingError, create_model, data_settings, evaluate

__all__ = ["main", "validate"]

_SIGNALLED = 128  # and the signal's number, as shells have it
_CLEAR = (
    ConfigError,
    DataError,
    TrainingError,
    ReadError,
    WriteError,
    WeightsUnavailableError,
    CheckpointError,
    OSError,
    ImportError,
)


def _recipe(words: Sequence[str]) -> TrainConfig:
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise ConfigError(f"expected one recipe and key=value words, got {', '.join(files)}")
    config = load_config(files[0] if files else None, [word for word in words if "=" in word])
    _check_model(config.model)
    return config


def _check_model(name: str) -> None:
    import timm

    if not timm.is_model(name.split(".")[0]):
        raise ConfigError(f"model: unknown model {name!r}{near_names(name, timm.list_models())}")


def _help(usage: str) -> str:
    """Return a program's usage, and a recipe's keys with their meaning and defaults, as they would be given."""

    def given(value: Any) -> str:
        if isinstance(value, tuple):
            return f"'[{', '.join(f'{item:.4g}' for item in value)}]'"
        return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

    arguments = inspect.getdoc(TrainConfig).split("Args:\n")[1]
    entries = re.findall(r"^ +(\w+): (.+(?:\n {8,}.+)*)", arguments, re.MULTILINE)
    keys = [f"  {key}={given(getattr(TrainConfig(), key))}\n      {' '.join(text.split())}" for key, text in entries]
    return "\n".join([usage.strip(), "", "Keys, with their defaults:", "", *keys])


def _run(program: Callable[[TrainConfig, World], None], words: Sequence[str], usage: str) -> int:
    """Run a program in each process; return the exit status."""
    if {"-h", "--help"} & set(words):
        print(_help(usage))
        return 0
    if not words:
        print(f"{usage.strip()}\n\n--help shows all keys.", file=sys.stderr)
        return 2
    try:
        config = _recipe(words)
        program(config, join_world(config.device))
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return _SIGNALLED + stop.signal
    except KeyboardInterrupt:
        print("interrupted; a training that is run again goes on from its last checkpoint", file=sys.stderr)
        return _SIGNALLED + signal.SIGINT
    except torch.OutOfMemoryError as error:
        reason = one_line(str(error).split(". ")[0])
        print(f"error: {reason}; a smaller batch_size or a larger accumulate takes less memory", file=sys.stderr)
        return 1
    except _CLEAR as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    finally:
        leave_world()
    return 0


def main(words: Sequence[str], usage: str = "") -> int:
    """Train.

    Args:
        words: A recipe's file, if any, and ``key=value`` words.
        usage: What ``--help`` says before the keys.

    Returns:
        The exit status: 0 at the end, 143 if SIGTERM stopped the run, 130 if Ctrl-C did, 1 for an error in the input, 2
        without words.
    """

    def train(config: TrainConfig, world: World) -> None:
        Trainer(config, world, say=lambda line: print(line, flush=True)).run()

    return _run(train, words, usage)


def _evaluate(config: TrainConfig, world: World) -> dict[str, Any]:
    from ..inference import checkpoint_cfg

    with torch.device("meta"):
        probe = create_model(replace(config, pretrained=False, checkpoint=None, linear_probe=False))
    saved = checkpoint_cfg(config.checkpoint) if config.checkpoint else {}
    num_classes = config.num_classes or saved.get("num_classes") or probe.num_classes
    given = {name: saved[name] for name in ("mean", "std", "crop_pct", "interpolation") if name in saved}
    config = replace(config, in_chans=config.in_chans or saved.get("input_size", (None,))[0], **{
        name: value for name, value in given.items() if getattr(config, name) is None
    })  # fmt: skip
    model = create_model(replace(config, pretrained=not config.checkpoint), num_classes).to(world.device)
    settings, frames = data_settings(config, model), getattr(model, "num_frames", None)
    source = open_source(config, world, settings, frames, training=False, batch_size=config.batch_size)
    if source.classes and len(source.classes) != num_classes:
        raise DataError(
            f"data: the split {source.split!r} has {len(source.classes)} classes, and the model {num_classes}"
        )
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
    autocast = contextlib.nullcontext if dtype is None else lambda: torch.autocast(world.device.type, dtype)
    result = {"model": config.model, **evaluate(model, source, world, autocast)}
    result.update(
        images=int(result["images"]),
        img_size=settings["input_size"][-1],
        crop_pct=settings["crop_pct"],
        interpolation=settings["interpolation"],
    )
    return result


def validate(words: Sequence[str], usage: str = "") -> int:
    """Evaluate.

    Args:
        words: As for :func:`main`; ``batch_size`` is 256 if not given.
        usage: As for :func:`main`.

    Returns:
        The exit status.
    """

    def program(config: TrainConfig, world: World) -> None:
        result = _evaluate(config, world)
        if world.is_main:
            print(json.dumps(result, indent=2))

    if words and not any(word.startswith("batch_size=") for word in words):
        words = ["batch_size=256", *words]
    return _run(program, words, usage)
