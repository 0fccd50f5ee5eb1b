"""Norms on GPUs and what they are joined with: the same results as PyTorch's separate operators."""

import copy

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

import visionmamba
from visionmamba.layers import (
    SS2D,
    ConvDownsample,
    ConvPatchEmbed,
    LayerNorm,
    StreamLayerNorm,
    StreamRMSNorm,
    before_linear,
    joined_blocks,
    norm,
    recompute,
    residual_stream,
)
from visionmamba.layers.fusion import fuses, unwatched
from visionmamba.layers.norm import _joins as joins
from visionmamba.layers.norm import add_norm
from visionmamba.ops.channel_norm import channel_norm


@pytest.fixture
def fused(monkeypatch):
    monkeypatch.setattr(norm, "fuses", lambda _x, compiled=True: True)


def test_a_cpu_runs_the_separate_operators():
    assert not fuses(torch.ones(2, 3))
    assert not joins(torch.ones(2, 3), torch.ones(2, 3), LayerNorm(3))


@pytest.mark.parametrize("create", [LayerNorm, StreamLayerNorm, StreamRMSNorm])
def test_a_norm_is_pytorchs(create, fused):
    torch.manual_seed(0)
    layer = create(12, eps=1e-6)
    nn.init.normal_(layer.weight)
    x, dy = torch.randn(2, 5, 12, requires_grad=True), torch.randn(2, 5, 12)
    if create is StreamRMSNorm:
        expected = F.rms_norm(x, (12,), layer.weight, 1e-6)
    else:
        expected = F.layer_norm(x, (12,), layer.weight, layer.bias, 1e-6)
    found = layer(x)
    leaves = (x, *layer.parameters())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, leaves, dy), torch.autograd.grad(expected, leaves, dy))


def test_a_narrow_stream_keeps_its_parameters_dtype(fused):
    layer = before_linear(StreamRMSNorm(12, dtype=torch.bfloat16))
    assert layer.narrow
    assert layer(torch.randn(3, 12)).dtype == torch.bfloat16
    assert before_linear(nn.Identity()).__class__ is nn.Identity


def test_sum_and_norm_together(fused):
    torch.manual_seed(0)
    layer, x, added = LayerNorm(12), torch.randn(2, 5, 12), torch.randn(2, 5, 12).bfloat16()
    assert joins(x, added, layer)
    assert not joins(added, x, layer)  # the sum would be wider than the stream
    assert not joins(x, added, nn.LayerNorm(12))
    total, out = add_norm(x, added, layer)
    torch.testing.assert_close(total, x + added)
    torch.testing.assert_close(out, layer(x + added))
    assert add_norm(x, None, layer)[0] is x
    layer.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(add_norm(x, added, layer), (total, out))
    assert not unwatched(layer)
    assert not joins(x, added, layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_of_a_convolution_added_by_the_norm(dtype, monkeypatch):
    torch.manual_seed(0)
    model, x = nn.Sequential(ConvPatchEmbed(4, 3, 16), ConvDownsample(16, 12)).to(dtype), torch.randn(2, 3, 16, 12)
    shifts = []
    monkeypatch.setattr(norm, "channel_norm", lambda *a, **k: shifts.append(k.get("shift")) or channel_norm(*a, **k))

    def results(model, joined):
        monkeypatch.setattr(norm, "fuses", lambda _x, compiled=True: joined)
        y = model(x.to(dtype).to(model[0].conv1.weight))
        (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.double).view_as(y)).sum().backward()
        return [y.detach(), *(p.grad for p in model.parameters())]

    exact, plain = results(copy.deepcopy(model).double(), False), results(copy.deepcopy(model), False)
    joined = results(model, True)
    embed, downsample = model
    assert [id(shift) for shift in shifts] == [id(m.bias) for m in (embed.conv1, embed.conv2, downsample.conv)]
    assert [t.dtype for t in joined] == [t.dtype for t in plain]
    errors = [[float((t - e).norm() / e.norm()) for t, e in zip(form, exact, strict=True)] for form in (joined, plain)]
    assert max(errors[0]) <= (1e-6 if dtype == torch.float32 else 1.5 * max(errors[1]))
    if dtype == torch.bfloat16:
        assert sum(errors[0]) <= sum(errors[1])  # the bias is added in float32 and not to what was rounded


def test_a_convolution_that_is_watched_adds_its_bias(fused, monkeypatch):
    monkeypatch.setattr(norm, "channel_norm", None)
    conv, layer, x = ConvDownsample(4, 6).conv, nn.LayerNorm(6), torch.randn(1, 4, 4, 4)
    torch.testing.assert_close(norm.conv_norm(x, conv, layer), layer(conv(x)))  # not a norm that can
    conv.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="NoneType"):  # the norm by itself, after the convolution
        norm.conv_norm(x, conv, LayerNorm(6))


