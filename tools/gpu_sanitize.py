"""A small call of every CUDA kernel, for compute-sanitizer."""

from __future__ import annotations

import importlib
import unittest.mock

import torch

from visionmamba.ops import backend, causal_conv1d, causal_conv1d_update, selective_scan, selective_state_update
from visionmamba.ops.channel_norm import channel_norm
from visionmamba.ops.gelu_linear import gelu_linear
from visionmamba.ops.scan_path import scan_path


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Draw a leaf."""
    return torch.randn(shape, device="cuda").to(dtype).requires_grad_()


def scan(path: str, grid: tuple[int, ...], states: int, dtype: torch.dtype, gate: bool = False, rank: int = 0) -> None:
    """Run the scan's forward and backward on random inputs."""
    table = scan_path(path, grid)
    batch, tokens, directions, channels = 2, table.num_tokens, table.num_directions, 40
    u, z = random(batch, tokens, channels, dtype=dtype), random(batch, tokens, channels, dtype=dtype) if gate else None
    delta = random(batch, tokens, directions, rank or channels, dtype=dtype)
    B, C = (random(batch, tokens, directions, states, dtype=dtype) for _ in range(2))
    A = (-torch.rand(directions, channels, states, device="cuda")).requires_grad_()
    D, weight = random(directions, channels), random(directions, channels, rank) if rank else None
    state = random(batch, directions, channels, states)
    options = dict(dt_weight=weight, initial_state=state, path=path, grid=list(grid))
    y, last_state = selective_scan(u, delta, A, B, C, D, z, **options)
    (y.float().sum() + last_state.sum()).backward()


def there_and_back(dtype: torch.dtype) -> None:
    """Run the scan's kernel for a direction and its reverse, which so few rows would not go through."""
    module = importlib.import_module("visionmamba.ops.selective_scan.cuda")
    with unittest.mock.patch.object(module, "_WARPS_WANTED", 0):
        scan("v,v_flip", (7, 9), 16, dtype)
        scan("h,h_flip", (33,), 5, dtype, gate=True)


def decode(dtype: torch.dtype) -> None:
    """Run the single-step updates."""
    with torch.no_grad():
        state, x = torch.randn(2, 40, 16, device="cuda"), random(2, 40, dtype=dtype)
        A, B = -torch.rand(40, 16, device="cuda"), random(2, 16, dtype=dtype)
        selective_state_update(state, x, x, A, B, B)
        state = torch.randn(2, 40, 3, device="cuda").to(dtype)
        causal_conv1d_update(x, state, torch.randn(40, 4, device="cuda"), None, "silu")


def layers(dtype: torch.dtype) -> None:
    """Run the kernels of the layers around the scan: norms with and without an addition, GELU."""
    for channels in (96, 40, 33):
        weight, bias = random(channels), random(channels)
        for added in (None, random(2, 37, channels, dtype=dtype)):
            out, total = channel_norm(random(2, 37, channels), weight, bias, added=added)
            (out.float().sum() + total.sum()).backward()
        gelu_linear(random(2, 37, channels, dtype=dtype), random(48, channels, dtype=dtype)).float().sum().backward()


def main() -> None:
    with backend("cuda"):
        for dtype in (torch.float32, torch.bfloat16):
            for states in (1, 16):
                scan("h,v,h_flip,v_flip", (7, 9), states, dtype)
                scan("h,h_flip", (33,), states, dtype, gate=True, rank=3)
                scan("h", (300,), states, dtype, gate=True)
                scan("w3,h", (5, 7), states, dtype)
            there_and_back(dtype)
            scan("h,v", (5, 7), 5, dtype)
            scan("h", (2100,), 1, dtype)
            x = random(2, 37, 24, dtype=dtype)
            causal_conv1d(x, random(2, 24, 4), path="h,h_flip")[0].float().sum().backward()
            decode(dtype)
            layers(dtype)
            for rank in (12, 48):
                scan("h,v", (9, 9), 1, dtype, rank=rank)
    torch.cuda.synchronize()
    print("ran every kernel")


if __name__ == "__main__":
    main()
