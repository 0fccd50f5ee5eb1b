"""Every kernel under several schedules and with each access to memory looked at, and that this finds what is wrong.

What can be found and what not: kernels/README.md, "Testing without a GPU".
"""

import os
import re
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import test_emulated
import test_layer_kernels
import test_pair_backward
import torch
from emulation import COMPILER, Checks, checked

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CROSS = "h,v,h_flip,v_flip"

ODD_SCANS = {
    "any_states": dict(path="h,v_flip", grid=(5, 7), channels=13, states=7, dtype=BF16, batch=3),
    "there_and_back": dict(path="h,h_flip", grid=(23,), channels=50, states=16, dtype=F16, batch=5),
    "many_states": dict(path="snake_h,v", grid=(6, 5), channels=11, states=64, dtype=F16, own_input=True),
    "32_states": dict(path="h,v", grid=(3, 5), channels=70, states=32, batch=3),
    "language": dict(path="h", grid=(31,), channels=36, states=16, own_input=True, dtype=BF16, batch=5),
    "chunks": dict(path="h,h_flip", grid=(150,), batch=1, channels=22, states=16, dtype=F16, multiprocessors=64),
    "chunks_of_windows": dict(path="w3,h", grid=(11, 13), batch=1, channels=9, states=5, multiprocessors=64),
    "one_state": dict(path=CROSS, grid=(11, 13), channels=18, states=1, dtype=F16, batch=3, gate=False),
    "one_state_odd": dict(path=CROSS, grid=(6, 7), channels=7, states=1, dtype=BF16, batch=3),
    "one_state_copied": dict(path=CROSS, grid=(9, 11), channels=48, states=1, dtype=BF16, batch=3, gate=False),
    "one_state_whole": dict(path=CROSS, grid=(14, 7), channels=64, states=1, dtype=F16, gate=False),
    "one_state_apart": dict(path="w3,sub_200", grid=(7, 5), channels=24, states=1, dtype=BF16, merge=False, gate=False),
    "one_direction": dict(path="v", grid=(15, 15), channels=16, states=1, dtype=BF16, batch=4, gate=False),
}
ODD_PAIRS = {
    "padded": dict(path=CROSS, grid=(5, 13), channels=72, batch=3, rounds=2),
    "few_channels": dict(path="h,h_flip", grid=(29,), channels=8, dtype=F16, batch=5),
    "many_pairs": dict(path="h,h_flip,v,v_flip,snake_h,snake_h_flip,snake_v,snake_v_flip", grid=(7, 10), channels=24),
    "float32_delta": dict(path=CROSS, grid=(14, 9), channels=64, delta=F32, dtype=F16, rounds=1),
}
CONVOLUTIONS = [
    ("h,h_flip", F32, (2, 61, 40), 4, True, True),
    ("h_flip,h", F16, (3, 203, 36), 3, True, True),
    ("h,h_flip", BF16, (3, 11, 7), 2, False, False),
    ("h,h_flip", BF16, (1, 407, 140), 4, True, True),
]
ONE_CONVOLUTION = [("h", (20,), 4, False), ("h,v_flip", (5, 9), 3, True), ("w3,h|cls", (5, 6), 2, False)]
CONV_UPDATES = [(1, "plain"), (3, "slots"), (7, "circular"), (3, "circular_slots")]
NORMS = [
    (96, F32, BF16, BF16, False, True, False),
    (33, F32, None, F16, False, False, False),
    (50, F16, F16, F32, True, True, False),
    (7, BF16, None, BF16, False, True, False),
    (36, BF16, None, BF16, False, True, True),
]


def scan(name, monkeypatch):
    monkeypatch.setitem(test_emulated.SCANS, name, (test_emulated.SCANS | ODD_SCANS)[name])
    test_emulated.test_scan(name, monkeypatch)


def pair(name, monkeypatch):
    monkeypatch.setitem(test_pair_backward.CASES, name, (test_pair_backward.CASES | ODD_PAIRS)[name])
    test_pair_backward.test_gradients(name, monkeypatch)


def convolution(number, monkeypatch):
    test_layer_kernels.test_convolutions_of_a_direction_and_its_reverse(*CONVOLUTIONS[number], monkeypatch)


def one_convolution(case, monkeypatch):
    test_emulated.test_causal_conv1d(*case, monkeypatch)


def step_sizes(case, monkeypatch):
    test_layer_kernels.test_low_rank_step_sizes(*case, monkeypatch)


