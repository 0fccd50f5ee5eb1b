"""Operation counts by the convention of the field's tables, through fvcore.

The convention (fvcore's, which VMamba, MMEngine and timm's benchmark use too): one operation for a multiply-accumulate
of linear and convolution layers, 5 an element for norms, nothing for activations and index arithmetic; and for each
selective scan ``9 B L D N + B L D`` over the channels of all directions, see
:mod:`visionmamba.ops.selective_scan.flops`. fvcore passes over operators that it does not know, so this package
teaches it (and MMEngine) its own as soon as either is imported: their counters are right without further ado.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from math import floor, prod
from types import ModuleType
from typing import Any

import torch
import torch.nn as nn
from torch.utils.flop_counter import flop_registry

from ..ops.selective_scan import flops

__all__ = ["count_flops", "flops_by_operator", "register_flop_handlers"]

_TABLES = {
    "fvcore.nn.flop_count": "_DEFAULT_SUPPORTED_OPS",
    "mmengine.analysis.complexity_analysis": "_DEFAULT_SUPPORTED_FLOP_OPS",
}
"""Modules that count, and their tables of handlers by operator."""


def _shape(value: Any) -> list[int]:
    """Return the shape of a value of a traced graph."""
    return value.type().sizes()


def _selective_scan(inputs: list[Any], outputs: list[Any]) -> int:
    u, delta, A = map(_shape, inputs[:3])
    return flops.scan_flops(u, A) + flops.dt_projection_macs(u, delta, A)


def _causal_conv1d(inputs: list[Any], outputs: list[Any]) -> int:
    x, weight = map(_shape, inputs[:2])
    return prod(x[:2]) * prod(weight)


def _ssd(inputs: list[Any], outputs: list[Any]) -> int:
    # No table of the field counts SSD: this is the recurrence as written, as for PyTorch's own counter.
    return flop_registry[torch.ops.visionmamba.ssd](*map(_shape, inputs[:4]), out_val=None)


_HANDLERS: dict[str, Callable[[list[Any], list[Any]], int]] = {
    "visionmamba::selective_scan": _selective_scan,
    "visionmamba::causal_conv1d": _causal_conv1d,
    "visionmamba::ssd": _ssd,
}


_EINSUM_MODELS = ("vanilla_vmamba", "local_vssm", "efficient_vmamba")
"""Families whose official code projects to the scan's inputs by ``einsum``.

fvcore takes an einsum's count from numpy's report, which has four digits, so their published counts contain that
rounding: a few parts in a million.
"""


def _einsum_rounding(macs: int) -> int:
    """Return what fvcore counts for an einsum of so many multiply-accumulates, less the true number."""
    return floor(float(f"{2 * macs:.3e}") / 2) - macs


def _selective_scan_after_einsum(inputs: list[Any], outputs: list[Any]) -> int:
    u, delta, A = map(_shape, inputs[:3])
    (batch, num_tokens), (directions, channels, states), rank = u[:2], A, delta[-1]
    expand = flops.dt_projection_macs(u, delta, A)
    project = batch * num_tokens * directions * channels * (rank + 2 * states)
    return _selective_scan(inputs, outputs) + _einsum_rounding(expand) + _einsum_rounding(project)


def _mean(inputs: list[Any], outputs: list[Any]) -> int:
    """Count a mean over a map's two dimensions as the pooling layer that it stands for: one an element."""
    shape = _shape(inputs[0])
    return prod(shape) if len(shape) - len(_shape(outputs[0])) == 2 else 0


def _add_handlers(module: ModuleType) -> None:
    getattr(module, _TABLES[module.__name__]).update(_HANDLERS)


class _AfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Adds the handlers to a counting module right after Python has imported it; it finds nothing by itself."""

    def __init__(self) -> None:
        self.loaders: dict[str, importlib.abc.Loader] = {}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in _TABLES or name in self.loaders:
            return None
        self.loaders[name] = None  # the search below comes past here again
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            del self.loaders[name]
            return None
        self.loaders[name], spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: Any) -> ModuleType | None:
        return self.loaders[spec.name].create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = module.__spec__.loader = self.loaders[module.__name__]
        module.__loader__.exec_module(module)
        _add_handlers(module)


def register_flop_handlers() -> None:
    """Teach fvcore and MMEngine to count this package's operators, now or when they are imported.

    ``import visionmamba`` calls it; it imports neither of them. Calling it again does nothing new.
    """
    for name in _TABLES:
        if name in sys.modules:
            _add_handlers(sys.modules[name])
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def flops_by_operator(model: nn.Module, input_size: tuple[int, ...]) -> dict[str, int]:
    """Count a model's operations by operator, by the convention of the field's tables.

    Args:
        model: Any model; it is traced in evaluation mode on its own device.
        input_size: Shape of its input, with or without the batch dimension.

    Returns:
        Operations by operator's name (``conv``, ``linear``, ``visionmamba::selective_scan``, ...).
    """
    register_flop_handlers()
    from fvcore.nn import FlopCountAnalysis

    parameter = next(model.parameters())
    shape = input_size if len(input_size) == 4 else (1, *input_size)
    training = model.training
    analysis = FlopCountAnalysis(model.eval(), torch.zeros(shape, dtype=parameter.dtype, device=parameter.device))
    analysis.set_op_handle("aten::mean", _mean)
    if (getattr(model, "pretrained_cfg", None) or {}).get("architecture", "").startswith(_EINSUM_MODELS):
        analysis.set_op_handle("visionmamba::selective_scan", _selective_scan_after_einsum)
    try:
        with torch.no_grad():
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
            return {name: int(count) for name, count in analysis.by_operator().items()}
    finally:
        model.train(training)


def count_flops(model: nn.Module, input_size: tuple[int, ...]) -> int:
    """Count a model's operations, by the convention of the field's tables.

    Args:
        model: Any model.
        input_size: Shape of its input, with or without the batch dimension.

    Returns:
        Operations in all, e.g. 4905609984 for ``vmamba_tiny_s1l8`` at 3 x 224 x 224.
    """
    return sum(flops_by_operator(model, input_size).values())
