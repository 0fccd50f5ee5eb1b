"""Mamba (S6): the selective state space block over sequences, with mamba_ssm's arguments and parameter names.

With D = ``d_inner`` channels, N = ``d_state`` and R = ``dt_rank`` (Gu & Dao 2023, figure 3 and algorithm 2)::

    x, z     = in_proj u                                   (B, L, D) each
    x        = silu(causal depthwise convolution of x)
    dt, B, C = x_proj x                                    (B, L, R + 2N)
    Delta    = softplus(dt_proj dt)                        (B, L, D)
    h_t      = exp(Delta A) h_{t-1} + Delta B x            (B, D, N)
    y        = (C h + D x) silu(z)
    out      = out_proj y
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..layers.selective_ssm import init_dt_bias_, init_s4d_real_
from ..ops import causal_conv1d, causal_conv1d_update, selective_scan, selective_state_update
from .inference import InferenceParams, cached_states
from .packed import apply_to_sequences, sequence_index

__all__ = ["Mamba"]


class Mamba(nn.Module):
    """Mamba block.

    Args:
        d_model: Width of the input and output.
        d_state: States a channel, N.
        d_conv: Taps of the convolution, 2 to 4.
        expand: ``d_inner = expand * d_model``.
        dt_rank: Rank of the step size's projection; ``"auto"`` is ``ceil(d_model / 16)``.
        dt_min: Smallest step size at initialisation.
        dt_max: Largest step size at initialisation.
        dt_init: ``"random"`` or ``"constant"`` weights of ``dt_proj``.
        dt_scale: Scale of those weights.
        dt_init_floor: Step sizes are clamped from below to this at initialisation.
        conv_bias: Whether the convolution has a bias.
        bias: Whether ``in_proj`` and ``out_proj`` have biases.
        use_fast_path: Kept for compatibility: there is one path.
        layer_idx: The layer's place in the inference cache.
        device: Where to create the parameters.
        dtype: Their dtype.

    Source:
        Gu & Dao 2023, "Mamba"; interface and parameter names of mamba_ssm 2.3.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if dt_init not in ("random", "constant"):
            raise ValueError(f"dt_init: expected 'random' or 'constant', got {dt_init!r}")
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.layer_idx = layer_idx
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **dd)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias, **dd
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **dd)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True, **dd)
        self.dt_proj.bias._no_reinit = True
        self.A_log = nn.Parameter(torch.empty(self.d_inner, d_state, device=device, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(self.d_inner, device=device, dtype=torch.float32))
        self.A_log._no_weight_decay = self.D._no_weight_decay = True
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **dd)
        if not self.A_log.is_meta:
            self._reset_ssm(dt_min, dt_max, dt_init, dt_scale * self.dt_rank**-0.5, dt_init_floor)

    @torch.no_grad()
    def _reset_ssm(self, dt_min: float, dt_max: float, dt_init: str, dt_std: float, floor: float) -> None:
        if dt_init == "constant":
            self.dt_proj.weight.fill_(dt_std)
        else:
            self.dt_proj.weight.uniform_(-dt_std, dt_std)
        init_dt_bias_(self.dt_proj.bias, dt_min, dt_max, floor)
        init_s4d_real_(self.A_log)
        self.D.fill_(1.0)

    def forward(
        self,
        hidden_states: Tensor,
        inference_params: InferenceParams | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        initial_states: tuple[Tensor, Tensor] | None = None,
        return_final_states: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run over a sequence, or continue one.

        Args:
            hidden_states: ``(B, L, d_model)``.
            inference_params: Cache to continue from and to update; with ``cu_seqlens`` a row for each sequence.
            seq_idx: Packed sequences: the sequence of each token, ``(B, L)``.
            cu_seqlens: The same as boundaries, ``(S + 1,)``, for a batch of 1.
            initial_states: Convolution state ``(B, D, d_conv - 1)`` and SSM state ``(B, D, N)`` to begin with.
            return_final_states: Also return those states after the last token.

        Returns:
            ``(B, L, d_model)``; with ``return_final_states`` also the two states.

        Raises:
            ValueError: ``cu_seqlens`` does not cover the tokens, or packing is combined with states.
        """
        cache = None
        if inference_params is not None:
            batch = hidden_states.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
            cache = cached_states(self, inference_params, batch)
            if inference_params.seqlen_offset > 0:
                if hidden_states.shape[1] == 1:
                    return self.step(hidden_states, *cache)[0]
                initial_states = cache
        seq_idx = sequence_index(cu_seqlens, seq_idx, hidden_states)
        projected = self.in_proj(hidden_states)
        if seq_idx is not None:
            if initial_states is not None or return_final_states or (cache is not None and cu_seqlens is None):
                raise ValueError("seq_idx: expected no states with packed sequences, but cu_seqlens with a cache")
            if cache is not None:
                return self.out_proj(self._prefill(projected, cu_seqlens.tolist(), cache))
            y = apply_to_sequences(lambda rows: self._scan(rows, None)[0], projected, seq_idx)
            return self.out_proj(y)
        y, states = self._scan(projected, initial_states)
        if cache is not None:
            for target, state in zip(cache, states, strict=True):
                target.copy_(state)
        out = self.out_proj(y)
        return (out, states) if return_final_states else out

    def _prefill(self, projected: Tensor, bounds: list[int], cache: tuple[Tensor, Tensor]) -> Tensor:
        """Run over packed sequences one by one, and keep the states after each; 0 for padding and empty sequences."""
        outputs = []
        for row, (start, end) in enumerate(pairwise(bounds)):
            for target in cache:
                target[row].zero_()
            if start < end:
                y, states = self._scan(projected[:, start:end], None)
                for target, state in zip(cache, states, strict=True):
                    target[row].copy_(state[0])
                outputs.append(y)
        return F.pad(torch.cat(outputs, dim=1), (0, 0, 0, projected.shape[1] - bounds[-1]))

    def _scan(self, projected: Tensor, states: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """From ``in_proj``'s output to ``out_proj``'s input, and the states after the last token."""
        x, z = projected.chunk(2, dim=-1)
        conv_state, ssm_state = (None, None) if states is None else (state.unsqueeze(1) for state in states)
        bias = None if self.conv1d.bias is None else self.conv1d.bias.unsqueeze(0)
        # One direction: K = 1 in the operators' layouts
        x, conv_state = causal_conv1d(x, self.conv1d.weight.squeeze(1).unsqueeze(0), bias, None, conv_state)
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)  # (B, L, 1, ...) each
        y, ssm_state = selective_scan(
            x, dt, -torch.exp(self.A_log.float()).unsqueeze(0), B, C, self.D.float().unsqueeze(0), z,
            self.dt_proj.bias.float().unsqueeze(0), self.dt_proj.weight.unsqueeze(0), ssm_state,
        )  # fmt: skip
        return y, (conv_state.squeeze(1), ssm_state.squeeze(1))

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Advance by one token, updating the states in place.

        Args:
            hidden_states: ``(B, 1, d_model)``.
            conv_state: ``(B, D, d_conv - 1)``.
            ssm_state: ``(B, D, N)``.

        Returns:
            ``(B, 1, d_model)`` and the two states.

        Raises:
            ValueError: There is more than one token.
        """
        if hidden_states.shape[1] != 1:
            raise ValueError(f"hidden_states: expected one token a step, got {hidden_states.shape[1]}")
        x, z = self.in_proj(hidden_states.squeeze(1)).chunk(2, dim=-1)
        x = causal_conv1d_update(x, conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu")
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y = selective_state_update(
            ssm_state, x, F.linear(dt, self.dt_proj.weight), -torch.exp(self.A_log.float()), B, C, self.D.float(), z,
            self.dt_proj.bias.float(), dt_softplus=True,
        )  # fmt: skip
        return self.out_proj(y).unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype=None, **_kwargs
    ) -> tuple[Tensor, Tensor]:
        """Return zero convolution ``(B, D, d_conv - 1)`` and SSM ``(B, D, N)`` states; the latter is float32."""
        weight = self.conv1d.weight
        conv_state = weight.new_zeros(batch_size, self.d_inner, self.d_conv - 1, dtype=dtype)
        return conv_state, weight.new_zeros(batch_size, self.d_inner, self.d_state, dtype=torch.float32)
