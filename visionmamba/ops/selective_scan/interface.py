"""mamba_ssm's selective scan: its names, arguments and layouts over this package's operator.

Code written for ``mamba_ssm.ops.selective_scan_interface`` changes one import. Tensors are channels-first,
``(B, D, L)``; a transposed view of channels-last memory is taken as it is, without a copy.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_dtype, check_same_device, check_shape
from .op import selective_scan
from .pytorch import scan_states_

__all__ = ["selective_scan_fn", "selective_scan_ref"]


def _groups(name: str, tensor: Tensor, u: Tensor, A: Tensor) -> int:
    """Return the groups of B or C, 0 where it is constant; raise ValueError unless its shape fits."""
    batch, channels, length = u.shape
    states = A.shape[1]
    if A.is_complex():
        length = 2 * length
    if tensor.dim() == 2:
        check_shape(name, tensor, (channels, states))
        return 0
    if tensor.dim() == 3:
        check_shape(name, tensor, (batch, states, length))
        return 1
    if tensor.dim() != 4 or tensor.shape[1] == 0 or channels % tensor.shape[1]:
        raise ValueError(
            f"{name}: expected (D, N), (B, N, L) or (B, G, N, L) with G a divisor of D = {channels}, "
            f"got shape {tuple(tensor.shape)}"
        )
    check_shape(name, tensor, (batch, tensor.shape[1], states, length))
    return tensor.shape[1]


def _check(u, delta, A, B, C, D, z, delta_bias) -> tuple[int, int]:
    """Return the groups of B and of C; raise ValueError or TypeError, naming the argument, unless all fit together."""
    if u.dim() != 3:
        raise ValueError(f"u: expected (B, D, L), got shape {tuple(u.shape)}")
    if A.dim() != 2 or A.shape[0] != u.shape[1]:
        raise ValueError(f"A: expected (D, N) with D = {u.shape[1]}, got shape {tuple(A.shape)}")
    check_shape("delta", delta, u.shape)
    groups = _groups("B", B, u, A), _groups("C", C, u, A)
    if z is not None:
        check_shape("z", z, u.shape)
    for name, vector in (("D", D), ("delta_bias", delta_bias)):
        if vector is not None:
            check_shape(name, vector, (u.shape[1],))
    activations = {"u": u, "delta": delta, "z": z}
    activations |= {name: x for name, x in (("B", B), ("C", C)) if x.dim() > 2 or not A.is_complex()}
    for name, tensor in activations.items():
        if tensor is not None:
            check_dtype(name, tensor)
    check_same_device(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    return groups


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan channels-first sequences, as mamba_ssm's function of this name does.

    Args:
        u: Input, ``(B, D, L)``.
        delta: Step sizes before bias and softplus, ``(B, D, L)``.
        A: Diagonal of the state matrix, ``(D, N)``, real or complex.
        B: Input projection: constant, ``(D, N)``; of each step, ``(B, N, L)``; or of each step and group of ``D / G``
            channels, ``(B, G, N, L)``. With a complex ``A`` the constant form is complex, and the others are real,
            with real and imaginary parts interleaved along a last axis of ``2 L``.
        C: Output projection, in any of the forms of ``B``.
        D: Skip weight, ``(D,)``.
        z: Gate, ``(B, D, L)``; the output is multiplied by silu(z).
        delta_bias: Added to ``delta``, ``(D,)``.
        delta_softplus: Apply softplus to ``delta + delta_bias``.
        return_last_state: Return the last state too.

    Returns:
        The output, ``(B, D, L)`` in the dtype and memory order of ``u``; with ``return_last_state`` also the state
        after the last step, ``(B, D, N)``, in float32 (float64, complex64), through which gradients flow.

    Raises:
        ValueError: A shape or device does not fit.
        TypeError: A dtype does not fit.

    Source:
        The public interface of mamba_ssm; a complex ``A`` stands for conjugate pairs, y = 2 Re(C h) (Gu et al. 2022,
        "On the Parameterization and Initialization of Diagonal State Space Models", section 3).
    """
    groups_B, groups_C = _check(u, delta, A, B, C, D, z, delta_bias)
    if A.is_complex():
        out, last_state = _complex_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    else:
        channels_last = _constant_scan if groups_B == 0 or groups_C == 0 else _grouped_scan
        groups = math.lcm(max(groups_B, 1), max(groups_C, 1))
        out, last_state = channels_last(u, delta, A, B, C, D, z, delta_bias, delta_softplus, groups)
    if u.stride(1) != 1:
        out = out.contiguous()
    return (out, last_state) if return_last_state else out


