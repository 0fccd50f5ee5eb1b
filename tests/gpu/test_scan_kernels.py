"""The CUDA scan where only a GPU can show it: random shapes, poisoned memory, repeatability, streams, graphs, sizes."""

import importlib
import random

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from visionmamba.ops import backend, cuda_runtime, path_scan_reference, selective_scan
from visionmamba.ops.scan_path import scan_path

pytestmark = pytest.mark.gpu

PATHS = {
    1: ["h", "h_flip"],
    2: ["h,v", "h,h_flip", "snake_h,snake_v_flip", "w3,h|cls", "sub_200,subT_211"],
    4: ["h,v,h_flip,v_flip", "sub_200,subT_201,sub_210,subT_211", "snake_h,snake_v,snake_h_flip,snake_v_flip"],
}
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "dt_weight", "initial_state")


def draw(
    path, grid, batch=2, channels=24, states=16, dtype=torch.float32, own_input=False, gate=True, rank=0, state=True
):
    """Return random arguments of the scan on the GPU, as leaves."""
    table = scan_path(path, grid)
    directions, tokens = table.num_directions, table.num_tokens

    def random(*shape, kind=torch.float32):
        return torch.randn(shape, device="cuda").to(kind)

    middle = (directions,) if own_input else ()
    tensors = {
        "u": random(batch, tokens, *middle, channels, kind=dtype),
        "delta": random(batch, tokens, directions, rank or channels, kind=dtype),
        "A": -torch.rand(directions, channels, states, device="cuda") - 0.1,
        "B": random(batch, tokens, directions, states, kind=dtype),
        "C": random(batch, tokens, directions, states, kind=dtype),
        "D": random(directions, channels),
        "z": random(batch, tokens, channels, kind=dtype) if gate else None,
        "delta_bias": random(directions, channels),
        "dt_weight": random(directions, channels, rank) if rank else None,
        "initial_state": random(batch, directions, channels, states) if state else None,
    }
    return {name: None if x is None else x.requires_grad_() for name, x in tensors.items()}


def results(function, tensors, cotangents=None, **options):
    """Return the outputs and the gradients of a call."""
    y, last_state = function(**tensors, **options)
    cotangents = cotangents or (torch.randn_like(y), torch.randn_like(last_state))
    leaves = {name: x for name, x in tensors.items() if x is not None}
    gradients = torch.autograd.grad(
        [y, last_state], list(leaves.values()), [c.to(o) for c, o in zip(cotangents, (y, last_state), strict=True)]
    )
    return {"y": y, "last_state": last_state, **dict(zip(leaves, gradients, strict=True))}, cotangents


def check(tensors, dtype, **options):
    """Compare the CUDA scan with float64: to 1e-5 of each result's norm in float32, to its rounding otherwise."""
    with backend("cuda"):
        actual, cotangents = results(selective_scan, tensors, **options)
    wide = {name: None if x is None else x.detach().double().requires_grad_() for name, x in tensors.items()}
    exact, _ = results(path_scan_reference, wide, cotangents, **options)
    tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    for name, x in exact.items():
        error = float((actual[name].double() - x).norm() / x.norm().clamp(min=1e-30))
        assert error <= tolerance, f"{name}: {error}"


@pytest.mark.parametrize("options", range(40))
def test_random_shapes_agree_with_float64(options):
    """Five shapes each for 40 random mixes of options: 200. What a kernel is compiled for is nearly all in the mix."""
    run = seed(options)(
        settings(
            max_examples=5,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )(given(st.data())(lambda data: random_shape(data, random.Random(options))))
    )
    run()


def random_shape(data, options):
    dtype = options.choice([torch.float32, torch.float16, torch.bfloat16])
    states, rank = options.choice([1, options.randint(2, 16), options.randint(17, 64)]), options.choice([0, 3, 8])
    own_input, merge, in_step_order, gate, state = (options.random() < 0.5 for _ in range(5))
    directions = data.draw(st.sampled_from([1, 2, 4]))
    path = data.draw(st.sampled_from(PATHS[directions]))
    grid = (data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    batch, channels = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 150))
    tensors = draw(path, grid, batch, channels, states, dtype, own_input, gate, rank, state)
    table = scan_path(path, grid)
    in_step_order = in_step_order and table.num_steps <= table.num_tokens
    check(tensors, dtype, path=path, grid=grid, merge=merge, projections_in_step_order=in_step_order)


