"""Checkpoints keep every bit from the authors' layout to ours and back, and through a folder for the Hub."""

import importlib.util
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import visionmamba

_PATH = Path(visionmamba.__file__).parents[1] / "tools" / "convert_checkpoint.py"
_SPEC = importlib.util.spec_from_file_location("convert_checkpoint", _PATH)
tool = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tool)

FAMILIES = (
    "test_vim", "test_vmamba", "test_plainmamba", "test_local_vim", "test_local_vmamba", "test_efficient_vmamba",
    "test_mamba2d", "test_mamba3d",
)  # fmt: skip


def _random_weights(name, path, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.normal_()
        if key.endswith("directions.A_log"):
            tensor[:] = tensor[0]  # LocalVim's authors share it
    torch.save(model.state_dict(), path)
    return model.state_dict()


def _equal(one, two):
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name", FAMILIES)
def test_to_the_authors_layout_and_back(name, tmp_path):
    weights = _random_weights(name, tmp_path / "weights.pth")
    official, ours = tmp_path / "official.pth", tmp_path / "ours.safetensors"
    assert tool.main([name, str(tmp_path / "weights.pth"), str(official), "--to", "official"]) == 0
    (nested,) = torch.load(official, weights_only=True).values()
    assert nested.keys() != weights.keys()
    assert tool.main([name, str(official), str(ours)]) == 0
    _equal(load_file(ours), weights)


def test_what_the_authors_layout_cannot_hold_is_named(tmp_path, capsys):
    weights = _random_weights("test_local_vim", tmp_path / "weights.pth")
    weights["blocks.0.mixer.ssm.directions.A_log"][0].add_(1)
    torch.save(weights, tmp_path / "weights.pth")
    command = ["test_local_vim", str(tmp_path / "weights.pth"), str(tmp_path / "official.pth"), "--to", "official"]
    assert tool.main(command) == 1
    assert "has no place for blocks.0.mixer.ssm.directions.A_log" in capsys.readouterr().err
    assert not (tmp_path / "official.pth").exists()


@pytest.mark.parametrize("name", ["test_vim", "test_mamba3d"])
def test_hub_folder_is_a_model(name, tmp_path):
    folder = tmp_path / "hub"
    weights = _random_weights(name, tmp_path / "weights.pth", num_classes=7)
    command = [name, str(tmp_path / "weights.pth"), str(folder), "--to", "hub", "--num-classes", "7"]
    assert tool.main(command) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == name
    assert config["num_classes"] == 7
    card = (folder / "README.md").read_text()
    assert "import visionmamba" in card
    assert "Published top-1" not in card
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    _equal(model.state_dict(), weights)
    assert timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=3).num_classes == 3


def test_what_a_training_run_saves_can_be_uploaded(tmp_path):
    from visionmamba.training.checkpoint import save_weights

    weights = _random_weights("test_vmamba", tmp_path / "weights.pth", num_classes=2, in_chans=1)
    overlay = {"num_classes": 2, "input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,), "label_names": ["a", "b"]}
    save_weights(tmp_path / "last.safetensors", "test_vmamba", weights, overlay)
    assert tool.main(["test_vmamba", str(tmp_path / "last.safetensors"), str(tmp_path / "hub"), "--to", "hub"]) == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True)
    _equal(model.state_dict(), weights)
    assert model.pretrained_cfg["label_names"] == ["a", "b"]
    assert tuple(model.pretrained_cfg["mean"]) == (0.5,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["test_vim", "missing.pth", "out.safetensors"], "missing.pth: no such checkpoint file"),
        (["test_vmamba", "weights.pth", "out.safetensors"], "does not fit"),
        (["test_vmba", "weights.pth", "out.safetensors"], "did you mean test_vmamba"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _random_weights("test_vim", "weights.pth")
    assert tool.main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("out.safetensors").exists()
