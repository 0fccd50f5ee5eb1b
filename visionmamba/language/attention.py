"""Attention and MLP for hybrids of Mamba and Transformer, with mamba_ssm's arguments and parameter names."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..ops import causal_conv1d, causal_conv1d_update
from .inference import InferenceParams, cached_states
from .packed import sequence_index

__all__ = ["MHA", "GatedMLP", "rotate"]


def _ceil_to(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


class GatedMLP(nn.Module):
    """``fc2(value * activation(gate))`` with value and gate from ``fc1`` (Shazeer 2020; SwiGLU with silu).

    Args:
        in_features: Width of the input.
        hidden_features: Width between; 8/3 of the input if absent. Rounded up to ``multiple_of``.
        out_features: Width of the output; that of the input if absent.
        activation: Of the gate.
        bias: Whether the two layers have biases.
        multiple_of: See ``hidden_features``.
        device: Where to create the parameters.
        dtype: Their dtype.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.silu,
        bias: bool = False,
        multiple_of: int = 128,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        hidden = _ceil_to(hidden_features or int(8 * in_features / 3), multiple_of)
        self.activation = activation
        self.fc1 = nn.Linear(in_features, 2 * hidden, bias=bias, **dd)
        self.fc2 = nn.Linear(hidden, out_features or in_features, bias=bias, **dd)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(value * self.activation(gate))


def rotate(x: Tensor, positions: Tensor, dim: int, base: float = 10000.0, interleaved: bool = False) -> Tensor:
    """Apply rotary position embedding to the first ``dim`` channels of each head.

    Args:
        x: ``(B, L, H, P)``.
        positions: ``(L,)`` or ``(B, L)``.
        dim: Channels that are rotated, even.
        base: Of the frequencies ``base ** (-2 i / dim)``.
        interleaved: Pair channels (2i, 2i + 1) instead of (i, i + dim / 2).

    Returns:
        The shape and dtype of ``x``.

    Source:
        Su et al. 2021, "RoFormer"; the pairing (i, i + dim / 2) is GPT-NeoX's.
    """
    frequencies = base ** (-torch.arange(0, dim, 2, device=x.device, dtype=torch.float32) / dim)
    angles = positions.to(torch.float32).unsqueeze(-1) * frequencies
    cosine, sine = (t.unsqueeze(-2) for t in (angles.cos(), angles.sin()))  # ([B,] L, 1, dim / 2)
    rotated, rest = x[..., :dim].float(), x[..., dim:]
    if interleaved:
        first, second = rotated[..., ::2], rotated[..., 1::2]
        rotated = torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=-1).flatten(-2)
    else:
        first, second = rotated.chunk(2, dim=-1)
        rotated = torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
    return torch.cat([rotated.to(x.dtype), rest], dim=-1)


