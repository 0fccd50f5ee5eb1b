"""``visionmamba predict``: right answers, and one clear line for everything that can be wrong with the input."""

import json
import os
import pickle

import pytest
import timm
import torch

from visionmamba.inference import class_names, create_reader


def _expected(checkpoint, image):
    model = timm.create_model("test_vmamba", pretrained=True, pretrained_cfg_overlay=dict(file=str(checkpoint))).eval()
    with torch.inference_mode():
        return model(create_reader(model)(image)).softmax(-1)[0]


def test_json_holds_the_models_answers(run, images, checkpoint):
    result = run("predict", *images, "--model", "test_vmamba", "--checkpoint", checkpoint, "--topk", 3, "--json")
    assert result.status == 0
    for answer, image in zip(json.loads(result.out), images, strict=True):
        shares, indices = _expected(checkpoint, image).topk(3)
        assert answer["image"] == str(image)
        assert [guess["class"] for guess in answer["top"]] == indices.tolist()
        torch.testing.assert_close(torch.tensor([guess["probability"] for guess in answer["top"]]), shares)


def test_text_names_imagenet_classes(run, images, checkpoint):
    result = run("predict", images[0], "--model", "test_vmamba", "--checkpoint", checkpoint)
    names = timm.data.ImageNetInfo().label_descriptions()
    top = _expected(checkpoint, images[0]).topk(5).indices.tolist()
    assert result.out.splitlines()[0] == str(images[0])
    assert [line.split("%  ")[1] for line in result.out.splitlines()[1:]] == [names[index] for index in top]


def test_class_names_match_imagenets_order():
    names = class_names(timm.create_model("test_vmamba", device="meta"))
    assert len(names) == 1000
    assert [names[index].split(",")[0] for index in (0, 1, 999)] == ["tench", "goldfish", "toilet tissue"]


def test_topk_beyond_the_number_of_classes(run, images, checkpoint):
    result = run("predict", images[0], "--model", "test_vmamba", "--checkpoint", checkpoint, "--topk", 2000, "--json")
    assert len(json.loads(result.out)[0]["top"]) == 1000


def test_own_number_of_classes(run, images, tmp_path):
    path = tmp_path / "seven.pth"
    torch.save(timm.create_model("test_vmamba", num_classes=7).state_dict(), path)
    arguments = ["predict", images[0], "--model", "test_vmamba", "--checkpoint", path, "--json"]
    result = run(*arguments, "--num-classes", 7, "--topk", 7)
    assert sorted(guess["name"] for guess in json.loads(result.out)[0]["top"]) == list("0123456")
    assert run(*arguments).status == 1


@pytest.mark.parametrize("as_json", [False, True])
def test_bad_images_are_named_and_the_rest_go_on(run, images, checkpoint, tmp_path, as_json):
    text, truncated, missing = tmp_path / "text.jpg", tmp_path / "cut.png", tmp_path / "missing.png"
    text.write_text("not an image")
    truncated.write_bytes(images[0].read_bytes()[:2000])
    paths = [images[0], text, truncated, images[1], missing, tmp_path]
    options = ["--json"] if as_json else []
    result = run("predict", *paths, "--model", "test_vmamba", "--checkpoint", checkpoint, *options)
    assert result.status == 1
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert [line.split(": ")[1] for line in errors] == [str(path) for path in (text, truncated, missing, tmp_path)]
    assert "no such file" in errors[2]
    assert "Traceback" not in result.err
    if as_json:
        answers = json.loads(result.out)
        assert ["top" in answer for answer in answers] == [True, False, False, True, False, False]
    else:
        assert str(images[0]) in result.out
        assert str(images[1]) in result.out


def _one_line_error(result) -> str:
    assert result.status == 1
    assert result.out == ""
    lines = [line for line in result.err.splitlines() if line.strip()]
    assert len(lines) == 1, result.err
    assert lines[0].startswith("error: ")
    return lines[0]


def test_unknown_model_names_near_ones(run, images):
    error = _one_line_error(run("predict", images[0], "--model", "test_vmanba"))
    assert "unknown model 'test_vmanba'; did you mean test_vmamba" in error


def test_missing_checkpoint(run, images, tmp_path):
    error = _one_line_error(run("predict", images[0], "--model", "test_vmamba", "--checkpoint", tmp_path / "no.pth"))
    assert error == f"error: --checkpoint: no such file: {tmp_path / 'no.pth'}"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_checkpoint(run, images, tmp_path, suffix):
    from safetensors.torch import save_file

    path = tmp_path / f"cut{suffix}"
    state_dict = timm.create_model("test_vmamba").state_dict()
    save_file(state_dict, path) if suffix == ".safetensors" else torch.save(state_dict, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    error = _one_line_error(run("predict", images[0], "--model", "test_vmamba", "--checkpoint", path))
    assert str(path) in error


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("nest", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_is_not_executed(run, images, tmp_path, nest, legacy):
    path, trace = tmp_path / "bomb.pth", tmp_path / "executed"
    bomb = _Bomb(trace)
    content = {"model": timm.create_model("test_vmamba").state_dict(), "extra": bomb} if nest else bomb
    if legacy:
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    error = _one_line_error(run("predict", images[0], "--model", "test_vmamba", "--checkpoint", path))
    assert str(path) in error
    assert not trace.exists()


def test_misfit_names_keys_and_the_model_that_would_fit(run, images, tmp_path):
    path = tmp_path / "vim.pth"
    torch.save(timm.create_model("test_vim").state_dict(), path)
    error = _one_line_error(run("predict", images[0], "--model", "test_vmamba", "--checkpoint", path))
    assert "does not fit" in error
    assert "patch_embed" in error
    assert error.endswith("It fits test_vim.")


@pytest.fixture
def _offline(monkeypatch, tmp_path):
    import socket

    def refuse(*_args, **_kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize("model", ["vmamba_tiny_s1l8", "vim_tiny_patch16_224"])
def test_offline_machine_is_told_what_to_fetch(run, images, model):
    """From a web address, and from the Hugging Face hub."""
    error = _one_line_error(run("predict", images[0], "--model", model))
    cfg = timm.get_pretrained_cfg(model)
    assert (cfg.hf_hub_id or cfg.url) in error
    assert (cfg.hf_hub_filename or "") in error
    assert "--checkpoint" in error


def test_model_without_published_weights(run, images):
    error = _one_line_error(run("predict", images[0], "--model", "test_vmamba"))
    assert "published no weights" in error


def test_unknown_device(run, images, checkpoint):
    arguments = ["predict", images[0], "--model", "test_vmamba", "--checkpoint", checkpoint, "--device", "abacus"]
    assert "abacus" in _one_line_error(run(*arguments))
