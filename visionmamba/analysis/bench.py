"""Throughput, latency, memory and energy of models, in the columns of timm's own benchmark tables.

A step is timed by itself, on GPUs between CUDA events, after steps that are not; throughput is the batch by the median.
A training step is forward and backward without an optimiser, as published training throughputs are.
"""

from __future__ import annotations

import contextlib
import csv
import gc
import io
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn as nn

from .._files import replacing
from .._text import one_line
from .cost import ModelCost, model_cost
from .environment import environment, nvml_device
from .flops import input_shape
from .memory import activation_memory, parameter_memory

__all__ = [
    "MODES",
    "PEERS",
    "PRECISIONS",
    "RUNS",
    "Results",
    "Setting",
    "Timing",
    "cost_at_size",
    "create_for_size",
    "measure",
    "memory_before",
]

MODES = ("infer", "train")
RUNS = ("eager", "compile", "graph")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
PEERS = ("deit_small_patch16_224", "swin_tiny_patch4_window7_224", "convnext_tiny")
"""Models of timm that the zoo is measured beside."""

_TIMM_COLUMNS = {
    "infer": (
        "model", "infer_samples_per_sec", "infer_step_time", "infer_batch_size", "infer_img_size", "infer_gmacs",
        "infer_macts", "param_count",
    ),
    "train": (
        "model", "train_samples_per_sec", "train_step_time", "train_batch_size", "train_img_size", "param_count",
    ),
}  # fmt: skip
_FURTHER_COLUMNS = (
    "run", "precision", "channels_last", "latency_p50", "latency_p90", "latency_p99", "peak_memory_mib",
    "memory_from", "joules_per_sample", "steps", "error",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Args:
        model: Name of a timm model.
        mode: One of :data:`MODES`.
        size: Image size, (height, width).
        batch: Batch size.
        run: One of :data:`RUNS`: as it stands, through ``torch.compile``, or replayed as a CUDA graph.
        precision: One of :data:`PRECISIONS`; ``bf16`` and ``fp16`` by autocast.
        channels_last: Whether input and parameters are laid out channels-last.
    """

    model: str
    mode: str = "infer"
    size: tuple[int, int] = (224, 224)
    batch: int = 1
    run: str = "eager"
    precision: str = "fp32"
    channels_last: bool = False

    @property
    def img_size(self) -> str:
        """The size as timm's tables have it: one number where both are the same."""
        return str(self.size[0]) if self.size[0] == self.size[1] else f"{self.size[0]}x{self.size[1]}"

    def identity(self) -> dict[str, str]:
        """Return the columns by which a row of this setting is known."""
        return {
            "model": self.model,
            f"{self.mode}_batch_size": str(self.batch),
            f"{self.mode}_img_size": self.img_size,
            "run": self.run,
            "precision": self.precision,
            "channels_last": str(self.channels_last),
        }


@dataclass(frozen=True)
class Timing:
    """How long a setting is measured.

    Args:
        warmup: Steps before those that are timed. On a GPU an operator's eighth call of a signature takes longer (it is
            recorded, see :mod:`visionmamba.ops._plan`), so that fewer than eight would show in the percentiles.
        repeats: Steps that are timed.
        seconds: Time for these; where it does not suffice for all of them, fewer are timed, but no fewer than five.
        energy_seconds: Time for measuring energy, where the driver tells it; none if 0.
    """

    warmup: int = 10
    repeats: int = 20
    seconds: float = float("inf")
    energy_seconds: float = 1.0

    def steps(self, seconds_a_step: float) -> int:
        """Return how many steps are timed, if one takes so long."""
        enough = max(5, ceil(min(self.seconds / max(seconds_a_step, 1e-6), self.repeats)))
        return min(self.repeats, enough)


def create_for_size(name: str, size: tuple[int, int], device: Any = None) -> nn.Module:
    """Create a model for images of a size, whether or not it must be told.

    Args:
        name: Name of a timm model.
        size: (height, width).
        device: Where to create it.
    """
    own = tuple(timm.get_pretrained_cfg(name).input_size[-2:])
    if tuple(size) != own:
        with contextlib.suppress(TypeError):  # a convolutional model, which takes any size
            return timm.create_model(name, img_size=size, device=device)
    return timm.create_model(name, device=device)


@contextlib.contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    """Multiply float32 matrices in TF32 or not, and leave everything as it was."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn


def _step(model: nn.Module, x: torch.Tensor, setting: Setting) -> Callable[[], None]:
    """Return a step of inference or training.

    Autocast begins anew in each, as it does in use: it keeps the weights that it has cast until it ends. A graph cannot
    hold on to those.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(setting.precision)
    training = setting.mode == "train"
    options = dict(dtype=dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=setting.run != "graph")

    def step() -> None:
        if training:
            model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(training), torch.autocast(x.device.type, **options):
            out = model(x)
        if training:
            out.float().square().mean().backward()

    return step


def _graphed(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    if device.type != "cuda":
        raise ValueError(f"run: a CUDA graph needs a CUDA device, got {device}")
    stream = torch.cuda.Stream(device)  # of both: libraries take a workspace for each stream
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def _times(step: Callable[[], None], device: torch.device, timing: Timing) -> list[float]:
    """Return the milliseconds of each step."""
    last = 0.0
    for _ in range(timing.warmup):
        _synchronize(device)
        start = time.perf_counter()
        step()
        _synchronize(device)
        last = time.perf_counter() - start
    repeats = timing.steps(last)
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            step()
            _synchronize(device)
            times.append(1e3 * (time.perf_counter() - start))
        return times
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        step()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in events]


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _joules(step: Callable[[], None], device: torch.device, seconds: float) -> float | None:
    """Return the energy of a step by the driver's counter; None if there is no counter, or no time for it.

    The counter moves on about ten times a second, so energy and steps are taken between two of its moves.
    """
    nvml = nvml_device(device) if seconds else None
    if nvml is None:
        return None
    library, handle = nvml
    try:
        first = moved = None
        before, steps, start = library.nvmlDeviceGetTotalEnergyConsumption(handle), 0, time.perf_counter()
        while moved is first or time.perf_counter() - start < seconds:
            step()
            torch.cuda.synchronize(device)
            steps += 1
            energy = library.nvmlDeviceGetTotalEnergyConsumption(handle)
            if energy != before:
                before, moved = energy, (energy, steps)
                first = first or moved
            elif time.perf_counter() - start > seconds + 1:  # it stands still
                return None
        return (moved[0] - first[0]) / 1e3 / (moved[1] - first[1])
    except library.NVMLError:
        return None


@cache
def cost_at_size(name: str, size: tuple[int, int]) -> ModelCost:
    """Return what a model costs for images of a size, but for its memory.

    Args:
        name: Name of a timm model.
        size: (height, width).
    """
    return model_cost(create_for_size(name, size, "meta"), size, name=name, memory=False)


def _costs(setting: Setting, model: nn.Module) -> dict[str, str]:
    params = sum(parameter.numel() for parameter in model.parameters())
    columns = {"param_count": f"{params / 1e6:.2f}"}
    if setting.mode == "infer":
        cost = cost_at_size(setting.model, setting.size)
        columns |= {"infer_gmacs": f"{cost.flops / 1e9:.2f}", "infer_macts": f"{cost.activations / 1e6:.2f}"}
    return columns


def memory_before(device: torch.device) -> int:
    """Give back what earlier settings have left, and return the bytes that are still allocated on a GPU.

    A library's workspaces stay for each stream that ever ran, and a model that refers to itself until it is collected;
    the next setting's memory would be without the former, and less by the latter.
    """
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device)


