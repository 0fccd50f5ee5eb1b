"""What the command line tools for detection and segmentation share: finding configs, building models and runners."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import inspect
import os
import pickle
import traceback
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from mmengine.config import Config, DictAction
from mmengine.registry import MODELS, RUNNERS, init_default_scope
from mmengine.runner import Runner

from ..cli._common import one_line
from ..models._checkpoint import CheckpointError

__all__ = [
    "add_config_arguments",
    "build_model",
    "build_runner",
    "checked_checkpoint",
    "load_config",
    "one_sentence",
    "test_main",
    "train_main",
]

_OTHER_SECTIONS = ("find_unused_parameters", "model_wrapper_cfg", "runner_type", "tta_model", "tta_pipeline")
"""What a config may hold beside the Runner's arguments."""


@contextlib.contextmanager
def one_sentence(parser: argparse.ArgumentParser, building: bool = False) -> Iterator[None]:
    """End the process with one sentence, not a traceback, where a file or a value that the user gave is at fault.

    Args:
        parser: Of the command line.
        building: Whether the block only reads and builds what the user describes, so that every exception says that
            the description is wrong; otherwise it is only files that may be at fault.

    Raises:
        SystemExit: With status 1, or 130 when interrupted.
    """
    try:
        yield
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")
    except Exception as error:
        if not building and not isinstance(error, OSError | CheckpointError):
            raise
        message = str(error) or type(error).__name__
        if "Original Traceback" in message:  # of a process that reads data: its last line says what it was
            message = message.strip().splitlines()[-1]
        place = traceback.extract_tb(error.__traceback__)[-1]
        kind = "" if isinstance(error, OSError) else f" ({type(error).__name__}, {place.filename}:{place.lineno})"
        parser.exit(1, f"{parser.prog}: error: {one_line(message)}{kind}\n")


def _check_sections(config: Config, options: dict[str, Any]) -> None:
    known = {*config, *inspect.signature(Runner).parameters, *_OTHER_SECTIONS}
    for name in options:
        section = name.partition(".")[0]
        if section not in known:
            near = difflib.get_close_matches(section, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"--cfg-options: no config has a {section!r}, got {name}{hint}")


def load_config(name: str, options: dict[str, Any] | None = None) -> Config:
    """Read a config by path, or by name from an installed package.

    Args:
        name: Path of a file, or ``mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py`` and the like.
        options: Values to change, by dotted name.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The package is another, or an option is of a section that no config has.
    """
    package, separator, relative = name.partition("::")
    if separator:
        if package not in ("mmdet", "mmseg"):
            raise ValueError(f"{name}: expected mmdet::... or mmseg::..., got {package}")
        try:
            name, _ = Config._get_cfg_path(name, "")
            missing = not Path(name).is_file()
        except FileNotFoundError:
            missing = True
        if missing:
            raise FileNotFoundError(f"{relative}: no such config in the installed {package}")
    elif not Path(name).is_file():
        raise FileNotFoundError(f"{name}: no such config; expected a path, or a name such as mmdet::swin/...py")
    config = Config.fromfile(name)
    if options:
        _check_sections(config, options)
        config.merge_from_dict(options)
    return config


def register(config: Config) -> None:
    """Make everything of the config's package (its ``default_scope``) known to the registries."""
    scope = config.get("default_scope", "mmdet")
    if scope == "mmseg":
        from mmseg.utils import register_all_modules
    else:
        from mmdet.utils import register_all_modules
    register_all_modules(init_default_scope=False)
    init_default_scope(scope)


def build_model(config: Config) -> nn.Module:
    """Build a config's detector or segmentor."""
    register(config)
    return MODELS.build(config.model)


def _start_cpu_processes(config: Config) -> None:
    """Let several processes train without a GPU: mmengine's own start of them sets a CUDA device."""
    if config.get("launcher", "none") != "pytorch" or torch.cuda.is_available() or torch.distributed.is_initialized():
        return
    torch.distributed.init_process_group("gloo")
    config.model_wrapper_cfg = {
        "type": "MMDistributedDataParallel",
        "device_ids": None,
        "broadcast_buffers": False,
        "find_unused_parameters": config.get("find_unused_parameters", False),
        **config.get("model_wrapper_cfg", {}),
    }


def build_runner(config: Config) -> Runner:
    """Build a config's runner."""
    register(config)
    _start_cpu_processes(config)
    return RUNNERS.build(config) if "runner_type" in config else Runner.from_cfg(config)


