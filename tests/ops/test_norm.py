"""Gated norms and residual norms: goldens, plain PyTorch, gradcheck, dispatcher behaviour, bad input."""

import pytest
import torch
import torch.nn.functional as F
from _goldens import operator_goldens

from visionmamba.ops import layer_norm_fn, layernorm_fn, rms_norm_fn, rmsnorm_fn

OPERATOR = "gated_norm"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", operator_goldens("rmsnorm_gated"))
def test_goldens(name, dtype, device, backend_name):
    if dtype == torch.float64 and backend_name == "triton":
        pytest.skip("the Triton kernels have no float64")
    golden = operator_goldens("rmsnorm_gated")[name]
    inputs, params = golden.inputs(dtype, device), golden.params
    inputs.setdefault("bias", None)
    if params["kind"] == "gated":
        outputs = {
            "out": rmsnorm_fn(
                **inputs,
                eps=params["eps"],
                group_size=params["group_size"],
                norm_before_gate=params["norm_before_gate"],
            )
        }
    else:
        out, total = layer_norm_fn(**inputs, eps=params["eps"], prenorm=True, is_rms_norm=params["rms"])
        outputs = {"out": out, "residual_out": total}
    golden.backward(outputs)
    golden.check(outputs, {key: tensor for key, tensor in inputs.items() if tensor is not None})


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(("rms", "bias", "groups"), [(True, False, 1), (False, True, 1), (False, False, 3)])
def test_gated_against_pytorch(rms, bias, groups, before, device):
    torch.manual_seed(0)
    x, z, w, b, g = (torch.randn(*s, device=device) for s in ((5, 7, 24), (5, 7, 24), (24,), (24,), (5, 7, 24)))
    tensors = [t.requires_grad_() for t in ((x, z, w, b) if bias else (x, z, w))]
    out = layernorm_fn(x, w, b if bias else None, z, 1e-5, 24 // groups, before, rms)
    gate = F.silu(z)
    y = (x if before else x * gate).unflatten(-1, (groups, -1))
    y = F.rms_norm(y, y.shape[-1:], eps=1e-5) if rms else F.layer_norm(y, y.shape[-1:], eps=1e-5)
    y = y.flatten(-2) * w
    y = y + b if bias else y
    y = y * gate if before else y
    torch.testing.assert_close(out, y, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(out, tensors, g), torch.autograd.grad(y, tensors, g)
    torch.testing.assert_close(*gradients, rtol=2e-5, atol=2e-5)


def test_gradcheck():
    torch.manual_seed(0)
    x, z, residual = (torch.randn(3, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    w, b = (torch.randn(8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for before in (True, False):
        for rms in (True, False):
            assert torch.autograd.gradcheck(lambda *t: layernorm_fn(*t, 1e-5, 4, before, rms), (x, w, b, z))  # noqa: B023
            assert torch.autograd.gradcheck(
                lambda *t: layer_norm_fn(*t, prenorm=True, is_rms_norm=rms),  # noqa: B023
                (x, w, b, residual),
            )


@pytest.mark.parametrize("residual_in_fp32", [True, False])
def test_residual_dtype(residual_in_fp32, device):
    x, weight = torch.randn(4, 16, device=device, dtype=torch.bfloat16), torch.ones(16, device=device)
    out, total = rms_norm_fn(x, weight, None, prenorm=True, residual_in_fp32=residual_in_fp32)
    assert out.dtype == torch.bfloat16
    assert total.dtype == (torch.float32 if residual_in_fp32 else torch.bfloat16)
    out, again = rms_norm_fn(x, weight, None, residual=total, prenorm=True)
    assert again.dtype == total.dtype
    expected = F.rms_norm(x.float() + total.float(), (16,), eps=1e-6)
    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-2)


def test_parallel_branches_and_rowscale():
    torch.manual_seed(0)
    x, x1, residual = torch.randn(3, 4, 8), torch.randn(3, 4, 8), torch.randn(3, 4, 8)
    weight, weight1, scale = torch.randn(8), torch.randn(8), torch.rand(3, 4)
    out, out1, total = layer_norm_fn(
        x, weight, None, residual, x1, weight1, eps=1e-5, rowscale=scale, prenorm=True, is_rms_norm=True,
        zero_centered_weight=True,
    )  # fmt: skip
    expected = x * scale.unsqueeze(-1) + x1 + residual
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(out, F.rms_norm(expected, (8,), weight + 1, 1e-5))
    torch.testing.assert_close(out1, F.rms_norm(expected, (8,), weight1 + 1, 1e-5))


def test_dropout_keeps_the_scale():
    torch.manual_seed(0)
    x, residual = torch.ones(1000, 8), torch.zeros(1000, 8)
    _, total = layer_norm_fn(x, torch.ones(8), None, residual, dropout_p=0.25, prenorm=True)
    assert total.unique().tolist() == pytest.approx([0, 4 / 3])
    assert total.mean().item() == pytest.approx(1, abs=0.03)


def test_opcheck():
    x, z, w = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True), torch.ones(8)
    torch.library.opcheck(torch.ops.visionmamba.gated_norm.default, (x, w, None, z, 1e-5, 4, False, True))
    torch.library.opcheck(torch.ops.visionmamba.add_norm.default, (x, z, w, None, 1e-5, True, True))
    torch.library.opcheck(torch.ops.visionmamba.add_norm.default, (x, None, w, w.clone(), 1e-5, False, False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": torch.ones(7)}, "weight: expected shape"),
        ({"z": torch.ones(3, 7)}, "z: expected shape"),
        ({"group_size": 3}, "group_size: expected a divisor of 8 channels, got 3"),
    ],
)
def test_bad_input(options, message):
    arguments = {"x": torch.ones(3, 8), "weight": torch.ones(8), "bias": None} | options
    with pytest.raises(ValueError, match=message):
        rmsnorm_fn(**arguments)
