"""The decoding kernels on a GPU, against plain PyTorch on the same device, and in a CUDA graph."""

import pytest
import torch

from visionmamba.ops import backend, causal_conv1d_update, selective_state_update

pytestmark = pytest.mark.gpu


def both(function, state, *arguments, **options):
    """Run on the CUDA kernel and in plain PyTorch; return both outputs and both states."""
    found = []
    for name in ("cuda", "torch"):
        own = state.clone()
        with backend(name):
            found.append((function(own, *arguments, **options), own))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("states", [1, 16, 33, 128])
@pytest.mark.parametrize("slots", [False, True])
def test_state_update(dtype, states, slots):
    torch.manual_seed(0)
    state = torch.randn(6 if slots else 4, 3, 10, states, device="cuda")
    x, dt, z = (torch.randn(4, 3, 10, device="cuda").to(dtype) for _ in range(3))
    A = -torch.rand(3, 10, states, device="cuda")
    B, C = (torch.randn(4, 1, states, device="cuda").to(dtype) for _ in range(2))
    D, bias = (torch.randn(3, 10, device="cuda") for _ in range(2))
    indices = torch.tensor([5, -1, 0, 2], device="cuda") if slots else None
    (y, after), (expected_y, expected) = both(
        selective_state_update, state, x, dt, A, B, C, D, z, bias, True, state_batch_indices=indices
    )
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y, expected_y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("slots", [False, True])
@pytest.mark.parametrize("steps", [1, 5])
def test_conv_update(dtype, circular, slots, steps):
    torch.manual_seed(0)
    state = torch.randn(6 if slots else 4, 40, 5, device="cuda").to(dtype)
    x, weight, bias = torch.randn(4, 40, steps, device="cuda").to(dtype), torch.randn(40, 4), torch.randn(40)
    seen = torch.tensor([0, 3, 7, 11], device="cuda") if circular else None
    indices = torch.tensor([5, -1, 0, 2], device="cuda") if slots else None

    def update(state):
        return causal_conv1d_update(x, state, weight.cuda(), bias.cuda(), "silu", seen, indices)

    (y, after), (expected_y, expected) = both(update, state)
    assert torch.equal(after, expected)
    torch.testing.assert_close(y, expected_y)


def test_a_cuda_graph_replays_a_step():
    torch.manual_seed(0)
    state, x = torch.randn(2, 8, 16, device="cuda"), torch.randn(2, 8, device="cuda")
    A, B = -torch.rand(8, 16, device="cuda"), torch.randn(2, 16, device="cuda")
    expected_state = state.clone()
    expected = [selective_state_update(expected_state, x, x, A, B, B) for _ in range(3)][-1]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        selective_state_update(state.clone(), x, x, A, B, B)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = selective_state_update(state, x, x, A, B, B)
    for _ in range(3):
        graph.replay()
    assert torch.equal(y, expected)
    assert torch.equal(state, expected_state)
