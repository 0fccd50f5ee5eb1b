"""The cubin cache and the first call, in processes of their own."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

PROGRAM = """
import time, torch
from visionmamba.ops import backend, selective_scan
u = torch.randn(2, 49, 64, device="cuda", dtype=torch.bfloat16)
delta = u.unsqueeze(2)
B = torch.randn(2, 49, 1, 16, device="cuda", dtype=torch.bfloat16)
A = -torch.rand(1, 64, 16, device="cuda")
torch.cuda.synchronize()
start = time.perf_counter()
with backend("cuda"):
    y, _ = selective_scan(u, delta, A, B, B)
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


def run(folder, count=1):
    environment = dict(os.environ, VISIONMAMBA_CACHE_DIR=str(folder))
    command = [sys.executable, "-c", PROGRAM]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs[0][1]
    return [float(out.splitlines()[-1]) for out, _ in outputs]


def test_the_first_call_compiles_and_the_next_process_reads(tmp_path):
    (first,) = run(tmp_path / "cache")
    (second,) = run(tmp_path / "cache")
    print(f"first call {first:.2f} s, from the cache {second:.3f} s")
    assert first < 3
    assert second < 0.2


def test_processes_that_start_together_share_the_cache(tmp_path):
    run(tmp_path / "cache", count=4)
    assert list((tmp_path / "cache").glob("*.cubin"))
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    run(tmp_path / "file" / "cache")
