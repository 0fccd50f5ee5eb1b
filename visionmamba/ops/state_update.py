"""One decoding step of a selective SSM: the op ``visionmamba::selective_state_update`` and mamba_ssm's function."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _cuda_update, _triton, cuda_runtime
from ._checks import check_dtype, check_same_device, check_shape
from .backend import Implementation, register_implementation, select

__all__ = ["selective_state_update", "selective_state_update_ref"]


def forward(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices):
    """Compute the op ``visionmamba::selective_state_update`` with heads: ``state`` is (B, H, P, N)."""
    dtype = torch.promote_types(state.dtype, torch.float32)
    heads, groups = state.shape[1], B.shape[1]
    rows = slice(None)
    if state_batch_indices is not None:
        rows = state_batch_indices.long().clamp(min=0)
    step = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    if dt_softplus:
        step = F.softplus(step)
    B, C = (y.to(dtype).repeat_interleave(heads // groups, dim=1).unsqueeze(2) for y in (B, C))  # (B, H, 1, N)
    wide = x.to(dtype)
    before = state[rows].to(dtype)
    # h <- exp(Delta A) h + Delta x B^T;  y = h C + D x
    after = torch.exp(step.unsqueeze(-1) * A.to(dtype)) * before + (step * wide).unsqueeze(-1) * B
    after = after.to(state.dtype)
    out = (after.to(dtype) * C).sum(-1)
    if D is not None:
        out = out + D.to(dtype) * wide
    if z is not None:
        out = out * F.silu(z.to(dtype))
    if state_batch_indices is None:
        state.copy_(after)
    else:
        valid = state_batch_indices >= 0
        state[rows[valid]] = after[valid]
        out = out * valid[:, None, None]
    return out.to(x.dtype)


def triton_forward(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices):
    """Launch ``kernels/triton/state_update.py``."""
    from visionmamba.kernels.triton.state_update import state_update

    batch, (heads, head_dim, states), groups = x.shape[0], state.shape[1:], B.shape[1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_n = _triton.power_of_two(states)
    block_p = min(_triton.power_of_two(head_dim), max(1, 2048 // block_n), 64)

    def or_any(tensor: Tensor | None) -> Tensor:  # a pointer that is never read
        return x if tensor is None else tensor

    def strides(tensor: Tensor | None, count: int) -> tuple[int, ...]:
        return (0,) * count if tensor is None else tensor.stride()

    state_update[-(-head_dim // block_p), batch, heads](
        state, x, dt, A, B, C, or_any(D), or_any(z), or_any(dt_bias), or_any(state_batch_indices), out,
        heads, heads // groups, head_dim, states,
        *state.stride(), *x.stride(), *dt.stride(), *A.stride(), *B.stride(), *C.stride(), *strides(D, 2),
        *strides(z, 3), *strides(dt_bias, 2), BLOCK_P=block_p, BLOCK_N=block_n, SKIP=D is not None, GATE=z is not None,
        BIAS=dt_bias is not None, SLOTS=state_batch_indices is not None, SOFTPLUS=dt_softplus, num_warps=4,
    )  # fmt: skip
    return out


def _triton_supports(state, x, *_arguments) -> str | None:
    if torch.float64 in (state.dtype, x.dtype):
        return "float64"
    return "no channels" if x.numel() == 0 else None


register_implementation(Implementation("selective_state_update", "torch", (), forward))
register_implementation(
    Implementation(
        "selective_state_update",
        "cuda",
        ("cuda",),
        _cuda_update.state_update,
        None,
        cuda_runtime.usable,
        _cuda_update.state_update_supports,
        (cuda_runtime.KernelError,),
    )
)
register_implementation(
    Implementation(
        "selective_state_update",
        "triton",
        _triton.device_types(),
        triton_forward,
        None,
        _triton.probe,
        _triton_supports,
    )
)


def _check(state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices):
    slots, heads, head_dim, states = state.shape
    batch = x.shape[0]
    for name, tensor in (("x", x), ("dt", dt), ("z", z)):
        if tensor is not None:
            check_dtype(name, tensor)
            check_shape(name, tensor, (batch, heads, head_dim))
    check_shape("A", A, (heads, head_dim, states))
    groups = B.shape[1]
    for name, tensor in (("B", B), ("C", C)):
        check_shape(name, tensor, (batch, groups, states))
    if groups < 1 or heads % groups:
        raise ValueError(f"B: expected a number of groups that divides the {heads} heads, got {groups}")
    for name, tensor in (("D", D), ("dt_bias", dt_bias)):
        if tensor is not None:
            check_shape(name, tensor, (heads, head_dim))
    if state_batch_indices is not None:
        check_shape("state_batch_indices", state_batch_indices, (batch,))
        check_dtype("state_batch_indices", state_batch_indices, (torch.int32, torch.int64))
    elif slots != batch:
        raise ValueError(f"state: expected a batch of {batch} (that of x), got {slots}")
    check_same_device(state=state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)


@torch.library.custom_op(
    "visionmamba::selective_state_update",
    mutates_args=("state",),
    schema=(
        "(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
        "Tensor? dt_bias, bool dt_softplus, Tensor? state_batch_indices) -> Tensor"
    ),
)
def _selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices):
    _check(state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices)
    arguments = (state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)
    return select("selective_state_update", state.device.type, *arguments).forward(*arguments)


@_selective_state_update.register_fake
def _(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices):
    _check(state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """Advance a state by one token, in place, and read it out: mamba_ssm's function of the same name.

    A quantity that is the same for a whole head (Mamba-2) may be an expanded view with stride 0; a kernel then reads it
    once. Not differentiable.

    Args:
        state: ``(B, D, N)`` or ``(B, H, P, N)``, updated in place; ``(slots, ...)`` with ``state_batch_indices``.
        x: ``(B, D)`` or ``(B, H, P)``.
        dt: Step sizes before bias and softplus, the shape of ``x``.
        A: ``(D, N)`` or ``(H, P, N)``.
        B: ``(B, N)``, or ``(B, G, N)`` where there are heads.
        C: The shape of ``B``.
        D: Skip weight, ``(D,)`` or ``(H, P)``.
        z: Gate, the shape of ``x``.
        dt_bias: ``(D,)`` or ``(H, P)``.
        dt_softplus: Apply softplus to ``dt + dt_bias``.
        state_batch_indices: For each batch entry the slot of ``state`` that it uses, ``(B,)`` integer, all different;
            -1 marks padding, whose output is 0.

    Returns:
        The output, the shape and dtype of ``x``.

    Raises:
        ValueError: A shape or device does not fit.
        TypeError: A dtype does not fit.

    Source:
        mamba_ssm 2.3, ``ops/triton/selective_state_update.py`` (interface).
    """
    if state.dim() not in (3, 4):
        raise ValueError(f"state: expected (B, D, N) or (B, H, P, N), got shape {tuple(state.shape)}")
    if state.dim() == 4:
        return torch.ops.visionmamba.selective_state_update(
            state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices
        )
    # A single head of D channels
    z, D, dt_bias = (None if tensor is None else tensor.unsqueeze(-2) for tensor in (z, D, dt_bias))
    return torch.ops.visionmamba.selective_state_update(
        state.unsqueeze(1), x.unsqueeze(1), dt.unsqueeze(1), A.unsqueeze(0), B.unsqueeze(1), C.unsqueeze(1),
        D, z, dt_bias, dt_softplus, state_batch_indices,
    ).squeeze(1)  # fmt: skip


def selective_state_update_ref(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False) -> Tensor:
    """Compute :func:`selective_state_update` one head and channel at a time: the oracle; same arguments, no slots."""
    if state.dim() == 3:
        singles = [None if t is None else t.unsqueeze(-2) for t in (D, z, dt_bias)]
        return selective_state_update_ref(
            state.unsqueeze(1), x.unsqueeze(1), dt.unsqueeze(1), A.unsqueeze(0), B.unsqueeze(1), C.unsqueeze(1),
            *singles, dt_softplus,
        ).squeeze(1)  # fmt: skip
    out = torch.empty_like(x)
    heads, head_dim = state.shape[1:3]
    for h in range(heads):
        g = h * B.shape[1] // heads
        for p in range(head_dim):
            step = dt[:, h, p] if dt_bias is None else dt[:, h, p] + dt_bias[h, p]
            step = (F.softplus(step) if dt_softplus else step).unsqueeze(-1)
            state[:, h, p] = torch.exp(step * A[h, p]) * state[:, h, p] + step * x[:, h, p, None] * B[:, g]
            y = (state[:, h, p].to(C.dtype) * C[:, g]).sum(-1)
            y = y if D is None else y + D[h, p] * x[:, h, p]
            out[:, h, p] = y if z is None else y * F.silu(z[:, h, p])
    return out
