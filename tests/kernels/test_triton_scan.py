"""The Triton scan on a machine without a GPU: interpreted, and compiled for the GPUs it is meant for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

_OPS = Path(__file__).parents[1] / "ops"
_CASES = "cpu-triton and (test_float32 or rounds_once and bfloat16) and (step_order or windows_pad or one_step_cross)"


def test_interpreted():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", _CASES, "test_selective_scan.py"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=_OPS)
    assert finished.returncode == 0, finished.stdout[-3000:]
    assert "6 passed" in finished.stdout, finished.stdout[-300:]


@pytest.mark.parametrize("states", [1, 16])
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler")
def test_compiles(architecture, states):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from visionmamba.kernels.triton.selective_scan import scan_backward, scan_forward

    options = dict.fromkeys(("SKIP", "BIAS", "STATE", "SOFTPLUS", "STEP_ORDER"), True)
    options |= {"BLOCK_D": 64, "BLOCK_N": states}
    for kernel, constants in ((scan_forward, options), (scan_backward, options | {"SEGMENT": 16, "LAST": True})):
        signature = {}
        for name in kernel.arg_names:
            pointer = "*bf16" if name in ("u_ptr", "delta_ptr", "B_ptr", "C_ptr") else "*fp32"
            pointer = "*i32" if name == "order_ptr" else pointer
            signature[name] = "constexpr" if name in constants else pointer if name.endswith("_ptr") else "i32"
        compiled = compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", architecture, 32))
        assert compiled.asm["cubin"]
