"""The selective scan in plain PyTorch, for any device: the fallback.

The recurrence ``h_t = a_t h_{t-1} + b_t`` over a block of steps is cut into about sqrt(T) rows of sqrt(T) steps. All
rows advance together, one step at a time, from a zero state; then the rows pass their state on. That is 2 sqrt(T)
PyTorch calls instead of T. Backward is the same recurrence in reverse on the adjoint g_t = C_t dy_t + a_{t+1} g_{t+1}.
Only the states at the beginning of each block are kept between the two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..backend import Implementation, register_implementation
from ..scan_path import scan_order

__all__ = ["backward", "forward"]

_BLOCK_ELEMENTS = 1 << 22
"""States (B, K, T, D, N) that one block of steps may hold at once."""


@dataclass
class _Block:
    """A block of T steps, gathered into path order."""

    token: torch.Tensor  # (K, T) token visited, 0 where there is none
    row: torch.Tensor  # (K, T) row of delta, B and C
    valid: torch.Tensor  # (K, T, 1)
    u: torch.Tensor  # (B, K, T, D)
    pre: torch.Tensor  # (B, K, T, D) delta + bias, before softplus
    step: torch.Tensor  # (B, K, T, D) Delta, 0 where there is no token
    a: torch.Tensor  # (B, K, T, D, N) exp(Delta A)
    B: torch.Tensor  # (B, K, T, N)
    C: torch.Tensor  # (B, K, T, N)


def _gather(x: torch.Tensor, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Take rows ``index`` (K, T) of ``x``, (B, L, C) or (B, L, K, C), as (B, K, T, C)."""
    if x.dim() == 3:
        return x[:, index].to(dtype)
    directions = torch.arange(x.shape[2], device=x.device).unsqueeze(1)
    return x[:, index, directions].to(dtype)


