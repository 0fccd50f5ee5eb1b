"""Writing a model in an exchange format, and checking what was written against the model."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn as nn

from .._files import replacing
from .standard_ops import standard_ops

__all__ = ["FORMATS", "ExportError", "Mismatch", "compare_with_eager", "export_model", "missing_requirement"]

FORMATS = {"onnx": ".onnx", "pt2": ".pt2", "aoti": ".aoti.pt2"}
"""Formats and their files' suffixes. ``pt2`` keeps this package's operators; the other two need nothing of it."""

_STANDARD_TORCH = "2.15"  # 2.10 to 2.12 were seen to refuse a scan in a decomposition; 2.13 and 2.14 are untried
_EXAMPLE_BATCH = 2  # torch.export takes a batch of one for a constant


class ExportError(RuntimeError):
    """A model that cannot be exported, or a format that this machine cannot write."""


class Mismatch(ExportError):  # noqa: N818 (a finding, not a fault of the export's own)
    """An exported file whose output is not the model's."""


def missing_requirement(format: str) -> str | None:
    """Say what a format needs that this machine does not have.

    Args:
        format: One of :data:`FORMATS`.

    Returns:
        One sentence, or None if nothing is missing.
    """
    if format in ("onnx", "aoti") and torch.__version__ < _STANDARD_TORCH:
        return f"{format} needs PyTorch {_STANDARD_TORCH} or newer, got {torch.__version__}"
    if format == "onnx":
        absent = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
        if absent:
            return f"ONNX needs {', '.join(absent)}: pip install 'visionmamba[export]'"
    if format == "aoti":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except (InvalidCxxCompiler, RuntimeError, OSError):
            return "an AOTInductor package needs a C++ compiler, and there is none here (install g++ or set CXX)"
    return None


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep the exporters' notes on their own internals from the user."""
    names = ("torch.onnx", "torch.export", "torch._inductor", "torch.utils.cpp_extension", "onnxscript")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _without_origins(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Forget which lines of which files on this machine the graph came from."""
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            node.meta.pop("stack_trace", None)
    return program


def _exported(model: nn.Module, shape: tuple[int, ...], batch_size: int | None) -> torch.export.ExportedProgram:
    parameter = next(model.parameters())
    x = torch.zeros(batch_size or _EXAMPLE_BATCH, *shape, dtype=parameter.dtype, device=parameter.device)
    dynamic = None if batch_size else ({0: torch.export.Dim("batch")},)
    return _without_origins(torch.export.export(model, (x,), dynamic_shapes=dynamic, strict=False))


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    import onnx_ir

    exported = torch.onnx.export(program, dynamo=True, input_names=["input"], output_names=["output"], verbose=False)
    graphs = [exported.model.graph, *(function.graph for function in exported.model.functions.values())]
    for node in (node for graph in graphs for node in onnx_ir.traversal.RecursiveGraphIterator(graph)):
        node.metadata_props.clear()  # lines of files on this machine
    exported.save(path, external_data=False)


def export_model(
    model: nn.Module, path: str | os.PathLike, format: str, shape: tuple[int, ...], batch_size: int | None = None
) -> None:
    """Write a model in an exchange format, whole or not at all.

    ``pt2`` is a ``torch.export`` program that keeps this package's operators, and so their fast kernels: ``import
    visionmamba`` before ``torch.export.load``. ``onnx`` has standard ONNX operators only, a ``Scan`` for each scan.
    ``aoti`` is an AOTInductor package, for Python or C++ without this package.

    Args:
        model: What to export, in evaluation mode.
        path: Where to write it.
        format: One of :data:`FORMATS`.
        shape: Shape of one input, (C, H, W) or (C, T, H, W); scan paths are constants, so the file is for this size.
        batch_size: Fixes the batch size. By default ``onnx`` and ``pt2`` take any, and ``aoti`` takes 1: AOTInductor
            compiles a loop for one size only.

    Raises:
        ExportError: This machine cannot write the format, or the model cannot be exported.
        ValueError: There is no such format.
    """
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    missing = missing_requirement(format)
    if missing:
        raise ExportError(missing)
    batch_size = batch_size or (1 if format == "aoti" else None)
    with _quietly(), torch.no_grad(), replacing(Path(path)) as temporary:
        try:
            program = _exported(model, tuple(shape), batch_size)
            if format != "pt2":
                program = _without_origins(program.run_decompositions(standard_ops()))
            if format == "onnx":
                _write_onnx(program, temporary)
                return
            package = io.BytesIO()  # PyTorch's own writer of files ends the process where the disk is full
            if format == "pt2":
                torch.export.save(program, package)
            else:
                torch._inductor.aoti_compile_and_package(program, package_path=package)
            temporary.write_bytes(package.getbuffer())
        except OSError:
            raise
        except Exception as error:
            raise ExportError(f"{type(model).__name__} cannot be exported to {format}: {error}") from error


def _load(path: Path, format: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the exported model as a function of a CPU tensor."""
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
    if format == "pt2":
        return torch.export.load(path).module()
    return torch._inductor.aoti_load_package(str(path))


def compare_with_eager(
    model: nn.Module,
    path: str | os.PathLike,
    format: str,
    shape: tuple[int, ...],
    batch_sizes: tuple[int, ...] = (1, 3),
    tolerance: float = 1e-4,
) -> float:
    """Run an exported file and the model on the same random inputs, and compare.

    Args:
        model: The model, in evaluation mode.
        path: The exported file.
        format: One of :data:`FORMATS`.
        shape: Shape of one input.
        batch_sizes: Batches to try; one if the file's batch size is fixed.
        tolerance: Greatest difference allowed, as a share of the greatest output (at least of 1).

    Returns:
        The greatest absolute difference.

    Raises:
        Mismatch: It is beyond the tolerance, or an output is not a number.
    """
    with _quietly(), torch.no_grad():
        run = _load(Path(path), format)
        worst = 0.0
        for batch in batch_sizes:
            x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))
            expected, got = model(x), run(x)
            difference = (got - expected).abs().max().item()
            if not difference <= tolerance * max(1.0, expected.abs().max().item()):
                raise Mismatch(f"{path}: differs from the model by {difference:.2e} for a batch of {batch}")
            worst = max(worst, difference)
    return worst
