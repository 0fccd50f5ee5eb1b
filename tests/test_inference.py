"""Reading images and clips as models take them."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from visionmamba.inference import class_names, create_reader, input_size


@pytest.fixture
def animation(tmp_path):
    """Five frames, each a shade darker than the one before."""
    shades = [250, 200, 150, 100, 50]
    frames = [Image.new("L", (40, 40), shade) for shade in shades]
    path = tmp_path / "clip.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50)
    return path


def test_image_is_read_as_timm_evaluates(tmp_path):
    model = timm.create_model("test_vmamba", device="meta")
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    expected = transform(Image.fromarray(pixels))[None]
    assert torch.equal(create_reader(model)(tmp_path / "image.png"), expected)
    assert expected.shape == (1, *input_size(model))


def test_grey_images_for_one_channel(tmp_path):
    model = timm.create_model("test_vmamba", in_chans=1, device="meta")
    model.pretrained_cfg.update(mean=(0.5,), std=(0.5,))
    Image.new("RGB", (30, 30), "white").save(tmp_path / "white.png")
    image = create_reader(model)(tmp_path / "white.png")
    torch.testing.assert_close(image, torch.ones(1, *input_size(model)))


def test_frames_are_sampled_evenly(animation):
    model = timm.create_model("test_mamba3d", num_frames=3, device="meta")
    model.pretrained_cfg.update(mean=(0.0,) * 3, std=(1.0,) * 3)
    clip = create_reader(model)(animation)
    assert clip.shape == (1, *input_size(model))
    shades = clip.mean((0, 1, 3, 4)) * 255
    torch.testing.assert_close(shades, torch.tensor([250.0, 150.0, 50.0]), atol=2, rtol=0)


def test_still_image_stands_still(tmp_path):
    model = timm.create_model("test_mamba3d", device="meta")
    Image.linear_gradient("L").save(tmp_path / "still.png")
    clip = create_reader(model)(tmp_path / "still.png")
    assert clip.shape == (1, *input_size(model))
    assert torch.equal(clip, clip[:, :, :1].expand_as(clip))


def test_clip_shorter_than_the_model_takes(animation):
    model = timm.create_model("test_mamba3d", device="meta")
    assert model.num_frames > 5
    assert create_reader(model)(animation).shape == (1, *input_size(model))


def test_class_names():
    assert class_names(timm.create_model("test_vmamba", num_classes=3, device="meta")) == ["0", "1", "2"]
    model = timm.create_model("test_vmamba", num_classes=2, device="meta")
    model.pretrained_cfg["label_names"] = ["cat", "dog"]
    assert class_names(model) == ["cat", "dog"]
