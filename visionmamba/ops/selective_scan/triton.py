"""The selective scan in Triton (AMD, Intel, Windows): ``kernels/triton/selective_scan.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _triton
from .._gate import apply_gate, gate_backward
from ..backend import Implementation, register_implementation
from ..scan_path import scan_order
from .cuda_call import visits

__all__ = ["backward", "forward"]

_SEGMENT = 16
_MAX_STATES = 256


def _rows(x: Tensor) -> Tensor:
    """Return ``x`` with a contiguous last dimension."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Strides along batch, tokens and directions; 0 for the directions of a tensor that they share."""
    return (*x.stride()[:2], 0) if x.dim() == 3 else x.stride()[:3]


class _Scan:
    """One call: shapes, float32 parameters and the kernels' options."""

    def __init__(self, u, delta, A, B, C, D, delta_bias, dt_weight, initial, path, grid, softplus, in_step_order):
        self.directions, self.channels, self.states = A.shape
        self.batch, self.num_tokens = u.shape[:2]
        if dt_weight is not None:
            delta = torch.einsum("blkr,kdr->blkd", delta.float(), dt_weight.float())
        self.activations = [_rows(x) for x in (u, delta, B, C)]
        self.A, self.D, self.bias, self.initial = (
            x if x is None else x.float().contiguous() for x in (A, D, delta_bias, initial)
        )
        self.order = scan_order(path, tuple(grid), u.device)
        self.block_n = _triton.power_of_two(self.states)
        self.block_d = max(1, min(_triton.power_of_two(self.channels), 1024 // self.block_n, 128))
        self.blocks = -(-self.channels // self.block_d)
        self.options = {
            "BLOCK_D": self.block_d,
            "BLOCK_N": self.block_n,
            "SKIP": D is not None,
            "BIAS": delta_bias is not None,
            "STATE": initial is not None,
            "SOFTPLUS": bool(softplus),
            "STEP_ORDER": bool(in_step_order),
            "num_warps": 4 if self.block_d * self.block_n >= 512 else 1,
        }

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.blocks, self.directions, self.batch

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.num_tokens, self.order.shape[1], self.directions, self.channels, self.states

    def given(self, x: Tensor | None) -> Tensor:
        """``x``, or a pointer that is never read."""
        return self.A if x is None else x

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=self.A.device)

    def launch(self, kernel, *arguments, **options) -> None:
        """Run a kernel, unless there is nothing to compute; results are zero then, as they are allocated."""
        if 0 not in self.grid:
            kernel[self.grid](*arguments, **self.options, **options)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the directions' outputs, (B, L, K, D), and the last states, both in float32."""
        from visionmamba.kernels.triton.selective_scan import scan_forward

        u, delta, B, C = self.activations
        y = self.zeros(self.batch, self.num_tokens, self.directions, self.channels)
        last = self.zeros(self.batch, self.directions, self.channels, self.states)
        self.launch(
            scan_forward, u, delta, self.A, B, C, self.given(self.D), self.given(self.bias), self.order,
            self.given(self.initial), y, last, *self.sizes,
            *(stride for x in (u, delta, B, C) for stride in _strides(x)),
        )  # fmt: skip
        return y, last


def forward(
    u, delta, A, B, C, D, z, delta_bias, dt_weight, initial_state, path, grid, delta_softplus, merge, in_step_order
):
    """Compute the op ``visionmamba::selective_scan``; see :func:`visionmamba.ops.selective_scan`."""
    scan = _Scan(u, delta, A, B, C, D, delta_bias, dt_weight, initial_state, path, grid, delta_softplus, in_step_order)
    y, last = scan.forward()
    y = y.sum(2) if merge else y
    y = y if z is None else apply_gate(y, z)
    return y.to(u.dtype), last


def backward(
    dy, dlast, u, delta, A, B, C, D, z, delta_bias, dt_weight, initial_state, path, grid, delta_softplus, merge,
    in_step_order,
):  # fmt: skip
    """Compute the gradients of :func:`forward`'s ten tensor arguments; None for absent ones."""
    from visionmamba.kernels.triton.selective_scan import scan_backward

    scan = _Scan(u, delta, A, B, C, D, delta_bias, dt_weight, initial_state, path, grid, delta_softplus, in_step_order)
    dy, dz = dy.float(), None
    if z is not None:
        y = scan.forward()[0]
        dy, dz = gate_backward(dy, y.sum(2) if merge else y, z)
    dy = _rows(dy)
    tokens = (scan.batch, scan.num_tokens, scan.directions)
    du, ddelta = scan.zeros(*tokens, scan.channels), scan.zeros(*tokens, scan.channels)
    dB, dC = (scan.zeros(scan.blocks, *tokens, scan.states) for _ in range(2))
    dA = scan.zeros(scan.batch, *A.shape)
    dD, dbias = (scan.zeros(scan.batch, *A.shape[:2]) for _ in range(2))
    dstate = None if initial_state is None else scan.zeros(*initial_state.shape)
    dlast = None if dlast is None else dlast.float().contiguous()
    segments = -(-scan.order.shape[1] // _SEGMENT) + _SEGMENT
    programs = scan.blocks * scan.directions * scan.batch
    scratch = torch.empty(programs * segments * scan.block_d * scan.block_n, device=u.device)
    scan.launch(
        scan_backward, dy, scan.given(dlast), *scan.activations[:2], scan.A, *scan.activations[2:], scan.given(scan.D),
        scan.given(scan.bias), scan.order, scan.given(scan.initial), du, ddelta, dA, dB, dC, dD, dbias,
        scan.given(dstate), scratch, *scan.sizes,
        *(stride for x in (dy, *scan.activations) for stride in _strides(x)),
        SEGMENT=_SEGMENT, LAST=dlast is not None,
    )  # fmt: skip
    ddt_weight = None
    if dt_weight is not None:
        ddt_weight = torch.einsum("blkd,blkr->kdr", ddelta, delta.float())
        ddelta = torch.einsum("blkd,kdr->blkr", ddelta, dt_weight.float())
    return (
        du.sum(2) if u.dim() == 3 else du, ddelta, dA.sum(0), dB.sum(0), dC.sum(0), None if D is None else dD.sum(0),
        dz, None if delta_bias is None else dbias.sum(0), ddt_weight, dstate,
    )  # fmt: skip


def _supports(
    u, delta, A, B, C, D, z, delta_bias, dt_weight, initial_state, path, grid, delta_softplus, merge, in_step_order
) -> str | None:
    if u.dtype == torch.float64:
        return "takes float32, float16 and bfloat16, not float64"
    if A.shape[2] > _MAX_STATES:
        return f"takes up to {_MAX_STATES} states a channel, not {A.shape[2]}"
    if visits(path, tuple(grid)).repeats:
        return "takes paths whose directions visit a token at most once"
    return None


register_implementation(
    Implementation(
        "selective_scan", "triton", _triton.device_types(), forward, backward, probe=_triton.probe, supports=_supports
    )
)
