"""Inference state: what each layer keeps between the tokens that it has seen and those to come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["InferenceParams", "cached_states"]


@dataclass
class InferenceParams:
    """The inference cache of a model, under mamba_ssm's names.

    Args:
        max_seqlen: Most tokens that the sequences may grow to (bounds the attention layers' caches).
        max_batch_size: Rows of the cache.
        seqlen_offset: Tokens seen so far.
        batch_size_offset: First row that this call uses.
        key_value_memory_dict: Each layer's states, by layer index.
        lengths_per_sample: Tokens seen so far as a tensor, ``(B,)`` int32: replaces ``seqlen_offset`` in the attention
            layers where a captured CUDA graph must not depend on a Python number.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[int, Any] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Forget the tokens seen; the layers overwrite their states at the next call."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


def cached_states(module: torch.nn.Module, parameters: InferenceParams, batch: int) -> tuple[Tensor, ...]:
    """Return a layer's states for the rows of a call, as views that can be written.

    Args:
        module: A layer with ``layer_idx`` and ``allocate_inference_cache(batch, max_seqlen)``.
        parameters: The cache; the layer's states are made at the first call.
        batch: Rows of the call.

    Raises:
        ValueError: The layer has no index, or the rows do not fit into the cache.
    """
    if module.layer_idx is None:
        raise ValueError(f"layer_idx: expected an index where there is an inference cache, got None ({module!r})")
    memory = parameters.key_value_memory_dict
    if module.layer_idx not in memory:
        memory[module.layer_idx] = module.allocate_inference_cache(parameters.max_batch_size, parameters.max_seqlen)
    first = parameters.batch_size_offset
    if first + batch > parameters.max_batch_size:
        raise ValueError(
            f"inference_params: expected at most {parameters.max_batch_size} rows, got {batch} from row {first}"
        )
    states = memory[module.layer_idx]
    return tuple(state[first : first + batch] for state in (states if isinstance(states, tuple) else (states,)))