def _tokens(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Turn (B, D, L) into (B, L, G, D / G), contiguous in its last dimension."""
    x = x.to(dtype).transpose(1, 2)
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x.unflatten(2, (groups, -1))


def _projection(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Turn (B, N, L) or (B, G', N, L) into (B, L, G, N), with G a multiple of G'."""
    x = x.unsqueeze(1) if x.dim() == 3 else x
    x = x.to(dtype).permute(0, 3, 1, 2)
    return x.repeat_interleave(groups // x.shape[2], dim=2).contiguous()


def _per_group(x: Tensor | None, groups: int) -> Tensor | None:
    """Turn (D, ...) into (G, D / G, ...)."""
    return None if x is None else x.unflatten(0, (groups, -1))


def _grouped_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, groups):
    """Scan with B and C of each step: a group is a direction of its own channels, all of them in sequence order."""
    dtype = torch.promote_types(torch.promote_types(u.dtype, delta.dtype), torch.promote_types(B.dtype, C.dtype))
    dtype = dtype if z is None else torch.promote_types(dtype, z.dtype)
    gate = None if z is None else _tokens(z, groups, dtype)
    y, last_state = selective_scan(
        _tokens(u, groups, dtype), _tokens(delta, groups, dtype), _per_group(A, groups),
        _projection(B, groups, dtype), _projection(C, groups, dtype), _per_group(D, groups), gate,
        _per_group(delta_bias, groups), path=",".join(["h"] * groups), delta_softplus=delta_softplus, merge=False,
    )  # fmt: skip
    return y.flatten(2).transpose(1, 2).to(u.dtype), last_state.flatten(1, 2)


def _constant_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, groups):
    """Scan with a constant B or C, which differ between channels: a state of a group is a direction.

    h_dn = scan(B_dn u_d) takes a constant B into the input, and y_d = sum_n C_dn h_dn a constant C out of the output.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    batch, channels, length = u.shape
    states = A.shape[1]
    directions, width = groups * states, channels // groups

    def per_state(x: Tensor) -> Tensor:  # (B, L, G, D / G) -> (B, L, G N, D / G)
        return x.unsqueeze(3).expand(-1, -1, -1, states, -1).flatten(2, 3)

    def weight(x: Tensor) -> Tensor:  # (D, N) -> (G N, D / G)
        return x.to(dtype).unflatten(0, (groups, width)).transpose(1, 2).flatten(0, 1)

    def projection(x: Tensor) -> Tensor:  # (B, L, G N, 1)
        if x.dim() == 2:
            return u.new_ones((), dtype=dtype).expand(batch, length, directions, 1)
        return _projection(x, groups, dtype).flatten(2).unsqueeze(-1)

    tokens = _tokens(u, groups, dtype)
    drive = per_state(tokens)
    bias = None if delta_bias is None else weight(delta_bias.unsqueeze(1).expand(-1, states))
    y, last_state = selective_scan(
        drive * weight(B) if B.dim() == 2 else drive, per_state(_tokens(delta, groups, dtype)),
        weight(A).unsqueeze(-1), projection(B), projection(C), delta_bias=bias,
        path=",".join(["h"] * directions), delta_softplus=delta_softplus, merge=False,
    )  # fmt: skip
    y = y * weight(C) if C.dim() == 2 else y
    y = y.unflatten(2, (groups, states)).sum(3).flatten(2).transpose(1, 2)  # (B, D, L)
    last_state = last_state.view(batch, groups, states, width).transpose(2, 3).flatten(1, 2)
    return _skip_and_gate(y, u, D, z), last_state


def _skip_and_gate(y: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    if D is not None:
        y = y + u.to(y.dtype) * D.to(y.dtype).unsqueeze(1)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(u.dtype)


class _LinearScan(torch.autograd.Function):
    """h_t = a_t h_{t-1} + b_t from h_0 = 0, along dimension 0 of (L, ...); real or complex."""

    @staticmethod
    def forward(ctx, a, b):
        decay, drive = (x.flatten(1)[None, None, :, None].clone() for x in (a, b))  # (1, 1, L, 1, rows)
        h = scan_states_(decay, drive, torch.zeros_like(drive[:, :, 0]))[0, 0, :, 0].view(b.shape)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx, dh):
        a, h = ctx.saved_tensors
        # g_t = dh_t + conj(a_{t+1}) g_{t+1}: the same recurrence on reversed steps
        decay = torch.cat([a[1:].conj(), torch.ones_like(a[:1])]).flip(0)
        g = _LinearScan.apply(decay, dh.flip(0)).flip(0)
        previous = torch.cat([torch.zeros_like(h[:1]), h[:-1]])
        return g * previous.conj(), g


def _per_channel(x: Tensor, u: Tensor, A: Tensor) -> Tensor:
    """Turn any form of B or C into one row a step and channel, (L, B, D, N) or (1, 1, D, N), in A's kind of numbers."""
    channels, length = u.shape[1:]
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.dim() == 2:
        return x.to(torch.promote_types(dtype, A.dtype))[None, None]
    x = x.to(dtype)
    x = x.unsqueeze(1) if x.dim() == 3 else x
    if A.is_complex():
        x = torch.view_as_complex(x.unflatten(-1, (length, 2)).contiguous())
    return x.repeat_interleave(channels // x.shape[1], dim=1).permute(3, 0, 1, 2)


def _recurrence(u, delta, A, B, delta_bias, delta_softplus) -> tuple[Tensor, Tensor]:
    """Return exp(Delta A) and Delta B u of every step, both (L, B, D, N)."""
    step = delta.to(torch.promote_types(delta.dtype, torch.float32))
    if delta_bias is not None:
        step = step + delta_bias.to(step.dtype).unsqueeze(1)
    step = F.softplus(step) if delta_softplus else step
    step, u_t = step.permute(2, 0, 1).unsqueeze(-1), u.to(step.dtype).permute(2, 0, 1).unsqueeze(-1)
    return torch.exp(step * A), step * u_t * _per_channel(B, u, A)


def _complex_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """Scan with a complex A, whose states stand for conjugate pairs: y = 2 Re(C h)."""
    h = _LinearScan.apply(*_recurrence(u, delta, A, B, delta_bias, delta_softplus))
    y = 2 * (h * _per_channel(C, u, A)).sum(-1).real.permute(1, 2, 0)
    return _skip_and_gate(y, u, D, z), h[-1]


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute :func:`selective_scan_fn` step by step in PyTorch, in float32 or wider: slow, and easy to read.

    Args and returns are those of :func:`selective_scan_fn`.
    """
    _check(u, delta, A, B, C, D, z, delta_bias)
    decay, drive = _recurrence(u, delta, A, B, delta_bias, delta_softplus)
    C = _per_channel(C, u, A).expand(u.shape[2], *[-1] * 3)
    h = torch.zeros_like(drive[0])
    outputs = []
    # unbind, not indexing: the gradient of an index is a tensor as large as the indexed one, at every step
    for decay_t, drive_t, C_t in zip(decay.unbind(0), drive.unbind(0), C.unbind(0), strict=True):
        h = decay_t * h + drive_t  # h_t = exp(Delta A) h_{t-1} + Delta B u          (B, D, N)
        y = (h * C_t).sum(-1)  # y_t = C . h, of conjugate pairs 2 Re(C . h)         (B, D)
        outputs.append(2 * y.real if y.is_complex() else y)
    out = _skip_and_gate(torch.stack(outputs, dim=2), u, D, z)
    return (out, h) if return_last_state else out
