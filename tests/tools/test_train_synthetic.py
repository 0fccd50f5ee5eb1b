"""The tool that trains on synthetic tasks: what a run is made of, its log, and the lengths that it is tested at."""

import importlib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("train_synthetic")


def test_a_shorter_length_keeps_the_recipe(tool):
    whole = tool._settings("induction_heads", "Mamba1", True, None, {}, {})
    short = tool._settings("induction_heads", "Mamba1", True, 64, {}, {"steps": 100, "lr": None})
    assert whole.options == {"length": 256} and [s["length"] for s in whole.curriculum] == [16, 32, 64, 128]
    assert short.options == {"length": 64} and [s["length"] for s in short.curriculum] == [16, 32]
    recipe = (1e-2, 1e-20, 0.1, {"dt_min": 0.1, "dt_max": 1.0})
    for run in (whole, short):
        assert (run.lr, run.eps, run.label_smoothing, run.ssm_cfg) == recipe
    assert (whole.steps, short.steps) == (6000, 100)
    fixed = tool._settings("induction_heads", "S4D", True, None, {}, {})
    assert fixed.ssm_cfg == {"d_state": 32, "expand": 2} and fixed.label_smoothing == 0.1


def test_log_of_a_run(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "_LENGTHS", [16, 32, 64, 16384])
    arguments = ["induction_heads", "--length", "32", "--d-model", "8", "--batch", "4", "--steps", "2"]
    arguments += ["--label-smoothing", "0.2", "--seed", "3", "--device", "cpu", "--no-graph", "--out", str(tmp_path)]
    result = CliRunner().invoke(tool.app, arguments)
    assert result.exit_code == 0, result.output
    log = (tmp_path / "induction_heads_Mamba1_L32_smoothing0.2_seed3.jsonl").read_text().splitlines()
    first, evaluation, final = map(json.loads, log)
    assert first["run"]["label_smoothing"] == 0.2 and first["run"]["seed"] == 3
    assert evaluation["step"] == 2 and list(final["length"]) == ["32", "64"]
    assert CliRunner().invoke(tool.app, ["plot", "--out", str(tmp_path)]).exit_code == 0
    assert (tmp_path / "synthetic.png").stat().st_size > 1000
