"""The package's operators as standard PyTorch operators, for runtimes that do not have this package.

Each function computes what the dispatcher op of its name computes, from gathers, elementwise operations and one
``scan`` (a loop whose body runs once a step). Exporters know ``scan``: it becomes ONNX's ``Scan`` and a C++ loop in an
AOTInductor package. The scan path is a constant table in the graph, so a graph holds for one image size.

Glossary: B batch, L tokens, K directions, T steps, D channels, N states, R rank of the step sizes, W taps,
H heads of P channels, G groups of heads.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan

from ..ops.scan_moves import NUM_MOVES, move_codes
from ..ops.scan_path import ScanPath, scan_path

__all__ = ["standard_ops"]


def _steps(x: Tensor, rows: np.ndarray) -> Tensor:
    """Gather ``(B, L, C)`` or ``(B, L, K, C)`` into steps, ``(T, B, K, C)``; rows (K, T), -1 reads any token."""
    directions, steps = rows.shape
    index = np.maximum(rows, 0).astype(np.int64)
    if x.dim() == 4:
        index = index * directions + np.arange(directions)[:, None]
        x = x.flatten(1, 2)
    gathered = x.index_select(1, torch.from_numpy(index.T.flatten()))
    return gathered.unflatten(1, (steps, directions)).transpose(0, 1)


def _tokens(y: Tensor, table: ScanPath) -> Tensor:
    """Bring steps ``(T, B, K, C)`` to the tokens that they visit, ``(B, L, K, C)``; 0 where a direction visits none."""
    directions, inverse = table.num_directions, table.inverse
    index = np.maximum(inverse, 0).astype(np.int64) * directions + np.arange(directions)[:, None]
    tokens = y.transpose(0, 1).flatten(1, 2).index_select(1, torch.from_numpy(index.T.flatten()))
    tokens = tokens.unflatten(1, (table.num_tokens, directions))
    return tokens if (inverse >= 0).all() else tokens * _mask(inverse, y.dtype)


def _mask(table: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Return 1 where a ``(K, T)`` table has an entry, as ``(T, K, 1)``."""
    return torch.from_numpy(np.ascontiguousarray(table.T >= 0)).to(dtype).unsqueeze(-1)


def _table(path: str, grid: list[int]) -> ScanPath:
    table = scan_path(path, tuple(int(size) for size in grid))
    visits = (table.order >= 0).sum()
    if visits != (table.inverse >= 0).sum():
        raise ValueError(f"path: {path!r} visits a token more than once, which cannot be exported")
    return table


def _selective_scan(
    u, delta, A, B, C, D, z, delta_bias, dt_weight, initial_state, path, grid, delta_softplus, merge,
    projections_in_step_order,
):  # fmt: skip
    table = _table(path, grid)
    order = table.order
    rows = np.broadcast_to(np.arange(order.shape[1]), order.shape) if projections_in_step_order else order
    dtype = torch.promote_types(u.dtype, torch.float32)
    step = _steps(delta, rows).to(dtype)  # (T, B, K, R)
    if dt_weight is not None:
        step = torch.einsum("tbkr,kdr->tbkd", step, dt_weight.to(dtype))
    if delta_bias is not None:
        step = step + delta_bias.to(dtype)
    step = F.softplus(step) if delta_softplus else step
    if (order < 0).any():  # no token: the state stays
        step = step * _mask(order, dtype).unsqueeze(1)
    u_t, B_t, C_t = _steps(u, order).to(dtype), _steps(B, rows).to(dtype), _steps(C, rows).to(dtype)
    A = A.to(dtype)

    def advance(h, xs):
        step, drive, B, C = xs
        # h_t = exp(Delta A) h_{t-1} + Delta u B, y_t = C h_t                  (B, K, D, N), (B, K, D)
        h = torch.exp(step.unsqueeze(-1) * A) * h + drive.unsqueeze(-1) * B.unsqueeze(-2)
        return h, (h * C.unsqueeze(-2)).sum(-1)

    h = u.new_zeros((u.shape[0], *A.shape), dtype=dtype) if initial_state is None else initial_state.to(dtype)
    h, y = scan(advance, h.contiguous(), tuple(x.contiguous() for x in (step, step * u_t, B_t, C_t)))
    y = _tokens(y if D is None else y + D.to(dtype) * u_t, table)
    y = y.sum(2) if merge else y
    if z is not None:
        y = y * F.silu((z if z.dim() == y.dim() else z.unsqueeze(2)).to(dtype))
    return y.to(u.dtype), h


