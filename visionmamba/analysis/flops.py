"""Operation counts by the convention of the field's tables, without running anything.

The convention is fvcore's, which VMamba, MMEngine and timm's benchmark use too: one operation for a multiply-accumulate
of convolutions, linear layers and matrix products, 5 an element for layer norms (2 for batch norms at inference), 1 for
pooling, nothing for activations and index arithmetic. Beside it, for each selective scan over B images, L tokens, D
channels of all directions and N states, one of

- ``"upstream"``: ``9 B L D N + B L D``, the field's figure (state-spaces/mamba, issue 110);
- ``"recurrence"``: ``(7 N + 3) B L D``, the operations of the recurrence as it is written: for each state delta A, exp,
  times h, delta u times B, add, times C, add to y; for each channel delta u, D u and its addition.

The formulas stand in :mod:`visionmamba.ops.selective_scan.flops`. Here a model runs on PyTorch's meta device, which
knows shapes but no numbers, under PyTorch's ``FlopCounterMode`` with the convention's table. fvcore and MMEngine pass
over operators that they do not know, so this package teaches both its own as soon as either is imported: a user's own
calls of their counters are right without further ado.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from math import floor, prod
from types import ModuleType
from typing import Any

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from ..ops.selective_scan import flops

__all__ = [
    "CONVENTIONS",
    "count_flops",
    "count_operations",
    "flops_by_operator",
    "input_shape",
    "register_flop_handlers",
]

CONVENTIONS = ("upstream", "recurrence")
"""How the operations of a selective scan may be counted."""

_TABLES = {
    "fvcore.nn.flop_count": ("_DEFAULT_SUPPORTED_OPS", "flops"),
    "fvcore.nn.activation_count": ("_DEFAULT_SUPPORTED_OPS", "activations"),
    "mmengine.analysis.complexity_analysis": ("_DEFAULT_SUPPORTED_FLOP_OPS", "flops"),
}
"""Modules that count, with their tables of handlers by operator and what those count."""


def _shape(value: Any) -> list[int]:
    """Return the shape of a value of a traced graph."""
    return value.type().sizes()


def _traced_scan(inputs: list[Any], outputs: list[Any]) -> int:
    u, delta, A = map(_shape, inputs[:3])
    grid = [size.toIValue() for size in inputs[11].node().inputs()]
    steps = flops.steps_of(inputs[10].toIValue(), grid)
    return flops.scan_flops(u, A, steps) + flops.dt_projection_macs(u, delta, A, steps)


def _traced_conv(inputs: list[Any], outputs: list[Any]) -> int:
    x, weight = map(_shape, inputs[:2])
    return prod(x[:2]) * prod(weight)


def _traced_ssd(inputs: list[Any], outputs: list[Any]) -> int:
    # No table of the field counts SSD: this is the recurrence as written, as for PyTorch's own counter.
    return flop_registry[torch.ops.visionmamba.ssd](*map(_shape, inputs[:4]), out_val=None)


def _traced_activations(inputs: list[Any], outputs: list[Any]) -> int:
    return prod(_shape(outputs[0]))


_HANDLERS: dict[str, dict[str, Callable[[list[Any], list[Any]], int]]] = {
    "flops": {
        "visionmamba::selective_scan": _traced_scan,
        "visionmamba::causal_conv1d": _traced_conv,
        "visionmamba::ssd": _traced_ssd,
    },
    "activations": dict.fromkeys(
        ("visionmamba::selective_scan", "visionmamba::causal_conv1d", "visionmamba::ssd"), _traced_activations
    ),
}


def _add_handlers(module: ModuleType) -> None:
    table, counted = _TABLES[module.__name__]
    getattr(module, table).update(_HANDLERS[counted])


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


_aten = torch.ops.aten
_ops = torch.ops.visionmamba
_OPERATOR_NAMES = {
    "convolution": "conv",
    "_convolution": "conv",
    "mm": "linear",
    "addmm": "linear",
    "bmm": "matmul",
    "baddbmm": "matmul",
    "native_layer_norm": "layer_norm",
    "native_group_norm": "group_norm",
    "native_batch_norm": "batch_norm",
    "_native_batch_norm_legit_no_training": "batch_norm",
    "cudnn_batch_norm": "batch_norm",
    "miopen_batch_norm": "batch_norm",
    "_adaptive_avg_pool2d": "mean",
}
"""Names by which operators are reported, where they are not PyTorch's own."""


def _norm(affine: int, plain: int, weight_index: int) -> Callable[..., int]:
    """Return the count of a norm: operations an element with and without a weight."""

    def count(x, *arguments: Any, out_val: Any = None, **_options: Any) -> int:
        weight = arguments[weight_index - 1] if len(arguments) >= weight_index else None
        return x.numel() * (plain if weight is None else affine)

    return count


def _mean(x, dim=None, keepdim: bool = False, *_arguments: Any, out_val: Any = None, **_options: Any) -> int:
    """Count one an element where a mean over a map's two dimensions stands for the pooling layer of an official model.

    That is at the end, where they vanish, and over the last two dimensions; other means are arithmetic like any other.
    """
    dims = tuple(dim) if isinstance(dim, list | tuple) else ()
    return x.numel() if len(dims) == 2 and (not keepdim or dims in ((2, 3), (-2, -1), (-1, -2))) else 0