@pytest.mark.parametrize("states", [1, 4, 16])
def test_long_paths_run_in_chunks(states):
    tensors = draw("h,h_flip", (700,), batch=1, channels=40, states=states)
    check(tensors, torch.float32, path="h,h_flip", grid=(700,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("states", [5, 16])
@pytest.mark.parametrize("path", ["h,h_flip", "snake_v_flip,snake_v"])
def test_a_direction_and_its_reverse_share_a_block(path, states, dtype, monkeypatch):
    module, names = importlib.import_module("visionmamba.ops.selective_scan.cuda"), []
    run = cuda_runtime.Launcher.run
    monkeypatch.setattr(module, "_WARPS_WANTED", 0)  # else so few rows would be cut otherwise
    monkeypatch.setattr(
        cuda_runtime.Launcher, "run", lambda self, file, name, *rest: names.append(name) or run(self, file, name, *rest)
    )
    grid = (61,) if path == "h,h_flip" else (7, 9)
    tensors = draw(path, grid, 3, 70, states, dtype)
    check(tensors, dtype, path=path, grid=grid)
    assert "scan_paired" in names
    first, cotangents = results(selective_scan, tensors, path=path, grid=grid)
    second, _ = results(selective_scan, tensors, cotangents, path=path, grid=grid)
    assert torch.equal(first["y"], second["y"])


@pytest.mark.parametrize("states", [1, 16])
def test_every_output_is_written(states, monkeypatch):
    module = importlib.import_module("visionmamba.ops.selective_scan.cuda_call")
    tensors = draw("w3,h", (7, 8), states=states)
    clean, cotangents = results(selective_scan, tensors, path="w3,h", grid=(7, 8))
    plain = module.Call.empty

    def poisoned(self, *shape, dtype=torch.float32, zero=False):
        out = plain(self, *shape, dtype=dtype, zero=zero)
        return out if zero else out.fill_(float("nan"))

    monkeypatch.setattr(module.Call, "empty", poisoned)
    again, _ = results(selective_scan, tensors, cotangents, path="w3,h", grid=(7, 8))
    for name, x in clean.items():
        assert torch.equal(again[name], x), name


@pytest.mark.parametrize(
    ("grid", "channels", "dtype", "rank"),
    [((42, 42), 96, torch.bfloat16, 0), ((43, 39), 40, torch.float16, 0), ((42, 42), 96, torch.bfloat16, 6)],
)
def test_a_direction_and_its_reverse_agree_with_float64(grid, channels, dtype, rank):
    path = "h,v,h_flip,v_flip"
    tensors = draw(path, grid, 3, channels, 1, dtype, gate=False, rank=rank)
    check(tensors, dtype, path=path, grid=grid)


@pytest.mark.parametrize("states", [1, 16])
@pytest.mark.parametrize("length", [196, 3000])
def test_two_runs_are_bit_equal(states, length):
    tensors = draw("h,h_flip", (length,), 3, 96, states, torch.bfloat16)
    first, cotangents = results(selective_scan, tensors, path="h,h_flip", grid=(length,))
    second, _ = results(selective_scan, tensors, cotangents, path="h,h_flip", grid=(length,))
    for name, x in first.items():
        assert torch.equal(second[name], x), name


@pytest.mark.parametrize("states", [1, 16])
@pytest.mark.parametrize("scale", [1e-6, 30.0, 1e4, 1e6])
def test_extreme_step_sizes_stay_finite(states, scale):
    tensors = draw("h", (60,), states=states)
    with torch.no_grad():
        tensors["delta"].mul_(scale)
    actual, _ = results(selective_scan, tensors, path="h", grid=(60,))
    for name, x in actual.items():
        assert torch.isfinite(x).all(), name


def test_channels_first_inputs_are_taken():
    tensors = draw("h", (50,), gate=False)
    turned = dict(tensors, u=tensors["u"].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_())
    plain, cotangents = results(selective_scan, tensors, path="h", grid=(50,))
    actual, _ = results(selective_scan, turned, cotangents, path="h", grid=(50,))
    for name, x in plain.items():
        torch.testing.assert_close(actual[name], x)


@pytest.mark.parametrize("states", [1, 16])
def test_a_cuda_graph_replays_it(states):
    tensors = {name: None if x is None else x.detach() for name, x in draw("h,h_flip", (49,), states=states).items()}
    options = dict(path="h,h_flip", grid=(49,))
    expected, _ = selective_scan(**tensors, **options)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        selective_scan(**tensors, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = selective_scan(**tensors, **options)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


def test_it_runs_on_the_current_stream():
    tensors = {name: None if x is None else x.detach() for name, x in draw("h", (64,), 8, 256).items()}
    expected, _ = selective_scan(**tensors)
    stream, u = torch.cuda.Stream(), tensors["u"].clone()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late = torch.zeros_like(u)
        late.copy_(u)
        y, _ = selective_scan(**dict(tensors, u=late))
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(y, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_each_gpu_runs_its_own():
    tensors = {name: None if x is None else x.detach() for name, x in draw("h", (64,)).items()}
    expected, _ = selective_scan(**tensors)
    y, _ = selective_scan(**{name: None if x is None else x.to("cuda:1") for name, x in tensors.items()})
    assert y.device.index == 1
    assert torch.equal(y.cpu(), expected.cpu())


def test_compile_takes_it_whole():
    tensors = draw("h,v", (6, 7))
    options = dict(path="h,v", grid=(6, 7))
    eager, cotangents = results(selective_scan, tensors, **options)
    compiled, _ = results(torch.compile(selective_scan, fullgraph=True), tensors, cotangents, **options)
    for name, x in eager.items():
        torch.testing.assert_close(compiled[name], x)


@pytest.mark.slow
@pytest.mark.parametrize("states", [1, 4])
def test_more_than_two_billion_elements(states):
    batch, length, channels = 2, 16400, 65536
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB of GPU memory")
    u = torch.randn(batch, length, channels, device="cuda", dtype=torch.bfloat16)
    assert u.numel() > 2**31
    delta = u.unsqueeze(2)
    B, C = (torch.randn(batch, length, 1, states, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    A = -torch.rand(1, channels, states, device="cuda")
    with torch.no_grad():
        y, _ = selective_scan(u, delta, A, B, C)
        part = slice(channels - 64, channels)
        expected, _ = selective_scan(
            u[1:, :, part].contiguous(), delta[1:, :, :, part].contiguous(), A[:, part].contiguous(), B[1:], C[1:]
        )
    torch.testing.assert_close(y[1:, :, part], expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("bad", ["dtype", "device", "shape"])
def test_bad_arguments_are_named_before_any_launch(bad):
    tensors = {name: None if x is None else x.detach() for name, x in draw("h", (9,)).items()}
    wrong = {
        "dtype": tensors["delta"].half(),
        "device": tensors["delta"].cpu(),
        "shape": tensors["delta"][:, :-1],
    }[bad]
    with pytest.raises((TypeError, ValueError), match="delta: expected"):
        selective_scan(**dict(tensors, delta=wrong))
