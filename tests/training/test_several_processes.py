"""Two processes train as one does at the same global batch, up to the order of sums."""

import pytest
import torch
import torch.distributed as dist
from digit_folder import write_digits
from runs import TINY, finish, start, start_world, weights

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch.distributed has no gloo here", allow_module_level=True)

TOLERANCE = 1e-5
"""Of weights of the order of 1 after a few steps of SGD: float32 sums in another order."""


def _check(tmp_path, parallel, images=128, environment=None, nodes=False, **changes):
    """Train in one process and in two, and return the largest difference of a weight."""
    config = dict(
        TINY, data=str(write_digits(tmp_path / "digits", images, 61)), opt="sgd", lr=0.05, drop_path=0.0,
        ema_decay=0.8, clip_grad=1.0, warmup_epochs=0, parallel=parallel, **changes,
    )  # fmt: skip
    finish(start(dict(config, out=str(tmp_path / "one")), environment))
    finish(*start_world(dict(config, out=str(tmp_path / "two")), 2, environment, nodes))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=TOLERANCE, atol=TOLERANCE)
    logs = [(tmp_path / name / "log.csv").read_text().splitlines()[-1].split(",") for name in ("one", "two")]
    assert [float(x) for x in logs[0][:-1]] == pytest.approx([float(x) for x in logs[1][:-1]], rel=1e-4)
    return max((two[key] - one[key]).abs().max().item() for key in one)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_equal_one(parallel, tmp_path):
    _check(tmp_path, parallel, images=48, epochs=1)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_accumulation_in_two_processes(parallel, tmp_path):
    _check(tmp_path, parallel, accumulate=2)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "gpus", [1, pytest.param(2, marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"))]
)
@pytest.mark.parametrize("model", ["test_vmamba", "test_vim", "test_mamba2d"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_over_nccl_equal_one(parallel, model, gpus, tmp_path):
    exact = {"NVIDIA_TF32_OVERRIDE": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # of convolutions, TF32 is the default
    difference = _check(tmp_path, parallel, 64, exact, nodes=gpus == 1, model=model, device="cuda", epochs=1)
    print(f"{model} {parallel}: {gpus} GPUs, largest difference of a weight {difference:.1e}, of {TOLERANCE:.0e}")


@pytest.mark.gpu
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_replay_graphs_as_one(accumulate, tmp_path):
    exact = {"NVIDIA_TF32_OVERRIDE": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    changes = dict(device="cuda", epochs=1, cuda_graph=True, accumulate=accumulate)
    difference = _check(tmp_path, "ddp", 64, exact, nodes=torch.cuda.device_count() < 2, **changes)
    print(f"{accumulate} passes a step: largest difference of a weight {difference:.1e}, of {TOLERANCE:.0e}")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_moves_between_one_process_and_two(parallel, tmp_path):
    config = dict(
        TINY, data=str(write_digits(tmp_path / "digits", 128, 61)), opt="sgd", lr=0.05, sched="constant",
        warmup_epochs=0, drop_path=0.0, ema_decay=0.8, parallel=parallel, out=str(tmp_path / "moved"),
    )  # fmt: skip
    finish(start(dict(config, out=str(tmp_path / "one"), epochs=3)))
    finish(*start_world(dict(config, epochs=1), 2))
    finish(start(dict(config, epochs=2)))
    finish(*start_world(dict(config, epochs=3), 2))
    one, moved = weights(tmp_path / "one"), weights(tmp_path / "moved")
    for key in one:
        torch.testing.assert_close(moved[key], one[key], rtol=TOLERANCE, atol=TOLERANCE)