def _pool(x, *_arguments: Any, out_val: Any = None, **_options: Any) -> int:
    return x.numel()


def _resize(*_arguments: Any, out_val: Any = None, **_options: Any) -> int:
    return 4 * out_val.numel()


def _halved(formula: Callable[..., int]) -> Callable[..., int]:
    """Return multiply-accumulates from a formula of PyTorch's counter, which counts two operations for each."""
    return lambda *arguments, out_val=None, **options: formula(*arguments, out_val=out_val, **options) // 2


def _scan(u, delta, A, *arguments: Any, count: Callable[..., int], out_val: Any = None, **_options: Any) -> int:
    steps = flops.steps_of(*arguments[7:9])
    return count(u, A, steps) + flops.dt_projection_macs(u, delta, A, steps)


def _ssd(*arguments: Any, out_val: Any = None, **options: Any) -> int:
    return flop_registry[_ops.ssd](*arguments, out_val=out_val, **options)


def _einsum_rounding(macs: int) -> int:
    """Return what fvcore counts for an einsum of so many multiply-accumulates, less the true number."""
    return floor(float(f"{2 * macs:.3e}") / 2) - macs


def _scan_after_einsum(u, delta, A, *arguments: Any, out_val: Any = None, **_options: Any) -> int:
    """Count a scan by the upstream convention, and what fvcore makes of the projections before it.

    fvcore takes an einsum's count from numpy's report, which has four digits, so counts published for models whose
    official code projects by ``einsum`` contain that rounding: a few parts in a million.
    """
    (directions, channels, states), rank = A.shape, delta.shape[-1]
    steps = flops.steps_of(*arguments[7:9])
    expand = flops.dt_projection_macs(u, delta, A, steps)
    project = u.shape[0] * steps * directions * channels * (rank + 2 * states)
    return flops.scan_flops(u, A, steps) + expand + _einsum_rounding(expand) + _einsum_rounding(project)


def _projects_by_einsum(model: nn.Module) -> bool:
    """Whether a model's official code does: where VMamba's first, gated token mixer is used, by any family."""
    from ..layers import SS2D

    return any(isinstance(module, SS2D) and module.gated for module in model.modules())


def operations_table(convention: str, after_einsum: bool = False) -> dict[Any, Callable[..., int]]:
    """Return the table of a convention: for each operator, a function that counts from its arguments.

    Args:
        convention: One of :data:`CONVENTIONS`.
        after_einsum: Count as published for a model whose official code projects by ``einsum``.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention: expected one of {', '.join(CONVENTIONS)}, got {convention!r}")
    table = {op: _halved(formula) for op, formula in flop_registry.items()}
    scan = partial(_scan, count=flops.scan_flops if convention == "upstream" else flops.recurrence_flops)
    batch_norms = ("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "miopen_batch_norm")
    table |= {
        _aten.native_layer_norm: _norm(5, 4, weight_index=2),
        _aten.native_group_norm: _norm(5, 4, weight_index=1),
        **{getattr(_aten, name): _norm(2, 1, weight_index=1) for name in batch_norms},
        _aten.mean: _mean,
        _aten._adaptive_avg_pool2d: _pool,
        _aten.upsample_bilinear2d: _resize,
        _ops.selective_scan: _scan_after_einsum if after_einsum and convention == "upstream" else scan,
        _ops.ssd: _ssd,
    }
    return table


def _produced(*_arguments: Any, out_val: Any = None, **_options: Any) -> int:
    return (out_val if isinstance(out_val, torch.Tensor) else out_val[0]).numel()


class _Counter(FlopCounterMode):
    """PyTorch's counter with another table; its functions see tensors, not only shapes."""

    def __init__(self, table: dict[Any, Callable[..., int]]) -> None:
        super().__init__(display=False)
        self.flop_registry = table


