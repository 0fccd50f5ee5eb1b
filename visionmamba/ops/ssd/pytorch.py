"""SSD in plain PyTorch, for any device: chunks of steps as matrix products, states carried from chunk to chunk.

Inside a chunk of Q steps the recurrence is a masked attention (Dao & Gu 2024, section 6)::

    y = (C B^T * decay * Delta) x + exp(s) C h^T      decay_ij = exp(s_i - s_j), i >= j;  s = cumsum(Delta A)
    h <- exp(s_Q) h + (exp(s_Q - s) Delta x)^T B

with h the state before the chunk. Backward recomputes the states before each chunk and differentiates these two lines
by hand. Gradients of the decays are sums of terms that are never subtracted from each other, unlike differences of row
and column sums. No atomics: the result does not depend on the run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..backend import Implementation, register_implementation
from ..scan_path import direction_rows, gather_steps, scan_order, scatter_steps_

__all__ = ["backward", "forward"]

_MAX_CHUNK = 64
"""Longest chunk on this backend: the work inside a chunk grows with its square."""


@dataclass
class _Chunk:
    """Q steps of every direction, in path order. S = K G groups; R = H / G heads of a group."""

    token: torch.Tensor  # (K, Q) token visited, 0 where there is none
    visited: torch.Tensor  # (K, Q, 1) whether there is one
    x: torch.Tensor  # (B, S, R, Q, P)
    pre: torch.Tensor  # (B, S, R, Q) dt + bias
    free: torch.Tensor  # (B, S, R, Q) derivative of the clamp; 0 where there is no token
    step: torch.Tensor  # (B, S, R, Q) Delta; 0 where there is no token
    decay: torch.Tensor  # (B, S, R, Q, Q) from step j to step i, 0 for j > i and across sequences
    entry: torch.Tensor  # (B, S, R, Q) decay of the state before the chunk up to step i
    exit: torch.Tensor  # (B, S, R, Q) decay from step j to the last step
    through: torch.Tensor  # (B, S, R) decay over the whole chunk
    B: torch.Tensor  # (B, S, Q, N)
    C: torch.Tensor  # (B, S, Q, N)


class _SSD:
    """The arguments of one call, and its walk over chunks."""

    def __init__(self, x, dt, A, B, C, D, dt_bias, seq_idx, path, grid, softplus, dt_limit, chunk_size):
        dtype = torch.promote_types(x.dtype, torch.float32)
        self.dtype, self.x, self.dt, self.B, self.C = dtype, x, dt, B, C
        self.softplus, self.dt_limit = softplus, dt_limit
        self.directions, self.heads = A.shape
        self.batch, self.num_tokens, self.head_dim = x.shape[0], x.shape[1], x.shape[-1]
        self.groups, self.states = B.shape[3:]
        self.ratio = self.heads // self.groups
        self.A = self._fold(A.to(dtype))
        self.D = None if D is None else self._fold(D.to(dtype).reshape(self.directions, self.heads, -1))
        self.bias = None if dt_bias is None else self._fold(dt_bias.to(dtype))
        self.order = scan_order(path, tuple(grid), x.device).long()
        self.segment = None if seq_idx is None else self._segments(seq_idx)
        steps = self.order.shape[1]
        count = -(-steps // min(chunk_size, _MAX_CHUNK))
        self.starts = range(0, steps, -(-steps // count))

    def _fold(self, parameter):
        """(K, H, ...) to (S, R, ...)."""
        return parameter.reshape(self.directions * self.groups, self.ratio, *parameter.shape[2:])

    def _segments(self, seq_idx):
        """Number of changes of sequence before each step, (B, K, P); 0 for the sequence of the initial state."""
        along = seq_idx[:, self.order.clamp(min=0)]
        changed = torch.diff(along, dim=-1, prepend=torch.zeros_like(along[..., :1])) != 0
        return torch.cumsum(changed & (self.order >= 0), dim=-1)

    def heads_first(self, rows):
        """(B, K, Q, H, ...) to (B, S, R, Q, ...)."""
        rows = rows.movedim(2, 3)
        return rows.reshape(self.batch, self.directions * self.groups, self.ratio, *rows.shape[3:])

    def steps_first(self, rows):
        """(B, S, R, Q, ...) to (B, K, Q, H * ...)."""
        rows = rows.reshape(self.batch, self.directions, self.heads, *rows.shape[3:]).movedim(3, 2)
        return rows.flatten(3)

    def _rows(self, activation, token, trailing):
        """Tokens of an activation (B, L, [K], *trailing), as (B, K, Q, *trailing)."""
        flat = activation.flatten(-len(trailing)) if len(trailing) > 1 else activation
        return gather_steps(flat, direction_rows(flat, token), self.dtype).unflatten(-1, trailing)

    def grouped(self, projection, token):
        """Tokens of B or C as (B, S, Q, N)."""
        return self._rows(projection, token, (self.groups, self.states)).movedim(3, 2).flatten(1, 2)

    def chunk(self, start: int) -> _Chunk:
        order = self.order[:, start : start + self.starts.step]
        token, visited = order.clamp(min=0), (order >= 0).unsqueeze(-1)
        pre = self.heads_first(self._rows(self.dt, token, (self.heads,)))
        if self.bias is not None:
            pre = pre + self.bias.unsqueeze(-1)
        raw = F.softplus(pre) if self.softplus else pre
        inside = (raw >= self.dt_limit[0]) & (raw <= self.dt_limit[1])
        valid = self.heads_first(visited.expand(self.batch, -1, -1, self.heads))
        step = raw.clamp(*self.dt_limit) * valid
        log_decay = step * self.A.unsqueeze(-1)
        # Differences of neighbours in a long running sum lose digits: keep the sum as two numbers
        exact = torch.cumsum(log_decay, dim=-1, dtype=torch.float64)
        total = exact.to(self.dtype)
        low = (exact - total).to(self.dtype)
        # Suffix sums, not total[-1] - total: the last steps weigh most, and keep their precision
        remaining = F.pad(log_decay[..., 1:].flip(-1).cumsum(-1).flip(-1), (0, 1))
        length = order.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=order.device).tril()
        entry, leaving, through = total.exp(), remaining.exp(), total[..., -1].exp()
        if self.segment is not None:
            segment = self.segment[:, :, start : start + self.starts.step]  # (B, K, Q)
            before = self.segment[:, :, start - 1] if start else torch.zeros_like(segment[:, :, 0])
            last = segment[:, :, -1]
            causal = self._per_group(causal & (segment.unsqueeze(-1) == segment.unsqueeze(-2)))
            entry = entry * self._per_group(segment == before.unsqueeze(-1))
            leaving = leaving * self._per_group(segment == last.unsqueeze(-1))
            through = through * self._per_group(last == before)
        difference = (total.unsqueeze(-1) - total.unsqueeze(-2)) + (low.unsqueeze(-1) - low.unsqueeze(-2))
        decay = difference.masked_fill_(~causal, float("-inf")).exp_()
        x = self.heads_first(self._rows(self.x, token, (self.heads, self.head_dim))) * valid.unsqueeze(-1)
        B, C = self.grouped(self.B, token), self.grouped(self.C, token)
        return _Chunk(token, visited, x, pre, inside & valid, step, decay, entry, leaving, through, B, C)

    def _per_group(self, mask):
        """(B, K, ...) to (B, S, 1, ...)."""
        return mask.repeat_interleave(self.groups, dim=1).unsqueeze(2)

    @staticmethod
    def next_state(chunk: _Chunk, h):
        """The state after the chunk, (B, S, R, P, N)."""
        weighted = chunk.x * (chunk.exit * chunk.step).unsqueeze(-1)
        return chunk.through[..., None, None] * h + weighted.transpose(-1, -2) @ chunk.B.unsqueeze(2)

    def outputs(self, chunk: _Chunk, h):
        """Y of every step of the chunk, (B, S, R, Q, P)."""
        scores = (chunk.C @ chunk.B.transpose(-1, -2)).unsqueeze(2)
        y = (scores * chunk.decay * chunk.step.unsqueeze(-2)) @ chunk.x
        y = y + chunk.entry.unsqueeze(-1) * (chunk.C.unsqueeze(2) @ h.transpose(-1, -2))
        return y if self.D is None else y + self.D.unsqueeze(2) * chunk.x

    def write_outputs(self, y, chunk: _Chunk, h) -> None:
        """Add the chunk's outputs to y, (B, L, H P) or (B, L, K, H P)."""
        scatter_steps_(y, chunk.token, self.steps_first(self.outputs(chunk, h)) * chunk.visited)

    def initial_state(self, initial_states):
        shape = (self.batch, self.directions * self.groups, self.ratio, self.head_dim, self.states)
        if initial_states is None:
            return self.x.new_zeros(shape, dtype=self.dtype)
        return initial_states.to(self.dtype).reshape(shape)

    def state_of_heads(self, h):
        return h.reshape(self.batch, self.directions, self.heads, self.head_dim, self.states).contiguous()

    def empty_output(self, merge: bool):
        """Zeros, (B, L, H P) or (B, L, K, H P)."""
        middle = () if merge else (self.directions,)
        shape = (self.batch, self.num_tokens, *middle, self.heads * self.head_dim)
        return self.x.new_zeros(shape, dtype=self.dtype)


