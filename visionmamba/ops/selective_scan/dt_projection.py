"""The step sizes' low-rank projection and its gradients on GPUs.

With 16-bit activations the products run on tensor cores and sum in float32. The step sizes come out as accurate as in
float32: the weight is a sum of 16-bit terms, side by side in one longer product. The gradients are rounded to 16 bits
before their products, as those of every other projection are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._block_products import block_diagonal, diagonal_blocks, product, weight_gradient

__all__ = ["expand_delta", "expand_delta_backward"]

_TERMS = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}  # that hold the 24 bits of a float32
_ALIGNMENT = 8  # columns: 16 bytes of 16-bit values, which tensor cores are fed by


def _token_rows(delta: Tensor, copies: int = 1) -> Tensor:
    """Return ``(B, L, K, R)``, so many times side by side, as aligned rows ``(B L, columns)`` that zeros fill up."""
    batch, tokens, directions, rank = delta.shape
    repeated = delta.unsqueeze(2).expand(-1, -1, copies, -1, -1)
    rows = repeated.reshape(batch * tokens, copies * directions * rank)
    missing = -rows.shape[1] % _ALIGNMENT
    if missing:
        return F.pad(rows, (0, missing))
    width = _ALIGNMENT * rows.element_size()
    aligned = rows.stride(1) == 1 and rows.stride(0) % _ALIGNMENT == 0 and rows.data_ptr() % width == 0
    return rows if aligned else rows.clone(memory_format=torch.contiguous_format)


def _terms(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return float32 values as terms in a dtype, the largest first."""
    terms = []
    for _ in range(_TERMS[dtype]):
        terms.append(x.to(dtype))
        x = x - terms[-1]
    return terms


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
    terms = torch.cat(_terms(block_diagonal(weight.float()), delta.dtype), 1)
    rows = _token_rows(delta, _TERMS[delta.dtype])
    expanded = product(rows, F.pad(terms, (0, rows.shape[1] - terms.shape[1])).t())
    return expanded.view(*delta.shape[:3], weight.shape[1])


def expand_delta_backward(dexpanded: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of :func:`expand_delta`'s arguments, the second one in float32.

    Args:
        dexpanded: Gradient of the result, contiguous.
        delta: As in the forward.
        weight: As in the forward.
    """
    directions, channels, rank = weight.shape
    rows = _token_rows(delta)
    matrix = block_diagonal(weight.float(), rows.shape[1])
    dexpanded = dexpanded.view(rows.shape[0], directions * channels)
    if rows.is_cuda:
        matrix, dexpanded = matrix.to(rows.dtype), dexpanded.to(rows.dtype)
        ddelta = dexpanded @ matrix
    else:
        ddelta = product(dexpanded, matrix)
    ddelta = ddelta[:, : directions * rank].view(delta.shape)
    return ddelta, diagonal_blocks(weight_gradient(dexpanded, rows), directions, channels, rank)
