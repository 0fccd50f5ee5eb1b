"""The causal depthwise convolution along a path in plain PyTorch: W shifted multiply-adds in path order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..backend import Implementation, register_implementation
from ..scan_path import scan_order

__all__ = ["backward", "forward"]


@dataclass
class _Walk:
    """Tokens gathered into path order, after the W - 1 values that precede them."""

    token: torch.Tensor  # (K, P), 0 where there is none
    valid: torch.Tensor  # (K, P, 1)
    window: torch.Tensor  # (B, K, W - 1 + P, D)
    sequence: torch.Tensor | None  # (B, K, W - 1 + P, 1) index of the sequence a tap belongs to

    def tap(self, j: int) -> torch.Tensor:
        """The values j steps before each step, (B, K, P, D)."""
        steps = self.token.shape[1]
        start = self.window.shape[2] - steps - j
        values = self.window[:, :, start : start + steps]
        return values if self.sequence is None else values * self.same(j)

    def same(self, j: int) -> torch.Tensor:
        """Whether the tap j steps before each step belongs to the step's own sequence, (B, K, P, 1)."""
        steps = self.token.shape[1]
        start = self.window.shape[2] - steps
        return self.sequence[:, :, start - j : start - j + steps] == self.sequence[:, :, start:]


def _walk(x, weight, seq_idx, initial_states, path, grid) -> _Walk:
    dtype = torch.promote_types(x.dtype, torch.float32)
    order = scan_order(path, tuple(grid), x.device).long()
    token, valid = order.clamp(min=0), (order >= 0).unsqueeze(-1)
    if x.dim() == 3:
        steps = x[:, token]
    else:
        steps = x[:, token, torch.arange(x.shape[2], device=x.device).unsqueeze(1)]
    steps = steps.to(dtype) * valid
    past = weight.shape[2] - 1
    if initial_states is None:
        window = F.pad(steps, (0, 0, past, 0))
    else:
        window = torch.cat([initial_states.to(dtype).transpose(-1, -2), steps], dim=2)
    sequence = None
    if seq_idx is not None:
        sequence = seq_idx[:, token].unsqueeze(-1)
        sequence = torch.cat([sequence[:, :, :1].expand(-1, -1, past, -1), sequence], dim=2)
    return _Walk(token, valid, window, sequence)


def _preactivation(walk: _Walk, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    width = weight.shape[2]
    weight = weight.to(walk.window.dtype)
    total = walk.tap(0) * weight[:, :, width - 1].unsqueeze(1)
    for j in range(1, width):
        total = torch.addcmul(total, walk.tap(j), weight[:, :, width - 1 - j].unsqueeze(1))
    return total if bias is None else total + bias.to(total.dtype).unsqueeze(1)


def _scatter(values: torch.Tensor, walk: _Walk, num_tokens: int) -> torch.Tensor:
    """Place (B, K, P, D) in path order at the tokens of (B, L, K, D); tokens that are not visited get 0."""
    batch, directions, _, channels = values.shape
    out = values.new_zeros(batch, num_tokens, directions, channels)
    values = values * walk.valid
    for k in range(directions):
        out[:, :, k].index_add_(1, walk.token[k], values[:, k])
    return out


def forward(x, weight, bias, seq_idx, initial_states, path, grid, silu):
    """Compute the op ``visionmamba::causal_conv1d``; see :func:`visionmamba.ops.causal_conv1d`."""
    walk = _walk(x, weight, seq_idx, initial_states, path, grid)
    total = _preactivation(walk, weight, bias)
    out = _scatter(F.silu(total) if silu else total, walk, x.shape[1])
    return out.to(x.dtype), _final_states(walk, weight.shape[2] - 1).to(x.dtype)


def _final_index(walk: _Walk, past: int) -> torch.Tensor:
    """Positions in the window of the last ``past`` values of each direction, (K, past)."""
    counts = walk.valid.sum((1, 2))
    return counts.unsqueeze(1) + torch.arange(past, device=counts.device)


def _final_states(walk: _Walk, past: int) -> torch.Tensor:
    index = _final_index(walk, past)
    directions = torch.arange(index.shape[0], device=index.device).unsqueeze(1)
    return walk.window[:, directions, index].transpose(-1, -2).contiguous()  # (B, K, D, W - 1)


def backward(dout, dfinal, x, weight, bias, seq_idx, initial_states, path, grid, silu):
    """Compute the gradients of x, weight, bias and initial_states; None for absent ones."""
    walk = _walk(x, weight, seq_idx, initial_states, path, grid)
    dtype, width, steps = walk.window.dtype, weight.shape[2], walk.token.shape[1]
    directions = torch.arange(walk.token.shape[0], device=x.device).unsqueeze(1)
    dtotal = dout[:, walk.token, directions].to(dtype) * walk.valid
    if silu:
        total = _preactivation(walk, weight, bias)
        sigmoid = torch.sigmoid(total)
        dtotal = dtotal * sigmoid * (1 + total * (1 - sigmoid))
    dwindow = torch.zeros_like(walk.window)
    dweight = torch.empty(weight.shape, dtype=dtype, device=x.device)
    for j in range(width):
        tap_weight = weight[:, :, width - 1 - j].to(dtype).unsqueeze(1)
        contribution = dtotal * tap_weight
        if walk.sequence is not None:
            contribution = contribution * walk.same(j)
        start = width - 1 - j
        dwindow[:, :, start : start + steps] += contribution
        dweight[:, :, width - 1 - j] = (dtotal * walk.tap(j)).sum((0, 2))
    if dfinal is not None:
        index = _final_index(walk, width - 1)
        for k in range(index.shape[0]):
            dwindow[:, k].index_add_(1, index[k], dfinal[:, k].to(dtype).transpose(-1, -2))
    dx = _scatter(dwindow[:, :, width - 1 :], walk, x.shape[1])
    dinitial = None if initial_states is None else dwindow[:, :, : width - 1].transpose(-1, -2)
    return (dx.sum(2) if x.dim() == 3 else dx), dweight, None if bias is None else dtotal.sum((0, 2)), dinitial


register_implementation(Implementation("causal_conv1d", "torch", (), forward, backward))
