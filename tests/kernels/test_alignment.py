"""Tensors that begin between the places where vectors may: slices of flat buffers, as parameters sometimes are."""

import pytest
import torch
from emulation import COMPILER, Checks, EmulatedLauncher, Schedule, checked, outcome

from visionmamba.ops import causal_conv1d, cuda_runtime, selective_scan
from visionmamba.ops.channel_norm import channel_norm
from visionmamba.ops.gelu_linear import gelu_linear
from visionmamba.ops.ssm import selective_ssm

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")

F32, BF16 = torch.float32, torch.bfloat16
CROSS = "h,v,h_flip,v_flip"


def _scan(path, grid):
    def run(u, dt, A, BC, D, bias, weight, z=None):
        return selective_scan(u, dt, -A.exp(), *BC.chunk(2, -1), D, z, bias, weight, path=path, grid=grid)

    return run


def _scan_shapes(batch, tokens, directions, channels, states, rank, gate=False):
    shared = [((directions, channels), F32), ((directions, channels), F32), ((directions, channels, rank), F32)]
    rows = [((batch, tokens, channels), BF16), ((batch, tokens, directions, rank), BF16)]
    own = [((directions, channels, states), F32), ((batch, tokens, directions, 2 * states), BF16)]
    return rows + own + shared + [((batch, tokens, channels), BF16)] * gate


CASES = {
    "norm": (
        lambda x, added, w, b: channel_norm(x, w, b, added=added, dtype=BF16),
        [((2, 5, 96), F32), ((2, 5, 96), BF16), ((96,), F32), ((96,), F32)],
    ),
    "norm_after_a_bias": (
        lambda x, w, b, shift: channel_norm(x, w, b, shift=shift)[:1],
        [((2, 5, 64), BF16), ((64,), F32), ((64,), F32), ((64,), F32)],
    ),
    "gelu": (lambda x, w, b: [gelu_linear(x, w, b)], [((2, 5, 8), BF16), ((6, 8), F32), ((6,), F32)]),
    "convolution": (
        lambda x, w, b: causal_conv1d(x, w, b, path="h,v", grid=[2, 3]),
        [((2, 6, 8), BF16), ((2, 8, 4), F32), ((2, 8), F32)],
    ),
    "both_ways": (
        lambda x, w, b: causal_conv1d(x, w, b, path="h,h_flip", grid=[2, 3]),
        [((2, 6, 8), BF16), ((2, 8, 4), F32), ((2, 8), F32)],
    ),
    "one_state": (_scan(CROSS, [2, 3]), _scan_shapes(2, 6, 4, 64, 1, 6)),
    "many_states": (_scan(CROSS, [2, 3]), _scan_shapes(2, 6, 4, 64, 16, 6)),
    "paired": (_scan("h,h_flip", [2, 3]), _scan_shapes(40, 6, 2, 64, 16, 8, gate=True)),
    "long": (_scan(CROSS, [27, 27]), _scan_shapes(1, 729, 4, 32, 1, 6)),
    "ssm": (
        lambda x, proj, A, D, bias, dt: [
            selective_ssm(x, None, None, None, None, proj, -A.exp(), D, bias, dt, CROSS, [2, 3])
        ],
        [((2, 6, 64), BF16), ((4, 8, 64), F32), ((4, 64, 1), F32), ((4, 64), F32), ((4, 64), F32), ((4, 64, 6), F32)],
    ),
}


def _begins_late(x):
    flat = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    return flat.copy_(x)


@pytest.mark.parametrize("name", CASES)
def test_no_vector_begins_in_between(name, cuda_backends, monkeypatch):
    monkeypatch.setattr(cuda_runtime, "launcher", lambda _device: EmulatedLauncher(2))
    function, shapes = CASES[name]
    torch.manual_seed(0)
    tensors = [torch.randn(shape).to(dtype) for shape, dtype in shapes]
    with checked(Checks(schedules=(Schedule(),), poison=False)):
        found = outcome(function, [_begins_late(x).requires_grad_() for x in tensors], _begins_late)
        expected = outcome(function, [x.requires_grad_() for x in tensors])
    for x, y in zip(found, expected, strict=True):
        assert float((x - y).detach().norm()) <= (1e-5 if x.dtype == F32 else 2**-8) * float(y.detach().norm())
