"""Operation counts of the selective scan.

The field counts the scan as ``9 B L D N + B L D`` (state-spaces/mamba, issue 110; all six vision families use it or a
smaller relative), beside multiply-accumulates of the linear and convolution layers. Exponentials, softplus,
activations, the gate and index arithmetic count nothing there. ``recurrence_flops`` counts the recurrence as written.
L is the number of steps of a direction: as many as there are tokens, unless the path visits a part of them
(sub-grids) or walks over padding (windows).
"""

from __future__ import annotations

import torch

from ..scan_path import scan_path

__all__ = ["dt_projection_macs", "recurrence_flops", "scan_flops", "steps_of"]


def _shape(x) -> tuple[int, ...]:
    return tuple(x.shape) if isinstance(x, torch.Tensor) else tuple(x)


def _sizes(u, A, num_steps: int | None) -> tuple[int, int, int]:
    """Return steps over all images, channels over all directions, states."""
    batch, num_tokens = _shape(u)[:2]
    directions, channels, states = _shape(A)
    return batch * (num_tokens if num_steps is None else num_steps), directions * channels, states


def steps_of(path: str, grid) -> int:
    """Return the steps of each direction of a path.

    Args:
        path: Name of the path.
        grid: Size of the token grid.
    """
    return scan_path(path, tuple(grid)).num_steps


def scan_flops(u, A, num_steps: int | None = None) -> int:
    """Count a scan by the field's convention, ``9 B L D N + B L D`` over the channels of all directions.

    Args:
        u: Input of the scan, or its shape.
        A: State matrix ``(K, D, N)``, or its shape.
        num_steps: Steps of each direction; as many as tokens if absent.
    """
    steps, channels, states = _sizes(u, A, num_steps)
    return 9 * steps * channels * states + steps * channels


def recurrence_flops(u, A, num_steps: int | None = None) -> int:
    """Count the operations of the recurrence as written: 6 a state (and an exponential, counted 1), 3 a channel.

    Delta A, exp, times h, Delta u times B, add, times C, add to y; and a channel's Delta u, D u and its addition.

    Args:
        u: Input of the scan, or its shape.
        A: State matrix ``(K, D, N)``, or its shape.
        num_steps: Steps of each direction; as many as tokens if absent.
    """
    steps, channels, states = _sizes(u, A, num_steps)
    return steps * channels * (7 * states + 3)


def dt_projection_macs(u, delta, A, num_steps: int | None = None) -> int:
    """Count the multiply-accumulates that expand a low-rank ``delta``; 0 when it is not low-rank.

    Args:
        u: Input of the scan, or its shape.
        delta: ``(B, L, K, R)`` or ``(B, L, K, D)``, or its shape.
        A: State matrix ``(K, D, N)``, or its shape.
        num_steps: Steps of each direction; as many as tokens if absent.
    """
    rank = _shape(delta)[-1]
    steps, channels, _ = _sizes(u, A, num_steps)
    return steps * channels * rank if rank != _shape(A)[1] else 0
