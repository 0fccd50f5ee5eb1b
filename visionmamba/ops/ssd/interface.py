"""mamba_ssm's SSD functions, with its arguments, layouts and meaning, on the operators of this package."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..causal_conv1d import causal_conv1d
from ..norm import rmsnorm_fn
from .op import ssd_scan

__all__ = [
    "check_cu_seqlens",
    "mamba_chunk_scan_combined",
    "mamba_split_conv1d_scan_combined",
    "state_after",
    "varlen_states",
]

_UNLIMITED = (0.0, float("inf"))


def check_cu_seqlens(cu_seqlens: Tensor, length: int, padded: bool = False) -> list[int]:
    """Return the boundaries of packed sequences as a list.

    Args:
        cu_seqlens: ``(S + 1,)`` integer, from 0 to ``length``, increasing.
        length: Number of packed tokens.
        padded: Whether tokens may follow the last boundary, and sequences may be empty (rows of a cache without one).

    Raises:
        ValueError: They are no integers, do not cover exactly the tokens, or do not increase.
    """
    if cu_seqlens.is_floating_point():
        raise ValueError(f"cu_seqlens: expected integers, got {cu_seqlens.dtype}")
    bounds = cu_seqlens.tolist() if cu_seqlens.dim() == 1 else []
    covers = len(bounds) >= 2 and bounds[0] == 0 and (bounds[-1] <= length if padded else bounds[-1] == length)
    if not covers or any(end - start < (not padded) for start, end in pairwise(bounds)):
        raise ValueError(f"cu_seqlens: expected increasing boundaries from 0 to {length} tokens, got {bounds}")
    return bounds


def state_after(x: Tensor, step: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the state that tokens leave behind where there was none before, and how far they let one decay.

    With s_t the sum of Delta A over the steps after t::

        h = sum_t exp(s_t) Delta_t x_t B_t^T

    Args:
        x: ``(B, L, H, P)``.
        step: Delta, after bias, softplus and clamp, ``(B, L, H)``.
        A: ``(H,)``.
        B: ``(B, L, G, N)``.

    Returns:
        ``(B, H, P, N)``, and the logarithm of the decay over all steps, ``(B, H)``.
    """
    log_decay = step * A
    remaining = log_decay.flip(1).cumsum(1).flip(1) - log_decay  # from after each step to the end
    weighted = x * (remaining.exp() * step).unsqueeze(-1)
    weighted = weighted.unflatten(2, (B.shape[2], -1))  # (B, L, G, H / G, P)
    return torch.einsum("blgrp,blgn->bgrpn", weighted, B).flatten(1, 2), log_decay.sum(1)