def _causal_conv1d(x, weight, bias, seq_idx, initial_states, path, grid, silu):
    if seq_idx is not None:
        raise ValueError("seq_idx: packed sequences cannot be exported")
    table = _table(path, grid)
    dtype = torch.promote_types(x.dtype, torch.float32)
    steps, width = table.num_steps, weight.shape[2]
    x_t = _steps(x, table.order).to(dtype)  # (T, B, K, D)
    if initial_states is None:
        past = x_t.new_zeros((width - 1, *x_t.shape[1:]))
    else:
        past = initial_states.to(dtype).movedim(-1, 0)
    padded = torch.cat([past, x_t])
    out = sum(padded[tap : tap + steps] * weight[:, :, tap].to(dtype) for tap in range(width))
    out = out if bias is None else out + bias.to(dtype)
    final = [
        padded[count : count + width - 1, :, k].permute(1, 2, 0)
        for k, count in enumerate((table.order >= 0).sum(1).tolist())
    ]
    out = _tokens(F.silu(out) if silu else out, table)
    return out.to(x.dtype), torch.stack(final, dim=1).to(x.dtype)


def _ssd(
    x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, path, grid, dt_softplus, dt_min, dt_max, merge, chunk_size
):
    """Return Mamba-2's scan as Mamba's: heads H of P channels share a step size, groups G of heads share B and C."""
    heads, head_dim, directions = x.shape[-2], x.shape[-1], A.shape[0]
    if seq_idx is not None:
        raise ValueError("seq_idx: packed sequences cannot be exported")
    table = _table(path, grid)
    dtype = torch.promote_types(x.dtype, torch.float32)
    step = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    step = (F.softplus(step) if dt_softplus else step).clamp(dt_min, dt_max)
    step = _steps(step, table.order)  # (T, B, K, H)
    if (table.order < 0).any():
        step = step * _mask(table.order, dtype).unsqueeze(1)
    x_t = _steps(x.flatten(-2), table.order).to(dtype).unflatten(-1, (heads, head_dim))
    B_t, C_t = (_steps(y.flatten(-2), table.order).to(dtype).unflatten(-1, y.shape[-2:]) for y in (B, C))
    decay = torch.exp(step * A.to(dtype))
    drive = step.unsqueeze(-1) * x_t
    # Heads by group, (G, H / G), outside the loop: a number that its body takes from outside would become an input.
    groups = (B.shape[-2], -1)

    def advance(h, xs):
        decay, drive, B, C = xs
        B, C = B[..., None, None, :], C[..., None, None, :]
        # h_t = exp(Delta A) h_{t-1} + Delta x B^T, y_t = h_t C             (B, K, G, H/G, P, N), (B, K, G, H/G, P)
        h = decay[..., None, None] * h + drive.unsqueeze(-1) * B
        return h, (h * C).sum(-1)

    h = x.new_zeros((x.shape[0], directions, heads, head_dim, B.shape[-1]), dtype=dtype)
    h = h if initial_states is None else initial_states.to(dtype)
    xs = (decay.unflatten(3, groups), drive.unflatten(3, groups), B_t, C_t)
    h, y = scan(advance, h.unflatten(2, groups).contiguous(), tuple(t.contiguous() for t in xs))
    h, y = h.flatten(2, 3), y.flatten(3, 4)
    if D is not None:
        y = y + D.to(dtype).reshape(directions, heads, -1) * x_t
    y = _tokens(y.flatten(-2), table).unflatten(-1, (heads, head_dim))
    y = y.sum(2) if merge else y
    if z is not None:
        y = y * F.silu((z if z.dim() == y.dim() else z.unsqueeze(2)).to(dtype))
    return y.to(x.dtype), h


def _scan_moves(like, path, grid, in_step_order):
    codes = move_codes(path, tuple(int(size) for size in grid), in_step_order)
    return torch.from_numpy(np.eye(NUM_MOVES, dtype=np.float32)[codes]).to(like.dtype)


def standard_ops() -> dict[torch._ops.OpOverload, object]:
    """Return a decomposition of each operator that vision models use, for ``ExportedProgram.run_decompositions``."""
    ops = torch.ops.visionmamba
    return {
        ops.selective_scan.default: _selective_scan,
        ops.causal_conv1d.default: _causal_conv1d,
        ops.scan_moves.default: _scan_moves,
        ops.ssd.default: _ssd,
    }
