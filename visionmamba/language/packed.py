"""Packed sequences: several sequences in one row of tokens, kept apart by ``cu_seqlens`` or ``seq_idx``."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ..ops.ssd.interface import check_cu_seqlens

__all__ = ["apply_to_sequences", "sequence_boundaries", "sequence_index"]


def sequence_index(cu_seqlens: Tensor | None, seq_idx: Tensor | None, x: Tensor) -> Tensor | None:
    """Return the sequence that each token belongs to, or None where nothing is packed.

    Args:
        cu_seqlens: Boundaries of the packed sequences, ``(S + 1,)`` integer, from 0 to L; the batch must be 1.
        seq_idx: Sequence of each token, ``(B, L)`` integer; returned as it is where it is alone. Beside it
            ``cu_seqlens`` decides, tokens after the last boundary are padding, and sequences may be empty.
        x: The tokens, ``(B, L, D)``.

    Raises:
        ValueError: The boundaries do not cover the tokens, or ``seq_idx`` does not fit them.
    """
    if seq_idx is not None:
        if seq_idx.shape != x.shape[:2]:
            raise ValueError(f"seq_idx: expected shape {tuple(x.shape[:2])}, got {tuple(seq_idx.shape)}")
    if cu_seqlens is None:
        return seq_idx
    if x.shape[0] != 1:
        raise ValueError(f"cu_seqlens: expected packed sequences in a batch of 1, got a batch of {x.shape[0]}")
    bounds = [*check_cu_seqlens(cu_seqlens, x.shape[1], padded=seq_idx is not None), x.shape[1]]
    lengths = torch.diff(torch.tensor(bounds))
    index = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths)
    return index.unsqueeze(0).to(x.device)


def sequence_boundaries(seq_idx: Tensor) -> list[int]:
    """Return where sequences begin in the flattened tokens of ``seq_idx`` (B, L), and the number of tokens."""
    starts = torch.ones_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return [*starts.flatten().nonzero().squeeze(1).tolist(), seq_idx.numel()]


def _buckets(boundaries: list[int]) -> list[list[tuple[int, int]]]:
    """Group sequences whose lengths are within a factor of two, so that padding at most doubles the work."""
    groups: dict[int, list[tuple[int, int]]] = {}
    for start, end in pairwise(boundaries):
        groups.setdefault((end - start - 1).bit_length(), []).append((start, end))
    return list(groups.values())


def apply_to_sequences(function: Callable[[Tensor], Tensor], x: Tensor, seq_idx: Tensor) -> Tensor:
    """Apply a causal function to every packed sequence on its own.

    Sequences of similar length run together as a batch, padded at the end: a causal function cannot see the padding,
    so this is exact.

    Args:
        function: Maps ``(S, T, D)`` to ``(S, T, E)``, each row by itself, each step from the steps up to it.
        x: Tokens, ``(B, L, D)``.
        seq_idx: Sequence of each token, ``(B, L)``.

    Returns:
        ``(B, L, E)``.
    """
    flat = x.flatten(0, 1)
    outputs, places = [], []
    for bucket in _buckets(sequence_boundaries(seq_idx)):
        starts, ends = torch.tensor(bucket, device=x.device).T.unsqueeze(-1)
        index = starts + torch.arange(int((ends - starts).max()), device=x.device)  # (S, T)
        valid = index < ends
        outputs.append(function(flat[index.clamp(max=flat.shape[0] - 1)])[valid])
        places.append(index[valid])
    order = torch.argsort(torch.cat(places))
    return torch.cat(outputs)[order].unflatten(0, x.shape[:2])