def _gate(z, y):
    """Z flattened like y, (B, L, H P) or (B, L, K, H P)."""
    z = z.flatten(-2).to(y.dtype)
    return z if z.dim() == y.dim() else z.unsqueeze(2)


def forward(
    x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, path, grid, softplus, dt_min, dt_max, merge, chunk_size
):
    """Compute the op ``visionmamba::ssd``; see :func:`visionmamba.ops.ssd_scan`."""
    ssd = _SSD(x, dt, A, B, C, D, dt_bias, seq_idx, path, grid, softplus, (dt_min, dt_max), chunk_size)
    y, h = ssd.empty_output(merge), ssd.initial_state(initial_states)
    for start in ssd.starts:
        chunk = ssd.chunk(start)
        ssd.write_outputs(y, chunk, h)
        h = ssd.next_state(chunk, h)
    if z is not None:
        y = y * F.silu(_gate(z, y))
    return y.unflatten(-1, (ssd.heads, ssd.head_dim)).to(x.dtype), ssd.state_of_heads(h)


@dataclass
class _ChunkGradients:
    """Gradients of a chunk's inputs, in the layouts of :class:`_Chunk`."""

    x: torch.Tensor
    step: torch.Tensor
    log_decay: torch.Tensor  # of Delta A at each step
    B: torch.Tensor
    C: torch.Tensor
    h: torch.Tensor