def _scatter_add(out: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> None:
    """Add ``values`` (B, K, T, C) to rows ``index`` (K, T) of ``out``, (B, L, C) or (B, L, K, C), in place."""
    for k in range(index.shape[0]):
        target = out if out.dim() == 3 else out[:, :, k]
        target.index_add_(1, index[k], values[:, k])


def _linear_scan_(a: torch.Tensor, b: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Solve h_t = a_t h_{t-1} + b_t along dimension 2 of (B, K, T, D, N); overwrites a and b, returns all h_t."""
    steps = a.shape[2]
    length = max(1, math.isqrt(steps))
    rows = -(-steps // length)
    if rows * length != steps:
        extra = (0, 0, 0, 0, 0, rows * length - steps)
        a, b = F.pad(a, extra, value=1.0), F.pad(b, extra)
    a, b = (x.unflatten(2, (rows, length)) for x in (a, b))
    for j in range(1, length):
        b[:, :, :, j].addcmul_(a[:, :, :, j], b[:, :, :, j - 1])
        a[:, :, :, j].mul_(a[:, :, :, j - 1])
    for i in range(rows):
        b[:, :, i].addcmul_(a[:, :, i], h.unsqueeze(2))
        h = b[:, :, i, -1]
    return b.flatten(2, 3)[:, :, :steps]


class _Scan:
    """The arguments of one call, and its walk over blocks of steps."""

    def __init__(self, u, delta, A, B, C, D, delta_bias, dt_weight, path, grid, delta_softplus, in_step_order):
        dtype = torch.promote_types(u.dtype, torch.float32)
        self.dtype, self.u, self.B, self.C = dtype, u, B, C
        self.A = A.to(dtype)
        self.D = None if D is None else D.to(dtype)
        self.dt_weight = None if dt_weight is None else dt_weight.to(dtype)
        self.bias = None if delta_bias is None else delta_bias.to(dtype)
        self.delta, self.delta_softplus, self.in_step_order = delta, delta_softplus, in_step_order
        self.order = scan_order(path, tuple(grid), u.device).long()
        directions, channels, states = A.shape
        self.num_steps = self.order.shape[1]
        length = max(1, _BLOCK_ELEMENTS // max(1, u.shape[0] * directions * channels * states))
        self.starts = range(0, self.num_steps, min(self.num_steps, length))

    def block(self, start: int) -> _Block:
        order = self.order[:, start : start + self.starts.step]
        token = order.clamp(min=0)
        row = token
        if self.in_step_order:
            row = torch.arange(start, start + order.shape[1], device=order.device).expand_as(order)
        valid = (order >= 0).unsqueeze(-1)
        pre = _gather(self.delta, row, self.dtype)
        if self.dt_weight is not None:
            pre = pre @ self.dt_weight.transpose(1, 2)  # (B, K, T, R) x (K, R, D)
        if self.bias is not None:
            pre = pre + self.bias.unsqueeze(1)
        step = (F.softplus(pre) if self.delta_softplus else pre) * valid
        a = torch.exp(step.unsqueeze(-1) * self.A.unsqueeze(1))
        u, B, C = (_gather(x, i, self.dtype) for x, i in ((self.u, token), (self.B, row), (self.C, row)))
        return _Block(token, row, valid, u, pre, step, a, B, C)

    @staticmethod
    def states(block: _Block, h: torch.Tensor) -> torch.Tensor:
        """h_t of every step of the block, (B, K, T, D, N), from the state before it."""
        drive = (block.step * block.u).unsqueeze(-1) * block.B.unsqueeze(-2)
        return _linear_scan_(block.a.clone(), drive, h)

    def outputs(self, block: _Block, h: torch.Tensor) -> torch.Tensor:
        """y_t of every step of the block, (B, K, T, D); 0 where there is no token."""
        y = (h @ block.C.unsqueeze(-1)).squeeze(-1)
        if self.D is not None:
            y = y + self.D.unsqueeze(1) * block.u
        return y * block.valid

    def initial_state(self, initial_state: torch.Tensor | None) -> torch.Tensor:
        if initial_state is not None:
            return initial_state.to(self.dtype)
        return self.u.new_zeros((self.u.shape[0], *self.A.shape), dtype=self.dtype)

    def empty_output(self, merge: bool) -> torch.Tensor:
        batch, num_tokens = self.u.shape[:2]
        directions, channels, _ = self.A.shape
        shape = (batch, num_tokens, channels) if merge else (batch, num_tokens, directions, channels)
        return self.u.new_zeros(shape, dtype=self.dtype)


def _gate(z: torch.Tensor, dim: int) -> torch.Tensor:
    return z if z.dim() == dim else z.unsqueeze(2)


def forward(
    u, delta, A, B, C, D, z, delta_bias, dt_weight, initial_state, path, grid, delta_softplus, merge, in_step_order
):
    """Compute the op ``visionmamba::selective_scan``; see :func:`visionmamba.ops.selective_scan`."""
    scan = _Scan(u, delta, A, B, C, D, delta_bias, dt_weight, path, grid, delta_softplus, in_step_order)
    y, h = scan.empty_output(merge), scan.initial_state(initial_state)
    for start in scan.starts:
        block = scan.block(start)
        states = scan.states(block, h)
        h = states[:, :, -1]
        _scatter_add(y, block.token, scan.outputs(block, states))
    if z is not None:
        y = y * F.silu(_gate(z, y.dim()).to(scan.dtype))
    return y.to(u.dtype), h.contiguous()


def _gate_backward(dy, y, z):
    """Return the gradients of y and z for out = y silu(z)."""
    gate = _gate(z, dy.dim()).to(dy.dtype)
    sigmoid = torch.sigmoid(gate)
    dz = dy * y * sigmoid * (1 + gate * (1 - sigmoid))
    return dy * gate * sigmoid, dz if z.dim() == dy.dim() else dz.sum(2)


def backward(
    dy, dlast, u, delta, A, B, C, D, z, delta_bias, dt_weight, initial_state, path, grid, delta_softplus, merge,
    in_step_order,
):  # fmt: skip
    """Compute the gradients of :func:`forward`'s ten tensor arguments; None for absent ones."""
    scan = _Scan(u, delta, A, B, C, D, delta_bias, dt_weight, path, grid, delta_softplus, in_step_order)
    dy = dy.to(scan.dtype)
    carries, h = [], scan.initial_state(initial_state)
    y = scan.empty_output(merge) if z is not None else None
    for start in scan.starts:
        carries.append(h)
        block = scan.block(start)
        states = scan.states(block, h)
        h = states[:, :, -1].clone()
        if y is not None:
            _scatter_add(y, block.token, scan.outputs(block, states))
    dz = None
    if z is not None:
        dy, dz = _gate_backward(dy, y, z)

    du, dB, dC = (torch.zeros_like(x, dtype=scan.dtype) for x in (u, B, C))
    ddelta = torch.zeros_like(delta, dtype=scan.dtype)
    dA = torch.zeros_like(scan.A)
    dD = None if D is None else torch.zeros_like(scan.D)
    dbias = None if delta_bias is None else torch.zeros_like(scan.bias)
    ddt_weight = None if dt_weight is None else torch.zeros_like(scan.dt_weight)
    g = torch.zeros_like(h) if dlast is None else dlast.to(scan.dtype)
    for start, carry in zip(reversed(scan.starts), reversed(carries), strict=True):
        block = scan.block(start)
        states = scan.states(block, carry)
        dy_t = _gather(dy, block.token, scan.dtype) * block.valid
        # g_t = C_t dy_t + a_{t+1} g_{t+1}: the forward recurrence on flipped steps, decays shifted by one
        decay = torch.cat([block.a[:, :, 1:], torch.ones_like(block.a[:, :, :1])], dim=2).flip(2)
        adjoint = _linear_scan_(decay, (dy_t.unsqueeze(-1) * block.C.unsqueeze(-2)).flip(2), g).flip(2)
        g = block.a[:, :, 0] * adjoint[:, :, 0]

        stepped = block.step * block.u
        dstepped = (adjoint @ block.B.unsqueeze(-1)).squeeze(-1)
        _scatter_add(dB, block.row, torch.einsum("bktdn,bktd->bktn", adjoint, stepped) * block.valid)
        _scatter_add(dC, block.row, torch.einsum("bktdn,bktd->bktn", states, dy_t))
        du_t = dstepped * block.step
        if scan.D is not None:
            du_t = du_t + scan.D.unsqueeze(1) * dy_t
            dD += torch.einsum("bktd,bktd->kd", dy_t, block.u)
        _scatter_add(du, block.token, du_t * block.valid)

        previous = torch.cat([carry.unsqueeze(2), states[:, :, :-1]], dim=2)
        decay_gradient = adjoint.mul_(previous).mul_(block.a)  # dL/d(Delta A)
        dA += torch.einsum("bktdn,bktd->kdn", decay_gradient, block.step)
        dstep = torch.einsum("bktdn,kdn->bktd", decay_gradient, scan.A) + dstepped * block.u
        dpre = dstep * block.valid * (torch.sigmoid(block.pre) if delta_softplus else 1.0)
        if dbias is not None:
            dbias += dpre.sum((0, 2))
        if ddt_weight is not None:
            ddt_weight += torch.einsum("bktd,bktr->kdr", dpre, _gather(delta, block.row, scan.dtype))
            dpre = dpre @ scan.dt_weight
        _scatter_add(ddelta, block.row, dpre)
    return du, ddelta, dA, dB, dC, dD, dz, dbias, ddt_weight, None if initial_state is None else g


register_implementation(Implementation("selective_scan", "torch", (), forward, backward))
