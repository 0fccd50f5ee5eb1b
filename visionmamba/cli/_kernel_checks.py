"""What ``visionmamba doctor --gpu`` runs: every operator on every backend of a device, against plain PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visionmamba.ops import (
    backend,
    causal_conv1d,
    causal_conv1d_update,
    explain,
    layer_norm_fn,
    mamba_chunk_scan_combined,
    rmsnorm_fn,
    selective_scan,
    selective_state_update,
)
from visionmamba.ops.channel_norm import channel_norm
from visionmamba.ops.gelu_linear import gelu_linear

from ._common import one_line

__all__ = ["Check", "check_kernels"]

_TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 2e-2}
"""Relative error, in the norm of each result; plain PyTorch rounds in float32 too, so float32 is not held to 1e-5."""


class Check(NamedTuple):
    """One check.

    Args:
        op: Operator.
        backend: Backend.
        case: What was run.
        error: Largest relative error of a result, in the norm; None if it did not run.
        seconds: Time of the first call, compilation included.
        problem: Why it failed, or None.
    """

    op: str
    backend: str
    case: str
    error: float | None
    seconds: float
    problem: str | None


def _scan(path: str, grid: tuple[int, ...], states: int, dtype: torch.dtype, batch: int = 2, gate: bool = False):
    def run(device: str) -> list[Tensor]:
        directions, tokens, channels = path.count(",") + 1, torch.Size(grid).numel(), 48

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).to(dtype).requires_grad_()

        u, delta = draw(batch, tokens, channels), draw(batch, tokens, directions, channels)
        B, C = draw(batch, tokens, directions, states), draw(batch, tokens, directions, states)
        A = (-torch.rand(directions, channels, states, device=device)).requires_grad_()
        D = torch.randn(directions, channels, device=device, requires_grad=True)
        z = draw(batch, tokens, channels) if gate else None
        y, state = selective_scan(u, delta, A, B, C, D, z, path=path, grid=list(grid))
        leaves = [x for x in (u, delta, A, B, C, D, z) if x is not None]
        loss = (y.float() * torch.randn(y.shape, device=device)).sum() + state.sum()
        return [y, state, *torch.autograd.grad(loss, leaves)]

    return run


def _conv(path: str):
    def run(device: str) -> list[Tensor]:
        x = torch.randn(2, 37, 24, device=device, requires_grad=True)
        weight = torch.randn(path.count(",") + 1, 24, 4, device=device, requires_grad=True)
        y, last = causal_conv1d(x, weight, path=path)
        return [y, last, *torch.autograd.grad((y * torch.randn(y.shape, device=device)).sum(), (x, weight))]

    return run


def _conv_update(device: str) -> list[Tensor]:
    state = torch.randn(3, 20, 3, device=device)
    return [causal_conv1d_update(torch.randn(3, 20, device=device), state, torch.randn(20, 4, device=device)), state]


def _state_update(device: str) -> list[Tensor]:
    state, x, dt = torch.randn(3, 20, 16, device=device), *torch.randn(2, 3, 20, device=device)
    B, C = torch.randn(2, 3, 16, device=device)
    A = -torch.rand(20, 16, device=device)
    return [selective_state_update(state, x, dt, A, B, C, dt_softplus=True), state]


def _ssd(device: str) -> list[Tensor]:
    x = torch.randn(2, 96, 4, 32, device=device, requires_grad=True)
    dt = torch.rand(2, 96, 4, device=device, requires_grad=True)
    B, C = (torch.randn(2, 96, 1, 16, device=device, requires_grad=True) for _ in range(2))
    A = -torch.rand(4, device=device)
    y = mamba_chunk_scan_combined(x, dt, A, B, C, 64)
    return [y, *torch.autograd.grad((y * torch.randn(y.shape, device=device)).sum(), (x, dt, B, C))]


def _gated_norm(device: str) -> list[Tensor]:
    x, z = torch.randn(2, 64, 96, device=device).requires_grad_(), torch.randn(2, 64, 96, device=device)
    weight = torch.randn(96, device=device)
    y = rmsnorm_fn(x, weight, None, z)
    return [y, *torch.autograd.grad((y * torch.randn(y.shape, device=device)).sum(), x)]


def _add_norm(device: str) -> list[Tensor]:
    x, residual = torch.randn(2, 2, 64, 96, device=device).requires_grad_().unbind()
    weight, bias = torch.randn(2, 96, device=device)
    y = layer_norm_fn(x, weight, bias, residual)
    return [y, *torch.autograd.grad((y * torch.randn(y.shape, device=device)).sum(), (x, residual))]


def _channel_norm(device: str) -> list[Tensor]:
    x, added = torch.randn(2, 2, 64, 96, device=device).requires_grad_().unbind()
    weight, bias = torch.randn(2, 96, device=device).requires_grad_().unbind()
    out, total = channel_norm(x, weight, bias, added=added)
    cotangents = [torch.randn(out.shape, device=device) for _ in range(2)]
    return [out, total, *torch.autograd.grad((out, total), (x, added, weight, bias), cotangents)]


def _gelu_linear(device: str) -> list[Tensor]:
    x, weight = (torch.randn(*shape, device=device, requires_grad=True) for shape in ((2, 64, 96), (48, 96)))
    y = gelu_linear(x, weight)
    return [y, *torch.autograd.grad(y, (x, weight), torch.randn(y.shape, device=device))]


def _low_rank_scan(device: str) -> list[Tensor]:
    u, delta = torch.randn(2, 63, 40, device=device), torch.randn(2, 63, 4, 6, device=device)
    weight = torch.randn(4, 40, 6, device=device) / 4
    B, C = torch.randn(2, 2, 63, 4, 1, device=device).unbind()
    tensors = [t.requires_grad_() for t in (u, delta, weight)]
    y, _ = selective_scan(
        u, delta, -torch.rand(4, 40, 1, device=device), B, C, dt_weight=weight, path=_CROSS, grid=[7, 9]
    )
    return [y, *torch.autograd.grad(y, tensors, torch.randn(y.shape, device=device))]


_CROSS = "h,v,h_flip,v_flip"
_CASES: list[tuple[str, str, torch.dtype, Callable[[str], list[Tensor]]]] = [
    ("selective_scan", "16 states, gate", torch.float32, _scan("h,h_flip", (65,), 16, torch.float32, gate=True)),
    ("selective_scan", "16 states, bf16", torch.bfloat16, _scan(_CROSS, (7, 9), 16, torch.bfloat16)),
    ("selective_scan", "16 states, in chunks", torch.float32, _scan("h", (1500,), 16, torch.float32, 1)),
    ("selective_scan", "1 state, cross", torch.float32, _scan(_CROSS, (7, 9), 1, torch.float32)),
    ("selective_scan", "1 state, several rounds", torch.float32, _scan(_CROSS, (30, 31), 1, torch.float32, 70)),
    ("selective_scan", "1 state, bf16", torch.bfloat16, _scan(_CROSS, (28, 28), 1, torch.bfloat16, 40)),
    ("selective_scan", "1 state, pairs, bf16", torch.bfloat16, _scan(_CROSS, (42, 42), 1, torch.bfloat16, 4)),
    ("selective_scan", "1 state, low-rank steps", torch.float32, _low_rank_scan),
    ("causal_conv1d", "one way", torch.float32, _conv("h")),
    ("causal_conv1d", "both ways", torch.float32, _conv("h,h_flip")),
    ("causal_conv1d_update", "one step", torch.float32, _conv_update),
    ("selective_state_update", "one step", torch.float32, _state_update),
    ("ssd", "two chunks", torch.bfloat16, _ssd),  # tensor cores round its products
    ("gated_norm", "RMS", torch.float32, _gated_norm),
    ("add_norm", "layer norm", torch.float32, _add_norm),
    ("channel_norm", "sum and norm", torch.float32, _channel_norm),
    ("gelu_linear", "gradients", torch.float32, _gelu_linear),
]


def _relative(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-30))


def _run(name: str, function: Callable[[str], list[Tensor]], device: str) -> list[Tensor]:
    torch.manual_seed(0)
    with backend(name):
        results = [x.detach() for x in function(device)]
    if device == "cuda":
        torch.cuda.synchronize()
    return results


def check_kernels(device: str, report: Callable[[Check], Any] = lambda _check: None) -> list[Check]:
    """Run every backend's forward and backward on small cases and compare with the backend ``torch``.

    Args:
        device: ``"cuda"``, or another device type.
        report: Called with each check as it ends.

    Returns:
        The checks.
    """
    found = []
    for op, case, dtype, function in _CASES:
        names = [name for name, objection in explain(op, device).items() if objection is None and name != "torch"]
        expected = _run("torch", function, device) if names else []
        for name in names:
            begin, error, problem = time.perf_counter(), None, None
            try:
                actual = _run(name, function, device)
                error = max(_relative(a, e) for a, e in zip(actual, expected, strict=True))
                if not error <= _TOLERANCE[dtype]:
                    problem = f"differs from plain PyTorch by {error:.1e}, more than {_TOLERANCE[dtype]:.0e}"
            except Exception as failure:
                problem = one_line(failure)
            found.append(Check(op, name, case, error, time.perf_counter() - begin, problem))
            report(found[-1])
    return found