def test_gradients_of_the_sum():
    torch.manual_seed(0)
    x, added = (torch.randn(3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for rms in (True, False):
        assert torch.autograd.gradcheck(
            lambda *t: channel_norm(t[0], t[2], t[3], 1e-5, rms, t[1], 0.5),  # noqa: B023
            (x, added, weight, bias),
        )
        assert torch.autograd.gradcheck(lambda *t: channel_norm(*t, 1e-5, rms)[0], (x, weight, bias))  # noqa: B023
        assert torch.autograd.gradcheck(
            lambda *t: channel_norm(*t[:3], 1e-5, rms, shift=t[3])[0],  # noqa: B023
            (x, weight, bias, added[0].detach().requires_grad_()),
        )


def test_dispatcher_behaviour():
    x, added = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8).bfloat16().requires_grad_()
    weight, bias = torch.randn(2, 8).unbind()
    arguments = (x, added, weight, bias, None, 1e-5, False, 0.5, torch.bfloat16)
    torch.library.opcheck(torch.ops.visionmamba.channel_norm.default, arguments)
    arguments = (x, None, weight, None, bias.clone().requires_grad_(), 1e-5, True, 1.0, torch.float32)
    torch.library.opcheck(torch.ops.visionmamba.channel_norm.default, arguments)


def test_bad_input_is_named():
    x, weight = torch.ones(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match=r"weight: expected shape \(4,\), got \(3,\)"):
        channel_norm(x, torch.ones(3))
    with pytest.raises(ValueError, match=r"added: expected shape \(2, 4\), got \(4,\)"):
        channel_norm(x, weight, added=torch.ones(4))
    with pytest.raises(ValueError, match=r"shift: expected shape \(4,\), got \(3,\)"):
        channel_norm(x, weight, shift=torch.ones(3))
    with pytest.raises(ValueError, match="shift: expected none where something is added"):
        channel_norm(x, weight, added=x, shift=weight)
    with pytest.raises(TypeError, match="x: expected dtype"):
        channel_norm(x.int(), weight)


def run_as(fused, monkeypatch):
    """Run layers as on a GPU, or by the separate operators."""
    for module in (norm, joined_blocks, recompute):
        monkeypatch.setattr(module, "fuses", lambda _x, compiled=True: fused)


def results(model, x, fused, monkeypatch, autocast=False):
    """Return the output of a model and its gradients."""
    run_as(fused, monkeypatch)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.double).view_as(y)).sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters())]


JOINED = {
    "test_vmamba": 32,
    "test_local_vmamba": 56,  # windows of 7 tile the first map only
    "test_efficient_vmamba": 40,  # odd maps
    "test_plainmamba": 48,
    "test_mamba2d": 32,
}


SIZES = JOINED | {"test_vim": 64, "test_local_vim": 64}


def varied(name):
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=SIZES[name]).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, torch.randn(2, 3, SIZES[name], SIZES[name])


