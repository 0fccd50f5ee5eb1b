"""NVRTC compiles every kernel for every architecture, and none spills more than a stated bound: no GPU needed."""

import re

import pytest
import torch

from visionmamba.ops import _cuda_update as updates
from visionmamba.ops import cuda_runtime
from visionmamba.ops.causal_conv1d import cuda as conv
from visionmamba.ops.selective_scan import cuda as scan
from visionmamba.ops.selective_scan import cuda_pair as pair
from visionmamba.ops.selective_scan import cuda_tile as tile
from visionmamba.ops.selective_scan.cuda_call import ACT

pytestmark = pytest.mark.skipif(cuda_runtime.available() is not None, reason="needs NVRTC")

ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"]
SPILL_BYTES = 256  # a thread, in the worst kernel: two dozen accesses among thousands of instructions
FLAGS = {"DELTA_FLOAT": 0, "SOFTPLUS": 1, "STEP_ORDER": 0}
BF16 = torch.bfloat16


def scan_macros(states, dtype=BF16, kind="forward", which=0, vec=2, flags=FLAGS, architecture="sm_90", **options):
    tiling = scan.tilings_for(kind, states, architecture, options.get("gate", False))[which]
    return scan.macros(dtype, states, scan.fit_vector(tiling, states, vec), vec, flags, **options)


def tile_macros(kind, tokens, dtype=BF16, vec=2, merge=True, copied=0):
    class Device:
        multiprocessors, shared_bytes = 1, 232448

    channels = 64 if tokens < 100 else 96
    plan = tile.plan(kind, 64, tokens, tokens, channels, 4, vec, merge, True, Device, copied)
    return tile.macros(dtype, plan, FLAGS, merge=merge, complete=True, shared=True, gate=False)


def specialisations(architecture="sm_90"):
    """Return (file, macros, whether default runs compile it) for what models and options need."""
    found = []
    for states in (1, 2, 4, 8, 16, 32, 64):
        for kind in ("forward", "backward"):
            for dtype in ACT:
                for options in ({}, {"gate": 1}, {"partial": True}, *([{"gate": 2}] if kind == "backward" else [])):
                    quick = states in (1, 16) and dtype == BF16 and "partial" in options
                    macros = scan_macros(states, dtype, kind, architecture=architecture, **options)
                    found.append((f"scan_{kind}.cu", macros, quick))
            tilings = scan.tilings_for(kind, states, architecture, True)
            for which in range(1, len(tilings)):
                if any(tiling.warps_wanted == 0 for tiling in tilings[:which]):
                    continue  # one before it is always taken
                macros = scan_macros(states, BF16, kind, which, architecture=architecture, gate=1)
                found.append((f"scan_{kind}.cu", macros, False))
        for gate in (0, 1):
            tiling = scan.pair_cut(96, states, 2, 49, 232448)[0]
            macros = scan.macros(BF16, states, tiling, 2, FLAGS, gate=gate)
            found.append(("scan_paired.cu", macros, states == 16))
    found.append(("scan_forward.cu", scan_macros(3, vec=1), False))
    for dtype in ACT:
        for kind in ("forward", "backward"):
            for tokens in (49, 196, 784) if kind == "backward" else (49, 196, 784, 3136):
                found.append((f"tile_{kind}.cu", tile_macros(kind, tokens, dtype), dtype == BF16 and tokens == 196))
            found.append((f"tile_{kind}.cu", tile_macros(kind, 49, dtype, vec=1, merge=False), False))
        for tokens in (49, 196, 784, 3136):
            staged = tile_macros("forward", tokens, dtype, vec=4, copied=2 * dtype.itemsize)
            found.append(("tile_forward.cu", staged, dtype == BF16 and tokens == 3136))
        for delta_float, full in ((0, True), (1, False)) if dtype != torch.float32 else ():
            cut, flags = pair.PairPlan(((0, 2), (1, 3)), 224, 14, full), FLAGS | {"DELTA_FLOAT": delta_float}
            for which in range(2):
                macros = pair.macros(dtype, cut, flags, "pair_backward", which)
                found.append(("pair_backward.cu", macros, full and dtype == BF16))
            found.append(("pair_links.cu", pair.macros(dtype, cut, flags, "pair_links"), full and dtype == BF16))
        for width in (2, 3, 4):
            for sequences in (False, True):
                macros = conv.macros(dtype, width, 2, silu=True, sequences=sequences)
                found.append(("causal_conv1d.cu", macros, dtype == BF16 and width == 4))
        for state in ACT:
            macros = updates.state_update_macros(dtype, state, 16, 4, True)
            found.append(("state_update.cu", macros, dtype == BF16 and state == torch.float32))
            macros = updates.conv_update_macros(dtype, state, 4, True)
            found.append(("conv_update.cu", macros, dtype == BF16 and state == BF16))
        found.append(("merge.cu", {"ACT": ACT[dtype]}, True))
    return found


def spilled_bytes(file, macros, architecture):
    """Compile and return the bytes that each kernel spills, from ptxas's report."""
    log = cuda_runtime.compile_log(file, macros, architecture)
    names = re.findall(r"Compiling entry function '(\w+)'", log)
    spills = [max(map(int, pair)) for pair in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)]
    assert names, log
    return dict(zip(names, spills, strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("index", [i for i, (*_, quick) in enumerate(specialisations()) if quick])
def test_kernels_compile_without_spills(index, architecture):
    file, macros, _ = specialisations(architecture)[index]
    assert max(spilled_bytes(file, macros, architecture).values()) <= SPILL_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("index", [i for i, (*_, quick) in enumerate(specialisations()) if not quick])
def test_all_specialisations_compile_without_spills(index, architecture):
    file, macros, _ = specialisations(architecture)[index]
    assert max(spilled_bytes(file, macros, architecture).values()) <= SPILL_BYTES


def test_a_kernel_that_does_not_compile_says_so():
    with pytest.raises(cuda_runtime.CompileError, match=r"could not compile scan_forward\.cu for sm_90"):
        cuda_runtime.compile_cubin("scan_forward.cu", {"ACT": "0"}, "sm_90")  # the sizes are missing
