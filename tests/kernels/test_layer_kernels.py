"""The CUDA kernels of layers: run on the CPU against float64, and compiled for every architecture."""

import importlib
import re

import pytest
import torch
from emulation import COMPILER, EmulatedLauncher
from test_compile import ARCHITECTURES

from visionmamba.ops import cuda_runtime

cuda_norm = importlib.import_module("visionmamba.ops._cuda_norm")
steps = importlib.import_module("visionmamba.ops.selective_scan.dt_projection")
gelu = importlib.import_module("visionmamba.ops.gelu_linear")
plain = importlib.import_module("visionmamba.ops.channel_norm")
conv = importlib.import_module("visionmamba.ops.causal_conv1d.cuda")
conv_paired = importlib.import_module("visionmamba.ops.causal_conv1d.cuda_paired")
conv_plain = importlib.import_module("visionmamba.ops.causal_conv1d.pytorch")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

pytestmark = pytest.mark.skipif(cuda_runtime.available() is not None, reason="needs cuda-core")


def relative(actual, exact):
    return float((actual.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def double(x):
    return x if x is None else x.double()


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("channels", "x", "added", "out", "rms", "has_bias", "has_shift"),
    [
        (96, F32, BF16, BF16, False, True, False),
        (48, BF16, None, F32, False, True, True),
        (70, F32, F32, F32, True, False, False),
        (33, F32, None, F16, False, False, False),
        (50, F32, None, BF16, True, True, True),
        (192, BF16, None, BF16, False, False, True),
        (384, BF16, BF16, BF16, True, True, False),
    ],
)
def test_against_float64(channels, x, added, out, rms, has_bias, has_shift, monkeypatch):
    monkeypatch.setattr(cuda_runtime, "launcher", lambda _device: EmulatedLauncher(2))
    torch.manual_seed(0)
    shape, weight, bias = (3, 37, channels), torch.randn(channels), torch.randn(channels) if has_bias else None
    stream, shift = (torch.randn(shape) + 1).to(x), torch.randn(channels) if has_shift else None
    branch = None if added is None else torch.randn(shape).to(added)
    dout, dtotal = torch.randn(shape).to(out), None if added is None else torch.randn(shape).to(x)
    options = (1e-5, rms, 0.5)
    found = cuda_norm.forward(stream, branch, weight, bias, shift, *options, out)
    wide = torch.float64
    exact = plain.forward(double(stream), double(branch), double(weight), double(bias), double(shift), *options, wide)
    total = stream if branch is None else found[1]
    found = (*found, *cuda_norm.backward(dout, dtotal, total, weight, bias, shift, *options, added))
    tensors = (double(t) for t in (dout, dtotal, total, weight, bias, shift))
    exact = (*exact, *plain.backward(*tensors, *options, None if added is None else wide))
    for actual, expected in zip(found, exact, strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            assert relative(actual, expected) <= (2e-7 if actual.dtype == F32 else 2**-9)


@pytest.mark.parametrize("channels", [1, 3, 48, 50, 96, 100, 128, 192, 384, 500, 768, 1024])
def test_a_row_fits_its_threads(channels):
    lanes, vec, iterations = cuda_norm.row_layout(channels)
    assert channels % vec == 0
    assert lanes * vec * (iterations - 1) < channels <= lanes * vec * iterations


def test_rows_that_do_not_fit_are_refused():
    assert cuda_norm._supports(torch.empty(2, 1026)) == "takes fewer channels"
    assert cuda_norm._supports(torch.empty(2, 8, dtype=torch.float64)).startswith("takes float32, float16 and bfloat16")
    mixed = cuda_norm._supports(torch.empty(2, 8, dtype=F16), torch.empty(2, 8, dtype=BF16))
    assert mixed == "takes one 16-bit dtype at a time"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("channels", [96, pytest.param(1024, marks=pytest.mark.slow)])
def test_compiles_without_spills(channels, architecture):
    for options in (dict(x=F32, added=BF16, shift=False), dict(x=BF16, added=None, shift=True)):
        macros = cuda_norm.macros(channels, out=BF16, rms=False, **options)
        log = cuda_runtime.compile_log("norm.cu", macros, architecture)
        kernels = len(re.findall("Compiling entry function", log))
        assert log.count("0 bytes spill stores, 0 bytes spill loads") == kernels == 2


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(("dtype", "rows", "columns"), [(F32, 37, 132), (F16, 5, 7), (BF16, 100, 384), (F32, 1, 8)])
def test_gelu_recomputed(dtype, rows, columns, monkeypatch):
    monkeypatch.setattr(cuda_runtime, "launcher", lambda _device: EmulatedLauncher())
    torch.manual_seed(0)
    x, dy = (3 * torch.randn(rows, columns)).to(dtype), torch.randn(rows, columns).to(dtype)
    found, exact = gelu.recompute_on_gpu(x, dy, x), gelu.recompute(x.double(), dy.double(), x.double())
    for actual, expected in zip(found, exact, strict=True):
        assert relative(actual, expected) <= (2e-7 if actual.dtype == F32 else torch.finfo(dtype).eps / 4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_activation_compiles_without_spills(architecture):
    log = cuda_runtime.compile_log("activation.cu", gelu.macros(BF16, 4), architecture)
    assert log.count("0 bytes spill stores, 0 bytes spill loads") == 2


LOW_RANK = {
    "stage1": (2, 49, 4, 6, 96), "odd": (3, 50, 1, 3, 7), "wide": (2, 30, 2, 48, 130), "one": (2, 9, 4, 1, 33),
    "tiles": (1, 33, 1, 24, 772), "odd_rank": (1, 70, 2, 11, 36), "empty": (0, 9, 2, 3, 8),
}  # fmt: skip


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("dtype", [BF16, *[pytest.param(d, marks=pytest.mark.slow) for d in (F32, F16)]])
@pytest.mark.parametrize("name", [*LOW_RANK, "more_than_kernels_take"])
def test_low_rank_step_sizes(name, dtype, monkeypatch):
    monkeypatch.setattr(cuda_runtime, "launcher", lambda _device: EmulatedLauncher())
    batch, tokens, directions, rank, channels = LOW_RANK.get(name, (1, 5, 2, steps.MAX_RANK + 1, 8))
    torch.manual_seed(0)
    delta = torch.randn(batch, tokens, directions, rank + 2).to(dtype)[..., :rank]
    weight = torch.randn(directions, channels, rank)
    gradient = torch.randn(batch, tokens, directions, channels)
    found = steps.expand_delta(delta, weight), *steps.expand_delta_backward(gradient, delta, weight)
    x, w, g = delta.double(), weight.double(), gradient.double()
    exact = (
        torch.einsum("blkr,kdr->blkd", x, w),
        torch.einsum("blkd,kdr->blkr", g, w),
        torch.einsum("blkd,blkr->kdr", g, x),
    )
    for actual, expected in zip(found, exact, strict=True):
        assert actual.dtype == F32
        assert actual.shape == expected.shape
        assert relative(actual, expected) <= 2e-7


@pytest.mark.parametrize("rank", range(1, steps.MAX_RANK + 1))
def test_step_sizes_fit_every_devices_shared_memory(rank):
    most = 99 * 1024  # of a block, on sm_86, sm_89 and sm_120
    assert steps.cut("dt_backward", BF16, 1024, rank, most_bytes=most).shared_bytes <= most == steps.LEAST_SHARED_BYTES


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "sizes", [(384, 24), *[pytest.param(s, marks=pytest.mark.slow) for s in [(768, 48), (1024, 64)]]]
)
def test_step_sizes_compile_without_spills(sizes, architecture):
    for name in ("dt_expand", "dt_backward"):
        for cut in (steps.cut(name, F32, *sizes), *(steps.cut(name, BF16, *sizes, most_bytes=b) for b in (0, 2**18))):
            log = cuda_runtime.compile_log(cut.file, cut.macros, architecture)
            assert log.count("0 bytes spill stores, 0 bytes spill loads") == 2


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("path", "dtype", "shape", "width", "has_bias", "silu"),
    [
        ("h,h_flip", F32, (2, 61, 40), 4, True, True),
        ("h_flip,h", BF16, (1, 30, 33), 3, True, True),
        ("h,h_flip", F16, (2, 2, 70), 4, False, True),
        ("h,h_flip", F32, (1, 220, 64), 2, True, False),
    ],
)
def test_convolutions_of_a_direction_and_its_reverse(path, dtype, shape, width, has_bias, silu, monkeypatch):
    monkeypatch.setattr(cuda_runtime, "launcher", lambda _device: EmulatedLauncher())
    torch.manual_seed(0)
    batch, tokens, channels = shape
    x = torch.randn(batch, tokens, 2 * channels).to(dtype)[..., :channels]  # a half of a wider projection
    weight, bias = torch.randn(2, channels, width), torch.randn(2, channels) if has_bias else None
    dout = torch.randn(batch, tokens, 2, channels).to(dtype)
    assert conv_paired.takes(x, weight, None, None, path, (tokens,))
    options = (path, (tokens,), silu)
    found = conv.forward(x, weight, bias, None, None, *options)
    found = (*found, *conv.backward(dout, None, x, weight, bias, None, None, *options))
    wide = (x.double(), weight.double(), double(bias), None, None)
    exact = (*conv_plain.forward(*wide, *options), *conv_plain.backward(dout.double(), None, *wide, *options))
    for actual, expected in zip(found, exact, strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            assert relative(actual, expected) <= (3e-7 if actual.dtype == F32 else torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize(
    ("path", "grid", "changes"),
    [
        ("h,v", (3, 3), {}),
        ("h,h_flip", (9,), {"seq_idx": torch.zeros(1, 9, dtype=torch.int32)}),
        ("h,h_flip", (9,), {"initial": torch.zeros(1, 2, 4, 3)}),
        ("h,h_flip", (9,), {"x": torch.zeros(1, 9, 2, 4)}),
        ("h,h", (9,), {}),
    ],
)
def test_other_convolutions_take_the_general_kernel(path, grid, changes):
    arguments = {"x": torch.zeros(1, 9, 4), "weight": torch.zeros(2, 4, 4), "seq_idx": None, "initial": None}
    assert not conv_paired.takes(**(arguments | changes), path=path, grid=grid)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_paired_convolutions_compile_without_spills(architecture):
    for cut in {cut for cuts in conv_paired.CUTS.values() for cut in cuts}:
        macros = conv_paired.macros(BF16, 4, cut, silu=True)
        log = cuda_runtime.compile_log("conv_paired.cu", macros, architecture)
        assert log.count("0 bytes spill stores, 0 bytes spill loads") == 2
