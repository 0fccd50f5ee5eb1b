"""``visionmamba export``: a checked file, and one clear line for what cannot be."""

import json

import pytest


def test_exports_a_checkpoint_and_checks_it(run, checkpoint, tmp_path):
    out = tmp_path / "deep" / "model.pt2"
    options = ["--format", "pt2", "--checkpoint", checkpoint, "--size", "64x32", "--out", out, "--check"]
    result = run("export", "test_vmamba", *options, "--json")
    assert result.status == 0, result.err
    answer = json.loads(result.out)
    assert answer["input"] == [3, 64, 32]
    assert answer["difference"] <= 1e-4
    assert answer["bytes"] == out.stat().st_size
    assert [path.name for path in out.parent.iterdir()] == ["model.pt2"]


def test_a_position_embedding_is_fitted_to_the_size(run, tmp_path):
    options = ["--format", "pt2", "--random-weights", "--size", "96x64", "--out", tmp_path / "vim.pt2", "--check"]
    result = run("export", "test_vim", *options)
    assert result.status == 0, result.err
    assert "test_vim for inputs 3x96x64, batch size any" in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["test_vmmba"], "did you mean test_vmamba"),
        (["test_vmamba", "--format", "tf"], "--format: expected one of onnx, pt2, aoti, got 'tf'"),
        (["test_vmamba", "--size", "64by32"], "--size: expected a size such as 224 or 160x224, got '64by32'"),
        (["test_vmamba", "--checkpoint", "missing.pth"], "--checkpoint: no such file: missing.pth"),
        (["test_vmamba", "--out", "/proc/none/x.onnx"], "--out: cannot write"),
        (["test_vmamba", "--out", "/dev/null"], "--out: /dev/null is a device, expected a file"),
        (["test_vmamba", "--format", "pt2"], "its authors published no weights"),
        (["test_vmamba", "--checkpoint", "x", "--random-weights"], "exclude each other"),
    ],
)
def test_bad_input_is_one_line(run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("export", *arguments)
    assert result.status == 1
    assert result.err.count("\n") == 1
    assert message in result.err
    assert not list(tmp_path.iterdir())
