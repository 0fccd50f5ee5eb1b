"""The causal depthwise convolution along a path, one step at a time: the oracle.

A direction that visits token l = order[k, t] at step t computes, with W taps::

    out_l = act(bias + sum_j weight[W - 1 - j] x_{order[k, t - j]})        j = 0 .. W - 1

Taps before the first step read ``initial_states`` (oldest first) or zero; taps in another sequence (``seq_idx``)
read 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..scan_path import scan_order

__all__ = ["causal_conv1d_reference"]


def causal_conv1d_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    *,
    path: str = "h",
    grid: tuple[int, ...] | None = None,
    silu: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convolve tokens along a path, step by step, differentiably, in float32 (float64 for float64 inputs).

    Args and returns are those of :func:`visionmamba.ops.causal_conv1d`.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    batch, num_tokens, channels = x.shape[0], x.shape[1], x.shape[-1]
    directions, _, width = weight.shape
    order = scan_order(path, grid or (num_tokens,), torch.device("cpu")).tolist()
    x_k = (x if x.dim() == 4 else x.unsqueeze(2).expand(-1, -1, directions, -1)).to(dtype)
    weight = weight.to(dtype)
    zero = torch.zeros(batch, channels, dtype=dtype, device=x.device)
    outputs, final_states = [], []
    for k in range(directions):
        tokens = [token for token in order[k] if token >= 0]
        past = [zero] * (width - 1) if initial_states is None else list(initial_states[:, k].to(dtype).unbind(-1))
        window = past + [x_k[:, token, k] for token in tokens]
        rows = [zero] * num_tokens
        for t, token in enumerate(tokens):
            total = zero if bias is None else zero + bias[k].to(dtype)
            for j in range(width):
                tap = window[t + width - 1 - j]
                if seq_idx is not None and t - j >= 0:
                    same = seq_idx[:, tokens[t - j]] == seq_idx[:, token]
                    tap = torch.where(same.unsqueeze(-1), tap, 0.0)
                elif seq_idx is not None:
                    first = tokens[0]
                    tap = torch.where((seq_idx[:, first] == seq_idx[:, token]).unsqueeze(-1), tap, 0.0)
                total = total + weight[k, :, width - 1 - j] * tap
            rows[token] = F.silu(total) if silu else total
        outputs.append(torch.stack(rows, dim=1))
        final_states.append(torch.stack(window[len(window) - (width - 1) :], dim=-1))
    return torch.stack(outputs, dim=2).to(x.dtype), torch.stack(final_states, dim=1).to(x.dtype)
