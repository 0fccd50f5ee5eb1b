"""Projections with weights of their own for each direction, as matrix products that suit a GPU.

The directions' weights stand as blocks on the diagonal of one matrix. Its zeros cost arithmetic that tensor cores have
to spare, and leave one product over the tokens as they lie in memory: no direction is a product of its own, with rows
of a few values that no kernel suits.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["block_diagonal", "diagonal_blocks", "product", "weight_gradient"]

_BLOCK = 128  # rows and columns of the result that a block of a matrix product's kernel covers
_BLOCKS_WANTED = 264  # blocks that keep a large GPU busy


def product(x: Tensor, y: Tensor) -> Tensor:
    """Return x y, matrices or batches of them, in float32 whatever the dtype of the factors."""
    multiply = torch.mm if x.dim() == 2 else torch.bmm
    if x.is_cuda and x.dtype != torch.float32:
        return multiply(x, y, out_dtype=torch.float32)
    return multiply(x.float(), y.float())


def block_diagonal(weight: Tensor, columns: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Return ``(K, M, N)`` as the blocks of a ``(K M, columns)`` matrix; K N columns and the same dtype if absent."""
    directions, height, width = weight.shape
    matrix = weight.new_zeros(directions, height, directions * width if columns is None else columns, dtype=dtype)
    blocks = matrix[..., : directions * width].unflatten(-1, (directions, width))
    blocks.diagonal(dim1=0, dim2=2).copy_(weight.permute(1, 2, 0))
    return matrix.flatten(0, 1)


def diagonal_blocks(matrix: Tensor, directions: int, height: int, width: int) -> Tensor:
    """Return the blocks ``(K, M, N)`` of a matrix that :func:`block_diagonal` made, or of one of that size."""
    blocks = matrix[:, : directions * width].view(directions, height, directions, width)
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _parts(rows: int, height: int, width: int) -> int:
    """Return into how many equal parts a sum over rows is cut, so that all of a GPU works on it."""
    most = 2 * _BLOCKS_WANTED // (-(-height // _BLOCK) * -(-width // _BLOCK))
    return next(parts for parts in range(max(1, min(most, rows)), 0, -1) if rows % parts == 0)


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """Return dy^T x in float32: over equal parts of the rows first, then the sum of the parts, in a fixed order.

    Args:
        dy: ``(rows, M)``.
        x: ``(rows, N)``.
    """
    (rows, height), width = dy.shape, x.shape[1]
    if rows == 0:
        return dy.new_zeros(height, width, dtype=torch.float32)
    parts = _parts(rows, height, width)
    return product(dy.view(parts, -1, height).transpose(1, 2), x.view(parts, -1, width)).sum(0)
