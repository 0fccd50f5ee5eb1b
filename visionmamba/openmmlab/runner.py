"""What the command line tools for detection and segmentation share: finding configs, building models and runners."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from mmengine.config import Config, DictAction
from mmengine.registry import MODELS, RUNNERS, init_default_scope
from mmengine.runner import Runner

__all__ = ["add_config_arguments", "build_model", "build_runner", "load_config", "test_main", "train_main"]


def load_config(name: str, options: dict[str, Any] | None = None) -> Config:
    """Read a config by path, or by name from an installed package.

    Args:
        name: Path of a file, or ``mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py`` and the like.
        options: Values to change, by dotted name.

    Raises:
        FileNotFoundError: There is no such file.
    """
    package, separator, relative = name.partition("::")
    if separator:
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


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that every tool has."""
    parser.add_argument("config", help="path of a config, or mmdet::... or mmseg::... of an installed package")
    parser.add_argument(
        "--cfg-options", nargs="+", action=DictAction, metavar="NAME=VALUE", help="values to change in the config"
    )


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    add_config_arguments(parser)
    parser.add_argument("--work-dir", help="where logs and checkpoints go; work_dirs/NAME by default")
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none")
    parser.add_argument("--local-rank", "--local_rank", type=int, default=0, help="given by some launchers")
    return parser


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
        config.load_from = None if options.resume == "auto" else options.resume
    build_runner(config).train()


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
    config = _prepare(options)
    config.load_from = options.checkpoint
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
    return build_runner(config).test()
