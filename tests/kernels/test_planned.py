"""Operators with plans, whose kernels run on the CPU: a launch done again gets the addresses of its own call."""

import ctypes
import importlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import Barrier, Lock

import pytest
import torch
from emulation import COMPILER, EmulatedLauncher, outcome

from visionmamba.ops import causal_conv1d, cuda_runtime, selective_scan
from visionmamba.ops._plan import forget_plans
from visionmamba.ops.channel_norm import channel_norm
from visionmamba.ops.gelu_linear import gelu_linear
from visionmamba.ops.ssm import selective_ssm

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")

operators = importlib.import_module("visionmamba.ops._operator")


class PlannedLauncher(cuda_runtime.Launcher):
    """The launcher with its plans; what it starts is emulated."""

    architecture, multiprocessors, shared_bytes = "sm_90", 2, 232448

    def __init__(self):
        self.runs, self.decided, self.lock = EmulatedLauncher(), 0, Lock()

    def kernel(self, *specialisation):
        return specialisation

    def resident_blocks(self, *_arguments):
        return 4

    def _current(self):
        return nullcontext()

    def run(self, file, name, macros, blocks, threads, arguments, shared_bytes=0):
        self.decided += 1
        self.size = len(arguments.pack())
        super().run(file, name, {**macros, "_size": self.size}, blocks, threads, arguments, shared_bytes)

    def start(self, kernel, blocks, threads, shared_bytes, parameters):
        file, name, macros, _ = kernel
        macros = dict(macros)
        struct = ctypes.c_void_p.from_address(parameters).value
        arguments = Struct(ctypes.string_at(struct, macros.pop("_size")))
        with self.lock:  # what is emulated has one memory for its blocks
            self.runs.run(file, name, macros, blocks, threads, arguments, shared_bytes)


class Struct(bytes):
    """Arguments that are packed."""

    def pack(self):
        return bytes(self)


@pytest.fixture
def launcher(monkeypatch, cuda_backends):
    """Run the CUDA backends on the CPU, with plans."""
    launcher = PlannedLauncher()
    monkeypatch.setattr(cuda_runtime, "launcher", lambda _device: launcher)
    monkeypatch.setattr(operators, "_PLANNED", ("cpu",))
    monkeypatch.setattr(importlib.import_module("visionmamba.ops._plan"), "UNWATCHED", 1)
    forget_plans()
    yield launcher
    forget_plans()


F32, BF16 = torch.float32, torch.bfloat16
CASES = {
    "norm": (
        lambda x, added, w, b: channel_norm(x, w, b, added=added, dtype=BF16),
        [((2, 5, 8), F32), ((2, 5, 8), BF16), ((8,), F32), ((8,), F32)],
    ),
    "gelu": (lambda x, w, b: [gelu_linear(x, w, b)], [((2, 5, 8), BF16), ((6, 8), F32), ((6,), F32)]),
    "convolution": (
        lambda x, w, b: causal_conv1d(x[..., 2:], w, b, path="h,h_flip", grid=[2, 3]),
        [((2, 6, 10), BF16), ((2, 8, 4), F32), ((2, 8), F32)],
    ),
    "scan": (
        lambda u, delta, A, BC: selective_scan(u, delta, -A.exp(), *BC.chunk(2, -1), path="h,v", grid=[2, 3]),
        [((2, 6, 8), F32), ((2, 6, 2, 8), F32), ((2, 8, 4), F32), ((2, 6, 2, 8), F32)],
    ),
    "ssm": (
        lambda x, z, conv, proj, A, D, bias, dt: [
            selective_ssm(x, z, None, conv, None, proj, -A.exp(), D, bias, dt, "h,h_flip", [2, 3])
        ],
        [
            ((2, 6, 8), F32), ((2, 6, 8), F32), ((2, 8, 4), F32), ((2, 7, 8), F32), ((2, 8, 2), F32), ((2, 8), F32),
            ((2, 8), F32), ((2, 8, 3), F32),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_planned_operator_gives_the_same_bits(name, launcher, monkeypatch):
    function, shapes = CASES[name]
    torch.manual_seed(0)
    for time in range(4):
        tensors = [torch.randn(shape).to(dtype).requires_grad_() for shape, dtype in shapes]
        with monkeypatch.context() as patch:
            patch.setattr(operators, "_PLANNED", ())
            expected = outcome(function, tensors)
        launcher.decided = 0
        found = outcome(function, tensors)
        assert (launcher.decided > 0) == (time < 2)
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("first", [torch.inference_mode, torch.enable_grad])
def test_a_plan_serves_inference_and_training(first, launcher):
    function, shapes = CASES["norm"]
    torch.manual_seed(0)
    for time in range(6):
        tensors = [torch.randn(shape).to(dtype).requires_grad_() for shape, dtype in shapes]
        launcher.decided = 0
        with first() if time < 3 else torch.inference_mode(first is torch.enable_grad):
            found = function(*tensors)
        assert (launcher.decided > 0) == (time < 2)
        exact = torch.nn.functional.layer_norm(
            (tensors[0] + tensors[1]).double(), [8], *(t.double() for t in tensors[2:])
        )
        torch.testing.assert_close(found[0].double(), exact, rtol=2**-7, atol=2**-7)
        assert found[0].requires_grad == (not found[0].is_inference())


def test_threads_do_not_share_a_launch(launcher, monkeypatch):
    """What a thread lays out is read before another lays out its own: here they meet before each reading."""
    function, shapes = CASES["norm"]
    torch.manual_seed(0)
    draws = [[torch.randn(shape).to(dtype) for shape, dtype in shapes] for _ in range(8)]
    expected = [function(*tensors)[0] for tensors in draws]
    meeting, start = Barrier(4), launcher.start

    def meet(*arguments):
        meeting.wait(30)
        start(*arguments)

    monkeypatch.setattr(launcher, "start", meet)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda tensors: function(*tensors)[0], draws))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
