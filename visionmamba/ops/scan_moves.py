"""The dispatcher op ``visionmamba::scan_moves``: by which move a scan arrives at each token."""

from __future__ import annotations

from functools import lru_cache
from math import prod

import numpy as np
import torch
from torch import Tensor

from ._operator import operator, register_fake
from ._tracing import traceable_overload
from .scan_path import scan_path

__all__ = ["NUM_MOVES", "move_codes", "scan_moves"]

_MOVES = {(0, 1): 1, (0, -1): 2, (-1, 0): 3, (1, 0): 4}  # (rows, columns): right, left, up, down
NUM_MOVES = 1 + len(_MOVES)
"""Kinds of moves: 0 the start, 1 right, 2 left, 3 up, 4 down."""

_SCHEMA_ARGUMENTS = "Tensor like, str path, SymInt[] grid, bool in_step_order"


def move_codes(path: str, grid: tuple[int, ...], in_step_order: bool) -> np.ndarray:
    """Return the ``(L, K)`` codes of the moves of a path whose directions visit every token, step by step."""
    table = scan_path(path, grid)
    if len(grid) != 2 or table.num_steps != table.num_tokens:
        raise ValueError(f"path: expected directions over every token of (rows, columns), got {path!r} over {grid}")
    codes = np.zeros_like(table.order)
    for k in range(table.num_directions):
        for step, move in enumerate(np.diff(table.coordinates(k), axis=0).tolist(), start=1):
            if tuple(move) not in _MOVES:
                raise ValueError(f"path: direction {k} of {path!r} jumps by {move} over {grid}; expected single steps")
            codes[k, step] = _MOVES[tuple(move)]
    if not in_step_order:
        codes = np.take_along_axis(codes, table.inverse, axis=1)
    return codes.T


@lru_cache(maxsize=256)
def _one_hot(path: str, grid: tuple[int, ...], in_step_order: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    codes = move_codes(path, grid, in_step_order)
    return torch.from_numpy(np.eye(NUM_MOVES, dtype=np.float32)[codes]).to(device, dtype)


@operator("scan_moves", f"({_SCHEMA_ARGUMENTS}) -> Tensor")
def _scan_moves(like, path, grid, in_step_order):
    # a copy: whoever owns an op's output may write to it
    return _one_hot(path, tuple(grid), in_step_order, like.device, like.dtype).clone()


@register_fake("scan_moves")
def _(like, path, grid, in_step_order):
    return like.new_empty((prod(grid), path.count(",") + 1, NUM_MOVES))


_traced = traceable_overload("scan_moves", _SCHEMA_ARGUMENTS, "Tensor")


def scan_moves(like: Tensor, path: str, grid: list[int], in_step_order: bool = True) -> Tensor:
    """Return the moves that arrive at each token, as one-hot codes: start, right, left, up, down.

    Args:
        like: Gives device and dtype.
        path: Scan path whose directions go from each token to a neighbour, such as ``snake_h``.
        grid: Size of the token grid, (rows, columns).
        in_step_order: Row t holds the move of step t; otherwise the move that arrived at token t.

    Returns:
        ``(L, K, 5)``; times a ``(5, N)`` parameter it is an embedding whose gradient needs no atomics.

    Raises:
        ValueError: The path jumps, or does not visit every token.
    """
    if not torch.jit.is_scripting() and torch.jit.is_tracing():
        return _traced(like.detach(), path, [int(size) for size in grid], in_step_order)
    return torch.ops.visionmamba.scan_moves(like.detach(), path, grid, in_step_order)