def gelu(case, monkeypatch):
    test_layer_kernels.test_gelu_recomputed(*case, monkeypatch)


def norm(case, monkeypatch):
    test_layer_kernels.test_against_float64(*case, monkeypatch)


QUICK = [(pair, "one_pair_float32_delta"), (convolution, 0)]
SWEEP = [
    *((scan, name) for name in (*test_emulated.SCANS, *ODD_SCANS)),
    *((pair, name) for name in (*test_pair_backward.CASES, *ODD_PAIRS)),
    *((convolution, number) for number in range(1, len(CONVOLUTIONS))),
    *((one_convolution, case) for case in ONE_CONVOLUTION),
    *((step_sizes, (name, dtype)) for name in test_layer_kernels.LOW_RANK for dtype in (F32, F16, BF16)),
    *((norm, case) for case in NORMS),
    *((gelu, case) for case in [(F32, 37, 132), (F16, 5, 7), (BF16, 100, 384)]),
    *((test_emulated.test_state_update, case) for case in [(16, F32, False), (5, BF16, True), (128, BF16, False)]),
    *((test_emulated.test_conv_update, case) for case in CONV_UPDATES),
]  # fmt: skip


def label(case):
    run, arguments = case
    return f"{run.__name__}-{arguments}".replace(" ", "").replace("torch.", "")


def run_case(case, monkeypatch):
    run, arguments = case
    if run.__name__.startswith("test_"):
        run(*arguments, monkeypatch)
    else:
        run(arguments, monkeypatch)


@pytest.mark.parametrize("case", [*QUICK, *(pytest.param(c, marks=pytest.mark.slow) for c in SWEEP)], ids=label)
def test_no_hazard(case, monkeypatch):
    with checked():
        run_case(case, monkeypatch)


BARRIER = re.compile(
    r"(if \([^()]*\) |for \([^()]*\) )?(__sync\w+|wait_for_copies)\(\);|(?<!void )pair_(wait|arrive)\((?!int)[^;]*\);"
)
FILES = {
    "activation.cu": [(gelu, (F32, 37, 132))],
    "conv_paired.cu": [(convolution, 0), (convolution, 3)],
    "dt_products.cu": [(step_sizes, ("stage1", BF16))],
    "dt_projection.cu": [(step_sizes, ("odd", F32))],
    "merge.cu": [(step_sizes, ("odd", F32)), (scan, "vim_of_a_few_tokens")],
    "norm.cu": [
        (norm, (96, F32, BF16, BF16, False, True, False)),
        (norm, (384, BF16, BF16, BF16, True, True, False)),
        (norm, (48, BF16, None, F32, False, True, True)),
    ],
    "pair_backward.cu": [(pair, "one_pair_float32_delta"), (pair, "float16_in_three_rounds")],
    "pair_links.cu": [(pair, "one_pair_float32_delta")],
    "pair_walk.cuh": [(pair, "float16_in_three_rounds")],
    "scan_backward.cu": [(scan, "vim")],
    "scan_carry.cuh": [(scan, "vim_in_chunks")],
    "scan_forward.cu": [(scan, "plainmamba")],
    "scan_paired.cu": [(scan, "vim")],
    "scan_shared.cuh": [(scan, "windows")],
    "tile_ahead.cuh": [(scan, "whole_pieces")],
    "tile_backward.cu": [(scan, "cross"), (scan, "cross_in_four_rounds"), (scan, "wide_tiles")],
    "tile_forward.cu": [(scan, "cross"), (scan, "cross_in_five_rounds"), (scan, "whole_pieces"), (scan, "sub_grids")],
    "tile_walk.cuh": [(scan, "cross"), (scan, "whole_pieces")],
}


def kernel_text(file):
    return (resources.files("visionmamba.kernels.cuda") / file).read_text()


def barriers():
    """Every barrier of every kernel: its file, and which of the file's it is."""
    return [(file, i) for file in FILES for i in range(len(list(BARRIER.finditer(kernel_text(file)))))]


def changed(folder, file, text):
    """Copy the kernels, one file of them with other text."""
    shutil.copytree(resources.files("visionmamba.kernels.cuda"), folder / "cuda")
    (folder / "cuda" / file).write_text(text)
    return folder / "cuda"


def faults_of(cases, monkeypatch, **checks):
    """Return what the first of the cases that fails says."""
    for case in cases:
        try:
            with checked(Checks(**checks)):
                run_case(case, monkeypatch)
        except AssertionError as error:
            return str(error)
    return ""


