"""Checkpoints keep every bit from the authors' layout to ours and back, and through a folder for the Hub."""

import importlib.util
import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import visionmamba
from visionmamba.inference import create_classifier, create_reader

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


def _convert(*words):
    assert tool.main(list(map(str, words))) == 0


def _there_and_back(name, weights, tmp_path, *options):
    """Convert to the authors' layout, to ours and to theirs again; return the authors' state dict and our file."""
    official, ours, again = (tmp_path / file for file in ("official.pth", "ours.safetensors", "again.pth"))
    _convert(name, tmp_path / "weights.pth", official, "--to", "official", *options)
    (nested,) = torch.load(official, weights_only=True).values()
    assert nested.keys() != weights.keys()
    _convert(name, official, ours, *options)
    _equal(load_file(ours), weights)
    _convert(name, ours, again, "--to", "official")  # whose metadata says what the options said
    (nested_again,) = torch.load(again, weights_only=True).values()
    _equal(nested_again, nested)
    return nested, ours


@pytest.mark.parametrize("options", [{}, dict(in_chans=1, num_classes=7), dict(in_chans=4, num_classes=0)], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_to_the_authors_layout_and_back(name, options, tmp_path):
    """The checkpoint's tensors say how many channels and classes it has."""
    weights = _random_weights(name, tmp_path / "weights.pth", **options)
    _, ours = _there_and_back(name, weights, tmp_path)
    model = create_classifier(name, ours)
    _equal(model.state_dict(), weights)
    assert (model.in_chans, model.num_classes) == (options.get("in_chans", 3), options.get("num_classes", 1000))


@pytest.mark.parametrize("name", ["test_vim", "test_plainmamba", "test_local_vim", "test_mamba2d"])
def test_another_image_size_is_said_and_kept(name, tmp_path, capsys):
    """Position embeddings are not interpolated in passing, neither here nor where the file is read."""
    weights = _random_weights(name, tmp_path / "weights.pth", img_size=(96, 80))
    assert tool.main([name, str(tmp_path / "weights.pth"), str(tmp_path / "out.pth"), "--to", "official"]) == 1
    assert "img_size: expected the size for which a position embedding has" in capsys.readouterr().err
    _, ours = _there_and_back(name, weights, tmp_path, "--img-size", "96x80")
    _equal(create_classifier(name, ours).state_dict(), weights)
    _convert(name, ours, tmp_path / "hub", "--to", "hub")
    _equal(timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).state_dict(), weights)


@pytest.mark.slow
def test_volumes_keep_the_size_that_their_checkpoint_has(tmp_path):
    pytest.importorskip("monai")
    weights = _random_weights("mamba3d_small_btcv", tmp_path / "weights.pth", img_size=48)
    _there_and_back("mamba3d_small_btcv", weights, tmp_path)


def test_pictures_of_other_channels_can_be_read(tmp_path):
    """Nobody said how a grey model's images were normalised; the published statistics are of three channels."""
    _random_weights("test_vmamba", tmp_path / "weights.pth", in_chans=1)
    _convert("test_vmamba", tmp_path / "weights.pth", tmp_path / "ours.safetensors")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    model = create_classifier("test_vmamba", tmp_path / "ours.safetensors")
    image = create_reader(model)(tmp_path / "red.png")
    assert image.shape == (1, 1, 32, 32)
    assert model(image).shape == (1, 1000)


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
    _convert(name, tmp_path / "weights.pth", folder, "--to", "hub")
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
    _convert("test_vmamba", tmp_path / "last.safetensors", tmp_path / "hub", "--to", "hub")
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
        (["test_vim", "weights.pth", "out.safetensors", "--img-size", "big"], "--img-size: expected a size such as"),
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
