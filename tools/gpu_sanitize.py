"""One small call of each CUDA kernel, for compute-sanitizer."""

from __future__ import annotations

import torch

from visionmamba.ops import backend, causal_conv1d, selective_scan


def scan(
    path: str, grid: tuple[int, ...], tokens: int, directions: int, states: int, gate: bool, dtype: torch.dtype
) -> None:
    """Run the scan's forward and backward on random inputs."""
    batch, channels = 2, 40

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda").to(dtype).requires_grad_()

    u, z = random(batch, tokens, channels), random(batch, tokens, channels) if gate else None
    delta = random(batch, tokens, directions, channels)
    B, C = (random(batch, tokens, directions, states) for _ in range(2))
    A = (-torch.rand(directions, channels, states, device="cuda")).requires_grad_()
    D = torch.ones(directions, channels, device="cuda", requires_grad=True)
    y, last_state = selective_scan(u, delta, A, B, C, D, z, path=path, grid=list(grid))
    (y.float().sum() + last_state.sum()).backward()


def main() -> None:
    with backend("cuda"):
        for dtype in (torch.float32, torch.bfloat16):
            for states in (1, 16):
                scan("h,v,h_flip,v_flip", (7, 9), 63, 4, states, False, dtype)
                scan("h", (300,), 300, 1, states, True, dtype)
            x = torch.randn(2, 37, 24, device="cuda").to(dtype).requires_grad_()
            weight = torch.randn(2, 24, 4, device="cuda", requires_grad=True)
            causal_conv1d(x, weight, path="h,h_flip")[0].float().sum().backward()
    torch.cuda.synchronize()
    print("ran every kernel")


if __name__ == "__main__":
    main()