def _input(setting: Setting, model: nn.Module, device: torch.device) -> torch.Tensor:
    x = torch.randn(setting.batch, *input_shape(model, setting.size)[1:], device=device)
    return x.contiguous(memory_format=torch.channels_last) if setting.channels_last and x.dim() == 4 else x


def measure(setting: Setting, device: torch.device, timing: Timing | None = None) -> dict[str, str]:
    """Measure a model in one setting.

    Args:
        setting: What to measure.
        device: Where.
        timing: How long.

    Returns:
        A row of the table, text by column: throughput in images a second, times in milliseconds.
    """
    training, timing = setting.mode == "train", timing or Timing()
    gpu, before = device.type == "cuda", memory_before(device)
    torch.manual_seed(0)
    model = create_for_size(setting.model, setting.size, device).train(training)
    x = _input(setting, model, device)
    if setting.channels_last and x.dim() == 4:
        model = model.to(memory_format=torch.channels_last)
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    with _matmul_precision(setting.precision):
        step = _step(torch.compile(model) if setting.run == "compile" else model, x, setting)
        if setting.run == "graph":
            step = _graphed(step, device)
        times = _times(step, device, timing)
        joules = _joules(step, device, timing.energy_seconds)
    if gpu:
        memory, source = torch.cuda.max_memory_allocated(device) - before, "allocator"
    else:
        memory, source = parameter_memory(model) + activation_memory(model, x.shape, training), "shapes"
    p50, p90, p99 = np.percentile(times, (50, 90, 99))
    return {
        **setting.identity(),
        f"{setting.mode}_samples_per_sec": f"{1e3 * setting.batch / p50:.2f}",
        f"{setting.mode}_step_time": f"{p50:.3f}",
        **_costs(setting, model),
        "latency_p50": f"{p50:.3f}",
        "latency_p90": f"{p90:.3f}",
        "latency_p99": f"{p99:.3f}",
        "peak_memory_mib": f"{memory / 2**20:.1f}",
        "memory_from": source,
        "joules_per_sample": "" if joules is None else f"{joules / setting.batch:.4f}",
        "steps": str(len(times)),
        "error": "",
    }