def _chunk_backward(ssd: _SSD, chunk: _Chunk, h, dy, g) -> _ChunkGradients:
    """Differentiate a chunk's outputs (gradient ``dy``) and next state (gradient ``g``), given the state before it."""
    B, C = chunk.B.unsqueeze(2), chunk.C.unsqueeze(2)
    scores = C @ B.transpose(-1, -2)  # (B, S, 1, Q, Q)
    weights = scores * chunk.decay
    dweights = dy @ chunk.x.transpose(-1, -2)  # gradient of the attention-like matrix, (B, S, R, Q, Q)
    by_step = dweights * weights
    dscores = (dweights * chunk.decay * chunk.step.unsqueeze(-2)).sum(2)
    dx = (weights * chunk.step.unsqueeze(-2)).transpose(-1, -2) @ dy
    dstep = by_step.sum(-2)
    # Step k decays the pairs j < k <= i. A sum over j, then over i: nothing cancels.
    pairs = (by_step * chunk.step.unsqueeze(-2)).tril(-1).cumsum(-1).roll(1, -1).tril()
    pairs[..., 0] = 0
    dlog = pairs.sum(-2)

    carried = dy * chunk.entry.unsqueeze(-1)  # (B, S, R, Q, P)
    entering = (carried * (C @ h.transpose(-1, -2))).sum(-1)  # gradient of log(entry)
    dlog = dlog + entering.flip(-1).cumsum(-1).flip(-1)
    dC = dscores @ chunk.B + (carried @ h).sum(2)
    dh = carried.transpose(-1, -2) @ C + chunk.through[..., None, None] * g
    dlog = dlog + (chunk.through * (g * h).sum((-1, -2))).unsqueeze(-1)

    stored = B @ g.transpose(-1, -2)  # (B, S, R, Q, P)
    gain = (chunk.exit * chunk.step).unsqueeze(-1)
    dx = dx + gain * stored
    leaving = (chunk.x * stored).sum(-1) * chunk.exit
    dstep = dstep + leaving
    earlier = (leaving * chunk.step)[..., :-1].cumsum(-1)
    dlog = dlog + F.pad(earlier, (1, 0))
    dB = dscores.transpose(-1, -2) @ chunk.C + ((chunk.x * gain) @ g).sum(2)
    if ssd.D is not None:
        dx = dx + ssd.D.unsqueeze(2) * dy
    return _ChunkGradients(dx, dstep, dlog, dB, dC, dh)


