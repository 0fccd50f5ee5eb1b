"""The selective scan in plain PyTorch, for any device: the fallback.

The recurrence ``h_t = a_t h_{t-1} + b_t`` over a block of steps is walked step by step on a CPU where a step is large
enough to hide the cost of a PyTorch call. Elsewhere it is cut into rows of about sqrt(T) steps: all rows advance
together, one step at a time, from a zero state; then each passes its last state to the next, and that state is added to
all its steps with the decay since. That takes about 3 sqrt(T) calls instead of T, and three times the memory traffic.
Backward is the same recurrence in reverse on the adjoint g_t = C_t dy_t + a_{t+1} g_{t+1}. Only the
states at the beginning of each block are kept between the two. Channels are the fastest dimension of every state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch

from .._gate import apply_gate, gate_backward
from .._scratch import scratch
from ..backend import Implementation, register_implementation
from ..scan_path import direction_rows, gather_steps, scan_rows, scatter_steps_, steps_to_tokens, visited_steps

__all__ = ["backward", "forward", "scan_states_"]

_BLOCK_ELEMENTS = 1 << 22
"""States (B, K, T, N, D) that one block of steps may hold at once."""

_STEP_ELEMENTS = 4096
"""States (B, K, N, D) of one step from which on a CPU walks step by step."""


@dataclass
class _Block:
    """A block of T steps, gathered into path order."""

    token: torch.Tensor  # (K, T) token visited, 0 where there is none
    row: torch.Tensor  # (K, T) row of delta, B and C
    visited: torch.Tensor | None  # (K, T, 1), 0 where there is no token; None if there is one everywhere
    u: torch.Tensor  # (B, K, T, D)
    pre: torch.Tensor  # (B, K, T, D) delta + bias, before softplus
    step: torch.Tensor  # (B, K, T, D) Delta, 0 where there is no token
    a: torch.Tensor  # (B, K, T, N, D) exp(Delta A)
    B: torch.Tensor  # (B, K, T, N)
    C: torch.Tensor  # (B, K, T, N)


_Steps = list[tuple[torch.Tensor, torch.Tensor]]


def _walk_(steps: _Steps, h: torch.Tensor) -> list[torch.Tensor]:
    """Overwrite each step's input b by ``h = a h + b``; returns the states before each step, and the last."""
    states = [h]
    for a, b in steps:
        states.append(b.addcmul_(a, states[-1]))
    return states


def _walk_rows_(columns: _Steps, h: torch.Tensor) -> torch.Tensor:
    """Solve the recurrence for rows of steps; ``columns[j]`` holds the j-th step (B, K, rows, N, D) of every row."""
    for (a_before, b_before), (a, b) in pairwise(columns):
        b.addcmul_(a, b_before)
        a.mul_(a_before)
    states = _walk_(list(zip(*(x.unbind(2) for x in columns[-1]), strict=True)), h)
    before = torch.stack(states[:-1], dim=2)
    for a, b in columns[:-1]:
        b.addcmul_(a, before)
    return states[-1]


