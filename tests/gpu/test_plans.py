"""Plans on a GPU: the bits, the memory and the order of streams that the operators have without them."""

import importlib

import pytest
import timm
import torch
import torch.nn.functional as F

import visionmamba  # noqa: F401
from visionmamba.layers import SelectiveSSM
from visionmamba.ops import causal_conv1d, selective_scan
from visionmamba.ops._plan import Plans
from visionmamba.ops.channel_norm import channel_norm
from visionmamba.ops.gelu_linear import gelu_linear

pytestmark = pytest.mark.gpu

operators = importlib.import_module("visionmamba.ops._operator")
MODELS = ("vim", "vmamba", "plainmamba", "local_vim", "local_vmamba", "efficient_vmamba", "mamba2d")


@pytest.fixture(autouse=True)
def _watch_the_second_call(monkeypatch):
    monkeypatch.setattr(importlib.import_module("visionmamba.ops._plan"), "UNWATCHED", 1)


@pytest.fixture
def unplanned(monkeypatch):
    """Run a function without plans."""

    def run(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(operators, "_PLANNED", ())
            return function(*arguments)

    return run


@pytest.fixture
def planned(monkeypatch):
    """Run a function, and assert that no operator decided anything in it."""

    def run(function, *arguments):
        with monkeypatch.context() as patch:
            for module in ("ops.channel_norm", "ops.gelu_linear", "ops.selective_scan.op", "ops.causal_conv1d.op"):
                patch.setattr(importlib.import_module(f"visionmamba.{module}"), "select", None)
            return function(*arguments)

    return run


def _norm(x, added, weight, bias):
    return channel_norm(x, weight, bias, added=added, dtype=torch.bfloat16)


def _gelu(x, weight, bias):
    return (gelu_linear(x, weight, bias),)


def _convolution(x, weight, bias):
    return causal_conv1d(x[..., 8:], weight, bias, path="h,h_flip", grid=[5, 7])


def _scan(u, delta, A, BC, D):
    return selective_scan(u, delta, -A.exp(), *BC.chunk(2, dim=-1), D, path="h,v", grid=[5, 7])


def _draw(*shapes):
    return [torch.randn(shape, device="cuda").to(dtype).requires_grad_() for shape, dtype in shapes]


F32, BF16 = torch.float32, torch.bfloat16
CALLS = {
    "norm": (_norm, [((3, 35, 96), F32), ((3, 35, 96), BF16), ((96,), F32), ((96,), F32)]),
    "gelu": (_gelu, [((3, 35, 96), BF16), ((24, 96), F32), ((24,), F32)]),
    "convolution": (_convolution, [((3, 35, 40), BF16), ((2, 32, 4), F32), ((2, 32), F32)]),
    "scan": (
        _scan,
        [((3, 35, 32), BF16), ((3, 35, 2, 32), BF16), ((2, 32, 4), F32), ((3, 35, 2, 8), BF16), ((2, 32), F32)],
    ),
}  # fmt: skip


def _outcome(function, tensors):
    results = [x for x in function(*tensors) if x.requires_grad]
    torch.manual_seed(1)
    cotangents = [torch.randn_like(x) for x in results]
    return [*results, *torch.autograd.grad(results, tensors, cotangents)]


@pytest.mark.parametrize("name", CALLS)
def test_an_operator_gives_the_same_bits(name, unplanned, planned):
    function, shapes = CALLS[name]
    for time in range(5):
        tensors = _draw(*shapes)
        expected = unplanned(_outcome, function, tensors)
        found = (planned if time > 1 else lambda f, *a: f(*a))(_outcome, function, tensors)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def _step(model, x, autocast):
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        y = model(x)
    y.float().square().mean().backward()
    return [y, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_the_same_bits(name, autocast, unplanned, planned):
    torch.manual_seed(0)
    model = timm.create_model(f"test_{name}").cuda()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for time in range(4):
            x = torch.randn(2, 3, 64, 64, device="cuda")
            expected = [t.clone() for t in unplanned(_step, model, x, autocast)]
            found = (planned if time > 1 else lambda f, *a: f(*a))(_step, model, x, autocast)
            assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_no_more_memory_is_taken(unplanned, planned):
    torch.manual_seed(0)
    layer = SelectiveSSM(192, d_state=16, dt_rank=12, path="h,h_flip", d_conv=4).cuda()
    x, z = torch.randn(2, 32, 196, 192, device="cuda", dtype=BF16)
    x.requires_grad_()

    def step():
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", BF16):
            layer(x, z, [14, 14]).float().square().mean().backward()
        layer.zero_grad()
        x.grad = None
        return torch.cuda.max_memory_allocated()

    step()
    most = unplanned(step)
    recording = step()
    assert planned(step) <= most
    assert recording <= most + (1 << 20)


def test_launches_follow_the_current_stream_and_are_captured():
    (x,), stream, graph = _draw(((512, 196, 192), F32)), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    x, weight = x.detach(), torch.ones(192, device="cuda")
    for _ in range(3):
        channel_norm(x, weight)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = x.clone()
        for _ in range(20):
            y.mul_(1.01)
        found = channel_norm(y, weight)[0]
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(found, F.layer_norm(y, [192]), rtol=1e-4, atol=1e-5)
    with torch.cuda.graph(graph):
        captured = channel_norm(x, weight)[0]
    x.normal_()
    graph.replay()
    torch.testing.assert_close(captured, F.layer_norm(x, [192]), rtol=1e-4, atol=1e-5)


def test_every_device_has_its_own():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for _ in range(3):
        for index in range(2):
            x = torch.randn(4, 96, device=f"cuda:{index}")
            weight = torch.ones(96, device=x.device)
            torch.testing.assert_close(channel_norm(x, weight)[0], F.layer_norm(x, [96]), rtol=1e-4, atol=1e-5)


def test_a_tensor_elsewhere_is_still_refused():
    x, weight = torch.randn(4, 96, device="cuda"), torch.ones(96, device="cuda")
    for _ in range(3):
        channel_norm(x, weight)
    with pytest.raises(ValueError, match="weight: expected device cuda:0"):
        channel_norm(x, weight.cpu())
    assert Plans.signature((x, weight)) != Plans.signature((x, weight.cpu()))