def _gate_backward(dy, y, z):
    """Return the gradients of y and z for out = y silu(z)."""
    gate = _gate(z, dy)
    sigmoid = torch.sigmoid(gate)
    dz = dy * y * sigmoid * (1 + gate * (1 - sigmoid))
    dz = dz if z.dim() - 1 == dy.dim() else dz.sum(2)
    return dy * gate * sigmoid, dz.reshape(z.shape)


def _states_before_chunks(ssd: _SSD, initial_states, y):
    """Walk forward; return the state before each chunk, and fill ``y`` where it is given."""
    states, h = [], ssd.initial_state(initial_states)
    for start in ssd.starts:
        states.append(h)
        chunk = ssd.chunk(start)
        if y is not None:
            ssd.write_outputs(y, chunk, h)
        h = ssd.next_state(chunk, h)
    return states, h


def backward(
    dy, dfinal, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, path, grid, softplus, dt_min, dt_max, merge,
    chunk_size,
):  # fmt: skip
    """Compute the gradients of :func:`forward`'s nine floating-point tensors; None for absent ones."""
    ssd = _SSD(x, dt, A, B, C, D, dt_bias, seq_idx, path, grid, softplus, (dt_min, dt_max), chunk_size)
    y = None if z is None else ssd.empty_output(merge)
    states, h = _states_before_chunks(ssd, initial_states, y)
    dy = dy.to(ssd.dtype).flatten(-2)
    dz = None
    if z is not None:
        dy, dz = _gate_backward(dy, y, z)

    dx, dB, dC = (torch.zeros_like(tensor, dtype=ssd.dtype) for tensor in (x, B, C))
    ddt = torch.zeros_like(dt, dtype=ssd.dtype)
    dA = torch.zeros_like(ssd.A)
    dD = None if D is None else torch.zeros_like(ssd.D)
    dbias = None if dt_bias is None else torch.zeros_like(ssd.bias)
    g = torch.zeros_like(h) if dfinal is None else ssd.initial_state(dfinal)
    for start, h in zip(reversed(ssd.starts), reversed(states), strict=True):
        chunk = ssd.chunk(start)
        dy_rows = gather_steps(dy, direction_rows(dy, chunk.token), ssd.dtype) * chunk.visited
        dy_chunk = ssd.heads_first(dy_rows.unflatten(-1, (ssd.heads, ssd.head_dim)))
        gradients = _chunk_backward(ssd, chunk, h, dy_chunk, g)
        g = gradients.h
        dA += (gradients.log_decay * chunk.step).sum((0, 3))
        dstep = (gradients.step + gradients.log_decay * ssd.A.unsqueeze(-1)) * chunk.free
        dpre = dstep * torch.sigmoid(chunk.pre) if softplus else dstep
        if dbias is not None:
            dbias += dpre.sum((0, 3))
        if dD is not None:
            per_channel = (dy_chunk * chunk.x).sum((0, 3))
            dD += per_channel if D.dim() == 3 else per_channel.sum(-1, keepdim=True)
        scatter_steps_(ddt, chunk.token, ssd.steps_first(dpre))
        scatter_steps_(dx.flatten(-2), chunk.token, ssd.steps_first(gradients.x))
        for total, gradient in ((dB, gradients.B), (dC, gradients.C)):
            rows = gradient.unflatten(1, (ssd.directions, ssd.groups)).movedim(2, 3).flatten(3)
            scatter_steps_(total.flatten(-2), chunk.token, rows)
    dinitial = None if initial_states is None else ssd.state_of_heads(g)
    dD = None if dD is None else dD.reshape(D.shape)
    dbias = None if dbias is None else dbias.reshape(dt_bias.shape)
    return dx, ddt, dA.reshape(A.shape), dB, dC, dD, dz, dbias, dinitial


register_implementation(Implementation("ssd", "torch", (), forward, backward))
