"""The demo: train a micro model on handwritten digits, save it, and classify held-out digits from the saved file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from timm.optim import create_optimizer_v2

from ._files import replacing, write_safetensors
from .data import DIGIT_NAMES, Digits, load_digits, render_digits
from .inference import CFG_METADATA_KEY, input_size

__all__ = ["DemoConfig", "Trainer", "accuracy", "classify", "draw_predictions", "save_checkpoint"]

_TILE = 80  # pixels a side of one digit in the picture
_CAPTION = 18


@dataclass(frozen=True)
class DemoConfig:
    """What the demo trains and how.

    Args:
        model: Name of a timm model; a ``test_*`` model trains in seconds.
        epochs: Passes over the 1198 training digits.
        batch_size: Digits a step.
        lr: Peak learning rate of AdamW under a one-cycle schedule.
        weight_decay: AdamW's weight decay.
        seed: Seeds the split, the weights and the batches.
        device: Device to train on; by default the accelerator if there is one, else the CPU.
    """

    model: str = "test_vmamba"
    epochs: int = 15
    batch_size: int = 32
    lr: float = 3e-3
    weight_decay: float = 0.05
    seed: int = 0
    device: torch.device | None = None


def _default_device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


class Trainer:
    """Trains a classifier of digits, one epoch at a time.

    Args:
        config: What to train and how.
    """

    def __init__(self, config: DemoConfig):
        self.config = config
        self.device = config.device or _default_device()
        torch.manual_seed(config.seed)
        self.model = timm.create_model(config.model, num_classes=len(DIGIT_NAMES), in_chans=1).to(self.device)
        self.size = input_size(self.model)
        train, held_out = load_digits(config.seed)
        self.train_digits, self.held_out = train.to(self.device), held_out.to(self.device)
        self.optimizer = create_optimizer_v2(
            self.model, opt="adamw", lr=config.lr, weight_decay=config.weight_decay, foreach=True
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=config.lr, total_steps=max(2, config.epochs * self.steps_per_epoch), pct_start=0.2
        )
        self.generator = torch.Generator().manual_seed(config.seed)

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimiser steps an epoch takes."""
        return -(-len(self.train_digits.labels) // self.config.batch_size)

    def epoch(self, on_step: Callable[[], None] = lambda: None) -> float:
        """Train for one epoch.

        Args:
            on_step: Called after each step.

        Returns:
            The mean training loss.
        """
        self.model.train()
        order = torch.randperm(len(self.train_digits.labels), generator=self.generator).to(self.device)
        total = torch.zeros((), device=self.device)
        for index in order.split(self.config.batch_size):
            motion = torch.rand(len(index), 2, 2, generator=self.generator) * 2 - 1  # another clip of the same digit
            batch = self.train_digits.select(index)._replace(motion=motion.to(self.device))
            loss = F.cross_entropy(self.model(render_digits(batch, self.size)), batch.labels)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            total += loss.detach() * len(index)
            on_step()
        return total.item() / len(order)

    def accuracy(self) -> float:
        """Return the share of held-out digits that the model gets right."""
        return accuracy(classify(self.model, self.held_out), self.held_out)


@torch.inference_mode()
def classify(model: nn.Module, digits: Digits, batch_size: int = 128) -> torch.Tensor:
    """Classify digits.

    Args:
        model: A classifier of digits with one input channel, on the digits' device.
        digits: What to classify.
        batch_size: Digits at a time.

    Returns:
        ``(N, 10)`` float32 probabilities on the CPU.
    """
    model.eval()
    size = input_size(model)
    chunks = [digits.select(slice(i, i + batch_size)) for i in range(0, len(digits.labels), batch_size)]
    return torch.cat([model(render_digits(chunk, size)).float().softmax(-1).cpu() for chunk in chunks])


def accuracy(probabilities: torch.Tensor, digits: Digits) -> float:
    """Return the share of digits whose most probable class is their label."""
    return (probabilities.argmax(-1) == digits.labels.cpu()).float().mean().item()


def save_checkpoint(model: nn.Module, name: str, path: Path) -> None:
    """Save a classifier of digits as safetensors, whole or not at all.

    The file's metadata holds the part of timm's pretrained cfg that differs from the model's own, so that
    ``visionmamba predict`` knows the classes and the input.

    Args:
        model: What to save.
        name: Its timm name.
        path: Where to; written beside under another name first and then renamed.

    Raises:
        OSError: It could not be written.
    """
    overlay = {
        "num_classes": len(DIGIT_NAMES),
        "input_size": (model.in_chans, *model.pretrained_cfg["input_size"][1:]),
        "mean": (0.5,),
        "std": (0.5,),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "label_names": DIGIT_NAMES,
    }
    write_safetensors(path, model.state_dict(), {"model": name, CFG_METADATA_KEY: json.dumps(overlay)})


def draw_predictions(digits: Digits, probabilities: torch.Tensor, path: Path, columns: int = 10) -> None:
    """Write a PNG of digits, each with its predicted class and probability below: green if right, red if wrong.

    Args:
        digits: What was classified.
        probabilities: ``(N, 10)``, as :func:`classify` returns them.
        path: Where to write the PNG.
        columns: Digits in a row.
    """
    digits = digits.to(torch.device("cpu"))
    rows = -(-len(digits.labels) // columns)
    sheet = Image.new("RGB", (columns * _TILE, rows * (_TILE + _CAPTION)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    tiles = ((1 + render_digits(digits, (1, _TILE, _TILE))[:, 0]) * 127.5).to(torch.uint8).numpy()
    for i, (tile, label) in enumerate(zip(tiles, digits.labels.tolist(), strict=True)):
        left, top = i % columns * _TILE, i // columns * (_TILE + _CAPTION)
        sheet.paste(Image.fromarray(tile), (left, top))
        share, predicted = probabilities[i].max(-1)
        right = predicted.item() == label
        caption = f"{DIGIT_NAMES[predicted]} {share:.0%}" + ("" if right else f" not {DIGIT_NAMES[label]}")
        draw.text((left + 4, top + _TILE + 1), caption, fill="darkgreen" if right else "red", font=font)
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")
