"""causal_conv1d's functions: their names, arguments and layouts over this package's operator.

Code written for the package ``causal_conv1d`` changes one import. Tensors are channels-first, ``(B, D, L)``; a
transposed view of channels-last memory is taken as it is, without a copy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _cuda_update, cuda_runtime
from .._checks import check_dtype, check_same_device, check_shape
from ..backend import Implementation, register_implementation, select
from .op import causal_conv1d

__all__ = ["causal_conv1d_fn", "causal_conv1d_update", "causal_conv1d_varlen_states"]

_INDEX_DTYPES = (torch.int32, torch.int64)


def _is_silu(activation: str | None) -> bool:
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation: expected None, 'silu' or 'swish', got {activation!r}")
    return activation is not None


def _check_filter(channels: int, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or weight.shape[0] != channels or not 2 <= weight.shape[1] <= 4:
        raise ValueError(
            f"weight: expected (D, W) with D = {channels} and W from 2 to 4, got shape {tuple(weight.shape)}"
        )
    if bias is not None:
        check_shape("bias", bias, (channels,))


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve channels-first sequences, depthwise and causally, as causal_conv1d's function of this name does.

    Args:
        x: Input, ``(B, D, L)``.
        weight: Filters, ``(D, W)`` with W from 2 to 4; the last tap weighs the current step.
        bias: ``(D,)``.
        seq_idx: Sequence each step belongs to, ``(B, L)`` int32 or int64; taps in another sequence read 0, and the
            output is 0 where it is negative (padding).
        initial_states: The W - 1 values before the first step, oldest first, ``(B, D, W - 1)``; zero if absent.
        return_final_states: Return the last W - 1 values too.
        final_states_out: Where to write them, ``(B, D, W - 1)``; a new tensor if absent.
        activation: None, ``"silu"`` or ``"swish"`` (the same).

    Returns:
        The output, ``(B, D, L)`` in the dtype and memory order of ``x``; with ``return_final_states`` also the last
        W - 1 values of ``initial_states`` and ``x``, ``(B, D, W - 1)``.

    Raises:
        ValueError: A shape or device does not fit, or the activation is unknown.
        TypeError: A dtype does not fit.

    Source:
        The public interface of causal_conv1d.
    """
    silu = _is_silu(activation)
    if x.dim() != 3:
        raise ValueError(f"x: expected (B, D, L), got shape {tuple(x.shape)}")
    batch, channels, _ = x.shape
    _check_filter(channels, weight, bias)
    states_shape = (batch, channels, weight.shape[1] - 1)
    if initial_states is not None:
        check_shape("initial_states", initial_states, states_shape)
    if final_states_out is not None:
        check_shape("final_states_out", final_states_out, states_shape)
    tokens = x.transpose(1, 2)
    if tokens.stride(-1) != 1:
        tokens = tokens.contiguous()
    out, final_states = causal_conv1d(
        tokens, weight.unsqueeze(0), None if bias is None else bias.unsqueeze(0), seq_idx,
        None if initial_states is None else initial_states.unsqueeze(1), silu=silu,
    )  # fmt: skip
    out = out.squeeze(2).transpose(1, 2)
    if seq_idx is not None:
        out = out.masked_fill((seq_idx < 0).unsqueeze(1), 0.0)
    if x.stride(1) != 1:
        out = out.contiguous()
    if not return_final_states:
        return out
    final_states = final_states.squeeze(1)
    return out, final_states if final_states_out is None else final_states_out.copy_(final_states)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Convolve the next step (or steps) of sequences whose past is in a state, and update the state in place.

    Args:
        x: Next values, ``(B, D)`` or ``(B, D, L)``.
        conv_state: Past values, ``(B, D, S)`` with S at least W - 1, the newest last; updated in place. With
            ``conv_state_indices`` a cache of any number of states, ``(slots, D, S)``.
        weight: Filters, ``(D, W)`` with W from 2 to 4; the last tap weighs the current step.
        bias: ``(D,)``.
        activation: None, ``"silu"`` or ``"swish"`` (the same).
        cache_seqlens: Steps seen so far, ``(B,)`` int32 or int64: the state is then a circular buffer, in which step t
            of a sequence is at ``t mod S``.
        conv_state_indices: State of each sequence of the batch, ``(B,)`` int32 or int64; a negative index marks
            padding, whose output is 0 and which updates nothing.

    Returns:
        The output, in the shape and dtype of ``x``.

    Raises:
        ValueError: A shape or device does not fit, or the activation is unknown.
        TypeError: A dtype does not fit.

    Source:
        The public interface of causal_conv1d.
    """
    silu = _is_silu(activation)
    _check_update(x, conv_state, weight, bias, cache_seqlens, conv_state_indices)
    steps = x.unsqueeze(-1) if x.dim() == 2 else x
    arguments = (steps, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices)
    needs_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    out = (
        _update(*arguments)
        if needs_gradient or not x.is_cuda
        else torch.ops.visionmamba.causal_conv1d_update(*arguments)
    )
    return out.squeeze(-1) if x.dim() == 2 else out


def _update(steps, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices) -> Tensor:
    """Compute the op ``visionmamba::causal_conv1d_update`` in plain PyTorch: ``steps`` is (B, D, L)."""
    slots = None if conv_state_indices is None else conv_state_indices.long().clamp(min=0)
    state = conv_state if slots is None else conv_state[slots]
    history, new_state = _advance(steps, state, weight.shape[1] - 1, cache_seqlens)
    out = _convolve(history, weight, bias, silu).to(steps.dtype)
    if slots is None:
        _write(conv_state, new_state)
    else:
        padding = conv_state_indices < 0
        out = out.masked_fill(padding[:, None, None], 0.0)
        _write_slots(conv_state, slots, padding, torch.where(padding[:, None, None], state, new_state))
    return out


register_implementation(Implementation("causal_conv1d_update", "torch", (), _update))
register_implementation(
    Implementation(
        "causal_conv1d_update", "cuda", ("cuda",), _cuda_update.conv_update, None, cuda_runtime.usable,
        _cuda_update.conv_update_supports, (cuda_runtime.KernelError,),
    )
)  # fmt: skip


@torch.library.custom_op(
    "visionmamba::causal_conv1d_update",
    mutates_args=("conv_state",),
    schema=(
        "(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, bool silu, Tensor? cache_seqlens, "
        "Tensor? conv_state_indices) -> Tensor"
    ),
)
def _causal_conv1d_update(x, conv_state, *others):
    return select("causal_conv1d_update", x.device.type, x, conv_state, *others).forward(x, conv_state, *others)


@_causal_conv1d_update.register_fake
def _(x, conv_state, *others):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _check_update(x, conv_state, weight, bias, cache_seqlens, conv_state_indices) -> None:
    if x.dim() not in (2, 3):
        raise ValueError(f"x: expected (B, D) or (B, D, L), got shape {tuple(x.shape)}")
    check_dtype("x", x)
    batch, channels = x.shape[:2]
    _check_filter(channels, weight, bias)
    slots = batch if conv_state_indices is None else "slots"
    fits = conv_state.dim() == 3 and conv_state.shape[1] == channels and conv_state.shape[2] >= weight.shape[1] - 1
    if not fits or (conv_state_indices is None and conv_state.shape[0] != batch):
        raise ValueError(
            f"conv_state: expected ({slots}, {channels}, S) with S at least {weight.shape[1] - 1}, "
            f"got shape {tuple(conv_state.shape)}"
        )
    for name, index in (("cache_seqlens", cache_seqlens), ("conv_state_indices", conv_state_indices)):
        if index is not None:
            check_shape(name, index, (batch,))
            check_dtype(name, index, _INDEX_DTYPES)
    check_same_device(
        x=x, conv_state=conv_state, weight=weight, bias=bias, cache_seqlens=cache_seqlens,
        conv_state_indices=conv_state_indices,
    )  # fmt: skip


def _advance(steps: Tensor, state: Tensor, past: int, cache_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the ``past`` values before the new steps and the steps, (B, D, past + L), and the state after them."""
    size = state.shape[2]
    if cache_seqlens is None:
        history = torch.cat([state.to(steps.dtype), steps], dim=2)
        new_state = torch.cat([state, steps.to(state.dtype)], dim=2)[:, :, -size:]
        return history[:, :, size - past :], new_state
    first = cache_seqlens.long().unsqueeze(1)

    def places(start: int, stop: int) -> Tensor:  # (B, D, stop - start) places in the buffer
        offsets = torch.arange(start, stop, device=state.device)
        return ((first + offsets) % size).unsqueeze(1).expand(-1, state.shape[1], -1)

    history = torch.cat([state.gather(2, places(-past, 0)).to(steps.dtype), steps], dim=2)
    length = steps.shape[2]
    kept = min(length, size)
    newest = steps[:, :, length - kept :].to(state.dtype)
    return history, state.scatter(2, places(length - kept, length), newest)


