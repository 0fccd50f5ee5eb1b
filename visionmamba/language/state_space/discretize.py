"""From a continuous state space model h' = A h + B u to steps h_t = A_bar h_{t-1} + B_bar u_t."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["discretize"]

_METHODS = ("zoh", "bilinear", "euler", "backward_euler")


def discretize(A: Tensor, B: Tensor, dt: float | Tensor, method: str = "zoh") -> tuple[Tensor, Tensor]:
    """Discretise a state space model, dense or diagonal.

    ``zoh`` (zero-order hold) is exact for inputs that are constant within a step; ``bilinear`` (Tustin) averages the
    derivative of both ends; ``euler`` takes that of the beginning, ``backward_euler`` that of the end.

    Args:
        A: ``(..., N, N)``; or its diagonal ``(..., N)``, where it has as many dimensions as ``B``.
        B: ``(..., N)``.
        dt: Step size, a number or ``(...)``.
        method: ``"zoh"``, ``"bilinear"``, ``"euler"`` or ``"backward_euler"``.

    Returns:
        ``A_bar`` and ``B_bar`` in the layouts of ``A`` and ``B``.

    Raises:
        ValueError: The method is unknown.

    Source:
        Gu et al. 2021, "S4", equation 3 (bilinear); Gu et al. 2022, "S4D", section 3.1.
    """
    if method not in _METHODS:
        raise ValueError(f"method: expected one of {', '.join(_METHODS)}, got {method!r}")
    dt = torch.as_tensor(dt, dtype=A.real.dtype, device=A.device).unsqueeze(-1)
    if A.dim() == B.dim():
        return _diagonal(A, B, dt, method)
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    step = dt.unsqueeze(-1) * A
    if method == "euler":
        return identity + step, dt * B
    if method == "zoh":
        # exp of [[A, B], [0, 0]] dt holds both results, also where A is singular
        size = A.shape[-1]
        block = torch.zeros(*step.shape[:-2], size + 1, size + 1, dtype=A.dtype, device=A.device)
        block[..., :size, :size], block[..., :size, size] = step, dt * B
        exponential = torch.linalg.matrix_exp(block)
        return exponential[..., :size, :size], exponential[..., :size, size]
    implicit = identity - (step / 2 if method == "bilinear" else step)
    explicit = identity + step / 2 if method == "bilinear" else identity.expand_as(step)
    solved = torch.linalg.solve(implicit, torch.cat([explicit, (dt * B).unsqueeze(-1)], dim=-1))
    return solved[..., :-1], solved[..., -1]


def _diagonal(A: Tensor, B: Tensor, dt: Tensor, method: str) -> tuple[Tensor, Tensor]:
    step = dt * A
    if method == "euler":
        return 1 + step, dt * B
    if method == "zoh":
        # (exp(a) - 1) / a, and its limit 1 at 0
        small = step.abs() < 1e-6
        safe = torch.where(small, torch.ones_like(step), step)
        return torch.exp(step), torch.where(small, 1 + step / 2, (torch.exp(safe) - 1) / safe) * dt * B
    if method == "bilinear":
        return (1 + step / 2) / (1 - step / 2), dt * B / (1 - step / 2)
    return 1 / (1 - step), dt * B / (1 - step)
