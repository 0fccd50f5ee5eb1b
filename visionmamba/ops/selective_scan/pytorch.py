"""The selective scan in plain PyTorch, for any device: the fallback.

Where a step is large enough to hide the cost of a PyTorch call, the recurrence ``h_t = a_t h_{t-1} + b_t`` over a block
of steps is walked one step at a time. Elsewhere it is cut into about sqrt(T) rows of sqrt(T) steps: all rows advance
together from a zero state, then pass their state on, which takes 2 sqrt(T) calls instead of T, and three times the
memory traffic. Backward is the same recurrence in reverse on the adjoint g_t = C_t dy_t + a_{t+1} g_{t+1}. Only the
states at the beginning of each block are kept between the two. Channels are the fastest dimension of every state.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..backend import Implementation, register_implementation
from ..scan_path import gather_steps, scan_order, scatter_steps_

__all__ = ["backward", "forward", "scan_states_"]

_BLOCK_ELEMENTS = 1 << 21
"""States (B, K, T, N, D) that one block of steps may hold at once."""

_STEP_ELEMENTS = 4096
"""States (B, K, N, D) of one step from which on a CPU walks step by step."""


_scratch = threading.local()


def _buffer(name: str, shape: tuple[int, ...], like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return uninitialised memory of this thread; on a CPU kept from call to call, where fresh pages are dear."""
    size = math.prod(shape)
    if like.device.type != "cpu" or size > _BLOCK_ELEMENTS:
        return like.new_empty(shape, dtype=dtype)
    kept = _scratch.__dict__.setdefault((name, dtype), [])
    if not kept or kept[0].numel() < size:
        kept[:] = [torch.empty(size, dtype=dtype)]
    return kept[0][:size].view(shape)


@dataclass
class _Block:
    """A block of T steps, gathered into path order."""

    token: torch.Tensor  # (K, T) token visited, 0 where there is none
    row: torch.Tensor  # (K, T) row of delta, B and C
    valid: torch.Tensor  # (K, T, 1)
    u: torch.Tensor  # (B, K, T, D)
    pre: torch.Tensor  # (B, K, T, D) delta + bias, before softplus
    step: torch.Tensor  # (B, K, T, D) Delta, 0 where there is no token
    a: torch.Tensor  # (B, K, T, N, D) exp(Delta A)
    B: torch.Tensor  # (B, K, T, N)
    C: torch.Tensor  # (B, K, T, N)