def _convolve(history: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Convolve (B, D, W - 1 + L) to (B, D, L) in float32 or wider."""
    dtype = torch.promote_types(history.dtype, torch.float32)
    windows = history.to(dtype).unfold(2, weight.shape[1], 1)  # (B, D, L, W)
    out = (windows * weight.to(dtype).unsqueeze(1)).sum(-1)
    if bias is not None:
        out = out + bias.to(dtype).unsqueeze(1)
    return F.silu(out) if silu else out


@torch.no_grad()
def _write(conv_state: Tensor, new_state: Tensor) -> None:
    conv_state.copy_(new_state)


@torch.no_grad()
def _write_slots(conv_state: Tensor, slots: Tensor, padding: Tensor, new_state: Tensor) -> None:
    """Write rows into their slots; padding rows repeat the first real row, so that no slot gets two values.

    Selecting the real rows instead would make the shapes depend on the data, which CUDA graphs cannot capture.
    """
    if slots.numel() == 0:
        return
    rows = torch.arange(len(slots), device=slots.device)
    rows = torch.where(padding, padding.logical_not().int().argmax(), rows)
    conv_state.index_copy_(0, slots[rows], new_state[rows])


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """Take the last values of each of several sequences that lie one after the other, as states to go on from.

    Args:
        x: The sequences, ``(T, D)``.
        cu_seqlens: Where they begin and end, ``(B + 1,)`` int32 or int64: 0, the end of the first, ..., T.
        state_len: Number of values, S.

    Returns:
        ``(B, D, S)``, the newest last, zero where a sequence is shorter than that.

    Raises:
        ValueError: A shape or device does not fit.
        TypeError: A dtype does not fit.

    Source:
        The public interface of causal_conv1d.
    """
    if x.dim() != 2:
        raise ValueError(f"x: expected (T, D), got shape {tuple(x.shape)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens: expected (B + 1,), got shape {tuple(cu_seqlens.shape)}")
    check_dtype("cu_seqlens", cu_seqlens, _INDEX_DTYPES)
    check_same_device(x=x, cu_seqlens=cu_seqlens)
    ends = cu_seqlens[1:].long().unsqueeze(1)
    index = ends + torch.arange(-state_len, 0, device=x.device)  # (B, S)
    inside = index >= cu_seqlens[:-1].long().unsqueeze(1)
    padded = F.pad(x, (0, 0, 1, 0))  # row 0 holds zeros
    return padded[torch.where(inside, index + 1, 0)].transpose(1, 2)
