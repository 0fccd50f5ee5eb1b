"""The command line as such, and the commands that only look: list, info, doctor."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import visionmamba
from visionmamba.cli import commands
from visionmamba.zoo import model_names, published_top1, summarize, weights_source


def test_help_names_every_command_with_its_summary(run):
    result = run("--help")
    assert result.status == 0
    for name in commands():
        assert name in result.out
    assert "Classify images." in result.out


def test_only_the_command_asked_for_is_imported():
    code = """
import sys
from visionmamba.cli import main
try:
    main(["--help"])
except SystemExit:
    print(sorted(name for name in sys.modules if name.startswith("visionmamba.cli.")))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "['visionmamba.cli._common']"


@pytest.mark.parametrize("name", commands())
def test_every_command_has_help(run, name):
    result = run(name, "--help")
    assert result.status == 0
    assert f"visionmamba {name}" in result.out


def test_version(run):
    assert run("--version").out.strip() == f"visionmamba {visionmamba.__version__}"


@pytest.mark.parametrize("arguments", [["lst"], ["list", "--jsn"], ["predict"]])
def test_wrong_use(run, arguments):
    result = run(*arguments)
    assert result.status == 2
    assert "Traceback" not in result.err


def test_module_runs_the_command():
    command = [sys.executable, "-m", "visionmamba", "info", "no_such_model"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: unknown model 'no_such_model'")


def test_list_json_has_every_model(run):
    rows = json.loads(run("list", "--json").out)
    assert [row["name"] for row in rows] == model_names()
    row = {row["name"]: row for row in rows}["vmamba_tiny_s1l8"]
    assert (row["family"], row["params"], row["top1"]) == ("vmamba", 30_249_064, 82.6)
    assert row["weights"].startswith("https://")


def test_list_table_is_not_cut_when_piped(run):
    result = run("list", "vmamba_tiny")
    assert "vmamba_tiny_s1l8" in result.out
    assert weights_source(timm.get_pretrained_cfg("vmamba_tiny_s1l8").to_dict()) in result.out
    assert "vim_tiny" not in result.out


def test_list_without_a_match(run):
    result = run("list", "resnet")
    assert result.status == 1
    assert result.err == "error: no model's name matches 'resnet'; 'visionmamba list' shows all\n"


def test_info(run):
    facts = json.loads(run("info", "vmamba_tiny_s1l8", "--json").out)
    assert facts["input_size"] == [3, 224, 224]
    assert [level["channels"] for level in facts["features"]] == [96, 192, 384, 768]
    table = run("info", "vmamba_tiny_s1l8").out
    assert "30,249,064" in table
    assert "768 channels at 1/32" in table


def test_info_of_an_unknown_model_names_near_ones(run):
    result = run("info", "vmamba_tiny_s1l9")
    assert result.status == 1
    assert result.err.startswith("error: unknown model 'vmamba_tiny_s1l9'; did you mean vmamba_tiny_s1l8")
    assert result.err.count("\n") == 1


def test_doctor_names_a_backend_for_every_operator(run):
    report = json.loads(run("doctor", "--json").out)
    assert report["versions"]["timm"] == timm.__version__
    assert report["devices"][0]["type"] == "cpu"
    assert {"selective_scan", "causal_conv1d"} <= {row["op"] for row in report["operators"]}
    for row in report["operators"]:
        assert row["backend"] in row["backends"]
        assert row["backends"][row["backend"]] is None
    assert "selective_scan" in run("doctor").out


def test_doctor_shows_what_a_forced_backend_does(run, monkeypatch):
    monkeypatch.setenv("VISIONMAMBA_BACKEND", "torch")
    report = json.loads(run("doctor", "--json").out)
    assert report["forced_backend"] == "torch"
    assert {row["backend"] for row in report["operators"]} == {"torch"}


def test_doctor_survives_a_forced_backend_that_does_not_exist(run, monkeypatch):
    monkeypatch.setenv("VISIONMAMBA_BACKEND", "abacus")
    result = run("doctor")
    assert result.status == 0
    assert "abacus" in result.out


def test_published_top1_is_read_from_the_notes():
    assert published_top1({"notes": ("top1: 82.6", "top5: 95.9")}) == 82.6
    assert published_top1({"notes": ("top5: 95.9",)}) is None
    assert published_top1({}) is None


def test_weights_source():
    hub = {"hf_hub_id": "someone/model", "hf_hub_filename": "weights.pth"}
    assert weights_source(hub) == "https://huggingface.co/someone/model/resolve/main/weights.pth"
    assert weights_source({"url": "https://example.org/a.pth"}) == "https://example.org/a.pth"
    assert weights_source({"url": ""}) is None


def test_summary_counts_parameters():
    model = timm.create_model("test_vmamba")
    assert summarize("test_vmamba").params == sum(parameter.numel() for parameter in model.parameters())


def test_model_that_needs_a_missing_package(run, monkeypatch):
    def create_model(*_args, **_kwargs):
        raise ImportError("test_vmamba needs a package:\n  pip install package")

    monkeypatch.setattr(timm, "create_model", create_model)
    (row,) = json.loads(run("list", "test_vmamba", "--json").out)
    assert row["params"] is None
    assert run("list", "test_vmamba").status == 0
    result = run("info", "test_vmamba")
    assert (result.status, result.err) == (1, "error: test_vmamba needs a package: pip install package\n")


def test_commands_are_files():
    assert all(isinstance(path, Path) and path.is_file() for path in commands().values())
    assert not any(name.startswith("_") for name in commands())


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_doctor_checks_no_kernels_without_a_gpu(run, options):
    result = run("doctor", "--gpu", *options)
    assert result.status == 1
    assert "this machine has no GPU that PyTorch can use" in result.err
    assert len(result.err.strip().splitlines()) == 1


def test_kernel_checks_find_what_is_wrong(monkeypatch):
    from visionmamba.cli import _kernel_checks

    cases = [case for case in _kernel_checks._CASES if case[0] == "causal_conv1d"]
    monkeypatch.setattr(_kernel_checks, "_CASES", cases)
    good = _kernel_checks.check_kernels("cpu")
    assert len(good) == 2 and all(c.backend == "cpu" and c.problem is None and c.error < 1e-5 for c in good)
    plain = _kernel_checks._run
    monkeypatch.setattr(
        _kernel_checks, "_run", lambda name, *rest: [x + 0.1 * (name == "cpu") for x in plain(name, *rest)]
    )
    bad = _kernel_checks.check_kernels("cpu")
    assert len(bad) == 2 and all("differs from plain PyTorch" in c.problem for c in bad)
