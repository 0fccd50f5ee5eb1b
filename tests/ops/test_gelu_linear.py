"""GELU and a linear layer as one operator: the same as PyTorch's two, with one activation kept."""

from functools import partial

import pytest
import timm
import timm.layers
import torch
import torch.nn as nn
import torch.nn.functional as F

from visionmamba.layers import Mlp, mlp
from visionmamba.ops.gelu_linear import gelu_linear

OPERATOR = "gelu_linear"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True), (False, False)])
def test_against_pytorch(biases, dtype, device):
    torch.manual_seed(0)
    has_bias, has_x_bias = biases
    x = (2 * torch.randn(3, 5, 24, device=device)).to(dtype)
    weight, b = torch.randn(7, 24, device=device), torch.randn(7, device=device) if has_bias else None
    x_bias = torch.zeros(24, device=device) if has_x_bias else None  # added to x already: only its gradient shows
    dout = torch.randn(3, 5, 7, device=device).to(dtype)
    results = []
    for wide in (False, True):
        leaves = [t if t is None else t.double() if wide else t for t in (x, weight, b, x_bias)]
        leaves = [t if t is None else t.clone().requires_grad_() for t in leaves]
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16 and not wide):
            if wide:
                out = F.linear(F.gelu(leaves[0] if x_bias is None else leaves[0] + leaves[3]), *leaves[1:3])
            else:
                out = gelu_linear(*leaves)
        wanted = [t for t in leaves if t is not None]
        results.append([out, *torch.autograd.grad(out, wanted, dout.to(out.dtype))])
    assert [t.dtype for t in results[0]] == [dtype, dtype, *[torch.float32] * (1 + sum(biases))]
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    for actual, expected in zip(*results, strict=True):
        assert float((actual.double() - expected).norm()) <= tolerance * float(expected.norm())


def test_layer_is_timms(monkeypatch):
    torch.manual_seed(0)
    ours, theirs = Mlp(8, 32), timm.layers.Mlp(8, 32)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 8)
    monkeypatch.setattr(mlp, "fuses", lambda _x, compiled=True: True)
    assert ours._joins(x)
    torch.testing.assert_close(ours(x), theirs(x))
    for model in (ours, theirs):
        model(x).square().sum().backward()
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=name)
    assert timm.create_model("test_vmamba").stages[0].blocks[0].mlp._joins(x)
    assert not Mlp(8, 32, act_layer=partial(nn.GELU, approximate="tanh"))._joins(x)
    assert not Mlp(8, 32, drop=0.1)._joins(x)
    assert not Mlp(8, 32, norm_layer=nn.LayerNorm)._joins(x)
    assert not Mlp(8, 32, act_layer=nn.SiLU)._joins(x)
    with torch.no_grad():
        assert not ours._joins(x)
    for watched in ("fc1", "act"):
        model = Mlp(8, 32)
        getattr(model, watched).register_forward_hook(lambda *_: None)
        assert not model._joins(x)


def test_dispatcher_behaviour():
    arguments = [torch.randn(*shape, requires_grad=True) for shape in ((2, 6), (3, 6), (3,), (6,))]
    torch.library.opcheck(torch.ops.visionmamba.gelu_linear.default, arguments)
