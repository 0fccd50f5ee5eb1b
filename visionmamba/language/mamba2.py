"""Mamba-2 (SSD): heads with one decay each, with mamba_ssm's arguments and parameter names.

With H = ``nheads`` heads of P = ``headdim`` channels, G = ``ngroups`` and N = ``d_state`` (Dao & Gu 2024, section 7)::

    z, x, B, C, dt = in_proj u
    x, B, C        = silu(causal depthwise convolution of x, B, C)
    Delta          = clamp(softplus(dt + dt_bias), dt_limit)          (B, L, H)
    h_t            = exp(Delta A) h_{t-1} + Delta x B^T               (B, H, P, N)
    y              = norm((h C + D x) silu(z))
    out            = out_proj y

Where ``d_ssm`` is smaller than ``d_inner``, the channels left over are a gated MLP beside the SSM.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..layers.selective_ssm import init_dt_bias_
from ..ops import (
    causal_conv1d,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
    selective_state_update,
    ssd_scan,
)
from ..ops.ssd.interface import varlen_states
from .inference import InferenceParams, cached_states
from .norms import RMSNormGated
from .packed import sequence_index

__all__ = ["Mamba2"]


class Mamba2(nn.Module):
    """Mamba-2 block.

    Args:
        d_model: Width of the input and output.
        d_state: States a channel, N.
        d_conv: Taps of the convolution, 2 to 4.
        conv_init: Initialise the convolution uniformly in plus or minus this; PyTorch's default if absent.
        expand: ``d_inner = expand * d_model``.
        headdim: Channels of a head, P.
        d_ssm: Channels of the SSM; the rest of ``d_inner`` is a gated MLP. All of them if absent.
        ngroups: Groups of heads that share B and C.
        A_init_range: A is initialised uniformly in minus this range.
        D_has_hdim: One skip weight a channel instead of one a head.
        rmsnorm: Gated RMSNorm after the SSM; without it z gates the SSM's output.
        norm_before_gate: Normalise before the gate instead of after it.
        dt_min: Smallest step size at initialisation.
        dt_max: Largest step size at initialisation.
        dt_init_floor: Step sizes are clamped from below to this at initialisation.
        dt_limit: Range that step sizes are clamped to.
        bias: Whether ``in_proj`` and ``out_proj`` have biases.
        conv_bias: Whether the convolution has a bias.
        chunk_size: Most steps that are computed as one matrix product; the result does not depend on it.
        use_mem_eff_path: Kept for compatibility: there is one path.
        layer_idx: The layer's place in the inference cache.
        process_group: Kept for compatibility: None. Models are made parallel by
            :mod:`visionmamba.language.distributed`.
        sequence_parallel: Kept for compatibility, without effect.
        device: Where to create the parameters.
        dtype: Their dtype.

    Raises:
        ValueError: Heads or groups do not divide the channels, or there is a process group.

    Source:
        Dao & Gu 2024, "Transformers are SSMs"; interface and parameter names of mamba_ssm 2.3.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group=None,
        sequence_parallel: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if process_group is not None:
            raise ValueError(
                "process_group: expected None; visionmamba.language.distributed.tensor_parallel makes a model parallel"
            )
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self.headdim, self.ngroups, self.nheads = headdim, ngroups, self._number_of_heads(headdim, ngroups)
        self.D_has_hdim, self.rmsnorm, self.norm_before_gate = D_has_hdim, rmsnorm, norm_before_gate
        self.dt_limit, self.chunk_size, self.layer_idx = tuple(dt_limit), chunk_size, layer_idx
        self._create_parameters(bias, conv_bias, {"device": device, "dtype": dtype})
        if not self.A_log.is_meta:
            self._reset_ssm(conv_init, A_init_range, (dt_min, dt_max, dt_init_floor))

    def _number_of_heads(self, headdim: int, ngroups: int) -> int:
        heads = self.d_ssm // headdim
        if self.d_ssm % headdim:
            raise ValueError(f"headdim: expected a divisor of the {self.d_ssm} SSM channels, got {headdim}")
        if heads % ngroups:
            raise ValueError(f"ngroups: expected a divisor of the {heads} heads, got {ngroups}")
        return heads

    def _create_parameters(self, bias: bool, conv_bias: bool, dd: dict[str, Any]) -> None:
        states, taps = 2 * self.ngroups * self.d_state, self.d_conv
        self.in_proj = nn.Linear(self.d_model, 2 * self.d_inner + states + self.nheads, bias=bias, **dd)
        width = self.d_ssm + states
        self.conv1d = nn.Conv1d(width, width, taps, groups=width, padding=taps - 1, bias=conv_bias, **dd)
        self.dt_bias = nn.Parameter(torch.empty(self.nheads, **dd))
        self.A_log = nn.Parameter(torch.empty(self.nheads, **dd))
        self.D = nn.Parameter(torch.empty(self.d_ssm if self.D_has_hdim else self.nheads, device=dd["device"]))
        self.dt_bias._no_weight_decay = self.A_log._no_weight_decay = self.D._no_weight_decay = True
        if self.rmsnorm:
            group = self.d_ssm // self.ngroups
            self.norm = RMSNormGated(self.d_ssm, 1e-5, group, self.norm_before_gate, **dd)
        self.out_proj = nn.Linear(self.d_inner, self.d_model, bias=bias, **dd)

    @torch.no_grad()
    def _reset_ssm(self, conv_init: float | None, A_range: tuple[float, float], dt: tuple[float, float, float]) -> None:
        if conv_init is not None:
            self.conv1d.weight.uniform_(-conv_init, conv_init)
        init_dt_bias_(self.dt_bias, *dt)
        self.A_log.copy_(torch.empty_like(self.A_log, dtype=torch.float32).uniform_(*A_range).log())
        self.D.fill_(1.0)

    def forward(
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: InferenceParams | None = None,
        initial_states: tuple[Tensor, Tensor] | None = None,
        return_final_states: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run over a sequence, or continue one.

        Args:
            u: ``(B, L, d_model)``, or ``(B * L, d_model)`` with ``seqlen``.
            seqlen: L, where batch and length are flattened.
            seq_idx: Packed sequences: the sequence of each token, ``(B, L)``, from 0.
            cu_seqlens: The same as boundaries, ``(S + 1,)``, for a batch of 1.
            inference_params: Cache to continue from and to update; with ``cu_seqlens`` a row for each sequence.
            initial_states: Convolution state ``(B, conv channels, d_conv - 1)`` and SSM state ``(B, H, P, N)`` to begin
                with.
            return_final_states: Also return those states after the last token.

        Returns:
            The shape of ``u``; with ``return_final_states`` also the two states.

        Raises:
            ValueError: ``cu_seqlens`` does not cover the tokens.
        """
        flat = seqlen is not None
        u = u.unflatten(0, (-1, seqlen)) if flat else u
        cache = None
        if inference_params is not None:
            cache = cached_states(self, inference_params, u.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1)
            if inference_params.seqlen_offset > 0:
                if u.shape[1] == 1:
                    out = self.step(u, *cache)[0]
                    return out.flatten(0, 1) if flat else out
                initial_states = cache
        seq_idx = sequence_index(cu_seqlens, seq_idx, u)
        y, states = self._mix(self.in_proj(u), seq_idx, initial_states, None if cache is None else cu_seqlens)
        if cache is not None:
            for target, state in zip(cache, states, strict=True):
                target.copy_(state)
        out = self.out_proj(y)
        out = out.flatten(0, 1) if flat else out
        return (out, states) if return_final_states else out

    def _split(self, projected: Tensor) -> tuple[Tensor, ...]:
        """Split ``in_proj``'s output into the MLP's gate and value, z, x B C together, and dt."""
        d_mlp = self.d_inner - self.d_ssm
        conv_dim = self.d_ssm + 2 * self.ngroups * self.d_state
        return projected.split([d_mlp, d_mlp, self.d_ssm, conv_dim, self.nheads], dim=-1)

    def _heads(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split the convolution's output into x (..., H, P), B and C (..., G, N)."""
        states = self.ngroups * self.d_state
        x, B, C = xBC.split([self.d_ssm, states, states], dim=-1)
        B, C = (part.unflatten(-1, (self.ngroups, self.d_state)) for part in (B, C))
        return x.unflatten(-1, (self.nheads, self.headdim)), B, C

    def _skip(self) -> Tensor:
        """D as (H, P) or (H,)."""
        D = self.D.float()
        return D.unflatten(0, (self.nheads, self.headdim)) if self.D_has_hdim else D

    def _finish(self, y: Tensor, z: Tensor, gate: Tensor, value: Tensor) -> Tensor:
        """From the SSM's output (..., H, P) to ``out_proj``'s input."""
        y = y.flatten(-2)
        if self.rmsnorm:
            y = self.norm(y, z)
        return torch.cat([F.silu(gate) * value, y], dim=-1) if gate.shape[-1] else y

    def _mix(
        self,
        projected: Tensor,
        seq_idx: Tensor | None,
        states: tuple[Tensor, Tensor] | None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """From ``in_proj``'s output to ``out_proj``'s input, and the states after the last token.

        With ``cu_seqlens`` the states are those after each packed sequence.
        """
        gate, value, z, xBC, dt = self._split(projected)
        ends = None if cu_seqlens is None else causal_conv1d_varlen_states(xBC[0], cu_seqlens, self.d_conv - 1)
        conv_state, ssm_state = (None, None) if states is None else (state.unsqueeze(1) for state in states)
        # One direction: K = 1 in the operators' layouts
        xBC, conv_state = causal_conv1d(
            xBC, self.conv1d.weight.squeeze(1).unsqueeze(0),
            None if self.conv1d.bias is None else self.conv1d.bias.unsqueeze(0), seq_idx, conv_state,
        )  # fmt: skip
        x, B, C = self._heads(xBC)  # (B, L, 1, ...)
        y, ssm_state = ssd_scan(
            x, dt.unsqueeze(2), -torch.exp(self.A_log.float()).unsqueeze(0), B, C, self._skip().unsqueeze(0),
            None if self.rmsnorm else z.unflatten(-1, (self.nheads, self.headdim)), self.dt_bias.float().unsqueeze(0),
            ssm_state, seq_idx, dt_limit=self.dt_limit, chunk_size=self.chunk_size,
        )  # fmt: skip
        states = conv_state.squeeze(1), ssm_state.squeeze(1)
        if cu_seqlens is not None:
            step = F.softplus(dt.float() + self.dt_bias.float()).clamp(*self.dt_limit)
            states = ends, varlen_states(x.squeeze(2), step, -torch.exp(self.A_log.float()), B.squeeze(2), cu_seqlens)
        return self._finish(y, z, gate, value), states

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Advance by one token, updating the states in place.

        Args:
            hidden_states: ``(B, 1, d_model)``.
            conv_state: ``(B, conv channels, d_conv - 1)``.
            ssm_state: ``(B, H, P, N)``.

        Returns:
            ``(B, 1, d_model)`` and the two states.

        Raises:
            ValueError: There is more than one token.
        """
        if hidden_states.shape[1] != 1:
            raise ValueError(f"hidden_states: expected one token a step, got {hidden_states.shape[1]}")
        gate, value, z, xBC, dt = self._split(self.in_proj(hidden_states.squeeze(1)))
        xBC = causal_conv1d_update(xBC, conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu")
        x, B, C = self._heads(xBC)
        per_head = (self.nheads, self.headdim)
        D = self._skip()
        # Views with stride 0 where a quantity belongs to the whole head; dt is clamped before, so no softplus after
        if self.dt_limit == (0.0, float("inf")):
            bias, softplus = self.dt_bias.float().unsqueeze(-1).expand(per_head), True
        else:
            dt = F.softplus(dt.float() + self.dt_bias.float()).clamp(*self.dt_limit)
            bias, softplus = None, False
        y = selective_state_update(
            ssm_state, x, dt.unsqueeze(-1).expand(-1, *per_head),
            -torch.exp(self.A_log.float())[:, None, None].expand(*per_head, self.d_state), B, C,
            D if self.D_has_hdim else D.unsqueeze(-1).expand(per_head),
            None if self.rmsnorm else z.unflatten(-1, per_head), bias, dt_softplus=softplus,
        )  # fmt: skip
        return self.out_proj(self._finish(y, z, gate, value)).unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype=None, **_kwargs
    ) -> tuple[Tensor, Tensor]:
        """Return zero convolution and SSM states; the latter, ``(B, H, P, N)``, is float32."""
        weight = self.conv1d.weight
        conv_state = weight.new_zeros(batch_size, weight.shape[0], self.d_conv - 1, dtype=dtype)
        shape = (batch_size, self.nheads, self.headdim, self.d_state)
        return conv_state, weight.new_zeros(shape, dtype=torch.float32)
