"""The selective scan one step at a time: the oracle that every backend is tested against.

Glossary: B batch, L tokens, K directions, P steps of a direction, D channels (``d_inner``), N states (``d_state``),
R rank of the low-rank ``delta`` (``dt_rank``).

With Delta = softplus(delta + delta_bias), a direction visits token l = order[k, t] at step t and computes
(Gu & Dao 2023, Mamba, eq. 2 and algorithm 2; zero-order hold for A, Euler for B, as the published kernels do)::

    h_t = exp(Delta_l A) * h_{t-1} + Delta_l B_l u_l        (D, N)
    y_l = C_l . h_t + D u_l                                 (D,)

The directions' outputs are summed where ``merge`` is set, then gated by silu(z).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..scan_path import scan_order

__all__ = ["path_scan_reference"]


def path_scan_reference(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    dt_weight: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    *,
    path: str = "h",
    grid: tuple[int, ...] | None = None,
    delta_softplus: bool = True,
    merge: bool = True,
    projections_in_step_order: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scan tokens along a path, step by step, differentiably, in float32 (float64 for float64 inputs).

    Args:
        u: Input, ``(B, L, D)`` shared by the directions or ``(B, L, K, D)``.
        delta: Step sizes before bias and softplus, ``(B, L, K, D)``, or ``(B, L, K, R)`` with ``dt_weight``.
        A: State matrix diagonal, ``(K, D, N)``.
        B: Input projection, ``(B, L, K, N)``.
        C: Output projection, ``(B, L, K, N)``.
        D: Skip, ``(K, D)``.
        z: Gate, ``(B, L, D)`` or, without ``merge``, also ``(B, L, K, D)``.
        delta_bias: ``(K, D)``.
        dt_weight: Expansion of the low-rank ``delta``, ``(K, D, R)``.
        initial_state: ``(B, K, D, N)``; zero if absent.
        path: Name of the scan path.
        grid: Size of the token grid; ``(L,)`` if absent.
        delta_softplus: Apply softplus to ``delta + delta_bias``.
        merge: Sum the directions' outputs.
        projections_in_step_order: Step t reads row t of ``delta``, ``B`` and ``C`` instead of row ``order[k, t]``
            (PlainMamba's published behaviour).

    Returns:
        ``y``, ``(B, L, D)`` with ``merge`` else ``(B, L, K, D)``, in the dtype of ``u``; and the last state,
        ``(B, K, D, N)`` in the dtype of the computation.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    batch, num_tokens = u.shape[:2]
    num_directions, channels, states = A.shape
    order = scan_order(path, grid or (num_tokens,), torch.device("cpu")).tolist()

    u_k = (u if u.dim() == 4 else u.unsqueeze(2).expand(-1, -1, num_directions, -1)).to(dtype)
    step = delta.to(dtype)
    if dt_weight is not None:
        step = torch.einsum("blkr,kdr->blkd", step, dt_weight.to(dtype))
    if delta_bias is not None:
        step = step + delta_bias.to(dtype)
    if delta_softplus:
        step = F.softplus(step)
    B, C, A = B.to(dtype), C.to(dtype), A.to(dtype)

    outputs, last_states = [], []
    for k in range(num_directions):
        h = (
            u.new_zeros((batch, channels, states), dtype=dtype)
            if initial_state is None
            else initial_state[:, k].to(dtype)
        )
        rows = [u.new_zeros((batch, channels), dtype=dtype)] * num_tokens
        for t, token in enumerate(order[k]):
            if token < 0:
                continue
            row = t if projections_in_step_order else token
            step_t, u_t = step[:, row, k, :, None], u_k[:, token, k]
            # h_t = exp(Delta A) h_{t-1} + Delta B u                    (B, D, N)
            h = torch.exp(step_t * A[k]) * h + step_t * B[:, row, k, None, :] * u_t.unsqueeze(-1)
            # y = C . h + D u                                           (B, D)
            y = torch.einsum("bdn,bn->bd", h, C[:, row, k])
            rows[token] = y if D is None else y + D[k].to(dtype) * u_t
        outputs.append(torch.stack(rows, dim=1))
        last_states.append(h)
    y = torch.stack(outputs, dim=2)  # (B, L, K, D)
    if merge:
        y = y.sum(dim=2)
    if z is not None:
        gate = F.silu(z.to(dtype))
        y = y * (gate.unsqueeze(2) if gate.dim() < y.dim() else gate)
    return y.to(u.dtype), torch.stack(last_states, dim=1)
