"""Checkpoints of a run: written whole or not at all, the last few kept, and loaded on any number of processes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from .._files import replacing, write_safetensors
from .._text import one_line
from ..inference import CFG_METADATA_KEY
from .distributed import World

__all__ = ["CheckpointFolder", "ReadError", "WriteError", "full_state", "load_full_state", "save_weights"]

_NAME = re.compile(r"checkpoint-(\d+)\.pt")


class ReadError(RuntimeError):
    """A run whose checkpoints are broken; one sentence."""


class WriteError(RuntimeError):
    """A checkpoint that could not be written; one sentence."""


def _reason(error: BaseException) -> str:
    """Return why a file could not be written: what the system said, behind PyTorch's check of its own."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.strerror:
            return link.strerror
        link = link.__cause__ or link.__context__
    return one_line(error, 200)


def _options(world: World) -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=world.size > 1)


def full_state(model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> dict[str, Any]:
    """Gather weights and optimiser, sharded or not; the main process gets them, under the plain model's names."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def load_full_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], world: World) -> None:
    """Undo :func:`full_state`, on the same or another number of processes."""
    set_model_state_dict(model, state["model"], options=_options(world))
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=_options(world))


class CheckpointFolder:
    """The checkpoints of one run, ``checkpoint-STEP.pt``.

    Args:
        folder: Where they are.
        keep: How many to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def files(self) -> list[Path]:
        """Return the checkpoints, oldest first."""
        found = [(int(match[1]), path) for path in self.folder.glob("*.pt") if (match := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted(found)]

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write a checkpoint and remove the oldest ones.

        Args:
            step: The step it is of.
            state: What to keep.

        Returns:
            Its path.

        Raises:
            WriteError: It could not be written; earlier ones are as they were.
        """
        path = self.folder / f"checkpoint-{step}.pt"
        try:
            with replacing(path) as temporary, open(temporary, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            earlier = self.files()
            last = f"the last complete one is {earlier[-1]}" if earlier else "there is no complete one yet"
            raise WriteError(f"{path} could not be written ({_reason(error)}); {last}") from error
        for old in self.files()[: -self.keep]:
            old.unlink(missing_ok=True)
        return path

    def load(self, say: Callable[[str], None] = lambda line: None) -> dict[str, Any] | None:
        """Return the newest checkpoint that can be read, and remove what a killed run left.

        Args:
            say: Called with a line about each newer one that cannot be read.

        Returns:
            The state; None if there is no checkpoint.

        Raises:
            ReadError: There are checkpoints, and none can be read.
        """
        for rest in self.folder.glob(".*.tmp"):
            rest.unlink(missing_ok=True)
        for path in reversed(self.files()):
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except (OSError, RuntimeError, EOFError, ValueError, KeyError, UnpicklingError) as error:
                say(f"{path} cannot be read and is passed over ({one_line(error, 200)})")
        if self.files():
            raise ReadError(f"{self.folder}: none of its checkpoints can be read; resume=false starts anew")
        return None


def save_weights(path: Path, name: str, tensors: dict[str, torch.Tensor], overlay: dict[str, Any]) -> None:
    """Write a model's weights as safetensors that ``visionmamba predict`` and ``create_classifier`` take.

    Args:
        path: Where to.
        name: The model's timm name.
        tensors: Its state dict.
        overlay: The part of timm's pretrained cfg in which it differs: classes, input and normalisation.

    Raises:
        WriteError: It could not be written.
    """
    try:
        write_safetensors(path, tensors, {"model": name, CFG_METADATA_KEY: json.dumps(overlay)})
    except OSError as error:
        raise WriteError(one_line(error)) from error
