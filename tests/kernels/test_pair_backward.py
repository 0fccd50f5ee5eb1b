"""The backward that walks a direction and its reverse at a time, run on the CPU by ``simt.h`` against float64."""

import dataclasses

import pytest
import torch
from emulation import COMPILER, EmulatedLauncher

from visionmamba.ops import cuda_runtime, path_scan_reference
from visionmamba.ops.scan_path import scan_path
from visionmamba.ops.selective_scan import cuda_pair
from visionmamba.ops.selective_scan.cuda_call import Call

CROSS = "h,v,h_flip,v_flip"
NAMES = ("du", "ddelta", "dA", "dB", "dC", "dD", "dbias", "dstate")
CASES = {
    "whole_pieces": dict(path=CROSS, grid=(14, 14), channels=64),
    "a_warp_has_no_piece": dict(path=CROSS, grid=(9, 8), channels=40, rounds=1),
    "float16_in_three_rounds": dict(path=CROSS, grid=(15, 11), channels=40, dtype=torch.float16, rounds=3),
    "one_pair_float32_delta": dict(path="h_flip,h", grid=(5, 7), channels=8, delta=torch.float32),
    "three_pairs": dict(path="h,h_flip,snake_v,v_flip,v,snake_v_flip", grid=(9, 8), channels=32, rounds=2),
    "windows_with_padding": dict(path="w3,w3_flip", grid=(7, 5), channels=8),
    "combined_in_registers": dict(path=CROSS, grid=(15, 11), channels=40, parts=((3, 7),)),
    "combined_in_turns": dict(path=CROSS, grid=(18, 16), channels=40, parts=()),
    "no_softplus": dict(path="h,h_flip", grid=(6, 5), channels=8, softplus=False),
}


def make(path, grid, channels, dtype=torch.bfloat16, delta=None, batch=2):
    """Draw u, delta, A, B, C, D, bias and an initial state."""
    torch.manual_seed(0)
    table = scan_path(path, grid)
    tokens, directions = table.num_tokens, table.num_directions
    return (
        torch.randn(batch, tokens, channels).to(dtype),
        torch.randn(batch, tokens, directions, channels).to(delta or dtype),
        -torch.rand(directions, channels, 1) - 0.1,
        *torch.randn(batch, tokens, directions, 2).to(dtype).chunk(2, dim=-1),
        torch.randn(directions, channels),
        torch.randn(directions, channels),
        torch.randn(batch, directions, channels, 1),
    )


def relative(actual, exact):
    return float((actual.double() - exact).norm() / exact.norm())


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("name", CASES)
def test_gradients(name, monkeypatch):
    case = dict(CASES[name])
    rounds, softplus = case.pop("rounds", None), case.pop("softplus", True)
    monkeypatch.setattr(cuda_pair, "_PARTS", case.pop("parts", cuda_pair._PARTS))
    emulated = EmulatedLauncher()
    monkeypatch.setattr(cuda_runtime, "launcher", lambda _device: emulated)
    u, delta, A, B, C, D, bias, state = make(**case)
    if not softplus:
        delta, bias = delta.abs(), bias.abs()
    path, grid = case["path"], case["grid"]
    wide = [x.double().requires_grad_() for x in (u, delta, A, B, C, D, bias, state)]
    arguments = (*wide[:6], None, wide[6], None, wide[7])
    exact = path_scan_reference(*arguments, path=path, grid=grid, delta_softplus=softplus, merge=True)
    dy, dlast = torch.randn_like(exact[0]).to(u.dtype), torch.randn_like(exact[1]).float()
    expected = dict(zip(("du", "ddelta", "dA", "dB", "dC", "dD", "dbias", "dstate"), torch.autograd.grad(
        exact, wide, [dy.double(), dlast.double()]
    ), strict=True))  # fmt: skip
    call = Call(u, delta, A, B, C, D, bias, path, grid, softplus, False, others=[dy])
    cut = cuda_pair.plan(call, dy, most_steps=10**9, least_steps=1)
    if rounds is not None:
        cut = dataclasses.replace(cut, rounds=rounds)
    du, ddelta, dB, dC, dA, dD, dbias, dstate = cuda_pair.backward(call, cut, dy, dlast, state)
    found = dict(du=du, ddelta=ddelta, dA=dA, dB=dB, dC=dC, dD=dD, dbias=dbias, dstate=dstate)
    for key, exact in expected.items():
        assert relative(found[key], exact) <= (1e-6 if found[key].dtype == torch.float32 else 2**-9), key


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("path", ["h", "h,v", "h,v,h_flip", CROSS])
def test_projections_of_one_state(path, monkeypatch):
    monkeypatch.setattr(cuda_runtime, "launcher", lambda _device: EmulatedLauncher())
    u, delta, A, B, C, D, bias, _ = make(path, (19, 14), 8)
    call = Call(u, delta, A, B, C, D, bias, path, (19, 14), True, False)
    parts = torch.randn(2, call.directions, 5, 266, 2)
    dB, dC = call.projections(parts, 5)
    exact = parts.double().sum(2).permute(3, 0, 2, 1)[..., None]
    assert relative(dB, exact[0]) <= 2**-9
    assert relative(dC, exact[1]) <= 2**-9


def test_pairs_of_directions():
    assert cuda_pair.pairs_of(CROSS, (5, 7)) == ((0, 2), (1, 3))
    assert cuda_pair.pairs_of("h_flip,v,h,v_flip", (5, 7)) == ((0, 2), (1, 3))
    assert cuda_pair.pairs_of("h,v,h_flip", (5, 7)) == ()
    assert cuda_pair.pairs_of("h", (9,)) == ()


@pytest.mark.parametrize(
    "fault", ["float32", "apart", "step_order", "unpaired", "channels", "offset", "sparse", "short"]
)
def test_what_it_leaves_to_other_kernels(fault, monkeypatch):
    monkeypatch.setattr(cuda_runtime, "launcher", lambda _device: EmulatedLauncher())
    path = {"unpaired": "h,v", "sparse": "sub_200,sub_200_flip"}.get(fault, "h,h_flip")
    u, delta, A, B, C, D, bias, _ = make(
        path, (6, 6), 12 if fault == "channels" else 16, torch.float32 if fault == "float32" else torch.bfloat16
    )
    dy = torch.randn_like(u)
    if fault == "apart":
        u = u[:, :, None].expand(-1, -1, 2, -1)
    if fault == "offset":
        u = torch.nn.functional.pad(u, (1, 7))[..., 1:17]
    call = Call(u, delta, A, B, C, D, bias, path, (6, 6), True, fault == "step_order", others=[dy])
    least = 40 if fault == "short" else 1
    assert cuda_pair.plan(call, dy, least_steps=least, most_steps=10**9) is None
