"""State space duality (SSD, Mamba-2) one step at a time: the oracle that every backend is tested against.

Glossary: B batch, L tokens, K directions, H heads of a direction, P channels of a head (``headdim``), G groups of heads
that share B and C, N states (``d_state``).

With Delta = clamp(softplus(dt + dt_bias)), a direction visits token l = order[k, t] at step t and computes
(Dao & Gu 2024, Mamba-2, equation 6 with a scalar A a head)::

    h_t = exp(Delta_l A) h_{t-1} + Delta_l x_l B_l^T        (P, N)
    y_l = h_t C_l + D x_l                                   (P,)

where h_{t-1} is 0 at the first step of each packed sequence. The directions' outputs are summed where ``merge`` is set,
then gated by silu(z).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..scan_path import scan_order

__all__ = ["path_ssd_reference"]


def path_ssd_reference(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    *,
    path: str = "h",
    grid: tuple[int, ...] | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    merge: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run SSD along a path, step by step, differentiably, in float32 (float64 for float64 inputs).

    Args:
        x: Input, ``(B, L, H, P)`` shared by the directions or ``(B, L, K, H, P)``.
        dt: Step sizes before bias and softplus, ``(B, L, K, H)``.
        A: State matrix, one negative number a head, ``(K, H)``.
        B: Input projection, ``(B, L, K, G, N)``.
        C: Output projection, ``(B, L, K, G, N)``.
        D: Skip, ``(K, H)`` or ``(K, H, P)``.
        z: Gate, ``(B, L, H, P)`` or, without ``merge``, also ``(B, L, K, H, P)``.
        dt_bias: ``(K, H)``.
        initial_states: ``(B, K, H, P, N)``; zero if absent. With ``seq_idx`` they belong to sequence 0.
        seq_idx: Sequence each token belongs to, ``(B, L)``; the state is reset where it changes along a direction.
        path: Name of the scan path.
        grid: Size of the token grid; ``(L,)`` if absent.
        dt_softplus: Apply softplus to ``dt + dt_bias``.
        dt_limit: Range that Delta is clamped to.
        merge: Sum the directions' outputs.

    Returns:
        ``y``, ``(B, L, H, P)`` with ``merge`` else ``(B, L, K, H, P)``, in the dtype of ``x``; and the last state,
        ``(B, K, H, P, N)`` in the dtype of the computation.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    batch, num_tokens = x.shape[:2]
    num_directions, heads = A.shape
    head_dim, states = x.shape[-1], B.shape[-1]
    order = scan_order(path, grid or (num_tokens,), torch.device("cpu")).tolist()

    x_k = (x if x.dim() == 5 else x.unsqueeze(2).expand(-1, -1, num_directions, -1, -1)).to(dtype)
    step = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    step = (F.softplus(step) if dt_softplus else step).clamp(*dt_limit)
    A = A.to(dtype)
    B, C = (projection.to(dtype).repeat_interleave(heads // B.shape[3], dim=3) for projection in (B, C))

    outputs, last_states = [], []
    for k in range(num_directions):
        h = x.new_zeros(batch, heads, head_dim, states, dtype=dtype)
        if initial_states is not None:
            h = initial_states[:, k].to(dtype)
        previous = torch.zeros(batch, dtype=torch.long, device=x.device)
        rows = [x.new_zeros(batch, heads, head_dim, dtype=dtype)] * num_tokens
        for token in order[k]:
            if token < 0:
                continue
            if seq_idx is not None:
                h = torch.where((seq_idx[:, token] == previous)[:, None, None, None], h, torch.zeros_like(h))
                previous = seq_idx[:, token]
            step_t, x_t = step[:, token, k, :, None, None], x_k[:, token, k]
            # h_t = exp(Delta A) h_{t-1} + Delta x B^T                  (B, H, P, N)
            h = torch.exp(step_t * A[k, :, None, None]) * h + step_t * x_t.unsqueeze(-1) * B[:, token, k].unsqueeze(-2)
            # y = h C + D x                                             (B, H, P)
            y = torch.einsum("bhpn,bhn->bhp", h, C[:, token, k])
            rows[token] = y if D is None else y + D[k].to(dtype).reshape(heads, -1) * x_t
        outputs.append(torch.stack(rows, dim=1))
        last_states.append(h)
    y = torch.stack(outputs, dim=2)  # (B, L, K, H, P)
    if merge:
        y = y.sum(dim=2)
    if z is not None:
        gate = F.silu(z.to(dtype))
        y = y * (gate.unsqueeze(2) if gate.dim() < y.dim() else gate)
    return y.to(x.dtype), torch.stack(last_states, dim=1)