class Results:
    """Measured rows in a folder: ``infer.csv``, ``train.csv`` and ``environment.json``, whole after every row.

    Args:
        folder: The folder; results that are there already are kept, and not measured again.
        device: Device of the measurements; None to read what is there, wherever it was measured.

    Raises:
        ValueError: The folder holds results of another machine, or a file that is not such a table.
    """

    def __init__(self, folder: Path, device: torch.device | None) -> None:
        self.folder, self.environment = folder, {} if device is None else environment(device)
        folder.mkdir(parents=True, exist_ok=True)
        self._check_environment()
        self.rows = {mode: self._read(mode) for mode in MODES}

    def _check_environment(self) -> None:
        path = self.folder / "environment.json"
        if not path.exists():
            if not self.environment:
                raise ValueError(f"{self.folder} holds no measurements")
            self._write(path, json.dumps(self.environment, indent=1) + "\n")
            return
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not the record of a benchmark: {error}") from error
        for key in ("device", "torch", "threads"):
            if self.environment and before.get(key) != self.environment[key]:
                raise ValueError(
                    f"{self.folder} holds results of another machine ({key} {before.get(key)}, here "
                    f"{self.environment[key]}); give another folder"
                )
        self.environment = before

    def _columns(self, mode: str) -> tuple[str, ...]:
        return _TIMM_COLUMNS[mode] + _FURTHER_COLUMNS

    def _read(self, mode: str) -> list[dict[str, str]]:
        path = self.folder / f"{mode}.csv"
        if not path.exists():
            return []
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != self._columns(mode):
                raise ValueError(f"{path} is not a table of this benchmark; give another folder")
            return list(reader)

    def find(self, setting: Setting, failed: bool = False) -> dict[str, str] | None:
        """Return the row of a setting that was measured, without an error unless ``failed``."""
        identity = setting.identity()
        for row in self.rows[setting.mode]:
            if (failed or not row["error"]) and all(row[column] == value for column, value in identity.items()):
                return row
        return None

    def add(self, setting: Setting, row: dict[str, str]) -> None:
        """Keep a row, in place of an earlier one of the same setting."""
        identity, rows = setting.identity(), self.rows[setting.mode]
        rows[:] = [old for old in rows if any(old[column] != value for column, value in identity.items())]
        rows.append({column: row.get(column, "") for column in self._columns(setting.mode)})
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns(setting.mode), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self._write(self.folder / f"{setting.mode}.csv", text.getvalue())

    def measure(
        self,
        settings: Iterable[Setting],
        device: torch.device,
        timing: Timing,
        notify: Callable[[Setting, dict[str, str]], None] = lambda setting, row: None,
    ) -> list[dict[str, str]]:
        """Measure what has not been measured; an error becomes the row's, and the next setting's turn comes.

        Args:
            settings: What to measure.
            device: Where.
            timing: How long each.
            notify: Called with each setting and its row.

        Returns:
            The rows of all settings.
        """
        rows = []
        for setting in settings:
            row = self.find(setting)
            if row is None:
                try:
                    row = measure(setting, device, timing)
                except Exception as error:  # whatever a model does, the rest go on
                    row = {**setting.identity(), "error": f"{type(error).__name__}: {one_line(error, 300)}"}
                torch.compiler.reset()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                self.add(setting, row)
            rows.append({column: row.get(column, "") for column in self._columns(setting.mode)})
            notify(setting, row)
        return rows

    @staticmethod
    def _write(path: Path, text: str) -> None:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
