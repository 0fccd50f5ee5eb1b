"""The step sizes' low-rank projection and its gradients as matrix products that suit a GPU.

The weights of the directions, ``(K, D, R)``, stand as blocks on the diagonal of one ``(K D, K R)`` matrix. Its zeros
cost arithmetic that tensor cores have to spare, and leave one product over the tokens as they lie in memory, with the
result as the scan reads it: no direction is a product of its own, with rows of a few values that no kernel suits.

With 16-bit activations the products run on tensor cores and sum in float32. The step sizes come out as accurate as in
float32: the weight is a sum of 16-bit terms, side by side in one longer product. The gradients are rounded to 16 bits
before their products, as those of every other projection are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["expand_delta", "expand_delta_backward"]

_TERMS = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}  # that hold the 24 bits of a float32
_ALIGNMENT = 8  # columns: 16 bytes of 16-bit values, which tensor cores are fed by
_BLOCK = 128  # rows and columns of the result that a block of a matrix product's kernel covers
_BLOCKS_WANTED = 264  # blocks that keep a large GPU busy


def _product(x: Tensor, y: Tensor) -> Tensor:
    """Return x y, matrices or batches of them, in float32 whatever the dtype of the factors."""
    multiply = torch.mm if x.dim() == 2 else torch.bmm
    if x.is_cuda and x.dtype != torch.float32:
        return multiply(x, y, out_dtype=torch.float32)
    return multiply(x.float(), y.float())


def _token_rows(delta: Tensor) -> Tensor:
    """Return ``(B, L, K, R)`` as aligned rows ``(B L, columns)``, with zeros past the K R columns."""
    rows = delta.reshape(-1, delta.shape[2] * delta.shape[3])
    missing = -rows.shape[1] % _ALIGNMENT
    if missing:
        return F.pad(rows, (0, missing))
    width = _ALIGNMENT * rows.element_size()
    aligned = rows.stride(1) == 1 and rows.stride(0) % _ALIGNMENT == 0 and rows.data_ptr() % width == 0
    return rows if aligned else rows.clone(memory_format=torch.contiguous_format)


def _block_diagonal(weight: Tensor, columns: int) -> Tensor:
    """Return ``(K, D, R)`` as the blocks of a ``(K D, columns)`` matrix."""
    directions, channels, rank = weight.shape
    matrix = weight.new_zeros(directions, channels, columns)
    blocks = matrix[..., : directions * rank].unflatten(-1, (directions, rank))
    blocks.diagonal(dim1=0, dim2=2).copy_(weight.permute(1, 2, 0))
    return matrix.flatten(0, 1)


def _terms(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return float32 values as terms in a dtype, the largest first."""
    terms = []
    for _ in range(_TERMS[dtype]):
        terms.append(x.to(dtype))
        x = x - terms[-1]
    return terms


def _parts(rows: int, height: int, width: int) -> int:
    """Return into how many equal parts a sum over rows is cut, so that all of a GPU works on it."""
    most = 2 * _BLOCKS_WANTED // (-(-height // _BLOCK) * -(-width // _BLOCK))
    return next(parts for parts in range(max(1, min(most, rows)), 0, -1) if rows % parts == 0)


def expand_delta(delta: Tensor, weight: Tensor | None) -> Tensor:
    """Expand low-rank step sizes to the channels.

    Args:
        delta: ``(B, L, K, R)``.
        weight: ``(K, D, R)``; None if ``delta`` has all channels already.

    Returns:
        ``(B, L, K, D)``, in float32 where there was something to expand.
    """
    if weight is None:
        return delta
    rows = _token_rows(delta)
    terms = _terms(_block_diagonal(weight.float(), rows.shape[1]), delta.dtype)
    expanded = _product(torch.cat([rows] * len(terms), 1), torch.cat(terms, 1).t())
    return expanded.view(*delta.shape[:3], weight.shape[1])


def expand_delta_backward(dexpanded: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of :func:`expand_delta`'s arguments, the second one in float32.

    The weight's is a sum over all tokens: over equal parts of them first, then over the parts, in a fixed order.

    Args:
        dexpanded: Gradient of the result, contiguous.
        delta: As in the forward.
        weight: As in the forward.
    """
    directions, channels, rank = weight.shape
    rows = _token_rows(delta)
    (count, columns), wide = rows.shape, directions * channels
    matrix, dexpanded = _block_diagonal(weight.float(), columns), dexpanded.view(count, wide)
    if rows.is_cuda:
        matrix, dexpanded = matrix.to(rows.dtype), dexpanded.to(rows.dtype)
        ddelta = dexpanded @ matrix
    else:
        ddelta = _product(dexpanded, matrix)
    ddelta = ddelta[:, : directions * rank].view(delta.shape)
    if count == 0:
        return ddelta, torch.zeros_like(weight, dtype=torch.float32)
    parts = _parts(count, wide, columns)
    products = _product(dexpanded.view(parts, -1, wide).transpose(1, 2), rows.view(parts, -1, columns))
    total = products.sum(0)[:, : directions * rank].view(directions, channels, directions, rank)
    return ddelta, total.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