class _Options(DictAction):
    """mmengine's reading of NAME=VALUE, which names what is not of that form."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        for value in values:
            if "=" not in value:
                parser.error(f"{option_string}: expected NAME=VALUE, got {value!r}")
        super().__call__(parser, namespace, values, option_string)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that every tool has."""
    parser.add_argument("config", help="path of a config, or mmdet::... or mmseg::... of an installed package")
    parser.add_argument(
        "--cfg-options", nargs="+", action=_Options, metavar="NAME=VALUE", help="values to change in the config"
    )


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    add_config_arguments(parser)
    parser.add_argument("--work-dir", help="where logs and checkpoints go; work_dirs/NAME by default")
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none")
    parser.add_argument("--local-rank", "--local_rank", type=int, default=0, help="given by some launchers")
    return parser


def checked_checkpoint(checkpoint: str) -> str:
    """Return a checkpoint's path or address, if a path after a look at the file: mmengine's errors do not name it.

    Args:
        checkpoint: Path, or an address as mmengine knows them: ``https://...``, ``s3://...``.

    Raises:
        FileNotFoundError: It is a path, and there is no such file.
        CheckpointError: The file is none that ``torch.save`` writes, or only a part of one.
    """
    if "://" in checkpoint:
        return checkpoint
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f"{checkpoint}: no such checkpoint")
    with open(checkpoint, "rb") as file:
        pickled = file.read(1) == pickle.PROTO  # as before PyTorch 1.6
    if not pickled and not zipfile.is_zipfile(checkpoint):
        raise CheckpointError(f"{checkpoint}: not a readable checkpoint, perhaps truncated")
    return checkpoint


def _prepare(options: argparse.Namespace) -> Config:
    os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    config = load_config(options.config, options.cfg_options)
    config.launcher = options.launcher
    config.work_dir = options.work_dir or config.get("work_dir") or f"work_dirs/{Path(options.config).stem}"
    return config


def train_main(description: str, arguments: list[str] | None = None) -> None:
    """Train: the command line of ``det_train`` and ``seg_train``.

    Args:
        description: For the help.
        arguments: Command line; the process's own if absent.
    """
    parser = _parser(description)
    parser.add_argument("--amp", action="store_true", help="train in mixed precision")
    parser.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate with the batch size")
    parser.add_argument(
        "--resume", nargs="?", const="auto", metavar="CHECKPOINT", help="go on from the last, or a given, checkpoint"
    )
    options = parser.parse_args(arguments)
    with one_sentence(parser, building=True):
        config = _prepare(options)
        if options.amp:
            config.optim_wrapper.type = "AmpOptimWrapper"
            config.optim_wrapper.setdefault("loss_scale", "dynamic")
        if options.auto_scale_lr:
            if "base_batch_size" not in config.get("auto_scale_lr", {}):
                parser.error("--auto-scale-lr: the config has no auto_scale_lr.base_batch_size")
            config.auto_scale_lr.enable = True
        if options.resume:
            config.resume = True
            config.load_from = None if options.resume == "auto" else checked_checkpoint(options.resume)
        runner = build_runner(config)
        _ = runner.train_loop, runner.val_loop  # reads the data sets
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    with one_sentence(parser):
        runner.train()


def test_main(description: str, arguments: list[str] | None = None) -> dict[str, float]:
    """Evaluate a checkpoint: the command line of ``det_test`` and ``seg_test``.

    Args:
        description: For the help.
        arguments: Command line; the process's own if absent.

    Returns:
        The metrics.
    """
    parser = _parser(description)
    parser.add_argument("checkpoint", help="weights of the detector or segmentor")
    parser.add_argument("--show-dir", help="where to save drawn predictions")
    parser.add_argument("--tta", action="store_true", help="average over flipped and rescaled images")
    options = parser.parse_args(arguments)
    with one_sentence(parser, building=True):
        config = _prepare(options)
        config.load_from = checked_checkpoint(options.checkpoint)
        if options.show_dir:
            hook = config.default_hooks.visualization
            hook.draw = True
            if config.get("default_scope") == "mmdet":
                hook.test_out_dir = options.show_dir
            else:
                config.visualizer.save_dir = options.show_dir
        if options.tta:
            if "tta_model" not in config or "tta_pipeline" not in config:
                parser.error("--tta: the config has no tta_model and tta_pipeline")
            config.test_dataloader.dataset.pipeline = config.tta_pipeline
            config.tta_model.module = config.model
            config.model = config.tta_model
        runner = build_runner(config)
        _ = runner.test_loop  # reads the data set
    with one_sentence(parser):
        return runner.test()
