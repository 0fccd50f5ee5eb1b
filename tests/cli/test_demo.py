"""``visionmamba demo`` on a small part of the digits; ``.ci/run`` runs all of it."""

import json
import os
import stat

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import visionmamba.demo
from visionmamba.data import load_digits, render_digits
from visionmamba.zoo import model_names

_TRAIN, _HELD_OUT = 96, 40


@pytest.fixture
def _few_digits(monkeypatch):
    train, held_out = load_digits()
    few = train.select(slice(_TRAIN)), held_out.select(slice(_HELD_OUT))
    monkeypatch.setattr(visionmamba.demo, "load_digits", lambda seed: few)


@pytest.mark.usefixtures("_few_digits")
def test_demo_saves_reloads_and_draws(run, tmp_path):
    out = tmp_path / "new" / "folder"
    result = run("demo", "--epochs", 1, "--out", out, "--json")
    assert result.status == 0, result.err
    report = json.loads(result.out)
    assert (report["model"], report["epochs"]) == ("test_vmamba", 1)
    assert (report["trained_on"], report["held_out"]) == (_TRAIN, _HELD_OUT)
    assert 0 <= report["accuracy"] <= 1
    assert sorted(path.name for path in out.iterdir()) == ["test_vmamba.png", "test_vmamba.safetensors"]
    with Image.open(report["picture"]) as picture:
        assert picture.size[0] > 300
        assert len(set(picture.convert("L").get_flattened_data())) > 50
    with safe_open(report["checkpoint"], framework="pt") as file:
        assert file.metadata()["model"] == "test_vmamba"


@pytest.mark.usefixtures("_few_digits")
def test_same_seed_same_weights(run, tmp_path):
    for name in "ab":
        run("demo", "--epochs", 1, "--out", tmp_path / name, "--seed", 3, "--device", "cpu")
    a, b = (load_file(tmp_path / name / "test_vmamba.safetensors") for name in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.usefixtures("_few_digits")
def test_predict_reads_the_demos_checkpoint(run, tmp_path):
    """A scan of a digit, dark ink on white paper, goes to ``predict`` with the checkpoint alone."""
    run("demo", "--epochs", 4, "--out", tmp_path, "--device", "cpu")
    _, held_out = visionmamba.demo.load_digits(0)
    checkpoint = tmp_path / "test_vmamba.safetensors"
    from visionmamba.inference import create_classifier

    model = create_classifier("test_vmamba", checkpoint)
    expected = visionmamba.demo.classify(model, held_out.select(slice(1)))[0]
    size = model.pretrained_cfg["input_size"][1:]
    scan = (render_digits(held_out.select(slice(1)), (1, *size))[0, 0] + 1) * 127.5
    Image.fromarray(scan.round().to(torch.uint8).numpy()).convert("RGB").save(tmp_path / "scan.png")
    arguments = ["predict", tmp_path / "scan.png", "--model", "test_vmamba", "--checkpoint", checkpoint, "--topk", 10]
    answer = json.loads(run(*arguments, "--json", "--device", "cpu").out)[0]["top"]
    found = {guess["name"]: guess["probability"] for guess in answer}
    torch.testing.assert_close(torch.tensor([found[str(digit)] for digit in range(10)]), expected, atol=0.02, rtol=0)


@pytest.mark.usefixtures("_few_digits")
@pytest.mark.parametrize("model", model_names("test_*"))
def test_every_micro_model_trains(run, tmp_path, model):
    result = run("demo", "--model", model, "--epochs", 1, "--out", tmp_path, "--json")
    assert result.status == 0, result.err
    assert json.loads(result.out)["model"] == model


def test_default_epochs_check_the_accuracy(run, tmp_path, monkeypatch, _few_digits):
    monkeypatch.setattr("visionmamba.cli.demo._EPOCHS", 1)
    result = run("demo", "--out", tmp_path)
    assert result.status == 1
    assert result.err.splitlines()[-1] == "error: expected at least 95% of the held-out digits right"


def _fail(*_args, **_kwargs):
    raise AssertionError("work was started")


def test_unwritable_folder_is_said_before_the_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(visionmamba.demo, "Trainer", _fail)
    occupied = tmp_path / "file"
    occupied.touch()
    for out in (occupied, occupied / "below"):
        result = run("demo", "--out", out)
        assert result.status == 1
        assert result.err.startswith(f"error: --out: cannot write to the folder {out}: ")
        assert result.err.count("\n") == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(run, tmp_path, monkeypatch):
    monkeypatch.setattr(visionmamba.demo, "Trainer", _fail)
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert "Permission denied" in run("demo", "--out", tmp_path).err
    finally:
        tmp_path.chmod(stat.S_IRWXU)


@pytest.mark.parametrize(("option", "value"), [("--model", "test_vmanba"), ("--device", "abacus")])
def test_bad_options(run, tmp_path, option, value):
    result = run("demo", option, value, "--out", tmp_path)
    assert result.status == 1
    assert result.err.startswith("error: ")
    assert value in result.err
    assert result.err.count("\n") == 1


@pytest.mark.usefixtures("_few_digits")
@pytest.mark.parametrize("finished", [0, 1])
def test_interruption_says_what_was_saved(run, tmp_path, monkeypatch, finished):
    calls = []
    epoch = visionmamba.demo.Trainer.epoch

    def interrupted(self, on_step):
        calls.append(None)
        if len(calls) > finished:
            raise KeyboardInterrupt
        return epoch(self, on_step)

    monkeypatch.setattr(visionmamba.demo.Trainer, "epoch", interrupted)
    result = run("demo", "--out", tmp_path)
    assert result.status == 130
    last = result.err.splitlines()[-1]
    if finished:
        assert last.startswith(f"interrupted: {tmp_path / 'test_vmamba.safetensors'} holds the weights after epoch 1")
        assert (tmp_path / "test_vmamba.safetensors").exists()
    else:
        assert last == "interrupted: nothing was saved"
        assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_few_digits")
def test_failed_save_leaves_the_old_checkpoint(run, tmp_path, monkeypatch):
    old = tmp_path / "test_vmamba.safetensors"
    old.write_bytes(b"old")

    def full(_tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    result = run("demo", "--epochs", 1, "--out", tmp_path)
    assert result.status == 1
    assert "No space left on device" in result.err.splitlines()[-1]
    assert old.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [old]
