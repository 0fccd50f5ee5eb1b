"""Inference as one CUDA graph: no launches from Python, which small batches otherwise wait for."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch.utils._pytree import tree_map_only

__all__ = ["GraphedModel", "graph"]

_WARMUP = 3


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
        if example.device.type != "cuda":
            raise ValueError(f"example: a CUDA graph needs a tensor on a CUDA device, got one on {example.device}")
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
