"""A CUDA kernel that does not compile or load: another backend runs, and one warning says why."""

import warnings

import pytest
import torch

from visionmamba.ops import backend, cuda_runtime
from visionmamba.ops.backend import Implementation, explain, register_implementation, select


class Broken:
    """A launcher whose kernels do not compile."""

    architecture, multiprocessors, shared_bytes = "sm_90", 1, 232448

    def run(self, file, *_arguments):
        raise cuda_runtime.CompileError(f"NVRTC could not compile {file}")

    def resident_blocks(self, *_arguments):
        return 1


@pytest.fixture
def broken(monkeypatch):
    """The scan's CUDA backend, said to run on the CPU, with a launcher that cannot compile."""
    import importlib

    module = importlib.import_module("visionmamba.ops.backend")
    scan = importlib.import_module("visionmamba.ops.selective_scan.cuda")
    monkeypatch.setattr(cuda_runtime, "launcher", lambda _device: Broken())
    monkeypatch.setattr(module, "_implementations", {op: dict(table) for op, table in module._implementations.items()})
    monkeypatch.setattr(module, "_failed", {})
    arguments = (scan.forward, scan.backward, lambda: None, scan._supports, (cuda_runtime.KernelError,))
    register_implementation(Implementation("selective_scan", "cuda", ("cpu",), *arguments))
    yield
    module._probe.cache_clear()


def call():
    torch.manual_seed(0)
    u, B = torch.randn(1, 6, 4), torch.randn(1, 6, 1, 2)
    tensors = [u, u.unsqueeze(2), -torch.rand(1, 4, 2), B, B]
    leaves = [x.clone().requires_grad_() for x in tensors]
    y, _ = torch.ops.visionmamba.selective_scan(*leaves, *[None] * 5, "h", [6], True, True, False)
    return [y, *torch.autograd.grad(y.square().sum(), leaves)]


def test_another_backend_runs_and_one_warning_says_why(broken):
    with pytest.warns(
        RuntimeWarning, match=r"selective_scan: backend 'cuda' failed .* runs instead: NVRTC could not"
    ) as seen:
        found = call()
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = call()
    with backend("torch"):
        expected = call()
    for x, y, z in zip(found, again, expected, strict=True):
        torch.testing.assert_close(x, z)
        torch.testing.assert_close(y, z)


def test_a_failing_backward_falls_back_too(broken, monkeypatch):
    monkeypatch.setattr(Broken, "run", lambda self, file, name, *_arguments: fail(file) if "backward" in name else None)

    def fail(file):
        raise cuda_runtime.CompileError(f"NVRTC could not compile {file}")

    with pytest.warns(RuntimeWarning, match="scan_backward.cu|tile_backward.cu"):
        found = call()
    with backend("torch"):
        expected = call()
    assert [x.shape for x in found] == [x.shape for x in expected]
    assert select("selective_scan", "cpu").backend != "cuda"


def test_doctor_shows_the_failure(broken):
    with pytest.warns(RuntimeWarning):
        call()
    assert "failed here: NVRTC could not compile" in explain("selective_scan", "cpu")["cuda"]


def test_a_backend_asked_for_by_name_raises(broken):
    with backend("cuda"), pytest.raises(cuda_runtime.CompileError, match="could not compile"):
        call()


def test_other_errors_are_not_hidden(broken, monkeypatch):
    def run(self, *_arguments):
        raise RuntimeError("an illegal address")

    monkeypatch.setattr(Broken, "run", run)
    with pytest.raises(RuntimeError, match="an illegal address"):
        call()