QUICK_BARRIERS = [("pair_backward.cu", 3)]
# Barriers that can be left out.
NEEDLESS = {
    ("dt_products.cu", 0),  # a lane reads the parts of the weight that it wrote itself
    ("scan_backward.cu", 6),  # what a lane stages next is where it read last; sums have two buffers
    ("tile_forward.cu", 6),  # no warp comes here early: a direction has as many pieces as warps, or more
}


@pytest.mark.parametrize(
    ("file", "number"),
    [pytest.param(*b, marks=() if b in QUICK_BARRIERS else pytest.mark.slow) for b in barriers()],
)
def test_a_barrier_that_is_left_out_is_noticed(file, number, monkeypatch, tmp_path):
    text = kernel_text(file)
    match = list(BARRIER.finditer(text))[number]
    folder = changed(tmp_path, file, text[: match.start()] + "{}" + text[match.end() :])
    faults = faults_of(FILES[file], monkeypatch, folder=folder)
    print(file, text.count("\n", 0, match.start()) + 1, match[0], "|", faults[:600])
    assert bool(faults) == ((file, number) not in NEEDLESS)


ENTERING = "(reverse * TILE_CHANNELS + at.column), entering"
STATE = "p.last_state, (int64)at.b * p.K + at.k"
# What is to stand in a kernel for what, and what is said of it then.
SHIFTS = [
    ("pair_backward.cu", "row_of(du_0, token[j],", "row_of(du_0, token[j] + 1,", "memory: a write"),
    ("pair_walk.cuh", "copy_16(to + part * 16,", "copy_16(to + part * 16 + 8,", "memory: a misaligned copy"),
    ("pair_backward.cu", f"2 * {ENTERING}", f"1 + 2 * {ENTERING}", "undefined: a misaligned"),
    ("conv_paired.cu", "dparams[(int64)2 * p.D", "dparams[1 + (int64)2 * p.D", "memory: a write"),
    ("conv_paired.cu", "weights.w[0][PAST - j]", "weights.w[0][WIDTH - j]", "undefined: an index"),
    ("tile_backward.cu", "segments + (which *", "segments + ((which + 1) *", "memory: a write"),
    ("tile_forward.cu", "row_of(y_k, token, row)", "row_of(y_k, token - 1, row)", "memory: a write"),
    ("scan_forward.cu", STATE, f"{STATE} + 1", "memory: a write"),
]


@pytest.mark.parametrize(
    ("file", "text", "other", "expected"),
    [pytest.param(*shift, marks=pytest.mark.slow if i else ()) for i, shift in enumerate(SHIFTS)],
)
def test_a_wrong_place_is_noticed(file, text, other, expected, monkeypatch, tmp_path):
    assert text in kernel_text(file)
    folder = changed(tmp_path, file, kernel_text(file).replace(text, other))
    faults = faults_of(FILES[file], monkeypatch, folder=folder)
    assert expected in faults


def sanitized(*arguments, **environment):
    """Run tests in a process of their own, with AddressSanitizer around the kernels and all tensors."""
    command = [COMPILER, "-print-file-name=libasan.so"]
    library = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(library).is_file():
        pytest.skip("the compiler has no AddressSanitizer")
    options = "detect_leaks=0:detect_odr_violation=0:detect_stack_use_after_return=0:alloc_dealloc_mismatch=0"
    environment |= {"LD_PRELOAD": library, "ASAN_OPTIONS": options, "VISIONMAMBA_EMULATE": "address"}
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("tests", [test_emulated, test_pair_backward, test_layer_kernels], ids=lambda t: t.__name__)
def test_address_sanitizer(tests):
    done = sanitized(tests.__file__, "-k", "not compile")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.slow
def test_a_local_array_that_is_too_short_is_noticed(tmp_path):
    text = kernel_text("pair_backward.cu")
    arrays = "h[STEPS][VEC], B[SLOTS], C[SLOTS]"
    assert arrays in text
    folder = changed(tmp_path, "pair_backward.cu", text.replace(arrays, "h[STEPS][VEC], B[STEPS], C[STEPS]"))
    case = f"{test_pair_backward.__file__}::test_gradients[one_pair_float32_delta]"
    done = sanitized(case, VISIONMAMBA_EMULATED_KERNELS=str(folder))
    assert "ERROR: AddressSanitizer" in done.stderr
    assert "pair_backward" in done.stderr.split("ERROR: AddressSanitizer")[1]
