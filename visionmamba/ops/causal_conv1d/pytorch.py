"""The causal depthwise convolution along a path in plain PyTorch: W shifted multiply-adds in path order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .._scratch import scratch
from ..backend import Implementation, register_implementation
from ..scan_path import direction_rows, gather_steps, scan_rows, steps_to_tokens, visited_steps

__all__ = ["backward", "forward"]


@dataclass
class _Walk:
    """Tokens gathered into path order, after the W - 1 values that precede them."""

    token: torch.Tensor  # (K, P), 0 where there is none
    visited: torch.Tensor | None  # (K, P, 1), 0 where there is no token; None if there is one everywhere
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
    token, visited = scan_rows(path, grid, x.device), visited_steps(path, grid, x.device, dtype)
    past = weight.shape[2] - 1
    before = token[:, :1].expand(-1, past)  # any tokens: they are overwritten
    window = gather_steps(x, direction_rows(x, torch.cat([before, token], dim=1)), dtype, "window")
    window[:, :, :past] = 0 if initial_states is None else initial_states.transpose(-1, -2)
    if visited is not None:
        window[:, :, past:].mul_(visited)
    sequence = None
    if seq_idx is not None:
        sequence = seq_idx[:, token].unsqueeze(-1)
        sequence = torch.cat([sequence[:, :, :1].expand(-1, -1, past, -1), sequence], dim=2)
    return _Walk(token, visited, window, sequence)


def _preactivation(walk: _Walk, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    width = weight.shape[2]
    taps = weight.to(walk.window.dtype).permute(2, 0, 1).unsqueeze(2).contiguous()  # (W, K, 1, D)
    current = walk.tap(0)
    total = scratch("total", current.shape, weight.device, taps.dtype)
    if bias is None:
        torch.mul(current, taps[-1], out=total)
    else:
        torch.addcmul(bias.to(taps.dtype).unsqueeze(1), current, taps[-1], out=total)
    for j in range(1, width):
        total.addcmul_(walk.tap(j), taps[width - 1 - j])
    return total


def forward(x, weight, bias, seq_idx, initial_states, path, grid, silu):
    """Compute the op ``visionmamba::causal_conv1d``; see :func:`visionmamba.ops.causal_conv1d`."""
    walk = _walk(x, weight, seq_idx, initial_states, path, grid)
    total = _preactivation(walk, weight, bias)
    out = steps_to_tokens(F.silu(total, inplace=True) if silu else total, path, grid)
    return out.to(x.dtype), _final_states(walk, weight.shape[2] - 1).to(x.dtype)


def _final_index(walk: _Walk, past: int) -> torch.Tensor:
    """Positions in the window of the last ``past`` values of each direction, (K, past)."""
    counts = walk.token.new_full((len(walk.token), 1), walk.token.shape[1])
    if walk.visited is not None:
        counts = walk.visited.sum(1).long()
    return counts + torch.arange(past, device=counts.device)


def _final_states(walk: _Walk, past: int) -> torch.Tensor:
    if walk.visited is None:
        last = walk.window[:, :, walk.window.shape[2] - past :].transpose(-1, -2)
        return last.clone(memory_format=torch.contiguous_format)  # never a view of scratch memory
    index = _final_index(walk, past)
    directions = torch.arange(index.shape[0], device=index.device).unsqueeze(1)
    return walk.window[:, directions, index].transpose(-1, -2).contiguous()  # (B, K, D, W - 1)


def backward(dout, dfinal, x, weight, bias, seq_idx, initial_states, path, grid, silu):
    """Compute the gradients of x, weight, bias and initial_states; None for absent ones."""
    walk = _walk(x, weight, seq_idx, initial_states, path, grid)
    dtype, width, steps = walk.window.dtype, weight.shape[2], walk.token.shape[1]
    dtotal = gather_steps(dout, direction_rows(dout, walk.token), dtype)
    if walk.visited is not None:
        dtotal.mul_(walk.visited)
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
    dx = steps_to_tokens(dwindow[:, :, width - 1 :], path, grid)
    dinitial = None if initial_states is None else dwindow[:, :, : width - 1].transpose(-1, -2)
    return (dx.sum(2) if x.dim() == 3 else dx), dweight, None if bias is None else dtotal.sum((0, 2)), dinitial


register_implementation(Implementation("causal_conv1d", "torch", (), forward, backward))
