"""What a model costs: operations by both conventions, activations, parameters and memory; the whole and by module."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch.nn as nn

from .flops import count_operations, input_shape
from .memory import activation_memory, parameter_memory

__all__ = ["ModuleCost", "model_cost"]

_SCANS = ("selective_scan", "ssd")


@dataclass(frozen=True)
class ModuleCost:
    """The cost of a model or of one of its modules, for one input.

    Args:
        name: The module's name.
        params: Parameters.
        flops: Operations with scans by the upstream convention, see :mod:`visionmamba.analysis.flops`.
        flops_recurrence: Operations with the scans' recurrence as written.
        scan: Operations of scans in ``flops``, with the expansion of their step sizes.
        scan_recurrence: The same in ``flops_recurrence``.
        activations: Elements that convolutions, matrix products and scans put out.
    """

    name: str
    params: int
    flops: int
    flops_recurrence: int
    scan: int
    scan_recurrence: int
    activations: int

    @property
    def layers(self) -> int:
        """Operations outside scans, which both conventions count alike."""
        return self.flops - self.scan

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as a dictionary."""
        return {**asdict(self), "layers": self.layers}


@dataclass(frozen=True)
class ModelCost(ModuleCost):
    """The cost of a whole model.

    Args:
        input_size: Shape of the input, with the batch dimension.
        parameter_bytes: Memory of parameters and buffers.
        inference_bytes: Largest memory of the tensors of a forward pass, beside the parameters; None if not asked for.
        training_bytes: The same of a forward and backward pass, with the parameters' gradients.
        by_operator: ``flops`` by operator.
        modules: Cost of every module that runs, parents before their children.
    """

    input_size: tuple[int, ...]
    parameter_bytes: int
    inference_bytes: int | None
    training_bytes: int | None
    by_operator: dict[str, int]
    modules: list[ModuleCost]

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as a dictionary, modules as a list."""
        return {**super().as_dict(), "modules": [module.as_dict() for module in self.modules]}


def model_cost(
    model: nn.Module, input_size: tuple[int, ...] | None = None, name: str = "", memory: bool = True
) -> ModelCost:
    """Return what a model costs, without running it.

    Args:
        model: Any model, best created with ``device="meta"``.
        input_size: Size of its input, see :func:`visionmamba.analysis.flops.input_shape`.
        name: Name to give it.
        memory: Whether the memory of a forward and a backward pass is counted too.
    """
    counts = count_operations(model, input_size, ("upstream", "recurrence", "activations"))
    params = {module: sum(map(_size, part.parameters())) for module, part in model.named_modules()}
    modules = {}
    for module in [name for name in params if name in counts["recurrence"]]:
        upstream, recurrence, activations = (
            counts[kind].get(module, {}) for kind in ("upstream", "recurrence", "activations")
        )
        modules[module] = dict(
            params=params[module],
            flops=sum(upstream.values()),
            flops_recurrence=sum(recurrence.values()),
            scan=sum(upstream.get(scan, 0) for scan in _SCANS),
            scan_recurrence=sum(recurrence.get(scan, 0) for scan in _SCANS),
            activations=sum(activations.values()),
        )
    whole = modules.pop("")
    return ModelCost(
        name=name or type(model).__name__,
        **whole,
        input_size=input_shape(model, input_size),
        parameter_bytes=parameter_memory(model),
        inference_bytes=activation_memory(model, input_size) if memory else None,
        training_bytes=activation_memory(model, input_size, training=True) if memory else None,
        by_operator=counts["upstream"][""],
        modules=[ModuleCost(module, **figures) for module, figures in modules.items()],
    )


def _size(parameter: nn.Parameter) -> int:
    return parameter.numel()
