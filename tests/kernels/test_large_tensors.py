"""Tensors of more than 2^31 elements: only the blocks of the last two images are run, and the rest is never touched."""

import importlib

import pytest
import torch
from emulation import COMPILER, Checks, EmulatedLauncher, Schedule, checked

from visionmamba.ops import cuda_runtime
from visionmamba.ops.selective_scan import cuda_pair
from visionmamba.ops.selective_scan.cuda_call import Call

emulated = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
scan = importlib.import_module("visionmamba.ops.selective_scan.cuda")
conv = importlib.import_module("visionmamba.ops.causal_conv1d.cuda")
steps = importlib.import_module("visionmamba.ops.selective_scan.dt_projection")
BF16, CROSS = torch.bfloat16, "h,v,h_flip,v_flip"
IMAGES = 2


class LastImages(EmulatedLauncher):
    """Runs the last images' blocks, and leaves out the sums over all images."""

    def __init__(self, batch, multiprocessors):
        super().__init__(multiprocessors)
        self.batch = batch

    def blocks_to_run(self, blocks):
        return range(max(0, blocks + (-blocks * IMAGES // self.batch) - 1), blocks)

    def run(self, file, name, *arguments):
        if name != "reduce_rows":
            super().run(file, name, *arguments)


def run(work, batch, tensors, monkeypatch, multiprocessors=1):
    """Run ``work`` on two images, and on many of which these are the last; return both results."""
    monkeypatch.setattr(cuda_runtime, "launcher", lambda _device: EmulatedLauncher())
    expected = work(*tensors)
    monkeypatch.setattr(cuda_runtime, "launcher", lambda _device: LastImages(batch, multiprocessors))
    try:
        many = [torch.empty((batch, *x.shape[1:]), dtype=x.dtype) for x in tensors]
        for x, last in zip(many, tensors, strict=True):
            x[-IMAGES:] = last
        with checked(Checks((Schedule(),), poison=False)):
            return expected, work(*many)
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        pytest.skip(f"needs more address space: {error}")


def assert_last_images_equal(results, batch):
    compared = 0
    for small, large in zip(*results, strict=True):
        if large is not None and large.shape[0] == batch:
            assert torch.equal(large[-IMAGES:], small)
            compared += 1
    assert compared


def batch_of(elements_an_image):
    return 2**31 // elements_an_image + 17


def scan_tensors(tokens, channels, directions, states):
    torch.manual_seed(0)
    u = torch.randn(IMAGES, tokens, channels).to(BF16)
    delta = torch.randn(IMAGES, tokens, directions, channels).to(BF16)
    B, C = torch.randn(2, IMAGES, tokens, directions, states).to(BF16)
    return u, delta, B, C, torch.randn_like(u)


@emulated
@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "grid", "channels", "states"),
    [(CROSS, (14, 14), 64, 4), ("h,h_flip", (35,), 64, 4), (CROSS, (14, 14), 64, 1), ("h", (40,), 32, 2)],
)
def test_scan(path, grid, channels, states, monkeypatch):
    tokens, directions = torch.Size(grid).numel(), path.count(",") + 1
    A = -torch.rand(directions, channels, states) - 0.1
    D, bias = torch.randn(2, directions, channels)
    options = (path, grid, True, True, False)

    def work(u, delta, B, C, dy):
        forward = scan.forward(u, delta, A, B, C, D, None, bias, None, None, *options)
        backward = scan.backward(dy, None, u, delta, A, B, C, D, None, bias, None, None, *options)
        return *forward, *backward[:2], *backward[3:5]

    batch = batch_of(tokens * channels * directions)
    results = run(work, batch, scan_tensors(tokens, channels, directions, states), monkeypatch)
    assert_last_images_equal(results, batch)


@emulated
@pytest.mark.slow
def test_backward_by_pairs(monkeypatch):
    path, grid, channels = CROSS, (14, 14), 64
    A = -torch.rand(4, channels, 1) - 0.1
    D, bias = torch.randn(2, 4, channels)

    def work(u, delta, B, C, dy):
        call = Call(u, delta, A, B, C, D, bias, path, grid, True, False, others=[dy])
        cut = cuda_pair.plan(call, dy, most_steps=10**9, least_steps=1)
        return cuda_pair.backward(call, cut, dy, None, None)[:4]

    batch = batch_of(196 * channels * 4)
    assert_last_images_equal(run(work, batch, scan_tensors(196, channels, 4, 1), monkeypatch), batch)


@emulated
@pytest.mark.slow
@pytest.mark.parametrize("path", ["h,h_flip", "h,v_flip"])
def test_convolution(path, monkeypatch):
    torch.manual_seed(0)
    weight, bias = torch.randn(2, 64, 4), torch.randn(2, 64)
    x, dout = torch.randn(IMAGES, 49, 64).to(BF16), torch.randn(IMAGES, 49, 2, 64).to(BF16)
    grid = (49,) if path == "h,h_flip" else (7, 7)

    def work(x, dout):
        forward = conv.forward(x, weight, bias, None, None, path, grid, True)
        return *forward, conv.backward(dout, None, x, weight, bias, None, None, path, grid, True)[0]

    batch = batch_of(49 * 64 * 2)
    assert_last_images_equal(run(work, batch, (x, dout), monkeypatch), batch)


@emulated
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_step_sizes(dtype, monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(2, 96, 6)
    low, gradient = torch.randn(IMAGES, 64, 2, 6).to(dtype), torch.randn(IMAGES, 64, 2, 96)

    def work(low, gradient):
        call = steps._Projection("dt_backward", low, weight)
        dx, dweight = call.empty(call.tiles, *low.shape), call.empty(call.chunks, *weight.shape)
        call.run(gradient, dx, dweight)
        return steps.expand_delta(low, weight), dx[0]

    batch = batch_of(64 * 2 * 96)
    results = run(work, batch, (low, gradient), monkeypatch, multiprocessors=batch)  # or a block would take all rows
    assert_last_images_equal(results, batch)


def test_more_than_a_kernel_counts_is_refused():
    tokens = 2**26 + 1
    u, B = torch.empty(1, 1, 1).expand(1, tokens, 1), torch.empty(1, 1, 1, 1).expand(1, tokens, 1, 16)
    A = torch.empty(1, 1, 16)
    arguments = (u, u[:, :, None], A, B, B, None, None, None, None, None, "h", (tokens,), True, True, False)
    assert scan._supports(*arguments) == f"takes up to 2^30 tokens times states, not {tokens} times 16"