def _walk_rows_(a: torch.Tensor, b: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Solve h_t = a_t h_{t-1} + b_t along dimension 2 of (B, K, T, N, D) by rows of steps; overwrites a and b."""
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


def _by_steps(h: torch.Tensor) -> bool:
    """Whether one step's states are enough work for a call."""
    return h.device.type == "cpu" and h.numel() >= _STEP_ELEMENTS


def scan_states_(a: torch.Tensor, b: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Return all h_t = a_t h_{t-1} + b_t of a block (B, K, T, N, D) from the state before it; overwrites b."""
    if not _by_steps(h):
        return _walk_rows_(a.clone(), b, h)
    for a_t, b_t in zip(a.unbind(2), b.unbind(2), strict=True):
        h = b_t.addcmul_(a_t, h)
    return b


def _adjoint(a: torch.Tensor, b: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Return all g_t = b_t + a_{t+1} g_{t+1} of a block, where the last takes ``g`` as it is; overwrites b."""
    if not _by_steps(g):
        decay = torch.cat([a[:, :, 1:], torch.ones_like(a[:, :, :1])], dim=2).flip(2)
        return _walk_rows_(decay, b.flip(2), g).flip(2)
    later, b_steps = a.unbind(2), b.unbind(2)
    adjoint = b_steps[-1].add_(g)
    for t in range(len(b_steps) - 2, -1, -1):
        adjoint = b_steps[t].addcmul_(later[t + 1], adjoint)
    return b


class _Scan:
    """The arguments of one call, and its walk over blocks of steps."""

    def __init__(self, u, delta, A, B, C, D, delta_bias, dt_weight, path, grid, delta_softplus, in_step_order):
        dtype = torch.promote_types(u.dtype, torch.float32)
        self.dtype, self.u, self.B, self.C = dtype, u, B, C
        self.A = A.to(dtype).transpose(1, 2).contiguous()  # (K, N, D)
        self.D = None if D is None else D.to(dtype)
        self.dt_weight = None if dt_weight is None else dt_weight.to(dtype)
        self.bias = None if delta_bias is None else delta_bias.to(dtype)
        self.delta, self.delta_softplus, self.in_step_order = delta, delta_softplus, in_step_order
        self.order = scan_order(path, tuple(grid), u.device).long()
        directions, channels, states = A.shape
        self.num_steps = self.order.shape[1]
        length = max(1, _BLOCK_ELEMENTS // max(1, u.shape[0] * directions * channels * states))
        self.starts = range(0, self.num_steps, min(self.num_steps, length))

    def product(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return x y, (B, K, T, N, D), in the buffer ``name``."""
        _, states, channels = self.A.shape
        return torch.mul(x, y, out=_buffer(name, (*x.shape[:3], states, channels), x, self.dtype))

    def block(self, start: int) -> _Block:
        order = self.order[:, start : start + self.starts.step]
        token = order.clamp(min=0)
        row = token
        if self.in_step_order:
            row = torch.arange(start, start + order.shape[1], device=order.device).expand_as(order)
        valid = (order >= 0).unsqueeze(-1)
        pre = gather_steps(self.delta, row).to(self.dtype)
        if self.dt_weight is not None:
            pre = pre @ self.dt_weight.transpose(1, 2)  # (B, K, T, R) x (K, R, D)
        if self.bias is not None:
            pre.add_(self.bias.unsqueeze(1))
        step = (F.softplus(pre) if self.delta_softplus else pre) * valid
        a = self.product("a", step.unsqueeze(-2), self.A.unsqueeze(1)).exp_()
        u, B, C = (gather_steps(x, i).to(self.dtype) for x, i in ((self.u, token), (self.B, row), (self.C, row)))
        return _Block(token, row, valid, u, pre, step, a, B, C)

    def states(self, block: _Block, h: torch.Tensor) -> torch.Tensor:
        """h_t of every step of the block, (B, K, T, N, D), from the state before it."""
        drive = self.product("states", (block.step * block.u).unsqueeze(-2), block.B.unsqueeze(-1))
        return scan_states_(block.a, drive, h)

    def outputs(self, block: _Block, h: torch.Tensor) -> torch.Tensor:
        """y_t of every step of the block, (B, K, T, D); 0 where there is no token."""
        y = (block.C.unsqueeze(-2) @ h).squeeze(-2)
        if self.D is not None:
            y.addcmul_(self.D.unsqueeze(1), block.u)
        return y.mul_(block.valid)

    def initial_state(self, initial_state: torch.Tensor | None) -> torch.Tensor:
        if initial_state is not None:
            return initial_state.to(self.dtype).transpose(2, 3)
        return self.u.new_zeros((self.u.shape[0], *self.A.shape), dtype=self.dtype)

    def empty_output(self, merge: bool) -> torch.Tensor:
        batch, num_tokens = self.u.shape[:2]
        directions, _, channels = self.A.shape
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
        h = states[:, :, -1].clone()
        scatter_steps_(y, block.token, scan.outputs(block, states))
    if z is not None:
        y = y * F.silu(_gate(z, y.dim()).to(scan.dtype))
    return y.to(u.dtype), h.transpose(2, 3).contiguous()


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
            scatter_steps_(y, block.token, scan.outputs(block, states))
    dz = None
    if z is not None:
        dy, dz = _gate_backward(dy, y, z)

    du, dB, dC = (torch.zeros_like(x, dtype=scan.dtype) for x in (u, B, C))
    ddelta = torch.zeros_like(delta, dtype=scan.dtype)
    dA = torch.zeros_like(scan.A)
    dD = None if D is None else torch.zeros_like(scan.D)
    dbias = None if delta_bias is None else torch.zeros_like(scan.bias)
    ddt_weight = None if dt_weight is None else torch.zeros_like(scan.dt_weight)
    g = torch.zeros_like(h) if dlast is None else dlast.to(scan.dtype).transpose(2, 3)
    for start, carry in zip(reversed(scan.starts), reversed(carries), strict=True):
        block = scan.block(start)
        states = scan.states(block, carry)
        dy_t = gather_steps(dy, block.token).mul_(block.valid)
        # g_t = C_t dy_t + a_{t+1} g_{t+1}
        drive = scan.product("adjoint", dy_t.unsqueeze(-2), block.C.unsqueeze(-1))
        adjoint = _adjoint(block.a, drive, g)
        g = block.a[:, :, 0] * adjoint[:, :, 0]

        stepped = block.step * block.u
        dstepped = (block.B.unsqueeze(-2) @ adjoint).squeeze(-2)
        scatter_steps_(dB, block.row, (adjoint @ stepped.unsqueeze(-1)).squeeze(-1) * block.valid)
        scatter_steps_(dC, block.row, (states @ dy_t.unsqueeze(-1)).squeeze(-1))
        du_t = dstepped * block.step
        if scan.D is not None:
            du_t = du_t + scan.D.unsqueeze(1) * dy_t
            dD += torch.einsum("bktd,bktd->kd", dy_t, block.u)
        scatter_steps_(du, block.token, du_t * block.valid)

        adjoint[:, :, 1:].mul_(states[:, :, :-1])  # the state before each step
        adjoint[:, :, 0].mul_(carry)
        decay_gradient = adjoint.mul_(block.a)  # dL/d(Delta A)
        dA += torch.einsum("bktnd,bktd->knd", decay_gradient, block.step)
        dstep = decay_gradient.mul_(scan.A.unsqueeze(1)).sum(-2) + dstepped * block.u
        dpre = dstep * block.valid * (torch.sigmoid(block.pre) if delta_softplus else 1.0)
        if dbias is not None:
            dbias += dpre.sum((0, 2))
        if ddt_weight is not None:
            ddt_weight += torch.einsum("bktd,bktr->kdr", dpre, gather_steps(delta, block.row).to(scan.dtype))
            dpre = dpre @ scan.dt_weight
        scatter_steps_(ddelta, block.row, dpre)
    dinitial_state = None if initial_state is None else g.transpose(2, 3)
    return du, ddelta, dA.transpose(1, 2), dB, dC, dD, dz, dbias, ddt_weight, dinitial_state


register_implementation(Implementation("selective_scan", "torch", (), forward, backward))
