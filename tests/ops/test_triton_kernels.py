"""The Triton kernels on a machine without a GPU: interpreted, and compiled for the GPUs they are meant for.

``TRITON_INTERPRET=1 pytest tests/ops`` runs every operator's tests on the interpreted kernels; here it is a handful.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

_OPS = Path(__file__).parent
_CASES = (
    "triton and (paths and w3 or slots"
    " or goldens and not dtype1 and (l17_c32 or seqidx_init or Dhp_z_g2 or tie_g2_z or nbgF_g16 or add_rms_bias))"
)


def test_interpreted():
    files = [str(_OPS / f"test_{name}.py") for name in ("ssd", "state_update", "norm")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", _CASES, *files]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=_OPS)
    assert finished.returncode == 0, finished.stdout[-3000:]
    assert "8 passed" in finished.stdout, finished.stdout[-300:]


_ACTIVATIONS = {
    "x_ptr",
    "dt_ptr",
    "B_ptr",
    "C_ptr",
    "z_ptr",
    "y_ptr",
    "value_ptr",
    "key_ptr",
    "dy_ptr",
    "dx_ptr",
    "out_ptr",
}


def _compile(kernel, architecture, options, **constants):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    def kind(name):
        if name in constants:
            return "constexpr"
        if name in ("order_ptr", "segment_ptr", "slots_ptr"):
            return "*i32"
        if name.endswith("_ptr"):
            return "*bf16" if name in _ACTIVATIONS else "*fp32"
        return "fp32" if name in ("dt_min", "dt_max", "eps") else "i32"

    source = ASTSource(kernel, {name: kind(name) for name in kernel.arg_names}, constants)
    return compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler")
def test_compiles(architecture):
    from visionmamba.kernels.triton import norm, ssd, state_update

    common = {
        "Q": 64,
        "BLOCK_P": 64,
        "BLOCK_N": 64,
        "BIAS": True,
        "PACKED": True,
        "SOFTPLUS": True,
        "PRECISION": "tf32",
    }
    wide = {"num_warps": 8, "num_stages": 2}
    for kernel, constants in (
        (ssd.ssd_forward, common | {"SKIP": 2, "GATE": True, "STATE": True}),
        (ssd.ssd_states, common | {"REVERSE": True}),
        (ssd.ssd_gradients, common | {"SKIP": 1}),
        (ssd.ssd_shared_gradients, common),
    ):
        compiled = _compile(kernel, architecture, wide, **constants)
        assert "mma" in compiled.asm["ptx"]
    flags = {"BLOCK": 1024, "BIAS": False, "RMS": True}
    narrow = {"num_warps": 4}
    _compile(ssd.ssd_pass, architecture, narrow, BLOCK=1024, FIRST=True, REVERSE=True)
    _compile(norm.gated_norm, architecture, narrow, **flags, GATE=True, BEFORE=False)
    _compile(norm.gated_norm_backward, architecture, narrow, **flags, GATE=True, BEFORE=False)
    _compile(norm.add_norm, architecture, narrow, **flags, RESIDUAL=True)
    _compile(norm.add_norm_backward, architecture, narrow, **flags, RESIDUAL=True, TOTAL=True)
    step = {"SKIP": True, "GATE": True, "BIAS": True, "SLOTS": True, "SOFTPLUS": True}
    _compile(state_update.state_update, architecture, narrow, BLOCK_P=16, BLOCK_N=128, **step)
