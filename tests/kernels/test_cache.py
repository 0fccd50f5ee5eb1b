"""The cubin cache, without a GPU."""

import pytest

from visionmamba.ops import cuda_runtime
from visionmamba.ops.cuda_runtime import compiler

pytestmark = pytest.mark.skipif(cuda_runtime.available() is not None, reason="needs NVRTC")
MACROS = {"ACT": 2}


@pytest.fixture
def forget(monkeypatch, tmp_path):
    """An empty cache on disk and in memory."""
    monkeypatch.setenv("VISIONMAMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "_cubins", {})
    return lambda: compiler._cubins.clear()


def test_a_compiled_kernel_is_read_back(forget, tmp_path, monkeypatch):
    cubin = cuda_runtime.compile_cubin("merge.cu", MACROS, "sm_90")
    assert [path.suffix for path in tmp_path.iterdir()] == [".cubin"]
    forget()
    monkeypatch.setattr(compiler, "_nvrtc", None)
    assert cuda_runtime.compile_cubin("merge.cu", MACROS, "sm_90") == cubin


@pytest.mark.parametrize("change", ["source", "macros", "architecture"])
def test_another_kernel_is_compiled_anew(change, forget, tmp_path, monkeypatch):
    cuda_runtime.compile_cubin("merge.cu", MACROS, "sm_90")
    macros, architecture = MACROS, "sm_90"
    if change == "source":
        text = compiler.source("merge.cu") + "\n"
        monkeypatch.setattr(compiler, "source", lambda _name: text)
    if change == "macros":
        macros = {"ACT": 1}
    if change == "architecture":
        architecture = "sm_80"
    cuda_runtime.compile_cubin("merge.cu", macros, architecture)
    assert len(list(tmp_path.iterdir())) == 2


def test_an_unwritable_folder_leaves_the_cache_in_memory(forget, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("VISIONMAMBA_CACHE_DIR", str(blocked / "folder"))
    cubin = cuda_runtime.compile_cubin("merge.cu", MACROS, "sm_90")
    monkeypatch.setattr(compiler, "_nvrtc", None)
    assert cuda_runtime.compile_cubin("merge.cu", MACROS, "sm_90") is cubin