def scan_states_(a: torch.Tensor, b: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Solve ``h_t = a_t h_{t-1} + b_t`` along dimension 2.

    Args:
        a: Decays ``(B, K, T, N, D)``; overwritten.
        b: Inputs ``(B, K, T, N, D)``; overwritten by the result.
        h: State before the first step, ``(B, K, N, D)``.

    Returns:
        ``b``, which now holds every h_t.
    """
    if h.device.type == "cpu" and h.numel() >= _STEP_ELEMENTS:
        decays, states = a.unbind(2), b.unbind(2)
        states[0].addcmul_(decays[0], h)
        # on a CPU a list operation is a loop over the list, in its order: each step finds the one before it done
        if len(states) > 1:
            torch._foreach_addcmul_(states[1:], decays[1:], states[:-1])
        return b
    steps = a.shape[2]
    length = math.isqrt(steps)
    whole = steps - steps % length
    rows = (x[:, :, :whole].unflatten(2, (-1, length)).unbind(3) for x in (a, b))
    h = _walk_rows_(list(zip(*rows, strict=True)), h)
    _walk_(list(zip(*(x[:, :, whole:].unbind(2) for x in (a, b)), strict=True)), h)
    return b


def _adjoint_states_(a: torch.Tensor, b: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Return every ``g_t = b_t + a_{t+1} g_{t+1}``, where the last step takes ``g`` as it is; may overwrite b."""
    if b.device.type == "cpu" and g.numel() >= _STEP_ELEMENTS:
        b[:, :, -1].add_(g)
        _walk_(list(zip(a.unbind(2)[:0:-1], b.unbind(2)[-2::-1], strict=True)), b[:, :, -1])
        return b
    decay = torch.cat([a[:, :, 1:], torch.ones_like(a[:, :, :1])], dim=2).flip(2)
    return scan_states_(decay, b.flip(2), g).flip(2)


def _masked(x: torch.Tensor, visited: torch.Tensor | None) -> torch.Tensor:
    """Return x with 0 where there is no token."""
    return x if visited is None else x * visited


class _Scan:
    """The arguments of one call, and its walk over blocks of steps."""

    def __init__(self, u, delta, A, B, C, D, delta_bias, dt_weight, path, grid, delta_softplus, in_step_order):
        dtype = torch.promote_types(u.dtype, torch.float32)
        self.dtype, self.u, self.B, self.C = dtype, u, B, C
        self.A = A.to(dtype).transpose(1, 2).contiguous()  # (K, N, D)
        self.D = None if D is None else D.to(dtype)
        self.dt_weight = None if dt_weight is None else dt_weight.to(dtype)
        self.bias = None if delta_bias is None else delta_bias.to(dtype)
        self.delta, self.delta_softplus = delta, delta_softplus
        self.token = scan_rows(path, grid, u.device)
        self.rows_of_u = scan_rows(path, grid, u.device, per_direction=u.dim() == 4)
        self.row, self.rows = self.token, scan_rows(path, grid, u.device, per_direction=True)
        if in_step_order:
            self.row = torch.arange(self.token.shape[1], device=u.device).expand_as(self.token)
            self.rows = direction_rows(delta, self.row)
        self.visited = visited_steps(path, grid, u.device, dtype)
        directions, channels, states = A.shape
        self.num_steps = self.token.shape[1]
        length = max(1, _BLOCK_ELEMENTS // max(1, u.shape[0] * directions * channels * states))
        self.starts = range(0, self.num_steps, min(self.num_steps, length))

    def buffer(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Scratch memory in the scan's dtype."""
        return scratch(name, like.shape, like.device, self.dtype)

    def product(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return x y, (B, K, T, N, D), in the buffer ``name``."""
        _, states, channels = self.A.shape
        return torch.mul(x, y, out=scratch(name, (*x.shape[:3], states, channels), x.device, self.dtype))

    def block(self, start: int) -> _Block:
        steps = slice(start, start + self.starts.step)
        visited = self.visited if self.visited is None else self.visited[:, steps]
        rows = self.rows[:, steps]
        pre = gather_steps(self.delta, rows, self.dtype)
        if self.dt_weight is not None:
            weight = self.dt_weight.transpose(1, 2)
            out = scratch("pre", (*pre.shape[:3], weight.shape[2]), pre.device, self.dtype)
            pre = torch.matmul(pre, weight, out=out)  # (B, K, T, R) x (K, R, D)
        if self.bias is not None:
            pre.add_(self.bias.unsqueeze(1))
        step = pre
        if self.delta_softplus:
            step = torch.ops.aten.softplus.out(pre, out=self.buffer("step", pre))
        step = _masked(step, visited)
        a = self.product("a", step.unsqueeze(-2), self.A.unsqueeze(1)).exp_()
        u = gather_steps(self.u, self.rows_of_u[:, steps], self.dtype, "u")
        B, C = (gather_steps(x, rows, self.dtype) for x in (self.B, self.C))
        return _Block(self.token[:, steps], self.row[:, steps], visited, u, pre, step, a, B, C)

    def states(self, block: _Block, h: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
        """h_t of every step of the block, (B, K, T, N, D), from the state before it; overwrites the copy of a."""
        stepped = torch.mul(block.step, block.u, out=self.buffer("stepped", block.u))
        drive = self.product("states", stepped.unsqueeze(-2), block.B.unsqueeze(-1))
        return scan_states_(decay, drive, h)

    def outputs(self, block: _Block, h: torch.Tensor) -> torch.Tensor:
        """y_t of every step of the block, (B, K, T, D); 0 where there is no token."""
        y = torch.matmul(block.C.unsqueeze(-2), h, out=self.buffer("y", block.u.unsqueeze(-2))).squeeze(-2)
        if self.D is not None:
            y.addcmul_(self.D.unsqueeze(1), block.u)
        return _masked(y, block.visited)

    def initial_state(self, initial_state: torch.Tensor | None) -> torch.Tensor:
        if initial_state is not None:
            return initial_state.to(self.dtype).transpose(2, 3)
        return self.u.new_zeros((self.u.shape[0], *self.A.shape), dtype=self.dtype)

    def empty_output(self, merge: bool) -> torch.Tensor:
        batch, num_tokens = self.u.shape[:2]
        directions, _, channels = self.A.shape
        shape = (batch, num_tokens, channels) if merge else (batch, num_tokens, directions, channels)
        return self.u.new_zeros(shape, dtype=self.dtype)


def forward(
    u, delta, A, B, C, D, z, delta_bias, dt_weight, initial_state, path, grid, delta_softplus, merge, in_step_order
):
    """Compute the op ``visionmamba::selective_scan``; see :func:`visionmamba.ops.selective_scan`."""
    scan = _Scan(u, delta, A, B, C, D, delta_bias, dt_weight, path, grid, delta_softplus, in_step_order)
    h = scan.initial_state(initial_state)
    y = scan.empty_output(merge) if len(scan.starts) > 1 else None
    for start in scan.starts:
        block = scan.block(start)
        states = scan.states(block, h, block.a)
        h = states[:, :, -1].clone()
        out = scan.outputs(block, states)
        if y is not None:
            scatter_steps_(y, block.token, out)
        else:
            y = steps_to_tokens(out, path, grid, "tokens" if merge else None)
            y = y.sum(2) if merge else y
    y = y if z is None else apply_gate(y, z)
    return y.to(u.dtype), h.transpose(2, 3).contiguous()


class _Gradients:
    """The gradients of one call, summed over blocks of steps that are walked from the last to the first.

    Args:
        scan: The call.
        dy: Gradient of the output before the gate, in the scan's dtype.
        dlast: Gradient of the last state, ``(B, K, D, N)``, or None.
    """

    def __init__(self, scan: _Scan, dy: torch.Tensor, dlast: torch.Tensor | None) -> None:
        def zeros(like: torch.Tensor | None) -> torch.Tensor | None:
            return None if like is None else torch.zeros_like(like, dtype=scan.dtype)

        self.scan, self.dy = scan, dy
        self.u, self.delta, self.B, self.C = zeros(scan.u), zeros(scan.delta), zeros(scan.B), zeros(scan.C)
        self.A, self.D, self.bias, self.dt_weight = (
            zeros(scan.A),
            zeros(scan.D),
            zeros(scan.bias),
            zeros(scan.dt_weight),
        )
        self.state = scan.initial_state(None) if dlast is None else dlast.to(scan.dtype).transpose(2, 3)

    def add_block(self, start: int, carry: torch.Tensor) -> None:
        """Add what a block of steps contributes, from the state before it; every later block has been added."""
        scan, block = self.scan, self.scan.block(start)
        decay = scratch("decay", block.a.shape, block.a.device, scan.dtype)
        states = scan.states(block, carry, decay.copy_(block.a))
        dy = _masked(gather_steps(self.dy, direction_rows(self.dy, block.token)), block.visited)
        # g_t = C_t dy_t + a_{t+1} g_{t+1}
        drive = scan.product("adjoint", dy.unsqueeze(-2), block.C.unsqueeze(-1))
        adjoint = _adjoint_states_(block.a, drive, self.state)
        self.state = block.a[:, :, 0] * adjoint[:, :, 0]

        stepped = block.step * block.u
        dstepped = (block.B.unsqueeze(-2) @ adjoint).squeeze(-2)
        scatter_steps_(self.B, block.row, _masked((adjoint @ stepped.unsqueeze(-1)).squeeze(-1), block.visited))
        scatter_steps_(self.C, block.row, (states @ dy.unsqueeze(-1)).squeeze(-1))
        du = dstepped * block.step
        if scan.D is not None:
            du = du + scan.D.unsqueeze(1) * dy
            self.D += torch.einsum("bktd,bktd->kd", dy, block.u)
        scatter_steps_(self.u, block.token, _masked(du, block.visited))

        adjoint[:, :, 1:].mul_(states[:, :, :-1])  # the state before each step
        adjoint[:, :, 0].mul_(carry)
        decay_gradient = adjoint.mul_(block.a)  # dL/d(Delta A)
        self.A += torch.einsum("bktnd,bktd->knd", decay_gradient, block.step)
        self._add_step_sizes(block, decay_gradient.mul_(scan.A.unsqueeze(1)).sum(-2) + dstepped * block.u)

    def _add_step_sizes(self, block: _Block, dstep: torch.Tensor) -> None:
        """Carry the gradient of Delta, (B, K, T, D), through the softplus, the bias and the projection."""
        scan = self.scan
        dpre = _masked(dstep * torch.sigmoid(block.pre) if scan.delta_softplus else dstep, block.visited)
        if scan.bias is not None:
            self.bias += dpre.sum((0, 2))
        if scan.dt_weight is not None:
            dt = gather_steps(scan.delta, direction_rows(scan.delta, block.row), scan.dtype)
            self.dt_weight += torch.einsum("bktd,bktr->kdr", dpre, dt)
            dpre = dpre @ scan.dt_weight
        scatter_steps_(self.delta, block.row, dpre)


def backward(
    dy, dlast, u, delta, A, B, C, D, z, delta_bias, dt_weight, initial_state, path, grid, delta_softplus, merge,
    in_step_order,
):  # fmt: skip
    """Compute the gradients of :func:`forward`'s ten tensor arguments; None for absent ones."""
    scan = _Scan(u, delta, A, B, C, D, delta_bias, dt_weight, path, grid, delta_softplus, in_step_order)
    dy, dz = dy.to(scan.dtype), None
    carries, h = [], scan.initial_state(initial_state)
    y = scan.empty_output(merge) if z is not None else None
    for start in scan.starts:
        carries.append(h)
        block = scan.block(start)
        states = scan.states(block, h, block.a)
        h = states[:, :, -1].clone()
        if y is not None:
            scatter_steps_(y, block.token, scan.outputs(block, states))
    if z is not None:
        dy, dz = gate_backward(dy, y, z)
    gradients = _Gradients(scan, dy, dlast)
    for start, carry in zip(reversed(scan.starts), reversed(carries), strict=True):
        gradients.add_block(start, carry)
    dinitial_state = None if initial_state is None else gradients.state.transpose(2, 3)
    return (
        gradients.u, gradients.delta, gradients.A.transpose(1, 2), gradients.B, gradients.C, gradients.D, dz,
        gradients.bias, gradients.dt_weight, dinitial_state,
    )  # fmt: skip


register_implementation(Implementation("selective_scan", "torch", (), forward, backward))
