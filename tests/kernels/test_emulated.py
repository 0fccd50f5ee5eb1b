"""The CUDA kernels' arithmetic and indexing, run on the CPU by ``simt.h`` against float64: no GPU needed."""

import importlib

import pytest
import torch
from emulation import COMPILER, EmulatedLauncher

from visionmamba.ops import cuda_runtime, path_scan_reference
from visionmamba.ops.scan_path import scan_path

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
scan = importlib.import_module("visionmamba.ops.selective_scan.cuda")
tile = importlib.import_module("visionmamba.ops.selective_scan.cuda_tile")
conv = importlib.import_module("visionmamba.ops.causal_conv1d.cuda")
conv_interface = importlib.import_module("visionmamba.ops.causal_conv1d.interface")
cuda_update = importlib.import_module("visionmamba.ops._cuda_update")
state_update = importlib.import_module("visionmamba.ops.state_update")
conv_torch = importlib.import_module("visionmamba.ops.causal_conv1d.pytorch")

SCANS = {
    "vim": dict(path="h,h_flip", grid=(35,), channels=40, states=16),
    "vim_of_even_length": dict(path="h_flip,h", grid=(32,), channels=70, states=16, gate=False, batch=3),
    "vim_of_a_few_tokens": dict(path="h,h_flip", grid=(5,), batch=3, channels=6, states=4),
    "plainmamba": dict(path="snake_h,snake_v,snake_h_flip,snake_v_flip", grid=(5, 7), channels=40, states=16),
    "vim_in_step_order": dict(path="snake_v,snake_v_flip", grid=(5, 4), batch=3, channels=8, states=2, step_order=True),
    "vim_in_chunks": dict(path="h,h_flip", grid=(70,), batch=1, channels=40, states=16, multiprocessors=64),
    "language": dict(path="h", grid=(29,), channels=36, states=16, own_input=True),
    "a_gate_a_direction": dict(path="h,v", grid=(5, 5), channels=8, states=4, gates=2, merge=False),
    "cross": dict(path="h,v,h_flip,v_flip", grid=(9, 8), channels=34, states=1),
    "cross_bf16": dict(path="h,v", grid=(7, 7), channels=8, states=1, gate=False, dtype=torch.bfloat16),
    "cross_in_rounds": dict(path="h,v", grid=(20, 30), batch=1, channels=16, states=1, gate=False),
    "cross_in_five_rounds": dict(
        path="h,v_flip", grid=(17, 18), batch=1, channels=20, states=1, gate=False, cut=(16, 2, 8, 2, 8)
    ),
    "cross_in_four_rounds": dict(path="h,v", grid=(7, 9), batch=1, channels=8, states=1, cut=(16, 4, 4, 1, 8)),
    "wide_tiles": dict(path="h,v", grid=(7, 7), batch=1, channels=36, states=1, gate=False, cut=(32, 4, 8, 8, 8)),
    "whole_pieces": dict(
        path="h,v_flip,v", grid=(14, 14), batch=1, channels=64, states=1, gate=False, cut=(32, 2, 7, 7, 8)
    ),
    "apart": dict(path="h,v_flip", grid=(7, 6), channels=9, states=1, gate=False, merge=False, own_input=True),
    "own_inputs": dict(path="h,v_flip", grid=(6, 8), channels=8, states=1, gate=False, own_input=True),
    "steps_apart": dict(path="w3,h", grid=(6, 5), channels=8, states=1, gate=False, merge=False, step_order=True),
    "sub_grids": dict(path="sub_200,subT_201", grid=(7, 9), channels=16, states=1, gate=False),
    "cross_low_rank": dict(path="h,v_flip", grid=(7, 9), channels=24, states=1, rank=2, dtype=torch.bfloat16),
    "windows": dict(path="w3,h", grid=(7, 5), channels=12, states=3, merge=False),
    "step_order": dict(path="snake_h,snake_v", grid=(6, 6), channels=33, states=5, step_order=True, own_input=True),
    "low_rank": dict(path="h,v", grid=(6, 6), channels=10, states=16, rank=3, dtype=torch.bfloat16),
    "low_rank_in_chunks": dict(
        path="h,v_flip", grid=(11, 13), batch=1, channels=40, states=16, rank=3, multiprocessors=64
    ),
    "low_rank_of_sub_grids": dict(path="sub_200,subT_201", grid=(7, 9), channels=16, states=4, rank=2, gate=False),
}


