"""The memory that a model takes, from shapes alone.

A model runs on PyTorch's meta device while every tensor it makes is noted and taken off again when it dies. What an
operator's kernel takes for itself and what an allocator rounds up is not in it; `visionmamba bench` measures the rest.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from .flops import input_shape, meta_state, run_on_meta

__all__ = ["activation_memory", "parameter_memory"]


class _LiveTensors(TorchDispatchMode):
    """Sums the bytes of the storages that operators make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.known = WeakIdKeyDictionary()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        arguments = {id(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if id(storage) not in arguments and storage not in self.known:
                self.known[storage] = size = storage.nbytes()
                self.live += size
                weakref.finalize(storage, self._release, size)
        self.peak = max(self.peak, self.live)
        return out

    def _release(self, size: int) -> None:
        self.live -= size


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def parameter_memory(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers."""
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def activation_memory(model: nn.Module, input_size: tuple[int, ...] | None = None, training: bool = False) -> int:
    """Return the largest number of bytes that a model's tensors take at one time, beside its parameters.

    Args:
        model: Any model.
        input_size: Size of its input, see :func:`visionmamba.analysis.flops.input_shape`.
        training: Count a forward and backward pass, with what is saved for the latter and the parameters' gradients.
    """
    was_training = model.training
    model.train(training)
    tracker, state = _LiveTensors(), meta_state(model, training)
    try:
        with torch.set_grad_enabled(training), tracker:
            out = run_on_meta(model, input_shape(model, input_size), state)
            if training:
                out.sum().backward()
    finally:
        model.train(was_training)
    return tracker.peak