@pytest.mark.parametrize("name", JOINED)
def test_blocks_leave_additions_to_each_other_and_compute_anew(name, monkeypatch):
    model, x = varied(name)
    model, x = model.double(), x.double()
    blocks = model.stages[0].blocks if hasattr(model, "stages") else model.blocks
    runs = []
    for module in ("visionmamba.models._hierarchical", "visionmamba.models._isotropic"):
        run = joined_blocks.run_joined
        monkeypatch.setattr(f"{module}.run_joined", lambda *a, run=run: runs.append(len(a[0])) or run(*a))
    again = copy.deepcopy(model)
    separate = results(again, x, False, monkeypatch)
    assert not runs
    statistics = [*again.buffers()]  # of batch norms: moved once
    joined = results(model, x, True, monkeypatch)
    assert sum(runs) >= len(blocks)
    torch.testing.assert_close(joined, separate, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close([*model.buffers()], statistics)
    assert joined_blocks.blocks_join(blocks, x)
    blocks[0].register_forward_hook(lambda *_: None)
    assert not joined_blocks.blocks_join(blocks, x)
    torch.testing.assert_close(results(model, x, True, monkeypatch), separate, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", JOINED)
def test_what_is_computed_anew_is_so_under_autocast(name, monkeypatch):
    model, x = varied(name)
    exact = results(copy.deepcopy(model).double(), x.double(), False, monkeypatch)
    separate, joined = (results(model, x, fused, monkeypatch, autocast=True) for fused in (False, True))
    assert [t.dtype for t in joined[1:]] == [t.dtype for t in separate[1:]]

    def errors(found):
        pairs = zip(found, exact, strict=True)
        return torch.tensor([float((t - e).norm() / (e.norm() + 1e-12)) for t, e in pairs])

    for of in (torch.median, torch.max):  # most tensors, and each
        assert float(of(errors(joined))) <= 1.5 * float(of(errors(separate)))


def gradients(model, x, dtype):
    """Return the output of a model as it runs by itself, and its gradients."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cuda", dtype, enabled=dtype is not None, cache_enabled=False):
        y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.double, device=y.device).view_as(y)
    (y.double() * weights).sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.gpu
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_families_on_a_gpu(name, dtype, monkeypatch):
    for backend in (torch.backends.cudnn, torch.backends.cuda.matmul):
        monkeypatch.setattr(backend, "allow_tf32", False)
    model, x = varied(name)
    exact = gradients(copy.deepcopy(model).double(), x.double(), None)
    model, x = model.cuda(), x.cuda()
    with visionmamba.backend("torch"):
        plain = gradients(model, x, dtype)
    joined = gradients(model, x, dtype)

    def errors(found):
        pairs = zip(found, exact, strict=True)
        return torch.tensor([float((t.cpu() - e).norm() / (e.norm() + 1e-12)) for t, e in pairs])

    assert float(errors(joined).median()) <= (1e-5 if dtype is None else 1.5 * float(errors(plain).median()))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(model, x, dtype)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(model, x, dtype)
    graph.replay()
    torch.testing.assert_close(captured, joined, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["test_local_vmamba", "test_efficient_vmamba", "test_plainmamba"])
def test_mixers_keep_less(name, monkeypatch):
    model, x = varied(name)

    def kept(fused):
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        run_as(fused, monkeypatch)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(x)
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        return sum(t.untyped_storage().nbytes() for place, t in storages.items() if place not in own)

    assert kept(True) < 0.8 * kept(False)


def test_a_mixer_that_is_watched_keeps_all(monkeypatch):
    run_as(True, monkeypatch)
    for name, watched in (("test_plainmamba", "conv2d"), ("test_efficient_vmamba", "conv"), ("test_vmamba", None)):
        mixer = next(m for m in varied(name)[0].modules() if hasattr(m, "_recomputes") and hasattr(m, "in_proj"))
        x = torch.randn(1, 4, 4, mixer.in_proj.in_features)
        assert mixer._recomputes(x) == (watched is not None)  # VMamba's own operator computes SiLU anew, and no more
        with torch.no_grad():
            assert not mixer._recomputes(x)
        if watched:
            getattr(mixer, watched).register_forward_hook(lambda *_: None)
            assert not mixer._recomputes(x)
    mixer = next(m for m in varied("test_local_vmamba")[0].modules() if hasattr(m, "_recomputes"))
    assert mixer._recomputes(x)
    mixer.ssm.directions.register_forward_hook(lambda *_: None)  # inside
    assert not mixer._recomputes(x)


@pytest.mark.parametrize("ssm", ["selective", "multi_head", "cascade"])
def test_scans_with_forms_of_their_own_keep_all(ssm, monkeypatch):
    torch.manual_seed(0)
    mixer, x = SS2D(12, d_state=4, dt_rank=2, ssm=ssm).double(), torch.randn(2, 5, 4, 12, dtype=torch.double)
    separate, joined = (results(mixer, x, fused, monkeypatch) for fused in (False, True))
    torch.testing.assert_close(joined, separate)


def test_parameters_that_others_stand_for(monkeypatch):
    run_as(True, monkeypatch)
    model, x = varied("test_plainmamba")
    others = {name: (2 * p.detach()).requires_grad_() for name, p in model.named_parameters()}
    torch.func.functional_call(model, others, (x,)).square().sum().backward()
    again = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.mul_(2)
    again(x).square().sum().backward()
    for name, parameter in again.named_parameters():
        torch.testing.assert_close(others[name].grad, parameter.grad, rtol=1e-3, atol=1e-3)


def test_parameters_that_change_before_backward_are_refused(monkeypatch):
    run_as(True, monkeypatch)
    model, x = varied("test_plainmamba")
    y = model(x)
    with torch.no_grad():
        model.blocks[0].mixer.in_proj.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_second_derivatives_are_refused(monkeypatch):
    run_as(True, monkeypatch)
    model, x = varied("test_plainmamba")
    weight = model.blocks[0].mixer.in_proj.weight
    (gradient,) = torch.autograd.grad(model(x).square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("options", [{}, {"norm": "layer", "directions": "sum"}])
def test_blocks_of_vim_leave_additions_to_each_other(options, monkeypatch):
    torch.manual_seed(0)
    model = timm.create_model("test_vim", **options).train()
    x, results = torch.randn(2, 3, 64, 64), []
    for joined in (False, True):
        for module in (norm, residual_stream):
            monkeypatch.setattr(module, "fuses", lambda _x, compiled, joined=joined: joined)
        model.zero_grad()
        y = model(x)
        y.square().mean().backward()
        results.append([y.detach(), *(p.grad for p in model.parameters())])
        assert model._joins(x, model.blocks) == joined
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
    model.blocks[1].norm.register_forward_hook(lambda *_: None)
    assert not model._joins(x, model.blocks)
    assert not timm.create_model("test_vim", rope="stream")._joins(x, model.blocks)