def relative(actual, exact):
    return float((actual.double() - exact).norm() / exact.norm().clamp(min=1e-30))


@pytest.mark.parametrize("name", SCANS)
def test_scan(name, monkeypatch):
    case = dict(batch=2, merge=True, own_input=False, gate=True, gates=1, step_order=False, rank=0, dtype=torch.float32)
    case |= dict(multiprocessors=1) | SCANS[name]
    if "cut" in case:
        cuts = [tile.Cut(*case["cut"])]
        monkeypatch.setattr(tile, "CUTS", {"forward": cuts, "backward": cuts})
    emulated = EmulatedLauncher(case["multiprocessors"])
    monkeypatch.setattr(cuda_runtime, "launcher", lambda _device: emulated)
    torch.manual_seed(0)
    table = scan_path(case["path"], case["grid"])
    batch, tokens, directions = case["batch"], table.num_tokens, table.num_directions
    channels, states, rank = case["channels"], case["states"], case["rank"] or case["channels"]
    activations = [
        torch.randn(batch, tokens, *([directions] if case["own_input"] else []), channels),
        torch.randn(batch, tokens, directions, rank),
        torch.randn(batch, tokens, directions, states),
        torch.randn(batch, tokens, directions, states),
        torch.randn(batch, tokens, *([directions] if case["gates"] > 1 else []), channels) if case["gate"] else None,
    ]
    u, delta, B, C, z = (x if x is None else x.to(case["dtype"]) for x in activations)
    A, D, bias = (
        -torch.rand(directions, channels, states) - 0.1,
        torch.randn(directions, channels),
        torch.randn(directions, channels),
    )
    weight = torch.randn(directions, channels, rank) if case["rank"] else None
    state = torch.randn(batch, directions, channels, states)
    tensors = (u, delta, A, B, C, D, z, bias, weight, state)
    options = (case["path"], case["grid"], True, case["merge"], case["step_order"])

    wide = [None if x is None else x.double().requires_grad_() for x in tensors]
    exact = path_scan_reference(
        *wide, path=options[0], grid=options[1], merge=case["merge"], projections_in_step_order=case["step_order"]
    )
    cotangents = torch.randn_like(exact[0]).to(case["dtype"]), torch.randn_like(exact[1]).float()
    leaves = [x for x in wide if x is not None]
    gradients = torch.autograd.grad(exact, leaves, [c.double() for c in cotangents])
    found = [*scan.forward(*tensors, *options), *scan.backward(*cotangents, *tensors, *options)]
    found = [x for x, given in zip(found, (1, 1, *tensors), strict=True) if given is not None]
    tolerance = 2e-6 if case["dtype"] == torch.float32 else 2**-9
    for i, (actual, expected) in enumerate(zip(found, (*exact, *gradients), strict=True)):
        # The last state is float32, whatever the activations are.
        assert relative(actual, expected) <= (2e-6 if i == 1 else tolerance), i


@pytest.mark.parametrize("states", [1, 16])
def test_gradients_of_parameters_survive_cancelling_images(states, monkeypatch):
    """Two images' large parts cancel: what is left is the third's, to float32's digits."""
    emulated = EmulatedLauncher()
    monkeypatch.setattr(cuda_runtime, "launcher", lambda _device: emulated)
    torch.manual_seed(0)
    u, delta = torch.randn(1, 49, 8), torch.randn(1, 49, 1, 8)
    B, C = torch.randn(2, 1, 49, 1, states)
    A, D, bias = -torch.rand(1, 8, states) - 0.1, torch.randn(1, 8), torch.randn(1, 8)
    dy = torch.randn(1, 49, 8) * torch.tensor([1e4, 1.0, -1e4]).view(3, 1, 1)
    options = (D, None, bias, None, None, "h", (49,), True, True, False)
    three = [x.expand(3, *x.shape[1:]) for x in (u, delta, B, C)]
    found = scan.backward(dy, None, *three[:2], A, *three[2:], *options)
    expected = scan.backward(dy[1:2], None, u, delta, A, B, C, *options)
    for i in (2, 5, 7):  # of A, D and the bias
        assert relative(found[i], expected[i].double()) <= 2e-6, i


