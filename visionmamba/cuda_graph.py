"""Inference and training as CUDA graphs: no launches from Python, which small batches otherwise wait for."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_map_only

__all__ = ["GraphedModel", "graph", "graph_training"]

_WARMUP = 3


def _check_device(example: torch.Tensor) -> None:
    if example.device.type != "cuda":
        raise ValueError(f"example: a CUDA graph needs a tensor on a CUDA device, got one on {example.device}")


class GraphedModel(nn.Module):
    """A model whose inference on inputs like an example is replayed; other inputs run the model as it stands.

    The graph reads the model's parameters where they are: changing them in place is seen, replacing them is not.

    Args:
        model: The model, in evaluation mode, on a CUDA device.
        example: An input.
        dtype: Autocast's dtype; no autocast if absent.
    """

    def __init__(self, model: nn.Module, example: torch.Tensor, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        _check_device(example)
        if model.training:
            raise ValueError("model: a CUDA graph is captured in evaluation mode, got a model in training mode")
        self.model, self.dtype = model, dtype
        self._input = example.detach().clone()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(example.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARMUP):
                    self._run(self._input)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self._graph):
                self._output = self._run(self._input)

    def _run(self, x: torch.Tensor):
        # Autocast's cache would hold casts of the weights that live in the graph's memory.
        options = dict(dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None, cache_enabled=False)
        with torch.no_grad(), torch.autocast("cuda", **options):
            return self.model(x)

    def forward(self, x: torch.Tensor):
        """Return the model's output, without gradients."""
        like = self._input
        if (x.shape, x.dtype, x.device) != (like.shape, like.dtype, like.device) or self.model.training:
            return self._run(x)
        like.copy_(x)
        self._graph.replay()
        return tree_map_only(torch.Tensor, torch.clone, self._output)


def graph(model: nn.Module, example: torch.Tensor, dtype: torch.dtype | None = None) -> GraphedModel:
    """Capture a model's inference as a CUDA graph.

    Args:
        model: The model, in evaluation mode, on a CUDA device.
        example: An input; inputs of its shape, dtype and device are replayed.
        dtype: Run under autocast with this dtype.

    Returns:
        A module to call in place of the model.

    Raises:
        ValueError: The example is not on a CUDA device, or the model is in training mode.
    """
    return GraphedModel(model, example, dtype)


def graph_training(model: nn.Module, example: torch.Tensor) -> None:
    """Replay a model's forward and backward passes in training as CUDA graphs from now on.

    They are captured in the mode and under the autocast of the moment, and leave weights, gradients, buffers and random
    numbers as they are. Replays draw the random numbers that the model would draw without graphs, read weights and
    buffers where they are, and write buffers there. What is unlike the example, evaluation and passes without gradients
    run the model as it stands. The memory of a pass, activations among it, stays taken.

    A pass's output is overwritten by the next pass and must not be changed in place; its backward pass comes before the
    next forward pass. Gradients of several passes may be added up. Copies of the model run as it stands.

    Args:
        model: The model, on a CUDA device; not yet wrapped to train in several processes.
        example: An input; inputs of its shape, dtype and device are replayed.

    Raises:
        ValueError: The example is not on a CUDA device.
        RuntimeError: The model cannot be captured, such as one that reads results back to decide what to do.
    """
    parameters = list(model.parameters())
    if hasattr(model.forward, "eager"):  # captured before
        model.forward = model.forward.eager
    eager = model.forward
    captured = _circumstances(model, parameters, example)
    with _unchanged(model, example.device), _aliased(model) as aliases, _uncached_autocast(example.device.type):
        replay = _capture(lambda x, *_: model(x), (example.detach().clone(), *aliases))

    def forward(self: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self is not model:
            return type(self).forward(self, x, *args, **kwargs)
        if args or kwargs or _circumstances(model, parameters, x) != captured:
            return eager(x, *args, **kwargs)
        for parameter in parameters:
            if parameter.grad is not None:  # to be added to; it may lie where the replay writes
                parameter.grad = parameter.grad.clone()
        return replay(x, *parameters)

    forward.eager = eager
    model.forward = MethodType(forward, model)  # a method's copy belongs to the model's copy


def _capture(function: Callable[..., Any], inputs: tuple[torch.Tensor, ...]) -> Callable[..., Any]:
    """Return a function whose forward and backward passes are replayed; its first input is copied, others shared."""
    _check_device(inputs[0])
    gc.collect()  # a graph that is freed during the capture of another ends it
    with torch.cuda.device(inputs[0].device):
        return torch.cuda.make_graphed_callables(function, inputs, num_warmup_iters=_WARMUP, allow_unused_input=True)


def _circumstances(model: nn.Module, parameters: list[nn.Parameter], x: torch.Tensor) -> tuple[Any, ...]:
    """Return what must be as it was at the capture for a replay to compute what the model would."""
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    grad = torch.is_grad_enabled(), x.requires_grad, *(parameter.requires_grad for parameter in parameters)
    return x.shape, x.dtype, x.device, model.training, autocast, grad


@contextlib.contextmanager
def _unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Undo what passes do to a model's buffers and to random numbers."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    with torch.no_grad():
        for buffer, values in kept:
            buffer.copy_(values)


@contextlib.contextmanager
def _aliased(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Let a model compute with other parameters for a while, which lie where its own do.

    The autograd nodes that add to a parameter's gradient keep to the stream they are made on: those of a capture on a
    side stream would outlive it, and every gradient would wait for that stream.
    """
    own = list(model.parameters())
    aliases = [nn.Parameter(parameter.detach(), parameter.requires_grad) for parameter in own]
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
    ]
    alias_of = dict(zip(map(id, own), aliases, strict=True))
    try:
        for module, name, parameter in places:
            setattr(module, name, alias_of[id(parameter)])
        yield aliases
    finally:
        for module, name, parameter in places:
            setattr(module, name, parameter)


def _uncached_autocast(kind: str) -> torch.autocast:
    """Return the autocast that is on, without its cache: it would hold casts that live in the graph's memory."""
    options = dict(dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))
    return torch.autocast(kind, **options, cache_enabled=False)
