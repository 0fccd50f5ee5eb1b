"""Operation counts of the selective scan.

The field counts the scan as ``9 B L D N + B L D`` (state-spaces/mamba, issue 110; all six vision families use it or a
smaller relative), beside multiply-accumulates of the linear and convolution layers. Exponentials, softplus,
activations, the gate and index arithmetic count nothing there. ``recurrence_flops`` counts the recurrence as written.
"""

from __future__ import annotations

from math import prod

import torch

__all__ = ["dt_projection_macs", "recurrence_flops", "scan_flops"]


def _shape(x) -> tuple[int, ...]:
    return tuple(x.shape) if isinstance(x, torch.Tensor) else tuple(x)


def _sizes(u, A) -> tuple[int, int, int, int]:
    """Return batch, tokens, channels over all directions, states."""
    batch, num_tokens = _shape(u)[:2]
    directions, channels, states = _shape(A)
    return batch, num_tokens, directions * channels, states


def scan_flops(u, A) -> int:
    """Count a scan by the field's convention, ``9 B L D N + B L D`` over the channels of all directions.

    Args:
        u: Input of the scan, or its shape.
        A: State matrix ``(K, D, N)``, or its shape.
    """
    batch, num_tokens, channels, states = _sizes(u, A)
    return 9 * batch * num_tokens * channels * states + batch * num_tokens * channels


def recurrence_flops(u, A) -> int:
    """Count the operations of the recurrence as written: 6 a state (and an exponential, counted 1), 3 a channel.

    Delta A, exp, times h, Delta u times B, add, times C, add to y; and a channel's Delta u, D u and its addition.

    Args:
        u: Input of the scan, or its shape.
        A: State matrix ``(K, D, N)``, or its shape.
    """
    batch, num_tokens, channels, states = _sizes(u, A)
    return batch * num_tokens * channels * (7 * states + 3)


def dt_projection_macs(u, delta, A) -> int:
    """Count the multiply-accumulates that expand a low-rank ``delta``; 0 when it is not low-rank.

    Args:
        u: Input of the scan, or its shape.
        delta: ``(B, L, K, R)`` or ``(B, L, K, D)``, or its shape.
        A: State matrix ``(K, D, N)``, or its shape.
    """
    rank, channels = _shape(delta)[-1], _shape(A)[1]
    return prod(_shape(u)[:2]) * _shape(A)[0] * channels * rank if rank != channels else 0