class MHA(nn.Module):
    """Causal multi-head attention with grouped keys, rotary positions, a short convolution and a parallel MLP.

    Args:
        embed_dim: Width of the input and output.
        num_heads: Query heads.
        num_heads_kv: Key and value heads; as many as query heads if absent.
        head_dim: Channels of a head; ``embed_dim / num_heads`` if absent.
        mlp_dim: Channels of a gated MLP beside the attention, both halves together; rounded up to a multiple of 256.
        qkv_proj_bias: Whether ``in_proj`` has a bias.
        out_proj_bias: Whether ``out_proj`` has a bias.
        softmax_scale: ``head_dim ** -0.5`` if absent.
        causal: Whether a token sees only those up to it.
        layer_idx: The layer's place in the inference cache.
        d_conv: Taps of a causal depthwise convolution of queries, keys and values; 0 for none.
        rotary_emb_dim: Channels of a head with rotary position embedding.
        rotary_emb_base: Base of its frequencies.
        rotary_emb_interleaved: Pair neighbouring channels.
        device: Where to create the parameters.
        dtype: Their dtype.

    Source:
        Interface and parameter names of mamba_ssm 2.3. Two faults of its decoding are not reproduced: the convolution
        state after the prompt holds the convolution's inputs, and a query sees all earlier keys.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        head_dim: int | None = None,
        mlp_dim: int = 0,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        d_conv: int = 0,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_interleaved: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        if num_heads % self.num_heads_kv:
            raise ValueError(f"num_heads_kv: expected a divisor of the {num_heads} heads, got {self.num_heads_kv}")
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of {embed_dim} channels, got {num_heads}")
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.mlp_dim = _ceil_to(mlp_dim, 256)
        self.softmax_scale, self.causal, self.layer_idx, self.d_conv = softmax_scale, causal, layer_idx, d_conv
        self.rotary_emb_dim, self.rotary_emb_base = rotary_emb_dim, rotary_emb_base
        self.rotary_emb_interleaved = rotary_emb_interleaved
        qkv_dim = self.head_dim * (num_heads + 2 * self.num_heads_kv)
        self.in_proj = nn.Linear(embed_dim, qkv_dim + self.mlp_dim, bias=qkv_proj_bias, **dd)
        if d_conv > 0:
            self.conv1d = nn.Conv1d(qkv_dim, qkv_dim, d_conv, padding=d_conv - 1, groups=qkv_dim, **dd)
        self.out_proj = nn.Linear(self.head_dim * num_heads + self.mlp_dim // 2, embed_dim, bias=out_proj_bias, **dd)

    def forward(
        self,
        x: Tensor,
        inference_params: InferenceParams | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Attend within the sequence, or from new tokens to those in the cache.

        Args:
            x: ``(B, L, embed_dim)``.
            inference_params: Cache to continue from and to update.
            seq_idx: Packed sequences: the sequence of each token, ``(B, L)``.
            cu_seqlens: The same as boundaries, ``(S + 1,)``, for a batch of 1.

        Returns:
            The shape of ``x``.

        Raises:
            ValueError: The cache is too short, or ``cu_seqlens`` does not cover the tokens.
        """
        batch, length = x.shape[:2]
        seq_idx = sequence_index(cu_seqlens, seq_idx, x)
        if inference_params is not None and seq_idx is not None:
            raise ValueError("seq_idx: expected no packed sequences with an inference cache")
        kv_cache, *conv_state = (None,) if inference_params is None else cached_states(self, inference_params, batch)
        offset = 0 if inference_params is None else inference_params.seqlen_offset
        lengths = None if inference_params is None or length > 1 else inference_params.lengths_per_sample
        if inference_params is not None and offset + length > kv_cache.shape[1]:
            raise ValueError(f"x: expected at most {kv_cache.shape[1]} tokens in the cache, got {offset + length}")

        qkv, mlp = self.in_proj(x).split([self.in_proj.out_features - self.mlp_dim, self.mlp_dim], dim=-1)
        if self.d_conv > 0:
            qkv = self._convolve(qkv, seq_idx, conv_state[0] if conv_state else None, offset)
        if lengths is None:
            positions = torch.arange(offset, offset + length, device=x.device)
        else:
            positions = lengths[:batch].unsqueeze(-1)
        q, k, v = self._heads(qkv, positions)
        if inference_params is None or (offset == 0 and length > 1):
            mask = None if seq_idx is None else self._packed_mask(seq_idx)
            context = self._attend(q, k, v, mask, self.causal and mask is None)
            if inference_params is not None:
                kv_cache[:, :length].copy_(torch.stack([k, v], dim=2))
        else:
            context = self._attend_to_cache(q, k, v, kv_cache, positions, on_device=lengths is not None)
        context = context.flatten(-2)
        if self.mlp_dim > 0:
            up, gate = mlp.chunk(2, dim=-1)
            context = torch.cat([context, up * F.silu(gate)], dim=-1)
        return self.out_proj(context)

    def _heads(self, qkv: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split into rotated queries (B, L, H, P) and keys, and values (B, L, H_kv, P)."""
        heads = [self.num_heads, self.num_heads_kv, self.num_heads_kv]
        q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).split(heads, dim=-2)
        if self.rotary_emb_dim > 0:
            options = (positions, self.rotary_emb_dim, self.rotary_emb_base, self.rotary_emb_interleaved)
            q, k = rotate(q, *options), rotate(k, *options)
        return q, k, v

    def _convolve(self, qkv: Tensor, seq_idx: Tensor | None, state: Tensor | None, offset: int) -> Tensor:
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        if state is not None and offset > 0 and qkv.shape[1] == 1:
            return causal_conv1d_update(qkv.squeeze(1), state, weight, bias).unsqueeze(1)
        initial = None if state is None or offset == 0 else state.unsqueeze(1)
        qkv, final = causal_conv1d(
            qkv, weight.unsqueeze(0), None if bias is None else bias.unsqueeze(0), seq_idx, initial, silu=False
        )
        if state is not None:
            state.copy_(final.squeeze(1))
        return qkv.squeeze(2)

    def _packed_mask(self, seq_idx: Tensor) -> Tensor:
        same = seq_idx.unsqueeze(-1) == seq_idx.unsqueeze(-2)
        return (same.tril() if self.causal else same).unsqueeze(1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """Attention of (B, L, H, P) to (B, S, H_kv, P)."""
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        grouped = self.num_heads != self.num_heads_kv
        context = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=self.softmax_scale, enable_gqa=grouped
        )
        return context.transpose(1, 2)

    def _attend_to_cache(
        self, q: Tensor, k: Tensor, v: Tensor, kv_cache: Tensor, positions: Tensor, on_device: bool
    ) -> Tensor:
        """Write new keys and values into the cache (B, S, 2, H_kv, P), and attend to everything up to each query.

        ``positions`` are (L,), which the host may read; or, ``on_device``, one for each row of the batch, (B, 1).
        """
        new = torch.stack([k, v], dim=2).to(kv_cache.dtype)
        if not on_device:
            start, stop = int(positions[0]), int(positions[-1]) + 1
            kv_cache[:, start:stop].copy_(new)
            keys = kv_cache[:, :stop]
            visible = torch.arange(stop, device=q.device) <= positions.unsqueeze(-1)  # (L, S)
        else:
            # Positions are on the device: a captured graph reads the whole cache under a mask
            kv_cache.scatter_(1, positions.long()[:, :, None, None, None].expand_as(new), new)
            keys = kv_cache
            visible = (torch.arange(kv_cache.shape[1], device=q.device) <= positions.unsqueeze(-1)).unsqueeze(1)
        mask = None if q.shape[1] == 1 and not on_device else visible
        return self._attend(q, keys[:, :, 0].to(q.dtype), keys[:, :, 1].to(q.dtype), mask, False)

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype=None, **_kwargs) -> tuple[Tensor, ...]:
        """Return an empty key-value cache ``(B, max_seqlen, 2, H_kv, P)`` and, with ``d_conv``, a convolution state."""
        weight = self.out_proj.weight
        shape = (batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim)
        cache = (weight.new_zeros(shape, dtype=dtype),)
        if self.d_conv > 0:
            channels = self.conv1d.weight.shape[0]
            cache += (weight.new_zeros(batch_size, channels, self.d_conv - 1, dtype=dtype),)
        return cache
