"""``visionmamba bench`` on the CPU: its columns, what it skips, and what it does with failures."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from visionmamba.analysis import bench as module

TIMM_INFER = "model infer_samples_per_sec infer_step_time infer_batch_size infer_img_size infer_gmacs infer_macts"
QUICK = ("--size", "32", "--warmup", "1", "--repeats", "3", "--device", "cpu")


def _rows(folder, mode="infer"):
    with (folder / f"{mode}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_columns_are_timms_and_figures_fit_together(run, tmp_path):
    result = run("bench", "test_vmamba", "--batch", "1,4", "--mode", "infer,train", *QUICK, "--out", tmp_path)
    assert result.status == 0, result.err
    rows = _rows(tmp_path)
    assert list(rows[0])[:8] == [*TIMM_INFER.split(), "param_count"]
    assert [row["infer_batch_size"] for row in rows] == ["1", "4"]
    for row in rows:
        per_second = 1e3 * int(row["infer_batch_size"]) / float(row["infer_step_time"])
        told = float(row["infer_samples_per_sec"])  # with two digits after the point
        assert told == pytest.approx(per_second, rel=1e-2, abs=0.005)
        assert float(row["latency_p50"]) <= float(row["latency_p90"]) <= float(row["latency_p99"])
        assert (row["param_count"], row["memory_from"], row["error"]) == ("0.42", "shapes", "")
    train = _rows(tmp_path, "train")
    assert float(train[1]["peak_memory_mib"]) > float(rows[1]["peak_memory_mib"])
    recorded = json.loads((tmp_path / "environment.json").read_text())
    assert {"device", "driver", "torch", "timm", "commit", "threads"} <= set(recorded)


def test_what_is_there_is_not_measured_again(run, tmp_path, monkeypatch):
    arguments = ["bench", "test_vmamba", *QUICK, "--out", tmp_path]
    assert run(*arguments).status == 0
    before = _rows(tmp_path)
    measured = []
    monkeypatch.setattr(module, "measure", lambda setting, *_: measured.append(setting.model) or before[0])
    assert run(*arguments).status == 0
    assert measured == []
    assert run("bench", "test_vim", *arguments[1:]).status == 0
    assert measured == ["test_vim"]
    assert _rows(tmp_path)[0] == before[0]


def test_a_failing_model_is_a_row_and_the_rest_go_on(run, tmp_path, monkeypatch):
    create = module.create_for_size

    def fail(name, *arguments):
        if name == "test_vim":
            raise RuntimeError("out of\nmemory")
        return create(name, *arguments)

    monkeypatch.setattr(module, "create_for_size", fail)
    result = run("bench", "test_vim", "test_vmamba", *QUICK, "--out", tmp_path)
    assert result.status == 0
    assert "error: test_vim: RuntimeError: out of memory" in result.err
    rows = {row["model"]: row for row in _rows(tmp_path)}
    assert rows["test_vim"]["error"] == "RuntimeError: out of memory"
    assert rows["test_vim"]["infer_samples_per_sec"] == ""
    assert not rows["test_vmamba"]["error"]
    monkeypatch.undo()
    assert run("bench", "test_vim", *QUICK, "--out", tmp_path).status == 0  # an error is tried again
    assert len(_rows(tmp_path)) == 2
    assert not any(row["error"] for row in _rows(tmp_path))


def test_cuda_graphs_on_a_cpu_are_refused_in_the_row(run, tmp_path):
    result = run("bench", "test_vmamba", "--run", "graph", *QUICK, "--out", tmp_path)
    assert result.status == 1
    assert "a CUDA graph needs a CUDA device, got cpu" in _rows(tmp_path)[0]["error"]


def test_json_and_precision(run, tmp_path):
    flags = (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
    arguments = ("--precision", "fp32,bf16", "--mode", "infer,train", "--channels-last", *QUICK, "--out", tmp_path)
    report = json.loads(run("bench", "test_vmamba", *arguments, "--json").out)
    assert [row["precision"] for row in report["rows"]] == ["fp32", "bf16"] * 2
    assert not any(row["error"] for row in report["rows"])
    assert report["environment"]["device_type"] == "cpu"
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == flags


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["test_vmanba"], "unknown model 'test_vmanba'"),
        (["test_vim", "--mode", "inference"], "--mode: expected some of infer, train, got 'inference'"),
        (["test_vim", "--batch", "0"], "--batch: expected positive numbers"),
        (["test_vim", "--precision", "int4"], "--precision: expected some of fp32, tf32, bf16, fp16, got 'int4'"),
        (["test_vim", "--device", "abacus"], "--device: "),
    ],
)
def test_bad_input_is_one_sentence(run, tmp_path, arguments, message):
    result = run("bench", *arguments, "--out", tmp_path)
    assert result.status == 1
    assert message in result.err
    assert len(result.err.strip().splitlines()) == 1


def test_results_of_another_machine_are_not_mixed(run, tmp_path):
    (tmp_path / "environment.json").write_text(json.dumps({"device": "abacus"}))
    result = run("bench", "test_vim", *QUICK, "--out", tmp_path)
    assert result.status == 1
    assert "holds results of another machine (device abacus" in result.err


def test_a_foreign_table_is_not_overwritten(run, tmp_path):
    (tmp_path / "infer.csv").write_text("my,own,table\n1,2,3\n")
    result = run("bench", "test_vim", *QUICK, "--out", tmp_path)
    assert result.status == 1
    assert "is not a table of this benchmark" in result.err
    assert (tmp_path / "infer.csv").read_text() == "my,own,table\n1,2,3\n"


def test_steps_fit_into_the_time_but_five_are_timed():
    timing = module.Timing(repeats=20, seconds=1.0)
    assert [timing.steps(step) for step in (1e-9, 0.01, 0.06, 0.1, 0.2, 9.0)] == [20, 20, 17, 10, 5, 5]
    assert module.Timing(repeats=3, seconds=0.0).steps(9.0) == 3


class _Counter:
    """A driver's counter of a device that takes 500 W, which moves on every 0.1 s of a clock of its own."""

    NVMLError = RuntimeError

    def __init__(self, moves=True):
        self.now, self.moves = 0.03, moves

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return 7_000 + (50_000 * int(self.now / 0.1) if self.moves else 0)


