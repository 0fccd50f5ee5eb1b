"""Multi-scale deformable attention by kernels, against grid sampling in float64."""

import os
import subprocess
import sys

import pytest
import torch

_REASON = 'needs OpenMMLab: pip install "visionmamba[openmmlab]"'
pytest.importorskip("visionmamba.openmmlab", reason=_REASON, exc_type=ImportError)
pytest.importorskip("triton")

from visionmamba.openmmlab.mmcv_ext import attention  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
CASES = {  # batch, queries, heads, channels, points, maps
    "three maps": (2, 13, 3, 8, 2, ((5, 7), (3, 4), (2, 1))),
    "odd channels": (1, 5, 2, 20, 2, ((2, 3),)),
    "many channels": (1, 9, 1, 256, 1, ((3, 3), (1, 4))),
    "more queries than a program takes": (1, 150, 1, 32, 4, ((6, 6),)),
}


def inputs(case, device, dtype):
    batch, queries, heads, channels, points, sizes = CASES[case]
    generator = torch.Generator().manual_seed(0)
    tokens = sum(height * width for height, width in sizes)
    value = torch.randn(batch, tokens, heads, channels, generator=generator)
    locations = (
        torch.rand(batch, queries, heads, len(sizes), points, 2, generator=generator) * 1.6 - 0.3
    )  # some outside
    weights = torch.randn(batch, queries, heads, len(sizes), points, generator=generator)
    return sizes, [tensor.to(device, dtype) for tensor in (value, locations, weights)]


def gradients(function, sizes, tensors):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    out = function(leaves[0], sizes, *leaves[1:])
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.bfloat16().to(out))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_kernels_agree_with_grid_sampling(case, dtype, device):
    """Outputs and all gradients; in bfloat16 of the same rounded inputs."""
    sizes, tensors = inputs(case, device, dtype)
    assert attention._fuses(tensors[0])
    found = gradients(attention.multi_scale_deformable_attention, sizes, tensors)
    expected = gradients(attention._by_grid_sampling, sizes, [tensor.double() for tensor in tensors])
    rounding = 2**-7 if INTERPRETED else 2**-8  # the interpreter cuts off where GPUs round to nearest
    tolerance = 2e-6 if dtype == torch.float32 else rounding
    for name, own, true in zip(("out", "value", "locations", "weights"), found, expected, strict=True):
        assert own.dtype == dtype
        assert (own - true).abs().max() <= tolerance * true.abs().max(), name


@pytest.mark.parametrize("device", DEVICES)
def test_kernels_under_mmcvs_convention(device):
    sizes, (value, locations, weights) = inputs("three maps", device, torch.float32)
    shapes = torch.tensor(sizes, device=device)
    starts = torch.tensor([0, 35, 47], device=device)
    out = attention.ms_deform_attn_forward(value, shapes, starts, locations, weights, 64)
    expected = gradients(attention._by_grid_sampling, sizes, (value, locations, weights))
    torch.testing.assert_close(out, expected[0])
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out)
    found = [torch.empty_like(tensor) for tensor in (value, locations, weights)]
    attention.ms_deform_attn_backward(value, shapes, starts, locations, weights, grad, *found, 64)
    for own, true in zip(found, expected[1:], strict=True):
        torch.testing.assert_close(own, true, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_to_attend(device):
    """No queries, and samples that all lie outside of the maps or nowhere."""
    sizes, (value, locations, weights) = inputs("odd channels", device, torch.float32)
    none = gradients(attention.multi_scale_deformable_attention, sizes, (value, locations[:, :0], weights[:, :0]))
    assert none[0].shape == (1, 0, 40)
    assert not none[1].any()
    for place in (-7.0, 1e30, float("nan")):
        found = gradients(attention.multi_scale_deformable_attention, sizes, (value, locations * 0 + place, weights))
        assert not any(tensor.any() for tensor in found)


def test_nothing_to_attend_by_grid_sampling():
    sizes, (value, locations, weights) = inputs("odd channels", "cpu", torch.float32)
    found = gradients(attention._by_grid_sampling, sizes, (value, locations[:, :0], weights[:, :0]))
    assert found[0].shape == (1, 0, 40)
    assert not found[1].any()


@pytest.mark.parametrize("device", DEVICES)
def test_grid_sampling_where_the_kernels_do_not_go(device, monkeypatch):
    value = torch.ones(1, 4, 1, 8, device=device)
    assert attention._fuses(value)
    assert not attention._fuses(value.double())
    assert not attention._fuses(value.expand(-1, -1, -1, 8).repeat(1, 1, 1, 40))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not attention._fuses(value)


@pytest.mark.parametrize("device", DEVICES)
def test_kernels_that_do_not_run_give_way_to_grid_sampling(device, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("no such instruction")

    sizes, tensors = inputs("odd channels", device, torch.float32)
    monkeypatch.setattr(attention, "_fused_forward", fail)
    attention._problem.cache_clear()
    with caplog.at_level("WARNING", logger="visionmamba.openmmlab"):
        for _ in range(2):
            out = attention.multi_scale_deformable_attention(tensors[0], sizes, *tensors[1:])
    attention._problem.cache_clear()
    assert len(caplog.records) == 1
    assert "no such instruction" in caplog.text
    torch.testing.assert_close(out, attention._by_grid_sampling(tensors[0], sizes, *tensors[1:]))


@pytest.mark.skipif(INTERPRETED, reason="is the interpreted run")
def test_interpreted():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cpu", __file__]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout[-3000:]
    assert "12 passed" in finished.stdout, finished.stdout[-300:]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the compiler")
@pytest.mark.parametrize("architecture", [80, 90])
def test_compiles(architecture):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from visionmamba.kernels.triton import deformable_attention as kernels

    constants = {"BLOCK": 32, "CHANNELS": 32, "LEVELS": 3, "POINTS": 4}
    kinds = dict.fromkeys(constants, "constexpr") | {"sizes_ptr": "*i64", "starts_ptr": "*i64"}
    for kernel in (kernels.deformable_attention, kernels.deformable_attention_backward):
        types = {name: kinds.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in kernel.arg_names}
        source = ASTSource(kernel, types, constants)
        assert compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 4}).asm["ptx"]
