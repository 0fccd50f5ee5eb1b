"""The operator that a selective state space layer is on GPUs: the same as the operators that it is made of."""

import pytest
import torch

from visionmamba.layers import SS2D, GatedMixer, SelectiveSSM, gated_mixer, selective_ssm, ss2d
from visionmamba.ops._block_products import block_diagonal, diagonal_blocks, weight_gradient

OPERATOR = "selective_scan"

CASES = {
    "conv_and_gate": (dict(path="h,h_flip", d_conv=4, d_state=16, dt_rank=3), True),
    "cross": (dict(path="h,v,h_flip,v_flip", d_state=1, dt_rank=6), False),
    "apart": (dict(path="h", d_conv=4, conv_bias=False, merge=False, d_state=4, dt_rank=5), True),
    "shared": (dict(path="h,h_flip", d_state=2, dt_rank=2, shared=True), False),
}


def run(layer, x, z, fused, monkeypatch, autocast=False):
    monkeypatch.setattr(selective_ssm, "fuses", lambda _x: fused)
    layer.zero_grad()
    inputs = [t.clone().requires_grad_() for t in ((x,) if z is None else (x, z))]
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        y = layer(inputs[0], None if z is None else inputs[1], [5, 7])
    (y.float() * torch.linspace(-1, 1, y.numel(), device=x.device).view_as(y)).sum().backward()
    return y, *(t.grad for t in inputs), *(p.grad.clone() for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", CASES)
def test_same_as_its_parts(name, dtype, monkeypatch, device, backend_name):
    options, gated = CASES[name]
    if backend_name == "triton" and "d_conv" in options:
        pytest.skip("the convolution has no Triton kernel")
    torch.manual_seed(0)
    layer = SelectiveSSM(24, **options).to(device)
    x, z = torch.randn(2, 2, 35, 24, device=device).to(dtype)
    arguments = (layer, x, z if gated else None)
    parts = run(*arguments, False, monkeypatch, dtype == torch.bfloat16)
    whole = run(*arguments, True, monkeypatch, dtype == torch.bfloat16)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    for actual, expected in zip(whole, parts, strict=True):
        assert actual.dtype == expected.dtype
        assert float((actual - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize("name", CASES)
def test_no_images(name, monkeypatch, device, backend_name):
    options, gated = CASES[name]
    if backend_name == "triton" and "d_conv" in options:
        pytest.skip("the convolution has no Triton kernel")
    x, z = torch.randn(2, 0, 35, 24, device=device)
    layer = SelectiveSSM(24, **options).to(device)
    y, *gradients = run(layer, x, z if gated else None, True, monkeypatch)
    assert y.shape[:2] == (0, 35)
    assert not any(gradient.any() for gradient in gradients)


def joins_alike(mixer, module, dtype, monkeypatch, x, *arguments):
    """Assert that a mixer gives the same joined and apart, and that nothing is joined where there are no gradients."""
    results = []
    for joined in (False, True):
        monkeypatch.setattr(module, "fuses", lambda _x, joined=joined: joined)
        mixer.zero_grad()
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            assert mixer._joins(leaf) == joined
            y = mixer(leaf, *arguments)
        (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        results.append([y, leaf.grad, *(p.grad.clone() for p in mixer.parameters())])
    for expected, actual in zip(*results, strict=True):
        assert actual.dtype == expected.dtype
        assert float((actual - expected).norm()) <= (1e-5 if dtype == torch.float32 else 2**-7) * float(expected.norm())
    with torch.no_grad():
        assert not mixer._joins(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "autocast"])
def test_input_projection_computed_anew(dtype, monkeypatch):
    torch.manual_seed(0)
    mixer = GatedMixer(12, lambda channels: SelectiveSSM(channels, 4, 3, "h,h_flip", 4))
    joins_alike(mixer, gated_mixer, dtype, monkeypatch, x := torch.randn(2, 35, 12), [35])
    mixer.in_proj.register_forward_hook(lambda *_: None)
    assert not mixer._joins(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("gate", ["act", "none"])
def test_activation_computed_anew(gate, dtype, monkeypatch):
    torch.manual_seed(0)
    mixer = SS2D(12, d_state=2, gate=gate)
    joins_alike(mixer, ss2d, dtype, monkeypatch, x := torch.randn(2, 5, 7, 12))
    assert not SS2D(12, ssm="cascade")._joins(x)
    assert not SS2D(12, act_layer=torch.nn.GELU)._joins(x)
    mixer.act.register_forward_hook(lambda *_: None)
    assert not mixer._joins(x)


def test_dispatcher_behaviour():
    def arguments():
        parameters = [torch.randn(*s, requires_grad=True) for s in ((2, 6, 3), (2, 6), (2, 6, 6))]
        A = (-torch.rand(2, 6, 2)).requires_grad_()
        others = [torch.randn(*s, requires_grad=True) for s in ((2, 6), (2, 6), (2, 6, 2))]
        tokens = [torch.randn(2, 5, 6, requires_grad=True) for _ in range(2)]
        return (*tokens, None, *parameters, A, *others, "h,h_flip", [5], True, True)

    torch.library.opcheck(torch.ops.visionmamba.ssm.default, arguments(), test_utils=("test_schema", "test_faketensor"))
    layer = SelectiveSSM(6, 2, 2, "h,h_flip", 3)
    counted = {}
    for fused in (True, False):
        with pytest.MonkeyPatch.context() as patch, torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            patch.setattr(selective_ssm, "fuses", lambda _x, fused=fused: fused)
            layer(torch.randn(2, 5, 6), torch.randn(2, 5, 6), [5])
            counted[fused] = counter.get_total_flops()
    assert counted[True] == counted[False] > 0


def test_blocks_on_the_diagonal():
    weight = torch.randn(3, 4, 5)
    matrix = block_diagonal(weight)
    assert torch.equal(matrix, torch.block_diag(*weight))
    assert torch.equal(diagonal_blocks(matrix, 3, 4, 5), weight)
    x, y = torch.randn(300, 7), torch.randn(300, 5)
    torch.testing.assert_close(weight_gradient(x, y), x.t() @ y, rtol=1e-4, atol=1e-4)
