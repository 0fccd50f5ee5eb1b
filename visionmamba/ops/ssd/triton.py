"""SSD on GPUs that Triton compiles for: ``kernels/triton/ssd.py``, launched."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .._triton import device_types, power_of_two, probe
from ..backend import Implementation, register_implementation
from ..scan_path import scan_order, scan_path

__all__ = ["backward", "forward"]

_ENOUGH_PROGRAMS = 256
"""Rows times blocks of channels from which on the chunks of a row are walked one after the other."""
_CHUNKS_OF_A_SEGMENT = 16
"""Of rows cut into segments in the backward pass."""
_SPLIT_PROGRAMS = 256
"""Programs of the gradient kernel from which on one of them takes all heads of a group."""


@dataclass(frozen=True)
class _Tiling:
    """Q steps a chunk; channels and states of a block, padded to what matrix units take; warps of a program."""

    chunk: int
    block_p: int
    block_n: int
    warps: int
    shared_warps: int  # of the kernel that sums over heads
    states_warps: int  # of the kernel that walks rows for their states alone


def _tiling(x: Tensor, B: Tensor, num_steps: int, backward: bool) -> _Tiling:
    """Choose block sizes: measured on an H200 for bf16; float32 products take more registers."""
    block_p, block_n = (max(16, power_of_two(size)) for size in (x.shape[-1], B.shape[-1]))
    if not backward:  # channels are independent there
        block_p = min(block_p, 64 if block_n <= 128 else 32)
    size = block_p * block_n
    wide = x.dtype == torch.float32
    if wide:
        longest = 32 if size <= 64 * 64 else 16
    elif backward or block_n > 64:
        longest = 64 if size <= 64 * 128 else 32
    else:
        longest = 128
    chunk = min(longest, max(16, power_of_two(num_steps)))
    warps = 8 if wide or size > 64 * 128 else 4
    return _Tiling(chunk, block_p, block_n, warps, 8 if wide or size > 64 * 64 else 4, 2 if warps == 4 else 8)


def _supports(
    x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, path, grid, softplus, dt_min, dt_max, merge, chunk_size
) -> str | None:
    if x.dtype == torch.float64:
        return "float64"
    largest = 128 * 128 if x.dtype == torch.float32 else 128 * 256
    if max(16, power_of_two(x.shape[-1])) * max(16, power_of_two(B.shape[-1])) > largest:
        return f"a state of {x.shape[-1]} x {B.shape[-1]} a head does not fit into registers"
    if x.numel() == 0:
        return "no tokens"
    return None


def _strides(tensor: Tensor | None, directions: bool) -> tuple[int, int, int, int]:
    """Strides of batch, token, direction and head of (B, L, [K,] H, ...)."""
    if tensor is None:
        return 0, 0, 0, 0
    if directions:
        return tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)
    return tensor.stride(0), tensor.stride(1), 0, tensor.stride(2)


@lru_cache(maxsize=256)
def _visits_all(path: str, grid: tuple[int, ...]) -> bool:
    """Whether every direction of a path visits every token."""
    table = scan_path(path, grid)
    return table.order.shape[1] == table.num_tokens and int(table.order.min()) >= 0


def _last_contiguous(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


class _Call:
    """The arguments of one call as the kernels take them."""

    def __init__(self, x, dt, A, B, C, D, dt_bias, seq_idx, path, grid, softplus, dt_min, dt_max, backward):
        self.x, self.B, self.C = (_last_contiguous(tensor) for tensor in (x, B, C))
        if self.C.dtype != self.B.dtype:
            self.C = self.C.to(self.B.dtype)
        if self.x.dtype != self.B.dtype:
            self.x = self.x.to(self.B.dtype)
        self.dt = dt
        self.A, self.D, self.bias = (
            None if tensor is None else tensor.float().contiguous() for tensor in (A, D, dt_bias)
        )
        self.batch, self.num_tokens, self.head_dim = x.shape[0], x.shape[1], x.shape[-1]
        self.directions, self.heads = A.shape
        self.groups, self.num_states = B.shape[3:]
        self.ratio = self.heads // self.groups
        self.order = scan_order(path, tuple(grid), x.device)
        self.num_steps = self.order.shape[1]
        self.complete = _visits_all(path, tuple(grid))
        self.segment = None if seq_idx is None else self._segments(seq_idx)
        self.tiling = _tiling(self.x, self.B, self.num_steps, backward)
        self.chunks = -(-self.num_steps // self.tiling.chunk)
        self.rows = self.batch * self.directions * self.heads
        self.limits = (float(dt_min), float(dt_max))
        self.precision = "ieee" if self.x.dtype == torch.float32 else "tf32"
        self.options = {
            "Q": self.tiling.chunk, "BLOCK_P": self.tiling.block_p, "BLOCK_N": self.tiling.block_n,
            "BIAS": dt_bias is not None, "PACKED": seq_idx is not None, "SOFTPLUS": softplus,
            "PRECISION": self.precision, "num_warps": self.tiling.warps, "num_stages": 2,
        }  # fmt: skip

    def _segments(self, seq_idx: Tensor) -> Tensor:
        """Number of changes of sequence before each step, (B, K, P) int32; 0 for that of the initial state."""
        along = seq_idx[:, self.order.long().clamp(min=0)]
        changed = torch.diff(along, dim=-1, prepend=torch.zeros_like(along[..., :1])) != 0
        return torch.cumsum(changed & (self.order >= 0), dim=-1, dtype=torch.int32).contiguous()

    def or_any(self, tensor: Tensor | None) -> Tensor:
        """A pointer that is never read where a tensor is absent."""
        return self.A if tensor is None else tensor

    @property
    def sizes_of_rows(self) -> tuple[int, ...]:
        return self.num_steps, self.directions, self.heads, self.ratio

    @property
    def blocks_p(self) -> int:
        return -(-self.head_dim // self.tiling.block_p)

    @cached_property
    def strides(self) -> tuple[int, ...]:
        """Of x, dt, B and C."""
        x = _strides(self.x, self.x.dim() == 5)
        return *x, *_strides(self.dt, True), *_strides(self.B, True), *_strides(self.C, True)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32, filled: bool = True) -> Tensor:
        """An output; zeros where the path leaves tokens out."""
        make = torch.empty if filled else torch.zeros
        return make(shape, dtype=dtype, device=self.x.device)

    def states(
        self, dy: Tensor | None, segments: int, before: Tensor, after: Tensor, initial: Tensor | None = None,
        final: Tensor | None = None, dinitial: Tensor | None = None, through: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Launch ``ssd_states``, which fills ``before`` and, given dy, ``after``; and ``through`` or ``dinitial``."""
        from visionmamba.kernels.triton.ssd import ssd_states

        dy_in = self.x if dy is None else dy
        ssd_states[self.rows, segments, self.blocks_p * (1 if dy is None else 2)](
            self.x, dy_in, self.dt, self.A, self.B, self.C, self.or_any(self.bias), self.order,
            self.or_any(self.segment), self.or_any(initial), self.or_any(final), before, after, self.or_any(dinitial),
            self.or_any(through), *self.sizes_of_rows, -(-self.chunks // segments), segments, self.chunks,
            self.blocks_p, *_strides(dy_in, dy_in.dim() == 5), *self.strides, *self.limits,
            self.head_dim, self.num_states,
            **self.options | {"num_warps": self.tiling.states_warps},
            EACH=through is None, INITIAL=int(initial is not None), FINAL=int(final is not None),
        )  # fmt: skip

    def entering(
        self, dy: Tensor | None, segments: int, initial: Tensor | None, final: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """States that enter segments, (rows, segments, P, N), and given dy the gradients of those that leave them."""
        from visionmamba.kernels.triton.ssd import ssd_pass

        sides = 1 if dy is None else 2
        both = self.new(sides, self.rows, segments, self.head_dim, self.num_states)
        before, after = both[0], both[-1]
        through = self.new(self.rows, segments)
        self.states(dy, segments, before, after, through=through)
        size = self.head_dim * self.num_states
        block = min(256, power_of_two(size))
        ssd_pass[self.rows, -(-size // block), sides](
            before, after, through, self.or_any(initial), self.or_any(final), segments, size,
            BLOCK=block, INITIAL=int(initial is not None), FINAL=int(final is not None), num_warps=2,
        )  # fmt: skip
        return before, after


def _skip(D: Tensor | None) -> int:
    return 0 if D is None else D.dim() - 1


def _segments_of(call: _Call) -> int:
    """Segments that a path is cut into, so that there are enough programs."""
    programs = call.rows * call.blocks_p
    wanted = min(call.chunks, -(-_ENOUGH_PROGRAMS // programs))
    return -(-call.chunks // -(-call.chunks // wanted))


def _run(call: _Call, D, z, initial_states, merge: bool) -> tuple[Tensor, Tensor]:
    """Return y in the layout of the op, before the conversion of its dtype, and the last state."""
    from visionmamba.kernels.triton.ssd import ssd_forward

    segments = _segments_of(call)
    before = None if initial_states is None else initial_states.float().contiguous()
    if segments > 1:
        before, _ = call.entering(None, segments, before, None)
    summed = merge and call.directions > 1
    gate = z is not None and not summed
    middle = (call.directions,) if not merge or summed else ()
    y = call.new(
        call.batch, call.num_tokens, *middle, call.heads, call.head_dim,
        dtype=torch.float32 if summed else call.x.dtype, filled=call.complete,
    )  # fmt: skip
    final = call.new(call.batch, call.directions, call.heads, call.head_dim, call.num_states)
    z_in = _last_contiguous(z) if gate else None
    ssd_forward[call.rows, segments, call.blocks_p](
        call.x, call.dt, call.A, call.B, call.C, call.or_any(call.D), call.or_any(z_in), call.or_any(call.bias),
        call.order, call.or_any(call.segment), call.or_any(before), y, final,
        *call.sizes_of_rows, -(-call.chunks // segments), segments,
        *call.strides, *_strides(z_in, z_in is not None and z_in.dim() == 5), *_strides(y, bool(middle)), *call.limits,
        call.head_dim, call.num_states, **call.options, SKIP=_skip(D), GATE=gate, STATE=before is not None,
    )  # fmt: skip
    if summed:
        y = y.sum(2)
        if z is not None:
            y = y * F.silu(z.float())
    return y, final


def forward(
    x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, path, grid, softplus, dt_min, dt_max, merge, chunk_size
):
    """Compute the op ``visionmamba::ssd``; see :func:`visionmamba.ops.ssd_scan`."""
    call = _Call(x, dt, A, B, C, D, dt_bias, seq_idx, path, grid, softplus, dt_min, dt_max, backward=False)
    y, final = _run(call, D, z, initial_states, merge)
    return y.to(x.dtype), final


def _ungated_gradient(dy, z, x, dt, A, B, C, D, dt_bias, initial_states, seq_idx, options, merge):
    """Gradients of y before the gate and of z; recomputes y."""
    call = _Call(x, dt, A, B, C, D, dt_bias, seq_idx, *options, backward=False)
    y, _ = _run(call, D, None, initial_states, merge)
    dy, y, gate = dy.float(), y.float(), z.float()
    gate = gate if gate.dim() == dy.dim() else gate.unsqueeze(2)
    sigmoid = torch.sigmoid(gate)
    dz = dy * y * sigmoid * (1 + gate * (1 - sigmoid))
    return (dy * gate * sigmoid).to(x.dtype), dz if z.dim() == dy.dim() else dz.sum(2)


@dataclass
class _Backward:
    """What the gradient kernels read: a call, dy in the layout of y, and the states around every chunk."""

    call: _Call
    dy: Tensor
    before: Tensor  # (rows, chunks, P, N) state before the chunk, in the dtype of x
    after: Tensor  # gradient of the state after it
    dinitial: Tensor

    @classmethod
    def prepare(cls, call: _Call, dy: Tensor, initial_states: Tensor | None, dfinal: Tensor | None) -> _Backward:
        dy = _last_contiguous(dy.to(call.x.dtype))
        initial, final = (None if state is None else state.float().contiguous() for state in (initial_states, dfinal))
        segments = 1 if call.rows >= _ENOUGH_PROGRAMS else -(-call.chunks // _CHUNKS_OF_A_SEGMENT)
        if segments > 1:
            initial, final = call.entering(dy, segments, initial, final)
        before, after = (
            call.new(call.rows, call.chunks, call.head_dim, call.num_states, dtype=call.x.dtype) for _ in range(2)
        )
        dinitial = call.new(call.rows, call.head_dim, call.num_states)
        call.states(dy, segments, before, after, initial, final, dinitial)
        return cls(call, dy, before, after, dinitial)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        call = self.call
        return self.dy, call.x, call.dt, call.A, call.B, call.C

    @property
    def strides(self) -> tuple[int, ...]:
        return *_strides(self.dy, self.dy.dim() == 5), *self.call.strides

    def of_heads(self, D: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Launch ``ssd_gradients``: gradients of x (B, L, [K,] H, P), of dt, A, the bias and D."""
        from visionmamba.kernels.triton.ssd import ssd_gradients

        call = self.call
        batch, tokens, directions, heads = call.batch, call.num_tokens, call.directions, call.heads
        shared = call.x.dim() == 4 and directions > 1
        dx = call.new(
            batch, tokens, directions, heads, call.head_dim,
            dtype=torch.float32 if shared else call.x.dtype, filled=call.complete,
        )  # fmt: skip
        ddt = call.new(batch, tokens, directions, heads, dtype=call.dt.dtype, filled=call.complete)
        parts = batch * call.chunks
        dA = call.new(parts, directions, heads)
        dbias = None if call.bias is None else torch.empty_like(dA)
        dD = None if D is None else call.new(parts, *D.shape)
        ssd_gradients[call.rows, call.chunks](
            *self.inputs, call.or_any(call.D), call.or_any(call.bias), call.order, call.or_any(call.segment),
            self.before, self.after, dx, ddt, dA, call.or_any(dbias), call.or_any(dD),
            call.num_steps, tokens, directions, heads, call.ratio, call.chunks, *self.strides, *call.limits,
            call.head_dim, call.num_states, **call.options, SKIP=_skip(D),
        )  # fmt: skip
        summed = (None if part is None else part.sum(0) for part in (dA, dbias, dD))
        return dx.sum(2) if shared else dx.reshape(call.x.shape), ddt, *summed

    def of_groups(self) -> tuple[Tensor, Tensor]:
        """Launch ``ssd_shared_gradients``: gradients of B and C."""
        from visionmamba.kernels.triton.ssd import ssd_shared_gradients

        call = self.call
        batch, tokens, directions = call.batch, call.num_tokens, call.directions
        groups = batch * directions * call.groups
        splits = min(call.ratio, -(-_SPLIT_PROGRAMS // (groups * call.chunks)))
        heads_per_program = -(-call.ratio // splits)
        splits = -(-call.ratio // heads_per_program)
        dtype = torch.float32 if splits > 1 else call.B.dtype
        dB, dC = (
            call.new(batch, tokens, splits, directions, call.groups, call.num_states, dtype=dtype, filled=call.complete)
            for _ in range(2)
        )  # fmt: skip
        ssd_shared_gradients[groups * splits, call.chunks](
            *self.inputs, call.or_any(call.bias), call.order, call.or_any(call.segment), self.before, self.after,
            dB, dC, call.num_steps, tokens, directions, call.heads, call.groups, call.ratio, heads_per_program,
            splits, call.chunks, *self.strides, *call.limits, call.head_dim, call.num_states,
            **call.options | {"num_warps": call.tiling.shared_warps},
        )  # fmt: skip
        return (dB.sum(2), dC.sum(2)) if splits > 1 else (dB.squeeze(2), dC.squeeze(2))


def backward(
    dy, dfinal, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, path, grid, softplus, dt_min, dt_max, merge,
    chunk_size,
):  # fmt: skip
    """Compute the gradients of :func:`forward`'s nine floating-point tensors; None for absent ones."""
    options = (path, grid, softplus, dt_min, dt_max)
    dz = None
    if z is not None:
        dy, dz = _ungated_gradient(dy, z, x, dt, A, B, C, D, dt_bias, initial_states, seq_idx, options, merge)
    call = _Call(x, dt, A, B, C, D, dt_bias, seq_idx, *options, backward=True)
    gradients = _Backward.prepare(call, dy, initial_states, dfinal)
    dx, ddt, dA, dbias, dD = gradients.of_heads(D)
    dB, dC = gradients.of_groups()
    dinitial = None if initial_states is None else gradients.dinitial.reshape(initial_states.shape)
    return dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial


register_implementation(Implementation("ssd", "triton", device_types(), forward, backward, probe, _supports))
