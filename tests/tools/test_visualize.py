"""``tools/visualize.py``: a picture of each kind, whole or not at all, and clear errors."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

_spec = importlib.util.spec_from_file_location(
    "visualize", Path(__file__).resolve().parents[2] / "tools" / "visualize.py"
)
visualize = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(visualize)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "cat.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(path)
    return path


def _run(*words):
    return visualize.main([str(word) for word in words])


def test_every_kind_for_several_models(image, tmp_path, capsys):
    out = tmp_path / "out"
    models = ("--model", "test_vmamba", "--model", "test_vim", "--model", "test_convnext")
    assert _run(image, *models, "--random", "--out", out) == 0
    expected = {f"cat_{kind}.png" for kind in ("gradcam", "activation", "erf", "scan")}
    assert {path.name for path in out.iterdir()} == expected  # no temporary file is left
    assert len(capsys.readouterr().out.splitlines()) == 4
    for path in out.iterdir():
        with Image.open(path) as picture:
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 100


def test_options_change_the_picture(image, tmp_path):
    drawn = []
    for i, options in enumerate([(), ("--token", "0,0"), ("--scan", "0"), ("--decay-only",)]):
        out = tmp_path / str(i)
        assert _run(image, "--model", "test_vmamba", "--random", "--kind", "scan", "--out", out, *options) == 0
        drawn.append((out / "cat_scan.png").read_bytes())
    assert len(set(drawn)) == 4


def test_images_of_one_name_do_not_overwrite_each_other(image, tmp_path):
    other = tmp_path / "other" / "cat.png"
    other.parent.mkdir()
    other.write_bytes(image.read_bytes())
    options = ("--model", "test_vmamba", "--random", "--kind", "activation", "--out", tmp_path / "out")
    assert _run(image, other, *options) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"cat_0_activation.png", "cat_1_activation.png"}


def test_bad_images_are_named_and_the_rest_are_drawn(image, tmp_path, capsys):
    text, cut = tmp_path / "text.jpg", tmp_path / "cut.png"
    text.write_text("not an image")
    cut.write_bytes(image.read_bytes()[:2000])
    paths = (text, cut, tmp_path / "missing.png", tmp_path, image)
    options = ("--model", "test_vmamba", "--random", "--kind", "erf", "--out", tmp_path / "out")
    assert _run(*paths, *options) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in errors if line.startswith("error: ")]
    assert len(errors) == 4
    assert "not a readable image" in errors[0]
    assert "no such file" in errors[2]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["cat_erf.png"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "test_vmanba"], "unknown model 'test_vmanba'; did you mean test_vmamba"),
        (["--model", "test_mamba3d"], "test_mamba3d does not take colour images"),
        (["--model", "test_vmamba", "--layer", "neck"], "layer: no module 'neck'"),
        (["--model", "test_vmamba", "--class", "1000"], "class: expected 0 to 999"),
        (["--model", "test_vmamba", "--token", "99,0"], "token: expected a place within"),
        (["--model", "test_vmamba", "--scan", "77"], "scan: test_vmamba has 5 scans, got 77"),
        (["--model", "test_vmamba", "--checkpoint", "missing.pth"], "--checkpoint: no such file: missing.pth"),
    ],
)
def test_bad_options_are_one_sentence(image, tmp_path, capsys, options, message):
    assert _run(image, *options, "--random", "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "Traceback" not in error