@pytest.mark.parametrize("seconds_a_step", [0.004, 0.3])
def test_energy_is_taken_between_moves_of_the_counter(monkeypatch, seconds_a_step):
    counter = _Counter()
    monkeypatch.setattr(module, "nvml_device", lambda device: (counter, None))
    monkeypatch.setattr(module.time, "perf_counter", lambda: counter.now)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def step():
        counter.now += seconds_a_step

    device = torch.device("cuda")
    assert module._joules(step, device, 1.0) == pytest.approx(500 * seconds_a_step, rel=0.05)
    assert module._joules(step, device, 0.0) is None
    counter.moves = False
    assert module._joules(step, device, 1.0) is None


@pytest.mark.gpu
def test_on_a_gpu(run, tmp_path):
    options = ("--run", "eager,graph", "--mode", "infer,train", "--precision", "bf16", "--batch", "8", "--size", "64")
    result = run("bench", "test_vmamba", "test_vim", *options, "--repeats", "5", "--device", "cuda", "--out", tmp_path)
    assert result.status == 0, result.err
    rows = [*_rows(tmp_path), *_rows(tmp_path, "train")]
    assert len(rows) == 8
    for row in rows:
        assert (row["error"], row["memory_from"], row["steps"]) == ("", "allocator", "5")
        assert float(row["latency_p50"]) > 0
        assert float(row["peak_memory_mib"]) > float(row["param_count"]) * 4
    speed = {(row["model"], row["run"]): float(row["infer_samples_per_sec"]) for row in rows[:4]}
    assert all(speed[name, "graph"] > speed[name, "eager"] for name in ("test_vmamba", "test_vim"))


@pytest.mark.gpu
@pytest.mark.parametrize("run_as", ["eager", "graph"])
def test_memory_is_a_settings_own(run_as):
    """What ran before on other streams, and a larger image, leave nothing in a setting's peak."""
    device, timing = torch.device("cuda"), module.Timing(1, 3, 0.0, 0.0)
    small = module.Setting("test_vim", "train", (64, 64), 4, run_as, "bf16")
    first = module.measure(small, device, timing)["peak_memory_mib"]
    for run in ("graph", "eager", "graph"):
        module.measure(module.Setting("test_vmamba", "train", (256, 256), 8, run, "bf16"), device, timing)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.randn(64, 64, device=device) @ torch.randn(64, 64, device=device)
    again = module.measure(small, device, timing)["peak_memory_mib"]
    assert float(again) == pytest.approx(float(first), abs=0.5)  # of MiB; scan tables stay


@pytest.mark.slow
def test_the_script_is_the_command(tmp_path):
    script = Path(__file__).resolve().parents[2] / "tools" / "benchmark.py"
    subprocess.run([sys.executable, script, "test_vmamba", *QUICK, "--out", tmp_path], check=True)
    assert len(_rows(tmp_path)) == 1
