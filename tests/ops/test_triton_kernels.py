"""The Triton kernels on a machine without a GPU: interpreted, and compiled for the GPUs they are meant for.

``TRITON_INTERPRET=1 pytest tests/ops`` runs every operator's tests on the interpreted kernels; here it is a handful.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
    "ddt_ptr",
    "before_ptr",
    "after_ptr",
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


needs_compiler = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
)


def _ssd_kernels(dtype, head_dim, states, **flags):
    """Every SSD kernel with the constants and options of a call."""
    from visionmamba.kernels.triton import ssd

    from visionmamba.ops.ssd.triton import _tiling

    x, B = torch.empty(1, 1, 1, head_dim, dtype=dtype), torch.empty(1, 1, 1, 1, states, dtype=dtype)
    precision = "ieee" if dtype == torch.float32 else "tf32"
    for kernel, constants in (
        (ssd.ssd_forward, {"SKIP": 2, "GATE": True, "STATE": True}),
        (ssd.ssd_states, {"EACH": True, "INITIAL": 1, "FINAL": 0}),
        (ssd.ssd_gradients, {"SKIP": 1}),
        (ssd.ssd_shared_gradients, {}),
    ):
        tiling = _tiling(x, B, 1024, backward=kernel is not ssd.ssd_forward)
        sizes = {"Q": tiling.chunk, "BLOCK_P": tiling.block_p, "BLOCK_N": tiling.block_n}
        special = {ssd.ssd_shared_gradients: tiling.shared_warps, ssd.ssd_states: tiling.states_warps}
        warps = special.get(kernel, tiling.warps)
        common = {"BIAS": True, "PACKED": True, "SOFTPLUS": True, "PRECISION": precision} | flags
        yield kernel, {"num_warps": warps, "num_stages": 2}, sizes | common | constants


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "states"), [(torch.bfloat16, 256), (torch.float32, 128)])
def test_the_largest_states_fit_into_shared_memory(dtype, states):
    from visionmamba.ops.ssd import triton

    arguments = (None,) * 16
    B = torch.empty(1, 1, 1, 1, states, dtype=dtype)
    assert triton._supports(torch.empty(1, 1, 1, 128, dtype=dtype), None, None, B, *arguments[3:]) is None
    assert triton._supports(torch.empty(1, 1, 1, 256, dtype=dtype), None, None, B, *arguments[3:]) is not None
    for kernel, options, constants in _ssd_kernels(dtype, 128, states):
        assert _compile(kernel, 90, options, **constants).metadata.shared <= 227 * 1024


@needs_compiler
@pytest.mark.parametrize("architecture", [80, 90])
def test_compiles(architecture):
    from visionmamba.kernels.triton import norm, ssd, state_update

    for kernel, options, constants in _ssd_kernels(torch.bfloat16, 64, 64):
        assert "mma" in _compile(kernel, architecture, options, **constants).asm["ptx"]
    flags = {"BLOCK": 1024, "BIAS": False, "RMS": True}
    narrow = {"num_warps": 4}
    _compile(ssd.ssd_pass, architecture, narrow, BLOCK=1024, INITIAL=1, FINAL=0)
    _compile(norm.gated_norm, architecture, narrow, **flags, GATE=True, BEFORE=False)
    _compile(norm.gated_norm_backward, architecture, narrow, **flags, GATE=True, BEFORE=False)
    _compile(norm.add_norm, architecture, narrow, **flags, RESIDUAL=True)
    _compile(norm.add_norm_backward, architecture, narrow, **flags, RESIDUAL=True, TOTAL=True)
    step = {"SKIP": True, "GATE": True, "BIAS": True, "SLOTS": True, "SOFTPLUS": True}
    _compile(state_update.state_update, architecture, narrow, BLOCK_P=16, BLOCK_N=128, **step)