def input_shape(model: nn.Module, input_size: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """Return the shape of a batch for a model.

    Args:
        model: A timm model; one that takes clips has a ``num_frames``.
        input_size: (height, width); or with channels (and frames) before them, with or without the batch dimension.
            The model's own size if absent.

    Returns:
        ``(batch, channels, height, width)``, or ``(batch, channels, frames, height, width)`` of a model of clips.

    Raises:
        ValueError: The size has another number of dimensions.
    """
    own = _own_size(model)
    if input_size is None:
        return (1, *own)
    size = tuple(input_size)
    if len(size) == 2:
        size = (*own[:-2], *size)
    if len(size) == len(own):
        size = (1, *size)
    if len(size) != len(own) + 1 or min(size) < 1:
        layout = "channels, frames, height, width" if len(own) == 4 else "channels, height, width"
        raise ValueError(f"input_size: expected (height, width) or ({layout}), all positive, got {tuple(input_size)}")
    return size


def _own_size(model: nn.Module) -> tuple[int, ...]:
    from ..inference import input_size

    return input_size(model) if hasattr(model, "pretrained_cfg") else (3, 224, 224)


def meta_state(model: nn.Module, training: bool = False) -> dict[str, torch.Tensor]:
    """Return stand-ins without memory for a model's parameters and buffers, see :func:`run_on_meta`.

    Args:
        model: Any model.
        training: Let the parameters require gradients.
    """
    state = {name: torch.empty_like(buffer, device="meta") for name, buffer in model.named_buffers()}
    for name, parameter in model.named_parameters():
        state[name] = torch.empty_like(parameter, device="meta", requires_grad=training)
    return state


def run_on_meta(model: nn.Module, shape: tuple[int, ...], state: dict[str, torch.Tensor]) -> torch.Tensor:
    """Run a model on the meta device, where it stands: nothing is copied, moved or computed.

    Args:
        model: Any model.
        shape: Shape of its input.
        state: What :func:`meta_state` gave.
    """
    dtype = next((tensor.dtype for tensor in model.parameters()), torch.float32)
    return torch.func.functional_call(model, state, (torch.empty(shape, dtype=dtype, device="meta"),))


def count_operations(
    model: nn.Module, input_size: tuple[int, ...] | None = None, count: tuple[str, ...] = ("upstream",)
) -> dict[str, dict[str, dict[str, int]]]:
    """Count a model's operations by module and operator.

    Args:
        model: Any model, on any device; it is counted in evaluation mode.
        input_size: Size of its input, see :func:`input_shape`.
        count: What to count: names of :data:`CONVENTIONS`, and ``"activations"`` for the elements that convolutions,
            matrix products and scans put out.

    Returns:
        For each of ``count``, operations by operator's name (``conv``, ``linear``, ``selective_scan``, ...) by module's
        name; the model itself has the name ``""``.
    """
    after_einsum = _projects_by_einsum(model)
    tables = {name: operations_table(name, after_einsum) for name in count if name != "activations"}
    if "activations" in count:
        tables["activations"] = dict.fromkeys(flop_registry, _produced)
    return count_with(tables, model, input_size)


def count_with(
    tables: dict[str, dict[Any, Callable[..., int]]], model: nn.Module, input_size: tuple[int, ...] | None = None
) -> dict[str, dict[str, dict[str, int]]]:
    """Count by tables of one's own, all in one run on the meta device.

    Args:
        tables: For each name, functions by operator, called with the operator's arguments and ``out_val``.
        model: Any model; it is counted in evaluation mode.
        input_size: Size of its input, see :func:`input_shape`.

    Returns:
        As :func:`count_operations`, for each of the tables.
    """
    counters = {name: _Counter(table) for name, table in tables.items()}
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), ExitStack() as stack:
            for counter in counters.values():
                stack.enter_context(counter)
            run_on_meta(model, input_shape(model, input_size), meta_state(model))
    finally:
        model.train(training)
    return {name: _by_module(counter.get_flop_counts(), type(model).__name__) for name, counter in counters.items()}


def _by_module(counts: dict[str, dict[Any, int]], root: str) -> dict[str, dict[str, int]]:
    """Return operations by module and operator from a counter's, whose names begin with the model's class."""
    modules: dict[str, dict[str, int]] = {"": {}}
    for module, by_operator in counts.items():
        if module == "Global" or module.startswith(f"{root}."):
            named = modules.setdefault("" if module == "Global" else module.removeprefix(f"{root}."), {})
            for op, number in by_operator.items():
                name = op.__name__.rpartition(".")[2]
                name = _OPERATOR_NAMES.get(name, name)
                if number:
                    named[name] = named.get(name, 0) + number
    called = set(modules)
    for module in sorted(called):  # a list of modules is not called itself, so its members' operations are added up
        parent = module.rpartition(".")[0]
        while parent and parent not in called:
            container = modules.setdefault(parent, {})
            for name, number in modules[module].items():
                container[name] = container.get(name, 0) + number
            parent = parent.rpartition(".")[0]
    return modules


def flops_by_operator(
    model: nn.Module, input_size: tuple[int, ...] | None = None, convention: str = "upstream"
) -> dict[str, int]:
    """Count a model's operations by operator, by the convention of the field's tables.

    Args:
        model: Any model.
        input_size: Size of its input, see :func:`input_shape`.
        convention: One of :data:`CONVENTIONS`.

    Returns:
        Operations by operator's name (``conv``, ``linear``, ``selective_scan``, ...).
    """
    return count_operations(model, input_size, (convention,))[convention][""]


def count_flops(model: nn.Module, input_size: tuple[int, ...] | None = None, convention: str = "upstream") -> int:
    """Count a model's operations, by the convention of the field's tables.

    Args:
        model: Any model.
        input_size: Size of its input, see :func:`input_shape`.
        convention: One of :data:`CONVENTIONS`.

    Returns:
        Operations in all, e.g. 4905609984 for ``vmamba_tiny_s1l8`` at 3 x 224 x 224.
    """
    return sum(flops_by_operator(model, input_size, convention).values())