@pytest.mark.parametrize(
    ("path", "grid", "width", "sequences"),
    [("h", (20,), 4, False), ("h,v_flip", (5, 9), 3, True), ("w3,h|cls", (5, 6), 2, False)],
)
def test_causal_conv1d(path, grid, width, sequences, monkeypatch):
    emulated = EmulatedLauncher()
    monkeypatch.setattr(cuda_runtime, "launcher", lambda _device: emulated)
    torch.manual_seed(0)
    table = scan_path(path, grid)
    tokens, directions = table.num_tokens, table.num_directions
    x, weight, bias = torch.randn(2, tokens, 10), torch.randn(directions, 10, width), torch.randn(directions, 10)
    sequence = (torch.arange(tokens) // 7).expand(2, tokens) if sequences else None
    initial = torch.randn(2, directions, 10, width - 1)
    options = (path, grid, True)
    exact = conv_torch.forward(x.double(), weight.double(), bias.double(), sequence, initial.double(), *options)
    dout, dfinal = torch.randn_like(exact[0]), torch.randn_like(exact[1])
    wide = (x.double(), weight.double(), bias.double(), sequence, initial.double())
    exact = (*exact, *conv_torch.backward(dout, dfinal, *wide, *options))
    found = conv.forward(x, weight, bias, sequence, initial, *options)
    found = (*found, *conv.backward(dout.float(), dfinal.float(), x, weight, bias, sequence, initial, *options))
    for actual, expected in zip(found, exact, strict=True):
        assert relative(actual, expected) <= 1e-6


@pytest.mark.parametrize("states", [16, 5, 128])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [False, True])
def test_state_update(states, state_dtype, slots, monkeypatch):
    monkeypatch.setattr(cuda_runtime, "launcher", lambda _device: EmulatedLauncher())
    torch.manual_seed(0)
    batch, heads, width, groups, dtype = 3, 4, 6, 2, torch.float32
    state = torch.randn(5 if slots else batch, heads, width, states).to(state_dtype)
    x, dt, z = (torch.randn(batch, heads, width).to(dtype) for _ in range(3))
    B, C = torch.randn(batch, groups, 2 * states).chunk(2, dim=-1)
    A = -torch.rand(heads, 1, 1).expand(heads, width, states)  # one decay a head, as in Mamba-2
    D, bias = torch.randn(heads, width), torch.randn(heads, width)
    indices = torch.tensor([3, -1, 0]) if slots else None
    arguments = (x, dt, A, B, C, D, z, bias, True, indices)
    expected_state = state.clone()
    expected = state_update.forward(expected_state, *arguments)
    found = cuda_update.state_update(state, *arguments)
    assert relative(found, expected.double()) <= (1e-6 if state_dtype == torch.float32 else 1e-3)
    assert relative(state, expected_state.double()) <= (1e-6 if state_dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("steps", [1, 3, 7])
@pytest.mark.parametrize("kind", ["plain", "circular", "slots", "circular_slots"])
def test_conv_update(steps, kind, monkeypatch):
    monkeypatch.setattr(cuda_runtime, "launcher", lambda _device: EmulatedLauncher())
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 10, steps), torch.randn(10, 4), torch.randn(10)
    seen = torch.tensor([0, 4, 9]) if "circular" in kind else None
    indices = torch.tensor([4, -1, 1]) if "slots" in kind else None
    state = torch.randn(5 if "slots" in kind else 3, 5, 10).transpose(1, 2)
    expected_state = state.clone()
    expected = conv_interface._update(x, expected_state, weight, bias, True, seen, indices)
    found = cuda_update.conv_update(x, state, weight, bias, True, seen, indices)
    assert relative(found, expected.double()) <= 1e-6
    assert torch.equal(state, expected_state)