def varlen_states(
    x: Tensor,
    step: Tensor,
    A: Tensor,
    B: Tensor,
    cu_seqlens: Tensor,
    initial_states: Tensor | None = None,
) -> Tensor:
    """Compute the state at the end of each packed sequence.

    Args:
        x: ``(1, L, H, P)``.
        step: Delta, after bias, softplus and clamp, ``(1, L, H)``.
        A: ``(H,)``.
        B: ``(1, L, G, N)``.
        cu_seqlens: ``(S + 1,)`` boundaries of the sequences, checked by :func:`check_cu_seqlens`.
        initial_states: State before the first sequence, ``(1, H, P, N)``.

    Returns:
        ``(S, H, P, N)`` in float32 (float64).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, step, A, B = (tensor.to(dtype) for tensor in (x, step, A, B))
    states = []
    for start, end in pairwise(cu_seqlens.tolist()):
        state, log_decay = state_after(x[:, start:end], step[:, start:end], A, B[:, start:end])
        if not states and initial_states is not None:
            state = state + log_decay.exp()[..., None, None] * initial_states.to(dtype)
        states.append(state)
    return torch.cat(states)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = _UNLIMITED,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Run SSD over sequences: mamba_ssm's function of the same name.

    Args:
        x: Input, ``(B, L, H, P)``.
        dt: Step sizes before bias and softplus, ``(B, L, H)``.
        A: One negative number a head, ``(H,)``.
        B: Input projection, ``(B, L, G, N)``.
        C: Output projection, ``(B, L, G, N)``.
        chunk_size: Most steps computed as one matrix product; the result does not depend on it.
        D: Skip weight, ``(H,)`` or ``(H, P)``.
        z: Gate, ``(B, L, H, P)``.
        dt_bias: ``(H,)``.
        initial_states: ``(B, H, P, N)``; with ``seq_idx`` they belong to sequence 0.
        seq_idx: Sequence each token belongs to, ``(B, L)`` integer, non-decreasing from 0.
        cu_seqlens: Boundaries of the packed sequences, ``(S + 1,)``, B must be 1; resets the state at each where
            ``seq_idx`` is absent. Where it is given, tokens may follow the last boundary: padding.
        dt_softplus: Apply softplus to ``dt + dt_bias``.
        dt_limit: Range that the step sizes are clamped to.
        return_final_states: Also return the state after the last step.
        return_varlen_states: Also return the state at the end of each sequence of ``cu_seqlens``.

    Returns:
        The output, ``(B, L, H, P)``; then, where asked for, the final states, ``(B, H, P, N)``, and the varlen states,
        ``(S, H, P, N)``.

    Raises:
        ValueError: A shape does not fit, or ``cu_seqlens`` does not cover the tokens.

    Source:
        mamba_ssm 2.3, ``ops/triton/ssd_combined.py`` (interface).
    """
    if cu_seqlens is not None:
        if x.shape[0] != 1:
            raise ValueError(f"cu_seqlens: expected packed sequences in a batch of 1, got a batch of {x.shape[0]}")
        bounds = check_cu_seqlens(cu_seqlens, x.shape[1], padded=seq_idx is not None)
        if seq_idx is None:
            lengths = torch.diff(torch.tensor(bounds, device=x.device))
            seq_idx = torch.arange(len(lengths), device=x.device).repeat_interleave(lengths).unsqueeze(0)
    elif return_varlen_states:
        raise ValueError("cu_seqlens: expected the sequences' boundaries with return_varlen_states, got None")
    out, final = ssd_scan(
        x, dt.unsqueeze(2), A.unsqueeze(0), B.unsqueeze(2), C.unsqueeze(2),
        None if D is None else D.unsqueeze(0), z, None if dt_bias is None else dt_bias.unsqueeze(0),
        None if initial_states is None else initial_states.unsqueeze(1), seq_idx,
        dt_softplus=dt_softplus, dt_limit=dt_limit, chunk_size=chunk_size,
    )  # fmt: skip
    results = [out]
    if return_final_states:
        results.append(final.squeeze(1))
    if return_varlen_states:
        step = dt.to(final.dtype) if dt_bias is None else dt.to(final.dtype) + dt_bias.to(final.dtype)
        step = (F.softplus(step) if dt_softplus else step).clamp(*dt_limit)
        results.append(varlen_states(x, step, A, B, cu_seqlens, initial_states))
    return results[0] if len(results) == 1 else tuple(results)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = _UNLIMITED,
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Split a Mamba-2 projection, convolve, run SSD, normalise and project: mamba_ssm's function of the same name.

    Args:
        zxbcdt: Projection, ``(B, L, 2 * d_mlp + 2 * H * P + 2 * G * N + H)``: gate and value of an optional parallel
            MLP, z, x, B, C, dt.
        conv1d_weight: Depthwise filters over x, B and C, ``(H P + 2 G N, W)``.
        conv1d_bias: ``(H P + 2 G N,)``.
        dt_bias: ``(H,)``.
        A: ``(H,)``.
        D: ``(H,)`` or ``(H, P)``.
        chunk_size: Most steps computed as one matrix product.
        initial_states: ``(B, H, P, N)``.
        seq_idx: ``(B, L)`` integer.
        dt_limit: Range that the step sizes are clamped to.
        return_final_states: Also return the state after the last step.
        activation: ``"silu"``, ``"swish"`` or None, after the convolution.
        rmsnorm_weight: Gated RMSNorm after SSD, ``(H P,)``; without it z gates SSD's output.
        rmsnorm_eps: Epsilon of the norm.
        outproj_weight: Output projection, ``(d_model, d_mlp + H P)``.
        outproj_bias: ``(d_model,)``.
        headdim: P; needed where ``D`` is ``(H,)``.
        ngroups: G.
        norm_before_gate: Normalise before the gate instead of after it.

    Returns:
        The output, ``(B, L, d_model)``; without ``outproj_weight`` ``(B, L, d_mlp + H P)``; and the final states,
        ``(B, H, P, N)``, where asked for.

    Raises:
        ValueError: A shape does not fit, or ``headdim`` is missing.

    Source:
        mamba_ssm 2.3, ``ops/triton/ssd_combined.py`` (interface).
    """
    if D.dim() == 1 and headdim is None:
        raise ValueError("headdim: expected the number of channels of a head where D is (H,), got None")
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation: expected 'silu', 'swish' or None, got {activation!r}")
    heads = A.shape[0]
    d_ssm = heads * (headdim if D.dim() == 1 else D.shape[1])
    conv_channels = conv1d_weight.shape[0]
    d_mlp = (zxbcdt.shape[-1] - d_ssm - conv_channels - heads) // 2
    if d_mlp < 0 or zxbcdt.shape[-1] != 2 * d_mlp + d_ssm + conv_channels + heads:
        raise ValueError(
            f"zxbcdt: expected {d_ssm + conv_channels + heads} channels (z, x, B, C, dt) plus an even number for an "
            f"MLP, got {zxbcdt.shape[-1]}"
        )
    gate, value, z, xBC, dt = zxbcdt.split([d_mlp, d_mlp, d_ssm, conv_channels, heads], dim=-1)
    bias = None if conv1d_bias is None else conv1d_bias.unsqueeze(0)
    xBC = causal_conv1d(xBC, conv1d_weight.unsqueeze(0), bias, seq_idx, silu=activation is not None)[0].squeeze(2)
    x, B, C = xBC.split([d_ssm, (conv_channels - d_ssm) // 2, (conv_channels - d_ssm) // 2], dim=-1)
    y, final = mamba_chunk_scan_combined(
        x.unflatten(-1, (heads, -1)), dt, A, B.unflatten(-1, (ngroups, -1)), C.unflatten(-1, (ngroups, -1)),
        chunk_size, D=D, z=z.unflatten(-1, (heads, -1)) if rmsnorm_weight is None else None, dt_bias=dt_bias,
        initial_states=initial_states, seq_idx=seq_idx, dt_softplus=True, dt_limit=dt_limit, return_final_states=True,
    )  # fmt: skip
    y = y.flatten(-2)
    if rmsnorm_weight is not None:
        group_size = d_ssm // ngroups
        y = rmsnorm_fn(y, rmsnorm_weight, None, z, rmsnorm_eps, group_size, norm_before_gate)
    if d_mlp > 0:
        y = torch.cat([F.silu(gate) * value, y], dim=-1)
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, outproj_bias)
    return (y, final) if return_final_states else y
